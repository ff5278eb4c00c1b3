"""DiveBatch: as large a batch as the diversity of the samples' gradients allows."""

from __future__ import annotations

import math

from adaptive_batch.measurement import Measurement
from adaptive_batch.policies import _words
from adaptive_batch.policies._arguments import positive


class GradientDiversity:
    """Follows gradient diversity, and never shrinks.

    ::

        Delta = sum_i |g_i|^2 / |sum_i g_i|^2        N Delta = 1 + phi
        B' = max(B, delta N Delta)

    ``N`` is the size of the data set. Yin, Pananjady, Lam, Papailiopoulos, Ramchandran, Bartlett, *Gradient diversity:
    a key ingredient for scalable distributed learning*, AISTATS 2018, arXiv:1706.05699, whose bound on the batch is
    ``N Delta``; Chen, Wang, Sundaram, *DiveBatch*, 2025, arXiv:2509.16173, which sums over the epoch while the
    parameters move. Here ``N Delta = 1 + phi`` comes from the
    smoothed noise scale, which is free of that bias, and the size may change at any decision.

    Args:
        delta: fraction of the bound to take; the authors' experiments use 1e-4 to 0.1 of their sums.

    Raises:
        ValueError: ``delta`` is not positive and finite.
    """

    name = "gradient_diversity"
    needs: frozenset[str] = frozenset({"noise"})

    def __init__(self, delta: float = 0.1) -> None:
        self.delta = positive("delta", delta)

    def propose(self, measurement: Measurement) -> float:
        """Returns ``max(B, delta (1 + phi))``; the present size while the noise scale is not known."""
        size, diverse = float(measurement.batch_size), self.delta * (1 + measurement.noise_scale)
        return max(size, diverse) if math.isfinite(diverse) else size

    def reason(self, measurement: Measurement, batch_size: int) -> str:
        """Says what the size follows, such as "noise scale 410 [350, 480], diversity asks for 41.1"."""
        diverse = self.delta * (1 + measurement.noise_scale)
        words = _words.noise_scale(measurement)
        return f"{words}, diversity asks for {_words.count(diverse)}" if math.isfinite(diverse) else words
