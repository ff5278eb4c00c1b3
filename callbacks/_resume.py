"""What a checkpoint needs beside the callback's own state so that a run goes on bit for bit.

Lightning's checkpoints hold weights, optimizers, schedulers and progress. They lack the random states, what
``self.log`` and torchmetrics have accumulated in the epoch, the metrics that others look at, and the gradients of
an update that is still being accumulated.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor

from adaptive_batch.callbacks import _lightning
from adaptive_batch.callbacks._metrics import Metrics
from adaptive_batch.transaction import random_state, set_random_state

if TYPE_CHECKING:
    from pytorch_lightning import LightningModule, Trainer

__all__ = ["RunState"]


class RunState:
    """The state of a run that belongs to no callback, on this rank.

    Args:
        trainer: of the run.
        module: that it trains.

    Attributes:
        results: what ``self.log`` has accumulated in the epoch.
    """

    def __init__(self, trainer: Trainer, module: LightningModule) -> None:
        self._trainer = trainer
        self._module = module
        self._metrics = Metrics(module)
        self.results = _lightning.EpochResults(trainer)

    def state_dict(self) -> dict[str, Any]:
        """Plain values and tensors."""
        return {
            "random": random_state(self._module),
            "callback_metrics": _lightning.get_callback_metrics(self._trainer),
            "metrics": self._metrics.state_dict(_lightning.metrics_to_empty(self._trainer)),
            "results": self.results.state_dict(),
        }

    def restore_callback_metrics(self, state: Mapping[str, Any]) -> None:
        """First: schedulers and callbacks look at them."""
        _lightning.set_callback_metrics(self._trainer, state["callback_metrics"])

    def restore(self, state: Mapping[str, Any], *, inside_epoch: bool) -> None:
        """Put back what :meth:`state_dict` gave; what an epoch accumulates only ``inside_epoch``."""
        if inside_epoch:
            self._metrics.load_state_dict(state["metrics"])
            self.results.load_state_dict(state["results"])
        set_random_state(self._module, state["random"])

    def gradients(self) -> list[Tensor | None]:
        """Of an update that is being accumulated."""
        return [None if p.grad is None else p.grad.detach().clone() for p in self._module.parameters()]

    def restore_gradients(self, gradients: Sequence[Tensor | None]) -> None:
        """Put back what :meth:`gradients` gave."""
        for parameter, gradient in zip(self._module.parameters(), gradients, strict=True):
            parameter.grad = None if gradient is None else gradient.to(parameter.device)
