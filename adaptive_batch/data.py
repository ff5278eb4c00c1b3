"""Resizable loaders: how an adaptive batch sampler gets into a DataLoader, whatever the loader is."""

from __future__ import annotations

import copy
import functools
import warnings
from collections.abc import Iterator, Mapping
from typing import Any, TypeVar

from torch.utils.data import BatchSampler, DataLoader, DistributedSampler, IterableDataset, Sampler
from torch.utils.data.dataloader import _BaseDataLoaderIter

from adaptive_batch.iterable import CountingCollate, OwnBatches, Requests, SharedBatchSize, TaggingCollate
from adaptive_batch.sampler import AdaptiveBatchSampler, Draw
from adaptive_batch.user_batches import UserBatchSampler, is_resizable

__all__ = ["AdaptiveBatchSampler", "Draw", "SharedBatchSize", "make_adaptive"]

T = TypeVar("T")


def make_adaptive(loader: DataLoader[T], *, rank: int = 0, world_size: int = 1) -> DataLoader[T]:
    """The same loader, resizable through ``.batch_sampler.batch_size``, the global size.

    A shallow copy in which only the batch sampler is exchanged: nothing is built anew, so subclasses with
    arguments of their own work, and the given loader stays as it is. The size starts at the loader's own
    times ``world_size``; the copy's ``batch_size`` is the size of this rank's share as it stands. On
    several ranks a ``DistributedSampler`` is replaced by the order that it shares out.

    A batch sampler of the user's own can be resized if it has a settable ``int`` attribute ``batch_size``
    that it reads anew for every batch; on several ranks it must yield the global batches. With
    ``batch_size=None`` a batch sampler may stand in the place of the sampler.

    An iterable data set is asked for so many samples at a time; the true size of each batch travels with it
    from the worker to ``.batch_sampler.draws``, and the loader has no length. On several ranks the other
    ranks' shares count there as they were asked for. One that makes its batches itself (``batch_size=None``)
    is resized if its attribute ``batch_size`` is a :class:`SharedBatchSize`, which then is the loader's.

    Args:
        loader: any loader that batches; returned as it is if it is adaptive already.
        rank: which share of each global batch this loader yields.
        world_size: number of shares.

    Raises:
        TypeError: if it is not a ``DataLoader``.
        ValueError: if it does not batch, or its batch sampler has no settable ``batch_size``.
    """
    if not isinstance(loader, DataLoader):
        raise TypeError(f"{type(loader).__name__} is not a torch DataLoader; wrap the data in one.")
    if isinstance(loader, _AdaptiveLoader):
        return loader
    adaptive = copy.copy(loader)
    adaptive._iterator = None
    sampler = _sampler_of(adaptive, rank, world_size)
    sampler._reports_deliveries = True
    adaptive.__dict__["batch_sampler"] = sampler  # DataLoader.__setattr__ refuses the normal way
    adaptive.__dict__["_collates_samples"] = loader.batch_sampler is not None
    if not isinstance(sampler, Requests) and not getattr(loader, "in_order", True):
        warnings.warn(
            "in_order=False is switched off: batches of changing sizes have to arrive in the order in which"
            " they were drawn.",
            stacklevel=2,
        )
        adaptive.in_order = True
    adaptive.__class__ = _mixed(_AdaptiveLoader, type(loader))  # type: ignore[arg-type]
    return adaptive


def _sampler_of(adaptive: DataLoader[Any], rank: int, world_size: int) -> AdaptiveBatchSampler:
    """What resizes this loader; for an iterable data set the batches are tagged from here on."""
    given: Any = adaptive.batch_sampler
    if isinstance(adaptive.dataset, IterableDataset):
        length = _sized(adaptive.dataset, world_size)
        if given is not None:
            adaptive.collate_fn = TaggingCollate(adaptive.collate_fn)
            size = given.batch_size * world_size
            return Requests(given.sampler, size, given.drop_last, length=length, rank=rank, world_size=world_size)
        shared = getattr(adaptive.dataset, "batch_size", None)
        if isinstance(shared, SharedBatchSize):
            adaptive.collate_fn = CountingCollate(adaptive.collate_fn, shared)
            return OwnBatches(shared, length=length, rank=rank, world_size=world_size)
        raise ValueError(_UNBATCHED)
    if given is not None:
        return _adaptive_sampler(given, rank, world_size)
    if isinstance(adaptive.sampler, AdaptiveBatchSampler) or is_resizable(adaptive.sampler):
        return _adaptive_sampler(adaptive.sampler, rank, world_size)  # the data set is given whole batches
    raise ValueError(_UNBATCHED)


_UNBATCHED = (
    "A DataLoader with batch_size=None leaves batching to the data set and cannot be resized; give it a"
    " batch_size, or let its IterableDataset read the size from an attribute batch_size that is a"
    " SharedBatchSize."
)


