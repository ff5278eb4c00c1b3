"""The only module that touches Lightning's private names.

Each function says which private name it uses; all were read and run with pytorch-lightning and lightning
2.6.6. Everything is reached through the trainer's own objects, never through a class imported from one
of the two packages, so the same code serves ``pytorch_lightning`` and ``lightning.pytorch``.
"""

from __future__ import annotations

import importlib
import logging
import math
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from adaptive_batch.layers import batch_dependent_layers

if TYPE_CHECKING:
    from pytorch_lightning import Callback as CallbackBase
    from pytorch_lightning import Trainer

    from adaptive_batch.callbacks._parts import Parts
else:

    def _callback_bases() -> tuple[type, ...]:
        """The Callback class of each Lightning package that is installed."""
        bases = []
        for name in ("pytorch_lightning", "lightning.pytorch"):
            try:
                bases.append(importlib.import_module(name).Callback)
            except ImportError:
                continue
        return tuple(dict.fromkeys(bases))

    CallbackBase = type("CallbackBase", _callback_bases(), {})

__all__ = ["CallbackBase", "Patches"]

NEVER = 2**62
"""A ``val_check_batch`` that no batch index reaches."""


class Patches:
    """Overrides of attributes on instances, all taken back together."""

    def __init__(self) -> None:
        self._undo: list[Callable[[], None]] = []

    def override(self, target: Any, name: str, make: Callable[[Any], Any]) -> None:
        """Set ``target.name`` to ``make(original)``."""
        original = getattr(target, name)
        own = target.__dict__.get(name, None)
        target.__dict__[name] = make(original)
        if own is None:
            self._undo.append(lambda: target.__dict__.pop(name, None))
        else:
            self._undo.append(lambda: target.__dict__.__setitem__(name, own))

    def later(self, undo: Callable[[], None]) -> None:
        """Do this too when everything is taken back."""
        self._undo.append(undo)

    def undo(self) -> None:
        """Put back every original, the last override first."""
        while self._undo:
            self._undo.pop()()


_HOOKS_OF_AN_UPDATE = ("on_before_zero_grad", "on_before_backward", "on_after_backward", "on_before_optimizer_step")


def skip_unused_hooks(patches: Patches, callback: Any) -> None:
    """Spare every update the calls of those hooks that do nothing: Lightning passes over one that cannot be called."""
    for name in _HOOKS_OF_AN_UPDATE:
        if getattr(type(callback), name) is getattr(CallbackBase, name) and name not in vars(callback):
            patches.override(callback, name, lambda _: None)


def logger_of(trainer: Trainer) -> logging.Logger:
    """The logger of the Lightning package that the trainer is from, whose messages its users see."""
    return logging.getLogger(f"{_package_of(trainer)}.adaptive_batch")


def _package_of(trainer: Trainer) -> str:
    modules = (cls.__module__ for cls in type(trainer).__mro__)
    package = next(m for m in modules if m.startswith(("pytorch_lightning.", "lightning.pytorch.")))
    return "pytorch_lightning" if package.startswith("pytorch_lightning") else "lightning.pytorch"


def override_train_loader(patches: Patches, trainer: Trainer, transform: Callable[[Any], Any]) -> None:
    """Give every training loader to ``transform`` before Lightning adds its own sampler to it.

    Private: ``trainer._data_connector._prepare_dataloader`` (2.0 to 2.6).
    """

    def make(original: Callable[..., Any]) -> Callable[..., Any]:
        def prepare(dataloader: object, shuffle: bool, mode: Any) -> object:
            if str(getattr(mode, "value", mode)) != "train":
                return original(dataloader, shuffle=shuffle, mode=mode)
            return transform(dataloader)

        return prepare

    patches.override(trainer._data_connector, "_prepare_dataloader", make)


def override_setup_data(patches: Patches, trainer: Trainer, setup_data: Callable[..., None]) -> None:
    """Set the training data up by ``setup_data(original)``.

    Private: ``fit_loop.setup_data`` (2.0 to 2.6).
    """

    def make(original: Callable[[], None]) -> Callable[[], None]:
        return lambda: setup_data(original)

    patches.override(trainer.fit_loop, "setup_data", make)


