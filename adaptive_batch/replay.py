"""What another policy would have decided on a recorded run."""

from __future__ import annotations

import copy
from collections import deque
from collections.abc import Callable

from adaptive_batch.controller import SETTLE, BatchSizeController
from adaptive_batch.history import Change, History
from adaptive_batch.measurement import Measurement
from adaptive_batch.policies import Policy, resolve_policy

__all__ = ["replay"]

_FROM_PARTS = {"noise": "noise_scale", "variance": "grad_variance", "inner_products": "inner_product_variance"}


def replay(
    history: History,
    policy: str | Policy | Callable[[Measurement], float],
    *,
    min_batch_size: int | None = None,
    max_batch_size: int | None = None,
    quantize: bool | None = None,
    multiple_of: int = 1,
) -> list[Change]:
    """What a policy would have decided, asked with the measurements of a recorded run.

    Its own decisions have no effect on the measurements: gradient noise, loss and learning rate are those of the run as
    it was. That is exact for the policy of the run with its arguments, unless it goes by step times: those of single
    passes are not recorded. For any other it is a first answer.

    Schedules, functions and policies that go by loss and learning rate can be replayed on any run. Those that go by
    gradient noise need one that measured it: record it under such a policy, with ``dry_run=True`` if nothing
    is to change. Those that go by step times know only those of the sizes that the run had. Of a long run the last
    2000 decisions are there, from the size in force at the first of them on.

    Args:
        history: of the run.
        policy: a name, a policy or a function; a copy is asked.
        min_batch_size: smallest size; None is the reference size.
        max_batch_size: largest; None sets no bound.
        quantize: as of :class:`~adaptive_batch.BatchSizeController`.
        multiple_of: every size is a multiple of it: the ``accumulate_grad_batches`` of the run.

    Returns:
        The changes, in order.

    Raises:
        ValueError: if the run has no decisions, or did not measure what the policy needs.
        TypeError: if ``history`` is none.
    """
    if not isinstance(history, History):
        raise TypeError(f"{history!r} is no history: pass the history of a callback or trainer.")
    if not history.measurements:
        raise ValueError("the history has no decisions to replay: pass that of a run with a controller.")
    asked = copy.deepcopy(resolve_policy(policy))
    _check_measured(history, asked)
    first = history.measurements[0]
    controller = BatchSizeController(
        asked,
        lr_scaling="none",
        min_batch_size=min_batch_size,
        max_batch_size=max_batch_size,
        reference_batch_size=first.reference_batch_size,
        quantize=quantize,
        multiple_of=multiple_of,
    )
    controller.batch_size = first.batch_size
    updates, changes = deque(history.updates), []
    size, made = first.batch_size, SETTLE
    for measurement in history.measurements:
        if measurement.batch_size != size:
            size, made = measurement.batch_size, 0
        while updates and updates[0].step <= measurement.update:
            done = updates.popleft()
            if not 0.5 < done.batch_size / size < 2:  # a tail, or fetched before the last change
                continue
            made += 1
            if made > SETTLE:
                controller.step_time.update(done.batch_size, done.seconds)
        decision = controller.decide(measurement)
        if decision is not None:
            where = (measurement.update, measurement.epoch, measurement.samples)
            changes.append(Change(*where, decision.batch_size, decision.previous, decision.reason))
    return changes


def _check_measured(history: History, policy: Policy) -> None:
    for need in sorted(set(getattr(policy, "needs", ())) & set(_FROM_PARTS)):
        values = (getattr(m, _FROM_PARTS[need]) for m in history.measurements)
        if all(value != value for value in values):
            raise ValueError(
                f"{getattr(policy, 'name', type(policy).__name__)} needs {need!r}, which the recorded run does not "
                "know: record one under a policy that needs it too, with dry_run=True if nothing is to change."
            )
