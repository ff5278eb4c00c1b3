"""Runs an update as micro-batches inside Lightning's optimization closure."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from adaptive_batch.callbacks import _lightning
from adaptive_batch.measurement import Number
from adaptive_batch.micro_batching import balanced_sizes, split_batch
from adaptive_batch.noise.part_norms import PartNorms, grad_sq_norm
from adaptive_batch.timing import Elapsed, Mark, mark

if TYPE_CHECKING:
    from pytorch_lightning import Trainer

__all__ = ["UpdateExecutor"]

WeightFn = Callable[[Any, Any], "float | Tensor"]

PURPOSEFUL_PARTS = 2
"""Parts of an update that is split for the noise alone: each costs a pass's overhead, and what limits the
estimate of |G|^2 is the number of measured updates, not of parts."""


class UpdateExecutor:
    """Replaces the closure of each batch by one that runs it in parts and records what the parts show.

    Everything around the closure stays Lightning's: hooks per update, ``global_step``, clipping, precision.
    A batch that is neither split nor measured runs in Lightning's own closure.

    Args:
        trainer: whose loop this belongs to.
        micro_batch_size: most samples per pass; ``None`` is no bound.
        loss_reduction: whether ``training_step`` returns the ``"mean"`` or the ``"sum"`` over its samples.
        weight_fn: ``(micro_batch, batch) -> weight`` of a part's loss, for losses that are neither.
    """

    def __init__(
        self,
        trainer: Trainer,
        *,
        micro_batch_size: int | None,
        loss_reduction: str,
        weight_fn: WeightFn | None,
    ) -> None:
        self._trainer = trainer
        self._limit = micro_batch_size
        self._loss_reduction = loss_reduction
        self._weight_fn = weight_fn
        self._samples = 0
        self._wait = 0.0
        self.start_update(measure=False)

    def start_update(self, *, measure: bool) -> None:
        """Forget the last update; ``measure`` records the squared norms of this one's parts."""
        self._measure = measure
        self._norms: PartNorms | None = None
        self._batch_sizes: list[int] = []
        self.pass_sizes: list[int] = []
        self.pass_seconds: list[Elapsed] = []
        self.part_sq_norms: list[Tensor] = []
        self.part_sizes: list[int] = []
        self.sq_norm: Number = float("nan")
        self.micro_batch_size = 0

    def start_batch(self, samples: int, wait: float) -> None:
        """The next closure is for a batch of ``samples``, for which the loop has waited ``wait`` seconds."""
        self._samples = samples
        self._wait = wait

    def make_closure(self, original: Callable[..., Any], kwargs: Any, optimizer: Any, batch_idx: int) -> Any:
        """Lightning's closure for this batch, made to run in parts where it has to."""
        closure = original(kwargs, optimizer, batch_idx)
        sizes = self._sizes()
        self._batch_sizes.append(self._samples)
        self.micro_batch_size = max(self.micro_batch_size, sizes[0])
        if len(sizes) == 1 and not self._measure:
            closure.closure = self._timed(closure.closure)
        else:
            closure.closure = lambda *_, **__: self._run(closure, kwargs, sizes)
        return closure

    def _sizes(self) -> list[int]:
        n = self._samples
        largest = n if self._limit is None else min(n, self._limit)
        if self._measure and self._trainer.accumulate_grad_batches == 1 and n >= PURPOSEFUL_PARTS:
            largest = min(largest, -(-n // PURPOSEFUL_PARTS))
        return balanced_sizes(n, largest)

    def _timed(self, run: Callable[[], Any]) -> Callable[[], Any]:
        def closure(*args: Any, **kwargs: Any) -> Any:
            started = self._mark()
            result = run(*args, **kwargs)
            self._end_pass(self._samples, started)
            return result

        return closure

    def _mark(self) -> Mark:
        return mark(self._trainer.strategy.root_device)

    def _end_pass(self, size: int, started: Mark) -> None:
        share = self._wait * size / self._samples
        self.pass_sizes.append(size)
        self.pass_seconds.append(Elapsed(started, self._mark(), share))

    @torch.enable_grad()
    def _run(self, closure: Any, kwargs: Mapping[str, Any], sizes: list[int]) -> Any:
        """Forward and backward of each part; the gradients add up to the whole batch's."""
        batch = kwargs["batch"]
        parts = [batch] if len(sizes) == 1 else split_batch(batch, sizes, self._samples)
        # An optimizer may call the closure many times (LBFGS); its first call is the one to measure.
        norms = PartNorms(self._parameters()) if self._measure else None
        weights = [self._weight(part, batch, size) for part, size in zip(parts, sizes, strict=True)]
        outputs = []
        log = _lightning.LogBuffer(self._trainer) if len(parts) > 1 else None
        with log or nullcontext(), norms or nullcontext():
            for index, (part, size, weight) in enumerate(zip(parts, sizes, weights, strict=True)):
                if log is not None:
                    log.start_part(part, size)
                outputs.append(self._run_part(closure, kwargs, part, size, weight, first=index == 0))
                if norms is not None:
                    norms.end_part(size, self._mean_gradient_factor(weight, size))
        if log is not None:
            log.commit()
        if norms is not None:
            self._keep(norms)
        return _joined(outputs, weights, sizes)

    def _run_part(
        self, closure: Any, kwargs: Mapping[str, Any], part: Any, size: int, weight: Number, *, first: bool
    ) -> Any:
        loop = self._trainer.fit_loop.epoch_loop.automatic_optimization
        started = self._mark()
        output = loop._make_step_fn({**kwargs, "batch": part})()
        if first and closure._zero_grad_fn is not None:
            closure._zero_grad_fn()
        if closure._backward_fn is not None and output.closure_loss is not None:
            # Not even a factor of one where nothing is split: constant means unchanged.
            closure._backward_fn(
                output.closure_loss if size == self._samples else output.closure_loss * weight
            )
        self._end_pass(size, started)
        return output

    def _weight(self, part: Any, batch: Any, size: int) -> Number:
        if self._weight_fn is not None:
            return self._weight_fn(part, batch)
        return 1.0 if self._loss_reduction == "sum" else size / self._samples

    def _mean_gradient_factor(self, weight: Number, size: int) -> Number:
        """What the mean gradient of a part's samples was multiplied with before it reached the hooks."""
        scale = _lightning.amp_scale(self._trainer) / self._trainer.accumulate_grad_batches
        return scale * (size if self._loss_reduction == "sum" else weight)

    def _parameters(self) -> list[nn.Parameter]:
        return [p for group in self._trainer.optimizers[0].param_groups for p in group["params"]]

    def _keep(self, norms: PartNorms) -> None:
        self._measure = self._trainer.accumulate_grad_batches > 1
        self.part_sq_norms += norms.sq_norms
        self.part_sizes += norms.sizes
        if _lightning.accumulating(self._trainer):
            return
        if len(set(self._batch_sizes)) > 1 or len(self._batch_sizes) < self._trainer.accumulate_grad_batches:
            # Lightning weighs the batches of a window alike, so this gradient is no mean over samples.
            self.part_sq_norms, self.part_sizes = [], []
            return
        total = grad_sq_norm(self._parameters())
        if total is not None:
            factor = _lightning.amp_scale(self._trainer)
            if self._loss_reduction == "sum":
                factor = factor * sum(self._batch_sizes) / self._trainer.accumulate_grad_batches
            self.sq_norm = total / factor**2


def _joined(outputs: list[Any], weights: list[Number], sizes: list[int]) -> Any:
    """The closure result of the whole batch from those of its parts."""
    if len(outputs) == 1:
        return outputs[0]
    losses = [
        o.closure_loss.detach() * w
        for o, w in zip(outputs, weights, strict=True)
        if o.closure_loss is not None
    ]
    loss = torch.stack(losses).sum(0) if losses else None
    extras = {key: _join_extra([o.extra[key] for o in outputs], weights, sizes) for key in outputs[0].extra}
    return type(outputs[0])(loss, extra=extras)


def _join_extra(values: list[Any], weights: list[Number], sizes: list[int]) -> Any:
    if not all(isinstance(v, Tensor) for v in values):
        return values[-1]
    if all(v.ndim > 0 and v.shape[0] == size for v, size in zip(values, sizes, strict=True)):
        return torch.cat(values)
    if all(v.ndim == 0 and v.is_floating_point() for v in values):
        return torch.stack([v * w for v, w in zip(values, weights, strict=True)]).sum()
    return values[-1]
