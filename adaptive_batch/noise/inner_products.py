"""The variance of the samples' inner products with the gradient, from the two parts of an update."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

__all__ = ["InnerProducts", "inner_product_variance"]

MIN_MEASUREMENTS = 16
"""Measurements below which there is no average: each has one degree of freedom, so 16 tell it to a third."""


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
        The estimate; NaN with other than two parts, or where a norm is not finite.
    """
    if len(part_sq_norms) != 2 or not all(map(math.isfinite, [*part_sq_norms, sq_norm])):
        return math.nan
    (first, second), (one, other) = part_sq_norms, part_sizes
    size = one + other
    apart = size / (one * other) * (one * first + other * second - size * sq_norm)
    inner = (first - second - (other - one) / size * apart) / 2
    return inner**2 / (1 / one + 1 / other)


class InnerProducts:
    """The average of :func:`inner_product_variance` over the updates seen.

    Exponential, with weights that decay by ``exp(-samples / memory)``, as those of
    :class:`~adaptive_batch.noise.GradientNoiseScale`; NaN before 16 measurements.

    Args:
        memory: samples after which a measurement has lost all but ``1/e`` of its weight; may be set at any time.
    """

    def __init__(self, *, memory: float = 100_000) -> None:
        self.memory = memory
        self._total = self._weight = 0.0
        self._measurements = 0

    def update(self, part_sq_norms: Sequence[float], part_sizes: Sequence[float], sq_norm: float) -> None:
        """Take in the parts of one update; other than two, or norms that are not finite, are left out."""
        value = inner_product_variance(part_sq_norms, part_sizes, sq_norm)
        if math.isnan(value):
            return
        forgotten = -math.expm1(-sum(part_sizes) / self.memory)
        self._total = (1 - forgotten) * self._total + forgotten * value
        self._weight = (1 - forgotten) * self._weight + forgotten
        self._measurements += 1

    @property
    def variance(self) -> float:
        """The average; NaN before 16 measurements."""
        return self._total / self._weight if self._measurements >= MIN_MEASUREMENTS else math.nan

    def state_dict(self) -> dict[str, Any]:
        """Sums and count."""
        return {"total": self._total, "weight": self._weight, "measurements": self._measurements}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where ``state`` was taken; nothing changes when it is refused.

        Raises:
            ValueError: if the state is not one that :meth:`state_dict` can have returned.
        """
        values = [state.get(name) for name in ("total", "weight", "measurements")] if _is_state(state) else []
        if not values or not all(isinstance(v, (int, float)) and not isinstance(v, bool) and v >= 0 for v in values):
            raise ValueError(f"this is not the state of InnerProducts: {state!r}; load what state_dict() returned.")
        self._total, self._weight, self._measurements = float(values[0]), float(values[1]), int(values[2])  # type: ignore[arg-type]


def _is_state(state: object) -> bool:
    return isinstance(state, Mapping) and set(state) == {"total", "weight", "measurements"}