def _sized(dataset: Any, world_size: int) -> int | None:
    """Samples of all ranks' iterable data sets, if each says how many it has."""
    try:
        return len(dataset) * world_size
    except (TypeError, NotImplementedError):
        return None


def _adaptive_sampler(batch_sampler: Any, rank: int, world_size: int) -> AdaptiveBatchSampler:
    if isinstance(batch_sampler, AdaptiveBatchSampler):
        return batch_sampler
    ranks = {"rank": rank, "world_size": world_size}
    order = _global_order(getattr(batch_sampler, "sampler", None), world_size)
    if _batches_as_torch_does(batch_sampler):
        size = batch_sampler.batch_size * world_size
        return AdaptiveBatchSampler(order, size, batch_sampler.drop_last, **ranks)
    if not is_resizable(batch_sampler):
        raise ValueError(
            f"The batch sampler {type(batch_sampler).__name__} cannot be resized; give it a settable int"
            " attribute batch_size that it reads for every batch, or give the DataLoader a sampler and a"
            " batch_size instead."
        )
    return UserBatchSampler(batch_sampler, order=order, **ranks)


def _batches_as_torch_does(batch_sampler: Any) -> bool:
    """Whether it is torch's own, or the one of torchdata's ``StatefulDataLoader``, which differs in its state alone."""
    kind = type(batch_sampler)
    plain = kind.__iter__ is BatchSampler.__iter__ or kind.__module__ == "torchdata.stateful_dataloader.sampler"
    return isinstance(batch_sampler, BatchSampler) and plain


def _global_order(sampler: Any, world_size: int) -> Any:
    return _GlobalOrder(sampler) if world_size > 1 and isinstance(sampler, DistributedSampler) else sampler


class _GlobalOrder(Sampler[Any]):
    """The epoch's permutation of a DistributedSampler, neither padded nor cut nor shared out."""

    def __init__(self, sampler: DistributedSampler[Any]) -> None:
        self.sampler = sampler

    def __iter__(self) -> Iterator[Any]:
        alone = copy.copy(self.sampler)
        alone.num_replicas, alone.rank = 1, 0
        alone.num_samples = alone.total_size = len(self)
        return iter(alone)

    def __len__(self) -> int:
        return len(self.sampler.dataset)  # type: ignore[arg-type]

    def set_epoch(self, epoch: int) -> None:
        self.sampler.set_epoch(epoch)


class _AdaptiveLoader(DataLoader[Any]):
    """What an adaptive loader has beyond the user's class; mixed into it by :func:`make_adaptive`."""

    batch_sampler: AdaptiveBatchSampler

    @property
    def batch_size(self) -> int | None:  # type: ignore[override]
        """Samples of a full batch of this loader; ``None`` where the user gave a batch sampler."""
        return None if self.__dict__["batch_size"] is None else self.batch_sampler.local_batch_size

    @property
    def _auto_collation(self) -> bool:
        return bool(self.__dict__["_collates_samples"])

    @property
    def _index_sampler(self) -> AdaptiveBatchSampler:
        return self.batch_sampler

    def _get_iterator(self) -> _BaseDataLoaderIter:
        iterator = super()._get_iterator()
        iterator.__class__ = _mixed(_DeliveringIterator, type(iterator))  # type: ignore[arg-type]
        return iterator

    def __len__(self) -> int:
        if isinstance(self.batch_sampler, Requests):
            return len(self.batch_sampler)
        return super().__len__()

    def state_dict(self) -> dict[str, Any]:
        """Nothing: where an epoch stands is in :meth:`AdaptiveBatchSampler.state_dict`."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Having this method says that the loader can be resumed."""

    def __reduce__(self) -> tuple[Any, ...]:
        return _unpickle_loader, (type(self).__mro__[2], self.__dict__)


class _DeliveringIterator(_BaseDataLoaderIter):
    """Reports each batch that leaves a loader's iterator; the innermost place, so that nobody meets a tag."""

    _index_sampler: AdaptiveBatchSampler

    def _next_data(self) -> Any:
        try:
            data: Any = super()._next_data()
        except StopIteration:
            self._index_sampler.note_delivered()
            raise
        return self._index_sampler.note_delivery(data)


@functools.cache
def _mixed(mixin: type[Any], cls: type[Any]) -> type[Any]:
    return type(cls.__name__, (mixin, cls), {"__module__": cls.__module__, "__doc__": cls.__doc__})


def _unpickle_loader(cls: type, attributes: dict[str, Any]) -> Any:
    loader: Any = object.__new__(_mixed(_AdaptiveLoader, cls))
    loader.__dict__.update(attributes)
    return loader
