"""The two numbers behind the gradient noise scale, from the squared norms of the parts of one update."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

Numbers = Sequence[float] | Sequence[Tensor] | NDArray[Any] | Tensor
"""Several numbers: a sequence, a one-dimensional array or a one-dimensional tensor."""


def as_floats(values: Numbers) -> list[float]:
    """The values as Python floats; a tensor is copied to the host once."""
    if isinstance(values, (Tensor, np.ndarray)):
        values = values.tolist()
    return [float(value) for value in values]


def harmonic_mean(sizes: Sequence[float]) -> float:
    """``n / sum_j(1 / b_j)``: the size of ``n`` equal parts whose mean gradients are as noisy on average."""
    return len(sizes) / sum(1.0 / size for size in sizes)


def two_batch_estimate(part_sq_norms: Numbers, part_sizes: Numbers, sq_norm: float | Tensor) -> tuple[float, float]:
    """``|G|^2`` and ``tr(Sigma)`` from the gradients of the parts of one update.

    The mean gradient of ``b`` samples has ``E|g_b|^2 = |G|^2 + tr(Sigma) / b``. The parts give this at
    their harmonic mean size ``b = n / sum_j(1 / b_j)``, the update gives it at ``B = sum_j b_j``; two
    equations, two unknowns::

        |G|^2     = (B |g_B|^2 - b A) / (B - b)          A = mean_j |g_j|^2
        tr(Sigma) = (A - |g_B|^2) / (1/b - 1/B)

    Both are unbiased for any part sizes and any distribution of the samples' gradients, as long as the
    samples are independent. Neither is clamped: the estimate of ``|G|^2`` is often negative, and cutting
    that off would bias every average of it. Drawn without replacement from ``N`` samples, the estimates
    speak of the population the data set came from: ``|G|^2`` is ``|G_N|^2 - tr(Sigma) / N``, with
    ``tr(Sigma)`` normalised by ``N - 1``. Invalid where samples look at each other (BatchNorm,
    contrastive losses) and for losses that are not a mean over samples.

    Source: McCandlish, Kaplan, Amodei, OpenAI Dota Team, "An Empirical Model of Large-Batch Training",
    2018, arXiv:1812.06162, appendix A.1, here for parts of unequal size.

    Args:
        part_sq_norms: ``[n]`` squared norms ``|g_j|^2`` of the mean gradients of the parts.
        part_sizes: ``[n]`` samples ``b_j`` of each part.
        sq_norm: ``|g_B|^2``, squared norm of the mean of the parts' gradients weighted by their sizes.

    Returns:
        ``(|G|^2, tr(Sigma))``, the trace that of one sample's gradient. Both are NaN with fewer than two
        parts and where a norm is not finite.

    Raises:
        ValueError: if the two sequences differ in length, or a size is not a positive number.
    """
    norms, sizes, whole_norm = as_floats(part_sq_norms), as_floats(part_sizes), float(sq_norm)
    if len(norms) != len(sizes):
        raise ValueError(
            f"{len(norms)} squared norms do not go with {len(sizes)} part sizes; pass one size for each part."
        )
    for size in sizes:
        if not 0 < size < math.inf:
            raise ValueError(f"a part of {size} samples cannot be measured; pass positive part sizes.")
    if len(sizes) < 2 or not all(map(math.isfinite, [*norms, whole_norm])):
        return math.nan, math.nan
    whole, part = sum(sizes), harmonic_mean(sizes)
    mean_norm = sum(norms) / len(norms)
    grad_sq_norm = (whole * whole_norm - part * mean_norm) / (whole - part)
    grad_variance = (mean_norm - whole_norm) / (1.0 / part - 1.0 / whole)
    return grad_sq_norm, grad_variance
