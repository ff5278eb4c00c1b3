"""When schedulers that step per update should step, if the updates are not all of the same size."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

__all__ = ["GainClock", "PlainEpoch", "SampleClock"]


@dataclass(frozen=True)
class PlainEpoch:
    """What an epoch would be at the reference size.

    Attributes:
        samples: samples delivered, over all ranks; ``None`` if the data has no length.
        batches: loader batches; ``None`` if the data has no length.
        batch_size: samples of one loader batch over all ranks, ``B0 / accumulate``.
        accumulate: loader batches per update.
    """

    samples: int | None
    batches: int | None
    batch_size: int
    accumulate: int = 1

    @property
    def updates(self) -> int | None:
        """Optimizer updates, ``U``."""
        return None if self.batches is None else math.ceil(self.batches / self.accumulate)


class SampleClock:
    """Counts the steps that per-update schedulers should have taken after so many samples.

    After ``s`` samples of an epoch they are ``epoch * U + min(U, ceil(s / B0))``, and all ``U`` of the epoch
    at its end, so a schedule over the run still ends with the run when the batches grow. It does not pass the
    schedule's horizon.

    Args:
        horizon: steps that plain Lightning would take at most in the whole run.
    """

    def __init__(self, horizon: float = math.inf) -> None:
        self.taken = 0
        self.total = 0
        self.horizon = horizon

    def start_epoch(self) -> None:
        """At the start of an epoch, not of a resumed part of one."""
        self.taken = 0

    def go_on(self, plain: PlainEpoch, position: int, steps: int) -> None:
        """From ``position`` samples of an epoch, after so many ``steps`` of the run that this clock has not seen."""
        self.taken = math.ceil(position / (plain.batch_size * plain.accumulate))
        self.total = steps

    def advance(self, plain: PlainEpoch, position: int, gain: float, *, last: bool) -> list[int]:
        """Steps due after an update, each as the batch index (from 1) at which Lightning alone would take it.

        Args:
            plain: the epoch at the reference size.
            position: samples of this epoch consumed, the update's included.
            gain: what the update was worth in updates at ``B0``; not used by this clock.
            last: whether the update ends the epoch.
        """
        target = math.ceil(position / (plain.batch_size * plain.accumulate))
        if plain.updates is not None:
            target = plain.updates if last else min(target, plain.updates)
        if target <= self.taken:
            return []
        due = list(range((self.taken + 1) * plain.accumulate, target * plain.accumulate + 1, plain.accumulate))
        if plain.batches is not None:
            due[-1] = min(due[-1], plain.batches)  # an epoch's last window may be short
        due = due[: int(max(0, min(len(due), self.horizon - self.total)))]
        self.taken = target
        self.total += len(due)
        return due

    def state_dict(self) -> dict[str, float]:
        """Steps taken in the running epoch and in the run."""
        return {"taken": self.taken, "total": self.total}

    def load_state_dict(self, state: Mapping[str, float]) -> None:
        """Put back what :meth:`state_dict` gave.

        Raises:
            ValueError: if the state is not one of this clock; nothing is changed then.
        """
        taken, total = _checked_count(state), _checked_count(state, "total")
        self.taken, self.total = taken, total


class GainClock:
    """Counts scheduler steps in units of AdaScale's progress: the sum of the updates' gains.

    Johnson, Agrawal, Gu, Guestrin 2020, arXiv:2007.05105. It does not pass the schedule's horizon.

    Args:
        horizon: steps that plain Lightning would take in the whole run.
    """

    def __init__(self, horizon: float) -> None:
        self.progress = 0.0
        self.taken = 0
        self.horizon = horizon

    def start_epoch(self) -> None:
        """Progress does not know epochs."""

    def go_on(self, plain: PlainEpoch, position: int, steps: int) -> None:
        """After so many ``steps`` of the run that this clock has not seen; arguments as for :class:`SampleClock`."""
        self.progress, self.taken = float(steps), steps

    def advance(self, plain: PlainEpoch, position: int, gain: float, *, last: bool) -> list[int]:
        """Steps due after an update; arguments as for :meth:`SampleClock.advance`."""
        self.progress += gain
        target = int(min(math.floor(self.progress + 1e-6), self.horizon))
        due = [_batch_index(step, plain) for step in range(self.taken + 1, target + 1)]
        self.taken = max(self.taken, target)
        return due

    def state_dict(self) -> dict[str, float]:
        """Progress and steps taken in the run."""
        return {"progress": self.progress, "taken": self.taken}

    def load_state_dict(self, state: Mapping[str, float]) -> None:
        """Put back what :meth:`state_dict` gave.

        Raises:
            ValueError: if the state is not one of this clock; nothing is changed then.
        """
        taken, progress = _checked_count(state), state.get("progress")
        if not isinstance(progress, (int, float)) or not 0 <= progress < math.inf:
            raise ValueError(f"a clock's state cannot have progress={progress!r}; load what state_dict() returned.")
        self.progress, self.taken = float(progress), taken


def _checked_count(state: Mapping[str, float], name: str = "taken") -> int:
    count = state.get(name) if isinstance(state, Mapping) else None
    if not isinstance(count, int) or isinstance(count, bool) or count < 0:
        raise ValueError(f"a clock's state cannot have {name}={count!r}; load what state_dict() returned.")
    return count


def _batch_index(step: int, plain: PlainEpoch) -> int:
    if plain.updates is None or plain.batches is None:
        return step * plain.accumulate
    in_epoch = (step - 1) % plain.updates + 1
    return min(in_epoch * plain.accumulate, plain.batches)
