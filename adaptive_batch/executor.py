"""Runs the updates of a plain PyTorch loop, in parts where memory or a measurement demands it."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from adaptive_batch.layers import batch_dependent_layers
from adaptive_batch.memory import allocated_bytes
from adaptive_batch.micro_batch_limit import MicroBatchLimit
from adaptive_batch.micro_batching import UNEQUAL, split_pair, unequal_sizes
from adaptive_batch.noise.part_norms import PartNorms, grad_sq_norm
from adaptive_batch.noise.schedule import PURPOSEFUL_PARTS
from adaptive_batch.pass_memory import PassMemory
from adaptive_batch.timing import Elapsed, mark
from adaptive_batch.transaction import Rollback

__all__ = ["BatchClosure", "Executor", "LossFn"]

LossFn = Callable[[Any, Any], Tensor]


class Executor:
    """What the closures of a run's updates have in common.

    After an out-of-memory error in a forward or backward pass, everything that the attempt changed is put back
    and the batch starts again in parts of half the size; the learned limit stays.

    Args:
        model: maps ``x`` to a prediction.
        loss_fn: ``loss_fn(model(x), y)``, one number.
        optimizer: whose gradients are cleared and measured.
        limit: most samples per pass.
        loss_reduction: whether the loss is the ``"mean"`` or the ``"sum"`` over its samples.
        recovers: whether a batch may be split after an out-of-memory error.
        explores: whether to find out, before the first update, how many samples ``limit.budget`` allows.

    Attributes:
        failures: what out-of-memory errors have taught, one sentence each; to be told and cleared.
        measurable: whether an update may be split for a measurement alone, which layers that look across the
            batch would make another one.
    """

    def __init__(
        self,
        model: nn.Module,
        loss_fn: LossFn,
        optimizer: Optimizer,
        *,
        limit: MicroBatchLimit,
        loss_reduction: str = "mean",
        recovers: bool = False,
        explores: bool = False,
    ) -> None:
        self.model = model
        self.loss_fn = loss_fn
        self.optimizer = optimizer
        self.device = next((p.device for p in model.parameters()), torch.device("cpu"))
        self.sums = loss_reduction == "sum"
        self.recovers = recovers
        self.measurable = not batch_dependent_layers(model)
        self.limit = limit
        self.memory = PassMemory(model, limit, self.device, measures=recovers)
        self.rollback = Rollback(nn.ModuleList(part for part in (model, loss_fn) if isinstance(part, nn.Module)))
        self.failures = self.memory.failures
        self._explores = explores and not limit.model.measured
        self._warm = self.device.type == "cpu"  # where the bytes saved for backward are counted
        self._warned = False
        self._few_first = False

    def closure(
        self,
        batch: tuple[Any, Any],
        samples: int,
        *,
        measure: bool,
        time_parts: bool = False,
        sum_factor: float = 1.0,
    ) -> BatchClosure:
        """The closure that an optimizer's ``step`` takes, for a batch of ``samples``.

        Args:
            batch: the pair ``(x, y)``, on the model's device.
            samples: of the batch.
            measure: whether to record the squared norms of its parts, two at least.
            time_parts: whether to time passes of two sizes instead, in unequal parts of it.
            sum_factor: on a loss that is a sum.
        """
        if self._explores:
            self._explores = False
            self._explore(batch, samples)
        of_batch = partial(BatchClosure, self, batch, samples, sum_factor=sum_factor)
        if time_parts and self.measurable and samples >= UNEQUAL:
            self._few_first = not self._few_first
            return of_batch(split=partial(unequal_sizes, few_first=self._few_first))
        measure = measure and self.measurable and samples >= PURPOSEFUL_PARTS
        halves = partial(self.limit.sizes, parts=PURPOSEFUL_PARTS)
        return of_batch(split=halves if measure else None, measure=measure)

    def splits_into(self, batch: tuple[Any, Any], sizes: list[int], samples: int) -> bool:
        """Whether a batch that nobody asked to split has such parts; if not, nothing is measured of its update."""
        try:
            split_pair(batch, sizes, samples)
        except ValueError as problem:
            if not self._warned:
                warnings.warn(f"the gradient noise of an update is not measured: {problem}", stacklevel=2)
                self._warned = True
            return False
        return True

    def held(self) -> int:
        """Bytes that are held while no pass runs and no gradients are there."""
        return 0 if self.limit.budget is None else allocated_bytes(self.device)

    def gradients(self, part: tuple[Any, Any], factor: float) -> Tensor:
        """Add ``factor`` times the gradient of the part's loss; returns that times its loss."""
        x, y = part
        loss = self.loss_fn(self.model(x), y)
        if loss.numel() != 1:
            raise ValueError(
                f"loss_fn returned {loss.numel()} numbers; it must return one, the mean over the batch's samples."
            )
        if factor != 1:
            loss = loss * factor
        loss.backward()  # type: ignore[no-untyped-call]
        return loss.detach()

    def first_pass(self, samples: int, run: Callable[[], Tensor]) -> Tensor:
        """Run an update's first pass, in which the gradients appear: the one whose memory counts them."""
        warm, self._warm = self._warm, True  # the very first one also holds what libraries set up once
        return self.memory.measured(samples, run) if warm and self.memory.measures(samples) else run()

    def _explore(self, batch: tuple[Any, Any], samples: int) -> None:
        def run(size: int) -> None:
            self.rollback.restore(gradients=True)  # of none: every pass makes its own
            sizes = [size, samples - size] if size < samples else [size]
            self.gradients(split_pair(batch, sizes, samples)[0], 1.0)

        def held() -> int:
            self.rollback.restore(gradients=True)
            return self.held()

        with self.rollback.undone():
            self.memory.explore(samples, run, held)


