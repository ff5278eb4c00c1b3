"""Passes over a batch that leave nothing behind."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, MutableMapping, MutableSequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch

from adaptive_batch.callbacks import _lightning
from adaptive_batch.callbacks._metrics import Metrics
from adaptive_batch.transaction import Rollback

if TYPE_CHECKING:
    from pytorch_lightning import LightningModule, Trainer

__all__ = ["Trial", "own_copy"]


def own_copy(batch: Any) -> Any:
    """For a pass whose training_step may take entries out of its batch; tensors are shared."""
    return copy.copy(batch) if isinstance(batch, (MutableMapping, MutableSequence)) else batch


class Trial:
    """Runs ``training_step`` on the side.

    Inside :meth:`undone`, gradients start from nothing; afterwards they are what they were, and so are
    buffers, random states, torchmetrics, and what ``self.log`` was told.

    Args:
        trainer: whose loop this belongs to.
        module: what is trained.
    """

    def __init__(self, trainer: Trainer, module: LightningModule) -> None:
        self._trainer = trainer
        self._module = module
        self._rollback = Rollback(module)
        self._metrics = Metrics(module)

    @contextmanager
    def undone(self) -> Iterator[None]:
        """A context after which everything is as before."""
        hook = self._module._current_fx_name
        self._metrics.save()
        try:
            with self._rollback.undone(), _lightning.LogBuffer(self._trainer) as self._log, torch.enable_grad():
                yield
        finally:
            self._metrics.restore()
            self._metrics.forget()
            self._module._current_fx_name = hook

    def rewind(self) -> None:
        """Put back all but the gradients, for another pass from the same state."""
        self._rollback.restore(gradients=False)
        self._metrics.restore()

    def clear(self) -> None:
        """Drop the gradients."""
        for parameter in self._module.parameters():
            parameter.grad = None

    def loss(self, kwargs: Mapping[str, Any], batch: Any) -> torch.Tensor | None:
        """The loss of ``training_step`` on ``batch``, with its other arguments from ``kwargs``."""
        batch = own_copy(batch)
        self._log.start_part(batch)
        loop: Any = self._trainer.fit_loop.epoch_loop.automatic_optimization
        loss: torch.Tensor | None = loop._make_step_fn({**kwargs, "batch": batch})().closure_loss
        return None if loss is None else loss * self._trainer.accumulate_grad_batches
