"""Lightning's own bookkeeping, kept right while the number of batches in an epoch changes."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from adaptive_batch.callbacks import _lightning
from adaptive_batch.clocks import PlainEpoch
from adaptive_batch.data import AdaptiveBatchSampler

if TYPE_CHECKING:
    from pytorch_lightning import Trainer

__all__ = ["EpochBooks", "plain_epoch"]


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
        return PlainEpoch(None, None, batch_size, accumulate)
    local, size = math.ceil(data_samples / world_size), batch_size // world_size
    batches = local // size if drop_last else math.ceil(local / size)
    batches = min(batches, limit) if isinstance(limit, int) else int(batches * limit)
    return PlainEpoch(min(data_samples, batches * batch_size), batches, batch_size, accumulate)


class EpochBooks:
    """Keeps the loop's length, its validation points and the progress bar in step with the sampler.

    Samples, not batches, are the unit: a validation interval that is a fraction of an epoch stays at the
    sample counts that it has at the reference size.
    """

    def __init__(
        self, trainer: Trainer, plain: PlainEpoch, sampler: AdaptiveBatchSampler, limit: int | float
    ) -> None:
        self.plain = plain
        self._trainer = trainer
        self._sampler = sampler
        self._limit = limit
        self._validated = False
        if isinstance(limit, float) and limit < 1.0 and plain.samples is not None:
            sampler.sample_limit = plain.samples  # a fraction of an epoch is so many samples

    def start_epoch(self) -> None:
        """Before the epoch's first batch is fetched."""
        self._validated = False
        self.sync()

    def sync(self) -> None:
        """After the size has changed, before the next batch is fetched."""
        try:
            batches = len(self._sampler)
        except TypeError:
            return  # data without a length: Lightning finds the end by itself
        if isinstance(self._limit, int):
            batches = min(batches, self._limit)
        _lightning.set_epoch_length(self._trainer, batches)

    def end_batch(self, before: int, position: int, *, last: bool) -> None:
        """Decide whether validation follows the batch that took the epoch from ``before`` to ``position`` samples."""
        trainer = self._trainer
        if self.plain.batches is None or _lightning.validates_by_time(trainer):
            return
        if isinstance(trainer.val_check_interval, int):
            self._end_batch_by_count(last)
        else:
            _lightning.validate_now(trainer, self._crosses(before, position, last))

    def _crosses(self, before: int, position: int, last: bool) -> bool:
        assert self.plain.batches is not None and self.plain.samples is not None
        every = max(1, int(self.plain.batches * self._trainer.val_check_interval))
        points = self.plain.batches // every
        if last and every * points == self.plain.batches:
            return True  # the last point is the epoch's end, wherever that comes to lie
        step = every * self.plain.batch_size
        return min(position // step, points) > min(before // step, points)

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
