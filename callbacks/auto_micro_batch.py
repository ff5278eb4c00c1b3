"""The callback that keeps the batch size and never runs out of memory."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from adaptive_batch.callbacks import _lightning
from adaptive_batch.callbacks._executor import UpdateExecutor, WeightFn
from adaptive_batch.callbacks._lightning import CallbackBase, Patches
from adaptive_batch.callbacks._options import Splitting, check_function
from adaptive_batch.callbacks.adaptive_batch_size import AdaptiveBatchSize
from adaptive_batch.micro_batch_limit import MicroBatchLimit

if TYPE_CHECKING:
    from pytorch_lightning import LightningModule, Trainer

__all__ = ["AutoMicroBatch"]


class AutoMicroBatch(CallbackBase):
    """Runs each batch as micro-batches that fit into memory, with the gradient of the whole batch.

    The batch size, the learning rate and the loader stay the user's own. A batch that fits runs as in plain
    Lightning, bit for bit. After an out-of-memory error everything that the failed attempt changed is put
    back and the batch runs again in parts of half the size; where a budget is known (on a GPU always), what a
    sample takes is measured, so that it does not come to that. :class:`AdaptiveBatchSize` does this, too.

    ``adaptive_batch/micro_batch_size``, the samples of the largest pass of an update, is logged.

    Args:
        micro_batch_size: most samples per forward/backward pass: a number, or ``"auto"`` for as many as fit.
        memory_budget: bytes that training may take: a number, ``"20GiB"``, or a fraction of the device.
            ``None`` is what a GPU has; on a CPU there is no bound. On a CPU the bytes are those saved for
            backward.
        loss_reduction: whether ``training_step`` returns the ``"mean"`` or the ``"sum"`` over its samples.
        weight_fn: ``(micro_batch, batch) -> weight`` of a part's loss, for a mean over something else.
        batch_size_of: ``batch -> samples``, where that is not the rows of the batch's first tensor.
        self_check: compare the first batch's gradient with that of its parts before training on it, and
            refuse a model or a loss that does not decompose, with the reason; everything is put back.
        verbose: log each out-of-memory error and what was learned from it.

    Attributes:
        failures: a sentence for each out-of-memory error.

    Raises:
        ValueError: for an argument that is not one of the above.
    """

    def __init__(
        self,
        *,
        micro_batch_size: int | str = "auto",
        memory_budget: int | float | str | None = None,
        loss_reduction: str = "mean",
        weight_fn: WeightFn | None = None,
        batch_size_of: Callable[[Any], int] | None = None,
        self_check: bool = False,
        verbose: bool = True,
    ) -> None:
        if micro_batch_size is None:
            raise ValueError('micro_batch_size=None would never split; pass "auto" or a number of samples.')
        check_function("batch_size_of", batch_size_of)
        self._splitting = Splitting(
            micro_batch_size=micro_batch_size,
            memory_budget=memory_budget,
            loss_reduction=loss_reduction,
            weight_fn=weight_fn,
            self_check=self_check,
        )
        self._batch_size_of = batch_size_of
        self._verbose = verbose
        self._patches = Patches()
        self._executor: UpdateExecutor | None = None
        self.failures: list[str] = []

    @property
    def micro_batch_size(self) -> int:
        """Samples of the largest pass of the last update, 0 before the first."""
        return 0 if self._executor is None else self._executor.micro_batch_size

    @property
    def limit(self) -> MicroBatchLimit:
        """What is known about the size of a pass: the budget, the memory model, what failures have taught."""
        return self._splitting.limit

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse what is not supported and take hold of the optimization loop."""
        if str(getattr(stage, "value", stage)) != "fit":
            return
        _check_supported(trainer, pl_module)
        self._patches.undo()
        self._trainer = trainer
        self._log = _lightning.StepLog(trainer, "on_train_batch_end")
        self._patches.later(self._log.close)
        _lightning.override_closure(self._patches, trainer, self._make_closure)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Look at the model, now that it has all its layers."""
        self._executor = self._splitting.executor(trainer, pl_module)

    def _make_closure(self, original: Callable[..., Any], kwargs: Any, optimizer: Any, batch_idx: int) -> Any:
        if not any(callback is self for callback in _lightning.callbacks_of(self._trainer)):
            return original(kwargs, optimizer, batch_idx)  # a tuner has taken the callbacks away
        assert self._executor is not None
        return self._executor.make_closure(original, kwargs, optimizer, batch_idx)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Learn how many samples the batch has."""
        assert self._executor is not None
        samples = self._batch_size_of(batch) if self._batch_size_of else _lightning.samples_of(trainer, batch)
        self._executor.start_update(measure=False)
        self._executor.start_batch(samples)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Log what was done."""
        assert self._executor is not None
        for failure in self._executor.failures:
            self.failures.append(failure)
            if self._verbose and trainer.is_global_zero:
                _lightning.logger_of(trainer).info(failure)
        self._executor.failures.clear()
        size = float(self.micro_batch_size)
        self._log(lambda: {"adaptive_batch/micro_batch_size": size})

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Lightning calls no ``teardown`` after an exception."""
        self._patches.undo()

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Give the loop back as it was."""
        self._patches.undo()

    def state_dict(self) -> dict[str, Any]:
        """What was learned about memory, as plain numbers."""
        return {"micro_batches": self.limit.state_dict()}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Put back what :meth:`state_dict` gave."""
        self.limit.load_state_dict(state_dict["micro_batches"])


def _check_supported(trainer: Trainer, module: LightningModule) -> None:
    if any(isinstance(callback, AdaptiveBatchSize) for callback in _lightning.callbacks_of(trainer)):
        raise ValueError("AdaptiveBatchSize splits batches that do not fit by itself; leave AutoMicroBatch out.")
    if not module.automatic_optimization:
        raise ValueError(
            "AutoMicroBatch cannot split a batch whose backward pass the LightningModule calls by itself; "
            "remove automatic_optimization=False, or split the batch in training_step with "
            "adaptive_batch.split_batch."
        )
    if trainer.strategy.handles_gradient_accumulation:
        raise ValueError(
            f"AutoMicroBatch cannot work with {type(trainer.strategy).__name__}, which accumulates "
            "gradients by itself; use another strategy."
        )
    obstacle = _lightning.splitting_obstacle(trainer, module)
    if obstacle is not None:
        raise ValueError(f"AutoMicroBatch cannot split the batches of this run: {obstacle}; leave it out.")
