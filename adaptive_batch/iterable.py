"""Iterable data sets: asking them for so many samples at a time, and learning how many came.

The true size travels with each batch from the worker to the sampler: a worker that is out of samples swallows
its requests, so batches cannot be matched with requests by order.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, ClassVar, NamedTuple

import numpy as np
import torch
from torch import Tensor

from adaptive_batch.sampler import AdaptiveBatchSampler, BatchSource, Draw, Epoch

__all__ = ["CountingCollate", "OwnBatches", "Requests", "SharedBatchSize", "TaggingCollate", "count_samples"]


class SharedBatchSize:
    """The batch size that a data set reads which makes its batches itself, in whatever process it runs.

    Give it to an ``IterableDataset`` as its attribute ``batch_size``, read ``int(self.batch_size)`` for every
    batch, and give the ``DataLoader`` a ``batch_size=None``. It is kept in shared memory, so the workers see
    a new size from their next batch on.

    Args:
        batch_size: samples of one batch to begin with, on this rank.

    Attributes:
        initial: the size that it was made with, which every adaptive loader starts with.

    Raises:
        ValueError: for a size below 1.
    """

    def __init__(self, batch_size: int) -> None:
        if isinstance(batch_size, bool) or not isinstance(batch_size, int) or batch_size < 1:
            raise ValueError(f"SharedBatchSize({batch_size!r}) is no batch size; give an int of at least 1.")
        self.initial = batch_size
        self._sizes: Tensor = torch.tensor([batch_size, batch_size])  # of this rank, of all
        self._sizes.share_memory_()  # type: ignore[no-untyped-call]

    def __index__(self) -> int:
        return int(self._sizes[0])

    def __int__(self) -> int:
        return int(self._sizes[0])

    def __repr__(self) -> str:
        return f"SharedBatchSize({int(self)})"

    @property
    def over_all_ranks(self) -> int:
        """Samples of one batch over all ranks."""
        return int(self._sizes[1])

    def set(self, local: int, over_all_ranks: int) -> None:
        """Change the size; done by the loader's batch sampler."""
        self._sizes.copy_(torch.tensor([local, over_all_ranks]))


