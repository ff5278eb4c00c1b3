"""Three trainers in plain PyTorch: one loop, three ways to choose the batches."""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from numbers import Integral
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau
from torch.utils.data import DataLoader, Dataset, IterableDataset
from tqdm import tqdm

from adaptive_batch.arguments import check_choice, check_micro_batch_size, check_seed
from adaptive_batch.clocks import PlainEpoch, SampleClock
from adaptive_batch.controller import BatchSizeController
from adaptive_batch.data import AdaptiveBatchSampler, Draw, make_adaptive
from adaptive_batch.executor import BatchClosure, Executor, LossFn
from adaptive_batch.history import Change, History, Update
from adaptive_batch.iterable import Requests
from adaptive_batch.layers import batch_dependent_layers, least_batch, warn_of_splitting
from adaptive_batch.lr_scaling import GroupValues, has_lr, scaled_lr, scheduled_lr
from adaptive_batch.measurement import Measurement, read_numbers
from adaptive_batch.memory import parse_budget, usable_memory
from adaptive_batch.micro_batch_limit import MicroBatchLimit
from adaptive_batch.pairs import Rows, no_collate, to_device
from adaptive_batch.timing import Elapsed, mark
from adaptive_batch.transaction import random_state, set_random_state

__all__ = ["FixedBatchTrainer", "MiniBatchTrainer", "SGDTrainer"]

Data = Dataset[Any] | DataLoader[Any] | tuple[Any, Any]

