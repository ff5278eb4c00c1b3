"""At which updates to split on purpose, to learn the gradient noise."""

from __future__ import annotations

import math

__all__ = ["measures_noise"]

RATE = 3.0


def measures_noise(update: int) -> bool:
    """Whether update ``update`` (from 0) is one of the measured ones.

    Each of the first nine is, and after ``u`` updates ``3 sqrt(u)`` have been: dense while the noise scale
    moves by orders of magnitude, ever sparser as it settles, with the measurements' share of the run, and
    their cost, going to zero. It depends on the count alone, so a resumed run measures the same updates.
    """
    return math.floor(_measured(update + 1)) > math.floor(_measured(update))


def _measured(updates: int) -> float:
    return min(float(updates), RATE * math.sqrt(updates))
