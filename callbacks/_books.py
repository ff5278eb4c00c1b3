"""Lightning's own bookkeeping, kept right while the number of batches in an epoch changes."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from adaptive_batch.callbacks import _lightning
from adaptive_batch.clocks import PlainEpoch
from adaptive_batch.data import AdaptiveBatchSampler

if TYPE_CHECKING:
    from pytorch_lightning import Trainer

__all__ = ["EpochBooks", "LoaderLimits", "plain_epoch"]


def plain_epoch(
    data_samples: int | None,
    batch_size: int,
    *,
    drop_last: bool,
    world_size: int,
    accumulate: int,
    limit: int | float,
) -> PlainEpoch:
    """What Lightning would make of an epoch, ``limit`` being its ``limit_train_batches``."""
    if data_samples is None:
        return PlainEpoch(None, limit if isinstance(limit, int) else None, batch_size, accumulate)
    local, size = math.ceil(data_samples / world_size), batch_size // world_size
    batches = local // size if drop_last else math.ceil(local / size)
    batches = min(batches, limit) if isinstance(limit, int) else int(batches * limit)
    return PlainEpoch(min(data_samples, batches * batch_size), batches, batch_size, accumulate)


class EpochBooks:
    """Keeps the loop's length, its validation points and the progress bar in step with the sampler.

    Samples, not batches, are the unit: a validation interval that is a fraction of an epoch stays at the
    sample counts that it has at the reference size. Where ``limit_train_batches`` is a number of batches the
    epoch is that many batches long, and the fraction is one of batches.

    Args:
        trainer: whose loop this is.
        plain: the epoch at the reference size.
        sampler: what draws the batches.
        limit: ``limit_train_batches`` as the user set it.
        whole: batches of the epoch at the reference size without a limit; ``None`` if the data has no length.
    """

    def __init__(
        self,
        trainer: Trainer,
        plain: PlainEpoch,
        sampler: AdaptiveBatchSampler,
        limit: int | float,
        *,
        whole: int | None,
    ) -> None:
        self.plain = plain
        self._trainer = trainer
        self._sampler = sampler
        self._limit = limit
        self._whole = plain.batches if isinstance(limit, float) else whole
        self._validated = False
        self._running = False  # inside an epoch
        self._held_back: list[Any] = []  # the interval between validations, while none may follow
        if isinstance(limit, float) and limit < 1.0 and plain.samples is not None:
            sampler.sample_limit = plain.samples  # a fraction of an epoch is so many samples

    @property
    def has_length(self) -> bool:
        """Whether the sampler can say how many batches there are."""
        return self._length() is not None

    @property
    def resized(self) -> bool:
        """Whether batches are drawn at another size than the reference."""
        return self._sampler.batch_size != self.plain.batch_size

    def announce(self) -> None:
        """Before training: an answer for those who ask how many steps there will be.

        The plain epoch's, in whose steps schedules advance; what an interrupted epoch happens to have left must not
        change a schedule that is built anew.
        """
        if self.plain.batches is not None:
            _lightning.set_epoch_length(self._trainer, self.plain.batches)

    def start_epoch(self) -> None:
        """Before the epoch's first batch is fetched."""
        self._validated = self._running = False
        self._release_validation()
        self.sync()

    def go_on(self, state: Mapping[str, Any]) -> None:
        """In the middle of an epoch, after what followed its last batch before the checkpoint."""
        self._validated, self._running = bool(state["validated"]), True
        trainer = self._trainer
        if not _lightning.validates_by_time(trainer):
            # Lightning would take a validation point that has passed for one that it has yet to deal with.
            self._held_back, trainer.val_check_batch = [trainer.val_check_batch], _lightning.NEVER
        self.sync()

    def state_dict(self) -> dict[str, Any]:
        """Whether the epoch was validated where an interval in batches asked for it."""
        return {"validated": self._validated}

    def sync(self) -> None:
        """After the size has changed, before the next batch is fetched."""
        batches = self._length()
        if batches is not None:
            batches = min(batches, self._limit) if isinstance(self._limit, int) else batches
            _lightning.set_epoch_length(self._trainer, batches)
            return
        _lightning.set_most_batches(self._trainer, self._limit if isinstance(self._limit, int) else math.inf)
        if self.resized:
            _lightning.lift_limits(self._trainer)
            if self._running and not _lightning.epoch_ends(self._trainer):
                _lightning.start_prefetching(self._trainer)

    def start_batch(self) -> None:
        """A limit in batches ends the epoch also where Lightning looks for the end of the data."""
        self._running = True
        self._release_validation()
        limit = self._limit if isinstance(self._limit, int) else None
        if _lightning.batches_started(self._trainer) == limit and not self.has_length:
            _lightning.mark_last_batch(self._trainer)

    def end_batch(self, before: int, position: int, *, last: bool) -> None:
        """Decide whether validation follows the batch that took the epoch from ``before`` to ``position``."""
        trainer = self._trainer
        if _lightning.validates_by_time(trainer):
            return
        if isinstance(trainer.val_check_interval, int):
            self._end_batch_by_count(last)
        elif self.plain.batches is not None:
            _lightning.validate_now(trainer, self._crosses(before, position, last))

    def _release_validation(self) -> None:
        if self._held_back:
            self._trainer.val_check_batch = self._held_back.pop()

    def _length(self) -> int | None:
        try:
            return len(self._sampler)
        except TypeError:
            return None

    def _crosses(self, before: int, position: int, last: bool) -> bool:
        assert self.plain.batches is not None
        every = max(1, int(self.plain.batches * self._trainer.val_check_interval))
        points = self.plain.batches // every
        whole = every * points == self.plain.batches  # the last point is the end, wherever that comes to lie
        started = _lightning.batches_started(self._trainer)
        done, now = self._progress(started - 1, before), self._progress(started, position)
        if last:
            return whole or done // every < points  # data that ends early leaves no validation out
        points -= whole
        return min(now // every, points) > min(done // every, points)

    def _progress(self, batches: int, position: int) -> int:
        """How far the epoch is, in batches of the reference size."""
        assert self.plain.batches is not None
        reference = position // self.plain.batch_size
        by_samples = reference * self.plain.batches // self._whole if self._whole else 0
        by_batches = batches * self.plain.batches // self._limit if isinstance(self._limit, int) else 0
        return max(by_samples, by_batches)

    def _end_batch_by_count(self, last: bool) -> None:
        """An interval in batches counts batches; one longer than a grown epoch validates at its end."""
        trainer = self._trainer
        if trainer.check_val_every_n_epoch is None:
            return
        trainer.val_check_batch = trainer.val_check_interval
        due = _lightning.batches_started(trainer) % trainer.val_check_interval == 0
        if last and not self._validated and not due:
            _lightning.validate_now(trainer, True)
        self._validated = self._validated or due


class LoaderLimits:
    """Takes the limits that speak of a loader's length out of Lightning's hands while it sets the loader up.

    Lightning counts them in batches of the loader as it stands, which may have grown since the user set them.

    Args:
        trainer: whose ``limit_train_batches`` and ``val_check_interval`` they are.
    """

    def __init__(self, trainer: Trainer) -> None:
        self.limit: int | float = trainer.limit_train_batches
        self._trainer = trainer
        self._by_time = _lightning.validates_by_time(trainer)
        self._interval: int | float = 1.0 if self._by_time else trainer.val_check_interval

    def set_up(self, original: Callable[[], None]) -> None:
        """Lightning's set-up of the training data, without limits that it would apply wrongly."""
        trainer = self._trainer
        if isinstance(self.limit, float) and 0 < self.limit < 1:
            trainer.limit_train_batches = 1.0
        if not self._by_time:
            trainer.val_check_interval = 1 if isinstance(self._interval, int) else 1.0
        try:
            original()
        finally:
            trainer.limit_train_batches = self.limit
            if not self._by_time:
                trainer.val_check_interval = self._interval

    def restore_interval(self) -> None:
        """After a set-up: the interval in batches that Lightning has not seen."""
        if not self._by_time and isinstance(self._interval, int):
            self._trainer.val_check_batch = self._interval

    def look_for_the_end(self) -> None:
        """Let Lightning find the end of data without a length also under a limit in batches."""
        self._trainer.limit_train_batches = 1.0

    def check(self, plain: PlainEpoch, *, has_length: bool) -> None:
        """Refuse what cannot be kept.

        Args:
            plain: the epoch at the reference size.
            has_length: whether the loader says how many batches there are.

        Raises:
            ValueError: for a limit or interval that does not fit the data.
        """
        fraction = isinstance(self.limit, float) and 0 < self.limit < 1
        if fraction and not has_length:
            raise ValueError(
                f"limit_train_batches={self.limit} is a fraction of an epoch, but the training loader has no"
                " length; give a number of batches."
            )
        if fraction and plain.batches == 0:
            raise ValueError(
                f"limit_train_batches={self.limit} is less than one batch of an epoch; make it larger, or"
                " give a number of batches."
            )
        if not self._by_time:
            self._check_interval(plain)

    def _check_interval(self, plain: PlainEpoch) -> None:
        trainer, interval = self._trainer, self._interval
        if not isinstance(interval, int):
            if interval < 1 and plain.batches is None:
                raise ValueError(
                    f"val_check_interval={interval} is a fraction of an epoch, but the training data has no"
                    " length; give a number of batches or a time."
                )
            return
        per_epoch = trainer.check_val_every_n_epoch is not None and trainer.limit_val_batches > 0
        if per_epoch and plain.batches is not None and interval > plain.batches:
            raise ValueError(
                f"val_check_interval={interval} is more than the {plain.batches} training batches of an"
                " epoch; make it smaller, or set check_val_every_n_epoch=None to count batches over epochs."
            )
