"""How many samples a pass may have: what the user allows, what memory is predicted to hold, what has failed."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from adaptive_batch.memory import MemoryModel

__all__ = ["MicroBatchLimit"]

RETRY_AFTER = 200
"""Batches that have to succeed at a learned limit before twice as many samples are tried again; doubled by
each failure, so that a limit that is real costs ever fewer attempts."""

_GROWTH = 2  # the memory model is not trusted beyond twice the largest size that was measured
_REMEASURE = 100


class MicroBatchLimit:
    """The most samples per forward/backward pass.

    Args:
        largest: the user's bound; ``None`` is none.
        smallest: fewest samples that the model can take.

    Attributes:
        model: the memory of a pass as a function of its samples.
        budget: bytes that a pass may take, in the unit of ``model``; ``None`` leaves it to failures.
        learned: the bound that failures have taught, ``None`` before the first.
    """

    def __init__(self, *, largest: int | None = None, smallest: int = 1) -> None:
        self.largest = largest
        self.smallest = smallest
        self.budget: int | None = None
        self.model = MemoryModel()
        self.learned: int | None = None
        self._retry_after = RETRY_AFTER
        self._succeeded = 0
        self._passes = 0

    def of(self, samples: int) -> int:
        """Most samples per pass for a batch of ``samples``."""
        bounds = [b for b in (self.largest, self.learned, self._affordable()) if b is not None]
        return max(min([samples, *bounds]), min(self.smallest, samples))

    def _affordable(self) -> int | None:
        measured = self.model.measured
        if self.budget is None or not measured:
            return None
        return max(1, min(self.model.largest(self.budget), _GROWTH * measured[-1]))

    def measures(self, samples: int) -> bool:
        """Whether the next pass, of ``samples``, should be measured: sizes not seen yet, and some again."""
        self._passes += 1
        return samples not in self.model.measured or self._passes % _REMEASURE == 0

    def failed(self, samples: int) -> None:
        """A pass of ``samples`` ran out of memory: half of it is the limit, rounded up."""
        self.learned = max(-(-samples // 2), self.smallest)
        self._succeeded = 0
        self._retry_after *= 2

    def succeeded(self, samples: int) -> None:
        """A batch whose largest pass had ``samples`` went through."""
        if self.learned is None or samples < self.learned:
            return
        self._succeeded += 1
        if self._succeeded >= self._retry_after:
            self.learned *= 2
            self._succeeded = 0

    def predicted(self, samples: int) -> float:
        """Predicted bytes of a pass, ``NaN`` while not known."""
        return self.model.predict(samples) if self.model.measured else math.nan

    def state_dict(self) -> dict[str, Any]:
        """What was learned, as plain numbers."""
        return {
            "learned": self.learned,
            "retry_after": self._retry_after,
            "succeeded": self._succeeded,
            "passes": self._passes,
            "model": self.model.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Put back what :meth:`state_dict` gave.

        Raises:
            ValueError: if something is missing; nothing is changed then.
        """
        missing = [key for key in self.state_dict() if key not in state]
        if missing:
            raise ValueError(f"this is not the state of a MicroBatchLimit: {', '.join(missing)} missing.")
        self.model.load_state_dict(state["model"])
        self.learned = state["learned"]
        self._retry_after, self._succeeded = state["retry_after"], state["succeeded"]
        self._passes = state["passes"]
