"""How many samples of each batch a rank takes, where ranks are not equally fast."""

from __future__ import annotations

import math
from collections.abc import Sequence

__all__ = ["balanced_weights", "share_sizes"]

RESOLUTION = 16
"""Weights are whole numbers of this mean: finer than that, timings are noise."""

MIN_GAIN = 0.05
"""By so much the slowest rank's time has to fall for the weights to change."""


def share_sizes(samples: int, weights: Sequence[int]) -> list[int]:
    """Samples of each rank: in proportion to the weights, at least one each, ``samples`` in all.

    Largest remainders are rounded up (Hamilton's method).

    Args:
        samples: at least as many as there are weights.
        weights: positive, one per rank.
    """
    total = sum(weights)
    exact = [samples * weight / total for weight in weights]
    sizes = [max(1, math.floor(share)) for share in exact]
    missing = samples - sum(sizes)
    by_remainder = sorted(range(len(sizes)), key=lambda rank: sizes[rank] - exact[rank])
    for rank in by_remainder[: max(0, missing)]:
        sizes[rank] += 1
    for _ in range(-missing):  # where a rank has its one sample at the others' expense
        sizes[max(range(len(sizes)), key=lambda rank: (sizes[rank] > 1, sizes[rank] - exact[rank]))] -= 1
    return sizes


def balanced_weights(seconds_per_sample: Sequence[float], weights: Sequence[int]) -> list[int]:
    """Weights with which all ranks take about as long, those given where that would gain too little.

    The slowest rank's time is ``max_r(w_r t_r) / sum(w)`` of ``t_r`` seconds per sample; weights in proportion to
    ``1 / t_r`` make it the least.

    Args:
        seconds_per_sample: of each rank; one that is not known (NaN, 0) changes nothing.
        weights: those in force.
    """
    times = list(seconds_per_sample)
    if not all(0 < time < math.inf for time in times):
        return list(weights)
    speed = sum(1 / time for time in times)
    balanced = [max(1, round(RESOLUTION * len(times) / (time * speed))) for time in times]
    if _slowest(times, balanced) > (1 - MIN_GAIN) * _slowest(times, weights):
        return list(weights)
    return balanced


def _slowest(times: Sequence[float], weights: Sequence[int]) -> float:
    return max(weight * time for weight, time in zip(weights, times, strict=True)) / sum(weights)