class Requests(AdaptiveBatchSampler):
    """Asks an iterable data set for so many samples at a time.

    It has no length: how many batches there are depends on what the workers' shares hold. Its position is
    the data set's own matter, so only the size is saved.

    Args:
        requests: an endless sampler.
        batch_size: samples of one batch over all ranks.
        drop_last: drop the short batches of workers that ran out.
        length: samples of an epoch over all ranks, if the data set says.
        rank: which share of each batch is asked for here.
        world_size: number of shares.
    """

    def __init__(
        self,
        requests: Iterable[Any],
        batch_size: int,
        drop_last: bool = False,
        *,
        length: int | None = None,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        super().__init__(requests, batch_size, drop_last, rank=rank, world_size=world_size)
        self._length = length
        self._arrived = 0  # samples of this epoch that left the loader

    @property
    def samples(self) -> int | None:
        """Samples of a whole epoch over all ranks, as far as the data set says."""
        return self._length

    def __len__(self) -> int:
        raise TypeError("A resizable loader of an IterableDataset has no len().")

    def state_dict(self) -> dict[str, Any]:
        """Only the size."""
        return {**super().state_dict(), "consumed": 0, "sizes": [], "in_flight": [], "order": None}

    def hand_out(self, epoch: Epoch, batch: list[Any], nominal: int) -> list[Any]:
        """This rank's share of a request."""
        return Request(batch[self.rank :: self.world_size], nominal)

    def note_delivery(self, data: Any) -> Any:
        """A batch leaves the loader; take its tag off."""
        if not isinstance(data, Tagged):
            return super().note_delivery(data)
        # What other ranks got is not known here: their shares count as they were asked for.
        size = data.size + data.nominal - data.asked
        self._arrived += size
        self._queue(Draw(size, data.nominal, self._arrived, last=False))
        return super().note_delivery(data.batch)

    def note_drawn(self, epoch: Epoch) -> None:
        """Requests end when batches do."""

    def _reset_counts(self) -> None:
        super()._reset_counts()
        self._arrived = 0


class OwnBatches(Requests):
    """Tells a data set that makes its batches itself how large they shall be."""

    def __init__(self, size: SharedBatchSize, *, length: int | None, rank: int, world_size: int) -> None:
        self._shared = size
        super().__init__((), size.initial * world_size, length=length, rank=rank, world_size=world_size)

    def open(self) -> BatchSource:
        """Ask for batches without end."""
        return _Endless()

    def hand_out(self, epoch: Epoch, batch: list[Any], nominal: int) -> list[Any]:
        """What the data set does not look at."""
        return batch

    def _tell_size(self) -> None:
        self._shared.set(self.local_batch_size, self.batch_size)


class _Endless:
    exhausted = False
    coming: ClassVar[list[list[int]]] = []

    def take(self, batch_size: int, limit: int | None) -> tuple[list[Any], int]:
        return [None] * batch_size, batch_size

    def skip(self, state: Mapping[str, Any], batch_size: int) -> None:
        """A data set that makes its own batches begins where it likes."""


class Request(list[Any]):
    """How many samples an iterable data set is asked for; going through it leaves word in ``latest``.

    The fetcher goes through a request in the very process that collates its samples right afterwards.
    """

    latest: ClassVar[Request]

    def __init__(self, items: Iterable[Any] = (), nominal: int = 0) -> None:
        super().__init__(items)
        self.nominal = nominal

    def __iter__(self) -> Iterator[Any]:
        Request.latest = self
        return super().__iter__()


class Tagged(NamedTuple):
    """A batch with its true size, on its way from the worker to the sampler."""

    batch: Any
    size: int
    asked: int
    nominal: int


class TaggingCollate:
    """Collates the samples of a request and tags the batch with how many there were."""

    def __init__(self, collate_fn: Callable[[list[Any]], Any]) -> None:
        self.collate_fn = collate_fn

    def __call__(self, samples: list[Any]) -> Tagged:
        """One batch."""
        request = Request.latest
        return Tagged(self.collate_fn(samples), len(samples), len(request), request.nominal)


class CountingCollate:
    """Converts a batch that the data set made and tags it with how many samples it has."""

    def __init__(self, collate_fn: Callable[[Any], Any], size: SharedBatchSize) -> None:
        self.collate_fn = collate_fn
        self.size = size

    def __call__(self, batch: Any) -> Tagged:
        """One batch."""
        return Tagged(self.collate_fn(batch), count_samples(batch), int(self.size), self.size.over_all_ranks)


def count_samples(batch: Any) -> int:
    """Samples of a batch as the first dimension of the first array in it says; of other items their number.

    Raises:
        TypeError: if there is no array and no sequence in it.
    """
    count = _leading_dimension(batch)
    if count is None and isinstance(batch, Sequence) and not isinstance(batch, (str, bytes)):
        count = len(batch)
    if count is None:
        raise TypeError(
            f"A batch of type {type(batch).__name__} does not show how many samples it has; make it a tensor,"
            " or a mapping, sequence or dataclass that has one."
        )
    return count


def _leading_dimension(value: Any) -> int | None:
    if isinstance(value, (Tensor, np.ndarray)):
        return len(value) if value.ndim else None
    if isinstance(value, Mapping):
        entries: Iterable[Any] = value.values()
    elif dataclasses.is_dataclass(value):
        entries = (getattr(value, field.name) for field in dataclasses.fields(value))
    elif isinstance(value, Sequence) and not isinstance(value, (str, bytes)):
        entries = value
    else:
        return None
    return next((count for count in map(_leading_dimension, entries) if count is not None), None)
