"""Batch sizes that grow by a fixed schedule."""

from __future__ import annotations

import math

from adaptive_batch.measurement import Measurement
from adaptive_batch.policies._arguments import number
from adaptive_batch.policies._position import check_length, check_unit, position
from adaptive_batch.policies._size import grown


class GeometricGrowth:
    """Multiplies the batch at regular intervals: ``B = B0 factor^floor(x / every)``.

    Devarakonda, Naumov, Garland, *AdaBatch*, 2017, arXiv:1712.02029, doubles every 20 epochs and lets the
    scheduler decay the learning rate by 0.75 where it would by 0.375 at a fixed size (as reported); Sievert,
    Charles 2019, arXiv:1910.08222, call it GeoDamp.

    Args:
        factor: growth at each interval, positive; below 1 the batch shrinks.
        every: length of an interval.
        unit: of ``every``: ``"epochs"``, ``"updates"`` or ``"samples"``.
        start: ``B0`` in samples; None is the reference batch size.

    Raises:
        ValueError: an argument is out of its range.
    """

    name = "geometric_growth"
    needs: frozenset[str] = frozenset()

    def __init__(
        self, factor: float = 2.0, every: float = 20, *, unit: str = "epochs", start: int | None = None
    ) -> None:
        factor = number("factor", factor)
        if not 0 < factor < math.inf:
            raise ValueError(f"factor={factor} gives no size: pass a positive number.")
        self.factor = factor
        self.unit = check_unit(unit, "GeometricGrowth")
        self.every = check_length("every", every, unit)
        self.start = _check_size("start", start)

    def propose(self, measurement: Measurement) -> float:
        """Returns the size of the present interval."""
        size = measurement.reference_batch_size if self.start is None else self.start
        return grown(size, self.factor, self._interval(measurement))

    def _interval(self, measurement: Measurement) -> int:
        return math.floor(position(measurement, self.unit) / self.every)

    def reason(self, measurement: Measurement, batch_size: int) -> str:
        """Says where in the schedule the run is, such as "interval 3 of 20 epochs"."""
        return f"interval {self._interval(measurement) + 1} of {self.every:g} {self.unit}"


class LinearRamp:
    """Ramps the batch linearly: ``B = start + (end - start) min(1, x / over)``.

    The batch-size ramps of language-model training; Gray, Tiwari, Bergsma, Hestness, *Normalization layer
    per-example gradients are sufficient to predict gradient noise scale in transformers*, NeurIPS 2024,
    arXiv:2411.00999, ramp linearly in tokens and do not rescale the learning rate (``lr_scaling="none"``).

    Args:
        start: size at the beginning, in samples; None is the reference batch size.
        end: size at the end of the ramp; it stays.
        over: length of the ramp.
        unit: of ``over``: ``"samples"``, ``"updates"`` or ``"epochs"``.

    Raises:
        ValueError: an argument is out of its range.
    """

    name = "linear_ramp"
    needs: frozenset[str] = frozenset()

    def __init__(self, start: int | None, end: int, over: float, *, unit: str = "samples") -> None:
        end = number("end", end)
        if not 1 <= end < math.inf:
            raise ValueError(f"end={end} is no batch size: pass at least 1 sample.")
        self.end = end
        self.unit = check_unit(unit, "LinearRamp")
        self.over = check_length("over", over, unit)
        self.start = _check_size("start", start)

    def propose(self, measurement: Measurement) -> float:
        """Returns the size at this point of the ramp."""
        start = measurement.reference_batch_size if self.start is None else self.start
        return start + (self.end - start) * self._share(measurement)

    def _share(self, measurement: Measurement) -> float:
        return min(1.0, position(measurement, self.unit) / self.over)

    def reason(self, measurement: Measurement, batch_size: int) -> str:
        """Says how far up the ramp the run is, such as "37 % of the ramp to 512"."""
        return f"{100 * self._share(measurement):.0f} % of the ramp to {self.end}"


def _check_size(name: str, size: int | None) -> int | None:
    size = None if size is None else number(name, size)
    if size is not None and not 1 <= size < math.inf:
        raise ValueError(f"{name}={size} is no batch size: pass at least 1 sample, or None for the reference.")
    return size
