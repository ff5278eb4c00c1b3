"""At which updates to measure the gradient noise."""

from __future__ import annotations

import math

__all__ = ["measures_noise"]

RATE = 3.0
"""For measurements by the parts of an update, which are many times less exact than those by examples."""

EXAMPLES_RATE = 1.5
"""For measurements by the norms of single examples."""


def measures_noise(update: int, rate: float = RATE) -> bool:
    """Whether update ``update`` (from 0) is one of the measured ones.

    After ``u`` updates ``rate sqrt(u)`` have been, and all while ``u`` is below ``rate^2``: dense while the
    noise scale moves by orders of magnitude, ever sparser as it settles, with the measurements' share of
    the run, and their cost, going to zero. It depends on the count alone, so a resumed run measures the
    same updates.
    """
    return math.floor(_measured(update + 1, rate)) > math.floor(_measured(update, rate))


def _measured(updates: int, rate: float) -> float:
    return min(float(updates), rate * math.sqrt(updates))