def override_closure(patches: Patches, trainer: Trainer, make_closure: Callable[..., Any]) -> None:
    """Build the closure of an update by ``make_closure(original, kwargs, optimizer, batch_idx)``.

    Private: ``automatic_optimization._make_closure`` (2.0 to 2.6).
    """
    loop = trainer.fit_loop.epoch_loop.automatic_optimization

    def make(original: Callable[..., Any]) -> Callable[..., Any]:
        return lambda kwargs, optimizer, batch_idx: make_closure(original, kwargs, optimizer, batch_idx)

    patches.override(loop, "_make_closure", make)


def override_optimizer_step(patches: Patches, trainer: Trainer, step: Callable[..., None]) -> None:
    """Run each optimizer step by ``step(original, batch_idx, closure)``.

    Private: ``automatic_optimization._optimizer_step`` (2.0 to 2.6).
    """
    loop = trainer.fit_loop.epoch_loop.automatic_optimization

    def make(original: Callable[..., None]) -> Callable[..., None]:
        return lambda batch_idx, closure: step(original, batch_idx, closure)

    patches.override(loop, "_optimizer_step", make)


def override_step(patches: Patches, trainer: Trainer, step: Callable[..., Any]) -> None:
    """Take each step of an optimizer by ``step(original, optimizer, closure, **others)``.

    Every ``optimizer.step`` comes by here: the loop's, inside of the hook ``optimizer_step``, and those that a
    LightningModule takes through ``self.optimizers()`` in manual optimization.
    """

    def make(original: Callable[..., Any]) -> Callable[..., Any]:
        return lambda optimizer, closure, **others: step(original, optimizer, closure, **others)

    patches.override(trainer.strategy, "optimizer_step", make)


def override_backward(patches: Patches, trainer: Trainer, weigh: Callable[[Tensor], Tensor]) -> None:
    """Let every backward pass of the strategy, also one that training_step makes, start from ``weigh(loss)``."""

    def make(original: Callable[..., None]) -> Callable[..., None]:
        return lambda loss, *others, **options: original(weigh(loss), *others, **options)

    patches.override(trainer.strategy, "backward", make)


def override_scheduler_steps(patches: Patches, trainer: Trainer, indices: Callable[[bool], Iterator[int]]) -> None:
    """Step the per-update schedulers once for each batch index that ``indices(plateau)`` gives.

    Lightning compares a scheduler's ``frequency`` with the batch index, so the index is set for the call. Where it has
    no such scheduler there is nothing to repeat, however many steps an update stands for.

    Private: ``epoch_loop._update_learning_rates`` (2.0 to 2.6).
    """
    loop = trainer.fit_loop.epoch_loop

    def concerned(plateau: bool) -> bool:
        configs = trainer.lr_scheduler_configs
        return any(c.interval == "step" and c.reduce_on_plateau == plateau for c in configs)

    def make(original: Callable[..., None]) -> Callable[..., None]:
        def update(interval: str, update_plateau_schedulers: bool) -> None:
            if interval != "step" or not concerned(update_plateau_schedulers):
                original(interval=interval, update_plateau_schedulers=update_plateau_schedulers)
                return
            for index in indices(update_plateau_schedulers):
                with _batch_index(loop, index):
                    original(interval=interval, update_plateau_schedulers=update_plateau_schedulers)

        return update

    patches.override(loop, "_update_learning_rates", make)


@contextmanager
def _batch_index(loop: Any, index: int) -> Iterator[None]:
    current = loop.batch_progress.current
    ready, current.ready = current.ready, index
    try:
        yield
    finally:
        current.ready = ready


def epoch_ends(trainer: Trainer) -> bool:
    """Whether the batch at hand is the epoch's last. Private: ``_num_ready_batches_reached``."""
    return bool(trainer.fit_loop.epoch_loop._num_ready_batches_reached())


def accumulating(trainer: Trainer) -> bool:
    """Whether the batch at hand makes no update of its own. Private: ``_should_accumulate``."""
    return trainer.accumulate_grad_batches > 1 and bool(trainer.fit_loop._should_accumulate())


def batches_started(trainer: Trainer) -> int:
    """Batches of this epoch handed to the loop so far, the one at hand included."""
    return int(trainer.fit_loop.epoch_loop.batch_progress.current.ready)


