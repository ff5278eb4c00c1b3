"""Runs an update as micro-batches inside Lightning's optimization closure."""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from adaptive_batch.callbacks import _lightning
from adaptive_batch.callbacks._metrics import Metrics
from adaptive_batch.callbacks._parts import Parts
from adaptive_batch.callbacks._probe import Probe
from adaptive_batch.callbacks._self_check import SelfCheck
from adaptive_batch.callbacks._sharded import ShardedNorms, all_can_split, sharded_sq_norm
from adaptive_batch.callbacks._trial import Trial, own_copy
from adaptive_batch.layers import batch_dependent_layers, is_compiled, warn_of_splitting
from adaptive_batch.measurement import Number
from adaptive_batch.memory import allocated_bytes
from adaptive_batch.micro_batch_limit import MicroBatchLimit
from adaptive_batch.micro_batching import balanced_sizes, split_batch, unequal_sizes
from adaptive_batch.noise.part_norms import PartNorms, grad_sq_norm
from adaptive_batch.noise.per_example import PerExampleNorms, Unmeasurable
from adaptive_batch.noise.sample import NoiseSample, equivalent_sample
from adaptive_batch.noise.schedule import EXAMPLES, PARTS, PURPOSEFUL_PARTS, Schedule
from adaptive_batch.pass_memory import PassMemory
from adaptive_batch.timing import Elapsed, mark
from adaptive_batch.transaction import Rollback

if TYPE_CHECKING:
    from pytorch_lightning import LightningModule, Trainer

__all__ = ["UpdateExecutor"]

WeightFn = Callable[[Any, Any], "float | Tensor"]
_Norms = PartNorms | PerExampleNorms | ShardedNorms


