"""An extra pass over the parts of a batch that measures their gradients and leaves nothing behind."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from adaptive_batch.callbacks import _lightning
from adaptive_batch.callbacks._metrics import Metrics
from adaptive_batch.micro_batching import split_batch
from adaptive_batch.noise.part_norms import Metric, PartNorms, grad_sq_norm
from adaptive_batch.noise.sample import NoiseSample
from adaptive_batch.transaction import Rollback

if TYPE_CHECKING:
    from collections.abc import Callable

    from pytorch_lightning import LightningModule, Trainer

__all__ = ["Probe"]


class Probe:
    """Runs ``training_step`` and a backward pass over parts of a batch and puts everything back.

    Put back are gradients, buffers, random states, torchmetrics, and what ``self.log`` was told. Under layers
    that look across the batch the gradients are those of batches of the parts' size.

    Args:
        trainer: whose loop this belongs to.
        module: what is trained.
        parameters: whose gradients count.
        metric: see :class:`PartNorms`.
    """

    def __init__(
        self,
        trainer: Trainer,
        module: LightningModule,
        parameters: Sequence[nn.Parameter],
        metric: Metric | None = None,
    ) -> None:
        self._trainer = trainer
        self._module = module
        self._parameters = list(parameters)
        self._metric = metric
        self._rollback = Rollback(module)
        self._metrics = Metrics(module)

    def measure(
        self,
        kwargs: Mapping[str, Any],
        sizes: Sequence[int],
        factor: Callable[[Any, int], tuple[float | Tensor, float | Tensor]],
    ) -> NoiseSample | None:
        """The parts of the batch ``kwargs["batch"]``, ``None`` where it gave no loss.

        Args:
            kwargs: the arguments of ``training_step``.
            sizes: samples of each part.
            factor: ``(part, size) -> (factor on the part's loss, share of the whole)``: what makes the losses add up
                to the mean over the batch, and what a part's mean gradient is multiplied with by it.
        """
        gradients = [p.grad for p in self._parameters]
        hook = self._module._current_fx_name
        self._rollback.save(accumulated=False)
        self._metrics.save()
        try:
            with (
                _lightning.LogBuffer(self._trainer) as log,
                PartNorms(self._parameters, self._metric) as norms,
            ):
                for p in self._parameters:
                    p.grad = None
                self._run(kwargs, sizes, factor, log, norms)
                total = grad_sq_norm(self._parameters, self._metric)
            scale = _lightning.amp_scale(self._trainer)
            return None if total is None else NoiseSample(norms.sq_norms, norms.sizes, total / scale**2)
        finally:
            self._rollback.restore(gradients=True)
            self._rollback.forget()
            self._metrics.restore()
            self._metrics.forget()
            self._module._current_fx_name = hook
            for p, gradient in zip(self._parameters, gradients, strict=True):
                p.grad = gradient

    @torch.enable_grad()
    def _run(
        self,
        kwargs: Mapping[str, Any],
        sizes: Sequence[int],
        factor: Callable[[Any, int], tuple[float | Tensor, float | Tensor]],
        log: _lightning.LogBuffer,
        norms: PartNorms,
    ) -> None:
        loop = self._trainer.fit_loop.epoch_loop.automatic_optimization
        scale = _lightning.amp_scale(self._trainer)  # small gradients vanish in half precision without it
        accumulate = self._trainer.accumulate_grad_batches  # Lightning has divided the loss by it
        for part, size in zip(split_batch(kwargs["batch"], sizes, sum(sizes)), sizes, strict=True):
            log.start_part(part)
            output = loop._make_step_fn({**kwargs, "batch": part})()
            if output.closure_loss is not None:
                weight, share = factor(part, size)
                # Without the hooks of a backward pass, which count updates.
                (output.closure_loss * (weight * accumulate * scale)).backward()
                norms.end_part(size, share * scale)
