"""The level of a run's squared gradient norms, which its measurements are averaged in units of."""

from __future__ import annotations

import math
from collections.abc import Sequence

__all__ = ["GradientLevel"]

UPDATES = 8
"""Updates that the level looks back over: so few follow a gradient that falls by orders of magnitude at the start."""

OUTLIER = 8.0
"""Times the level that an update's squared norm counts for at most. Of noise in a single dimension, the worst case,
0.5 % of the updates are beyond it, and less than 1 % of the mean is cut off."""

_LEAST, _MOST = 1e-50, 1e50  # of a unit: sums of what is measured in it stay finite


class GradientLevel:
    """Exponential average of ``|g_B|^2`` over the last updates, and the lowest that it has been.

    A run's gradient falls by orders of magnitude, most of all at its start. An average over more than a moment then
    speaks of the largest gradients, however long ago: 32 updates of memory take 220 updates to forget a ``|G|^2``
    a thousand times as large. In units of the level each update counts alike, as it does where nothing falls. The
    level of the updates before is known before an update is, so what an update adds is not biased by its own noise.

    The unit is the lowest level so far: gradients that grow again, as before a divergence, count in full.

    What lies far above the level is one sample far from all others rather than a gradient that has changed, which the
    level follows. Where such an update was not measured by parts nothing would tell that it is noise. An update much
    smaller than those before, such as an epoch's tail, is noisier: it is passed over and counts as it is. Gradients
    that are 0 but for rare samples are underestimated.

    Attributes:
        sq_norm: the level, NaN before the first update.
        lowest: the lowest level so far.
        size: samples of an update, averaged like the level.
    """

    def __init__(self) -> None:
        self.sq_norm = self.lowest = self.size = math.nan

    def take_in(self, sq_norm: float, size: float) -> tuple[float, float]:
        """One more update.

        Args:
            sq_norm: squared norm of its gradient, finite.
            size: its samples.

        Returns:
            The unit that it is averaged in, and its squared norm as far as the level makes it likely.
        """
        if not self.sq_norm > 0:
            self.sq_norm = self.lowest = sq_norm
            self.size = size
        unit, usual = min(max(self.lowest, _LEAST), _MOST), self.size
        self.size += (size - usual) / UPDATES
        if 2 * size < usual:
            return unit, sq_norm
        likely = min(sq_norm, OUTLIER * self.sq_norm)
        self.sq_norm += (likely - self.sq_norm) / UPDATES
        self.lowest = min(self.lowest, self.sq_norm)
        return unit, likely

    def state_dict(self) -> list[float]:
        """Level, lowest level and size."""
        return [self.sq_norm, self.lowest, self.size]

    def load_state_dict(self, state: Sequence[float]) -> None:
        """Put back what :meth:`state_dict` gave."""
        self.sq_norm, self.lowest, self.size = state
