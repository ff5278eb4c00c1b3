"""Sizes that grow beyond all bounds."""

from __future__ import annotations

LARGEST = 2.0**62
"""More samples than there are, and still a number that can be rounded."""


def grown(batch_size: float, factor: float, times: int) -> float:
    """``batch_size factor^times``, no more than any data set has."""
    try:
        return float(min(batch_size * factor**times, LARGEST))
    except OverflowError:
        return LARGEST