DEFAULT_BATCH_SIZE = 32
_READ_EVERY = 10


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
        check_seed(seed)
        self.model = model
        self.loss_fn = loss_fn
        # A loss may have parameters and buffers of its own.
        self._modules = nn.ModuleList(part for part in (model, loss_fn) if isinstance(part, nn.Module))
        self.optimizer = optimizer
        self.scheduler = scheduler
        self.history = History(history_size)
        self._generator = None if seed is None else torch.Generator().manual_seed(seed)
        self._progress = progress
        self._epoch = 0
        self._samples = 0
        self._updates = 0
        self._position = 0  # samples of the running epoch that were trained on
        self._clock = SampleClock()
        self._limit = MicroBatchLimit()
        self._sampler: AdaptiveBatchSampler | None = None
        self._restored: Mapping[str, Any] | None = None  # a state that the next epoch continues
        self._unread: list[tuple[dict[str, Any], Tensor]] = []

    @property
    def epoch(self) -> int:
        """Epochs that are complete."""
        return self._epoch

    @property
    def updates(self) -> int:
        """Optimizer updates made."""
        return self._updates

    @property
    def samples(self) -> int:
        """Samples trained on, over all epochs."""
        return self._samples

    # The plan: what the subclasses choose.

    def _batch_size(self, own: int | None, samples: int | None) -> int:
        """Samples per update, given a loader's own size and the number of samples."""
        raise NotImplementedError

    def _shuffle(self, samples: int) -> bool:
        """Whether an epoch's order is drawn anew."""
        return True

    def _make_executor(self) -> Executor:
        """What runs the updates of a fit."""
        return Executor(self.model, self.loss_fn, self.optimizer, limit=self._limit)

    _controller: BatchSizeController | None = None
    _largest: int | None = None  # the controller's own bound, before that of the data

    # The loop.

    def fit(self, data: Data, epochs: int = 1, *, after_update: Callable[[Any], object] | None = None) -> History:
        """Train for ``epochs`` more epochs; the rest of one that a loaded state is in the middle of counts as one.

        Args:
            data: a ``Dataset`` of ``(x, y)`` pairs, a ``DataLoader`` of ``(x, y)`` batches, whose order is
                kept, or a tuple ``(X, y)`` of arrays or tensors with one sample per row, of which those in
                floating point are converted to the model's data type.
            epochs: passes over the data.
            after_update: called with this trainer after each update, to save :meth:`state_dict` now and then.

        Returns:
            The history of this trainer, from its first epoch on.

        Raises:
            TypeError: if ``data`` is none of these, or its batches are no pairs.
            ValueError: if ``epochs`` is not a whole number from 0 on, ``X`` and ``y`` differ in length, there
                is no sample or no batch, the loader cannot be resized, the loss is not a single number, or a
                loaded state does not fit the data.
        """
        if not isinstance(epochs, Integral) or isinstance(epochs, bool) or epochs < 0:
            raise ValueError(f"epochs={epochs!r} must be a whole number from 0 on.")
        loader = make_adaptive(self._loader(data))
        sampler = cast(AdaptiveBatchSampler, loader.batch_sampler)
        sampler.count_popped()  # a batch that an error interrupts is not consumed
        samples = _samples(sampler)
        if samples == 0:
            raise ValueError("the data has no samples; pass at least one.")
        own = sampler.batch_size if isinstance(data, DataLoader) else None
        plain = self._start_sampler(sampler, self._batch_size(own, samples), samples)
        self._start_fit(sampler, samples)
        executor = self._make_executor()
        self._warn_of_unknown_noise(executor)
        self.model.train()
        total = None if samples is None else max(0, samples * epochs - self._position)
        with tqdm(total=total, unit=" samples", disable=not self._progress, leave=False) as bar:
            try:
                for _ in range(epochs):
                    self._run_epoch(loader, sampler, plain, executor, bar, after_update)
                    self._epoch += 1
                    self._position = 0
            finally:
                self._read()
        return self.history

    def _loader(self, data: Data) -> DataLoader[Any]:
        if isinstance(data, DataLoader):
            return data
        dataset = Rows(*data, self._dtype) if isinstance(data, tuple) and len(data) == 2 else data
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
            collate_fn=no_collate if isinstance(dataset, Rows) else None,
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

    def _start_sampler(self, sampler: AdaptiveBatchSampler, size: int, samples: int | None) -> PlainEpoch:
        """Set the size that training starts with; returns what an epoch is at the reference size."""
        controller = self._controller
        if controller is None:
            start = reference = size
        else:
            reference, start = self._start_controller(controller, size, samples)
        sampler.batch_size = sampler.own_size = reference
        sampler.least_tail = least_batch(self.model)
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
        controller.check_optimizer(self.optimizer)
        return reference, controller.batch_size or reference

    def _start_fit(self, sampler: AdaptiveBatchSampler, samples: int | None) -> None:
        """Take up what a loaded state left; without one an epoch starts."""
        self._sampler = sampler
        if self._restored is None:
            self._position = 0
            return
        if self._position > 0 and isinstance(sampler, Requests):
            raise ValueError(
                "the state is of the middle of an epoch, but only an iterable data set itself could know where it "
                "stands; save the state between two fits."
            )
        if samples is not None and self._position > samples:
            raise ValueError(
                f"the state is of {self._position} samples into an epoch, but the data has only {samples}; "
                "pass the data that the state was saved with."
            )
        if self._restored["sampler"] is not None:
            size = sampler.batch_size
            sampler.load_state_dict(self._restored["sampler"])
            sampler.batch_size = size

    def _run_epoch(
        self,
        loader: DataLoader[Any],
        sampler: AdaptiveBatchSampler,
        plain: PlainEpoch,
        executor: Executor,
        bar: tqdm[Any],
        after_update: Callable[[Any], object] | None,
    ) -> None:
        sampler.set_epoch(self._epoch)
        if self._position == 0:
            self._clock.start_epoch()
        last_mark = None
        for batch in self._batches(loader):
            draw = sampler.draws[0]
            started = last_mark or mark(executor.device)
            counted = self._counted(draw)
            factor, values = self._scaling(counted)
            closure = executor.closure(
                to_device(batch, executor.device),
                draw.size,
                measure=self._measures(),
                time_parts=self._controller is not None and self._controller.times_parts(self._updates),
                sum_factor=1.0 if self._controller is None else self._controller.sum_factor(counted),
            )
            with scaled_lr(self.optimizer, factor, values):
                self.optimizer.step(closure)  # type: ignore[arg-type]  # tensors are welcome
            if self._controller is not None:
                self._controller.count_step(self.optimizer, counted)
            last_mark = mark(executor.device)
            sampler.draws.popleft()  # consumed only now, also for a state that is saved after an error
            self._position = draw.position
            self._end_update(closure, draw, factor, Elapsed(started, last_mark), sampler)
            self._remark(executor.failures, sampler)
            self._step_scheduler(self._steps_due(plain, last=False))
            bar.update(draw.size)
            if after_update is not None:
                after_update(self)
                last_mark = mark(executor.device)
        # Only now is it certain that the epoch has ended: a resize can add a batch to it, or drop one.
        self._step_scheduler(self._steps_due(plain, last=True))
        sampler.end_epoch()

    def _batches(self, loader: DataLoader[Any]) -> Iterator[Any]:
        """An epoch's batches; random numbers go on where a loaded state left them."""
        restored, self._restored = self._restored, None
        if restored is None:
            return iter(loader)
        if self._position == 0:  # the state was saved before the epoch's loader drew its seed, so it draws it
            set_random_state(self._modules, restored["random"])
            return iter(loader)
        batches = iter(loader)
        set_random_state(self._modules, restored["random"])
        return batches

    def _steps_due(self, plain: PlainEpoch, *, last: bool) -> Sequence[int]:
        """Of the scheduler: one an update, where sizes change as many as there would be otherwise."""
        if self._controller is None:
            return () if last else (self._updates,)
        return self._clock.advance(plain, self._position, 1.0, last=last)

    def _step_scheduler(self, due: Sequence[int]) -> None:
        for _ in due if self.scheduler is not None else ():
            self.scheduler.step()  # type: ignore[union-attr]

    def _counted(self, draw: Draw) -> int:
        """Samples that a batch counts for in the learning rate."""
        controller = self._controller
        if controller is not None and controller.reference_batch_size is not None and draw.size < draw.nominal:
            # An epoch's tail counts for no less than the reference size would give.
            return max(draw.size, min(draw.nominal, controller.reference_batch_size))
        return draw.size

    def _scaling(self, counted: int) -> tuple[float, GroupValues | None]:
        """The factor on the learning rate, and what else is set in the parameter groups."""
        if self._controller is None:
            return 1.0, None
        factor = self._controller.lr_factor(counted, scheduled_lr(self.optimizer)) if has_lr(self.optimizer) else 1.0
        return factor, self._controller.group_values(counted, factor)

    def _end_update(
        self, closure: BatchClosure, draw: Draw, factor: float, elapsed: Elapsed, sampler: AdaptiveBatchSampler
    ) -> None:
        self._updates += 1
        self._samples += draw.size
        controller = self._controller
        if controller is not None:
            self._observe(controller, closure, elapsed, sampler)
        record = {
            "step": self._updates,
            "epoch": self._epoch,
            "samples": self._samples,
            "batch_size": draw.size,
            "micro_batch_size": closure.micro_batch_size or draw.size,
            "lr_scale": factor,
            "noise_scale": math.nan if controller is None else controller.noise_scale,
            "seconds": elapsed,
        }
        self._unread.append((record, closure.loss))
        if len(self._unread) >= _READ_EVERY:
            self._read()

    def _observe(
        self,
        controller: BatchSizeController,
        closure: BatchClosure,
        elapsed: Elapsed,
        sampler: AdaptiveBatchSampler,
    ) -> None:
        measurement = Measurement(
            update=self._updates,
            epoch=self._epoch,
            samples=self._samples,
            batch_size=closure.samples,
            reference_batch_size=controller.reference_batch_size or closure.samples,
            lr=scheduled_lr(self.optimizer),
            loss=closure.loss,
            seconds=math.nan if closure.disturbed else elapsed,
            part_sq_norms=closure.part_sq_norms,
            part_sizes=closure.part_sizes,
            pass_sizes=closure.pass_sizes,
            pass_seconds=closure.pass_seconds,
            sq_norm=closure.sq_norm,
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

    @property
    def _needs_noise(self) -> bool:
        return self._controller is not None and "noise" in self._controller.needs

    def _measures(self) -> bool:
        """Whether the next update is one whose noise is measured."""
        return self._controller is not None and self._controller.measures_noise(self._updates)

    def _warn_of_unknown_noise(self, executor: Executor) -> None:
        if self._needs_noise and not executor.measurable:
            warnings.warn(
                f"{batch_dependent_layers(self.model)[0]} looks across the batch, so no update is split to measure the "
                "gradient noise, and what needs it changes nothing; choose a policy and an lr_scaling that do not.",
                stacklevel=3,
            )

    def _remark(self, failures: list[str], sampler: AdaptiveBatchSampler) -> None:
        size = sampler.batch_size
        self.history.notes.extend(self._change(size, size, failure) for failure in failures)
        failures.clear()

    # Resuming.

    def state_dict(self) -> dict[str, Any]:
        """All that a run goes on from: what is trained, the position in the data, random states, what was learned.

        Plain numbers and tensors, for ``torch.save`` and ``torch.load(weights_only=True)``. To be taken in
        ``after_update``, or while no fit runs; the tensors of model and optimizer are the live ones.
        """
        self._read()
        parts = {"scheduler": self.scheduler, "controller": self._controller, "sampler": self._sampler}
        state: dict[str, Any] = {
            "epoch": self._epoch,
            "updates": self._updates,
            "samples": self._samples,
            "position": self._position,
            "model": self.model.state_dict(),
            "loss": self.loss_fn.state_dict() if isinstance(self.loss_fn, nn.Module) else {},
            "optimizer": self.optimizer.state_dict(),
            "clock": self._clock.state_dict(),
            "micro_batches": self._limit.state_dict(),
            "history": self.history.state_dict(),
            "random": random_state(self._modules),
            **{name: None if part is None else part.state_dict() for name, part in parts.items()},
        }
        if self._restored is not None:  # not taken up yet
            state.update({name: self._restored[name] for name in ("random", "sampler")})
        return state

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Put back what :meth:`state_dict` gave, into a trainer built alike.

        Position and random states wait for the next fit, which repeats the rest of the uninterrupted run bit for
        bit on the CPU, with the same data and number of workers, under every policy that does not read the clock.

        Raises:
            ValueError: if the state is incomplete, or is of a trainer with other parts.
        """
        missing = [name for name in self.state_dict() if name not in state]
        if missing:
            raise ValueError(f"this is not the state of a trainer: {', '.join(missing)} missing.")
        for name, part in {"scheduler": self.scheduler, "controller": self._controller}.items():
            if (state[name] is None) != (part is None):
                has, lacks = ("trainer", "state") if state[name] is None else ("state", "trainer")
                raise ValueError(f"the {has} has a {name} and the {lacks} has none; build the trainer as it was.")
        for name in ("epoch", "updates", "samples", "position"):
            if type(state[name]) is not int or state[name] < 0:
                raise ValueError(f"the state of a trainer cannot have {name}={state[name]!r}.")
        self.history.load_state_dict(state["history"])
        self._limit.load_state_dict(state["micro_batches"])
        self._clock.load_state_dict(state["clock"])
        if self._controller is not None:
            self._controller.load_state_dict(state["controller"])
        self.model.load_state_dict(state["model"])
        if isinstance(self.loss_fn, nn.Module):
            self.loss_fn.load_state_dict(state["loss"])
        self.optimizer.load_state_dict(copy.deepcopy(state["optimizer"]))  # which would train the state's own tensors
        if self.scheduler is not None:
            self.scheduler.load_state_dict(copy.deepcopy(state["scheduler"]))
        self._epoch, self._updates = state["epoch"], state["updates"]
        self._samples, self._position = state["samples"], state["position"]
        self._unread.clear()
        self._restored = {"sampler": state["sampler"], "random": state["random"]}


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
        micro_batch_size: most samples per forward/backward pass. ``"auto"``: what the memory model says, halved
            when memory runs out all the same; a number: at most that, halved likewise; ``None``: never split,
            and an out-of-memory error is an error. The gradient stays that of the whole batch, except in layers
            that look across it (BatchNorm).
        memory_budget: bytes that training may take: a number, ``"20GiB"``, or a fraction of the device; kept from the
            first update on, which passes over ever more of its samples precede. ``None`` is what a GPU has; on a CPU
            there is no bound. On a CPU the bytes are those saved for backward.
        loss_reduction: whether ``loss_fn`` returns the ``"mean"`` or the ``"sum"`` over the samples it is given.
        scheduler: steps once per ``batch_size`` samples, so that it ends with the run whatever the sizes.
        seed: of the shuffling; ``None`` uses torch's global generator. A DataLoader brings its own order.
        progress: show a progress bar.
        history_size: updates kept in the history.

    Raises:
        ValueError: for a size below 1, a ``batch_size`` that is not the controller's reference size, or another
            argument that is not one of the above.
        TypeError: for a ``controller`` that is none.
    """

    def __init__(
        self,
        model: nn.Module,
        loss_fn: LossFn,
        optimizer: Optimizer,
        *,
        batch_size: int | None = None,
        controller: BatchSizeController | None = None,
        micro_batch_size: int | str | None = None,
        memory_budget: int | float | str | None = None,
        loss_reduction: str = "mean",
        scheduler: LRScheduler | None = None,
        seed: int | None = None,
        progress: bool = True,
        history_size: int = 10_000,
    ) -> None:
        options: dict[str, Any] = {"scheduler": scheduler, "seed": seed, "progress": progress}
        super().__init__(model, loss_fn, optimizer, **options, history_size=history_size)
        self._size = _check_size("batch_size", batch_size)
        check_choice("loss_reduction", loss_reduction, ("mean", "sum"))
        self._loss_reduction = loss_reduction
        self._limit = MicroBatchLimit(largest=check_micro_batch_size(micro_batch_size))
        self._splits = micro_batch_size is not None
        self._memory_budget = memory_budget
        if memory_budget is not None and not self._splits:
            raise ValueError(
                f"memory_budget={memory_budget!r} needs updates that can be split, but micro_batch_size is None; "
                'set it to "auto".'
            )
        if isinstance(memory_budget, str):
            parse_budget(memory_budget, None)  # a fraction waits for the device
        if self._splits:
            warn_of_splitting(model)
        self._controller = controller
        if controller is not None:
            if not isinstance(controller, BatchSizeController):
                raise TypeError(f"controller={controller!r} decides nothing: pass a BatchSizeController, or None.")
            controller.record = self.history.measurements.append
            self._largest = controller.max_batch_size
            if batch_size is not None and controller.reference_batch_size not in (None, batch_size):
                raise ValueError(
                    f"batch_size={batch_size} is not the controller's reference_batch_size="
                    f"{controller.reference_batch_size}; give only one of them."
                )

    def _batch_size(self, own: int | None, samples: int | None) -> int:
        return self._size or own or DEFAULT_BATCH_SIZE

    def _make_executor(self) -> Executor:
        executor = Executor(
            self.model,
            self.loss_fn,
            self.optimizer,
            limit=self._limit,
            loss_reduction=self._loss_reduction,
            recovers=self._splits,
            explores=self._memory_budget is not None,
        )
        if self._splits:
            self._limit.budget = usable_memory(self._memory_budget, executor.device)
        return executor


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