def step_kwargs(trainer: Trainer, batch: Any, batch_idx: int) -> Mapping[str, Any]:
    """The arguments of ``training_step`` for a batch. Private: ``epoch_loop._build_kwargs`` (2.0 to 2.6)."""
    kwargs: Mapping[str, Any] = trainer.fit_loop.epoch_loop._build_kwargs(OrderedDict(), batch, batch_idx)
    return kwargs


def callbacks_of(trainer: Trainer) -> list[Any]:
    """The trainer's callbacks, which its own types do not know of."""
    callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined]
    return callbacks


def accumulation_schedules(trainer: Trainer) -> Iterator[Mapping[int, int]]:
    """What Lightning's GradientAccumulationScheduler callbacks are to do."""
    for callback in callbacks_of(trainer):
        if "GradientAccumulationScheduler" in (cls.__name__ for cls in type(callback).__mro__):
            yield callback.scheduling


def samples_of(trainer: Trainer, batch: Any) -> int:
    """Samples of a batch as Lightning finds them: the rows of its first tensor.

    Private: ``utilities.data._extract_batch_size`` (2.0 to 2.6).
    """
    data = importlib.import_module(f"{_package_of(trainer)}.utilities.data")
    found = (rows for rows in data._extract_batch_size(batch) if rows is not None)
    samples = next(found, None)
    if samples is None:
        raise ValueError(
            f"a batch of type {type(batch).__name__} has no tensor to count its samples by; pass "
            "batch_size_of=lambda batch: ..."
        )
    return int(samples)


def total_batches_started(trainer: Trainer) -> int:
    """Batches of the run handed to the loop so far, the one at hand included."""
    return int(trainer.fit_loop.epoch_loop.batch_progress.total.ready)


def set_epoch_length(trainer: Trainer, batches: int) -> None:
    """Tell every part of the loop that keeps its own copy how many batches this epoch has.

    Any one left behind loses data or validation silently.
    Private: ``fit_loop._combined_loader`` and its ``_iterator.limits``, ``fit_loop._data_fetcher.length``.
    """
    fit_loop = trainer.fit_loop
    combined = fit_loop._combined_loader
    if combined is not None:
        combined.limits = [batches] * len(combined.flattened)
        if combined._iterator is not None:
            combined._iterator.limits = combined.limits
    fit_loop.max_batches = batches
    fetcher = fit_loop._data_fetcher
    if fetcher is not None and fetcher.length is not None:
        fetcher.length = batches
    _set_progress_bar_total(trainer, batches)


def set_most_batches(trainer: Trainer, batches: float) -> None:
    """Where the data has no length: end the epoch after so many batches at the latest."""
    trainer.fit_loop.max_batches = batches


def lift_limits(trainer: Trainer) -> None:
    """Where the data has no length: let Lightning keep one batch ahead, so that the last one is known when it comes.

    It does so by itself unless there is a limit in batches, which the data may not reach.
    Private: ``fit_loop._combined_loader`` and its ``_iterator.limits``.
    """
    combined = trainer.fit_loop._combined_loader
    if combined is not None:
        combined.limits = [math.inf] * len(combined.flattened)
        if combined._iterator is not None:
            combined._iterator.limits = combined.limits


def start_prefetching(trainer: Trainer) -> None:
    """Inside an epoch: fetch the batch ahead that Lightning would have fetched had there been no limit.

    Private: ``fit_loop._data_fetcher``, its ``length``, its ``batches`` and its base class's ``__next__``.
    """
    fetcher: Any = trainer.fit_loop._data_fetcher
    if fetcher is None or fetcher.length is None:
        return
    fetcher.length = None
    try:
        fetcher.batches.append(super(type(fetcher), fetcher).__next__())
    except StopIteration:
        mark_last_batch(trainer)


def mark_last_batch(trainer: Trainer) -> None:
    """The batch at hand is the epoch's last. Private: ``epoch_loop.batch_progress`` (2.0 to 2.6)."""
    trainer.fit_loop.epoch_loop.batch_progress.is_last_batch = True


