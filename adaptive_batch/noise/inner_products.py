"""The variance of the samples' inner products with the gradient, from the two parts of an update."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

__all__ = ["InnerProducts", "inner_product_variance"]

MIN_MEASUREMENTS = 16
"""Measurements below which there is no average: each has one degree of freedom, so 16 tell it to a third."""

MEMORY_UPDATES = 32
"""Measured updates that the averages look back over at least."""


def inner_product_variance(part_sq_norms: Sequence[float], part_sizes: Sequence[float], sq_norm: float) -> float:
    """``Var_i <g_i, g_B>`` from the norms of two parts.

    With ``d = g_1 - g_2`` the difference of the parts' mean gradients, all that is needed follows from the norms::

        |d|^2    = B / (b_1 b_2) (b_1 |g_1|^2 + b_2 |g_2|^2 - B |g_B|^2)
        <d, g_B> = (|g_1|^2 - |g_2|^2 - (b_2 - b_1) / B |d|^2) / 2
        Var      = <d, g_B>^2 / (1 / b_1 + 1 / b_2)

    Over all ways to split a batch in two, the mean of this is exactly the sample variance (normalised by ``B - 1``)
    of the inner products ``p_i = <g_i, g_B>``: ``<d, g_B>`` is the difference of the parts' means of ``p_i``.

    Args:
        part_sq_norms: ``[2]`` squared norms of the mean gradients of the parts.
        part_sizes: ``[2]`` samples of each part.
        sq_norm: ``|g_B|^2``.

    Returns:
        The estimate; NaN with other than two parts, or where it or a norm is not finite.
    """
    if len(part_sq_norms) != 2 or not all(map(math.isfinite, [*part_sq_norms, sq_norm])):
        return math.nan
    (first, second), (one, other) = part_sq_norms, part_sizes
    size = one + other
    apart = size / (one * other) * (one * first + other * second - size * sq_norm)
    inner = (first - second - (other - one) / size * apart) / 2
    variance = inner * inner / (1 / one + 1 / other)  # a power would raise an error where this overflows
    return variance if math.isfinite(variance) else math.nan


class InnerProducts:
    """The averages of :func:`inner_product_variance` and of ``|g_B|^2`` over the updates seen.

    Exponential, with weights that decay by ``exp(-samples / memory)``, samples being those of the measured updates;
    NaN before 16 measurements. The variance depends on the size:
    in expectation it is ``G' Sigma G + tr(Sigma^2) / B`` for normal noise. What it is compared with has to be of the
    same updates: set against ``|g_B|^2`` of a larger size, the variance of smaller ones would ask for ever more.

    Args:
        memory: samples after which a measurement has lost all but ``1/e`` of its weight; None is a quarter of those
            measured so far, and no fewer than 32 updates' worth.
    """

    def __init__(self, *, memory: float | None = None) -> None:
        self._memory = memory
        self._samples = 0.0
        self._total = self._norms = self._weight = self._squares = 0.0
        self._measurements = 0

    def update(self, part_sq_norms: Sequence[float], part_sizes: Sequence[float], sq_norm: float) -> None:
        """Take in the parts of one update; other than two, or norms that are not finite, are left out."""
        value = inner_product_variance(part_sq_norms, part_sizes, sq_norm)
        if math.isnan(value):
            return
        size = sum(part_sizes)
        self._samples += size
        memory = max(MEMORY_UPDATES * size, self._samples / 4) if self._memory is None else self._memory
        forgotten = -math.expm1(-size / memory)
        self._total = (1 - forgotten) * self._total + forgotten * value
        self._norms = (1 - forgotten) * self._norms + forgotten * sq_norm
        self._weight = (1 - forgotten) * self._weight + forgotten
        self._squares = (1 - forgotten) ** 2 * self._squares + forgotten**2
        self._measurements += 1

    @property
    def variance(self) -> float:
        """The average variance; NaN before 16 measurements."""
        return self._total / self._weight if self._measurements >= MIN_MEASUREMENTS else math.nan

    @property
    def sq_norm(self) -> float:
        """The average of ``|g_B|^2`` over the same updates; NaN before 16 measurements."""
        return self._norms / self._weight if self._measurements >= MIN_MEASUREMENTS else math.nan

    @property
    def lower(self) -> float:
        """Lower end of the average's 95 % interval: each measurement has one degree of freedom.

        By the cube-root approximation of a chi-square (Wilson, Hilferty 1931).
        """
        if not self._measurements:
            return math.nan
        spread = 2 * self._squares / (9 * self._weight**2)
        return self.variance / (1 - spread + 1.96 * math.sqrt(spread)) ** 3

    def state_dict(self) -> dict[str, Any]:
        """Sums and count."""
        return {name: getattr(self, f"_{name}") for name in _STATE}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where ``state`` was taken; nothing changes when it is refused.

        Raises:
            ValueError: if the state is not one that :meth:`state_dict` can have returned.
        """
        fits = isinstance(state, Mapping) and set(state) == set(_STATE) and all(map(_is_sum, state.values()))
        if not fits or not isinstance(state["measurements"], int):
            raise ValueError(f"this is not the state of InnerProducts: {state!r}; load what state_dict() returned.")
        for name in _STATE:
            setattr(self, f"_{name}", state[name])


_STATE = ("total", "norms", "weight", "squares", "samples", "measurements")


def _is_sum(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and 0 <= value < math.inf
