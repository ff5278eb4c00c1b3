"""A schedule of sizes, in the manner of AdaBatch."""

from __future__ import annotations

import math
from collections.abc import Mapping

from adaptive_batch.measurement import Measurement
from adaptive_batch.policies._arguments import check_mapping, number
from adaptive_batch.policies._position import check_start, check_unit, position


class Milestones:
    """A new batch size from each milestone on.

    ``B(x) = sizes[i]`` for the last milestone ``i`` at or before position ``x``; the reference batch
    size before the first. Devarakonda, Naumov, Garland, *AdaBatch*, 2017, arXiv:1712.02029, which grows
    the size by a factor every few epochs and decays the learning rate less in exchange.

    Args:
        milestones: position -> global batch size in samples.
        unit: what positions count: whole ``"epochs"`` from 0, ``"updates"`` or ``"samples"`` done so far.

    Raises:
        ValueError: no milestone, a position that is negative, infinite or a fraction of an epoch, a size
            below 1, or an unknown unit.

    Example:
        >>> from adaptive_batch.measurement import Measurement
        >>> policy = Milestones({5: 64, 10: 128})
        >>> [policy.propose(Measurement(epoch=epoch, reference_batch_size=32)) for epoch in (4, 5, 12)]
        [32.0, 64.0, 128.0]
    """

    name = "milestones"
    needs: frozenset[str] = frozenset()

    def __init__(self, milestones: Mapping[int, int] | Mapping[float, int], *, unit: str = "epochs") -> None:
        self.unit = check_unit(unit, "milestones")
        check_mapping("milestones", milestones)
        if not milestones:
            raise ValueError("milestones is empty: give at least one position and its batch size.")
        for start, size in milestones.items():
            check_start(start, unit, "milestones")
            if not 1 <= number("milestones", size) < math.inf:
                raise ValueError(f"milestones has the size {size} at {start}: pass at least 1 sample.")
        self.milestones = dict(sorted(milestones.items()))

    def propose(self, measurement: Measurement) -> float:
        """Returns the size of the last milestone reached."""
        now = position(measurement, self.unit)
        reached = [size for start, size in self.milestones.items() if start <= now]
        return float(reached[-1] if reached else measurement.reference_batch_size)

    def reason(self, measurement: Measurement, batch_size: int) -> str:
        """Says where in the schedule the run is, such as "milestone at 5 epochs"."""
        now = position(measurement, self.unit)
        reached = [start for start in self.milestones if start <= now]
        return f"milestone at {reached[-1]:g} {self.unit}" if reached else "before the first milestone"