def put_back_later(patches: Patches, trainer: Trainer, loaders: list[Any]) -> None:
    """Lightning exchanges the loaders inside a ``CombinedLoader`` that the user gave; undo that after the run.

    Private: ``fit_loop._data_source`` and ``fit_loop._combined_loader`` (2.0 to 2.6).
    """
    given = trainer.fit_loop._data_source.instance
    if given is trainer.fit_loop._combined_loader:
        before = list(loaders)
        patches.later(lambda: setattr(given, "flattened", before))


def _set_progress_bar_total(trainer: Trainer, batches: int) -> None:
    bar: Any = trainer.progress_bar_callback
    tqdm_bar = getattr(bar, "_train_progress_bar", None)
    if tqdm_bar is not None:
        tqdm_bar.total = batches
    rich_id, progress = getattr(bar, "train_progress_bar_id", None), getattr(bar, "progress", None)
    if rich_id is not None and progress is not None:
        progress.update(rich_id, total=batches)


def validate_now(trainer: Trainer, now: bool) -> None:
    """Make the loop validate after the batch at hand, or not."""
    per_epoch = trainer.check_val_every_n_epoch is not None
    index = batches_started(trainer) if per_epoch else total_batches_started(trainer)
    trainer.val_check_batch = index if now else NEVER


def validates_by_time(trainer: Trainer) -> bool:
    """Whether ``val_check_interval`` is a duration. Private: ``trainer._val_check_time_interval`` (2.6)."""
    return getattr(trainer, "_val_check_time_interval", None) is not None


def amp_scale(trainer: Trainer) -> Tensor | float:
    """Factor that automatic mixed precision puts on the loss. Private: ``GradScaler._scale``."""
    scaler = getattr(trainer.precision_plugin, "scaler", None)
    if scaler is None or not scaler.is_enabled():
        return 1.0
    scale: Tensor | None = scaler._scale
    return float(scaler.get_scale()) if scale is None else scale  # the tensor, so that nothing waits for the device


# Going on from a checkpoint


def goes_on(trainer: Trainer) -> bool:
    """Whether the loops have taken their progress from a checkpoint. Private: ``_loaded_from_state_dict``."""
    return bool(trainer.fit_loop._loaded_from_state_dict)


def inside_epoch(trainer: Trainer) -> bool:
    """Whether an epoch has started and is not over."""
    current: Any = trainer.fit_loop.epoch_progress.current
    return bool(current.processed < current.started)


def batches_finished(trainer: Trainer) -> int:
    """Batches of this epoch that the loop has been through."""
    current: Any = trainer.fit_loop.epoch_loop.batch_progress.current
    return int(current.processed)


def _is_counted(trainer: Trainer) -> bool:
    """Whether the last batch that the loop has been through counts as completed, as it does after its hooks."""
    current: Any = trainer.fit_loop.epoch_loop.batch_progress.current
    return bool(current.completed >= current.processed)


def count_finished_batch(trainer: Trainer) -> None:
    """A checkpoint of ``on_train_batch_end`` was taken just before the loop counted its batch as completed.

    Counted here, Lightning does not take a checkpoint of an epoch's last batch for one of the epoch's end, which
    would leave out the end's hooks and its validation. Private: ``epoch_loop.batch_progress`` (2.0 to 2.6).
    """
    if not _is_counted(trainer):
        trainer.fit_loop.epoch_loop.batch_progress.increment_completed()


def validation_follows(trainer: Trainer) -> bool:
    """In ``on_train_batch_end``: whether validation comes next. Private: ``epoch_loop._should_check_val_fx``."""
    fetcher: Any = trainer.fit_loop._data_fetcher
    return not _is_counted(trainer) and bool(trainer.fit_loop.epoch_loop._should_check_val_fx(fetcher))


def finish_batch(trainer: Trainer, *, validate: bool) -> None:
    """What the loop does after a batch, the last before the checkpoint: validation, schedulers that wait for it.

    Private: ``epoch_loop.on_advance_end`` and ``epoch_loop._should_check_val_fx`` (2.0 to 2.6).
    """
    loop: Any = trainer.fit_loop.epoch_loop
    loop.val_loop.restarting = False
    loop.__dict__["_should_check_val_fx"] = lambda _: validate
    try:
        loop.on_advance_end(trainer.fit_loop._data_fetcher)
    finally:
        del loop.__dict__["_should_check_val_fx"]


