"""The inner-product test and the orthogonality test, together the augmented test."""

from __future__ import annotations

import math

from adaptive_batch.measurement import Measurement
from adaptive_batch.policies._arguments import positive


class InnerProductTest:
    """Grows the batch until its gradient is a descent direction with high probability.

    ::

        p_i = <g_i, g_B>
        Var_i(p_i) / B <= theta^2 |g_B|^4                                inner-product test
        sum_i(|g_i|^2 - p_i^2 / |g_B|^2) / (B - 1) / B <= nu^2 |g_B|^2   orthogonality test
        B' = ceil(max(Var(p) / (theta^2 |g_B|^4), (V - Var(p) / |g_B|^2) / (nu^2 |g_B|^2)))

    where either fails; otherwise ``B`` stays. Bollapragada, Byrd, Nocedal, *Adaptive sampling strategies for
    stochastic optimization*, SIAM Journal on Optimization 28(4), 2018, arXiv:1710.11258, equations 2.6 and 3.3. The
    second form of the orthogonality test follows from ``sum_i p_i^2 = (B - 1) Var(p) + B |g_B|^4``, with ``V =
    tr(Sigma)``; at ``theta = nu = 1`` the two sizes add up to that of the norm test.

    The variance of the inner products costs nothing where an update is measured in two parts: see
    :class:`~adaptive_batch.noise.InnerProducts`. It is not known under ``noise="per_example"``, in updates of
    more than two parts (memory, accumulation, ranks), and before 16 measurements; the size then stays.
    ``Var(p)``, ``V`` and ``|g_B|^2`` are averages over measured updates. With quantised sizes a failed test means one
    step up, and has to fail at the lower end of the interval of ``Var(p)`` as well.

    Args:
        theta: largest relative error along the gradient.
        nu: largest relative error across it; None leaves the orthogonality test out. The defaults are reported
            as those of the paper's experiments.

    Raises:
        ValueError: ``theta`` or ``nu`` is not positive and finite.
    """

    name = "inner_product_test"
    needs: frozenset[str] = frozenset({"inner_products"})
    is_test = True

    def __init__(self, theta: float = 0.9, nu: float | None = 5.84) -> None:
        self.theta = positive("theta", theta)
        self.nu = None if nu is None else positive("nu", nu)

    def propose(self, measurement: Measurement) -> float:
        """Returns ``B'``; the present size where both tests are passed or something is not known."""
        along, across = self._sizes(measurement)
        size = max(along, across)
        return float(max(measurement.batch_size, math.ceil(size))) if math.isfinite(size) else measurement.batch_size

    def _sizes(self, m: Measurement) -> tuple[float, float]:
        """What the inner-product test and the orthogonality test ask for; NaN while not known."""
        sq_norm = m.inner_product_sq_norm
        if not (self.theta * sq_norm > 0 and m.inner_product_variance >= 0):
            return math.nan, math.nan
        along = m.inner_product_variance / (self.theta * sq_norm) / (self.theta * sq_norm)
        if self.nu is None:
            return along, 0.0
        rest = m.grad_variance - m.inner_product_variance / sq_norm
        return (math.nan, math.nan) if math.isnan(rest) else (along, max(0.0, rest) / (self.nu**2 * sq_norm))

    def reason(self, measurement: Measurement, batch_size: int) -> str:
        """Says what the tests ask for, such as "inner-product test asks for 93, orthogonality test for 12"."""
        along, across = self._sizes(measurement)
        if math.isnan(along):
            return "inner products not known: they take 16 updates in two parts, and none in more"
        words = f"inner-product test asks for {math.ceil(along)}"
        return words if self.nu is None else f"{words}, orthogonality test for {math.ceil(across)}"
