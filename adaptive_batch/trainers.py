"""Three trainers in plain PyTorch: one loop, three ways to choose the batches."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from adaptive_batch.clocks import PlainEpoch, SampleClock
from adaptive_batch.controller import BatchSizeController
from adaptive_batch.data import AdaptiveBatchSampler, Draw, make_adaptive
from adaptive_batch.history import Change, History, Update
from adaptive_batch.lr_scaling import scaled_lr
from adaptive_batch.measurement import Measurement, read_numbers
from adaptive_batch.micro_batching import balanced_sizes, split_batch
from adaptive_batch.noise.part_norms import PartNorms, grad_sq_norm
from adaptive_batch.noise.schedule import measures_noise
from adaptive_batch.timing import Elapsed, mark

__all__ = ["FixedBatchTrainer", "MiniBatchTrainer", "SGDTrainer"]

Data = Dataset[Any] | DataLoader[Any] | tuple[Any, Any]
LossFn = Callable[[Any, Any], Tensor]

DEFAULT_BATCH_SIZE = 32
_READ_EVERY = 10
_PURPOSEFUL_PARTS = 2


class _Trainer:
    """The loop: ``theta <- theta - eta * g_B`` over the batches of a plan, for any optimizer's step."""

    def __init__(
        self,
        model: nn.Module,
        loss_fn: LossFn,
        optimizer: Optimizer,
        *,
        scheduler: LRScheduler | None = None,
        seed: int | None = None,
        progress: bool = True,
        history_size: int = 10_000,
    ) -> None:
        self.model = model
        self.loss_fn = loss_fn
        self.optimizer = optimizer
        self.scheduler = scheduler
        self.history = History(history_size)
        self._generator = None if seed is None else torch.Generator().manual_seed(seed)
        self._progress = progress
        self._epoch = 0
        self._samples = 0
        self._updates = 0
        self._unread: list[tuple[dict[str, Any], Tensor]] = []

    # The plan: what the subclasses choose.

    def _batch_size(self, own: int | None, samples: int | None) -> int:
        """Samples per update, given a loader's own size and the number of samples."""
        raise NotImplementedError

    _shuffle = True
    _controller: BatchSizeController | None = None
    _micro_batch_size: int | None = None

    # The loop.

    def fit(self, data: Data, epochs: int = 1) -> History:
        """Train for ``epochs`` more epochs.

        Args:
            data: a ``Dataset`` of ``(x, y)`` pairs, a ``DataLoader`` of ``(x, y)`` batches, or a pair ``(X, y)``
                of arrays or tensors with one sample per row.
            epochs: passes over the data.

        Returns:
            The history of this trainer, from its first epoch on.

        Raises:
            TypeError: if ``data`` is none of these.
            ValueError: if ``epochs`` is negative, ``X`` and ``y`` differ in length, or the loader cannot be resized.
        """
        if epochs < 0:
            raise ValueError(f"epochs={epochs} must not be negative.")
        loader = make_adaptive(self._loader(data))
        sampler = cast(AdaptiveBatchSampler, loader.batch_sampler)
        samples = _length(sampler.sampler)
        size = self._batch_size(sampler.batch_size if isinstance(data, DataLoader) else None, samples)
        plain = _plain_epoch(samples, size, sampler.drop_last)
        self._start_control(sampler, size, samples)
        self.model.train()
        total = None if samples is None else samples * epochs
        with tqdm(total=total, unit=" samples", disable=not self._progress, leave=False) as bar:
            for _ in range(epochs):
                self._run_epoch(loader, sampler, plain, bar)
                self._epoch += 1
        self._read()
        return self.history

    def _loader(self, data: Data) -> DataLoader[Any]:
        if isinstance(data, DataLoader):
            return data
        dataset = _Rows(*data, self._dtype) if isinstance(data, tuple) and len(data) == 2 else data
        if isinstance(dataset, (list, tuple, np.ndarray, Tensor)) or not hasattr(dataset, "__getitem__"):
            raise TypeError(
                f"data of type {type(data).__name__} cannot be trained on; pass a Dataset, a DataLoader or a pair (X, y)."
            )
        collate = _no_collate if isinstance(dataset, _Rows) else None
        shuffle = self._shuffle and self._batch_size(None, len(cast(Any, dataset))) < len(cast(Any, dataset))
        return DataLoader(
            cast("Dataset[Any]", dataset),
            batch_size=DEFAULT_BATCH_SIZE,
            shuffle=shuffle,
            generator=self._generator,
            collate_fn=collate,
        )

    @property
    def _dtype(self) -> torch.dtype:
        floating = (p.dtype for p in self.model.parameters() if p.is_floating_point())
        return next(floating, torch.get_default_dtype())

    @property
    def _device(self) -> torch.device:
        return next((p.device for p in self.model.parameters()), torch.device("cpu"))

    def _start_control(self, sampler: AdaptiveBatchSampler, size: int, samples: int | None) -> None:
        controller = self._controller
        if controller is None:
            sampler.batch_size = size
            return
        if controller.reference_batch_size is None:
            controller.reference_batch_size = controller.batch_size = size
        if samples is not None:
            controller.max_batch_size = min(controller.max_batch_size or samples, samples)
        sampler.batch_size = controller.batch_size or size

    def _run_epoch(
        self, loader: DataLoader[Any], sampler: AdaptiveBatchSampler, plain: PlainEpoch, bar: tqdm[Any]
    ) -> None:
        clock = SampleClock()
        last_mark = None
        for batch in loader:
            draw = sampler.draws.popleft()
            started = last_mark or mark(self._device)
            x, y = _to_device(batch, self._device)
            factor = self._factor(draw)
            update = _Update(self, (x, y), draw.size)
            with scaled_lr(self.optimizer, factor):
                self.optimizer.step(update.closure)
            last_mark = mark(self._device)
            self._end_update(update, draw, factor, Elapsed(started, last_mark), sampler)
            for _ in clock.advance(plain, draw.position, 1.0, last=draw.last):
                if self.scheduler is not None:
                    self.scheduler.step()
            bar.update(draw.size)
        sampler.end_epoch()

    def _factor(self, draw: Draw) -> float:
        controller = self._controller
        if controller is None or controller.reference_batch_size is None:
            return 1.0
        if (
            draw.size < draw.nominal
        ):  # an epoch's tail counts for no less than the reference size would have given
            return controller.lr_factor(max(draw.size, min(draw.nominal, controller.reference_batch_size)))
        return controller.lr_factor(draw.size)

    def _end_update(
        self, update: _Update, draw: Draw, factor: float, elapsed: Elapsed, sampler: AdaptiveBatchSampler
    ) -> None:
        self._updates += 1
        self._samples += draw.size
        controller = self._controller
        if controller is not None:
            measurement = Measurement(
                update=self._updates,
                epoch=self._epoch,
                samples=self._samples,
                batch_size=draw.size,
                reference_batch_size=controller.reference_batch_size or draw.size,
                lr=float(self.optimizer.param_groups[0].get("lr", math.nan)),
                loss=update.loss,
                seconds=elapsed,
                part_sq_norms=update.part_sq_norms,
                part_sizes=update.part_sizes,
                pass_sizes=update.pass_sizes,
                pass_seconds=update.pass_seconds,
                sq_norm=update.sq_norm,
            )
            decision = controller.observe(measurement)
            if decision is not None:
                sampler.batch_size = decision.batch_size
                change = (decision.batch_size, decision.previous, decision.reason)
                self.history.changes.append(Change(self._updates, self._epoch, self._samples, *change))
        record = {
            "step": self._updates,
            "epoch": self._epoch,
            "samples": self._samples,
            "batch_size": draw.size,
            "micro_batch_size": max(update.pass_sizes),
            "lr_scale": factor,
            "noise_scale": math.nan if controller is None else controller.noise_scale,
            "seconds": elapsed,
        }
        self._unread.append((record, update.loss))
        if len(self._unread) >= _READ_EVERY:
            self._read()

    def _read(self) -> None:
        """Move the last updates into the history, with one transfer from the device for all their losses."""
        losses = read_numbers([loss for _, loss in self._unread])
        for (record, _), loss in zip(self._unread, losses, strict=True):
            seconds = float(record.pop("seconds"))
            self.history.add(
                Update(**record, throughput=record["batch_size"] / seconds, seconds=seconds, loss=loss)
            )
        self._unread.clear()

    def _parts(self, samples: int) -> tuple[list[int], bool]:
        """Sizes of an update's passes, and whether their gradients are measured."""
        largest = min(samples, self._micro_batch_size or samples)
        controller = self._controller
        measured = controller is not None and "noise" in controller.needs and measures_noise(self._updates)
        if measured and samples >= _PURPOSEFUL_PARTS:
            largest = min(largest, -(-samples // _PURPOSEFUL_PARTS))
        return balanced_sizes(samples, largest), measured


class FixedBatchTrainer(_Trainer):
    """Gradient descent on batches of one fixed size; by default one batch is the whole data set.

    ``theta <- theta - eta * (1/m) * sum of the m samples' gradients``, for plain SGD as optimizer. (Cauchy 1847.)

    Args:
        model: maps ``x`` to a prediction.
        loss_fn: ``loss_fn(model(x), y)``, the mean over the batch's samples.
        optimizer: steps the model's parameters.
        batch_size: samples per update; ``None`` is the whole data set.
        scheduler: steps once per update.
        seed: of the shuffling; ``None`` uses torch's global generator.
        progress: show a progress bar.
        history_size: updates kept in the history.

    Raises:
        ValueError: for a batch size below 1.
    """

    def __init__(
        self,
        model: nn.Module,
        loss_fn: LossFn,
        optimizer: Optimizer,
        *,
        batch_size: int | None = None,
        scheduler: LRScheduler | None = None,
        seed: int | None = None,
        progress: bool = True,
        history_size: int = 10_000,
    ) -> None:
        options: dict[str, Any] = {"scheduler": scheduler, "seed": seed, "progress": progress}
        super().__init__(model, loss_fn, optimizer, **options, history_size=history_size)
        self._size = _check_size("batch_size", batch_size)

    def _batch_size(self, own: int | None, samples: int | None) -> int:
        if self._size is not None:
            return self._size
        if samples is None:
            raise ValueError(
                "batch gradient descent needs data with a length; give FixedBatchTrainer a batch_size."
            )
        return samples


class SGDTrainer(_Trainer):
    """Stochastic gradient descent in its original sense: one random sample per update.

    Robbins & Monro 1951; the samples come in a new random order each epoch, each once.

    Args:
        model: maps ``x`` to a prediction.
        loss_fn: ``loss_fn(model(x), y)``, the mean over the batch's samples.
        optimizer: steps the model's parameters.
        scheduler: steps once per update.
        seed: of the shuffling; ``None`` uses torch's global generator.
        progress: show a progress bar.
        history_size: updates kept in the history.
    """

    def _batch_size(self, own: int | None, samples: int | None) -> int:
        return 1


class MiniBatchTrainer(_Trainer):
    """Gradient descent on shuffled disjoint mini-batches, whose size a controller may change as it goes.

    Args:
        model: maps ``x`` to a prediction.
        loss_fn: ``loss_fn(model(x), y)``, the mean over the batch's samples.
        optimizer: steps the model's parameters.
        batch_size: samples per update, at the start; ``None`` is a DataLoader's own, otherwise 32.
        controller: decides about the size and scales the learning rate; ``None`` keeps both.
        micro_batch_size: most samples per forward/backward pass; ``None`` is no bound.
        scheduler: steps once per ``batch_size`` samples, so that it ends with the run whatever the sizes.
        seed: of the shuffling; ``None`` uses torch's global generator.
        progress: show a progress bar.
        history_size: updates kept in the history.

    Raises:
        ValueError: for a size below 1.
    """

    def __init__(
        self,
        model: nn.Module,
        loss_fn: LossFn,
        optimizer: Optimizer,
        *,
        batch_size: int | None = None,
        controller: BatchSizeController | None = None,
        micro_batch_size: int | None = None,
        scheduler: LRScheduler | None = None,
        seed: int | None = None,
        progress: bool = True,
        history_size: int = 10_000,
    ) -> None:
        options: dict[str, Any] = {"scheduler": scheduler, "seed": seed, "progress": progress}
        super().__init__(model, loss_fn, optimizer, **options, history_size=history_size)
        self._size = _check_size("batch_size", batch_size)
        self._micro_batch_size = _check_size("micro_batch_size", micro_batch_size)
        self._controller = controller

    def _batch_size(self, own: int | None, samples: int | None) -> int:
        return self._size or own or DEFAULT_BATCH_SIZE


class _Update:
    """One update: its passes, and what they showed."""

    def __init__(self, trainer: _Trainer, batch: tuple[Any, Any], samples: int) -> None:
        self._trainer = trainer
        self._batch = batch
        self._samples = samples
        self._sizes, self._measured = trainer._parts(samples)
        self.loss = torch.zeros(())
        self.pass_sizes: list[int] = []
        self.pass_seconds: list[Elapsed] = []
        self.part_sq_norms: Sequence[Tensor] = ()
        self.part_sizes: Sequence[int] = ()
        self.sq_norm: Tensor | float = math.nan

    def closure(self) -> Tensor:
        """Gradient and loss of the whole batch, part by part."""
        trainer = self._trainer
        trainer.optimizer.zero_grad()
        parts = (
            [self._batch] if len(self._sizes) == 1 else split_batch(self._batch, self._sizes, self._samples)
        )
        if not self._measured:
            self.loss = self._run(parts, None)
            return self.loss
        self._measured = False  # an optimizer may call the closure many times; its first call is measured
        parameters = [p for group in trainer.optimizer.param_groups for p in group["params"]]
        with PartNorms(parameters) as norms:
            self.loss = self._run(parts, norms)
        total = grad_sq_norm(parameters)
        if total is not None:
            self.part_sq_norms, self.part_sizes, self.sq_norm = norms.sq_norms, norms.sizes, total
        return self.loss

    def _run(self, parts: Sequence[tuple[Any, Any]], norms: PartNorms | None) -> Tensor:
        losses = []
        for (x, y), size in zip(parts, self._sizes, strict=True):
            started = mark(self._trainer._device)
            loss = self._trainer.loss_fn(self._trainer.model(x), y)
            weighted = loss if size == self._samples else loss * (size / self._samples)
            weighted.backward()
            self.pass_sizes.append(size)
            self.pass_seconds.append(Elapsed(started, mark(self._trainer._device)))
            losses.append(weighted.detach())
            if norms is not None:
                norms.end_part(size, size / self._samples)
        return losses[0] if len(losses) == 1 else torch.stack(losses).sum()


class _Rows(Dataset[Any]):
    """Rows of two arrays, fetched a batch at a time."""

    def __init__(self, x: Any, y: Any, dtype: torch.dtype) -> None:
        self.x, self.y = _as_tensor(x, dtype), _as_tensor(y, dtype)
        if len(self.x) != len(self.y):
            raise ValueError(f"X has {len(self.x)} samples and y has {len(self.y)}; they must have as many.")

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return self.x[index], self.y[index]

    def __getitems__(self, indices: list[int]) -> tuple[Tensor, Tensor]:
        return self.x[indices], self.y[indices]


def _no_collate(batch: Any) -> Any:
    return batch


def _as_tensor(values: Any, dtype: torch.dtype) -> Tensor:
    tensor = torch.as_tensor(values)
    return tensor.to(dtype) if tensor.is_floating_point() else tensor


def _to_device(batch: Any, device: torch.device) -> tuple[Any, Any]:
    try:
        x, y = batch
    except (TypeError, ValueError):
        raise TypeError(
            f"a batch must be a pair (x, y), but the data gave a {type(batch).__name__}."
        ) from None
    return tuple(v.to(device) if isinstance(v, Tensor) else v for v in (x, y))  # type: ignore[return-value]


def _length(sampler: Any) -> int | None:
    try:
        return len(sampler)
    except TypeError:
        return None


def _plain_epoch(samples: int | None, batch_size: int, drop_last: bool) -> PlainEpoch:
    if samples is None:
        return PlainEpoch(None, None, batch_size)
    batches = samples // batch_size if drop_last else math.ceil(samples / batch_size)
    return PlainEpoch(samples, batches, batch_size)


def _check_size(name: str, value: int | None) -> int | None:
    if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < 1):
        raise ValueError(f"{name}={value!r} must be a positive whole number of samples, or None.")
    return value