def finish_epoch(trainer: Trainer) -> None:
    """The checkpoint is of an epoch's end: do what follows it, and go on as the uninterrupted loop does.

    Otherwise the next epoch would use the iterator that was made before the random states were put back, and with
    ``max_steps`` Lightning takes the epoch before for one that is not over.
    Private: ``_restarting`` and ``_resuming_from_checkpoint`` of the loops (2.5 and 2.6 have the second).
    """
    fit_loop: Any = trainer.fit_loop
    for loop in (fit_loop, fit_loop.epoch_loop, fit_loop.epoch_loop.val_loop):
        loop._restarting = loop._resuming_from_checkpoint = False
    progress = fit_loop.epoch_progress.current
    if progress.completed < progress.processed:
        fit_loop.epoch_loop.update_lr_schedulers("epoch", update_plateau_schedulers=True)


def end_restart(trainer: Trainer) -> None:
    """At the end of the epoch that went on: from here on nothing is special.

    Lightning would hold schedulers back that wait for a metric, which its checkpoints lack, and take an epoch that
    had no batch left for a restart of the next. Private: ``_restarting`` and ``on_iteration_done`` of the loops.
    """
    trainer.fit_loop._restarting = False
    trainer.fit_loop.epoch_loop.on_iteration_done()


def remove_loader_states(checkpoint: dict[str, Any]) -> None:
    """Take the training loader's own state out of a checkpoint: it would not load without the callback.

    Private: ``combined_loader`` in the state of ``fit_loop`` (2.2 to 2.6).
    """
    checkpoint["loops"]["fit_loop"]["state_dict"].pop("combined_loader", None)


def renew_iterator(trainer: Trainer) -> None:
    """Begin to fetch anew. Private: ``fit_loop._data_fetcher``."""
    fetcher = trainer.fit_loop._data_fetcher
    if fetcher is not None:
        iter(fetcher)


def get_callback_metrics(trainer: Trainer) -> dict[str, Tensor]:
    """What ``trainer.callback_metrics`` holds."""
    return {name: value.detach().clone() for name, value in trainer.callback_metrics.items()}


def set_callback_metrics(trainer: Trainer, metrics: Mapping[str, Tensor]) -> None:
    """Put back what :func:`get_callback_metrics` gave. Private: ``_logger_connector._callback_metrics``."""
    device = trainer.strategy.root_device
    trainer._logger_connector._callback_metrics.update({name: value.to(device) for name, value in metrics.items()})


def metrics_to_empty(trainer: Trainer) -> list[Any]:
    """The torchmetrics objects of the validation at hand, which Lightning empties when it is over.

    Private: ``val_loop._results``, its metrics' ``is_tensor`` and ``value`` (2.0 to 2.6).
    """
    if not trainer.validating:
        return []
    results: Any = trainer.fit_loop.epoch_loop.val_loop._results
    return [metric.value for metric in results.values() if not metric.is_tensor]


