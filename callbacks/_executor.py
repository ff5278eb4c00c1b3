"""Runs an update as micro-batches inside Lightning's optimization closure."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from adaptive_batch.callbacks import _lightning
from adaptive_batch.callbacks._metrics import Metrics
from adaptive_batch.layers import batch_dependent_layers
from adaptive_batch.measurement import Number
from adaptive_batch.memory import free_memory, is_out_of_memory
from adaptive_batch.micro_batching import balanced_sizes, split_batch
from adaptive_batch.noise.part_norms import PartNorms, grad_sq_norm
from adaptive_batch.timing import Elapsed, mark
from adaptive_batch.transaction import Rollback

if TYPE_CHECKING:
    from pytorch_lightning import LightningModule, Trainer

__all__ = ["UpdateExecutor"]

WeightFn = Callable[[Any, Any], "float | Tensor"]

PURPOSEFUL_PARTS = 2
"""Parts of an update that is split for the noise alone: each costs a pass's overhead, and what limits the
estimate of |G|^2 is the number of measured updates, not of parts."""


class UpdateExecutor:
    """Replaces the closure of each batch by one that runs it in parts and records what the parts show.

    Everything around the closure stays Lightning's: hooks per update, ``global_step``, clipping, precision.

    After an out-of-memory error in a forward or backward pass, everything that the attempt changed is put back
    and the batch starts again in parts of half the size; the learned limit stays.

    Args:
        trainer: whose loop this belongs to.
        module: what is trained.
        micro_batch_size: most samples per pass; ``None`` is no bound.
        loss_reduction: whether ``training_step`` returns the ``"mean"`` or the ``"sum"`` over its samples.
        weight_fn: ``(micro_batch, batch) -> weight`` of a part's loss, for losses that are neither.
        recovers: whether a batch may be split after an out-of-memory error.
        probes: whether the noise is measured by passes of their own, which change nothing, instead of by
            splitting updates. A model with layers that look across the batch is never split for the noise.

    Attributes:
        limit: most samples per pass now.
    """

    def __init__(
        self,
        trainer: Trainer,
        module: LightningModule,
        *,
        micro_batch_size: int | None,
        loss_reduction: str,
        weight_fn: WeightFn | None,
        recovers: bool,
        probes: bool,
    ) -> None:
        self._trainer = trainer
        self._module = module
        self._loss_reduction = loss_reduction
        self._weight_fn = weight_fn
        self._recovers = recovers
        self._rollback = Rollback(module)
        self._across_batch = batch_dependent_layers(module)
        self._smallest = 2 if self._across_batch else 1
        self._probes = probes or bool(self._across_batch)
        if self._across_batch and (recovers or micro_batch_size is not None):
            warnings.warn(
                f"{self._across_batch[0]} looks across the batch: an update that is split, which happens only where "
                "memory demands it, normalises over its micro-batches.",
                stacklevel=2,
            )
        self._metrics = Metrics(module)
        self._samples = 0
        self._wait = 0.0
        self.limit = micro_batch_size
        self.failures: list[str] = []
        self.start_update(measure=False)

    def start_update(self, *, measure: bool) -> None:
        """Forget the last update; ``measure`` records the squared norms of this one's parts."""
        self._measure = measure
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
        self._batch_sizes.append(samples)

    def make_closure(self, original: Callable[..., Any], kwargs: Any, optimizer: Any, batch_idx: int) -> Any:
        """Lightning's closure for this batch, made to run in parts where it has to."""
        closure = original(kwargs, optimizer, batch_idx)
        plain = closure.closure
        closure.closure = lambda *_, **__: self._run(closure, plain, kwargs, batch_idx)
        return closure

    def _sizes(self, *, split: bool) -> list[int]:
        """Samples of each pass; ``split`` makes parts for the noise where there would be none."""
        n = self._samples
        largest = n if self.limit is None else min(n, self.limit)
        if split and n >= PURPOSEFUL_PARTS:
            largest = min(largest, -(-n // PURPOSEFUL_PARTS))
        return balanced_sizes(n, largest)

    @property
    def _splits_for_noise(self) -> bool:
        """The batches of an accumulation window are parts already."""
        return self._measure and not self._probes and self._trainer.accumulate_grad_batches == 1

    def _run(self, closure: Any, plain: Callable[[], Any], kwargs: Mapping[str, Any], batch_idx: int) -> Any:
        """The batch's gradients and outputs, attempted in ever smaller parts while memory runs out."""
        if self._measure and self._probes:
            self._probe(kwargs)
        if not self._recovers:
            return self._attempt(closure, plain, kwargs, self._sizes(split=self._splits_for_noise))
        accumulated = batch_idx % self._trainer.accumulate_grad_batches != 0
        self._rollback.save(accumulated=accumulated)
        self._metrics.save()
        hook = self._module._current_fx_name
        zero_grad = closure._zero_grad_fn
        try:
            while True:
                sizes = self._sizes(split=self._splits_for_noise)
                try:
                    return self._attempt(closure, plain, kwargs, sizes)
                except Exception as error:
                    if not is_out_of_memory(error):
                        raise
                    if sizes[0] <= self._smallest:
                        raise RuntimeError(self._no_way_out(sizes[0])) from error
                # Out here, where the traceback no longer holds the failed attempt's tensors.
                cleared = zero_grad is not None and closure._zero_grad_fn is None
                self._rollback.restore(gradients=cleared or accumulated)
                self._metrics.restore()
                self._module._current_fx_name = hook
                self._learn(sizes[0])
        finally:
            closure._zero_grad_fn = zero_grad  # an optimizer that calls the closure again clears again
            self._rollback.forget()
            self._metrics.forget()

    def _no_way_out(self, size: int) -> str:
        samples = "one sample" if size == 1 else f"{size} samples, the least that {self._across_batch[0]} can take,"
        return (
            f"a micro-batch of {samples} does not fit into memory; use a smaller model, activation checkpointing, a "
            "lower precision or a larger device."
        )

    def _learn(self, failed: int) -> None:
        self.limit = max(-(-failed // 2), self._smallest)
        self.failures.append(f"out of memory at a micro-batch of {failed}, at most {self.limit} from here on")
        free_memory(self._trainer.strategy.root_device)

    def _probe(self, kwargs: Mapping[str, Any]) -> None:
        """Measure the parts of this batch, throw the gradients away and put everything else back.

        Under layers that look across the batch these are the gradients of batches of the parts' size.
        """
        self._measure = False
        parameters = self._parameters()
        gradients = [p.grad for p in parameters]
        hook = self._module._current_fx_name
        self._rollback.save(accumulated=False)
        self._metrics.save()
        try:
            with _lightning.LogBuffer(self._trainer) as log, PartNorms(parameters) as norms:
                for p in parameters:
                    p.grad = None
                self._run_probe(kwargs, log, norms)
                total = grad_sq_norm(parameters)
            if total is not None:
                self.part_sq_norms, self.part_sizes, self.sq_norm = norms.sq_norms, norms.sizes, total
        finally:
            self._rollback.restore(gradients=True)
            self._rollback.forget()
            self._metrics.restore()
            self._metrics.forget()
            self._module._current_fx_name = hook
            for p, gradient in zip(parameters, gradients, strict=True):
                p.grad = gradient

    @torch.enable_grad()
    def _run_probe(self, kwargs: Mapping[str, Any], log: _lightning.LogBuffer, norms: PartNorms) -> None:
        loop = self._trainer.fit_loop.epoch_loop.automatic_optimization
        sizes = self._sizes(split=True)
        batch = kwargs["batch"]
        for part, size in zip(split_batch(batch, sizes, self._samples), sizes, strict=True):
            log.start_part(part, size)
            output = loop._make_step_fn({**kwargs, "batch": part})()
            if output.closure_loss is None:
                continue
            # Weighted to the mean over the batch, without the hooks of a backward pass.
            share = self._weight(part, batch, size)
            share = share / self._samples if self._loss_reduction == "sum" else share
            (output.closure_loss * (share * self._trainer.accumulate_grad_batches)).backward()
            norms.end_part(size, size / self._samples if self._weight_fn is None else share)

    def _attempt(
        self, closure: Any, plain: Callable[[], Any], kwargs: Mapping[str, Any], sizes: list[int]
    ) -> Any:
        passes = _Passes(self, sizes)
        # An optimizer may call the closure many times (LBFGS); its first call is the one to measure.
        norms = PartNorms(self._parameters()) if self._measure and not self._probes else None
        buffered = self._recovers or len(sizes) > 1
        log = _lightning.LogBuffer(self._trainer) if buffered else None
        with log or nullcontext(), norms or nullcontext():
            if len(sizes) == 1:
                result = passes.run(0, lambda: self._whole(closure, plain))
                if norms is not None:
                    norms.end_part(sizes[0], self._mean_gradient_factor(1.0, sizes[0]))
            else:
                result = self._in_parts(closure, kwargs, passes, log, norms)
        if log is not None:
            log.commit()
        self.pass_sizes += sizes
        self.pass_seconds += passes.seconds
        self.micro_batch_size = max(self.micro_batch_size, sizes[0])
        if norms is not None:
            self._keep(norms)
        return result

    def _whole(self, closure: Any, plain: Callable[[], Any]) -> Any:
        """Lightning's own closure: not even a factor of one where nothing is split."""
        closure._zero_grad_fn = self._once(closure, closure._zero_grad_fn)
        return plain()

    def _once(self, closure: Any, zero_grad: Callable[[], None] | None) -> Callable[[], None] | None:
        """Clearing the gradients, which a second attempt must not repeat: its hooks are per update."""
        if zero_grad is None or not self._recovers:
            return zero_grad

        def clear() -> None:
            closure._zero_grad_fn = None
            zero_grad()

        return clear

    @torch.enable_grad()
    def _in_parts(
        self,
        closure: Any,
        kwargs: Mapping[str, Any],
        passes: _Passes,
        log: _lightning.LogBuffer | None,
        norms: PartNorms | None,
    ) -> Any:
        """Forward and backward of each part; the gradients add up to the whole batch's."""
        batch, sizes = kwargs["batch"], passes.sizes
        parts = split_batch(batch, sizes, self._samples)
        weights = [self._weight(part, batch, size) for part, size in zip(parts, sizes, strict=True)]
        outputs = []
        self._metrics.start_parts()
        for index, (part, size, weight) in enumerate(zip(parts, sizes, weights, strict=True)):
            if log is not None:
                log.start_part(part, size)
            run = partial(self._part, closure, {**kwargs, "batch": part}, weight, first=index == 0)
            outputs.append(passes.run(index, run))
            if norms is not None:
                norms.end_part(size, self._mean_gradient_factor(weight, size))
        self._metrics.end_parts()
        return _joined(outputs, weights, sizes)

    def _part(self, closure: Any, kwargs: Mapping[str, Any], weight: Number, *, first: bool) -> Any:
        loop = self._trainer.fit_loop.epoch_loop.automatic_optimization
        output = loop._make_step_fn(kwargs)()
        clear = self._once(closure, closure._zero_grad_fn) if first else None
        if clear is not None:
            clear()
        if closure._backward_fn is not None and output.closure_loss is not None:
            closure._backward_fn(output.closure_loss * weight)
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


class _Passes:
    """Times the passes of one attempt."""

    def __init__(self, executor: UpdateExecutor, sizes: list[int]) -> None:
        self._device = executor._trainer.strategy.root_device
        self._wait_per_sample = executor._wait / executor._samples
        self.sizes = sizes
        self.seconds: list[Elapsed] = []

    def run(self, index: int, run: Callable[[], Any]) -> Any:
        """Run part ``index``; its share of the wait for data counts as its own."""
        started = mark(self._device)
        result = run()
        share = self._wait_per_sample * self.sizes[index]
        self.seconds.append(Elapsed(started, mark(self._device), share))
        return result


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
