"""Three trainers in plain PyTorch: one loop, three ways to choose the batches."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from numbers import Integral
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau
from torch.utils.data import DataLoader, Dataset, IterableDataset
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
        if isinstance(scheduler, ReduceLROnPlateau):
            raise ValueError(
                "ReduceLROnPlateau waits for a metric that the trainer does not have; step it between fits."
            )
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
        self._measurable = True
        self._unread: list[tuple[dict[str, Any], Tensor]] = []

    # The plan: what the subclasses choose.

    def _batch_size(self, own: int | None, samples: int | None) -> int:
        """Samples per update, given a loader's own size and the number of samples."""
        raise NotImplementedError

    def _shuffle(self, samples: int) -> bool:
        """Whether an epoch's order is drawn anew."""
        return True

    _controller: BatchSizeController | None = None
    _micro_batch_size: int | None = None
    _largest: int | None = None  # the controller's own bound, before that of the data

    # The loop.

    def fit(self, data: Data, epochs: int = 1) -> History:
        """Train for ``epochs`` more epochs.

        Args:
            data: a ``Dataset`` of ``(x, y)`` pairs, a ``DataLoader`` of ``(x, y)`` batches, whose order is
                kept, or a tuple ``(X, y)`` of arrays or tensors with one sample per row, of which those in
                floating point are converted to the model's data type.
            epochs: passes over the data.

        Returns:
            The history of this trainer, from its first epoch on.

        Raises:
            TypeError: if ``data`` is none of these, or its batches are no pairs.
            ValueError: if ``epochs`` is not a whole number from 0 on, ``X`` and ``y`` differ in length, there
                is no sample or no batch, the loader cannot be resized, or the loss is not a single number.
        """
        if not isinstance(epochs, Integral) or isinstance(epochs, bool) or epochs < 0:
            raise ValueError(f"epochs={epochs!r} must be a whole number from 0 on.")
        loader = make_adaptive(self._loader(data))
        sampler = cast(AdaptiveBatchSampler, loader.batch_sampler)
        samples = _samples(sampler)
        if samples == 0:
            raise ValueError("the data has no samples; pass at least one.")
        own = sampler.batch_size if isinstance(data, DataLoader) else None
        plain = self._start_sampler(sampler, self._batch_size(own, samples), samples)
        # Layers that look across the batch make an update in parts another one: not for a measurement's sake.
        self._measurable = not any(isinstance(module, _BatchNorm) for module in self.model.modules())
        self.model.train()
        total = None if samples is None else samples * epochs
        with tqdm(total=total, unit=" samples", disable=not self._progress, leave=False) as bar:
            try:
                for _ in range(epochs):
                    self._run_epoch(loader, sampler, plain, bar)
                    self._epoch += 1
            finally:
                self._read()
        return self.history

    def _loader(self, data: Data) -> DataLoader[Any]:
        if isinstance(data, DataLoader):
            return data
        dataset = _Rows(*data, self._dtype) if isinstance(data, tuple) and len(data) == 2 else data
        if not isinstance(dataset, Dataset):
            raise TypeError(
                f"data of type {type(data).__name__} cannot be trained on; "
                "pass a Dataset, a DataLoader or a tuple (X, y)."
            )
        return DataLoader(
            dataset,
            batch_size=DEFAULT_BATCH_SIZE,
            shuffle=self._shuffles(dataset),
            generator=self._generator,
            collate_fn=_no_collate if isinstance(dataset, _Rows) else None,
        )

    def _shuffles(self, dataset: Dataset[Any]) -> bool:
        if isinstance(dataset, IterableDataset):
            return False
        samples = _length(dataset)
        if samples is None:
            raise ValueError(
                f"{type(dataset).__name__} has no length; give it a __len__, or make it an IterableDataset."
            )
        return samples > 0 and self._shuffle(samples)

    @property
    def _dtype(self) -> torch.dtype:
        floating = (p.dtype for p in self.model.parameters() if p.is_floating_point())
        return next(floating, torch.get_default_dtype())

    @property
    def _device(self) -> torch.device:
        return next((p.device for p in self.model.parameters()), torch.device("cpu"))

    def _start_sampler(self, sampler: AdaptiveBatchSampler, size: int, samples: int | None) -> PlainEpoch:
        """Set the size that training starts with; returns what an epoch is at the reference size."""
        controller = self._controller
        if controller is None:
            start = reference = size
        else:
            reference, start = self._start_controller(controller, size, samples)
        sampler.batch_size = reference
        plain = PlainEpoch(samples, _length(sampler), reference)
        if plain.batches == 0:
            raise ValueError(
                f"drop_last leaves no batch of {reference} out of {samples} samples; "
                "lower the batch size or switch drop_last off."
            )
        sampler.batch_size = start
        return plain

    def _start_controller(self, controller: BatchSizeController, size: int, samples: int | None) -> tuple[int, int]:
        if controller.reference_batch_size is None:
            controller.reference_batch_size = controller.batch_size = size
        reference = controller.reference_batch_size
        largest = self._largest
        if largest is not None and largest < reference and controller.min_batch_size is None:
            raise ValueError(
                f"max_batch_size={largest} is below the batch size {reference} that training starts with; "
                "raise it, or start with a smaller batch_size."
            )
        if samples is not None:  # a larger batch than the data would be no other batch
            limit = max(samples, reference)
            largest = limit if largest is None else min(largest, limit)
        controller.max_batch_size = largest
        return reference, controller.batch_size or reference

    def _run_epoch(
        self, loader: DataLoader[Any], sampler: AdaptiveBatchSampler, plain: PlainEpoch, bar: tqdm[Any]
    ) -> None:
        sampler.set_epoch(self._epoch)
        clock = SampleClock()
        position = 0
        last_mark = None
        for batch in loader:
            draw = sampler.draws.popleft()
            started = last_mark or mark(self._device)
            factor = self._factor(draw)
            update = _Update(self, _to_device(batch, self._device), draw.size)
            with scaled_lr(self.optimizer, factor):
                self.optimizer.step(update.closure)  # type: ignore[arg-type]  # tensors are welcome
            last_mark = mark(self._device)
            self._end_update(update, draw, factor, Elapsed(started, last_mark), sampler)
            position = draw.position
            self._step_scheduler(clock.advance(plain, position, 1.0, last=False))
            bar.update(draw.size)
        # Only now is it certain that the epoch has ended: a resize can add a batch to it, or drop one.
        self._step_scheduler(clock.advance(plain, position, 1.0, last=True))
        sampler.end_epoch()

    def _step_scheduler(self, due: Sequence[int]) -> None:
        for _ in due if self.scheduler is not None else ():
            self.scheduler.step()  # type: ignore[union-attr]

    def _factor(self, draw: Draw) -> float:
        controller = self._controller
        if controller is None or controller.reference_batch_size is None:
            return 1.0
        if draw.size < draw.nominal:  # an epoch's tail counts for no less than the reference size would give
            return controller.lr_factor(max(draw.size, min(draw.nominal, controller.reference_batch_size)))
        return controller.lr_factor(draw.size)

    def _end_update(
        self, update: _Update, draw: Draw, factor: float, elapsed: Elapsed, sampler: AdaptiveBatchSampler
    ) -> None:
        self._updates += 1
        self._samples += draw.size
        controller = self._controller
        if controller is not None:
            self._observe(controller, update, elapsed, sampler)
        record = {
            "step": self._updates,
            "epoch": self._epoch,
            "samples": self._samples,
            "batch_size": draw.size,
            "micro_batch_size": update.sizes[0],
            "lr_scale": factor,
            "noise_scale": math.nan if controller is None else controller.noise_scale,
            "seconds": elapsed,
        }
        self._unread.append((record, update.loss))
        if len(self._unread) >= _READ_EVERY:
            self._read()

    def _observe(
        self,
        controller: BatchSizeController,
        update: _Update,
        elapsed: Elapsed,
        sampler: AdaptiveBatchSampler,
    ) -> None:
        measurement = Measurement(
            update=self._updates,
            epoch=self._epoch,
            samples=self._samples,
            batch_size=update.samples,
            reference_batch_size=controller.reference_batch_size or update.samples,
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
            self.history.changes.append(self._change(decision.batch_size, decision.previous, decision.reason))
        note, notes = controller.note, self.history.notes
        if note is not None and not (notes and notes[-1].reason == note):
            notes.append(self._change(sampler.batch_size, sampler.batch_size, note))

    def _change(self, batch_size: int, previous: int, reason: str) -> Change:
        return Change(self._updates, self._epoch, self._samples, batch_size, previous, reason)

    def _read(self) -> None:
        """Move the last updates into the history, with one transfer from the device for all their losses."""
        losses = read_numbers([loss for _, loss in self._unread])
        for (record, _), loss in zip(self._unread, losses, strict=True):
            seconds = float(record.pop("seconds"))
            throughput = record["batch_size"] / seconds
            self.history.add(Update(**record, throughput=throughput, seconds=seconds, loss=loss))
        self._unread.clear()

    def _parts(self, samples: int) -> tuple[list[int], bool]:
        """Sizes of an update's passes, and whether their gradients are measured."""
        largest = min(samples, self._micro_batch_size or samples)
        controller = self._controller
        needed = controller is not None and "noise" in controller.needs and self._measurable
        measured = needed and samples >= _PURPOSEFUL_PARTS and measures_noise(self._updates)
        if measured:
            largest = min(largest, -(-samples // _PURPOSEFUL_PARTS))
        return balanced_sizes(samples, largest), measured


class FixedBatchTrainer(_Trainer):
    """Gradient descent on batches of one fixed size; by default one batch is the whole data set.

    With plain SGD as optimizer, ``theta <- theta - eta * (1/m) * sum of the m samples' gradients``
    (Cauchy 1847).

    Args:
        model: maps ``x`` to a prediction.
        loss_fn: ``loss_fn(model(x), y)``, the mean over the batch's samples.
        optimizer: steps the model's parameters.
        batch_size: samples per update; ``None`` is the whole data set.
        scheduler: steps once per update.
        seed: of the shuffling; ``None`` uses torch's global generator. A DataLoader brings its own order.
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
            raise ValueError("batch gradient descent needs data with a length; give FixedBatchTrainer a batch_size.")
        return samples

    def _shuffle(self, samples: int) -> bool:
        return self._size is not None and self._size < samples


class SGDTrainer(_Trainer):
    """Stochastic gradient descent in its original sense: one random sample per update.

    Robbins & Monro 1951; the samples come in a new random order each epoch, each once.

    Args:
        model: maps ``x`` to a prediction.
        loss_fn: ``loss_fn(model(x), y)``, the mean over the batch's samples.
        optimizer: steps the model's parameters.
        scheduler: steps once per update.
        seed: of the shuffling; ``None`` uses torch's global generator. A DataLoader brings its own order.
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
        controller: decides about the size and scales the learning rate; ``None`` keeps both. Its reference
            size, if it has none, becomes ``batch_size``; no batch becomes larger than the data set.
        micro_batch_size: most samples per forward/backward pass; ``None`` is no bound. The gradient stays
            that of the whole batch, except in layers that look across it (BatchNorm).
        scheduler: steps once per ``batch_size`` samples, so that it ends with the run whatever the sizes.
        seed: of the shuffling; ``None`` uses torch's global generator. A DataLoader brings its own order.
        progress: show a progress bar.
        history_size: updates kept in the history.

    Raises:
        ValueError: for a size below 1, or a ``batch_size`` that is not the controller's reference size.
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
        if controller is not None:
            self._largest = controller.max_batch_size
            if batch_size is not None and controller.reference_batch_size not in (None, batch_size):
                raise ValueError(
                    f"batch_size={batch_size} is not the controller's reference_batch_size="
                    f"{controller.reference_batch_size}; give only one of them."
                )

    def _batch_size(self, own: int | None, samples: int | None) -> int:
        return self._size or own or DEFAULT_BATCH_SIZE


class _Update:
    """One update: its passes, and what they showed."""

    def __init__(self, trainer: _Trainer, batch: tuple[Any, Any], samples: int) -> None:
        self._trainer = trainer
        self._batch = batch
        self._calls = 0
        self.samples = samples
        self.sizes, self._measured = trainer._parts(samples)
        self.loss = torch.full((), math.nan)
        self.pass_sizes: list[int] = []
        self.pass_seconds: list[Elapsed] = []
        self.part_sq_norms: Sequence[Any] = ()
        self.part_sizes: Sequence[int] = ()
        self.sq_norm: Tensor | float = math.nan

    def closure(self) -> Tensor:
        """Gradient and loss of the whole batch, part by part."""
        self._trainer.optimizer.zero_grad()
        # An optimizer may call the closure many times; the first call is the one at the parameters of before.
        first, self._calls = self._calls == 0, self._calls + 1
        loss = self._measure() if first and self._measured else self._run(None)
        if first:
            self.loss = loss
        return loss

    def _measure(self) -> Tensor:
        parameters = [p for group in self._trainer.optimizer.param_groups for p in group["params"]]
        with PartNorms(parameters) as norms:
            loss = self._run(norms)
        total = grad_sq_norm(parameters)
        if total is not None:
            self.part_sq_norms, self.part_sizes, self.sq_norm = norms.sq_norms, norms.sizes, total
        return loss

    def _run(self, norms: PartNorms | None) -> Tensor:
        whole = len(self.sizes) == 1
        parts = [self._batch] if whole else split_batch(self._batch, self.sizes, self.samples)
        losses = [self._run_part(part, size, norms) for part, size in zip(parts, self.sizes, strict=True)]
        return losses[0] if whole else torch.stack(losses).sum()

    def _run_part(self, part: tuple[Any, Any], size: int, norms: PartNorms | None) -> Tensor:
        """Add the part's share of the mean gradient; returns its share of the mean loss."""
        trainer = self._trainer
        started = mark(trainer._device)
        x, y = part
        loss = trainer.loss_fn(trainer.model(x), y)
        if loss.numel() != 1:
            raise ValueError(
                f"loss_fn returned {loss.numel()} numbers; it must return one, the mean over the batch's samples."
            )
        if size != self.samples:
            loss = loss * (size / self.samples)
        loss.backward()  # type: ignore[no-untyped-call]
        self.pass_sizes.append(size)
        self.pass_seconds.append(Elapsed(started, mark(trainer._device)))
        if norms is not None:
            norms.end_part(size, size / self.samples)
        return loss.detach()


class _Rows(Dataset[Any]):
    """Rows of two arrays, fetched a batch at a time."""

    def __init__(self, x: Any, y: Any, dtype: torch.dtype) -> None:
        self.x, self.y = _as_tensor("X", x, dtype), _as_tensor("y", y, dtype)
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


def _as_tensor(name: str, values: Any, dtype: torch.dtype) -> Tensor:
    tensor = values if isinstance(values, Tensor) else _from_array(name, values)
    if tensor.ndim == 0:
        raise ValueError(f"{name} is a single number; it must have one sample per row.")
    return tensor.to(dtype) if tensor.is_floating_point() else tensor


def _from_array(name: str, values: Any) -> Tensor:
    array = np.require(values, requirements=["C", "W"])  # what a tensor can share memory with
    if array.dtype.kind not in "biufc":
        raise TypeError(f"{name} holds values of type {array.dtype.name}; it must hold numbers.")
    return torch.from_numpy(array)


def _to_device(batch: Any, device: torch.device) -> tuple[Any, Any]:
    if not isinstance(batch, (tuple, list)) or len(batch) != 2:
        count = f" of {len(batch)}" if isinstance(batch, (tuple, list)) else ""
        raise TypeError(f"a batch must be a pair (x, y), but the data gave a {type(batch).__name__}{count}.")
    x, y = batch
    return _moved(x, device), _moved(y, device)


def _moved(value: Any, device: torch.device) -> Any:
    if hasattr(value, "to"):
        return value.to(device)
    if isinstance(value, dict):
        return {key: _moved(entry, device) for key, entry in value.items()}
    if isinstance(value, (tuple, list)):
        entries = [_moved(entry, device) for entry in value]
        return type(value)(*entries) if hasattr(value, "_fields") else type(value)(entries)
    return value


def _samples(sampler: AdaptiveBatchSampler) -> int | None:
    """Samples of an epoch; ``None`` where they are not known."""
    # A user's batch sampler without a sampler of its own stands in for one, but its length counts batches.
    batches_only = sampler.sampler is getattr(sampler, "batch_sampler", None)
    return None if batches_only else _length(sampler.sampler)


def _length(data: Any) -> int | None:
    try:
        return len(data)
    except (TypeError, NotImplementedError):
        return None


def _check_size(name: str, value: int | None) -> int | None:
    if value is None:
        return None
    if not isinstance(value, Integral) or isinstance(value, bool) or value < 1:
        raise ValueError(f"{name}={value!r} must be a positive whole number of samples, or None.")
    return int(value)
