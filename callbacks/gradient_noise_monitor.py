"""The callback that measures the gradient noise and changes nothing."""

from __future__ import annotations

import itertools
import math
import warnings
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from torch import nn
from torch.nn.parameter import is_lazy

from adaptive_batch.callbacks import _lightning
from adaptive_batch.callbacks._lightning import CallbackBase
from adaptive_batch.callbacks._probe import Probe
from adaptive_batch.controller import NOISE_MEMORY_FRACTIONS, NOISE_MEMORY_UPDATES
from adaptive_batch.iterable import count_samples
from adaptive_batch.layers import batch_dependent_layers
from adaptive_batch.measurement import read_numbers
from adaptive_batch.micro_batching import balanced_sizes, split_batch
from adaptive_batch.noise import GradientNoiseScale
from adaptive_batch.noise.per_example import Unmeasurable
from adaptive_batch.noise.preconditioning import AdamMetric
from adaptive_batch.noise.sample import NoiseSample
from adaptive_batch.noise.schedule import PARTS, Schedule, measures_noise
from adaptive_batch.noise.sources import NoiseSource, check_source, choose_source, make_source
from adaptive_batch.noise.subset import SubsetSource

if TYPE_CHECKING:
    from pytorch_lightning import LightningModule, Trainer

__all__ = ["GradientNoiseMonitor"]

_PROBES = Schedule(0, 1)
"""Each probe costs about an update: they are ``1 / sqrt(u)`` of ``u`` updates."""

_FIT_PARTS = 8
"""Of a probe that fits a slope: with few parts one measurement of the variance is little more than a guess."""

_READ_EVERY = 10
"""Updates between two readings of the device, so that none of them waits for it."""


