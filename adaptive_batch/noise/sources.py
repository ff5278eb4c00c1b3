"""Where the squared norms of an update's parts come from, behind one interface."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from adaptive_batch.layers import batch_dependent_layers
from adaptive_batch.noise.adam_moments import AdamMomentsSource
from adaptive_batch.noise.estimators import harmonic_mean
from adaptive_batch.noise.part_norms import Metric, PartNorms, grad_sq_norm
from adaptive_batch.noise.per_example import PerExampleNorms, unmeasurable_parameters
from adaptive_batch.noise.sample import Batches, NoiseSample, equivalent_sample, ranks_sample
from adaptive_batch.noise.subset import SubsetSource

__all__ = [
    "SOURCES",
    "DifferencedSource",
    "MicroBatchSource",
    "NoiseSource",
    "PerExampleSource",
    "RankSource",
    "SourceFacts",
    "check_source",
    "choose_source",
    "make_source",
]


class NoiseSource(Protocol):
    """Turns the gradients of an update into a measurement.

    ``start``, one ``end_batch`` after each backward pass, ``finish``: once the gradients of the update are
    complete, before they are clipped and after an AMP scale has been taken off. ``cancel`` in place of
    ``finish`` where the update failed. Nothing waits for the device.
    """

    @property
    def pending(self) -> bool:
        """Whether the next update has to be given to the source as well."""

    def start(self) -> None:
        """An update begins."""

    def end_batch(self, size: int, share: float, scale: float | Tensor = 1.0) -> None:
        """A backward pass has ended.

        Args:
            size: its samples.
            share: what its mean gradient was multiplied with, to become a summand of the update's gradient.
            scale: the factor of automatic mixed precision on top of that.
        """

    def finish(self) -> NoiseSample | None:
        """The update's measurement, ``None`` where it takes another update to have one."""

    def cancel(self) -> None:
        """Forget the update, and take all hooks back."""


@dataclass(frozen=True)
class SourceFacts:
    """What is to be known about a source.

    Attributes:
        cost: of a measured update, in words.
        invalid: when its numbers are wrong, in words.
        changes_run: whether a measured update can differ in its last bits from an unmeasured one.
        biased: whether its estimates have a bias even where it is valid.
    """

    cost: str
    invalid: str
    changes_run: bool = False
    biased: bool = False


_ACROSS = "layers or losses that look across the batch (BatchNorm, in-batch contrastive)"

SOURCES = {
    "micro_batches": SourceFacts(
        cost="the norms of the parts, below 1 % of an update; a pass's overhead where it is split for it",
        invalid=f"under {_ACROSS} it speaks of batches of the parts' size; losses that are a mean over "
        "something else than samples",
        changes_run=True,
    ),
    "ranks": SourceFacts(
        cost="the norms of the local gradients, and one reduction of five numbers",
        invalid="as micro_batches, each rank's batch being a part; sharded parameters",
    ),
    "per_example": SourceFacts(
        cost="up to the weight gradients' share of the backward pass once more, no pass of its own",
        invalid=f"{_ACROSS}; losses that are no mean over samples; layers that are not known "
        "(refused by name); models under torch.compile",
    ),
    "norm_layers": SourceFacts(
        cost="the normalisation layers' part of per_example, and a probe at every tenth measurement",
        invalid="as per_example; models whose noise does not follow that of the normalisation layers, as "
        "it does in transformers",
        biased=True,
    ),
    "probe": SourceFacts(
        cost="one more forward and backward pass",
        invalid=f"under {_ACROSS} it speaks of batches of half the size; Python state that training_step "
        "keeps by itself is not put back",
    ),
    "adam_moments": SourceFacts(
        cost="two sums over the optimizer's state every few updates",
        invalid="a gradient that drifts inflates the variance; clipping; Adam with an L2 weight_decay; other "
        "optimizers",
        biased=True,
    ),
    "differenced": SourceFacts(
        cost="a copy of the gradients, and their norms",
        invalid="the parameters move between its two gradients: |G|^2 comes out too small by about "
        "lr (G'HG + tr(H Sigma) / B), and tr(Sigma) too large",
        biased=True,
    ),
}
"""What each source costs and when it is invalid, by name."""