class EpochResults:
    """What ``self.log(on_epoch=True)`` has accumulated in an epoch, taken over from a checkpoint.

    Lightning makes the place for a value when it is logged for the first time, so the part from before the
    checkpoint joins it right after that: in the same order of additions as without the interruption. What is not
    logged again until the epoch ends is put in place then.

    Private: ``epoch_loop._results``, its metrics' ``value``, ``cumulated_batch_size`` and ``meta`` (2.0 to 2.6).
    """

    _LOGGED_AS = ("fx", "name", "prog_bar", "logger", "on_step", "on_epoch", "add_dataloader_idx", "metric_attribute")

    def __init__(self, trainer: Trainer) -> None:
        self._trainer = trainer
        self._results: Any = trainer.fit_loop.epoch_loop._results
        self._waiting: dict[str, Mapping[str, Any]] = {}
        self._placed: list[str] = []

    def state_dict(self) -> dict[str, dict[str, Any]]:
        """How each value was logged, and its sum so far."""
        waiting = {key: dict(entry) for key, entry in self._waiting.items()}
        return waiting | {
            key: self._entry(metric)
            for key, metric in self._results.items()
            if metric.meta.on_epoch and not metric.has_reset
        }

    def _entry(self, metric: Any) -> dict[str, Any]:
        meta = metric.meta
        return {
            "logged_as": {name: getattr(meta, name) for name in self._LOGGED_AS},
            "reduce": meta.reduce_fx.__name__,
            "sync": bool(meta.sync.should),
            "values": {name: getattr(metric, name).detach().clone() for name in metric._defaults},
        }

    def load_state_dict(self, state: Mapping[str, Mapping[str, Any]]) -> None:
        """Wait for the names to be logged."""
        self._waiting = dict(state)

    def join(self) -> None:
        """After values were logged and before they are logged again."""
        for key in [key for key in self._waiting if key in self._results]:
            metric = self._results[key]
            for name, before in self._waiting.pop(key)["values"].items():
                now = getattr(metric, name)
                extreme = metric.meta.is_max_reduction or metric.meta.is_min_reduction
                join = metric.meta.reduce_fx if extreme else torch.add
                setattr(metric, name, join(before.to(now.device), now))

    def place(self) -> None:
        """At the end of an epoch."""
        self.join()
        for key, entry in self._waiting.items():
            attribute, strategy = entry["logged_as"]["metric_attribute"], self._trainer.strategy
            value = attribute and self._trainer.lightning_module.get_submodule(attribute)
            self._results.log(
                **entry["logged_as"],
                value=torch.zeros((), device=strategy.root_device) if value is None else value,
                reduce_fx=entry["reduce"],
                sync_dist=entry["sync"],
                sync_dist_fn=strategy.reduce,
                batch_size=1,
            )
            for name, before in entry["values"].items():
                setattr(self._results[key], name, before.to(strategy.root_device))
            self._placed.append(key)
        self._waiting.clear()

    def clear(self) -> None:
        """At the start of an epoch: Lightning makes anew what was put in place for it."""
        while self._placed:
            self._results.pop(self._placed.pop(), None)


class RankSync:
    """Gradients of several ranks, averaged once per update after all its passes have succeeded.

    A rank that runs out of memory can then start again by itself: until its gradients are complete nobody waits for
    it inside a pass. The averaging is DDP's own (buckets, communication hooks, unused parameters), driven by a
    backward pass that adds nothing.

    Private: of DDP ``will_sync_module_buffers``, ``_sync_buffers`` and ``require_forward_param_sync`` (torch 2.0 to
    2.13).
    """

    def __init__(self, trainer: Trainer) -> None:
        self._trainer = trainer

    @property
    def _ddp(self) -> Any:
        return self._trainer.strategy.model

    def blocked(self) -> AbstractContextManager[Any]:
        """Passes inside it keep their gradients to their rank."""
        blocked: AbstractContextManager[Any] = self._ddp.no_sync()
        return blocked

    def share_buffers(self) -> None:
        """What DDP does in the first forward pass after an update, before there is anything to put back."""
        ddp = self._ddp
        if ddp.will_sync_module_buffers():
            ddp._sync_buffers()
        ddp.require_forward_param_sync = False

    def average(self) -> None:
        """Make every rank's gradients the mean over the ranks."""
        module = self._trainer.lightning_module
        touched = [p for p in module.parameters() if p.requires_grad and p.grad is not None]
        own_forward = module.__dict__.get("forward")
        module.__dict__["forward"] = lambda: _Touch.apply(*touched)  # type: ignore[no-untyped-call]
        try:
            with torch.enable_grad():
                self._ddp().backward()
        finally:
            del module.__dict__["forward"]
            if own_forward is not None:
                module.__dict__["forward"] = own_forward


class _Touch(torch.autograd.Function):
    """Zero, as a function of all given tensors; its gradients are zeros that take no memory."""

    @staticmethod
    def forward(ctx: Any, *tensors: Tensor) -> Tensor:
        ctx.save_for_backward(*tensors)
        return tensors[0].new_zeros(())

    @staticmethod
    def backward(ctx: Any, *_: Any) -> Any:
        return tuple(tensor.new_zeros(()).expand_as(tensor) for tensor in ctx.saved_tensors)


def uses_ddp(trainer: Trainer) -> bool:
    """Whether the model is wrapped for data-parallel training."""
    return isinstance(trainer.strategy.model, torch.nn.parallel.DistributedDataParallel)