class GradientNoiseMonitor(CallbackBase):
    """Measures the gradient noise scale of a run and logs it. The run stays what it is, bit for bit.

    In ``trainer.callback_metrics`` and the logger, once something is measured: ``adaptive_batch/noise_scale``
    (NaN while not identified), ``adaptive_batch/grad_sq_norm``, ``adaptive_batch/grad_variance``, and the
    ends of the confidence interval, ``adaptive_batch/noise_scale_low`` and
    ``adaptive_batch/noise_scale_high``. With :class:`AdaptiveBatchSize`, which logs the same, it is not
    needed.

    Args:
        noise: where the measurements come from. ``"auto"`` takes what the run has anyway (the ranks'
            gradients, the batches that are accumulated), then ``"per_example"`` where every layer is known,
            then ``"probe"``, an extra pass now and then that leaves nothing behind. See
            ``adaptive_batch.noise.SOURCES``.
        every: measure each so manieth update; ``None`` measures densely at first and ever more rarely: after
            ``u`` updates ``3 sqrt(u)`` have been measured, ``sqrt(u)`` by probes, which cost the most.
        confidence: of the interval that is logged.
        preconditioned: measure in Adam's metric (PGNS) instead; a number of its own, which is not comparable.
        loss_reduction: whether ``training_step`` returns the ``"mean"`` or the ``"sum"`` over its samples.
        batch_size_of: ``batch -> samples``, where that is not the first dimension of the first tensor in the batch.

    Attributes:
        noise: the :class:`~adaptive_batch.noise.GradientNoiseScale`, with the estimates and ``.interval()``.
        source: the name of the source in use, ``None`` before training starts.

    Raises:
        ValueError: for an argument that is not one of the above, or a run that cannot be measured.
    """

    def __init__(
        self,
        *,
        noise: str = "auto",
        every: int | None = None,
        confidence: float = 0.95,
        preconditioned: bool = False,
        loss_reduction: str = "mean",
        batch_size_of: Callable[[Any], int] | None = None,
    ) -> None:
        if every is not None and (not isinstance(every, int) or isinstance(every, bool) or every < 1):
            raise ValueError(f"every={every!r} must be a positive number of updates, or None.")
        if not isinstance(confidence, float) or not 0 < confidence < 1:
            raise ValueError(f"confidence={confidence!r} is not a probability between 0 and 1; pass 0.95, say.")
        if loss_reduction not in ("mean", "sum"):
            raise ValueError(f"loss_reduction={loss_reduction!r} is not known; choose 'mean' or 'sum'.")
        self._name = check_source(noise)
        self._every = every
        self._confidence = confidence
        self._preconditioned = preconditioned
        self._mean = loss_reduction == "mean"
        self._batch_size_of = batch_size_of or count_samples
        self.noise = GradientNoiseScale()
        self.source: str | None = None
        self._updates = 0
        self._measured_samples = 0.0
        self._unread: list[NoiseSample] = []
        self._values: dict[str, float] = {}
        self._patches = _lightning.Patches()
        self._forget_run()

    def _forget_run(self) -> None:
        self._source: NoiseSource | None = None
        self._probe: Probe | None = None
        self._metric: AdamMetric | None = None
        self._measures = False
        self._in_update = False
        self._stepped = False
        self._logged = False
        self._warned = False

    # Set-up

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Choose the source, now that there are optimizers."""
        if not pl_module.automatic_optimization:
            raise ValueError(
                "GradientNoiseMonitor needs automatic optimization, but this LightningModule sets "
                "automatic_optimization=False; feed a GradientNoiseScale in your own training_step instead."
            )
        if len(trainer.optimizers) != 1:
            raise ValueError(
                f"GradientNoiseMonitor needs exactly one optimizer, but configure_optimizers returned "
                f"{len(trainer.optimizers)}; combine them into one with several parameter groups."
            )
        self._patches.undo()
        self._forget_run()
        optimizer = trainer.optimizers[0]
        self._metric = AdamMetric(optimizer) if self._preconditioned else None
        name = self._name
        if name == "auto":
            name = choose_source(
                pl_module,
                batches=trainer.accumulate_grad_batches,
                ranks=trainer.world_size,
                metric=self._preconditioned,
            )
        self._check(trainer, name)
        self._take(trainer, pl_module, name)
        self._log = _lightning.StepLog(trainer, "on_train_batch_end")
        self._patches.later(self._log.close)

    def _check(self, trainer: Trainer, name: str) -> None:
        if name == "micro_batches" and trainer.accumulate_grad_batches == 1:
            raise ValueError(
                'noise="micro_batches" needs an update of several batches, and a monitor splits none; '
                'use noise="auto", or accumulate_grad_batches=2.'
            )
        if name != "ranks" and trainer.world_size > 1:
            raise ValueError(f'noise="{name}" measures one rank alone; use noise="ranks" on several.')
        strategy = type(trainer.strategy).__name__
        if _lightning.shards_parameters(trainer) or "DeepSpeed" in strategy:
            raise ValueError(
                f"GradientNoiseMonitor needs whole gradients, but {strategy} keeps them in pieces; "
                "use DDP, or leave the monitor out."
            )
        if name == "adam_moments" and trainer.gradient_clip_val:
            raise ValueError(
                f'noise="adam_moments" sees gradients after gradient_clip_val={trainer.gradient_clip_val}; '
                "choose another source."
            )
        if name == "adam_moments" and not self._mean:
            raise ValueError('noise="adam_moments" needs a mean-reduced loss; choose another source.')

    def _take(self, trainer: Trainer, module: LightningModule, name: str) -> None:
        self.source = name
        optimizer = trainer.optimizers[0]
        self._source = None if name == "probe" else make_source(name, module, optimizer, self._metric)
        if name in ("probe", "norm_layers"):
            self._probe = Probe(trainer, module)
            self._smallest = 2 if batch_dependent_layers(module) else 1

    # The loop

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """At the start of an update: measure it, or not."""
        self._samples = self._batch_size_of(batch)
        if self._in_update:
            return
        self._in_update = True
        ready = self._metric is None or self._metric.ready
        self._measures = self._due() and ready and not any(map(is_lazy, pl_module.parameters()))
        if not self._measures:
            return
        source, probes = self._source, self._probe is not None and self._samples > 1
        if isinstance(source, SubsetSource):
            if probes and source.calibrating and (full := self._probed(trainer, batch, batch_idx, _FIT_PARTS)):
                source.calibrate(full)
        elif probes:
            self._keep(self._probed(trainer, batch, batch_idx))
        if source is not None:
            source.start()  # after the probe, whose passes are not the source's

    def _due(self) -> bool:
        if self._source is not None and self._source.pending:
            return True
        if self._every is not None:
            return self._updates % self._every == 0
        return measures_noise(self._updates, PARTS if self._source is not None else _PROBES)

    def _probed(self, trainer: Trainer, batch: Any, batch_idx: int, parts: int = 2) -> NoiseSample | None:
        assert self._probe is not None
        samples = self._samples
        sizes = balanced_sizes(samples, -(-samples // parts), smallest=self._smallest)
        if len(sizes) < 2 or not self._splits_into(sizes, batch):
            return None

        def factor(part: Any, size: int) -> tuple[float, float]:
            return (size / samples if self._mean else 1 / samples), size / samples

        kwargs = _lightning.step_kwargs(trainer, batch, batch_idx)
        parameters = _parameters(trainer.optimizers[0])
        return self._probe.measure(parameters, kwargs, sizes, factor, self._metric)

    def _splits_into(self, sizes: list[int], batch: Any) -> bool:
        """Whether a batch has such parts; where the probe was asked for, it is an error if not."""
        try:
            split_batch(batch, sizes, sum(sizes))
        except ValueError as problem:
            if self._name != "auto":
                raise
            if not self._warned:
                warnings.warn(f"the gradient noise of an update is not measured: {problem}", stacklevel=2)
                self._warned = True
            return False
        return True

    def on_after_backward(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """A batch's gradients are there."""
        if not self._measures or self._source is None:
            return
        share = 1 / trainer.accumulate_grad_batches
        if not self._mean:
            share *= self._samples * _sum_factor(trainer)
        try:
            self._source.end_batch(self._samples, share, _lightning.amp_scale(trainer))
        except Unmeasurable as problem:
            self._source.cancel()
            self._measures = False
            if self._name != "auto":
                raise
            warnings.warn(f"{problem} GradientNoiseMonitor goes on with the probe.", stacklevel=2)
            self._take(trainer, pl_module, "probe")

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Any) -> None:
        """The update's gradients are complete, and not clipped yet."""
        if self._measures and self._source is not None:
            self._keep(self._source.finish())
        self._measures = False  # an optimizer may call its closure more than once
        self._in_update = False
        self._stepped = True

    def _keep(self, parts: NoiseSample | None) -> None:
        if parts is not None:
            self._unread.append(parts)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """After an update: count it, read what was measured, log."""
        if not self._stepped:
            return
        self._stepped = False
        self._updates += 1
        if self._updates % _READ_EVERY == 0 or trainer.is_last_batch:
            self._read()
        if self._values and not self._logged:
            values = self._values
            self._log(lambda: values)
            self._logged = True

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Lightning forgets the step's values at the end of an epoch; no update reaches over it."""
        self._logged = False
        self._in_update = False

    def _read(self) -> None:
        """Take in what was measured since the last reading, in one transfer."""
        if not self._unread:
            return
        numbers = iter(read_numbers([n for parts in self._unread for n in (*parts.sq_norms, parts.sq_norm)]))
        for parts in self._unread:
            *sq_norms, sq_norm = itertools.islice(numbers, len(parts.sq_norms) + 1)
            size = sum(parts.sizes)
            self._measured_samples += size
            self.noise.memory = max(NOISE_MEMORY_UPDATES * size, NOISE_MEMORY_FRACTIONS[-1] * self._measured_samples)
            self.noise.update(sq_norms, parts.sizes, sq_norm)
        self._unread.clear()
        low, high = self.noise.interval(self._confidence)
        values = {
            "noise_scale": self.noise.noise_scale,
            "grad_sq_norm": self.noise.grad_sq_norm,
            "grad_variance": self.noise.grad_variance,
            "noise_scale_low": low,
            "noise_scale_high": high,
        }
        self._values = {f"adaptive_batch/{name}": value for name, value in values.items()}
        self._logged = False

    # The end, however it comes

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Read the last measurements."""
        self._read()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Take the hooks back; Lightning calls no ``teardown`` after an exception."""
        self._release()

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Take the hooks back."""
        self._release()

    def _release(self) -> None:
        if self._source is not None:
            self._source.cancel()
        self._patches.undo()
        self._forget_run()

    # Checkpoints

    def state_dict(self) -> dict[str, Any]:
        """The estimates and the counts, as plain numbers and lists."""
        self._read()
        return {
            "noise": self.noise.state_dict(),
            "preconditioned": self._preconditioned,
            "updates": self._updates,
            "measured_samples": self._measured_samples,
        }

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Go on where ``state_dict`` was taken; estimates in another metric are left behind, with a warning.

        Raises:
            ValueError: if the state is not one that :meth:`state_dict` can have returned.
        """
        if set(state_dict) != {"noise", "preconditioned", "updates", "measured_samples"}:
            raise ValueError(
                f"a GradientNoiseMonitor's state has no keys {sorted(map(str, state_dict))}; "
                "load what state_dict() returned."
            )
        noise = GradientNoiseScale()
        noise.load_state_dict(state_dict["noise"])
        self._updates = int(state_dict["updates"])
        if bool(state_dict["preconditioned"]) != self._preconditioned:
            warnings.warn(
                f"the checkpoint's noise scale has preconditioned={not self._preconditioned}, which is another "
                "quantity; measuring starts anew.",
                stacklevel=2,
            )
            return
        self.noise.load_state_dict(state_dict["noise"])
        self._measured_samples = float(state_dict["measured_samples"])


def _parameters(optimizer: Any) -> list[nn.Parameter]:
    return [p for group in optimizer.param_groups for p in group["params"]]


def _sum_factor(trainer: Trainer) -> float:
    """What a callback that resizes has the loss of this batch multiplied with."""
    factors = (getattr(callback, "sum_factor", 1.0) for callback in _lightning.callbacks_of(trainer))
    return math.prod(factors)
