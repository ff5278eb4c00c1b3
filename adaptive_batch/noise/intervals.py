"""Confidence intervals for the ratio of two means: Fieller, Student's t."""

from __future__ import annotations

import math
from functools import lru_cache
from statistics import NormalDist

import numpy as np

# 64 nodes integrate the density of t to rounding over every range that a confidence below 1 asks for.
_NODES, _NODE_WEIGHTS = np.polynomial.legendre.leggauss(64)
_MOST = 1 - 1e-9
"""Confidence beyond which rounding would say more about the quantile than the density."""


@lru_cache(maxsize=256)
def student_t_quantile(confidence: float, dof: float) -> float:
    """``t`` with ``P(|T| <= t) = confidence`` for Student's t with ``dof`` degrees of freedom.

    With ``t = sqrt(dof) tan(angle)`` the probability is ``c * integral_0^angle cos(a)^(dof - 1) da``. It
    is concave in the angle, so Newton's steps from below cannot overshoot. They start at the first term of Fisher and
    Cornish's expansion around the normal quantile, whose other terms are positive too.

    Args:
        confidence: probability of the interval around 0, between 0 and 1; above ``1 - 1e-9`` it counts as that.
        dof: degrees of freedom, at least 1; need not be whole.

    Raises:
        ValueError: if either is out of its range.
    """
    if not 0 < confidence < 1:
        raise ValueError(f"confidence={confidence} is not a probability between 0 and 1; pass 0.95, say.")
    if not 1 <= dof < math.inf:
        raise ValueError(f"dof={dof} is not a finite number of degrees of freedom from 1 on; pass at least 1.")
    confidence = min(confidence, _MOST)
    log_constant = math.lgamma((dof + 1) / 2) - math.lgamma(dof / 2)
    constant = 2 / math.sqrt(math.pi) * math.exp(log_constant)
    normal = -NormalDist().inv_cdf((1 - confidence) / 2)
    angle = math.atan((normal + (normal**3 + normal) / (4 * dof)) / math.sqrt(dof))
    for _ in range(100):
        density = constant * np.cos(angle * (_NODES + 1) / 2) ** (dof - 1)
        probability = angle / 2 * float(_NODE_WEIGHTS @ density)
        step = (confidence - probability) / (constant * math.cos(angle) ** (dof - 1))
        angle += step
        if step < 1e-13 * angle:
            break
    return math.sqrt(dof) * math.tan(angle)


Covariance = tuple[tuple[float, float], tuple[float, float]]


def fieller_interval(means: tuple[float, float], covariance: Covariance, quantile: float) -> tuple[float, float]:
    """The values of ``ratio = means[0] / means[1]``, both expectations at least 0, that the data allow.

    Fieller's set is ``{r : (m0 - r m1)^2 <= t^2 (v00 - 2 r v01 + r^2 v11)}``. It stays honest when the
    denominator is near zero: then it has no upper end, which is what the data say about the ratio.

    Source: Fieller, "Some problems in interval estimation", J. R. Stat. Soc. B 16(2), 1954.

    Args:
        means: ``[2]`` estimates of numerator and denominator.
        covariance: ``[2, 2]`` covariance of the estimates.
        quantile: ``t``, the two-sided quantile that belongs to the confidence wanted.

    Returns:
        ``(low, high)``, the smallest interval in ``[0, inf]`` around the set; ``high`` is infinite when the
        denominator cannot be told from zero, and so is ``low`` when it is significantly negative.
    """
    numerator, denominator = means
    (of_numerator, joint), (_, of_denominator) = covariance
    # The set is {r : a r^2 - 2 b r + c <= 0}.
    a = denominator * denominator - quantile**2 * of_denominator
    b = numerator * denominator - quantile**2 * joint
    c = numerator * numerator - quantile**2 * of_numerator
    root = math.sqrt(max(b * b - a * c, 0.0))
    if a > 0 and denominator < 0:
        return math.inf, math.inf
    if a > 0:
        return max((b - root) / a, 0.0), max((b + root) / a, 0.0)
    if numerator <= 0 or c <= 0:
        return 0.0, math.inf
    # The positive root (b - root) / a, without the cancellation and with its limit where a is 0.
    return c / (b + root) if b + root > 0 else math.inf, math.inf
