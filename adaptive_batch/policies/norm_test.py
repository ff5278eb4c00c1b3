"""The norm test: a batch large enough that the error of its gradient is small beside the gradient."""

from __future__ import annotations

import math

from adaptive_batch.measurement import Measurement
from adaptive_batch.policies import _words
from adaptive_batch.policies._arguments import number


class NormTest:
    """Grows the batch while the norm test fails.

    ::

        V / B <= theta^2 |g_B|^2          V = tr(Sigma) of one sample's gradient
        B' = ceil(V / (theta^2 |g_B|^2))  where the test fails; otherwise B stays

    Byrd, Chin, Nocedal, Wu, *Sample size selection in optimization methods for machine learning*, Mathematical
    Programming 134, 2012, equations 3.9 and 3.11. It is the test of AdAdaGrad and of DDP-Norm (Lau, Liu, Kolar
    2024, arXiv:2402.11215; Lau, Li, Xu, Liu, Kolar 2024, arXiv:2412.21124).

    ``V`` and ``|g_B|^2`` are averages over measured updates, the second one put as ``|G|^2 + V / B`` so that
    it is that of the present size; with the noise scale ``phi = V / |G|^2`` the test asks for
    ``phi B / (theta^2 (phi + B))``. It therefore comes to rest at ``phi (1 / theta^2 - 1)``, and one test asks
    for at most ``1 / theta^2`` times the present size. While ``phi`` is not identified the lower end of its interval
    takes its place: the noise scale is at least that. With quantised sizes a failed test means one step up, so that it
    comes to rest at the first one that passes.

    The papers keep the learning rate (``lr_scaling="none"``) or choose it by line search; ``"auto"`` scales it.

    Args:
        theta: largest relative error of the gradient, between 0 and 1: at 1 and above the test is passed on
            average by every batch.

    Raises:
        ValueError: ``theta`` is not between 0 and 1.
    """

    name = "norm_test"
    needs: frozenset[str] = frozenset({"variance"})
    is_test = True

    def __init__(self, theta: float = 0.5) -> None:
        theta = number("theta", theta)
        if not 0 < theta < 1:
            raise ValueError(f"theta={theta} is not a relative error that a test can ask for: pass one in (0, 1).")
        self.theta = theta

    def propose(self, measurement: Measurement) -> float:
        """Returns ``B'``; the present size where the test is passed or nothing is known of the noise."""
        phi, size = _at_least(measurement), measurement.batch_size
        if not phi > 0:
            return float(size)
        share = 1.0 if math.isinf(phi) else phi / (phi + size)  # (V / B) / |g_B|^2
        return float(max(size, math.ceil(share * size / self.theta**2)))

    def reason(self, measurement: Measurement, batch_size: int) -> str:
        """Says how large the error is, such as "gradient error 0.82 of its norm, theta is 0.5"."""
        phi = _at_least(measurement)
        if math.isnan(phi):
            return _words.noise_scale(measurement)
        error = 1.0 if math.isinf(phi) else math.sqrt(phi / (phi + measurement.batch_size))
        return f"gradient error {error:.2f} of its norm, theta is {self.theta:g}"


def _at_least(measurement: Measurement) -> float:
    """The noise scale; while it is not identified, what it surely exceeds."""
    phi = measurement.noise_scale
    return measurement.interval[0] if math.isnan(phi) else phi