def check_source(name: str, allowed: Iterable[str] = SOURCES) -> str:
    """``name``, if it is ``"auto"`` or one of ``allowed``.

    Raises:
        ValueError: for any other, listing the known ones.
    """
    known = ["auto", *allowed]
    if name not in known:
        raise ValueError(f"noise={name!r} is not known; choose one of {', '.join(map(repr, known))}.")
    return name


def choose_source(module: nn.Module, *, batches: int = 1, ranks: int = 1, metric: bool = False) -> str:
    """What ``noise="auto"`` means for something that only watches.

    The parts that are there anyway come first, ranks before batches that are accumulated; then per-example
    norms, where every layer is known and none looks across the batch; the probe works for any model.
    ``adam_moments`` and ``differenced``, which are biased, are never chosen.

    Args:
        module: what is trained.
        batches: batches that the user accumulates into an update.
        ranks: processes that average their gradients.
        metric: whether norms are taken in another metric, which per-example norms cannot be.
    """
    if ranks > 1:
        return "ranks"
    if batches > 1:
        return "micro_batches"
    known = not (metric or unmeasurable_parameters(module) or batch_dependent_layers(module))
    return "per_example" if known and not is_compiled(module) else "probe"


def is_compiled(module: nn.Module) -> bool:
    """Whether any part of the module runs as a compiled graph, in which hooks on layers may not be called."""
    return getattr(module, "_compiler_ctx", None) is not None or any(  # Lightning's mark
        layer._compiled_call_impl is not None or type(layer).__name__ == "OptimizedModule" for layer in module.modules()
    )


class MicroBatchSource:
    """The parts that an update has anyway: the batches that are accumulated into it.

    Args:
        parameters: whose gradients count.
        metric: see :class:`PartNorms`.
    """

    pending = False

    def __init__(self, parameters: Iterable[nn.Parameter], metric: Metric | None = None) -> None:
        self._parameters = list(parameters)
        self._metric = metric
        self._norms = PartNorms(self._parameters, metric)
        self._batches = Batches()

    def start(self) -> None:
        """Hook into the backward passes to come."""
        self.cancel()
        self._norms = PartNorms(self._parameters, self._metric).__enter__()
        self._batches = Batches()

    def end_batch(self, size: int, share: float, scale: float | Tensor = 1.0) -> None:
        """Close one part."""
        self._norms.end_part(size, scale * share)
        self._batches.add(size, share)

    def finish(self) -> NoiseSample | None:
        """The parts, and the norm of the gradient that they have added up to."""
        self.cancel()
        total = grad_sq_norm(self._parameters, self._metric)
        if total is None or not self._batches.sizes:
            return None
        return self._sample(total)

    def _sample(self, total: Tensor) -> NoiseSample:
        batches, norm = self._batches, torch.stack(self._norms.sq_norms).mean()
        return equivalent_sample(norm, harmonic_mean(batches.sizes), total / batches.share**2, batches.size)

    def cancel(self) -> None:
        """Take the hooks back."""
        self._norms.__exit__(None, None, None)


class RankSource(MicroBatchSource):
    """The gradients of the ranks before they are averaged; each rank calls it at the same updates."""

    def _sample(self, total: Tensor) -> NoiseSample:
        return ranks_sample(self._norms.sq_norms, self._batches, total)


class PerExampleSource:
    """The gradient of every example, from hooks on the layers; see :class:`PerExampleNorms`.

    Args:
        module: what is trained.

    Raises:
        Unmeasurable: if a trainable parameter belongs to a layer that is not known; :meth:`end_batch` where
            that only shows in a backward pass.
    """

    pending = False

    def __init__(self, module: nn.Module) -> None:
        self._norms = PerExampleNorms(module)
        self._batches = Batches()

    def start(self) -> None:
        """Hook into the passes to come."""
        self.cancel()
        self._norms.__enter__()
        self._batches = Batches()

    def end_batch(self, size: int, share: float, scale: float | Tensor = 1.0) -> None:
        """Keep the norms of one batch."""
        self._norms.end_part(size, scale * share)
        self._batches.add(size, share)

    def finish(self) -> NoiseSample | None:
        """The sample that stands for one part per example."""
        self.cancel()
        total, batches = grad_sq_norm(self._norms.parameters), self._batches
        if total is None or not batches.sizes:
            return None
        return equivalent_sample(self._norms.mean_sq_norm, 1, total / batches.share**2, batches.size)

    def cancel(self) -> None:
        """Take the hooks back."""
        self._norms.__exit__(None, None, None)


