"""The callback that adapts the batch size while a Lightning Trainer trains."""

from __future__ import annotations

import inspect
import math
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, DistributedSampler

from adaptive_batch.arguments import check_flags, check_seed
from adaptive_batch.callbacks import _lightning
from adaptive_batch.callbacks._books import EpochBooks, LoaderLimits, plain_epoch
from adaptive_batch.callbacks._executor import WeightFn
from adaptive_batch.callbacks._lightning import CallbackBase, Patches
from adaptive_batch.callbacks._options import Splitting, check_choice, check_function
from adaptive_batch.callbacks._resume import RunState
from adaptive_batch.callbacks.memory_monitor import MemoryMonitor
from adaptive_batch.clocks import GainClock, PlainEpoch, SampleClock
from adaptive_batch.controller import BatchSizeController, Decision, check_bounds
from adaptive_batch.data import AdaptiveBatchSampler, Draw, make_adaptive
from adaptive_batch.distributed import Agreement, SharedOrder, broadcast, gather
from adaptive_batch.history import Change, History, Update
from adaptive_batch.iterable import Requests, count_samples
from adaptive_batch.layers import least_batch
from adaptive_batch.lr_scaling import LRScaling, Scaled, gain, has_lr, resolve_lr_scaling, scheduled_lr, why_not_scaled
from adaptive_batch.measurement import Measurement
from adaptive_batch.memory import resident_bytes
from adaptive_batch.micro_batching import UNEQUAL
from adaptive_batch.noise.sources import check_source
from adaptive_batch.order import SeededOrder
from adaptive_batch.policies import DontDecay, Policy, Seesaw, resolve_policy
from adaptive_batch.shares import balanced_weights
from adaptive_batch.timing import Elapsed, Mark, mark
from adaptive_batch.user_batches import UserBatchSampler

if TYPE_CHECKING:
    from pytorch_lightning import LightningModule, Trainer

__all__ = ["AdaptiveBatchSize"]

_CLOCKS = ("samples", "gain", "updates")
_MANUAL = "in manual optimization the backward passes are training_step's own"
_OTHER_RANKS = (
    "going on from {} ranks on {}: batch size, learning rate and the samples left stay; metrics accumulated in this "
    "epoch start anew, and random numbers are other ones."
)
_NO_POSITION = (
    "an IterableDataset begins anew when a run is resumed inside an epoch: the batch size and the learning rate go on, "
    "but samples of the epoch come twice; save checkpoints at the end of epochs."
)
_NO_GRADIENTS = (
    "the checkpoint was made between the batches that accumulate into one update, whose gradients are those of other "
    "ranks: the update goes on without them; save checkpoints at multiples of accumulate_grad_batches."
)
_DATA_FRACTION = 10
_UNKNOWN_LENGTH_GROWTH = 64
_NAMED_SHARES = 8
_MEMORY_EVERY = 100
"""Updates between two readings of the process's resident size, which the system is slow to tell."""


