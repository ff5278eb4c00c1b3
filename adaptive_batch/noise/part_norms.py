"""Squared gradient norms of an update's parts, taken while they are back-propagated."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from types import TracebackType

import torch
from torch import Tensor, nn
from torch._utils import _flatten_dense_tensors
from torch.utils.hooks import RemovableHandle

__all__ = ["Metric", "PartNorms", "grad_sq_norm", "sq_norm"]

_FEW = 2**16
"""Numbers that are copied to lie side by side sooner than one kernel for each tensor is started."""

HALF = (torch.float16, torch.bfloat16)
"""In which the square of a norm overflows."""

Metric = Callable[[nn.Parameter, Tensor], Tensor]
"""``(parameter, gradient) -> gradient`` in the metric that norms are taken in."""


def _values(gradient: Tensor) -> Tensor:
    return gradient.coalesce().values() if gradient.is_sparse else gradient


def _norm(gradient: Tensor) -> Tensor:
    # In float32 at least: the square of a half-precision norm overflows.
    dtype = torch.promote_types(gradient.dtype, torch.float32)
    norm: Tensor = torch.linalg.vector_norm(_values(gradient), dtype=dtype)
    return norm


def grad_sq_norm(parameters: Iterable[nn.Parameter], metric: Metric | None = None) -> Tensor | None:
    """Squared norm of all gradients together, as a tensor on their device; ``None`` without gradients."""
    held = ((p, p.grad) for p in dict.fromkeys(parameters))
    gradients = [g if metric is None else metric(p, g) for p, g in held if g is not None]
    return sq_norm([_values(gradient) for gradient in gradients]) if gradients else None


def sq_norm(gradients: Sequence[Tensor]) -> Tensor:
    """Squared norm of the gradients, at least one, together."""
    if sum(map(Tensor.numel, gradients)) <= _FEW and len({g.device for g in gradients}) == 1:
        joined = _flatten_dense_tensors(gradients)  # type: ignore[no-untyped-call]
        if joined.dtype in HALF:
            joined = joined.float()
        if joined.is_floating_point():
            return torch.dot(joined, joined)
    if any(g.dtype in HALF for g in gradients):
        return _joint_sq_norm([_norm(g) for g in gradients])
    return _joint_sq_norm(torch._foreach_norm(list(gradients)))


def _joint_sq_norm(norms: Sequence[Tensor]) -> Tensor:
    """Squared norm of the whole from the norms of its pieces, which may lie on several devices."""
    device = norms[0].device
    here = torch.stack([norm if norm.device == device else norm.to(device) for norm in norms])
    return torch.dot(here, here)


class PartNorms:
    """Records the squared norm of each part's mean gradient, without copying a gradient.

    Hooks on the parameters see the gradient of one backward pass before it is added to ``.grad`` and
    before ranks are averaged (hooks after the accumulation would see running sums). Use as a context
    around the passes of one update and call :meth:`end_part` after each.

    Args:
        parameters: whose gradients count; those that do not require one are left out.
        metric: norms are taken of ``metric(parameter, gradient)``; ``None`` leaves gradients as they are.
    """

    def __init__(self, parameters: Iterable[nn.Parameter], metric: Metric | None = None) -> None:
        self._metric = metric
        self._parameters = [p for p in dict.fromkeys(parameters) if p.requires_grad]
        self._handles: list[RemovableHandle] = []
        self._norms: list[Tensor] = []
        self.sq_norms: list[Tensor] = []
        self.sizes: list[int] = []

    def __enter__(self) -> PartNorms:
        register = [(p, p.register_hook) for p in self._parameters]
        self._handles = [
            hook(partial(self._record, p))  # type: ignore[no-untyped-call]
            for p, hook in register
        ]
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._norms.clear()

    def _record(self, parameter: nn.Parameter, gradient: Tensor) -> None:
        measured = gradient if self._metric is None else self._metric(parameter, gradient)
        self._norms.append(_norm(measured))

    def end_part(self, size: int, weight: float | Tensor) -> None:
        """Close the part whose backward pass has just ended; one that reached no parameter has a norm of 0.

        Args:
            size: its samples.
            weight: what its mean gradient was multiplied with (its share of the update, a loss scale).
        """
        norms = self._norms or [torch.zeros((), device=p.device) for p in self._parameters[:1]]
        self.sq_norms.append(_joint_sq_norm(norms) / weight**2)
        self.sizes.append(size)
        self._norms.clear()
