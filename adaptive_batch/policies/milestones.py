"""A schedule of sizes, in the manner of AdaBatch."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

from adaptive_batch.measurement import Measurement

_POSITION: dict[str, Callable[[Measurement], int]] = {
    "epochs": lambda measurement: measurement.epoch,
    "updates": lambda measurement: measurement.update,
    "samples": lambda measurement: measurement.samples,
}


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
        if unit not in _POSITION:
            raise ValueError(f"unit={unit!r} is not a unit of milestones: use one of {', '.join(_POSITION)}.")
        if not milestones:
            raise ValueError("milestones is empty: give at least one position and its batch size.")
        for position, size in milestones.items():
            if not 0 <= position < math.inf:
                raise ValueError(f"milestones has the position {position}: pass a finite number from 0 on.")
            if unit == "epochs" and position != int(position):
                raise ValueError(f'milestones has the epoch {position}: use whole epochs, or unit="samples" for less.')
            if not size >= 1:
                raise ValueError(f"milestones has the size {size} at {position}: pass at least 1 sample.")
        self.milestones = dict(sorted(milestones.items()))
        self.unit = unit

    def propose(self, measurement: Measurement) -> float:
        """Returns the size of the last milestone reached."""
        position = _POSITION[self.unit](measurement)
        reached = [size for start, size in self.milestones.items() if start <= position]
        return float(reached[-1] if reached else measurement.reference_batch_size)

    def reason(self, measurement: Measurement, batch_size: int) -> str:
        """Says where in the schedule the run is, such as "milestone at 5 epochs"."""
        position = _POSITION[self.unit](measurement)
        reached = [start for start in self.milestones if start <= position]
        return f"milestone at {reached[-1]:g} {self.unit}" if reached else "before the first milestone"
