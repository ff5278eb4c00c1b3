"""Batch samplers of the user's own that can be resized."""

from __future__ import annotations

import copy
import warnings
from collections import deque
from collections.abc import Callable, Mapping
from typing import Any

from adaptive_batch.sampler import AdaptiveBatchSampler, BatchSource, Epoch

__all__ = ["UserBatchSampler", "is_resizable"]

_LOOK_AHEAD = 1  # whether another batch follows the one that is handed out
_STALE = 3  # batches in a row that say that a size was not read; a tail or two can look alike


def is_resizable(batch_sampler: Any) -> bool:
    """Whether it has what resizing needs: an ``int`` attribute ``batch_size`` that can be set."""
    size = getattr(batch_sampler, "batch_size", None)
    if not isinstance(size, int) or isinstance(size, bool):
        return False
    try:
        copy.copy(batch_sampler).batch_size = size
    except (AttributeError, TypeError, ValueError):
        return False
    return True


class UserBatchSampler(AdaptiveBatchSampler):
    """A batch sampler of the user's own, with a settable ``batch_size`` that it reads anew for every batch.

    It yields the global batches. What ``batch_size`` counts is its own matter (samples, tokens, nodes), and
    how many indices a batch has too. While its size is the one that it came with, its own ``len()`` holds;
    after that the end is found by drawing one batch ahead, and ``len()`` only says how far it is about. It
    resumes by drawing again, so its order must follow from the random state. On several ranks only rank 0 draws.

    Args:
        batch_sampler: the user's; a shallow copy of it is resized.
        order: what stands in for its ``sampler``, ``None`` to leave that as it is.
        rank: which share of each batch to yield.
        world_size: number of shares.

    Attributes:
        sample_limit: at most so many units of ``batch_size`` per epoch, in whole batches.
        on_length_change: called when a draw has shown more of where the epoch ends.
        send: gives rank 0's batch to all ranks; while it is ``None``, each draws by itself.
    """

    def __init__(self, batch_sampler: Any, *, order: Any, rank: int, world_size: int) -> None:
        self.batch_sampler = copy.copy(batch_sampler)  # resizing must not reach the user's own
        if order is not None:
            self.batch_sampler.sampler = order
        super().__init__(
            getattr(self.batch_sampler, "sampler", self.batch_sampler),
            batch_sampler.batch_size * world_size,
            bool(getattr(batch_sampler, "drop_last", False)),
            rank=rank,
            world_size=world_size,
        )
        self.own_size = self.batch_size
        self.on_length_change: Callable[[], None] | None = None
        self.send: Callable[[Any], Any] | None = None
        self._full_at = 0  # the newest size that a batch had exactly
        self._stale = 0  # batches in a row that had it still, after the size was changed

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "on_length_change": None}  # a loader may be pickled, who listens stays here

    @property
    def samples(self) -> int | None:
        """An epoch in units of ``batch_size``, supposing full batches; ``None`` if there is no ``len()``."""
        try:
            return self._own_len(self.own_size) * self.own_size
        except TypeError:
            return None

    def __len__(self) -> int:
        """Batches of the epoch as it stands, see above.

        Raises:
            TypeError: if the batch sampler has no length.
        """
        runs, coming, ended = self._standing()
        nominals = {nominal for nominal, _ in runs} | {nominal for _, nominal in coming} | {self.batch_size}
        plain = nominals == {self.own_size}
        if plain or not (runs or coming or ended):
            return self._within_limit(self._own_len(self.batch_size))
        drawn = sum(nominal * batches for nominal, batches in runs)
        batches = sum(batches for _, batches in runs)
        for _, nominal in coming:
            if self.sample_limit is not None and drawn >= self.sample_limit:
                return batches
            batches, drawn = batches + 1, drawn + nominal
        if ended or (self.sample_limit is not None and drawn >= self.sample_limit):
            return batches
        about = self._within_limit(self._own_len(self.batch_size)) - drawn // self.batch_size
        return batches + max(1, about)

    def open(self) -> BatchSource:
        """Start a pass over the user's batches."""
        return _UserBatches(self)

    def left(self, epoch: Epoch) -> int | None:
        """How much ``sample_limit`` still allows."""
        if self.sample_limit is None:
            return None
        return max(0, self.sample_limit - sum(nominal * batches for nominal, batches in epoch.sizes))

    def draw_from(self, batches: Any, batch_size: int) -> list[Any]:
        """The next of the user's batches at that size, an empty one at the end."""
        self.batch_sampler.batch_size = batch_size
        batch = list(next(batches, ())) if self.send is None or self.rank == 0 else []
        batch = batch if self.send is None else list(self.send(batch))
        self._notice_stale_size(len(batch), batch_size)
        return batch

    def _notice_stale_size(self, samples: int, batch_size: int) -> None:
        """Say so once if the user's sampler goes on with the size that it read before."""
        if samples == batch_size:
            self._full_at = samples
        self._stale = self._stale + 1 if samples == self._full_at != batch_size else 0
        if self._stale == _STALE:
            warnings.warn(
                f"The batch sampler {type(self.batch_sampler).__name__} still yields batches of {samples} after its"
                f" batch_size was set to {batch_size}; let it read batch_size anew for every batch, or sizes change"
                " only where it reads it.",
                stacklevel=2,
            )

    def hand_out(self, epoch: Epoch, batch: list[Any], nominal: int) -> list[Any]:
        """This rank's share of a drawn batch."""
        share = super().hand_out(epoch, batch, nominal)
        if self._epoch is epoch and self.on_length_change is not None:
            self.on_length_change()
        return share

    def _is_last(self, epoch: Epoch) -> bool:
        try:
            return epoch.batches >= len(self)
        except TypeError:
            return self.left(epoch) == 0 or epoch.ends_with_coming

    def _source(self) -> Any:
        return self.batch_sampler

    def _own_len(self, batch_size: int) -> int:
        self.batch_sampler.batch_size = batch_size
        return len(self.batch_sampler)

    def _within_limit(self, batches: int) -> int:
        limit = self.sample_limit
        return batches if limit is None else min(batches, -(-limit // self.batch_size))

    def _standing(self) -> tuple[list[list[int]], list[list[int]], bool]:
        """Runs of ``[nominal, batches]`` drawn, ``[size, nominal]`` to come, and whether that is all."""
        if self._resume is not None:
            return self._resume["sizes"], self._resume["in_flight"], self._resume["ended"]
        epoch = self._epoch
        if epoch is None or epoch.source is None:
            return [], [], False
        assert isinstance(epoch.source, _UserBatches)
        epoch.source.look_ahead(self.batch_size)
        return epoch.sizes, epoch.coming, epoch.ends_with_coming


class _UserBatches:
    """One pass over a user's batches."""

    def __init__(self, owner: UserBatchSampler) -> None:
        self._owner = owner
        self._batches = iter(owner.batch_sampler)
        self._ahead: deque[tuple[list[Any], int]] = deque()
        self._resized = False
        self._empty = False

    @property
    def coming(self) -> list[list[int]]:
        return [[len(batch), nominal] for batch, nominal in self._ahead]

    @property
    def exhausted(self) -> bool:
        return self._empty

    def take(self, batch_size: int, limit: int | None) -> tuple[list[Any], int]:
        if limit == 0:
            return [], batch_size
        if not self._ahead:
            self._draw(batch_size)
        batch, nominal = self._ahead.popleft() if self._ahead else ([], batch_size)
        self._resized = self._resized or nominal != self._owner.own_size
        self.look_ahead(batch_size)
        return batch, nominal

    def skip(self, state: Mapping[str, Any], batch_size: int) -> None:
        for nominal, batches in state["sizes"]:
            self._resized = self._resized or nominal != self._owner.own_size
            for _ in range(batches):
                self._owner.draw_from(self._batches, nominal)
        # At least one, since generators draw their random numbers with the first index.
        for nominal in [nominal for _, nominal in state["in_flight"]] or [batch_size]:
            self._draw(nominal)

    def look_ahead(self, batch_size: int) -> None:
        """Once the user's own length holds no longer, know of the end before it comes."""
        self._resized = self._resized or batch_size != self._owner.own_size
        while self._resized and len(self._ahead) < _LOOK_AHEAD and not self._empty:
            self._draw(batch_size)

    def _draw(self, batch_size: int) -> None:
        batch = self._owner.draw_from(self._batches, batch_size)
        if batch:
            self._ahead.append((batch, batch_size))
        else:
            self._empty = True
