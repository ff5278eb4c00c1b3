"""At which updates to measure the gradient noise."""

from __future__ import annotations

import math
from typing import NamedTuple

__all__ = ["EXAMPLES", "PARTS", "PURPOSEFUL_PARTS", "Schedule", "measures_noise"]

PURPOSEFUL_PARTS = 2
"""Parts of an update that is split for the noise alone: each costs a pass's overhead, and what limits the
estimate of |G|^2 is the number of measured updates, not of parts."""


class Schedule(NamedTuple):
    """Of the first ``u`` updates ``first + rate sqrt(u)`` are measured, and all while that is more than ``u``.

    Dense while the noise scale moves by orders of magnitude, ever sparser as it settles, with the measurements'
    share of the run, and their cost, going to zero.
    """

    first: float
    rate: float

    def thinned(self, share: float) -> Schedule:
        """That ``share`` of the measurements."""
        return Schedule(share * self.first, share * self.rate)


PARTS = Schedule(0, 3)
"""For measurements by the parts of an update."""

EXAMPLES = Schedule(8, 3)
"""For measurements by the norms of single examples, which say as much as many of those by parts."""


def measures_noise(update: int, schedule: Schedule = PARTS) -> bool:
    """Whether update ``update`` (from 0) is one of the measured ones.

    It depends on the count alone, so a resumed run measures the same updates.
    """
    return math.floor(_measured(update + 1, schedule)) > math.floor(_measured(update, schedule))


def _measured(updates: int, schedule: Schedule) -> float:
    return min(float(updates), schedule.first + schedule.rate * math.sqrt(updates))
