"""Confidence intervals for the ratio of two weighted means: jackknife, Fieller, Student's t."""

from __future__ import annotations

import math
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]

# 64 nodes integrate the density of t to rounding over every range that a confidence below 1 asks for.
_NODES, _NODE_WEIGHTS = np.polynomial.legendre.leggauss(64)


@lru_cache(maxsize=256)
def student_t_quantile(confidence: float, dof: float) -> float:
    """``t`` with ``P(|T| <= t) = confidence`` for Student's t with ``dof`` degrees of freedom.

    With ``t = sqrt(dof) tan(angle)`` the probability is ``c * integral_0^angle cos(a)^(dof - 1) da``. It
    is concave in the angle, so Newton's steps from 0 approach the quantile from below and cannot overshoot.

    Args:
        confidence: probability of the interval around 0, between 0 and 1.
        dof: degrees of freedom, at least 1; need not be whole.

    Raises:
        ValueError: if either is out of its range.
    """
    if not 0 < confidence < 1:
        raise ValueError(f"confidence={confidence} is not a probability between 0 and 1; pass 0.95, say.")
    if not 1 <= dof < math.inf:
        raise ValueError(f"dof={dof} is not a finite number of degrees of freedom from 1 on; pass at least 1.")
    log_constant = math.lgamma((dof + 1) / 2) - math.lgamma(dof / 2)
    constant = 2 / math.sqrt(math.pi) * math.exp(log_constant)
    angle = 0.0
    for _ in range(100):
        density = constant * np.cos(angle * (_NODES + 1) / 2) ** (dof - 1)
        probability = angle / 2 * float(_NODE_WEIGHTS @ density)
        step = (confidence - probability) / (constant * math.cos(angle) ** (dof - 1))
        angle += step
        if step < 1e-13 * angle:
            break
    return math.sqrt(dof) * math.tan(angle)


def jackknife_influence(sums: Array, weights: Array) -> tuple[Array, Array]:
    """Weighted means, and what each of several independent rows does to them, by leaving out one at a time.

    With shares ``p_k = w_k / sum(w)`` and means ``m_(-k)`` without row ``k`` the jackknife's covariance is
    ``sum_k (1 - p_k) (m_(-k) - m)(m_(-k) - m)'``: the usual one with its factor ``(K - 1) / K`` where all weights are
    equal, and unbiased where a row's variance is inversely proportional to its weight. Returned are the rows
    ``d_k`` of which it is ``sum_k d_k d_k'``; those of several means over the same blocks can be added up.

    Args:
        sums: ``[K, D]`` rows, each times its weight.
        weights: ``[K]`` weights, or ``[K, D]`` of each entry, not all 0; rows without any have no influence, nor has
            one that has all.

    Returns:
        ``[D]`` weighted means, and ``[K, D]`` influences on them.
    """
    weights = weights.reshape(len(weights), -1)
    total = weights.sum(0)
    means: Array = sums.sum(0) / total
    scale = total * np.sqrt(np.maximum(1 - weights / total, _NOTHING))
    influence: Array = (sums - weights * means) / scale
    return means, influence


_NOTHING = 1e-300
"""In the place of 0 under a division of 0."""


def effective_count(weights: Array) -> Array:
    """``sum(w^2)^2 / sum(w^4)``: how many equally weighted rows tell as much about their own variance.

    This is Satterthwaite's count for the jackknife of rows of equal variance; ``K`` for equal weights.

    Args:
        weights: ``[K]``, or ``[K, D]`` of several means.

    Returns:
        A number, or ``[D]``; 0 where all weights are.
    """
    squares = np.square(weights / np.maximum(weights.max(0, initial=0.0), _NOTHING))
    count: Array = np.square(squares.sum(0)) / np.maximum(np.square(squares).sum(0), _NOTHING)
    return count


def fieller_interval(means: Array, covariance: Array, quantile: float) -> tuple[float, float]:
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
    numerator, denominator = means.tolist()
    (of_numerator, joint), (_, of_denominator) = covariance.tolist()
    # The set is {r : a r^2 - 2 b r + c <= 0}.
    a = denominator**2 - quantile**2 * of_denominator
    b = numerator * denominator - quantile**2 * joint
    c = numerator**2 - quantile**2 * of_numerator
    root = math.sqrt(max(b * b - a * c, 0.0))
    if a > 0 and denominator < 0:
        return math.inf, math.inf
    if a > 0:
        return max((b - root) / a, 0.0), max((b + root) / a, 0.0)
    if numerator <= 0 or c <= 0:
        return 0.0, math.inf
    # The positive root (b - root) / a, without the cancellation and with its limit where a is 0.
    return c / (b + root) if b + root > 0 else math.inf, math.inf