class AdaptiveBatchSize(CallbackBase):
    """Tunes the batch size during training, with the learning rate scaled to match.

    It measures the noise of the gradients and the time of an update, lets a policy decide which batch size now
    makes the most progress per second, resizes the running DataLoader (mid-epoch, its workers stay, each
    sample is still seen exactly once), and scales the learning rate by the samples that each update really
    has. Nothing else in the training code changes.

    Args:
        policy: ``"goodput"``, another name of :mod:`adaptive_batch.policies`, a policy object, or a function
            ``measurement -> batch size``.
        min_batch_size: smallest global batch size; ``None`` is the loader's own at the start, ``B0``.
        max_batch_size: largest; ``None`` is a tenth of the data set, at least ``B0`` (64 ``B0`` for data
            without a length).
        lr_scaling: ``"auto"`` (by policy and optimizer: square root for adaptive ones like Adam, linear within bounds
            for SGD with momentum, AdaScale for SGD without, AdamScale for any other), ``"none"``, ``"linear"``,
            ``"sqrt"``, ``"adascale"``, ``"adamscale"``, ``"sde"``, or a rule of :mod:`adaptive_batch.lr_scaling`. A
            policy that sets the learning rate itself goes with ``"auto"`` and ``"none"`` only.
        schedule_clock: what schedulers that step per update advance with: ``"samples"`` (so that a schedule
            still ends with the run), ``"gain"`` (AdaScale's progress) or ``"updates"``.
        micro_batch_size: most samples per forward/backward pass. ``"auto"``: what the memory model says, halved
            when memory runs out all the same; a number: at most that, halved likewise; ``None``: never split,
            and an out-of-memory error is an error.
        memory_budget: bytes that training may take: a number, ``"20GiB"``, or a fraction of the device; kept from the
            first update on, which passes over ever more of its samples precede. ``None`` is what a GPU has; on a CPU
            there is no bound. On a CPU the bytes are those saved for backward.
        adjust_every: updates between two decisions.
        quantize: ``True`` or ``False`` forces or forbids quantised sizes and hysteresis; ``None`` goes by the policy.
        noise: where the noise is measured: ``"micro_batches"`` splits an update in two now and then,
            ``"per_example"`` takes norms by hooks on the layers and ``"probe"`` makes passes of its own, which
            change nothing in the run; ``"auto"`` takes norms by example where that costs next to nothing (networks
            of linear layers and norms that see an example at one position), splits elsewhere, and probes where layers
            look across the batch. A dry run probes where it would split. See ``adaptive_batch.noise.SOURCES``.
        loss_reduction: whether ``training_step`` returns the ``"mean"`` or the ``"sum"`` over its samples.
        weight_fn: ``(micro_batch, batch) -> weight`` of a part's loss, for a mean over something else.
        batch_size_of: ``batch -> samples`` of this rank, where the loader's count of them is not the one that the
            learning rate should follow (tokens, nodes, what a collate function left). The loader's ``batch_size``
            must count the same.
        history_size: updates kept in ``history``.
        self_check: compare the first batch's gradient with that of its parts before training on it, and refuse a model
            or a loss that does not decompose, with the reason; everything is put back.
        balance_ranks: whether faster ranks take more samples of each batch, so that none waits for another. Shares
            follow the measured time of a sample on each rank, where that makes an update at least 5 % shorter; the
            update stays the mean over the batch. Each rank always has a sample.
        dry_run: measure and say what would be done, change nothing.
        seed: the order of the samples follows from this and the epoch alone; ``None`` leaves it to the sampler's own
            random numbers.
        verbose: log each change and its reason.

    Attributes:
        history: the :class:`~adaptive_batch.history.History` of the run.

    Raises:
        ValueError: for an argument that is not one of the above.
    """

    def __init__(
        self,
        policy: str | Policy | Callable[[Measurement], float] = "goodput",
        *,
        min_batch_size: int | None = None,
        max_batch_size: int | None = None,
        lr_scaling: str | LRScaling = "auto",
        schedule_clock: str = "samples",
        micro_batch_size: int | str | None = "auto",
        memory_budget: int | float | str | None = None,
        noise: str = "auto",
        adjust_every: int = 10,
        quantize: bool | None = None,
        loss_reduction: str = "mean",
        weight_fn: WeightFn | None = None,
        batch_size_of: Callable[[Any], int] | None = None,
        history_size: int = 10_000,
        self_check: bool = False,
        balance_ranks: bool = False,
        dry_run: bool = False,
        seed: int | None = None,
        verbose: bool = True,
    ) -> None:
        check_bounds(min_batch_size, max_batch_size)
        check_choice("schedule_clock", schedule_clock, _CLOCKS)
        check_flags(self_check=self_check, balance_ranks=balance_ranks, dry_run=dry_run, verbose=verbose)
        check_seed(seed)
        check_function("batch_size_of", batch_size_of)
        self._noise = check_source(noise, ("micro_batches", "per_example", "probe"))
        self._policy = resolve_policy(policy)
        if lr_scaling != "auto":
            resolve_lr_scaling(lr_scaling, policy=self._policy)
        if noise == "per_example" and "inner_products" in getattr(self._policy, "needs", ()):
            raise ValueError(
                'noise="per_example" knows the norms of the gradients, but no inner products, which the policy needs; '
                'use noise="micro_batches" or "probe".'
            )
        self._lr_scaling = lr_scaling
        self._bounds = (min_batch_size, max_batch_size)
        self._clock_name = schedule_clock
        self._splitting = Splitting(
            micro_batch_size=micro_batch_size,
            memory_budget=memory_budget,
            loss_reduction=loss_reduction,
            weight_fn=weight_fn,
            self_check=self_check,
        )
        self._micro_batches = self._splitting.limit
        self._batch_size_of = batch_size_of
        self._balance_ranks = balance_ranks and not dry_run
        self._dry_run = dry_run
        self._seed = seed
        self._verbose = verbose
        self.history = History(history_size)
        # "none" until the optimizer is known; the rule is not used before the first update.
        self._controller = BatchSizeController(
            self._policy,
            lr_scaling="none" if lr_scaling == "auto" else lr_scaling,
            adjust_every=adjust_every,
            quantize=quantize,
        )
        if schedule_clock == "gain":
            self._controller.others_need = frozenset({"noise"})
        self._controller.record = self.history.measurements.append
        self._patches = Patches()
        self._loaded: Mapping[str, Any] | None = None  # a checkpoint's state, until the loop goes on from it
        self._updates = 0
        self._samples = 0
        self._start_fit()

    def _start_fit(self) -> None:
        self._trainer: Trainer | None = None
        self._agreement: Agreement | None = None
        self._loaders: list[DataLoader[Any]] = []
        self._adapted: tuple[DataLoader[Any], DataLoader[Any]] | None = None  # the newest of them, and what it became
        self._sampler: AdaptiveBatchSampler | None = None
        self._books: EpochBooks | None = None
        self._clock: SampleClock | GainClock | None = None
        self._window: list[Draw] = []
        self._batches_popped = 0
        self._position = 0
        self._stepped = False
        self._due: list[int] = []
        self._updated_at = 0  # the batch after which those are due
        self._update_mark: Mark | None = None
        self._host_mark: float | None = None
        self._noted: str | None = None
        self._last_memory = math.nan
        self._has_run_state = False  # once the fit has started
        self._began = False  # between on_train_start and the end
        self._taken_up = False  # the loader's side of a checkpoint
        self._draw_at_hand: Draw | None = None  # of the batch that the loop is in
        self._scaled: Scaled | None = None  # while parameter groups have other values than their own
        self._bare_steps = 0  # nested ones that go past the strategy

    @property
    def batch_size(self) -> int | None:
        """The global batch size in force, ``None`` before the first fit has a loader."""
        return self._controller.batch_size

    @property
    def micro_batch_size(self) -> int:
        """Samples of the largest pass of the update at hand, 0 before the first."""
        return 0 if self._trainer is None else self._executor.micro_batch_size

    @property
    def sum_factor(self) -> float:
        """Factor on the loss of the batch at hand, where it is a sum; 1 for a mean."""
        return 1.0 if self._trainer is None else self._executor.sum_factor

    @property
    def controller(self) -> BatchSizeController:
        """What decides: its noise and step-time estimates can be read here."""
        return self._controller

    # Set-up

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse what is not supported and take hold of the training loop."""
        if str(getattr(stage, "value", stage)) != "fit":
            return
        _check_supported(trainer, pl_module)
        if not self._dry_run:
            _check_accumulation(trainer)
        self._patches.undo()
        self._start_fit()
        self._trainer = trainer
        self._device = trainer.strategy.root_device
        self._manual = not pl_module.automatic_optimization
        self._log = _lightning.StepLog(trainer, "on_train_batch_end")
        self._patches.later(self._log.close)
        self._limits = LoaderLimits(trainer)
        _lightning.skip_unused_hooks(self._patches, self)
        _lightning.override_setup_data(self._patches, trainer, self._setup_data)
        _lightning.override_train_loader(self._patches, trainer, self._adapt_loader)
        _lightning.override_closure(self._patches, trainer, self._make_closure)
        if pl_module.automatic_optimization:
            _lightning.override_optimizer_step(self._patches, trainer, self._optimizer_step)
            _lightning.override_step(self._patches, trainer, self._automatic_step)
        else:
            _lightning.override_step(self._patches, trainer, self._manual_step)
            _lightning.override_backward(self._patches, trainer, lambda loss: self._executor.weigh(loss))
        if self._clock_name != "updates":
            _lightning.override_scheduler_steps(self._patches, trainer, self._scheduler_indices)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Pick the learning-rate rule and look at the model, now that there are an optimizer and all layers."""
        if len(trainer.optimizers) != 1:
            raise ValueError(
                "AdaptiveBatchSize needs exactly one optimizer, but configure_optimizers returned "
                f"{len(trainer.optimizers)}; "
                "combine them into one with several parameter groups."
            )
        if not trainer.optimizers[0].param_groups:
            raise ValueError(
                "AdaptiveBatchSize needs an optimizer, but configure_optimizers returned None; return one."
            )
        self._controller.lr_scaling = resolve_lr_scaling(self._lr_scaling, trainer.optimizers[0], self._policy)
        self._run_state, self._has_run_state = RunState(trainer, pl_module), True
        self._executor = self._splitting.executor(
            trainer,
            pl_module,
            noise="probe" if self._dry_run and self._noise == "micro_batches" else self._noise,
            probes=self._dry_run,
            why_not=_MANUAL if self._manual else None,
        )
        if self._balance_ranks and trainer.world_size > 1 and not self._executor.recovers:
            raise ValueError(
                "balance_ranks=True needs passes in which no rank waits for another, to tell how fast each is; use DDP "
                'and micro_batch_size="auto", or leave it out.'
            )
        if "inner_products" not in getattr(self._policy, "needs", ()):  # which take parts
            self._executor.on_fit_start()
        if self._manual and "noise" in self._controller.needs:
            warnings.warn(
                "AdaptiveBatchSize cannot measure the gradient noise in manual optimization, where training_step makes "
                "the backward passes by itself; what needs it stays as it is, so choose a policy and an lr_scaling "
                "that do not.",
                stacklevel=2,
            )

    def _setup_data(self, original: Callable[[], None]) -> None:
        """Lightning's set-up of the loader; the limits of an epoch are kept here."""
        assert self._trainer is not None
        self._loaders.clear()
        self._limits.set_up(original)
        if self._loaders and self._books is not None:
            self._limits.restore_interval()
            self._books.announce()
            _lightning.put_back_later(self._patches, self._trainer, self._loaders)
        if _lightning.goes_on(self._trainer):
            self._go_on()

    def _adapt_loader(self, loader: object) -> object:
        """The user's training loader, made resizable."""
        assert self._trainer is not None
        trainer = self._trainer
        if not isinstance(loader, DataLoader):
            raise TypeError(
                f"AdaptiveBatchSize can resize a torch DataLoader, but the training data is a {type(loader).__name__}; "
                "wrap it in a DataLoader."
            )
        self._loaders.append(loader)
        if len(self._loaders) > 1:
            raise ValueError(
                "AdaptiveBatchSize resizes one training DataLoader, but there are several, whose samples have no batch "
                "size in common; let one DataLoader draw from all data sets (torch.utils.data.StackDataset pairs them, "
                "ConcatDataset chains them)."
            )
        if self._adapted is None or self._adapted[0] is not loader:  # one that is reloaded keeps its workers
            self._adapted = loader, self._made_adaptive(loader)
        adaptive = self._adapted[1]
        sampler = adaptive.batch_sampler
        assert isinstance(sampler, AdaptiveBatchSampler)
        if sampler is not self._sampler:  # a loader that was made adaptive by the user comes again as it is
            self._open_books(sampler)
        assert self._books is not None
        if self._clock is None:
            self._clock = self._make_clock(self._books.plain)
        if self._loaded is not None:
            self._take_up(self._loaded)
        if not self._dry_run and self.batch_size is not None:
            sampler.batch_size = max(1, self.batch_size // trainer.accumulate_grad_batches)
        if self._books.resized and not self._books.has_length:
            self._limits.look_for_the_end()
        return adaptive

    def _made_adaptive(self, loader: DataLoader[Any]) -> DataLoader[Any]:
        assert self._trainer is not None
        rank, shares = _lightning.data_share(self._trainer)
        adaptive = make_adaptive(loader, rank=rank, world_size=shares)
        sampler = adaptive.batch_sampler
        assert isinstance(sampler, AdaptiveBatchSampler)
        least = least_batch(self._trainer.lightning_module)
        sampler.least_tail = shares * least if least > 1 else 1
        self._order(loader, sampler)
        return adaptive

    def _order(self, loader: DataLoader[Any], sampler: AdaptiveBatchSampler) -> None:
        """Make the order follow from the seed, if there is one, and every rank have the same."""
        assert self._trainer is not None
        own = sampler.batch_sampler if isinstance(sampler, UserBatchSampler) else None
        if self._seed is not None and sampler.samples is not None:
            if own is None:
                sampler.sampler = SeededOrder(sampler.sampler, self._seed)
            elif hasattr(own, "sampler"):
                own.sampler = SeededOrder(own.sampler, self._seed)
            else:
                raise ValueError(
                    f"seed={self._seed} cannot order the batches of {type(own).__name__}, which has no sampler to "
                    "take them from; let it seed itself, and leave seed out."
                )
        if self._trainer.world_size == 1:
            return
        self._agreement = Agreement(self._trainer.strategy.root_device, sampler)
        self._controller.exchange = self._agreement.measurements
        self._controller.agree = self._agreement.proposal
        if self._balance_ranks and isinstance(sampler, Requests):
            raise ValueError(
                "balance_ranks=True needs data that is drawn by index, but an IterableDataset shares its samples out "
                "by itself; leave it out."
            )
        if isinstance(sampler, UserBatchSampler):
            sampler.send = broadcast
        elif not isinstance(loader.sampler, DistributedSampler):  # whose order follows from seed and epoch
            sampler.sampler = SharedOrder(sampler.sampler, self._trainer.global_rank)

    def _open_books(self, sampler: AdaptiveBatchSampler) -> None:
        assert self._trainer is not None
        trainer = self._trainer
        size = sampler.batch_size
        if self._updates == 0 and self._loaded is None:
            self._controller.reference_batch_size = None  # a tuner has made the loader anew since the last one
        if self._loaded is not None and self._controller.reference_batch_size is not None:
            # However the loader is batched on this number of ranks.
            size = max(1, self._controller.reference_batch_size // trainer.accumulate_grad_batches)
        whole, plain = (
            plain_epoch(
                sampler.samples,
                size,
                drop_last=sampler.drop_last,
                world_size=sampler.world_size,
                accumulate=trainer.accumulate_grad_batches,
                limit=limit,
            )
            for limit in (1.0, self._limits.limit)
        )
        self._set_bounds(plain, sampler)
        largest, samples = self._bounds[1], sampler.samples
        own = isinstance(sampler, UserBatchSampler)
        if sampler.drop_last and not own and samples and largest and largest > samples * plain.accumulate:
            raise ValueError(
                f"max_batch_size={largest} is more than the {samples} samples of an epoch, which drop_last=True would "
                "then drop; make it smaller."
            )
        self._sampler = sampler
        sampler.count_popped()
        self._books = EpochBooks(trainer, plain, sampler, self._limits.limit, whole=whole.batches)
        self._limits.check(plain, has_length=self._books.has_length)
        if isinstance(sampler, UserBatchSampler):
            sampler.on_length_change = self._books.sync

    def _make_clock(self, plain: PlainEpoch) -> SampleClock | GainClock:
        assert self._trainer is not None
        epochs = self._trainer.max_epochs
        steps = self._trainer.max_steps if self._trainer.max_steps >= 0 else math.inf
        clock: SampleClock | GainClock
        if self._clock_name == "gain":
            known = plain.updates is not None and epochs is not None and epochs > 0
            clock = GainClock(min(steps, plain.updates * epochs) if known else steps)  # type: ignore[operator]
        else:
            clock = SampleClock(steps)
        return clock

    def _set_bounds(self, plain: PlainEpoch, sampler: AdaptiveBatchSampler) -> None:
        controller = self._controller
        if controller.reference_batch_size is None:
            controller.reference_batch_size = plain.batch_size * plain.accumulate
            controller.batch_size = controller.reference_batch_size
        reference = controller.reference_batch_size
        smallest, largest = self._bounds
        if largest is None:
            tenth = _UNKNOWN_LENGTH_GROWTH * reference if plain.samples is None else plain.samples // _DATA_FRACTION
            largest = max(reference, smallest or 1, tenth)
        elif smallest is None and largest < reference:
            raise ValueError(
                f"max_batch_size={largest} is below the batch size {reference} that training starts with; raise it, or "
                "give the loader a smaller batch_size (and set min_batch_size to go below the start)."
            )
        # Under a limit in batches these may be of any size; otherwise no batch has more samples than an epoch.
        samples = sampler.samples if isinstance(self._limits.limit, int) else plain.samples
        self._most_samples = None if samples is None else max(samples, reference)
        if self._most_samples is not None:
            largest = min(largest, self._most_samples)
        controller.min_batch_size, controller.max_batch_size = smallest, largest
        controller.multiple_of = plain.accumulate

    # The loop

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Bring the loop's books in order before the first batch is fetched."""
        if self._books is None or self._sampler is None:
            raise ValueError(
                "AdaptiveBatchSize found no training DataLoader to resize; pass one DataLoader to fit, or return one "
                "from train_dataloader."
            )
        self._controller.check_optimizer(trainer.optimizers[0])
        self._watch_bare_steps(trainer.optimizers[0])
        reason = why_not_scaled(trainer.optimizers[0])
        if reason is not None and self._lr_scaling == "auto":
            self._say(trainer, f"the learning rate stays what it is at every batch size, since {reason}.")
        if self._reference == 1 and "noise" in self._controller.needs:
            self._say(
                trainer,
                "AdaptiveBatchSize cannot measure the gradient noise of updates of a single sample, so what needs it "
                "stays as it is; start with a batch_size of at least 2.",
            )
        if isinstance(self._policy, DontDecay | Seesaw) and not trainer.lr_scheduler_configs:
            self._say(
                trainer,
                f'policy="{self._policy.name}" grows the batch as the learning rate decays, but configure_optimizers '
                "returned no scheduler that would lower it; return one, unless the module does that by itself.",
            )
        largest, samples = self._bounds[1], self._most_samples
        if samples is not None and largest is not None and largest > samples:
            self._say(
                trainer, f"no batch has more than the {samples} samples of an epoch: max_batch_size is {samples}."
            )
        # MemoryMonitor measures every update.
        self._memory_is_logged = any(isinstance(c, MemoryMonitor) for c in _lightning.callbacks_of(trainer))
        self._books.sync()
        self._began = True

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """A new epoch: positions start from zero."""
        assert self._books is not None and self._clock is not None
        self._batches_popped = self._position = 0
        self._window.clear()
        self._run_state.results.clear()
        self._clock.start_epoch()
        self._books.start_epoch()
        self._interrupt_timing()

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Validation's time is not an update's."""
        self._interrupt_timing()

    def _interrupt_timing(self) -> None:
        self._update_mark = self._host_mark = None

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Learn how many samples the batch at hand really has."""
        assert self._books is not None
        self._run_state.results.join()
        self._draw_at_hand = draw = self._draw_of(trainer, batch)
        now = time.perf_counter()
        waited = 0.0 if self._host_mark is None else now - self._host_mark
        if self._update_mark is None:
            self._update_mark = mark(self._device)
        self._batch_started = now
        if not self._window:
            self._window_started = now - waited
            noise = not self._manual and "noise" in self._controller.needs
            self._executor.start_update(
                measure=noise and self._controller.measures_noise(self._updates, self._executor.noise_schedule),
                watch=noise,
                time_parts=self._rows >= UNEQUAL and self._controller.times_parts(self._updates),
            )
            self._window_rows = self._window_samples = 0
        self._window.append(draw)
        self._window_rows += self._rows
        self._window_samples += self._local_samples
        waited = waited if self._device.type == "cpu" else 0.0
        self._executor.start_batch(
            self._rows,
            waited,
            global_samples=max(self._drawn, self._rows),
            counted=None if self._batch_size_of is None else (self._local_samples, draw.size),
            sum_factor=self._sum_factor(),
        )
        if self._manual:
            self._executor.micro_batch_size = max(self._executor.micro_batch_size, self._rows)
        self._books.start_batch()

    def _sum_factor(self) -> float:
        """Factor on the loss of a batch, if it is a sum: the same for all samples of an update."""
        if self._dry_run or not self._executor.sums:
            return 1.0
        return self._controller.sum_factor(self._counts_for(self._window[0]) * self._plain.accumulate)

    def _draw_of(self, trainer: Trainer, batch: Any) -> Draw:
        """The record of the batch at hand; batches of ``None`` are counted by the loop, but start no hook."""
        draw = self._pop_draw(trainer)
        if draw is None:
            raise RuntimeError("the training loader yielded a batch that its batch sampler did not draw.")
        assert self._sampler is not None
        self._drawn, self._rows = draw.size, self._sampler.share(draw.size, draw.weights)
        self._local_samples = self._rows
        if self._batch_size_of is not None:
            self._position -= self._advances(trainer, draw)
            draw = self._counted_by_user(trainer, draw, batch)
            self._position += self._advances(trainer, draw)
        return draw

    def _pop_draw(self, trainer: Trainer) -> Draw | None:
        assert self._sampler is not None
        draw, draws = None, self._sampler.draws
        self._before = self._position
        while draws and self._batches_popped < _lightning.batches_started(trainer):
            draw = draws.popleft()
            self._batches_popped += 1
            self._position += self._advances(trainer, draw)
        return draw

    def _advances(self, trainer: Trainer, draw: Draw) -> int:
        """Samples that a batch takes the epoch on: a short one inside it is still a step of plain Lightning's."""
        return draw.size if _lightning.epoch_ends(trainer) else self._counts_for(draw)

    def _counts_for(self, *draws: Draw) -> int:
        """Samples that draws count for in the learning rate.

        Their own, except that one which is short of the size in force (an epoch's tail, a worker's, a bucket's) does
        not count for less than the user's own setting would have given it.
        """
        actual = sum(draw.size for draw in draws)
        if all(draw.size >= draw.nominal for draw in draws):
            return actual
        return max(actual, min(sum(draw.nominal for draw in draws), len(draws) * self._plain.batch_size))

    def _counted_by_user(self, trainer: Trainer, draw: Draw, batch: Any) -> Draw:
        """The draw with the user's count in the place of the loader's, in all that follows from it."""
        assert self._batch_size_of is not None
        self._local_samples = size = self._batch_size_of(batch)
        if trainer.world_size > 1:
            own = torch.tensor(size, device=trainer.strategy.root_device)
            counts = int(trainer.strategy.reduce(own, reduce_op="sum"))
            size = counts * self._executor.ranks // trainer.world_size  # under tensor parallelism some count alike
        if _has_rows(batch, self._local_samples):  # as after a collate function that leaves samples out
            self._rows, self._drawn = self._local_samples, size
        if self._before == 0 and not draw.last and not draw.nominal / 4 <= size <= draw.nominal * 4:
            raise ValueError(
                f"batch_size_of counts {size} in a batch of a loader with batch_size={draw.nominal}; let both count "
                "the same, by a batch sampler whose batch_size is in the unit of batch_size_of."
            )
        return draw._replace(size=size)

    def _make_closure(self, original: Callable[..., Any], kwargs: Any, optimizer: Any, batch_idx: int) -> Any:
        if not self._active:
            return original(kwargs, optimizer, batch_idx)
        return self._executor.make_closure(original, kwargs, optimizer, batch_idx)

    @property
    def _active(self) -> bool:
        """Not while a tuner has taken the callbacks away and runs the loop by itself."""
        return self._trainer is not None and self in _lightning.callbacks_of(self._trainer)

    def _optimizer_step(self, original: Callable[..., None], batch_idx: int, closure: Callable[..., Any]) -> None:
        assert self._trainer is not None
        if not self._active:
            original(batch_idx, closure)
            return
        last = _lightning.epoch_ends(self._trainer)
        self._counted, self._stepped, self._factor = self._counted_samples(last), True, 1.0
        self._lr = scheduled_lr(self._trainer.optimizers[0])
        try:
            original(batch_idx, closure)
        finally:
            self._end_bare_steps()
        if self._clock is not None:
            worth = gain(self._counted, self._reference, self._controller.rate_noise_scale)
            self._due = self._clock.advance(self._plain, self._position, worth, last=last)
            self._updated_at = _lightning.batches_started(self._trainer)

    def _automatic_step(self, original: Callable[..., Any], optimizer: Any, closure: Any, **others: Any) -> Any:
        """The step itself: what the module sets in its own ``optimizer_step`` around it is the schedule's."""
        if not self._active:
            return original(optimizer, closure, **others)

        def closure_and_rates() -> Any:
            result = closure()
            if self._scaled is not None:  # training_step may have set a rate
                self._scaled.take_over()
            return result

        return self._step(lambda: original(optimizer, closure_and_rates, **others), self._counted)

    def _manual_step(self, original: Callable[..., Any], optimizer: Any, closure: Any, **others: Any) -> Any:
        """A step of training_step's own; how many batches it makes for a step is its business, and part of the rate."""
        if not self._active:
            return original(optimizer, closure, **others)
        return self._step(lambda: original(optimizer, closure, **others), self._counted_manually)

    @property
    def _counted_manually(self) -> int:
        return round(self._counts_for(*self._window) / len(self._window))

    def _watch_bare_steps(self, optimizer: Any) -> None:
        for handle in (
            optimizer.register_step_pre_hook(self._before_bare_step),
            optimizer.register_step_post_hook(self._after_bare_step),
        ):
            self._patches.later(handle.remove)
        self._patches.later(self._end_bare_steps)

    def _before_bare_step(self, *_: Any) -> None:
        """A step that does not come by the strategy, as that of ``optimizer.optimizer`` in a module's own hook."""
        if self._bare_steps:
            self._bare_steps += 1  # a class's step calls that of the class above, which has the hook as well
        elif self._scaled is None and self._draw_at_hand is not None and self._active:
            self._bare_steps = 1
            self._set_rates(self._counted_manually if self._manual else self._counted)

    def _after_bare_step(self, *_: Any) -> None:
        if self._bare_steps:
            self._bare_steps -= 1
            if not self._bare_steps:
                self._put_rates_back()
                self._count_step()

    def _end_bare_steps(self) -> None:
        """After one that failed."""
        if self._bare_steps:
            self._bare_steps = 0
            self._put_rates_back()

    def _step(self, step: Callable[[], Any], counted: int) -> Any:
        """An optimizer step at the rate for ``counted`` samples."""
        self._set_rates(counted)
        try:
            result = step()
        finally:
            self._put_rates_back()
        self._count_step()
        return result

    def _set_rates(self, counted: int) -> None:
        assert self._trainer is not None
        optimizer = self._trainer.optimizers[0]
        self._stepped = True
        self._counted = counted
        self._lr = scheduled_lr(optimizer)
        self._factor, values = 1.0, None
        if not self._dry_run and has_lr(optimizer):
            self._factor = self._controller.lr_factor(counted, self._lr)
            values = self._controller.group_values(counted, self._factor)
        self._scaled = Scaled(optimizer, self._factor, values)

    def _put_rates_back(self) -> None:
        scaled, self._scaled = self._scaled, None
        if scaled is not None:
            scaled.put_back()

    def _count_step(self) -> None:
        assert self._trainer is not None
        counted = self._reference if self._dry_run else self._counted
        self._controller.count_step(self._trainer.optimizers[0], counted)

    @property
    def _plain(self) -> PlainEpoch:
        assert self._books is not None
        return self._books.plain

    @property
    def _reference(self) -> int:
        assert self._controller.reference_batch_size is not None
        return self._controller.reference_batch_size

    def _counted_samples(self, ends: bool) -> int:
        """Samples that scale the learning rate; a window that the epoch's end cuts short counts as a tail."""
        counted = self._counts_for(*self._window)
        if self._trainer is not None and self._trainer.accumulate_grad_batches != self._plain.accumulate:
            # As StochasticWeightAveraging does, whose pass over all the data is no larger batch.
            return round(counted * self._plain.accumulate / len(self._window))
        missing = self._plain.accumulate - len(self._window)
        if ends and missing:
            return max(counted, min(self._window[-1].nominal * self._plain.accumulate, self._reference))
        return counted

    def _scheduler_indices(self, plateau: bool) -> Iterator[int]:
        """Batch indices at which due scheduler steps would have been taken; see ``SampleClock``."""
        assert self._trainer is not None
        if not self._active:
            return iter([_lightning.batches_started(self._trainer)])
        return iter(self._due if self._updated_at == _lightning.batches_started(self._trainer) else [])

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """After an update: record it, decide, resize."""
        assert self._books is not None
        last = _lightning.epoch_ends(trainer)
        if batch is None:
            self._pop_draw(trainer)
        if self._stepped:
            self._end_update(trainer, outputs, last)
            self._stepped = False
        self._books.end_batch(self._before, self._position, last=last)
        self._run_state.results.join()
        self._draw_at_hand = None
        self._host_mark = time.perf_counter()

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """The sampler's next draw starts another epoch; checkpoints of the epoch's end are saved after this."""
        if self._sampler is not None:
            self._sampler.end_epoch()
        self._run_state.results.place()
        _lightning.end_restart(trainer)

    def _end_update(self, trainer: Trainer, outputs: Any, last: bool) -> None:
        samples = sum(draw.size for draw in self._window)
        nominal = self._window[-1].nominal * self._plain.accumulate
        self._updates += 1
        self._samples += samples
        stop, started = mark(self._device), self._update_mark
        self._update_mark = stop
        measurement = Measurement(
            update=self._updates,
            epoch=trainer.current_epoch,
            samples=self._samples,
            batch_size=samples,
            reference_batch_size=self._reference,
            lr=self._lr,
            loss=_loss(outputs, self._plain.accumulate / self._executor.samples_of_loss),
            seconds=math.nan if started is None or self._executor.disturbed else Elapsed(started, stop),
            part_sq_norms=self._executor.part_sq_norms,
            part_sizes=self._in_samples(self._executor.part_sizes),
            pass_sizes=self._in_samples(self._executor.pass_sizes),
            pass_seconds=self._executor.pass_seconds,
            sq_norm=self._executor.sq_norm,
        )
        seconds = time.perf_counter() - self._window_started
        self._window.clear()
        decision = self._controller.observe(measurement)
        if decision is not None:
            self._apply(trainer, decision, last=last)
        self._balance(trainer)
        self._note(trainer)
        self._record(trainer, samples, nominal, seconds)

    def _balance(self, trainer: Trainer) -> None:
        """New shares for the ranks, once after each decision."""
        if not self._balance_ranks or self._agreement is None or not self._agreement.seconds_per_sample:
            return
        assert self._sampler is not None
        times, self._agreement.seconds_per_sample = self._agreement.seconds_per_sample, []
        alike = (1,) * len(times)
        weights = tuple(balanced_weights(times, self._sampler.weights or alike))
        if weights != (self._sampler.weights or alike):
            self._sampler.weights = weights
            shares = ", ".join(f"{weight / sum(weights):.1%}" for weight in weights[:_NAMED_SHARES])
            more = ", ..." if len(weights) > _NAMED_SHARES else ""
            self._remark(trainer, f"shares of the ranks in a batch: {shares}{more}")

    def _in_samples(self, rows: list[int]) -> list[int]:
        """Rows of a batch as what the user counts in it."""
        if self._window_samples == self._window_rows:
            return rows
        return [max(1, round(n * self._window_samples / self._window_rows)) for n in rows]

    def _apply(self, trainer: Trainer, decision: Decision, *, last: bool) -> None:
        assert self._sampler is not None and self._books is not None
        if self._dry_run:
            self._controller.batch_size = decision.previous
            if self.history.changes and self.history.changes[-1].batch_size == decision.batch_size:
                return  # said before
        else:
            self._sampler.batch_size = decision.batch_size // self._plain.accumulate
            if not last:  # an epoch that is over is as long as it was
                self._books.sync()
        self.history.changes.append(self._change(trainer, decision.batch_size, decision.previous, decision.reason))
        self._say(trainer, ("batch size would change, " if self._dry_run else "batch size ") + decision.reason)

    def _note(self, trainer: Trainer) -> None:
        for failure in self._executor.failures:
            self._remark(trainer, failure)
        self._executor.failures.clear()
        note = self._controller.note
        if note is None or note == self._noted:
            return
        self._noted = note
        self._remark(trainer, note)

    def _remark(self, trainer: Trainer, sentence: str) -> None:
        size = self._controller.batch_size or self._reference
        self.history.notes.append(self._change(trainer, size, size, sentence))
        self._say(trainer, sentence)

    def _say(self, trainer: Trainer, sentence: str) -> None:
        if self._verbose and trainer.is_global_zero:
            _lightning.logger_of(trainer).info(sentence)

    def _change(self, trainer: Trainer, size: int, previous: int, reason: str) -> Change:
        return Change(self._updates, trainer.current_epoch, self._samples, size, previous, reason)

    def _record(self, trainer: Trainer, samples: int, nominal: int, seconds: float) -> None:
        self.history.add(
            Update(
                step=self._updates,
                epoch=trainer.current_epoch,
                samples=self._samples,
                batch_size=samples,
                micro_batch_size=self._executor.micro_batch_size,
                lr_scale=self._factor,
                noise_scale=self._controller.noise_scale,
                throughput=samples / seconds,
                seconds=seconds,
            )
        )
        self._nominal = nominal
        if not self._memory_is_logged:
            self._note_memory()
        self._log(self._values)

    def _values(self) -> dict[str, float]:
        """What is logged for the last update."""
        noise_scale, grad_sq_norm, grad_variance = self._controller.estimates
        update = self.history.updates[-1]
        values = {
            "adaptive_batch/batch_size": float(self._nominal),  # an epoch's tail is in the history, not in the curve
            "adaptive_batch/micro_batch_size": float(update.micro_batch_size),
            "adaptive_batch/noise_scale": noise_scale,
            "adaptive_batch/grad_sq_norm": grad_sq_norm,
            "adaptive_batch/grad_variance": grad_variance,
            "adaptive_batch/lr_scale": update.lr_scale,
            "adaptive_batch/throughput": update.throughput,
            "adaptive_batch/samples": float(update.samples),
        }
        return values if self._memory_is_logged else {**values, "adaptive_batch/peak_memory": self._last_memory}

    def _note_memory(self) -> None:
        """Bytes of the largest measured pass; the process's resident size where no pass is measured."""
        if self._executor.peak_memory > 0:
            self._last_memory = self._executor.peak_memory
        elif self._micro_batches.budget is None and self._updates % _MEMORY_EVERY == 1:
            self._last_memory = resident_bytes()

    # The end, however it comes

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Lightning calls no ``teardown`` after an exception."""
        self._began = False
        self._patches.undo()
        self.history.close()

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Give the loop back as it was."""
        self._patches.undo()
        self.history.close()

    # Checkpoints

    def state_dict(self) -> dict[str, Any]:
        """Counts, controller, sampler, clock, history and the state of the run, as plain numbers and tensors.

        A batch that the loop is in the middle of counts as still to come.
        """
        state: dict[str, Any] = {
            "updates": self._updates,
            "samples": self._samples,
            "position": self._position if self._draw_at_hand is None else self._before,
            "controller": self._controller.state_dict(),
            "micro_batches": self._micro_batches.state_dict(),
            "history": self.history.state_dict(),
            "noted": self._noted,
            "seed": self._seed,
        }
        if self._trainer is not None and self._sampler is not None and self._has_run_state:
            state |= self._loop_state(self._trainer)
        return state

    def _loop_state(self, trainer: Trainer) -> dict[str, Any]:
        assert self._sampler is not None and self._books is not None and self._clock is not None
        state = {
            "clock": self._clock.state_dict(),
            "books": self._books.state_dict(),
            "due": self._due if self._updated_at == _lightning.batches_finished(trainer) else [],
            "inside_batch": self._draw_at_hand is not None,
            "validation_follows": _lightning.validation_follows(trainer),
            "window": [],
            "ranks": [self._own_state()],
        }
        if self._draw_at_hand is not None:
            self._sampler.draws.appendleft(self._draw_at_hand)
        state["sampler"] = self._sampler.state_dict()
        if self._draw_at_hand is not None:
            self._sampler.draws.popleft()
        elif self._window:
            state["window"] = [list(draw) for draw in self._window]
            state["gradients"] = self._run_state.gradients()
        return state

    def _own_state(self) -> dict[str, Any]:
        """What is each rank's own."""
        own = {"pending": self._controller.pending_state(), "micro_batches": self._micro_batches.state_dict()}
        return {**self._run_state.state_dict(), **own}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Put back what :meth:`state_dict` gave; what belongs to the loop waits until it goes on."""
        self._controller.load_state_dict(state_dict["controller"])
        self.history.load_state_dict(state_dict["history"])
        self._micro_batches.load_state_dict(state_dict["micro_batches"])
        self._updates, self._samples = state_dict["updates"], state_dict["samples"]
        self._position, self._noted = state_dict["position"], state_dict["noted"]
        self._loaded = state_dict if "sampler" in state_dict else None
        if self._books is not None and self._controller.reference_batch_size is None:
            assert self._sampler is not None
            self._set_bounds(self._plain, self._sampler)  # saved before there was a loader, as tuners do

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """What is each rank's own goes into the checkpoint; one that comes of an exception is made by whoever can."""
        _lightning.remove_loader_states(checkpoint)
        if self._scaled is not None:  # the checkpoint is made inside an update, as by a handler of a signal
            saved = checkpoint.get("optimizer_states") or [{}]  # which some strategies give to one rank alone
            for group, own in zip(saved[0].get("param_groups", ()), self._scaled.own, strict=False):
                group |= own
        state = checkpoint["callbacks"].get(self.state_key, {})
        if trainer.world_size > 1 and "ranks" in state and self._began:
            state["ranks"] = gather(state["ranks"][0])

    def _take_up(self, state: Mapping[str, Any]) -> None:
        """The loader's side of a checkpoint."""
        assert self._clock is not None
        if state["sampler"]["consumed"] and state["seed"] != self._seed:
            raise ValueError(
                f"seed={self._seed} gives the samples another order than the checkpoint's seed={state['seed']}, in the "
                "middle of an epoch; pass that seed, or resume from a checkpoint of an epoch's end."
            )
        self._load_sampler(state)
        clock = state["clock"]
        if clock.keys() == self._clock.state_dict().keys():
            self._clock.load_state_dict(clock)
        else:  # of another schedule_clock
            self._clock.go_on(self._plain, state["position"], clock.get("total", clock["taken"]))
        self._taken_up = True

    def _load_sampler(self, state: Mapping[str, Any]) -> None:
        assert self._sampler is not None
        self._sampler.load_state_dict(state["sampler"])
        if not self._balance_ranks:
            self._sampler.weights = None
        if self._dry_run:  # which does not go on with what another run has changed
            self._sampler.batch_size = self._plain.batch_size
            self._controller.batch_size = self._reference

    def _go_on(self) -> None:
        """From a checkpoint: before the loop looks where it is, and again when it is there."""
        assert self._trainer is not None
        inside, state = _lightning.inside_epoch(self._trainer), self._loaded
        if self._began and state is None:
            self._join(inside)
        elif self._began and state is not None:
            self._loaded = None
            self._go_on_from(state, inside)
        elif state is not None:
            self._find_the_place(state, inside)

    def _find_the_place(self, state: Mapping[str, Any], inside: bool) -> None:
        assert self._trainer is not None and self._sampler is not None and self._books is not None
        if not self._taken_up:  # strategies that restore late have asked for the loader before
            self._open_books(self._sampler)
            self._take_up(state)
            self._books.announce()
            _lightning.renew_iterator(self._trainer)
        self._run_state.restore_callback_metrics(state["ranks"][0])
        (_lightning.count_finished_batch if inside else _lightning.finish_epoch)(self._trainer)

    def _go_on_from(self, state: Mapping[str, Any], inside: bool) -> None:
        assert self._trainer is not None and self._sampler is not None and self._books is not None
        trainer, ranks = self._trainer, state["ranks"]
        if not inside:
            self._load_sampler(state)  # an iterator that is thrown away has drawn from it
            self._sampler.end_epoch()
        same_ranks = len(ranks) == trainer.world_size
        own = ranks[min(trainer.global_rank, len(ranks) - 1)]
        self._controller.load_pending(own["pending"], whole=same_ranks)
        if same_ranks:
            self._micro_batches.load_state_dict(own["micro_batches"])
        if trainer.global_rank < len(ranks):
            self._run_state.restore(ranks[trainer.global_rank], inside_epoch=inside and same_ranks)
        if not inside:
            return
        if not same_ranks:
            self._say(trainer, _OTHER_RANKS.format(len(ranks), trainer.world_size))
        if isinstance(self._sampler, Requests):
            warnings.warn(_NO_POSITION, stacklevel=2)
        self._batches_popped = _lightning.batches_finished(trainer)
        self._due, self._updated_at = state["due"], self._batches_popped
        self._go_on_in_window(state, whole=same_ranks and trainer.world_size == 1)
        if self._batches_popped and not state["inside_batch"]:
            _lightning.finish_batch(trainer, validate=state["validation_follows"])
            if _lightning.epoch_ends(trainer):
                self._run_state.results.place()
        self._books.go_on(state["books"])

    def _go_on_in_window(self, state: Mapping[str, Any], *, whole: bool) -> None:
        """In the middle of an update that is being accumulated; its noise is not measured."""
        self._window = [Draw(*draw) for draw in state["window"]]
        if not self._window:
            return
        self._window_started, self._window_rows = time.perf_counter(), sum(draw.size for draw in self._window)
        self._window_samples = self._window_rows
        self._executor.start_update(measure=False)
        if whole:
            self._run_state.restore_gradients(state["gradients"])
        else:
            warnings.warn(_NO_GRADIENTS, stacklevel=2)

    def _join(self, inside: bool) -> None:
        """Go on from a checkpoint that was made without this callback."""
        assert self._trainer is not None and self._sampler is not None and self._clock is not None
        trainer, words = self._trainer, ""
        if inside and self._books is not None:
            self._batches_popped = _lightning.batches_finished(trainer)
            self._position = self._sampler.skip_batches(self._batches_popped)
            self._books.go_on({"validated": False})
            _lightning.renew_iterator(trainer)
            words = (
                f", and the epoch goes on after {self._position} samples in an order that may not be the one "
                "that it began with"
            )
        self._clock.go_on(self._plain, self._position, trainer.global_step)
        self._say(
            trainer,
            f"the checkpoint was made without AdaptiveBatchSize: the batch size starts from the loader's own, "
            f"{self._reference}{words}.",
        )


def _check_supported(trainer: Trainer, pl_module: LightningModule) -> None:
    if "dataloader_iter" in inspect.signature(pl_module.training_step).parameters:
        raise ValueError(
            "AdaptiveBatchSize cannot follow a training_step that takes dataloader_iter; let it take a batch instead."
        )
    if trainer.strategy.handles_gradient_accumulation:
        raise ValueError(
            f"AdaptiveBatchSize cannot work with {type(trainer.strategy).__name__}, which accumulates gradients by "
            "itself; use another strategy."
        )


def _check_accumulation(trainer: Trainer) -> None:
    if any(set(scheduling.values()) != {1} for scheduling in _lightning.accumulation_schedules(trainer)):
        raise ValueError(
            "GradientAccumulationScheduler and AdaptiveBatchSize would both set the samples of an update; leave one of "
            "them out, or accumulate by Trainer(accumulate_grad_batches=...)."
        )


def _has_rows(batch: Any, rows: int) -> bool:
    try:
        return count_samples(batch) == rows
    except TypeError:
        return False


def _loss(outputs: Any, factor: float) -> Tensor | float:
    """What ``training_step`` returned, which Lightning has divided by the batches of an update, times ``factor``."""
    loss = outputs.get("loss") if isinstance(outputs, Mapping) else outputs
    if not isinstance(loss, Tensor):
        return math.nan
    return loss if factor == 1 else loss * factor
