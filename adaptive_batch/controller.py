"""Observations in, decisions out: the one place that decides about the batch size."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from adaptive_batch.lr_scaling import LRScaling, resolve_lr_scaling
from adaptive_batch.measurement import Measurement, read_numbers
from adaptive_batch.noise import GradientNoiseScale
from adaptive_batch.policies import Constant, Policy, is_measured, resolve_policy
from adaptive_batch.throughput import StepTimeModel

__all__ = ["BatchSizeController", "Decision"]

MIN_PROMISE = 0.05
"""Goodput that a change must promise (AdaptDL's value; Qiao et al., OSDI 2021)."""

MAX_GROWTH = 2.0
"""Largest factor of one change, so that no single noisy estimate can carry the size away."""

MIN_DWELL = 20
"""Updates between changes (Sievert & Charles 2019, arXiv:1910.08222)."""

SETTLE = 2
"""Updates at a new size that are not timed: autotuning, recompilation and caches belong to the change."""

NOISE_MEMORY_UPDATES = 32
NOISE_MEMORY_FRACTION = 0.25
"""The noise averages remember a quarter of the measured samples, and no fewer than 32 updates' worth:
the noise scale moves on the scale of the run's own age, and evidence needs a number of measurements."""


@dataclass(frozen=True)
class Decision:
    """A new batch size, and why.

    Attributes:
        batch_size: the new global batch size, in samples.
        previous: the size before.
        reason: one sentence.
    """

    batch_size: int
    previous: int
    reason: str


@dataclass(frozen=True)
class _Stay:
    """No change; ``kind`` tells one reason from another, whatever the numbers in ``reason``.

    Without a kind there is nothing to say: the policy is content, or it is too early to ask.
    """

    kind: str = ""
    reason: str = ""


class BatchSizeController:
    """Turns measurements of updates into decisions about the batch size.

    It keeps the noise and step-time estimates, asks the policy once every ``adjust_every`` updates, and is
    careful with the answer of a policy that measures: sizes are ``B0`` times a power of two, a step is
    at most a factor of two, 20 updates pass between changes, a change must promise 5 % of goodput where
    that can be computed, and it must still be right at the pessimistic end of the noise scale's
    confidence interval. Answers of schedules and functions are rounded and clamped, no more.

    Args:
        policy: a name, an object with ``propose(measurement) -> float``, or a function of a measurement.
        lr_scaling: a name or rule of :mod:`adaptive_batch.lr_scaling`.
        min_batch_size: smallest size; ``None`` is the reference size.
        max_batch_size: largest size; ``None`` sets no bound.
        reference_batch_size: ``B0``; ``None`` takes that of the first measurement.
        adjust_every: updates between two questions to the policy.
        quantize: ``True`` and ``False`` force or forbid the care above; ``None`` goes by the policy.
        multiple_of: sizes are multiples of it (batches that the user accumulates into one update).

    Attributes:
        batch_size: the size in force, ``None`` before anything was measured.
        note: why the last answer changed nothing, ``None`` after a change.
        noise: the :class:`GradientNoiseScale` fed with the updates' parts.
        step_time: the :class:`StepTimeModel` fed with the updates' times.

    Raises:
        ValueError: for sizes below one, or a minimum above the maximum.
    """

    def __init__(
        self,
        policy: str | Policy | Callable[[Measurement], float],
        *,
        lr_scaling: str | LRScaling,
        min_batch_size: int | None = None,
        max_batch_size: int | None = None,
        reference_batch_size: int | None = None,
        adjust_every: int = 10,
        quantize: bool | None = None,
        multiple_of: int = 1,
    ) -> None:
        check_bounds(min_batch_size, max_batch_size)
        for name, value in (("adjust_every", adjust_every), ("multiple_of", multiple_of)):
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"{name}={value!r} must be a positive whole number.")
        self.policy = resolve_policy(policy)
        self.lr_scaling = resolve_lr_scaling(lr_scaling)
        self.min_batch_size = min_batch_size
        self.max_batch_size = max_batch_size
        self.adjust_every = adjust_every
        self.careful = is_measured(self.policy) if quantize is None else quantize
        self.multiple_of = multiple_of
        self.noise = GradientNoiseScale()
        self.step_time = StepTimeModel()
        self.reference_batch_size = reference_batch_size
        self.batch_size = reference_batch_size
        self.note: str | None = None
        self._note_kind: str | None = None
        self._pending: list[Measurement] = []
        self._updates = 0
        self._changed_at = -MIN_DWELL
        self._measured_samples = 0
        self._timed_size = 0
        self._timed_run = 0
        self._last_noise_scale = math.nan

    @property
    def policy_needs(self) -> frozenset[str]:
        """The statistics that the policy alone uses."""
        return frozenset(getattr(self.policy, "needs", ()))

    @property
    def needs(self) -> frozenset[str]:
        """The statistics that policy and learning-rate rule use: any of ``"noise"`` and ``"step_time"``."""
        if isinstance(self.policy, Constant) and self.policy.batch_size in (None, self.reference_batch_size):
            return frozenset()  # the scale is always one
        return self.policy_needs | frozenset(getattr(self.lr_scaling, "needs", ()))

    @property
    def noise_scale(self) -> float:
        """The last identified noise scale in samples, ``NaN`` before there is one."""
        return self._last_noise_scale

    def lr_factor(self, batch_size: float) -> float:
        """Factor on the scheduled learning rate for an update of ``batch_size`` samples."""
        if self.reference_batch_size is None:
            return 1.0
        return self.lr_scaling.factor(batch_size, self.reference_batch_size, self._last_noise_scale)

    def observe(self, measurement: Measurement) -> Decision | None:
        """Take in one update; every ``adjust_every``-th call asks the policy.

        Returns:
            The change of the batch size that was decided, or ``None``.
        """
        if self.reference_batch_size is None:
            self.reference_batch_size = measurement.reference_batch_size
        if self.batch_size is None:
            self.batch_size = self.reference_batch_size
        self._pending.append(measurement)
        self._updates += 1
        if self._updates % self.adjust_every:
            return None
        self._absorb()
        return self._decide(self._describe(measurement))

    def _absorb(self) -> None:
        """Read the pending measurements' numbers in one transfer and update the estimates."""
        norms = iter(read_numbers([n for m in self._pending for n in (*m.part_sq_norms, m.sq_norm)]))
        for m in self._pending:
            part_sq_norms = [next(norms) for _ in m.part_sq_norms]
            self._absorb_noise(m, part_sq_norms, next(norms))
            self._absorb_time(m)
        self._pending.clear()

    def _absorb_noise(self, m: Measurement, part_sq_norms: list[float], sq_norm: float) -> None:
        if len(part_sq_norms) < 2:
            return
        size = sum(m.part_sizes)
        self._measured_samples += size
        fraction = NOISE_MEMORY_FRACTION * self._measured_samples
        self.noise.memory = max(NOISE_MEMORY_UPDATES * size, fraction)
        self.noise.update(part_sq_norms, m.part_sizes, sq_norm)
        if math.isfinite(self.noise.noise_scale):
            self._last_noise_scale = self.noise.noise_scale

    def _absorb_time(self, m: Measurement) -> None:
        self._timed_run = self._timed_run + 1 if m.batch_size == self._timed_size else 1
        self._timed_size = m.batch_size
        if self._timed_run <= SETTLE:  # an epoch's tail has no successor of its size and never gets here
            return
        self.step_time.update(m.batch_size, float(m.seconds))  # which skips what was not timed
        for size, seconds in zip(m.pass_sizes, m.pass_seconds, strict=True):
            self.step_time.update_pass(size, float(seconds))

    def _describe(self, m: Measurement) -> Measurement:
        """The measurement as the policy sees it: plain numbers, with the estimates."""
        assert self.batch_size is not None and self.reference_batch_size is not None
        (loss,) = read_numbers([m.loss])
        return replace(
            m,
            batch_size=self.batch_size,
            reference_batch_size=self.reference_batch_size,
            loss=loss,
            part_sq_norms=(),
            part_sizes=(),
            pass_sizes=(),
            pass_seconds=(),
            sq_norm=math.nan,
            noise_scale=self.noise.noise_scale,
            grad_sq_norm=self.noise.grad_sq_norm,
            grad_variance=self.noise.grad_variance,
            interval=self.noise.interval(0.95),
            step_time=self.step_time,
        )

    def _decide(self, m: Measurement) -> Decision | None:
        answer = self._answer(m)
        if isinstance(answer, _Stay):
            if answer.kind and answer.kind != self._note_kind:
                self.note = f"{self.batch_size} stays: {answer.reason}"
                self._note_kind = answer.kind
            return None
        self.note = self._note_kind = None
        self._changed_at = self._updates
        self.batch_size = answer.batch_size
        return answer

    def _answer(self, m: Measurement) -> Decision | _Stay:
        proposal = float(self.policy.propose(m))
        if not math.isfinite(proposal):
            return _Stay("no proposal", f"the policy proposed {proposal}")
        if self.careful:
            return self._careful_answer(m, proposal)
        size = self._clamp(proposal)
        if size == m.batch_size:
            return _Stay()
        return Decision(size, m.batch_size, self._reason(m, size, proposal))

    def _careful_answer(self, m: Measurement, proposal: float) -> Decision | _Stay:
        waiting = self._missing_evidence(m)
        if waiting is not None:
            return waiting
        size = self._neighbour(m.batch_size, proposal)
        if size == m.batch_size:
            return self._stay_at(m, proposal)
        if self._updates - self._changed_at < MIN_DWELL:
            return _Stay()
        objection = self._objection(m, size, proposal)
        if objection is not None:
            return objection
        return Decision(size, m.batch_size, self._reason(m, size, proposal))

    def _missing_evidence(self, m: Measurement) -> _Stay | None:
        if "noise" in self.policy_needs and not math.isfinite(m.noise_scale):
            return _Stay("noise", "the gradient noise scale is not identified yet")
        if "step_time" in self.policy_needs and not math.isfinite(self.step_time.predict(2 * m.batch_size)):
            return _Stay("step time", "the time of a larger update is not known yet")
        return None

    def _stay_at(self, m: Measurement, proposal: float) -> _Stay:
        if proposal > m.batch_size and m.batch_size == self.max_batch_size:
            return _Stay("maximum", f"the policy proposes {proposal:.0f}, max_batch_size is {m.batch_size}")
        if proposal < m.batch_size and m.batch_size == self._smallest:
            return _Stay("minimum", f"the policy proposes {proposal:.0f}, min_batch_size is {m.batch_size}")
        return _Stay("near", f"the policy proposes {proposal:.0f}, less than a factor of two away")

    def _objection(self, m: Measurement, size: int, proposal: float) -> _Stay | None:
        """What speaks against a change: too small a promise, or too little evidence."""
        doubtful = replace(m, noise_scale=m.interval[0] if size > m.batch_size else m.interval[1])
        goodput = getattr(self.policy, "goodput", None)
        if goodput is None:
            side = math.copysign(1.0, proposal - m.batch_size)
            if math.isfinite(m.noise_scale) and (self.policy.propose(doubtful) - m.batch_size) * side <= 0:
                return _Stay("interval", f"the noise scale's interval {_interval(m)} does not exclude it")
            return None
        promise = goodput(size, m) / goodput(m.batch_size, m) - 1
        if not promise >= MIN_PROMISE:
            return _Stay(
                f"promise {size}",
                f"noise scale {m.noise_scale:.0f} {_interval(m)}, {size} promises {promise:+.0%} goodput, "
                f"less than {MIN_PROMISE:+.0%}{self._cost_in_words(m, size)}",
            )
        if not goodput(size, doubtful) >= goodput(m.batch_size, doubtful):
            return _Stay(
                "interval", f"the noise scale's interval {_interval(m)} does not rule out a loss at {size}"
            )
        return None

    def _cost_in_words(self, m: Measurement, size: int) -> str:
        ratio = self.step_time.predict(size) / self.step_time.predict(m.batch_size)
        return f" (an update of {size} takes {ratio:.2f} times as long as one of {m.batch_size})"

    def _neighbour(self, current: int, proposal: float) -> int:
        """The next quantised size in the direction of the proposal, if the proposal is that far.

        Where the policy can compute a promise, the promise decides instead of the distance.
        """
        reach = 1.0 if hasattr(self.policy, "goodput") else MAX_GROWTH
        if proposal > current:
            size = self._clamp(self._grid_above(current))
            return size if proposal >= min(reach * current, size) else current
        size = self._clamp(self._grid_below(current))
        return size if proposal <= max(current / reach, size) else current

    def _grid_above(self, current: int) -> float:
        base = float(self.reference_batch_size or current)
        return float(base * 2.0 ** (math.floor(math.log2(current / base) + 1e-9) + 1))

    def _grid_below(self, current: int) -> float:
        base = float(self.reference_batch_size or current)
        return float(base * 2.0 ** (math.ceil(math.log2(current / base) - 1e-9) - 1))

    @property
    def _smallest(self) -> int:
        return self.min_batch_size or self.reference_batch_size or 1

    def _clamp(self, size: float) -> int:
        step = self.multiple_of
        largest = math.inf if self.max_batch_size is None else max(step, self.max_batch_size // step * step)
        smallest = max(step, math.ceil(self._smallest / step) * step)
        return int(min(max(round(size / step) * step, smallest), largest))

    def _reason(self, m: Measurement, size: int, proposal: float) -> str:
        explain = getattr(self.policy, "reason", None)
        words = explain(m, size) if explain is not None else f"{_name(self.policy)} proposes {proposal:.0f}"
        return f"{m.batch_size} -> {size}: {words}"

    def state_dict(self) -> dict[str, Any]:
        """Everything a resumed run needs to decide as this one would have; plain numbers only."""
        state: dict[str, Any] = {
            "reference_batch_size": self.reference_batch_size,
            "batch_size": self.batch_size,
            "note": self.note,
            "note_kind": self._note_kind,
            "updates": self._updates,
            "changed_at": self._changed_at,
            "measured_samples": self._measured_samples,
            "timed_size": self._timed_size,
            "timed_run": self._timed_run,
            "noise_scale": self._last_noise_scale,
            "noise": self.noise.state_dict(),
            "step_time": self.step_time.state_dict(),
            "pending": [_plain(m) for m in self._pending],
        }
        if hasattr(self.policy, "state_dict"):
            state["policy"] = self.policy.state_dict()
        return state

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Put back what :meth:`state_dict` gave.

        Raises:
            ValueError: if something is missing; nothing is changed then.
        """
        missing = [key for key in self.state_dict() if key not in state and key != "policy"]
        if missing:
            raise ValueError(f"this is not the state of a BatchSizeController: {', '.join(missing)} missing.")
        pending = [Measurement(**m) for m in state["pending"]]
        self.noise.load_state_dict(state["noise"])
        self.step_time.load_state_dict(state["step_time"])
        if "policy" in state and hasattr(self.policy, "load_state_dict"):
            self.policy.load_state_dict(state["policy"])
        self.reference_batch_size = state["reference_batch_size"]
        self.batch_size = state["batch_size"]
        self.note = state["note"]
        self._note_kind = state["note_kind"]
        self._updates = state["updates"]
        self._changed_at = state["changed_at"]
        self._measured_samples = state["measured_samples"]
        self._timed_size = state["timed_size"]
        self._timed_run = state["timed_run"]
        self._last_noise_scale = state["noise_scale"]
        self._pending = pending


def check_bounds(min_batch_size: int | None, max_batch_size: int | None) -> None:
    """Refuse bounds that no batch size can meet.

    Raises:
        ValueError: if a bound is not a positive whole number, or the lower exceeds the upper.
    """
    for name, value in (("min_batch_size", min_batch_size), ("max_batch_size", max_batch_size)):
        if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < 1):
            raise ValueError(f"{name}={value!r} must be a positive whole number of samples, or None.")
    if min_batch_size is not None and max_batch_size is not None and min_batch_size > max_batch_size:
        raise ValueError(
            f"min_batch_size={min_batch_size} is above max_batch_size={max_batch_size}; swap or widen them."
        )


def _plain(m: Measurement) -> dict[str, Any]:
    """A pending measurement without its tensors and models."""
    *norms, sq_norm, loss = read_numbers([*m.part_sq_norms, m.sq_norm, m.loss])
    fields = {name: getattr(m, name) for name in _PENDING_FIELDS}
    for name in ("part_sizes", "pass_sizes"):
        fields[name] = list(getattr(m, name))
    fields["pass_seconds"] = [float(seconds) for seconds in m.pass_seconds]
    return {**fields, "part_sq_norms": norms, "sq_norm": sq_norm, "loss": loss, "seconds": float(m.seconds)}


_PENDING_FIELDS = ("update", "epoch", "samples", "batch_size", "reference_batch_size", "lr", "peak_memory")


def _interval(m: Measurement) -> str:
    low, high = m.interval
    return f"[{low:.0f}, {high:.0f}]"


def _name(policy: object) -> str:
    return getattr(policy, "name", type(policy).__name__)
