"""What the passes of a model take: learned for the limit on their size, by measuring and by failing."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import TypeVar

import torch
from torch import nn

from adaptive_batch.layers import batch_dependent_layers
from adaptive_batch.memory import free_memory, is_hook_refusal, is_out_of_memory, measure_memory
from adaptive_batch.micro_batch_limit import MicroBatchLimit
from adaptive_batch.micro_batching import balanced_sizes

__all__ = ["PassMemory"]

T = TypeVar("T")

_WORTH_MEASURING = 1.1
"""Times the largest size measured: up to there the memory model is exact enough."""


class PassMemory:
    """Feeds a :class:`MicroBatchLimit`, and says what to do about a pass that ran out of memory.

    Args:
        module: what is trained; looked through once.
        limit: what learns; its ``smallest`` is 2 where a layer looks across the batch.
        device: where the passes run.
        measures: whether passes may be measured at all.

    Attributes:
        failures: one sentence for each failure, for whoever tells the user.
        peak: bytes of the largest pass measured since it was last set to 0.
    """

    def __init__(self, module: nn.Module, limit: MicroBatchLimit, device: torch.device, *, measures: bool) -> None:
        self._across_batch = batch_dependent_layers(module)
        self._resident = [*module.parameters(), *module.buffers()]
        self._limit = limit
        self._limit.smallest = 2 if self._across_batch else 1
        self._device = device
        self._measures = measures
        self.failures: list[str] = []
        self.peak = 0.0

    def measures(self, samples: int) -> bool:
        """Whether to measure the next pass, of ``samples``: never without a budget to keep."""
        return self._measures and self._limit.budget is not None and self._limit.measures(samples)

    def measured(self, samples: int, run: Callable[[], T]) -> T:
        """Run a pass of ``samples`` and learn what it takes beside what is held."""
        with measure_memory(self._device, self._resident) as memory:
            result = run()
        self._limit.model.update(samples, memory.bytes - memory.before)
        self.peak = max(self.peak, float(memory.bytes))
        return result

    def explore(self, samples: int, run: Callable[[int], None], held: Callable[[], int]) -> None:
        """Measure passes over ever more samples, as far as the budget goes, before the first update.

        Args:
            samples: of the batch at hand.
            run: makes a pass of so many of them; the caller puts back what it changes.
            held: bytes that are held between passes, asked for once a pass was made.

        Raises:
            RuntimeError: if the smallest pass does not fit.
        """
        try:
            self._explore(samples, run, held)
        except Exception as error:
            if is_out_of_memory(error):
                raise self.too_large(self.least(samples)) from error
            raise

    def _explore(self, samples: int, run: Callable[[int], None], held: Callable[[], int]) -> None:
        limit, least = self._limit, min(self._limit.smallest, samples)
        run(least)  # makes what every later pass finds there: gradients, the libraries' workspaces
        limit.held = held()
        for size in (least, 2 * least):  # without two sizes nothing could be said about a third
            if size <= min(samples, limit.largest or size):
                self._explore_size(size, run)
        while self._measures and (size := limit.of(samples)) > _WORTH_MEASURING * limit.model.measured[-1]:
            self._explore_size(size, run)

    def _explore_size(self, size: int, run: Callable[[int], None]) -> None:
        if not self._measures:
            return
        try:
            self.measured(size, lambda: run(size))
            return
        except Exception as error:
            refused = is_hook_refusal(error)
            if not refused and (not is_out_of_memory(error) or size <= self._limit.smallest):
                raise
        self.learn(None if refused else size)

    def failed_size(self, error: Exception, size: int, samples: int) -> int | None:
        """What a failed attempt teaches, for :meth:`learn`, if the batch can start again.

        Call it where the error was caught, and :meth:`learn` outside: the traceback holds the attempt's tensors.

        Args:
            error: what ended the attempt.
            size: samples of its largest pass.
            samples: of the whole batch.

        Raises:
            RuntimeError: out of memory with passes that cannot be smaller.
            Exception: the error itself, where it is neither this nor the meter's fault.
        """
        if self._measures and is_hook_refusal(error):
            return None
        if not is_out_of_memory(error):
            raise error
        if size <= self.least(samples):
            raise self.too_large(size) from error
        return size

    def learn(self, failed: int | None) -> None:
        """Passes of ``failed`` samples do not fit; ``None``: they cannot be measured."""
        if failed is None:
            self._measures = False
            warnings.warn(
                "memory_budget is not kept: the model uses torch.func, under which the bytes that are saved "
                "for backward cannot be counted.",
                stacklevel=2,
            )
            return
        self._limit.failed(failed)
        self.failures.append(f"out of memory at a micro-batch of {failed}, at most {self._limit.learned} from here on")
        free_memory(self._device)

    def least(self, samples: int) -> int:
        """Samples of the largest part where a batch is split as finely as the model allows."""
        return balanced_sizes(samples, 1, self._limit.smallest)[0]

    def too_large(self, size: int) -> RuntimeError:
        """The error that passes of ``size`` samples, the fewest possible, do not fit."""
        samples = "one sample" if size == 1 else f"{size} samples, the least that {self._across_batch[0]} can take,"
        return RuntimeError(
            f"a micro-batch of {samples} does not fit into memory; use a smaller model, activation checkpointing, a "
            "lower precision or a larger device."
        )
