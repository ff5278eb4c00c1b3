"""The callback that measures the memory of an update and changes nothing."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

from torch.nn.parameter import is_lazy

from adaptive_batch.callbacks import _lightning
from adaptive_batch.callbacks._lightning import CallbackBase
from adaptive_batch.callbacks._options import check_function
from adaptive_batch.callbacks._trial import Trial
from adaptive_batch.memory import (
    MemoryModel,
    PeakMemory,
    SavedBytes,
    is_hook_refusal,
    is_out_of_memory,
    measure_memory,
)

if TYPE_CHECKING:
    from pytorch_lightning import LightningModule, Trainer

__all__ = ["MemoryMonitor"]


class MemoryMonitor(CallbackBase):
    """Measures the memory that each batch takes, predicts it from the batches before, and logs both.

    In ``trainer.callback_metrics`` and the logger: ``adaptive_batch/peak_memory``, the bytes at the batch's
    peak; ``adaptive_batch/predicted_peak_memory``, what the model ``fixed + per_sample * samples`` had said
    before (NaN until batches of two sizes were measured); ``adaptive_batch/peak_memory_error``, ``predicted
    / measured - 1``. On a GPU the bytes are all that is allocated; anywhere else those that are saved for
    backward, which are less than the whole need but the same in every run
    (:class:`~adaptive_batch.memory.SavedBytes`).

    The run stays what it is, bit for bit. On a GPU ``torch.cuda.max_memory_allocated()`` counts from the last
    batch on. Where a batch runs as micro-batches, because :class:`AutoMicroBatch` or
    :class:`AdaptiveBatchSize` is there too, the samples that count are those of its largest pass.

    Args:
        batch_size_of: ``batch -> samples``, where that is not the rows of the batch's first tensor.

    Attributes:
        model: the :class:`~adaptive_batch.memory.MemoryModel`, with ``predict(samples)`` and
            ``largest(bytes)``.

    Raises:
        TypeError: if ``batch_size_of`` is no function.
    """

    def __init__(self, *, batch_size_of: Callable[[Any], int] | None = None) -> None:
        check_function("batch_size_of", batch_size_of)
        self._batch_size_of = batch_size_of
        self.model = MemoryModel()
        self._patches = _lightning.Patches()
        self._forget_run()

    def _forget_run(self) -> None:
        self._meter: PeakMemory | SavedBytes | None = None
        self._measures: bool | None = None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Find out what is in memory anyway."""
        self._forget_run()
        self._resident = [*pl_module.parameters(), *pl_module.buffers()]
        self._patches.undo()
        self._log = _lightning.StepLog(trainer, "on_train_batch_end")
        self._patches.later(self._log.close)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Start to measure."""
        self._stop()
        if self._measures is None:
            self._measures = self._can_measure(trainer, pl_module, batch, batch_idx)
        if self._measures:
            self._samples = self._batch_size_of(batch) if self._batch_size_of else _lightning.samples_of(trainer, batch)
            self._meter = measure_memory(trainer.strategy.root_device, self._resident)
            self._meter.__enter__()

    def _can_measure(self, trainer: Trainer, module: LightningModule, batch: Any, batch_idx: int) -> bool:
        """Whether ``training_step`` runs while saved bytes are counted: tried once, and undone."""
        device = trainer.strategy.root_device
        if device.type == "cuda" or not module.automatic_optimization or any(map(is_lazy, module.parameters())):
            return True
        trial = Trial(trainer, module)
        alone = _lightning.RankSync(trainer).blocked() if _lightning.uses_ddp(trainer) else nullcontext()
        try:
            with trial.undone(), alone, measure_memory(device):
                trial.loss(_lightning.step_kwargs(trainer, batch, batch_idx), batch)
        except Exception as error:
            if is_hook_refusal(error):
                warnings.warn(
                    "MemoryMonitor measures nothing here: training_step uses torch.func, under which the "
                    "bytes that are saved for backward cannot be counted.",
                    stacklevel=2,
                )
                return False
            if not is_out_of_memory(error):
                raise
        return True

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Log the peak, and learn from it."""
        measured = self._stop()
        if measured is None:
            return
        samples = _largest_pass(trainer) or self._samples
        predicted = self.model.predict(samples) if self.model.measured else math.nan
        self.model.update(samples, measured)
        values = {
            "peak_memory": float(measured),
            "predicted_peak_memory": predicted,
            "peak_memory_error": predicted / measured - 1 if measured else math.nan,
        }
        self._log(lambda: {f"adaptive_batch/{name}": value for name, value in values.items()})

    def _stop(self) -> int | None:
        """Bytes measured since the batch started, ``None`` if nothing is being measured."""
        meter, self._meter = self._meter, None
        if meter is None:
            return None
        meter.__exit__()
        return meter.bytes

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Stop measuring; Lightning calls no ``teardown`` after an exception."""
        self._stop()
        self._patches.undo()

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Stop measuring."""
        self._stop()
        self._patches.undo()

    def state_dict(self) -> dict[str, Any]:
        """The measurements, as plain numbers."""
        return {"model": self.model.state_dict()}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Put back what :meth:`state_dict` gave."""
        self.model.load_state_dict(state_dict["model"])


def _largest_pass(trainer: Trainer) -> int | None:
    """Samples of the batch's largest pass, where a callback that splits knows."""
    sizes = (getattr(callback, "micro_batch_size", None) for callback in _lightning.callbacks_of(trainer))
    return next((size for size in sizes if size), None)
