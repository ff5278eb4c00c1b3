"""An extra pass over the parts of a batch that measures their gradients and leaves nothing behind."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from torch import nn

from adaptive_batch.callbacks import _lightning
from adaptive_batch.callbacks._trial import Trial
from adaptive_batch.measurement import Number
from adaptive_batch.micro_batching import split_batch
from adaptive_batch.noise.part_norms import Metric, PartNorms, grad_sq_norm
from adaptive_batch.noise.sample import NoiseSample

if TYPE_CHECKING:
    from pytorch_lightning import LightningModule, Trainer

__all__ = ["Factor", "Probe"]

Factor = Callable[[Any, int], tuple[Number, Number]]
"""``(part, size) -> (factor on the part's loss, what its mean gradient is multiplied with by that)``."""


class Probe:
    """Runs ``training_step`` and a backward pass over parts of a batch and puts everything back.

    Under layers that look across the batch the gradients are those of batches of the parts' size.

    Args:
        trainer: whose loop this belongs to.
        module: what is trained.
    """

    def __init__(self, trainer: Trainer, module: LightningModule) -> None:
        self._trainer = trainer
        self._trial = Trial(trainer, module)

    def measure(
        self,
        parameters: Sequence[nn.Parameter],
        kwargs: Mapping[str, Any],
        sizes: Sequence[int],
        factor: Factor,
        metric: Metric | None = None,
    ) -> NoiseSample | None:
        """The parts of the batch ``kwargs["batch"]``; ``None`` where it gave no gradient.

        Args:
            parameters: whose gradients count.
            kwargs: the arguments of ``training_step``.
            sizes: samples of each part.
            factor: makes the losses of the parts add up to the mean over the batch.
            metric: see :class:`PartNorms`.
        """
        scale = _lightning.amp_scale(self._trainer)  # small gradients vanish in half precision without it
        parts = split_batch(kwargs["batch"], sizes, sum(sizes))
        with self._trial.undone(), PartNorms(parameters, metric) as norms:
            for part, size in zip(parts, sizes, strict=True):
                loss = self._trial.loss(kwargs, part)
                if loss is not None:
                    weight, share = factor(part, size)
                    # Without Lightning's hooks of a backward pass, which belong to updates.
                    (loss * (weight * scale)).backward()  # type: ignore[no-untyped-call]
                    norms.end_part(size, share * scale)
            total = grad_sq_norm(parameters, metric)
        return None if total is None else NoiseSample(norms.sq_norms, norms.sizes, total / scale**2)
