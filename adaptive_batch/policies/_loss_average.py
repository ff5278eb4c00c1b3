"""The training loss, smoothed."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from adaptive_batch.measurement import Measurement
from adaptive_batch.policies import _state
from adaptive_batch.policies._arguments import number


class LossAverage:
    """An exponential average of the training loss, debiased.

    Args:
        decay: what an update leaves of the weight of those before, in [0, 1).

    Attributes:
        mean: the average, NaN before there is a loss.
    """

    def __init__(self, decay: float) -> None:
        self._decay = decay
        self._total = self._weight = 0.0
        self._seen = 0

    @property
    def mean(self) -> float:
        """The average, NaN before there is a loss."""
        return self._total / self._weight if self._weight else math.nan

    def update(self, measurement: Measurement) -> bool:
        """Take in the mean loss of the updates since the last call; the same update again changes nothing.

        One that does not say which update it is (0) is the next.

        Returns:
            Whether it is of another run than those before, which are forgotten then.
        """
        loss, is_other_run = float(measurement.loss), measurement.update < self._seen
        if is_other_run:
            self._total = self._weight = 0.0
            self._seen = 0
        since = measurement.update - self._seen if measurement.update else 1
        if not since or not math.isfinite(loss):
            return is_other_run
        kept = self._decay**since
        self._total = kept * self._total + (1 - kept) * loss
        self._weight = kept * self._weight + 1 - kept
        self._seen = measurement.update
        return is_other_run

    def state_dict(self) -> dict[str, Any]:
        """Sums and the last update."""
        return {"total": self._total, "weight": self._weight, "seen": self._seen}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Put back what :meth:`state_dict` gave.

        Raises:
            ValueError: if the state is not one of an average.
        """
        fits = {"total": _state.is_number, "weight": _state.is_weight, "seen": _state.is_count}
        state = _state.checked(self, state, **fits)
        self._total, self._weight, self._seen = state["total"], state["weight"], state["seen"]


def check_decay(decay: float) -> float:
    """``decay``, if it is one.

    Raises:
        ValueError: if it is not in [0, 1).
    """
    decay = number("smoothing", decay)
    if not 0 <= decay < 1:
        raise ValueError(f"smoothing={decay} is no decay of an average: pass one in [0, 1).")
    return float(decay)