def data_share(trainer: Trainer) -> tuple[int, int]:
    """Which share of the data this process takes, and of how many: under tensor parallelism several take the same."""
    share = trainer.distributed_sampler_kwargs or {}
    return share.get("rank", trainer.global_rank), share.get("num_replicas", trainer.world_size)


def shards_parameters(trainer: Trainer) -> bool:
    """Whether each rank keeps a piece of every parameter (FSDPStrategy, ModelParallelStrategy)."""
    names = {cls.__name__ for cls in type(trainer.strategy).__mro__}
    return bool(names & {"FSDPStrategy", "ModelParallelStrategy"})


def splitting_obstacle(trainer: Trainer, module: torch.nn.Module) -> str | None:
    """Why no update of this run can be split or started again, ``None`` where it can.

    Private: ``strategy._ddp_kwargs`` and ``strategy._layer_sync`` (2.0 to 2.6).
    """
    strategy: Any = trainer.strategy
    name = type(strategy).__name__
    if shards_parameters(trainer):
        return f"under {name} the ranks wait for each other inside every pass"
    if getattr(strategy, "_ddp_kwargs", {}).get("static_graph"):
        return f"{name}(static_graph=True) allows no pass without an all-reduce"
    if trainer.world_size == 1:
        return None
    if not hasattr(strategy, "_ddp_kwargs"):
        return f"{name} is not DDP, whose ranks alone can start an update again together"
    synchronised = getattr(strategy, "_layer_sync", None) is not None and batch_dependent_layers(module)
    if synchronised or any(isinstance(layer, torch.nn.SyncBatchNorm) for layer in module.modules()):
        return "under SyncBatchNorm the ranks wait for each other inside every pass"
    return None


class LogBuffer:
    """Holds back the ``self.log`` calls of a batch until it has succeeded, and makes each once.

    Private: ``epoch_loop._results.log``, ``.batch`` and ``.batch_size`` (2.0 to 2.6).
    """

    def __init__(self, trainer: Trainer) -> None:
        self._results: Any = trainer.fit_loop.epoch_loop._results
        self._calls: dict[tuple[str, str, int], list[_LogCall]] = {}
        self._times: dict[tuple[str, str], int] = {}
        self._part = -1

    def __enter__(self) -> LogBuffer:
        self._batch, self._batch_size = self._results.batch, self._results.batch_size
        self._results.__dict__["log"] = self._record
        return self

    def __exit__(self, *_: object) -> None:
        self._results.__dict__.pop("log", None)
        self._results.batch, self._results.batch_size = self._batch, self._batch_size

    def start_part(self, part: Any) -> None:
        """The next calls speak of ``part``."""
        self._results.batch, self._results.batch_size = part, None
        self._part += 1
        self._times.clear()

    def _record(self, fx: str, name: str, value: Any, **kwargs: Any) -> None:
        value = value.detach() if isinstance(value, Tensor) and not kwargs.get("enable_graph") else value
        # The second call of a name in one part belongs to the second call in each other part.
        times = self._times[fx, name] = self._times.get((fx, name), 0) + 1
        calls = self._calls.setdefault((fx, name, times), [])
        calls.append(_LogCall(self._part, value, kwargs))

    def commit(self, parts: Parts | None) -> None:
        """Make every collected call, with the values of the parts made one. Call after the context.

        Args:
            parts: how they are put together; ``None`` where the batch was not split.
        """
        for (fx, name, _), calls in self._calls.items():
            value, kwargs = calls[-1].value, calls[-1].kwargs
            if parts is not None:
                value, kwargs = _merged(calls, parts, fx)
            self._results.log(fx, name, value, **kwargs)
        self._calls.clear()


class _LogCall(NamedTuple):
    part: int
    value: Any
    kwargs: dict[str, Any]


def _merged(calls: list[_LogCall], parts: Parts, fx: str) -> tuple[Any, dict[str, Any]]:
    value, kwargs = calls[-1].value, calls[-1].kwargs
    given = [call.kwargs.get("batch_size") for call in calls]
    counts = None if None in given else [int(count) for count in given if count is not None]
    # Without a count of the user's own Lightning finds that of the whole batch, as ever.
    kwargs = {**kwargs, "batch_size": counts and sum(counts)}
    if not isinstance(value, Tensor) or fx == "on_after_backward":
        return value, kwargs  # a torchmetrics object and the gradients hold all parts so far themselves
    name = str(getattr(kwargs["reduce_fx"], "__name__", kwargs["reduce_fx"])).lower()
    by = name if name in ("sum", "max", "min") else "mean"  # Lightning refuses any other
    parts_called = [call.part for call in calls]
    return parts.reduced([call.value for call in calls], parts_called, by=by, counts=counts), kwargs


