"""Squared norms of gradients of which each rank keeps a piece."""

from __future__ import annotations

from collections.abc import Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import ShardingStrategy

from adaptive_batch.callbacks._lightning import data_share
from adaptive_batch.noise.part_norms import sq_norm

if TYPE_CHECKING:
    from pytorch_lightning import Trainer

__all__ = ["ShardedNorms", "all_can_split", "sharded_sq_norm"]


class ShardedNorms:
    """Records the squared norm of each part's mean gradient, over all ranks.

    No hook sees a whole gradient here, so a part's is what it has added to the pieces in ``.grad``, of which the
    sum before it is kept: once more the memory of this rank's gradients, in measured updates. Use as
    :class:`~adaptive_batch.noise.part_norms.PartNorms`; all ranks have to do so together.

    Args:
        trainer: whose strategy shards the parameters.
        parameters: whose gradients count.
        samples: of each part, over all ranks.
    """

    def __init__(self, trainer: Trainer, parameters: Sequence[nn.Parameter], samples: Sequence[int]) -> None:
        self._trainer = trainer
        self._ranks = data_share(trainer)[1]
        self._parameters = [p for p in dict.fromkeys(parameters) if p.requires_grad]
        self._samples = list(samples)
        self._before: list[Tensor] = []
        self.sq_norms: list[Tensor] = []
        self.sizes: list[int] = []

    def __enter__(self) -> ShardedNorms:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._before = []

    @torch.no_grad()
    def end_part(self, size: int, weight: float | Tensor) -> None:
        """Close the part whose backward pass has just ended.

        Args:
            size: this rank's samples of it.
            weight: what the mean gradient over this rank's samples was multiplied with.
        """
        held = [p.grad for p in self._parameters if p.grad is not None]
        added = torch._foreach_sub(held, self._before) if self._before else held
        samples = self._samples[len(self.sizes)]
        share = weight * samples / (size * self._ranks)  # of the mean gradient over all ranks' samples
        self.sq_norms.append(sharded_sq_norm(self._trainer, added) / share**2)
        self.sizes.append(samples)
        self._before = [gradient.clone() for gradient in held]


@torch.no_grad()
def sharded_sq_norm(trainer: Trainer, gradients: Sequence[Tensor]) -> Tensor:
    """Squared norm of gradients, of which these are this rank's pieces; all ranks have to call it together."""
    own: Any = sq_norm(gradients) if gradients else torch.zeros((), device=trainer.strategy.root_device)
    if hasattr(own, "full_tensor"):  # a DTensor knows what of it lies where
        own = own.full_tensor()
    else:
        model: Any = trainer.strategy.model
        if model.sharding_strategy is not ShardingStrategy.NO_SHARD:
            dist.all_reduce(own, group=model.process_group)
    whole: Tensor = own
    return whole


def all_can_split(trainer: Trainer, samples: int, parts: int) -> bool:
    """Whether every rank's batch has a sample for each of so many parts."""
    least = torch.tensor(samples, device=trainer.strategy.root_device)
    dist.all_reduce(least, op=dist.ReduceOp.MIN)
    return int(least) >= parts