class UpdateExecutor:
    """Replaces the closure of each batch by one that runs it in parts and records what the parts show.

    Everything around the closure stays Lightning's: hooks per update, ``global_step``, clipping, precision.

    After an out-of-memory error in a forward or backward pass, everything that the attempt changed is put back
    and the batch starts again in parts of half the size; the learned limit stays.

    Args:
        trainer: whose loop this belongs to.
        module: what is trained.
        limit: most samples per pass.
        loss_reduction: whether ``training_step`` returns the ``"mean"`` or the ``"sum"`` over its samples.
        weight_fn: ``(micro_batch, batch) -> weight`` of a part's loss, for losses that are neither.
        recovers: whether a batch may be split after an out-of-memory error.
        splits: whether an update can be split at all; where it cannot, the ranks' gradients before they are averaged
            still show the noise. Under sharded parameters, of which no rank has a gradient of its own, all ranks split
            a measured update alike.
        explores: whether to find out, before the first update, how many samples ``limit.budget`` allows.
        self_check: whether to compare the gradients of the first batch, split and unsplit.
        noise: where the noise is measured: ``"micro_batches"`` splits updates, ``"probe"`` makes passes of its
            own, ``"per_example"`` uses hooks on the layers; both change nothing. ``"auto"`` uses the hooks where
            they know all layers and each sees an example at one position, so that they cost next to nothing, and
            splits otherwise; several ranks are parts already.
        probes: whether ``"auto"`` probes instead of splitting. A model with layers that look across the batch is
            never split for the noise.
    """

    def __init__(
        self,
        trainer: Trainer,
        module: LightningModule,
        *,
        limit: MicroBatchLimit,
        loss_reduction: str,
        weight_fn: WeightFn | None,
        recovers: bool,
        splits: bool = True,
        noise: str = "auto",
        probes: bool,
        explores: bool = False,
        self_check: bool = False,
    ) -> None:
        self._trainer = trainer
        self._module = module
        self.sums = loss_reduction == "sum"
        self._weight_fn = weight_fn
        self.recovers = recovers
        self._rollback = Rollback(module)
        self._across_batch = batch_dependent_layers(module)
        self._without_examples = "probe" if probes or self._across_batch else "micro_batches"
        self._automatic = noise == "auto"
        self._noise = self._without_examples if self._automatic else noise
        self._sharded = _lightning.shards_parameters(trainer)
        self._splits = splits or self._sharded
        self._examples = PerExampleNorms(module) if noise == "per_example" else None
        self._probe = Probe(trainer, module)
        if recovers or limit.largest is not None:
            warn_of_splitting(module)
        self._metrics = Metrics(module)
        self._device = trainer.strategy.root_device
        self._explores = explores
        self._self_check = SelfCheck(trainer, module, self._weight) if self_check else None
        self.ranks = _lightning.data_share(trainer)[1]
        if self._examples is not None and self.ranks > 1:
            raise ValueError('noise="per_example" measures one rank alone; use noise="auto" on several.')
        self._unmeasured, self._warned = self._why_not_measured(), False
        if noise != "auto" and self._unmeasured is not None:
            raise ValueError(f'noise="{noise}" cannot be had: {self._unmeasured}; use noise="auto".')
        self._samples = 0
        self._wait = 0.0
        self.share = self.sum_factor = 1.0
        self.limit = limit
        self._memory = PassMemory(module, limit, self._device, measures=recovers)
        self._few_first = False
        self.start_update(measure=False)

    @cached_property
    def _averages(self) -> bool:
        """Whether ranks average their gradients; known once Lightning has wrapped the model."""
        return _lightning.uses_ddp(self._trainer)

    @property
    def failures(self) -> list[str]:
        """What out-of-memory errors have taught, one sentence each; to be told and cleared."""
        return self._memory.failures

    @property
    def samples_of_loss(self) -> int:
        """What makes the loss of the batch at hand a mean over its samples."""
        return self._samples if self.sums else 1

    @property
    def peak_memory(self) -> float:
        """Bytes of this update's largest measured pass, 0 if none was."""
        return self._memory.peak

    def on_fit_start(self) -> None:
        """The optimizer is known: if nothing else was asked for, take norms by example where that may be cheap."""
        if (
            not self._automatic
            or self._without_examples == "probe"
            or self.ranks > 1
            or self._sharded
            or is_compiled(self._module)
        ):
            return
        try:
            examples = PerExampleNorms(self._module)
        except Unmeasurable:
            return
        if self._covered_by(examples):
            self._noise, self._examples, self._unmeasured = "per_example", examples, None

    def _covered_by(self, examples: PerExampleNorms) -> bool:
        """Whether they are of all parameters that are trained now."""
        known = {p for p in examples.parameters if p.requires_grad}
        return known == {p for p in self._parameters() if p.requires_grad}

    @property
    def noise_schedule(self) -> Schedule:
        """At which updates to measure the noise."""
        return PARTS if self._examples is None else EXAMPLES

    def _why_not_measured(self) -> str | None:
        """Why nothing shows the noise of this run, ``None`` where something does."""
        strategy = type(self._trainer.strategy).__name__
        if self._sharded and self._noise != "micro_batches":
            layers = f", and {self._across_batch[0]} looks across the batch" if self._across_batch else ""
            return f"under {strategy} only an update that is split shows it{layers}"
        if self._sharded and self._trainer.accumulate_grad_batches > 1:
            return f"under {strategy} the batches of accumulate_grad_batches cannot be told apart"
        if not self._splits and self.ranks == 1 and self._examples is None:
            return "on one rank only updates that are split show it, and these cannot be"
        return None

    def _measurable(self) -> bool:
        if self._unmeasured is None:
            return not any(map(is_lazy, self._parameters()))  # before the first pass
        if not self._warned:
            warnings.warn(f"the gradient noise of this run is not measured: {self._unmeasured}.", stacklevel=2)
            self._warned = True
        return False

    def start_update(self, *, measure: bool, watch: bool = False, time_parts: bool = False) -> None:
        """Forget the last update.

        Args:
            measure: record the squared norms of this one's parts.
            watch: record the squared norm of its gradient, measured or not.
            time_parts: time passes of two sizes: unequal parts of this one, which is not measured then, as that would
                take time too; or passes on the side, if it is measured and nothing may be split.
        """
        self._in_turns = time_parts and self._may_split_on_purpose
        if self._in_turns:
            self._few_first = not self._few_first
        self._measure = measure and not self._in_turns and self._measurable()
        self._watch = watch and self._noise != "probe" and self._unmeasured is None
        self._time_parts = time_parts
        self.disturbed = False  # hooks or passes on the side made it longer than others are
        self._batch_sizes: list[int] = []
        self.pass_sizes: list[int] = []
        self.pass_seconds: list[Elapsed] = []
        self.part_sq_norms: list[Number] = []
        self.part_sizes: list[int] = []
        self.sq_norm: Number = float("nan")
        self.micro_batch_size = 0
        self._memory.peak = 0.0

    def start_batch(
        self,
        samples: int,
        wait: float = 0.0,
        *,
        global_samples: int | None = None,
        counted: tuple[int, int] | None = None,
        sum_factor: float = 1.0,
    ) -> None:
        """The next closure is for this rank's ``samples`` of a batch, which the loop has waited for.

        Ranks average their gradients whatever their shares, so each weighs its loss by its share: of the samples, or
        where ``weight_fn`` says that the loss is a mean over something else, of what the user has ``counted`` (on this
        rank, on all). Without ``global_samples`` all count alike, as in plain Lightning. A loss that is a sum is taken
        times ``sum_factor``.
        """
        self._samples = samples
        self._wait = wait
        self.sum_factor = sum_factor
        if global_samples is None:
            self.share = 1.0
        elif self.sums:
            self.share = self.ranks * sum_factor
        elif counted is not None and self._weight_fn is not None:
            self.share = self.ranks * counted[0] / counted[1]
        else:
            self.share = self.ranks * samples / global_samples
        self._batch_sizes.append(samples if global_samples is None else global_samples)

    def weigh(self, loss: Tensor) -> Tensor:
        """The batch's loss by this rank's share."""
        return loss if self.share == 1.0 else loss * self.share

    def make_closure(self, original: Callable[..., Any], kwargs: Any, optimizer: Any, batch_idx: int) -> Any:
        """Lightning's closure for this batch, made to run in parts where it has to."""
        closure = original(kwargs, optimizer, batch_idx)
        here = weakref.ref(closure)  # one that held itself would keep its batch until the garbage collector comes
        closure.closure = lambda *_, **__: self._run(here(), kwargs, batch_idx)
        return closure

    def _sizes(self, *, split: bool) -> list[int]:
        """Samples of each pass; ``split`` makes parts for the noise where there would be none."""
        return self.limit.sizes(self._samples, parts=PURPOSEFUL_PARTS if split else 1)

    def _sizes_now(self, batch: Any) -> list[int]:
        """Samples of each pass of the batch at hand."""
        sizes = self._sizes(split=False)
        if len(sizes) > 1 or not (self._in_turns or self._splits_to_measure):
            return sizes
        parts = unequal_sizes(sizes[0], few_first=self._few_first) if self._in_turns else self._sizes(split=True)
        return parts if self._splits_into(parts, batch) else sizes

    def _splits_into(self, parts: list[int], batch: Any) -> bool:
        """Whether a batch that nobody asked to split has such parts; if not, nothing is measured of its update."""
        if len(parts) == 1 or not self._automatic:
            return True
        try:
            split_batch(batch, parts, self._samples)
        except ValueError as problem:
            self._measure = self._in_turns = False
            if not self._warned:
                warnings.warn(f"the gradient noise of an update is not measured: {problem}", stacklevel=2)
                self._warned = True
            return False
        return True

    @property
    def _may_split_on_purpose(self) -> bool:
        """Where the user does not ask for a measurement that changes nothing, and no layer looks across the batch."""
        asked = self._noise == "micro_batches" or (self._automatic and self._without_examples == "micro_batches")
        return asked and self._splits and not self._sharded and self._is_whole_update

    def _parts_over_ranks(self) -> list[int]:
        """Samples of each part of an update that every rank splits for the noise."""
        samples = self._batch_sizes[-1]
        shares = (len(range(rank, samples, self.ranks)) for rank in range(self.ranks))
        halves = (balanced_sizes(n, -(-n // PURPOSEFUL_PARTS)) for n in shares)
        return [sum(part) for part in zip(*halves, strict=True)]

    @property
    def _is_whole_update(self) -> bool:
        """Ranks, and the batches of an accumulation window, are parts already."""
        return (self.ranks == 1 or self._sharded) and self._trainer.accumulate_grad_batches == 1

    @property
    def _splits_to_measure(self) -> bool:
        return self._taps and self._is_whole_update and self._noise == "micro_batches"

    def measures_memory(self, samples: int) -> bool:
        """Whether to measure the memory of the next pass: not before there are gradients."""
        if self._measure and self._examples is not None:  # whose memory is not the model's
            return False
        return self._memory.measures(samples) and self._missing_gradients() == 0

    def _held(self) -> int:
        """Bytes that are held while no pass runs, the gradients counted whether or not they are there yet."""
        return 0 if self.limit.budget is None else allocated_bytes(self._device) + self._missing_gradients()

    def _missing_gradients(self) -> int:
        """Bytes of the gradients before the first update; from then on there are some at any time."""
        if self._device.type == "cpu":
            return 0
        trained = [p for p in self._module.parameters() if p.requires_grad]
        if any(p.grad is not None for p in trained):
            return 0
        return sum(p.numel() * p.element_size() for p in trained)

    def _run(self, closure: Any, kwargs: Mapping[str, Any], batch_idx: int) -> Any:
        """The batch's gradients and outputs, attempted in ever smaller parts while memory runs out."""
        if self._in_turns:
            self.disturbed = True
        if self._measure and self.ranks == 1 and not self._sharded:
            split = self._splits_to_measure and len(self._sizes(split=False)) == 1
            self.disturbed = split or self._noise != "micro_batches"
            if self._noise == "probe" and self._splits_into(self._sizes(split=True), kwargs["batch"]):
                if self._time_parts and self._splits:
                    self._time_passes(kwargs)
                self._run_probe(kwargs)
        if self._measure and self._sharded:
            self._measure = all_can_split(self._trainer, self._samples, PURPOSEFUL_PARTS)
        if not self.recovers:
            self._check_first(kwargs)
            result = self._attempt(closure, kwargs, self._sizes_now(kwargs["batch"]))
            self._end_batch()
            return result
        accumulated = batch_idx % self._trainer.accumulate_grad_batches != 0
        sync = _lightning.RankSync(self._trainer) if self._averages else None
        if sync is not None:
            sync.share_buffers()
        if self._self_check is not None or self._explores:
            with nullcontext() if sync is None else sync.blocked():
                self._check_first(kwargs)
                self._explore_once(kwargs)
        self.limit.held = self._held()
        self._rollback.save(accumulated=accumulated)
        self._metrics.save()
        hook = self._module._current_fx_name
        untouched = own_copy(kwargs["batch"])
        zero_grad = closure._zero_grad_fn
        try:
            while True:
                sizes = self._sizes_now(kwargs["batch"])
                try:
                    with nullcontext() if sync is None else sync.blocked():
                        result = self._attempt(closure, kwargs, sizes)
                    break
                except Exception as error:
                    failed = self._memory.failed_size(error, sizes[0], self._samples)
                # Out here, where the traceback no longer holds the failed attempt's tensors.
                cleared = zero_grad is not None and closure._zero_grad_fn is None
                self._rollback.restore(gradients=cleared or accumulated)
                self._metrics.restore()
                self._module._current_fx_name = hook
                kwargs = {**kwargs, "batch": untouched}
                self._memory.learn(failed)
                if sync is not None:
                    sync.share_buffers()
        finally:
            closure._zero_grad_fn = zero_grad  # an optimizer that calls the closure again clears again
            self._rollback.forget()
            self._metrics.forget()
        self.limit.succeeded(self._samples)
        if sync is not None and not _lightning.accumulating(self._trainer):
            sync.average()
        self._end_batch()
        return result

    def _check_first(self, kwargs: Mapping[str, Any]) -> None:
        if self._self_check is not None and self._self_check.run(kwargs, self._samples):
            self._self_check = None

    def _explore_once(self, kwargs: Mapping[str, Any]) -> None:
        """A budget that the user gave is kept from the first update on; without one a whole batch is run."""
        if not self._explores or self.limit.model.measured:
            return
        self._explores = False
        trial = Trial(self._trainer, self._module)
        with trial.undone():
            self._memory.explore(self._samples, lambda size: self._trial_pass(trial, kwargs, size), self._held)

    def _trial_pass(self, trial: Trial, kwargs: Mapping[str, Any], size: int) -> None:
        rest = self._samples - size
        sizes = [size, rest] if rest else [size]
        loss = trial.loss(kwargs, split_batch(kwargs["batch"], sizes, self._samples)[0])
        if loss is not None:
            torch.autograd.backward(loss)

    def _time_passes(self, kwargs: Mapping[str, Any]) -> None:
        """What passes over the batch and over half of it take, both alike and on the side; everything is put back."""
        half = self._sizes(split=True)[0]
        if half == self._samples:
            return
        trial = Trial(self._trainer, self._module)
        with trial.undone():
            for size in (self._samples, half):
                started = mark(self._device)
                self._trial_pass(trial, kwargs, size)
                self.pass_seconds.append(Elapsed(started, mark(self._device)))
                self.pass_sizes.append(size)
                trial.rewind()

    def _run_probe(self, kwargs: Mapping[str, Any]) -> None:
        """Measure the parts of this batch by passes of their own."""
        self._measure = False

        def factor(part: Any, size: int) -> tuple[Number, Number]:
            share = self._weight(part, kwargs["batch"], size, self._samples)
            share = share / self._samples if self.sums else share
            return share, size / self._samples if self._weight_fn is None else share

        sample = self._probe.measure(self._parameters(), kwargs, self._sizes(split=True), factor)
        if sample is not None:
            self._keep(sample)

    def _attempt(self, closure: Any, kwargs: Mapping[str, Any], sizes: list[int]) -> Any:
        parts = None
        # An optimizer may call the closure many times (LBFGS); its first call is the one to measure.
        norms = self._norms() if self._taps else None
        # A whole pass also does what belongs to the update, a measured one more than that: neither tells the time of
        # a part. Several ranks compare how long their passes take.
        passes = _Passes(self, sizes, timed=norms is None and (len(sizes) > 1 or self.ranks > 1))
        buffered = self.recovers or len(sizes) > 1
        log = _lightning.LogBuffer(self._trainer) if buffered else None
        with log or nullcontext(), norms or nullcontext():
            if len(sizes) == 1:
                result = passes.run(0, lambda: self._whole(closure))
                if norms is not None:
                    self._end_part(norms, sizes[0], 1.0)
            else:
                parts = self._in_parts(closure, kwargs, passes, log, norms)
                result = parts.joined()
        if log is not None:
            log.commit(parts)
        if passes.seconds:
            self.pass_sizes += sizes
            self.pass_seconds += passes.seconds
        self.micro_batch_size = max(self.micro_batch_size, sizes[0])
        if norms is not None and self._measure:
            self.part_sq_norms += norms.sq_norms
            self.part_sizes += norms.sizes
        return result

    def _end_part(self, norms: _Norms, size: int, weight: Number) -> None:
        if not self._measure:
            return  # a part before has shown that these norms cannot be had
        try:
            norms.end_part(size, self._mean_gradient_factor(weight, size))
        except Unmeasurable as error:
            if not self._automatic:
                raise
            self._measure_without_examples()
            self._measure = False
            what = str(error).split("; use", maxsplit=1)[0]
            self.failures.append(f"the gradient noise is measured by the parts of updates from here on: {what}")

    def _norms(self) -> _Norms:
        if self._sharded:
            return ShardedNorms(self._trainer, self._parameters(), self._parts_over_ranks())
        if self._examples is not None and not self._covered_by(self._examples):  # layers were frozen or set free
            self._look_at_examples_again()
        return self._examples or PartNorms(self._parameters())

    def _look_at_examples_again(self) -> None:
        if not self._automatic:
            self._examples = PerExampleNorms(self._module)
            return
        self._measure_without_examples()
        self.on_fit_start()

    def _measure_without_examples(self) -> None:
        self._noise, self._examples = self._without_examples, None

    @property
    def _taps(self) -> bool:
        """Whether the passes themselves are measured; of several ranks each is a part."""
        return self._measure and (self.ranks > 1 or self._noise != "probe")

    def _whole(self, closure: Any) -> Any:
        """Lightning's own closure: not even a factor of one where nothing is split."""
        closure._zero_grad_fn = self._once(closure, closure._zero_grad_fn)
        backward = closure._backward_fn
        if backward is None or self.share == 1.0:
            return type(closure).closure(closure)
        closure._backward_fn = lambda loss: backward(self.weigh(loss))
        try:
            return type(closure).closure(closure)
        finally:
            closure._backward_fn = backward

    def _once(self, closure: Any, zero_grad: Callable[[], None] | None) -> Callable[[], None] | None:
        """Clearing the gradients, which a second attempt must not repeat: its hooks are per update."""
        if zero_grad is None or not self.recovers:
            return zero_grad

        def clear() -> None:
            closure._zero_grad_fn = None
            zero_grad()

        return clear

    @torch.enable_grad()
    def _in_parts(
        self,
        closure: Any,
        kwargs: Mapping[str, Any],
        passes: _Passes,
        log: _lightning.LogBuffer | None,
        norms: _Norms | None,
    ) -> Parts:
        """Forward and backward of each part; the gradients add up to the whole batch's."""
        batch, sizes = kwargs["batch"], passes.sizes
        pieces = split_batch(batch, sizes, self._samples)
        weights = [self._weight(p, batch, size, self._samples) for p, size in zip(pieces, sizes, strict=True)]
        parts = Parts(
            sizes,
            weights,
            by_weights=self._weight_fn is not None,
            accumulate=self._trainer.accumulate_grad_batches,
        )
        self._metrics.start_parts(sizes)
        for index, (piece, size, weight) in enumerate(zip(pieces, sizes, weights, strict=True)):
            if log is not None:
                log.start_part(piece)
            self._metrics.start_part(index)
            run = partial(self._part, closure, {**kwargs, "batch": piece}, weight, first=index == 0)
            parts.add(passes.run(index, run))
            if norms is not None:
                self._end_part(norms, size, weight)
        self._metrics.end_parts()
        return parts

    def _part(self, closure: Any, kwargs: Mapping[str, Any], weight: Number, *, first: bool) -> Any:
        loop = self._trainer.fit_loop.epoch_loop.automatic_optimization
        output = loop._make_step_fn(kwargs)()  # type: ignore[arg-type]
        clear = self._once(closure, closure._zero_grad_fn) if first else None
        if clear is not None:
            clear()
        if output.closure_loss is None:
            closure.warning_cache.warn("`training_step` returned `None`: that part of the batch adds nothing.")
        elif closure._backward_fn is not None:
            closure._backward_fn(output.closure_loss * (weight * self.share))
        return output

    def _weight(self, part: Any, batch: Any, size: int, samples: int) -> Number:
        if self._weight_fn is not None:
            return self._weight_fn(part, batch)
        return 1.0 if self.sums else size / samples

    def _mean_gradient_factor(self, weight: Number, size: int) -> Number:
        """What the mean gradient of a part's samples was multiplied with before it reached the hooks."""
        scale = _lightning.amp_scale(self._trainer) * self.share / self._trainer.accumulate_grad_batches
        return scale * (size if self.sums else weight)

    def _parameters(self) -> list[nn.Parameter]:
        return [p for group in self._trainer.optimizers[0].param_groups for p in group["params"]]

    def _end_batch(self) -> None:
        """After the batch's gradients are complete, over all ranks where there are several."""
        accumulate = self._trainer.accumulate_grad_batches
        if not (self._taps or self._watch) or _lightning.accumulating(self._trainer):
            return
        self._measure = self._watch = False
        if len(set(self._batch_sizes)) > 1 or len(self._batch_sizes) < accumulate:
            # Lightning weighs the batches of a window alike, so this gradient is no mean over samples.
            self.part_sq_norms, self.part_sizes = [], []
            return
        total = self._total_sq_norm()
        if total is None:  # training_step returned None
            self.part_sq_norms, self.part_sizes = [], []
        else:
            factor = _lightning.amp_scale(self._trainer)
            if self.sums:
                factor = factor * self.sum_factor * sum(self._batch_sizes) / accumulate
            self.sq_norm = total if isinstance(factor, float) and factor == 1 else total / factor**2
            if self._examples is not None and self.part_sq_norms:
                self._keep_examples()
                if self._automatic and self._examples.is_dear:
                    self._measure_without_examples()
        if self._sharded and not self._trainer.is_global_zero:
            self.part_sq_norms, self.part_sizes = [], []  # every rank knows them all: one reports them

    def _total_sq_norm(self) -> Tensor | None:
        if self._sharded:
            return sharded_sq_norm(self._trainer, [p.grad for p in self._parameters() if p.grad is not None])
        return grad_sq_norm(self._parameters())

    def _keep_examples(self) -> None:
        """Two parts that say what one per example would say."""
        norms = torch.cat([torch.as_tensor(norm) for norm in self.part_sq_norms])
        self._keep(equivalent_sample(norms.mean(), 1, self.sq_norm, sum(self.part_sizes)))

    def _keep(self, sample: NoiseSample) -> None:
        self.part_sq_norms, self.part_sizes = list(sample.sq_norms), [int(size) for size in sample.sizes]
        self.sq_norm = sample.sq_norm


class _Passes:
    """The passes of one attempt, their memory measured where there is a budget, and their times where they tell."""

    def __init__(self, executor: UpdateExecutor, sizes: list[int], *, timed: bool) -> None:
        self._executor, self._timed = executor, timed
        self._device = executor._device
        # A rank that waits longer for its data is a slower one; but whether a larger batch takes longer to fetch, or
        # only its samples are more, a wait does not tell.
        self._wait_per_sample = executor._wait / executor._samples if executor.ranks > 1 else 0.0
        self.sizes = sizes
        self.seconds: list[Elapsed] = []

    def run(self, index: int, run: Callable[[], Any]) -> Any:
        """Run part ``index``."""
        size = self.sizes[index]
        started = mark(self._device) if self._timed else None
        result = self._executor._memory.measured(size, run) if self._executor.measures_memory(size) else run()
        if started is not None:
            self.seconds.append(Elapsed(started, mark(self._device), self._wait_per_sample * size))
        return result