class DifferencedSource:
    """Two consecutive updates as the two parts of one, for what else is not possible.

    The parameters move in between, which biases both estimates by the order of the learning rate: with plain
    SGD and batches of ``b``, ``|G|^2`` by ``-lr (G'HG + tr(H Sigma) / b)``. It needs a copy of the gradients.

    Source: AdaptDL's estimator for one replica without accumulation (Qiao et al., 2021, arXiv:2008.12260).

    Args:
        parameters: whose gradients count.
        metric: see :class:`PartNorms`.
    """

    def __init__(self, parameters: Iterable[nn.Parameter], metric: Metric | None = None) -> None:
        self._parameters = list(parameters)
        self._metric = metric
        self._batches = Batches()
        self._first: dict[nn.Parameter, Tensor] = {}
        self._first_size = 0.0

    @property
    def pending(self) -> bool:
        """Whether the first of two gradients is kept."""
        return bool(self._first)

    def start(self) -> None:
        """An update begins."""
        self._batches = Batches()

    def end_batch(self, size: int, share: float, scale: float | Tensor = 1.0) -> None:
        """Count the samples."""
        self._batches.add(size, share)

    @torch.no_grad()
    def finish(self) -> NoiseSample | None:
        """The second of two updates gives both as parts."""
        if not self._batches.sizes:
            return None
        size, factor = self._batches.size, 1 / self._batches.share
        gradients = {p: self._measured(p, p.grad) * factor for p in self._parameters if p.grad is not None}
        if not self._first:
            self._first, self._first_size = gradients, size
            return None
        first, first_size = self._first, self._first_size
        self.cancel()
        share = size / (size + first_size)
        pairs = [(first.get(p), gradients.get(p)) for p in {**first, **gradients}]
        whole = [_mixed(a, b, share) for a, b in pairs]
        norms = [_sq_norm(first.values()), _sq_norm(gradients.values())]
        return NoiseSample(norms, [first_size, size], _sq_norm(whole))

    def _measured(self, parameter: nn.Parameter, gradient: Tensor) -> Tensor:
        dense = gradient.to_dense() if gradient.is_sparse else gradient
        return (dense if self._metric is None else self._metric(parameter, dense)).float()

    def cancel(self) -> None:
        """Drop the gradient that was kept."""
        self._first = {}


def _mixed(first: Tensor | None, second: Tensor | None, share: float) -> Tensor:
    parts = [] if first is None else [first * (1 - share)]
    parts += [] if second is None else [second * share]
    return torch.stack(parts).sum(0)  # one of them for a parameter that only one of the updates has reached


def _sq_norm(tensors: Iterable[Tensor]) -> Tensor:
    return torch.stack(torch._foreach_norm(list(tensors))).square().sum()


def make_source(name: str, module: nn.Module, optimizer: Optimizer, metric: Metric | None = None) -> NoiseSource:
    """The source of that name over the optimizer's parameters; ``"probe"`` is the callbacks' own.

    Raises:
        Unmeasurable: if per-example norms are not known for the module.
        ValueError: if the optimizer does not go with the source, or the source not with a metric.
    """
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    if metric is not None and name in ("per_example", "norm_layers", "adam_moments"):
        raise ValueError(f'noise="{name}" has no norms in another metric; use "probe", or preconditioned=False.')
    if name == "per_example":
        return PerExampleSource(module)
    if name == "norm_layers":
        return SubsetSource(module, parameters)
    if name == "adam_moments":
        return AdamMomentsSource(optimizer)
    kinds: dict[str, type[MicroBatchSource | DifferencedSource]]
    kinds = {"micro_batches": MicroBatchSource, "ranks": RankSource, "differenced": DifferencedSource}
    return kinds[name](parameters, metric)
