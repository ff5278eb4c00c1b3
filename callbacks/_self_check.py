"""Whether a batch's gradient is that of its parts, tried on one batch; and if not, why."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from adaptive_batch.callbacks import _lightning
from adaptive_batch.callbacks._trial import Trial
from adaptive_batch.layers import batch_dependent_layers
from adaptive_batch.measurement import Number
from adaptive_batch.memory import free_memory, is_out_of_memory
from adaptive_batch.micro_batching import split_batch

if TYPE_CHECKING:
    from pytorch_lightning import LightningModule, Trainer

__all__ = ["SelfCheck"]

Weight = Callable[[Any, Any, int, int], Number]

_TOLERANCES = {torch.float64: 1e-9, torch.float32: 3e-3, torch.float16: 1e-2, torch.bfloat16: 5e-2}
"""Relative to the gradient; above the rounding (TF32 on a GPU), below what a wrong weight makes."""

_LARGEST_SCALE = 1024.0  # keeps small gradients in half precision, far from its largest number
_NAMED = 3


class SelfCheck:
    """Compares the gradient of a batch with that of its parts, with everything put back afterwards.

    Each pass of the comparison starts from the same state. Where two passes over the same batch differ, the
    model draws random numbers: then all layers but those that normalise over the batch are compared as in
    evaluation, which turns dropout off.

    Args:
        trainer: whose loop this belongs to.
        module: what is trained.
        weight: ``(part, batch, samples of the part, samples of the batch) -> weight`` of the part's loss.
    """

    def __init__(self, trainer: Trainer, module: LightningModule, weight: Weight) -> None:
        self._trainer = trainer
        self._module = module
        self._weight = weight
        self._trial = Trial(trainer, module)
        self._across_batch = batch_dependent_layers(module)
        self._names = [name for name, p in module.named_parameters() if p.requires_grad]

    def run(self, kwargs: Mapping[str, Any], samples: int) -> bool:
        """Check the batch ``kwargs["batch"]``; one that does not fit into memory is checked on fewer samples.

        Returns:
            Whether it could be checked: there are too few samples, otherwise, or no gradient.

        Raises:
            ValueError: if the parts do not add up to the whole, with what does not decompose and what to do.
        """
        size = samples
        while size >= 2 * (2 if self._across_batch else 1):
            try:
                with self._trial.undone():
                    return self._compare(kwargs, samples, size)
            except Exception as error:
                if not is_out_of_memory(error):
                    raise
            free_memory(self._trainer.strategy.root_device)  # out here, where the error holds nothing any more
            size //= 2
        return False

    def _compare(self, kwargs: Mapping[str, Any], samples: int, size: int) -> bool:
        whole = kwargs["batch"]
        if size < samples:
            whole = split_batch(whole, [size, samples - size], samples)[0]
        second = max(size // 3, 2 if self._across_batch else 1)
        sizes = [size - second, second]
        parts = split_batch(whole, sizes, size)
        weights = [self._weight(part, whole, n, size) for part, n in zip(parts, sizes, strict=True)]

        def gradients() -> _Gradients | None:
            found = [g for g in (self._gradient(kwargs, batch) for batch in (whole, *parts)) if g is not None]
            return _Gradients(found[0], found[1:]) if len(found) == 1 + len(parts) else None

        first, again = self._gradient(kwargs, whole), self._gradient(kwargs, whole, rewind=False)
        if first is None or again is None or not first.norm() > 0:
            return False
        tolerance = self._tolerance()
        with _evaluating(self._module, self._across_batch) if _differ(first, again, tolerance) else _unchanged():
            found = gradients()
            if found is None:
                return False
            if found.error(weights) <= tolerance:
                return True
            if _differ(found.whole, self._gradient(kwargs, whole, rewind=False), tolerance):
                warnings.warn(
                    "self_check could compare nothing: training_step draws random numbers by itself, so "
                    "that two passes over the same batch have different gradients.",
                    stacklevel=2,
                )
                return True
        complaint = self._complaint(found, weights, sizes)
        with _evaluating(self._module, []):
            plain = gradients()
        raise ValueError(complaint + self._reason(plain or found, weights, sizes, tolerance))

    def _gradient(self, kwargs: Mapping[str, Any], batch: Any, *, rewind: bool = True) -> Tensor | None:
        self._trial.clear()
        if rewind:
            self._trial.rewind()
        loss = self._trial.loss(kwargs, batch)
        if loss is None:
            return None
        scale = min(float(_lightning.amp_scale(self._trainer)), _LARGEST_SCALE)
        torch.autograd.backward(loss * scale)
        pieces = [
            torch.zeros_like(p) if p.grad is None else p.grad.to_dense()
            for p in self._module.parameters()
            if p.requires_grad
        ]
        dtype = torch.promote_types(pieces[0].dtype, torch.float32)
        return torch.cat([piece.flatten().to(dtype) for piece in pieces])

    def _tolerance(self) -> float:
        precision = str(self._trainer.precision)
        if "bf16" in precision:
            return _TOLERANCES[torch.bfloat16]
        if "16" in precision:
            return _TOLERANCES[torch.float16]
        dtypes = {p.dtype for p in self._module.parameters() if p.requires_grad}
        return max(_TOLERANCES.get(dtype, 0.0) for dtype in dtypes)

    def _complaint(self, found: _Gradients, weights: Sequence[Number], sizes: Sequence[int]) -> str:
        difference = found.combined(weights) - found.whole
        lengths = [p.numel() for p in self._module.parameters() if p.requires_grad]
        errors = [float(piece.norm() / found.whole.norm()) for piece in torch.split(difference, lengths)]
        worst = sorted(zip(errors, self._names, strict=True), reverse=True)[:_NAMED]
        named = ", ".join(f"{name} ({error:.1%})" for error, name in worst if error > 0)
        return (
            f"self_check: split into {sizes[0]} + {sizes[1]} samples, the first batch's gradient changes by "
            f"{found.error(weights):.1%} of its norm, most in {named}: "
        )

    def _reason(self, found: _Gradients, weights: Sequence[Number], sizes: Sequence[int], tolerance: float) -> str:
        """What is wrong, from the gradients with every layer in evaluation."""
        if found.error(weights) <= tolerance:
            layers = ", ".join(self._across_batch) or "a layer that behaves differently in training"
            return (
                f"{layers} looks across the batch; use GroupNorm or LayerNorm there, or set "
                "micro_batch_size=None, or self_check=False to live with it."
            )
        if found.error([1.0, 1.0]) <= tolerance:
            return 'the loss is a sum over the samples; set loss_reduction="sum".'
        if found.error([size / sum(sizes) for size in sizes]) <= tolerance:
            return 'the loss is a mean over the samples; leave weight_fn out and set loss_reduction="mean".'
        fitted = found.fitted()
        if found.error(fitted) <= tolerance:
            return (
                f"the loss is a mean over something else than samples, whose parts count {fitted[0]:.3f} + "
                f"{fitted[1]:.3f} here instead of {float(weights[0]):.3f} + {float(weights[1]):.3f}; give "
                "weight_fn=lambda micro_batch, batch: ... that says so."
            )
        return (
            "no weights of the parts make up for it, so the loss compares the samples of a batch with each "
            "other (a contrastive loss, for example); set micro_batch_size=None."
        )


class _Gradients:
    """The gradients of a batch and of its parts, flat."""

    def __init__(self, whole: Tensor, parts: Sequence[Tensor]) -> None:
        self.whole = whole
        self._parts = torch.stack(list(parts))

    def combined(self, weights: Sequence[Number]) -> Tensor:
        return torch.stack([w * part for w, part in zip(weights, self._parts, strict=True)]).sum(0)

    def error(self, weights: Sequence[Number]) -> float:
        return float((self.combined(weights) - self.whole).norm() / self.whole.norm())

    def fitted(self) -> list[float]:
        """The weights with which the parts come closest to the whole."""
        parts, whole = self._parts.double().cpu(), self.whole.double().cpu()
        weights: list[float] = torch.linalg.lstsq(parts @ parts.T, parts @ whole).solution.tolist()
        return weights


def _differ(first: Tensor, second: Tensor | None, tolerance: float) -> bool:
    return second is None or float((first - second).norm()) > tolerance * float(first.norm())


@contextmanager
def _unchanged() -> Iterator[None]:
    yield


@contextmanager
def _evaluating(module: nn.Module, layers: Sequence[str]) -> Iterator[None]:
    """All modules in evaluation, except the layers that look across the batch."""
    kept = {name.split(" ")[0] for name in layers}
    before = [(m, m.training) for m in module.modules()]
    for name, m in module.named_modules():
        m.training = m.training and name in kept
    try:
        yield
    finally:
        for m, training in before:
            m.training = training
