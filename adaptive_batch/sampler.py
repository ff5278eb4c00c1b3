"""A batch sampler whose size may change at any draw.

It runs in the main process and only says which samples come next, so its size can change while the workers
live on. Positions are counted in samples of one global order, which every rank walks: rank ``r`` of ``W``
takes the positions ``r, r + W, r + 2W, ...`` of each global batch, an exact partition without padding.
"""

from __future__ import annotations

import copy
import sys
from collections import deque
from collections.abc import Hashable, Iterable, Iterator, Mapping
from itertools import islice
from numbers import Integral
from typing import Any, NamedTuple, Protocol

from torch.utils.data import Sampler

from adaptive_batch.order import get_generator, order_restored, order_state, set_epoch, set_generator
from adaptive_batch.shares import share_sizes

__all__ = ["AdaptiveBatchSampler", "Draw"]


class Draw(NamedTuple):
    """What one drawn batch is.

    Attributes:
        size: samples of the batch over all ranks.
        nominal: the global batch size in force when it was drawn.
        position: samples of this epoch drawn up to and including this batch.
        last: whether it ended the epoch, as far as known: with ``drop_last`` a later resize can still add a
            batch or drop one, and the end of a sampler without a length may only show at the next draw.
        weights: by which the ranks share it, ``None`` for alike.
    """

    size: int
    nominal: int
    position: int
    last: bool
    weights: tuple[int, ...] | None = None


