"""Batch-size warm-up along a critical batch size that was measured beforehand."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import partial

from adaptive_batch.measurement import Measurement
from adaptive_batch.policies import _words
from adaptive_batch.policies._arguments import number
from adaptive_batch.policies._position import check_start, check_unit, position


class CriticalBatchWarmup:
    """Doubles the batch whenever the critical batch size has outgrown it.

    ::

        B*(x) > 2 B   =>   B' = 2 B

    Merrill, Arora, Groeneveld, Hajishirzi, *Critical batch size revisited*, 2025, arXiv:2505.23971. ``B*`` is
    measured before the run: from checkpoints of a shorter one, branches with ``k B`` and a learning rate scaled by
    ``f(k)``, the largest ``k`` whose loss is not worse after so many tokens. The gradient noise scale is no
    substitute: they find it to underestimate ``B*`` by orders of magnitude.

    At each doubling the learning rate is multiplied by ``f(2)``, on top of the schedule: ``sqrt(2)`` for Adam
    (``lr_scaling="sqrt"``; its ``"auto"`` changes ``beta2`` besides), 2 for SGD (``"linear"``).

    Args:
        critical: ``B*`` in samples: a function of the position, or position -> ``B*`` where it was measured,
            which holds until the next one.
        unit: what positions count: ``"samples"``, ``"updates"`` or ``"epochs"``.

    Raises:
        ValueError: no point, a position that a run cannot be at, a size that is not positive, or an unknown unit.
        TypeError: ``critical`` is neither a mapping nor a function.

    Example:
        >>> policy = CriticalBatchWarmup({0: 100, 50_000: 300})
        >>> [policy.propose(Measurement(samples=x, batch_size=64)) for x in (10_000, 60_000)]
        [64.0, 128.0]
    """

    name = "critical_batch_warmup"
    needs: frozenset[str] = frozenset()

    def __init__(self, critical: Mapping[float, float] | Callable[[float], float], *, unit: str = "samples") -> None:
        self.unit = check_unit(unit, "CriticalBatchWarmup")
        if isinstance(critical, Mapping):
            self._critical = _steps(critical, unit)
        elif callable(critical):
            self._critical = critical
        else:
            raise TypeError(f"critical={critical!r} is no critical batch size: pass a mapping or a function.")

    def propose(self, measurement: Measurement) -> float:
        """Returns twice the present size where the critical one is above that, otherwise the present size."""
        size = measurement.batch_size
        return float(2 * size if self._critical_at(measurement) > 2 * size else size)

    def _critical_at(self, measurement: Measurement) -> float:
        return float(self._critical(position(measurement, self.unit)))

    def reason(self, measurement: Measurement, batch_size: int) -> str:
        """Says what the critical batch size is."""
        return f"critical batch size {_words.count(self._critical_at(measurement))}"


def _steps(points: Mapping[float, float], unit: str) -> Callable[[float], float]:
    """The value of the last point at or before a position, 0 before the first."""
    if not points:
        raise ValueError("critical is empty: give at least one position and its critical batch size.")
    for start, size in points.items():
        check_start(start, unit, "critical")
        if not 0 < number("critical", size) < math.inf:
            raise ValueError(f"critical has the size {size} at {start}: pass a positive finite number.")
    return partial(_last, sorted(points.items(), reverse=True))


def _last(points: list[tuple[float, float]], now: float) -> float:
    return next((size for start, size in points if start <= now), 0.0)
