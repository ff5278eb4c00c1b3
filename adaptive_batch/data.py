"""Resizable loaders: a batch sampler whose size may change at any draw, and how to put it into a DataLoader.

The batch sampler runs in the main process and only says which samples come next, so its size can change
while the workers live on. Positions are counted in samples of one global order, which every rank walks:
rank ``r`` of ``W`` takes the positions ``r, r + W, r + 2W, ...`` of each global batch, an exact partition
without padding.
"""

from __future__ import annotations

import copy
import functools
import random
import warnings
from collections import deque
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from itertools import islice
from numbers import Integral
from typing import Any, ClassVar, NamedTuple, TypeVar, cast

import numpy as np
import torch
from torch.utils.data import BatchSampler, DataLoader, DistributedSampler, IterableDataset, Sampler
from torch.utils.data.dataloader import _BaseDataLoaderIter

__all__ = ["AdaptiveBatchSampler", "Draw", "make_adaptive"]

T = TypeVar("T")


class Draw(NamedTuple):
    """What one drawn batch is.

    Attributes:
        size: samples of the batch over all ranks.
        nominal: the global batch size in force when it was drawn.
        position: samples of this epoch drawn up to and including this batch.
        last: whether it ended the epoch, as far as known: with ``drop_last`` a later resize can still add a
            batch or drop one, and the end of a sampler without a length may only show at the next draw.
    """

    size: int
    nominal: int
    position: int
    last: bool