_PASSED_OVER = torch.zeros(())
"""What a metric of Lightning's holds while a :class:`StepLog` has its newest value."""


class StepLog:
    """Logs a fixed set of numbers at every update, and makes tensors of them only when Lightning reads.

    ``LightningModule.log`` is called for the first of them, and only when it is new to Lightning (at first, and after
    each epoch): what becomes of it tells when Lightning starts anew. It passes over that one otherwise, and finds the
    newest values of all beside its own, which spares it to go through each at every batch. A name that somebody else
    logs as well is left to them.

    Values stay on the host: a copy to an accelerator would wait for it.

    Private: ``epoch_loop._results``, its ``metrics``, and its metrics' ``_forward_cache`` and ``has_reset`` (2.0 to
    2.6).
    """

    def __init__(self, trainer: Trainer, fx: str) -> None:
        self._trainer = trainer
        self._fx = fx
        self._first: Any = None  # Lightning's own of the first value
        self._logged: dict[str, float] = {}
        self._tensors: dict[str, Tensor] = {}
        self._newest: Callable[[], Mapping[str, float]] | None = None

    def __call__(self, values: Callable[[], Mapping[str, float]]) -> None:
        """Log ``values()`` for the step at hand, always the same names; it is asked for at the next reading."""
        if self._trainer.barebones:
            return  # Lightning logs nothing then
        self._newest = values
        if not self.goes_on:
            self._start(*next(iter(values().items())))
        if self._reading.logs[-1:] != [self]:
            self._reading.place_last(self)

    @property
    def goes_on(self) -> bool:
        """Whether Lightning still keeps what was logged here, and has not started anew."""
        return self._first is not None and self._first._forward_cache is not None

    def _start(self, name: str, value: float) -> None:
        results: Any = self._trainer.fit_loop.epoch_loop._results
        self._trainer.lightning_module.log(name, value, on_step=True, on_epoch=False, batch_size=1)
        self._first = results[f"{self._fx}.{name}"]
        self._dtype = self._first._forward_cache.dtype
        self._first._forward_cache, self._first.has_reset = _PASSED_OVER, True
        self._reading: _Reading = results.__dict__.setdefault("metrics", _Reading(results))

    def tensors(self) -> dict[str, Tensor]:
        """The newest values."""
        if self._newest is not None:
            for name, value in self._newest().items():
                old = self._logged.get(name)
                if value != old and (value == value or old == old):  # NaN after NaN is no change
                    self._logged[name] = value
                    self._tensors[name] = torch.full((), value, dtype=self._dtype)
            self._newest = None
        return self._tensors

    def close(self) -> None:
        """After the run: Lightning keeps the last values, and reads as before."""
        trainer: Any = self._trainer
        reading = trainer.fit_loop.epoch_loop._results.__dict__.get("metrics")
        if reading is None or self not in reading.logs:
            return  # nothing was logged since the epoch began
        _ = trainer.callback_metrics, trainer.logged_metrics  # which are updated when they are read
        reading.logs.remove(self)
        if not reading.logs:
            del trainer.fit_loop.epoch_loop._results.__dict__["metrics"]


class _Reading:
    """What Lightning reads of a step: its own values, and those of the logs beside it."""

    def __init__(self, results: Any) -> None:
        self._read = results.metrics
        self.logs: list[StepLog] = []

    def place_last(self, newest: StepLog) -> None:
        """Of two that log the same name the newest counts; those that have come to an end are left out."""
        self.logs = [log for log in self.logs if log is not newest and log.goes_on] + [newest]

    def __call__(self, on_step: bool) -> Any:
        metrics = self._read(on_step)
        newest: dict[str, Tensor] = {}
        for log in self.logs if on_step else ():
            if log.goes_on:
                newest.update(log.tensors())
        for kind in ("callback", "log"):
            metrics[kind] = {**newest, **metrics[kind]}
        return metrics
