"""A batch size that does not change."""

from __future__ import annotations

import math

from adaptive_batch.measurement import Measurement
from adaptive_batch.policies._arguments import number


class Constant:
    """Always the same batch size; at ``B0`` training is what it would be without the package.

    Args:
        batch_size: the global batch size in samples; None is the reference batch size ``B0``.

    Raises:
        ValueError: ``batch_size`` is below 1.
    """

    name = "constant"
    needs: frozenset[str] = frozenset()

    def __init__(self, batch_size: int | None = None) -> None:
        batch_size = None if batch_size is None else number("batch_size", batch_size)
        if batch_size is not None and not 1 <= batch_size < math.inf:
            raise ValueError(f"batch_size={batch_size} is no batch size: pass at least 1 sample, or None.")
        self.batch_size = batch_size

    def propose(self, measurement: Measurement) -> float:
        """Returns the constant size."""
        return self.constant_size(measurement.reference_batch_size)

    def constant_size(self, reference_batch_size: int) -> float:
        """Returns it without a measurement."""
        return float(reference_batch_size if self.batch_size is None else self.batch_size)