class AdaptiveBatchSampler(Sampler[list[Any]]):
    """Batches of a sampler's indices, of a size that may be set at any time and holds from the next draw on.

    Each epoch hands out every index of the sampler exactly once and in its order, whatever the sizes; with
    ``drop_last`` all but a tail shorter than one batch. At a constant size the order and the use of random
    numbers are those of :class:`torch.utils.data.BatchSampler`. On several ranks a tail of fewer samples than
    ranks joins the batch before it (with ``drop_last`` it is dropped like any other).

    Whoever pops ``draws`` says by that what has been consumed, and calls :meth:`end_epoch` when an epoch is
    over. While nobody ever has popped it, a batch counts as consumed once it is delivered; only a loader
    made by :func:`make_adaptive` knows which batches its workers still hold, otherwise handed out means
    delivered.

    Args:
        sampler: the global order; yields indices of any kind, a length is not needed.
        batch_size: samples of one batch over all ranks.
        drop_last: drop a tail shorter than one batch.
        rank: which share of each batch to yield.
        world_size: number of shares.

    Attributes:
        draws: a :class:`Draw` for each batch, oldest first, to be popped from the left for each delivered
        batch.
            The first draw of an epoch clears what an epoch before left behind.
        sample_limit: at most so many samples per epoch, as if the sampler ended there; ``None`` for all.

    Raises:
        ValueError: for a size below 1 or below ``world_size``, and for a rank outside of the world.
    """

    def __init__(
        self,
        sampler: Iterable[Hashable],
        batch_size: int,
        drop_last: bool = False,
        *,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        if not 0 <= rank < world_size:
            raise ValueError(f"rank={rank} is not one of world_size={world_size} ranks; count ranks from 0.")
        self.sampler = sampler
        self.drop_last = drop_last
        self.rank = rank
        self.world_size = world_size
        self.batch_size = batch_size
        self.draws: deque[Draw] = deque()
        self.sample_limit: int | None = None
        self._epoch: _Epoch | None = None  # the one that draws and len() speak of
        self._resume: dict[str, Any] | None = None  # a loaded state that the next draw continues
        self._queued = 0  # draws of this epoch that went into the queue, popped or not
        self._delivered = 0  # batches of this epoch that left the loader
        self._arrived = 0  # samples of this epoch that left the loader, for iterable data sets
        self._popped = False  # somebody consumes `draws`
        self._in_loader = False  # an adaptive loader reports deliveries
        self._tagged = False  # sizes travel with the batches: the data set is iterable

    @property
    def batch_size(self) -> int:
        """Samples of one batch over all ranks."""
        return self._batch_size

    @batch_size.setter
    def batch_size(self, value: int) -> None:
        self._batch_size = _check_batch_size(value, self.world_size)

    @property
    def local_batch_size(self) -> int:
        """Samples of this rank's share of a full batch."""
        return len(range(self.rank, self.batch_size, self.world_size))

    @property
    def consumed(self) -> int:
        """Samples consumed in the running epoch, over all ranks."""
        if self._resume is not None:
            return int(self._resume["consumed"])
        if self._epoch is None:
            return 0
        return self._epoch.position - sum(draw.size for draw in self._unconsumed())

    def __iter__(self) -> Iterator[list[Any]]:
        # Not a generator function, and nothing happens before the first draw: torch's multi-worker iterator
        # calls iter() twice, and the sampler must draw its random numbers when torch's BatchSampler would.
        return _Epoch(self)

    def __len__(self) -> int:
        """Batches of the epoch as it stands: those drawn and those to come at the current size.

        Raises:
            TypeError: if the sampler has no length.
        """
        total = self._total()
        if total is None:
            raise TypeError(
                f"Batches of {type(self.sampler).__name__}, which has no len(), have no len() either."
            )
        batches, samples = self._settled()
        full, tail = divmod(max(0, total - samples), self.batch_size)
        own_batch = tail > 0 and not self.drop_last and (tail >= self.world_size or full == 0)
        return batches + full + own_batch

    def set_epoch(self, epoch: int) -> None:
        """Tell the sampler which epoch comes next, if it wants to know."""
        _set_epoch(self._source(), epoch)

    def end_epoch(self) -> None:
        """The running epoch is over: the next draw starts another one, and the length is a full epoch's."""
        if self._resume is not None:
            _set_generator(self._source(), self._resume["generator"])
            self._resume = None
        self._epoch = None

    def state_dict(self) -> dict[str, Any]:
        """Where the epoch stands in what was consumed; what is in flight will be drawn again in its sizes.

        The random state of the epoch's first draw is part of it: torch's, NumPy's and Python's global ones
        and the sampler's ``generator``. The order of a sampler that draws from elsewhere must follow from
        ``set_epoch``. Random numbers of the rest of the program are the caller's; restore them after
        ``iter(loader)``, which draws a seed for the workers. The position in an iterable data set is the
        data set's own matter, only the size is saved.
        """
        if self._resume is not None:
            return {**self._resume, "batch_size": self.batch_size}
        state: dict[str, Any] = {
            "batch_size": self.batch_size,
            "consumed": 0,
            "sizes": [],
            "in_flight": [],
            "order": None,
            "generator": _get_generator(self._source()),
        }
        if self._epoch is not None and not self._tagged:
            pending = self._unconsumed()
            state["consumed"] = self.consumed
            state["sizes"] = _without_last(self._epoch.sizes, len(pending))
            state["in_flight"] = [[draw.size, draw.nominal] for draw in [*pending, *self._epoch.replay]]
            state["order"] = self._epoch.order
        return state

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from a state, also one of another number of ranks.

        A state inside an epoch takes effect at the next draw; one between epochs puts back the sampler's
        generator at once, as the loader may draw from it before the sampler does.

        Raises:
            ValueError: if the state is incomplete or does not fit this sampler; nothing has changed then.
        """
        loaded = _check_state(
            state, self.world_size, has_generator=_get_generator(self._source()) is not None
        )
        self.batch_size = loaded["batch_size"]
        self._epoch = None
        self._resume = loaded if loaded["order"] is not None else None
        self._notice_consumer()
        self._reset_counts()
        if self._resume is None:
            _set_generator(self._source(), loaded["generator"])

    def _source(self) -> Any:
        """What gives the order."""
        return self.sampler

    def _open(self) -> _Indices | _UserBatches:
        return _Indices(self)

    def _total(self) -> int | None:
        """Samples of a whole epoch."""
        try:
            total = len(self.sampler)  # type: ignore[arg-type]
        except (TypeError, NotImplementedError):
            return None
        return total if self.sample_limit is None else min(total, self.sample_limit)

    def _settled(self) -> tuple[int, int]:
        """Batches and samples of the epoch that are settled: drawn, or to be drawn again in a known size."""
        if self._resume is not None:
            batches, samples = _count(self._resume["sizes"]), self._resume["consumed"]
            replay = [size for size, _ in self._resume["in_flight"]]
        elif self._epoch is not None:
            batches, samples = self._epoch.batches, self._epoch.position
            replay = [draw.size for draw in self._epoch.replay]
        else:
            return 0, 0
        return batches + len(replay), samples + sum(replay)

    def _unconsumed(self) -> list[Draw]:
        self._notice_consumer()
        if self._popped:
            return list(self.draws)
        return list(self.draws)[self._delivered :] if self._in_loader else []

    def _notice_consumer(self) -> None:
        self._popped = self._popped or len(self.draws) < self._queued

    def _begin(self, epoch: _Epoch) -> dict[str, Any] | None:
        """Make this epoch the running one; returns the state that it has to continue."""
        resume, self._resume = self._resume, None
        if self._epoch is not None and len(self._unconsumed()) == self._queued:
            resume = self._epoch.resumed  # its iterator was made anew before anything was consumed
        self._notice_consumer()
        self._reset_counts()
        self._epoch = epoch
        return resume

    def _reset_counts(self) -> None:
        self.draws.clear()
        self._queued = self._delivered = self._arrived = 0

    def _queue(self, draw: Draw) -> None:
        self.draws.append(draw)
        self._queued += 1

    def _deliver(self, data: Any) -> Any:
        """Take note of a batch that leaves the loader, and its tag off."""
        self._delivered += 1
        if isinstance(data, _Tagged):
            # What other ranks got is not known here: their shares count as they were asked for.
            size = data.size + data.nominal - data.asked
            self._arrived += size
            self._queue(Draw(size, data.nominal, self._arrived, last=False))
            return data.batch
        return data

    def _note_end(self, *, delivered: bool) -> None:
        """No batch is left to draw, or to deliver."""
        if self._epoch is None:
            return
        self._notice_consumer()
        if self.draws and (delivered or not self._tagged):
            self.draws[-1] = self.draws[-1]._replace(last=True)
        if not self._popped and (delivered or not self._in_loader):
            self.end_epoch()


class _CustomBatchSampler(AdaptiveBatchSampler):
    """A batch sampler of the user's own, with a settable ``batch_size`` that it reads anew for every batch.

    It yields the global batches; ``len()`` after a resize inside an epoch supposes full batches and a
    ``sampler`` attribute with a length. It resumes by drawing again, so its order must follow from the random
    state.
    """

    def __init__(self, batch_sampler: Any, *, rank: int, world_size: int) -> None:
        self.batch_sampler = copy.copy(batch_sampler)  # resizing must not reach the user's own
        if hasattr(batch_sampler, "sampler"):
            self.batch_sampler.sampler = _global_order(batch_sampler.sampler, world_size)
        super().__init__(
            getattr(self.batch_sampler, "sampler", self.batch_sampler),
            batch_sampler.batch_size * world_size,
            bool(getattr(batch_sampler, "drop_last", False)),
            rank=rank,
            world_size=world_size,
        )

    def __len__(self) -> int:
        sizes = [] if self._epoch is None else self._epoch.sizes
        if (
            self._resume is not None
            or self.sample_limit is not None
            or any(n != self.batch_size for n, _ in sizes)
        ):
            return super().__len__()
        self.batch_sampler.batch_size = self.batch_size
        return len(self.batch_sampler)

    def _source(self) -> Any:
        return self.batch_sampler

    def _open(self) -> _UserBatches:
        return _UserBatches(self.batch_sampler)

    def _total(self) -> int | None:
        return None if self.sampler is self.batch_sampler else super()._total()


class _Epoch(Iterator[list[Any]]):
    """One pass over the order; it starts at its first draw."""

    def __init__(self, owner: AdaptiveBatchSampler) -> None:
        self.owner = owner
        self.position = 0
        self.batches = 0
        self.sizes: list[list[int]] = []  # runs of [nominal, batches]
        self.order: dict[str, Any] | None = None  # what the order follows from
        self.replay: deque[Draw] = deque()  # to be drawn again in these sizes
        self.resumed: dict[str, Any] | None = None  # the state that it continues
        self._indices: _Indices | _UserBatches | None = None
        self._ended = False

    def __next__(self) -> list[Any]:
        owner = self.owner
        indices = self._indices or self._start()
        batch: list[Any] = []
        if not self._ended:
            again = self.replay.popleft() if self.replay else None
            nominal = again.nominal if again else owner.batch_size
            size = max(again.size if again else nominal, owner.world_size)
            batch = indices.take(size, nominal, self._limit())
        if not batch:
            if not self._ended and owner._epoch is self:
                owner._note_end(delivered=False)
            self._ended = True
            raise StopIteration
        if len(batch) < owner.world_size:
            raise ValueError(
                f"A batch of {len(batch)} samples cannot be shared by {owner.world_size} ranks; use fewer"
                " ranks or drop_last=True."
            )
        return self._hand_out(batch, nominal)

    def _start(self) -> _Indices | _UserBatches:
        owner = self.owner
        state = owner._begin(self)
        if state is None:
            self.order = _order_state(owner._source())
            self._indices = owner._open()
            return self._indices
        self.resumed = state
        self.order = state["order"]
        self.position = state["consumed"]
        self.sizes = copy.deepcopy(state["sizes"])
        self.batches = _count(self.sizes)
        self.replay = deque(Draw(size, nominal, 0, False) for size, nominal in state["in_flight"])
        then = self.replay[0].nominal if self.replay else owner.batch_size
        with _order_restored(owner._source(), state["order"]):
            self._indices = owner._open()
            self._indices.skip(self.position, self.sizes, then)
        return self._indices

    def _limit(self) -> int | None:
        limit = self.owner.sample_limit
        return None if limit is None else max(0, limit - self.position)

    def _hand_out(self, batch: list[Any], nominal: int) -> list[Any]:
        owner = self.owner
        self.position += len(batch)
        self.batches += 1
        if self.sizes and self.sizes[-1][0] == nominal:
            self.sizes[-1][1] += 1
        else:
            self.sizes.append([nominal, 1])
        share = batch[owner.rank :: owner.world_size]
        if owner._tagged:
            return _Request(share, nominal)
        if owner._epoch is self:  # a pass that another one has overtaken keeps no books
            total = owner._total()
            left = None if total is None else total - self.position
            too_few = owner.batch_size if owner.drop_last else 1
            known = left is not None and left < too_few and not self.replay
            ended = known or self._limit() == 0 or bool(self._indices and self._indices.exhausted)
            owner._queue(Draw(len(batch), nominal, self.position, ended))
        return share


class _Indices:
    """The indices of a sampler, in its order."""

    def __init__(self, owner: AdaptiveBatchSampler) -> None:
        self._owner = owner
        self._indices = iter(owner.sampler)
        self._ahead: deque[Any] = deque()
        self._empty = False

    @property
    def exhausted(self) -> bool:
        """Whether nothing is left, as far as somebody had to look."""
        return self._empty and not self._ahead

    def take(self, size: int, nominal: int, limit: int | None) -> list[Any]:
        # One rank never looks ahead: a sampler may draw random numbers for it, or be exhausted too early.
        drop_last, world_size = self._owner.drop_last, self._owner.world_size
        ahead = 0 if drop_last or world_size == 1 else world_size
        wanted = size + ahead if limit is None else min(size + ahead, limit)
        self._fill(wanted)
        available = min(len(self._ahead), wanted)
        if available < size and drop_last:
            return []
        if available - size < ahead:
            size = available
        return [self._ahead.popleft() for _ in range(min(size, available))]

    def skip(self, samples: int, sizes: list[list[int]], then: int) -> None:
        self._fill(samples + 1)  # one more, since generators draw their random numbers with the first index
        for _ in range(min(samples, len(self._ahead))):
            self._ahead.popleft()

    def _fill(self, count: int) -> None:
        missing = count - len(self._ahead)
        if missing > 0 and not self._empty:
            self._ahead.extend(islice(self._indices, missing))
            self._empty = len(self._ahead) < count


class _UserBatches:
    """The batches of a user's batch sampler."""

    exhausted = False

    def __init__(self, batch_sampler: Any) -> None:
        self._batch_sampler = batch_sampler
        self._batches = iter(batch_sampler)
        self._ahead: list[Any] | None = None

    def take(self, size: int, nominal: int, limit: int | None) -> list[Any]:
        if limit == 0:
            return []
        batch, self._ahead = self._draw(nominal) if self._ahead is None else self._ahead, None
        return batch[:limit]

    def skip(self, samples: int, sizes: list[list[int]], then: int) -> None:
        for nominal, batches in sizes:
            for _ in range(batches):
                self._draw(nominal)
        self._ahead = self._draw(then)

    def _draw(self, nominal: int) -> list[Any]:
        self._batch_sampler.batch_size = nominal
        return list(next(self._batches, ()))


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


def make_adaptive(loader: DataLoader[T], *, rank: int = 0, world_size: int = 1) -> DataLoader[T]:
    """The same loader, resizable through ``.batch_sampler.batch_size``, the global size.

    A shallow copy in which only the batch sampler is exchanged: nothing is built anew, so subclasses with
    arguments of their own work, and the given loader stays as it is. The size starts at the loader's own
    times ``world_size``; the copy's ``batch_size`` is the size of this rank's share as it stands. On
    several ranks a ``DistributedSampler`` is replaced by the order that it shares out.

    A batch sampler of the user's own can be resized if it has a settable ``int`` attribute ``batch_size``
    that it reads anew for every batch; on several ranks it must yield the global batches.

    An iterable data set is asked for so many samples at a time; the true size of each batch travels with it
    from the worker to ``.batch_sampler.draws``, and the loader has no length. On several ranks the other
    ranks' shares count there as they were asked for.

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
    if loader.batch_sampler is None:
        raise ValueError(
            "A DataLoader with batch_size=None leaves batching to the data set and cannot be resized; let it"
            " batch samples by giving it a batch_size."
        )
    sampler = _adaptive_sampler(loader.batch_sampler, rank, world_size)
    sampler._in_loader = True
    adaptive = copy.copy(loader)
    adaptive._iterator = None
    adaptive.__dict__["batch_sampler"] = sampler  # DataLoader.__setattr__ refuses the normal way
    if isinstance(loader.dataset, IterableDataset):
        sampler._tagged = True
        adaptive.collate_fn = _TaggingCollate(loader.collate_fn)
    elif not getattr(loader, "in_order", True):
        warnings.warn(
            "in_order=False is switched off: batches of changing sizes have to arrive in the order in which"
            " they were drawn.",
            stacklevel=2,
        )
        adaptive.in_order = True
    adaptive.__class__ = _mixed(_AdaptiveLoader, type(loader))  # type: ignore[arg-type]
    return adaptive


def _adaptive_sampler(batch_sampler: Any, rank: int, world_size: int) -> AdaptiveBatchSampler:
    if isinstance(batch_sampler, AdaptiveBatchSampler):
        return batch_sampler
    if isinstance(batch_sampler, BatchSampler) and type(batch_sampler).__iter__ is BatchSampler.__iter__:
        return AdaptiveBatchSampler(
            _global_order(batch_sampler.sampler, world_size),
            batch_sampler.batch_size * world_size,
            batch_sampler.drop_last,
            rank=rank,
            world_size=world_size,
        )
    if not _is_resizable(batch_sampler):
        raise ValueError(
            f"The batch sampler {type(batch_sampler).__name__} cannot be resized; give it a settable int"
            " attribute batch_size that it reads for every batch, or give the DataLoader a sampler and a"
            " batch_size instead."
        )
    return _CustomBatchSampler(batch_sampler, rank=rank, world_size=world_size)


def _global_order(sampler: Any, world_size: int) -> Any:
    return _GlobalOrder(sampler) if world_size > 1 and isinstance(sampler, DistributedSampler) else sampler


def _is_resizable(batch_sampler: Any) -> bool:
    size = getattr(batch_sampler, "batch_size", None)
    if not isinstance(size, int) or isinstance(size, bool):
        return False
    try:
        copy.copy(batch_sampler).batch_size = size
    except (AttributeError, TypeError, ValueError):
        return False
    return True


class _AdaptiveLoader(DataLoader[Any]):
    """What an adaptive loader has beyond the user's class; mixed into it by :func:`make_adaptive`."""

    batch_sampler: AdaptiveBatchSampler

    @property
    def batch_size(self) -> int | None:  # type: ignore[override]
        """Samples of a full batch of this loader; ``None`` where the user gave a batch sampler."""
        return None if self.__dict__["batch_size"] is None else self.batch_sampler.local_batch_size

    def _get_iterator(self) -> _BaseDataLoaderIter:
        iterator = super()._get_iterator()
        iterator.__class__ = _mixed(_DeliveringIterator, type(iterator))  # type: ignore[arg-type]
        return iterator

    def __len__(self) -> int:
        if self.batch_sampler._tagged:
            raise TypeError("A resizable loader of an IterableDataset has no len().")
        return super().__len__()

    def __reduce__(self) -> tuple[Any, ...]:
        return _unpickle_loader, (type(self).__mro__[2], self.__dict__)


class _DeliveringIterator(_BaseDataLoaderIter):
    """Reports each batch that leaves a loader's iterator; the innermost place, so that nobody meets a tag."""

    _index_sampler: AdaptiveBatchSampler

    def _next_data(self) -> Any:
        try:
            data: Any = super()._next_data()
        except StopIteration:
            self._index_sampler._note_end(delivered=True)
            raise
        return self._index_sampler._deliver(data)


@functools.cache
def _mixed(mixin: type[Any], cls: type[Any]) -> type[Any]:
    return type(cls.__name__, (mixin, cls), {"__module__": cls.__module__, "__doc__": cls.__doc__})


def _unpickle_loader(cls: type, attributes: dict[str, Any]) -> Any:
    loader: Any = object.__new__(_mixed(_AdaptiveLoader, cls))
    loader.__dict__.update(attributes)
    return loader


class _Request(list[Any]):
    """How many samples an iterable data set is asked for; going through it leaves word in ``latest``.

    A worker that is out of samples swallows its requests, so batches cannot be matched with them by order.
    But the fetcher goes through a request in the very process that collates its samples right afterwards.
    """

    latest: ClassVar[_Request]

    def __init__(self, items: Iterable[Any] = (), nominal: int = 0) -> None:
        super().__init__(items)
        self.nominal = nominal

    def __iter__(self) -> Iterator[Any]:
        _Request.latest = self
        return super().__iter__()


class _Tagged(NamedTuple):
    batch: Any
    size: int
    asked: int
    nominal: int


class _TaggingCollate:
    def __init__(self, collate_fn: Callable[[list[Any]], Any]) -> None:
        self.collate_fn = collate_fn

    def __call__(self, samples: list[Any]) -> _Tagged:
        request = _Request.latest
        return _Tagged(self.collate_fn(samples), len(samples), len(request), request.nominal)


def _check_batch_size(value: object, world_size: int) -> int:
    if not isinstance(value, Integral) or isinstance(value, bool) or value < 1:
        raise ValueError(f"batch_size={value!r} is not a whole number of samples; give an int of at least 1.")
    if value < world_size:
        raise ValueError(
            f"batch_size={value} leaves some of {world_size} ranks without a sample; make it larger."
        )
    return int(value)


def _check_state(state: Mapping[str, Any], world_size: int, *, has_generator: bool) -> dict[str, Any]:
    missing = {"batch_size", "consumed", "sizes", "in_flight", "order", "generator"} - set(state)
    if missing:
        raise ValueError(f"The sampler's state lacks {sorted(missing)}; load what its state_dict() returned.")
    _check_batch_size(state["batch_size"], world_size)
    order = state["order"]
    if order is not None and set(order) != {"torch", "numpy", "python", "generator", "epoch"}:
        raise ValueError(
            f"The sampler's state has an order of {sorted(order)}; load what its state_dict() returned."
        )
    pairs = [*state["sizes"], *state["in_flight"]]
    if not all(len(pair) == 2 and all(isinstance(n, int) and n > 0 for n in pair) for pair in pairs):
        raise ValueError(f"The sampler's state has sizes {pairs!r} that are not pairs of positive numbers.")
    if not isinstance(state["consumed"], int) or state["consumed"] < 0:
        raise ValueError(
            f"The sampler's state has consumed={state['consumed']!r}; it must be a number of samples."
        )
    if (state["generator"] is not None) != has_generator:
        raise ValueError(
            "The sampler's state and the sampler differ in whether there is a generator of its own; build it"
            " as in the run that saved the state."
        )
    return copy.deepcopy(dict(state))


def _count(sizes: list[list[int]]) -> int:
    return sum(batches for _, batches in sizes)


def _without_last(sizes: list[list[int]], batches: int) -> list[list[int]]:
    """The runs of [nominal, batches] without the last so many batches."""
    kept = []
    left = _count(sizes) - batches
    for nominal, run in sizes:
        if left > 0:
            kept.append([nominal, min(run, left)])
        left -= run
    return kept


def _chain(source: Any) -> Iterator[Any]:
    """A sampler and the samplers that it wraps."""
    while source is not None:
        yield source
        source = getattr(source, "sampler", None)


def _find_generator(source: Any) -> torch.Generator | None:
    found = (getattr(sampler, "generator", None) for sampler in _chain(source))
    return next((generator for generator in found if isinstance(generator, torch.Generator)), None)


def _get_generator(source: Any) -> torch.Tensor | None:
    generator = _find_generator(source)
    return None if generator is None else generator.get_state()


def _set_generator(source: Any, state: torch.Tensor | None) -> None:
    generator = _find_generator(source)
    if generator is not None and state is not None:
        generator.set_state(state)


def _set_epoch(source: Any, epoch: int) -> None:
    for sampler in _chain(source):
        if callable(getattr(sampler, "set_epoch", None)):
            sampler.set_epoch(epoch)
            return


def _global_random_state() -> dict[str, Any]:
    _, keys, *rest = cast("tuple[Any, ...]", np.random.get_state())
    version, internal, gauss = random.getstate()
    return {
        "torch": torch.get_rng_state(),
        "numpy": [keys.tolist(), *rest],
        "python": [version, list(internal), gauss],
    }


def _set_global_random_state(state: dict[str, Any]) -> None:
    torch.set_rng_state(state["torch"])
    np.random.set_state(("MT19937", *state["numpy"]))
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))


def _order_state(source: Any) -> dict[str, Any]:
    """All that the order of the next pass follows from."""
    epochs = (getattr(sampler, "epoch", None) for sampler in _chain(source))
    return {
        **_global_random_state(),
        "generator": _get_generator(source),
        "epoch": next((epoch for epoch in epochs if isinstance(epoch, int)), None),
    }


@contextmanager
def _order_restored(source: Any, order: dict[str, Any]) -> Iterator[None]:
    """Draw as the interrupted epoch did; the global random states are given back as they were."""
    before = _global_random_state()
    _set_global_random_state(order)
    _set_generator(source, order["generator"])
    if order["epoch"] is not None:
        _set_epoch(source, order["epoch"])
    try:
        yield
    finally:
        _set_global_random_state(before)