class BatchClosure:
    """Gradient and loss of one batch, part by part; what the passes showed is kept.

    An optimizer may call it many times; the first call is the one at the parameters of before the step, and the
    one that is measured.

    Attributes:
        loss: mean over the samples, before the step.
        disturbed: whether it was split for a measurement alone, and so took longer than others do.
        micro_batch_size: samples of the largest pass.
        pass_sizes: samples of each part, of a batch in parts that was not measured.
        pass_seconds: time of each.
        part_sq_norms: squared norms of the parts' mean gradients, if measured.
        part_sizes: samples of each measured part.
        sq_norm: squared norm of the batch's mean gradient, if measured.
    """

    def __init__(
        self,
        executor: Executor,
        batch: tuple[Any, Any],
        samples: int,
        *,
        split: Callable[[int], list[int]] | None = None,
        measure: bool = False,
        sum_factor: float = 1.0,
    ) -> None:
        self._executor = executor
        self._batch = batch
        self._split = split
        self._measure = measure
        self._calls = 0
        self.samples = samples
        self._sum_factor = sum_factor
        self.loss = torch.full((), math.nan)
        self.disturbed = False
        self.micro_batch_size = 0
        self.pass_sizes: list[int] = []
        self.pass_seconds: list[Elapsed] = []
        self.part_sq_norms: Sequence[Any] = ()
        self.part_sizes: Sequence[int] = ()
        self.sq_norm: Tensor | float = math.nan

    def __call__(self) -> Tensor:
        """Clear the gradients, add up those of the batch, return its loss."""
        executor = self._executor
        executor.optimizer.zero_grad()
        first, self._calls = self._calls == 0, self._calls + 1
        measured = self._measure and first
        loss = self._recovered(measured) if executor.recovers else self._attempt(self._sizes(), measured)
        if first:
            self.loss = loss / (self._sum_factor * self.samples) if executor.sums else loss
        return loss

    def _recovered(self, measured: bool) -> Tensor:
        """Attempts in ever smaller parts while memory runs out."""
        executor = self._executor
        memory, rollback = executor.memory, executor.rollback
        executor.limit.held = executor.held()
        rollback.save(accumulated=True)  # what is left are gradients that are not the optimizer's to clear
        try:
            while True:
                sizes = self._sizes()
                try:
                    loss = self._attempt(sizes, measured)
                    break
                except Exception as error:
                    failed = memory.failed_size(error, sizes[0], self.samples)
                # Out here, where the traceback no longer holds the failed attempt's tensors.
                rollback.restore(gradients=True)
                memory.learn(failed)
        finally:
            rollback.forget()
        executor.limit.succeeded(self.samples)
        return loss

    def _sizes(self) -> list[int]:
        sizes = self._executor.limit.sizes(self.samples)
        if self._split is None or len(sizes) > 1:
            return sizes
        parts = self._split(self.samples)
        if not self._executor.splits_into(self._batch, parts, self.samples):
            return sizes
        self.disturbed = True
        return parts

    def _attempt(self, sizes: list[int], measured: bool) -> Tensor:
        executor = self._executor
        parameters = [p for group in executor.optimizer.param_groups for p in group["params"]]
        norms = PartNorms(parameters) if measured else None
        seconds: list[Elapsed] = []
        with norms or nullcontext():
            loss = self._passes(sizes, norms, seconds)
        self.micro_batch_size = max(self.micro_batch_size, *sizes)
        # A whole pass also does what belongs to the update, a measured one more than that: neither tells the time of
        # a part.
        if norms is None and len(sizes) > 1:
            self.pass_sizes += sizes
            self.pass_seconds += seconds
        total = None if norms is None else grad_sq_norm(parameters)
        if norms is not None and total is not None:
            self.part_sq_norms, self.part_sizes = norms.sq_norms, norms.sizes
            self.sq_norm = total / (self._sum_factor * self.samples) ** 2 if executor.sums else total
        return loss

    def _passes(self, sizes: list[int], norms: PartNorms | None, seconds: list[Elapsed]) -> Tensor:
        executor = self._executor
        whole = len(sizes) == 1
        parts = [self._batch] if whole else split_pair(self._batch, sizes, self.samples)
        losses: list[Tensor] = []
        for part, size in zip(parts, sizes, strict=True):
            started = mark(executor.device)
            factor = self._sum_factor if executor.sums else size / self.samples

            def run(part: tuple[Any, Any] = part, factor: float = factor) -> Tensor:
                return executor.gradients(part, factor)

            losses.append(run() if losses else executor.first_pass(size, run))
            seconds.append(Elapsed(started, mark(executor.device)))
            if norms is not None:
                norms.end_part(size, size * factor if executor.sums else factor)
        return losses[0] if whole else torch.stack(losses).sum()
