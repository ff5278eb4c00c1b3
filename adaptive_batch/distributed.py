"""What ranks must agree on: the order of the samples, and what the measurements of all of them say."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch.distributed as dist
from torch.utils.data import Sampler

from adaptive_batch.measurement import Measurement

__all__ = ["SharedOrder", "broadcast", "gather", "merge_ranks"]


def gather(value: Any) -> list[Any]:
    """The values of all ranks, in their order; one small message from each."""
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def broadcast(value: Any) -> Any:
    """Rank 0's value."""
    values = [value]
    dist.broadcast_object_list(values, src=0)
    return values[0]


class SharedOrder(Sampler[Any]):
    """A sampler whose order is the same on all ranks: rank 0's.

    Samplers draw from random states that differ between ranks. One with a length is drawn on rank 0 alone and its
    whole order sent round once an epoch; one without a length must yield the same on all ranks by itself.

    Args:
        sampler: the user's own.
        rank: of this process.
        send: gives rank 0's value to all ranks.
    """

    def __init__(self, sampler: Any, rank: int, send: Callable[[Any], Any] = broadcast) -> None:
        self.sampler = sampler
        self._rank = rank
        self._send = send

    def __iter__(self) -> Iterator[Any]:
        try:
            len(self.sampler)
        except TypeError:
            return iter(self.sampler)
        return iter(self._send(list(self.sampler) if self._rank == 0 else None))

    def __len__(self) -> int:
        return len(self.sampler)

    def set_epoch(self, epoch: int) -> None:
        """Tell the sampler which epoch comes next, if it wants to know."""
        if hasattr(self.sampler, "set_epoch"):
            self.sampler.set_epoch(epoch)

    @property
    def generator(self) -> Any:
        """The sampler's random generator, if it has one."""
        return getattr(self.sampler, "generator", None)


def merge_ranks(ranks: Sequence[Sequence[Measurement]]) -> list[Measurement]:
    """One measurement per update from those that each rank made of it.

    The update takes as long as on the slowest rank and as much memory as on the fullest; its parts are the parts
    of all ranks; a pass of ``n`` samples on each of ``W`` ranks is one of ``W n`` samples.

    Args:
        ranks: for each rank its measurements of the same updates, with plain numbers.
    """
    return [_merge(updates) for updates in zip(*ranks, strict=True)]


def _merge(updates: Sequence[Measurement]) -> Measurement:
    world = len(updates)
    losses = [u.loss for u in updates]
    slowest = max(updates, key=lambda u: (sum(map(float, u.pass_seconds)), -updates.index(u)))
    return replace(
        updates[0],
        loss=sum(float(loss) for loss in losses) / world,
        seconds=max((float(u.seconds) for u in updates), key=lambda s: math.inf if math.isnan(s) else s),
        peak_memory=max(u.peak_memory for u in updates),
        part_sq_norms=[n for u in updates for n in u.part_sq_norms],
        part_sizes=[s for u in updates for s in u.part_sizes],
        pass_sizes=[world * size for size in slowest.pass_sizes],
        pass_seconds=[float(seconds) for seconds in slowest.pass_seconds],
    )