class AdaptiveBatchSampler(Sampler[list[Any]]):
    """Batches of a sampler's indices, of a size that may be set at any time and holds from the next draw on.

    Each epoch hands out every index of the sampler exactly once and in its order, whatever the sizes; with
    ``drop_last`` all but a tail shorter than one batch. (A size that the samples left over do not make a
    batch of gives way to the one before: a resize never ends an epoch.) At a constant size the order and the
    use of random numbers are those of :class:`torch.utils.data.BatchSampler`. On several ranks a tail of
    fewer samples than ranks joins the batch before it (with ``drop_last`` it is dropped like any other).

    Whoever pops ``draws`` says by that what has been consumed, and calls :meth:`end_epoch` when an epoch is
    over. While nobody ever has popped it, a batch counts as consumed once it is delivered; only a loader
    made by :func:`~adaptive_batch.data.make_adaptive` knows which batches its workers still hold, otherwise
    handed out means delivered.

    Args:
        sampler: the global order; yields indices of any kind, a length is not needed.
        batch_size: samples of one batch over all ranks.
        drop_last: drop a tail shorter than one batch.
        rank: which share of each batch to yield.
        world_size: number of shares.

    Attributes:
        draws: a :class:`Draw` for each batch, oldest first, to be popped from the left for each delivered
            batch. The first draw of an epoch clears what an epoch before left behind.
        sample_limit: at most so many samples per epoch, as if the sampler ended there; ``None`` for all.
        own_size: the size at which an epoch's end is left as it is, that of the beginning.
        least_tail: an epoch that was resized does not end in a batch of fewer samples, which some layers cannot take:
            they join the batch before.
        weights: one per rank, the same on all; from the next draw on ranks take samples in proportion to them, at
            least one each. ``None`` is alike.

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
        self.weights: tuple[int, ...] | None = None
        self.batch_size = batch_size
        self.own_size = self.batch_size
        self.least_tail = 1
        self.draws: deque[Draw] = deque()
        self.sample_limit: int | None = None
        self._epoch: Epoch | None = None  # the one that draws and len() speak of
        self._resume: dict[str, Any] | None = None  # a loaded state that the next draw continues
        self._queued = 0  # draws of this epoch that went into the queue, popped or not
        self._delivered = 0  # batches of this epoch that left the loader
        self._popped = False  # somebody consumes `draws`
        self._reports_deliveries = False  # its loader calls `note_delivery`

    @property
    def batch_size(self) -> int:
        """Samples of one batch over all ranks."""
        return self._batch_size

    @batch_size.setter
    def batch_size(self, value: int) -> None:
        self._batch_size = _check_batch_size(value, self.world_size)
        self._tell_size()

    @property
    def local_batch_size(self) -> int:
        """Samples of this rank's share of a full batch."""
        return self.share(self.batch_size, self.weights)

    def share(self, samples: int, weights: tuple[int, ...] | None) -> int:
        """This rank's samples of a batch."""
        if weights is None:
            return len(range(self.rank, samples, self.world_size))
        return share_sizes(samples, weights)[self.rank]

    @property
    def samples(self) -> int | None:
        """Samples of a whole epoch over all ranks; ``None`` if the data has no length."""
        try:
            return len(self.sampler)  # type: ignore[arg-type]
        except (TypeError, NotImplementedError):
            return None

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
        return Epoch(self)

    def __len__(self) -> int:
        """Batches of the epoch as it stands: those drawn and those to come at the current size.

        Raises:
            TypeError: if the sampler has no length.
        """
        total = self._total()
        if total is None:
            raise TypeError(f"Batches of {type(self.sampler).__name__}, which has no len(), have no len() either.")
        batches, samples = self._settled()
        if self._nothing_follows():
            return batches
        left = max(0, total - samples)
        full, tail = divmod(left, self.batch_size)
        if self.drop_last:
            return batches + (full or left // self._promised(left))
        return batches + full + (tail > 0 and (tail >= self._fewest() or full == 0))

    def _nothing_follows(self) -> bool:
        """Whether the end was drawn: with ``drop_last`` what was left over then is gone, whatever the size is now."""
        if self._resume is not None:
            return bool(self._resume["ended"])
        return self._epoch is not None and self._epoch.ended

    def _fewest(self) -> int:
        """Samples of the smallest batch at the end of an epoch, unless the epoch has no more."""
        return max(self.world_size, self.least_tail) if self.least_tail > 1 and self._resized() else self.world_size

    def _resized(self) -> bool:
        runs = self._resume["sizes"] if self._resume is not None else [] if self._epoch is None else self._epoch.sizes
        return self.batch_size != self.own_size or any(nominal != self.own_size for nominal, _ in runs)

    def orphans(self, drawn: int) -> int:
        """Samples that would be left for too small a batch after ``drawn`` ones of an epoch."""
        if self.least_tail == 1 or self.drop_last:
            return 0
        left = (self._total() or 0) - drawn
        return left if 0 < left < self._fewest() else 0

    def set_epoch(self, epoch: int) -> None:
        """Tell the sampler which epoch comes next, if it wants to know."""
        set_epoch(self._source(), epoch)

    def end_epoch(self) -> None:
        """The running epoch is over: the next draw starts another one, and the length is a full epoch's."""
        if self._resume is not None:
            set_generator(self._source(), self._resume["generator"])
            self._resume = None
        self._epoch = None

    def state_dict(self) -> dict[str, Any]:
        """Where the epoch stands in what was consumed; what is in flight will be drawn again in its sizes.

        The random state of the epoch's first draw is part of it: torch's, NumPy's and Python's global ones
        and the sampler's ``generator``. The order of a sampler that draws from elsewhere must follow from
        ``set_epoch``. Random numbers of the rest of the program are the caller's; restore them after
        ``iter(loader)``, which draws a seed for the workers.
        """
        if self._resume is not None:
            return {**self._resume, "batch_size": self.batch_size, "weights": self._listed_weights()}
        state: dict[str, Any] = {
            "batch_size": self.batch_size,
            "weights": self._listed_weights(),
            "consumed": 0,
            "sizes": [],
            "in_flight": [],
            "ended": False,
            "order": None,
            "generator": get_generator(self._source()),
        }
        if self._epoch is not None:
            pending = self._unconsumed()
            state["consumed"] = self.consumed
            state["sizes"] = _without_last(self._epoch.sizes, len(pending))
            coming = copy.deepcopy(self._epoch.coming)
            state["in_flight"] = [[draw.size, draw.nominal] for draw in pending] + coming
            state["ended"] = self._epoch.ended or self._epoch.ends_with_coming
            state["order"] = self._epoch.order
        return state

    def _listed_weights(self) -> list[int] | None:
        return None if self.weights is None else list(self.weights)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from a state, also one of another number of ranks, which then share alike.

        A state inside an epoch takes effect at the next draw; one between epochs puts back the sampler's
        generator at once, as the loader may draw from it before the sampler does.

        Raises:
            ValueError: if the state is incomplete or does not fit this sampler; nothing has changed then.
        """
        has_generator = get_generator(self._source()) is not None
        loaded = _check_state(state, self.world_size, has_generator=has_generator)
        self.batch_size = loaded["batch_size"]
        weights = loaded["weights"]
        self.weights = tuple(weights) if weights is not None and len(weights) == self.world_size else None
        self._epoch = None
        self._resume = loaded if loaded["order"] is not None else None
        self._notice_consumer()
        self._reset_counts()
        if self._resume is None:
            set_generator(self._source(), loaded["generator"])

    def count_popped(self) -> None:
        """Somebody is going to pop ``draws``: from now on nothing else counts as consumed."""
        self._popped = True

    def skip_batches(self, batches: int) -> int:
        """Go on in an epoch of which so many batches of the present size are consumed, in an order of its own.

        Returns:
            The samples that are skipped.
        """
        self.end_epoch()
        total, consumed = self._total(), batches * self.batch_size
        consumed = consumed if total is None else min(consumed, total)
        skipped = {"consumed": consumed, "sizes": [[self.batch_size, batches]], "order": order_state(self._source())}
        self.load_state_dict({**self.state_dict(), **skipped})
        return consumed

    # What an epoch asks; a subclass may answer otherwise

    def open(self) -> BatchSource:
        """Start a pass over the order."""
        return _Indices(self)

    def left(self, epoch: Epoch) -> int | None:
        """How much ``sample_limit`` still allows."""
        return None if self.sample_limit is None else max(0, self.sample_limit - epoch.position)

    def hand_out(self, epoch: Epoch, batch: list[Any], nominal: int) -> list[Any]:
        """This rank's share of a drawn batch."""
        if self._epoch is epoch:  # a pass that another one has overtaken keeps no books
            self._queue(Draw(len(batch), nominal, epoch.position, self._is_last(epoch), self.weights))
        if self.world_size == 1:
            return batch
        if self.weights is None:
            return batch[self.rank :: self.world_size]
        sizes = share_sizes(len(batch), self.weights)
        start = sum(sizes[: self.rank])
        return batch[start : start + sizes[self.rank]]

    def _is_last(self, epoch: Epoch) -> bool:
        if epoch.ended:
            return not epoch.coming
        total = self._total()
        if total is not None:
            left = total - epoch.position
            if left >= self._batch_size:
                return False
            few = left < self._promised(left) if self.drop_last else left < 1
            return few and not epoch.coming
        return self.left(epoch) == 0 or epoch.ends_with_coming

    def _tell_size(self) -> None:
        """For data that has to be told."""

    def _source(self) -> Any:
        """What gives the order."""
        return self.sampler

    def _total(self) -> int | None:
        """Samples of an epoch within the limit."""
        total, limit = self.samples, self.sample_limit
        return total if total is None or limit is None else min(total, limit)

    def _promised(self, left: int) -> int:
        """With ``drop_last`` a size that so many samples do not make a batch of gives way to the one before.

        Otherwise a resize would say of a batch that has gone by that it was the last.
        """
        sizes = self._resume["sizes"] if self._resume is not None else [] if self._epoch is None else self._epoch.sizes
        return sizes[-1][0] if sizes else left + 1

    def _settled(self) -> tuple[int, int]:
        """Batches and samples of the epoch that are settled: drawn, or to be drawn again in a known size."""
        if self._resume is not None:
            batches, samples = count_batches(self._resume["sizes"]), self._resume["consumed"]
            coming = self._resume["in_flight"]
        elif self._epoch is not None:
            batches, samples = self._epoch.batches, self._epoch.position
            coming = self._epoch.coming
        else:
            return 0, 0
        return batches + len(coming), samples + sum(size for size, _ in coming)

    # Who has consumed what

    def _unconsumed(self) -> list[Draw]:
        self._notice_consumer()
        if self._popped:
            return list(self.draws)
        return list(self.draws)[self._delivered :] if self._reports_deliveries else []

    def _notice_consumer(self) -> None:
        self._popped = self._popped or len(self.draws) < self._queued

    def begin(self, epoch: Epoch) -> dict[str, Any] | None:
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
        self._queued = self._delivered = 0

    def _queue(self, draw: Draw) -> None:
        self.draws.append(draw)
        self._queued += 1

    def note_delivery(self, data: Any) -> Any:
        """A batch leaves the loader; returns what the loop gets."""
        self._delivered += 1
        return data

    def note_drawn(self, epoch: Epoch) -> None:
        """No batch is left to draw in ``epoch``."""
        if self._epoch is epoch:
            self._notice_consumer()
            self._mark_last()
            if not self._popped and not self._reports_deliveries:
                self.end_epoch()

    def note_delivered(self) -> None:
        """No batch is left to deliver in the running epoch."""
        if self._epoch is not None:
            self._notice_consumer()
            self._mark_last()
            if not self._popped:
                self.end_epoch()

    def _mark_last(self) -> None:
        if self.draws:
            self.draws[-1] = self.draws[-1]._replace(last=True)


class BatchSource(Protocol):
    """One pass over the order, batch by batch."""

    @property
    def coming(self) -> list[list[int]]:
        """``[size, nominal]`` of the batches that come next and are settled already."""
        ...

    @property
    def exhausted(self) -> bool:
        """Whether nothing follows what is settled, as far as somebody had to look."""
        ...

    def take(self, batch_size: int, limit: int | None) -> tuple[list[Any], int]:
        """The next global batch and the size that was in force for it; an empty one at the end."""
        ...

    def skip(self, state: Mapping[str, Any], batch_size: int) -> None:
        """Go to where a state says."""
        ...


class Epoch(Iterator[list[Any]]):
    """One pass over the order; it starts at its first draw."""

    def __init__(self, owner: AdaptiveBatchSampler) -> None:
        self.position = 0
        self.batches = 0
        self.sizes: list[list[int]] = []  # runs of [nominal, batches]
        self.order: dict[str, Any] | None = None  # what the order follows from
        self.resumed: dict[str, Any] | None = None  # the state that it continues
        self.source: BatchSource | None = None
        self.ended = False  # nothing follows what is settled
        self._owner = owner
        self._stopped = False

    @property
    def coming(self) -> list[list[int]]:
        """``[size, nominal]`` of the batches that come next and are settled already."""
        return [] if self.source is None else self.source.coming

    @property
    def ends_with_coming(self) -> bool:
        """Whether nothing follows what is settled, as far as known."""
        return self.source is not None and self.source.exhausted

    def __next__(self) -> list[Any]:
        if self._stopped:
            raise StopIteration
        owner = self._owner
        source = self.source or self._start()
        batch: list[Any] = []
        nominal = owner.batch_size
        if self.ended and not self.coming and isinstance(source, _Indices):
            source.look_for_the_end()
        else:
            batch, nominal = source.take(owner.batch_size, owner.left(self))
        if not batch:
            self.ended = self._stopped = True
            owner.note_drawn(self)
            raise StopIteration
        if len(batch) < owner.world_size:
            raise ValueError(
                f"A batch of {len(batch)} samples cannot be shared by {owner.world_size} ranks; use fewer"
                " ranks or drop_last=True."
            )
        self._count(len(batch), nominal)
        return owner.hand_out(self, batch, nominal)

    def _start(self) -> BatchSource:
        owner = self._owner
        state = owner.begin(self)
        if state is None:
            self.order = order_state(owner._source())
            self.source = owner.open()
            return self.source
        self.resumed = state
        self.order = state["order"]
        self.position = state["consumed"]
        self.sizes = copy.deepcopy(state["sizes"])
        self.batches = count_batches(self.sizes)
        self.ended = state["ended"]
        with order_restored(owner._source(), state["order"]):
            self.source = owner.open()
            self.source.skip(state, owner.batch_size)
        return self.source

    def _count(self, samples: int, nominal: int) -> None:
        self.position += samples
        self.batches += 1
        if self.sizes and self.sizes[-1][0] == nominal:
            self.sizes[-1][1] += 1
        else:
            self.sizes.append([nominal, 1])


class _Indices:
    """The indices of a sampler, in its order."""

    def __init__(self, owner: AdaptiveBatchSampler) -> None:
        self._coming: list[list[int]] = []
        self._before: int = sys.maxsize  # the size before, which with drop_last a larger one gives way to at the end
        self._owner = owner
        self._indices = iter(owner.sampler)
        self._ahead: deque[Any] = deque()
        self._empty = False
        self._taken = 0

    @property
    def coming(self) -> list[list[int]]:
        return self._coming

    @property
    def exhausted(self) -> bool:
        return self._empty and not self._ahead

    def take(self, batch_size: int, limit: int | None) -> tuple[list[Any], int]:
        if self._coming:
            size, nominal = self._coming.pop(0)
        else:
            size, nominal = batch_size + self._owner.orphans(self._taken + batch_size), batch_size
        batch = self._take(max(size, self._owner.world_size), limit)
        if not batch and self._before < nominal:
            nominal = self._before
            batch = self._take(nominal, limit)
        self._before = nominal
        self._taken += len(batch)
        return batch, nominal

    def _take(self, size: int, limit: int | None) -> list[Any]:
        # One rank never looks ahead: a sampler may draw random numbers for it, or be exhausted too early.
        drop_last, world_size = self._owner.drop_last, self._owner.world_size
        if world_size == 1 and limit is None and not (drop_last or self._ahead or self._empty):
            batch = list(islice(self._indices, size))  # the usual case, without a detour
            self._empty = len(batch) < size
            return batch
        fewest = ahead = 0 if drop_last or world_size == 1 else world_size
        if self._owner.samples == self._taken + size:
            ahead = 0  # one rank would not look past the end either, where torch's samplers draw once more
        wanted = size + ahead if limit is None else min(size + ahead, limit)
        self._fill(wanted)
        available = min(len(self._ahead), wanted)
        if available < size and drop_last:
            return []
        if available - size < fewest:
            size = available
        return [self._ahead.popleft() for _ in range(min(size, available))]

    def skip(self, state: Mapping[str, Any], batch_size: int) -> None:
        self._taken = samples = state["consumed"]
        self._before = state["sizes"][-1][0] if state["sizes"] else self._before
        self._coming = copy.deepcopy(state["in_flight"])
        self._fill(samples + 1)  # one more, since generators draw their random numbers with the first index
        for _ in range(min(samples, len(self._ahead))):
            self._ahead.popleft()

    def look_for_the_end(self) -> None:
        """As was done before a state was saved: torch's samplers draw once more there."""
        self._fill(sys.maxsize)

    def _fill(self, count: int) -> None:
        missing = count - len(self._ahead)
        if missing > 0 and not self._empty:
            self._ahead.extend(islice(self._indices, missing))
            self._empty = len(self._ahead) < count


def count_batches(sizes: Iterable[Iterable[int]]) -> int:
    """Batches in runs of ``[nominal, batches]``."""
    return sum(batches for _, batches in sizes)


def _without_last(sizes: list[list[int]], batches: int) -> list[list[int]]:
    """The runs of [nominal, batches] without the last so many batches."""
    kept = []
    left = count_batches(sizes) - batches
    for nominal, run in sizes:
        if left > 0:
            kept.append([nominal, min(run, left)])
        left -= run
    return kept


def _check_batch_size(value: object, world_size: int) -> int:
    if not isinstance(value, Integral) or isinstance(value, bool) or value < 1:
        raise ValueError(f"batch_size={value!r} is not a whole number of samples; give an int of at least 1.")
    if value < world_size:
        raise ValueError(f"batch_size={value} leaves some of {world_size} ranks without a sample; make it larger.")
    return int(value)


def _check_state(state: Mapping[str, Any], world_size: int, *, has_generator: bool) -> dict[str, Any]:
    missing = {"batch_size", "weights", "consumed", "sizes", "in_flight", "ended", "order", "generator"} - set(state)
    if missing:
        raise ValueError(f"The sampler's state lacks {sorted(missing)}; load what its state_dict() returned.")
    _check_batch_size(state["batch_size"], world_size)
    order = state["order"]
    if order is not None and set(order) != {"torch", "numpy", "python", "generator", "epoch"}:
        raise ValueError(f"The sampler's state has an order of {sorted(order)}; load what its state_dict() returned.")
    weights = [] if state["weights"] is None else state["weights"]
    if not isinstance(weights, list) or not all(isinstance(n, int) and n > 0 for n in weights):
        raise ValueError(
            f"The sampler's state has weights={weights!r}; it must be one positive number per rank, or None."
        )
    pairs = [*state["sizes"], *state["in_flight"]]
    if not all(len(pair) == 2 and all(isinstance(n, int) and n > 0 for n in pair) for pair in pairs):
        raise ValueError(f"The sampler's state has sizes {pairs!r} that are not pairs of positive numbers.")
    if not isinstance(state["consumed"], int) or state["consumed"] < 0:
        raise ValueError(f"The sampler's state has consumed={state['consumed']!r}; it must be a number of samples.")
    if (state["generator"] is not None) != has_generator:
        raise ValueError(
            "The sampler's state and the sampler differ in whether there is a generator of its own; build it"
            " as in the run that saved the state."
        )
    return copy.deepcopy(dict(state))
