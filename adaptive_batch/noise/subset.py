"""The noise of all layers from the per-example norms of a few."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from adaptive_batch.noise.part_norms import grad_sq_norm
from adaptive_batch.noise.per_example import NORM_LAYERS, PerExampleNorms
from adaptive_batch.noise.sample import Batches, NoiseSample, equivalent_sample, variance_of

__all__ = ["SubsetSource"]

FIRST_FITS = 8
FIT_EVERY = 10
"""The slope is fitted at the first measurements, and at every tenth from then on."""

FORGET = 0.9
"""What a fit keeps of its weight at the next one, so that the slope follows the run."""


class SubsetSource:
    """Per-example norms of the normalisation layers alone, with a fitted slope for all the others.

    In transformers the gradient noise of the normalisation layers follows that of the whole model, and their
    per-example norms cost next to nothing. What is fitted here is ``tr(Sigma) = slope tr(Sigma_subset)``,
    from measurements of both at the same update (:meth:`calibrate`); ``|G|^2`` is the
    squared norm of the whole gradient, which every update has, less ``tr(Sigma) / B``. Without a fit there is
    no measurement. The intervals do not know the error of the slope.

    Source: Gray, Tiwari, Bergsma, Hestness, "Normalization Layer Per-Example Gradients are Sufficient to
    Predict Gradient Noise Scale in Transformers", 2024, arXiv:2411.00999, who fit the noise scale's slope.

    Args:
        module: what is trained.
        parameters: all whose gradients count.
        only: the types of the layers that are measured.

    Raises:
        Unmeasurable: if the module has no such layer with parameters to train.
    """

    pending = False

    def __init__(
        self,
        module: nn.Module,
        parameters: Iterable[nn.Parameter],
        only: tuple[type[nn.Module], ...] = NORM_LAYERS,
    ) -> None:
        self._norms = PerExampleNorms(module, only=only)
        self._parameters = list(parameters)
        self._batches = Batches()
        self._measurements = 0
        self._full: Tensor | float | None = None
        self._slopes: Tensor | float = 0.0
        self._fits = 0.0

    @property
    def calibrating(self) -> bool:
        """Whether the next measured update is to be measured in full as well."""
        return self._measurements < FIRST_FITS or self._measurements % FIT_EVERY == 0

    def calibrate(self, sample: NoiseSample) -> None:
        """What a measurement of all layers says about the update that has just been started."""
        self._full = variance_of(sample)

    def start(self) -> None:
        """Hook into the passes to come."""
        self._norms.__exit__(None, None, None)
        self._norms.__enter__()
        self._batches = Batches()

    def end_batch(self, size: int, share: float, scale: float | Tensor = 1.0) -> None:
        """Keep the norms of one batch."""
        self._norms.end_part(size, scale * share)
        self._batches.add(size, share)

    @torch.no_grad()
    def finish(self) -> NoiseSample | None:
        """The sample that stands for all layers, ``None`` before the slope is known."""
        self._norms.__exit__(None, None, None)
        subset, total = grad_sq_norm(self._norms.parameters), grad_sq_norm(self._parameters)
        size = self._batches.size if self._batches.sizes else 0.0
        if subset is None or total is None or size <= 1:
            return None
        factor = 1 / self._batches.share**2
        variance = (self._norms.mean_sq_norm - subset * factor) / (1 - 1 / size)
        if self._full is not None:
            # The subset's own variance is well measured, so the ratio is as good as unbiased.
            self._slopes = FORGET * self._slopes + self._full / variance
            self._fits = FORGET * self._fits + 1
            self._full = None
        self._measurements += 1
        if self._fits == 0:
            return None
        whole, slope = total * factor, self._slopes / self._fits
        return equivalent_sample(whole + slope * variance * (1 - 1 / size), 1, whole, size)

    def cancel(self) -> None:
        """Take the hooks back."""
        self._norms.__exit__(None, None, None)
        self._full = None
