"""Squared gradient norms of an update's parts, taken while they are back-propagated."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from types import TracebackType

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

__all__ = ["PartNorms", "grad_sq_norm"]


def _values(gradient: Tensor) -> Tensor:
    return gradient.coalesce().values() if gradient.is_sparse else gradient


def _norm(gradient: Tensor) -> Tensor:
    # In float32 at least: the square of a half-precision norm overflows.
    dtype = torch.promote_types(gradient.dtype, torch.float32)
    return torch.linalg.vector_norm(_values(gradient), dtype=dtype)


def grad_sq_norm(parameters: Iterable[nn.Parameter]) -> Tensor | None:
    """Squared norm of all gradients together, as a tensor on their device; ``None`` without gradients."""
    gradients = [_values(p.grad) for p in dict.fromkeys(parameters) if p.grad is not None]
    if not gradients:
        return None
    if any(g.dtype in (torch.float16, torch.bfloat16) for g in gradients):
        return _joint_norm([_norm(g) for g in gradients]).square()
    return _joint_norm(torch._foreach_norm(gradients)).square()


def _joint_norm(norms: Sequence[Tensor]) -> Tensor:
    """Norm of the whole from those of its pieces, which may lie on several devices; 0 without pieces."""
    if not norms:
        return torch.zeros(())
    return torch.linalg.vector_norm(torch.stack([norm.to(norms[0].device) for norm in norms]))


class PartNorms:
    """Records the squared norm of each part's mean gradient, without copying a gradient.

    Hooks on the parameters see the gradient of one backward pass before it is added to ``.grad`` and
    before ranks are averaged (hooks after the accumulation would see running sums). Use as a context
    around the passes of one update and call :meth:`end_part` after each.

    Args:
        parameters: whose gradients count; those that do not require one are left out.
    """

    def __init__(self, parameters: Iterable[nn.Parameter]) -> None:
        self._parameters = [p for p in dict.fromkeys(parameters) if p.requires_grad]
        self._handles: list[RemovableHandle] = []
        self._norms: list[Tensor] = []
        self.sq_norms: list[Tensor] = []
        self.sizes: list[int] = []

    def __enter__(self) -> PartNorms:
        self._handles = [p.register_hook(self._record) for p in self._parameters]
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._norms.clear()

    def _record(self, gradient: Tensor) -> None:
        self._norms.append(_norm(gradient))

    def end_part(self, size: int, weight: float | Tensor) -> None:
        """Close the part whose backward pass has just ended; one that reached no parameter has a norm of 0.

        Args:
            size: its samples.
            weight: what its mean gradient was multiplied with (its share of the update, a loss scale).
        """
        self.sq_norms.append((_joint_norm(self._norms) / weight).square())
        self.sizes.append(size)
        self._norms.clear()
