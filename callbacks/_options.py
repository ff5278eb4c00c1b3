"""Arguments that several callbacks have, checked in one place."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from adaptive_batch.arguments import check_choice, check_micro_batch_size
from adaptive_batch.callbacks import _lightning
from adaptive_batch.callbacks._executor import UpdateExecutor, WeightFn
from adaptive_batch.memory import parse_budget, usable_memory
from adaptive_batch.micro_batch_limit import MicroBatchLimit

if TYPE_CHECKING:
    from pytorch_lightning import LightningModule, Trainer

__all__ = ["Splitting", "check_choice", "check_function"]

_REDUCTIONS = ("mean", "sum")


def check_function(name: str, value: Callable[..., Any] | None) -> None:
    """Refuse what cannot be called."""
    if value is not None and not callable(value):
        raise TypeError(f"{name}={value!r} must be a function, or None.")


class Splitting:
    """How a callback's user wants updates split; makes the executor that does it.

    Args:
        micro_batch_size: a bound on the samples per pass, ``"auto"`` or ``None``.
        memory_budget: bytes, a size in words, a fraction of the device or ``None``.
        loss_reduction: ``"mean"`` or ``"sum"``.
        weight_fn: ``(micro_batch, batch) -> weight``.
        self_check: whether the first batch is compared with its parts.

    Attributes:
        limit: what was learned about the size of a pass.

    Raises:
        ValueError: for an argument that is not one of the above.
        TypeError: for a ``weight_fn`` that is no function.
    """

    def __init__(
        self,
        *,
        micro_batch_size: int | str | None,
        memory_budget: int | float | str | None,
        loss_reduction: str,
        weight_fn: WeightFn | None,
        self_check: bool,
    ) -> None:
        largest = check_micro_batch_size(micro_batch_size)
        check_choice("loss_reduction", loss_reduction, _REDUCTIONS)
        check_function("weight_fn", weight_fn)
        self.micro_batch_size = micro_batch_size
        self._memory_budget = memory_budget
        self._loss_reduction = loss_reduction
        self._weight_fn = weight_fn
        self._self_check = self_check
        self.limit = MicroBatchLimit(largest=largest)
        if isinstance(memory_budget, str):
            parse_budget(memory_budget, None)  # a fraction waits for the device

    def _switch_off(self, why: str) -> None:
        """An error where splitting was asked for, one warning where it was only ``"auto"``."""
        wishes = {
            "micro_batch_size": self.limit.largest,
            "memory_budget": self._memory_budget,
            "self_check": self._self_check or None,
        }
        for name, value in wishes.items():
            if value is not None:
                raise ValueError(f"{name}={value!r} needs updates that can be split, but {why}; leave it out.")
        if self.micro_batch_size is not None:
            warnings.warn(f"an update that does not fit into memory will not be split: {why}.", stacklevel=2)

    def executor(
        self,
        trainer: Trainer,
        module: LightningModule,
        *,
        noise: str = "auto",
        probes: bool = False,
        why_not: str | None = None,
    ) -> UpdateExecutor:
        """What runs the updates of a fit; ``why_not`` says why none can be split in it."""
        why_not = why_not or _lightning.splitting_obstacle(trainer, module)
        if why_not is not None:
            self._switch_off(why_not)
        self.limit.budget = usable_memory(self._memory_budget, trainer.strategy.root_device)
        return UpdateExecutor(
            trainer,
            module,
            limit=self.limit,
            loss_reduction=self._loss_reduction,
            weight_fn=self._weight_fn,
            recovers=self.micro_batch_size is not None and why_not is None,
            splits=why_not is None,
            noise=noise,
            probes=probes,
            explores=self._memory_budget is not None,
            self_check=self._self_check,
        )
