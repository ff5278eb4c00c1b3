"""How many samples a pass may have: what the user allows, what memory should hold, what has failed."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from adaptive_batch.memory import MemoryModel
from adaptive_batch.micro_batching import balanced_sizes

__all__ = ["MicroBatchLimit"]

RETRY_AFTER = 200
"""Batches that have to succeed at a learned limit before twice as many samples are tried again; doubled each
time that fails, so that a limit that is real costs ever fewer attempts."""

_GROWTH = 2  # the memory model is not trusted beyond twice the largest size that was measured
_REMEASURE = 100


class MicroBatchLimit:
    """The most samples per forward/backward pass.

    The smallest of three bounds, and at least ``smallest``: the user's own; the largest number of samples
    whose predicted memory is within the budget, beside what is held anyway; and what failures have taught. A
    failure at ``n`` samples teaches ``n / 2``, rounded up; after 200 batches at a bound that was learned so
    (400 after the next failure, and so on) twice as many are tried.

    Args:
        largest: the user's bound; ``None`` is none.
        smallest: fewest samples that the model can take.

    Attributes:
        model: bytes that a pass takes, beside ``held``, as a function of its samples.
        budget: bytes that there are, in the unit of ``model``; ``None`` leaves it to failures.
        held: bytes that are held between passes (parameters, gradients, the optimizer's state).
        learned: the bound that failures have taught, ``None`` before the first.
    """

    def __init__(self, *, largest: int | None = None, smallest: int = 1) -> None:
        self.largest = largest
        self.smallest = smallest
        self.budget: int | None = None
        self.held = 0
        self.model = MemoryModel()
        self.learned: int | None = None
        self._retry_after = RETRY_AFTER
        self._succeeded = 0
        self._falling = False
        self._passes = 0

    def of(self, samples: int) -> int:
        """Most samples per pass for a batch of ``samples``."""
        bounds = [b for b in (self.largest, self.learned, self._affordable()) if b is not None]
        return max(min([samples, *bounds]), min(self.smallest, samples))

    def sizes(self, samples: int, *, parts: int = 1) -> list[int]:
        """Samples of each pass of a batch, in ``parts`` passes at least where it has as many samples."""
        return balanced_sizes(samples, min(self.of(samples), -(-samples // parts)), self.smallest)

    def _affordable(self) -> int | None:
        if self.budget is None:
            return None
        measured = self.model.measured
        if not measured:
            return None
        return min(self.model.largest(self.budget - self.held), _GROWTH * measured[-1])

    def measures(self, samples: int) -> bool:
        """Whether the next pass, of ``samples``, should be measured: sizes not seen yet, and some again."""
        self._passes += 1
        return samples not in self.model.measured or self._passes % _REMEASURE == 0

    def failed(self, samples: int) -> None:
        """A pass of ``samples`` ran out of memory."""
        if self.learned is not None and not self._falling:
            self._retry_after *= 2
        self.learned = max(-(-samples // 2), self.smallest)
        self._succeeded = 0
        self._falling = True  # failing again at once says nothing about growing again

    def succeeded(self, samples: int) -> None:
        """A batch of ``samples`` went through."""
        self._falling = False
        if self.learned is None or not self.of(samples) == self.learned < samples:
            return
        self._succeeded += 1
        if self._succeeded >= self._retry_after:
            self.learned *= 2
            self._succeeded = 0

    def predicted(self, samples: int) -> float:
        """Predicted peak while a pass of ``samples`` runs, in bytes; ``NaN`` while not known."""
        return self.held + self.model.predict(samples) if self.model.measured else math.nan

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
            ValueError: if something is missing or not a number; nothing is changed then.
        """
        missing = [key for key in self.state_dict() if key not in state]
        if missing:
            raise ValueError(f"this is not the state of a MicroBatchLimit: {', '.join(missing)} missing.")
        least = {"learned": 1, "retry_after": 1, "succeeded": 0, "passes": 0}
        for key, value in least.items():
            absent = key == "learned" and state[key] is None
            if not absent and (type(state[key]) is not int or state[key] < value):
                raise ValueError(f"a MicroBatchLimit state cannot have {key}={state[key]!r}.")
        self.model.load_state_dict(state["model"])  # refuses what is none before it changes anything
        self.learned = state["learned"]
        self._retry_after, self._succeeded = state["retry_after"], state["succeeded"]
        self._passes = state["passes"]
