"""What the parts of a batch returned and logged, as if the batch had been one."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from adaptive_batch.measurement import Number

__all__ = ["Parts"]

_REDUCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "sum": lambda values: values.sum(0),
    "max": lambda values: values.amax(0),
    "min": lambda values: values.amin(0),
}


class Parts:
    """The parts of one batch: how much each counts, and what ``training_step`` returned for it.

    Three kinds of values come out of a ``training_step``, and each is put together in its own way:

    - the loss, with the weights that the gradients have. A value that *is* the loss (logged, or returned
      beside it) is recognised by being equal to it in every part;
    - any other mean: by the samples of the parts, or by ``weight_fn`` where that is given, because a value
      beside a loss that is a mean over tokens is usually one over tokens too;
    - what has an entry per sample: one after the other.

    Args:
        sizes: samples of each part.
        weights: of each part's loss.
        by_weights: whether other means count by these weights too, not by the samples.
        accumulate: what Lightning has divided the losses by.
    """

    def __init__(self, sizes: Sequence[int], weights: Sequence[Number], *, by_weights: bool, accumulate: int) -> None:
        self._sizes = list(sizes)
        self._weights = list(weights)
        self._accumulate = accumulate
        counts: Sequence[Number] = weights if by_weights else sizes
        self._shares = _normalised(counts)
        self._loss_counts_alike = not by_weights and all(w == s for w, s in zip(weights, self._shares, strict=True))
        self._results: list[Any] = []
        self._losses: list[Tensor | None] = []

    def add(self, result: Any) -> None:
        """The next part's closure result; only values are kept, no graph."""
        loss = result.closure_loss
        self._losses.append(None if loss is None else loss.detach())
        self._results.append(type(result)(None, extra=result.extra))

    def joined(self) -> Any:
        """The closure result of the whole batch. A part without a loss (``None`` returned) is left out."""
        present = [(i, loss) for i, loss in enumerate(self._losses) if loss is not None]
        if not present:
            return self._results[0]
        parts = [i for i, _ in present]
        loss = _weighted([loss for _, loss in present], [self._weights[i] for i in parts])
        extras = [self._results[i].extra for i in parts]
        extra = {key: self._join([e.get(key) for e in extras], parts) for key in extras[0]}
        return type(self._results[0])(loss, extra=extra)

    def reduced(
        self,
        values: Sequence[Tensor],
        parts: Sequence[int],
        *,
        by: str = "mean",
        counts: Sequence[int] | None = None,
    ) -> Tensor:
        """The whole batch's value from those of some of its parts.

        Args:
            values: scalars.
            parts: which part each is of.
            by: ``"mean"``, ``"sum"``, ``"max"`` or ``"min"``.
            counts: what the values of a mean count by, if not by what means count by in general.
        """
        if by == "mean":
            values = [v.to(torch.promote_types(v.dtype, torch.float32)) for v in values]
            shares = _normalised([self._shares[i] for i in parts] if counts is None else counts)
            reduced = _weighted(values, shares)
            if counts is None and self._loss_counts_alike:
                return reduced
        else:
            reduced = _REDUCTIONS[by](torch.stack(list(values)))
        losses = [self._losses[i] for i in parts]
        if any(loss is None for loss in losses) or not reduced.is_floating_point():
            return reduced
        # Compared and chosen on the device: nothing waits for it.
        same = torch.stack([self._is_loss(v, loss) for v, loss in zip(values, losses, strict=True)])
        return torch.where(same.all(), _weighted(values, [self._weights[i] for i in parts]), reduced)

    def _is_loss(self, value: Tensor, loss: Any) -> Tensor:
        loss = loss.to(device=value.device, dtype=value.dtype) * self._accumulate
        return torch.isclose(value, loss.reshape(value.shape), rtol=1e-5, atol=0.0, equal_nan=True)

    def _join(self, values: list[Any], parts: list[int]) -> Any:
        first = values[0]
        if any(type(v) is not type(first) for v in values):
            return values[-1]
        if isinstance(first, Tensor):
            return self._join_tensors([v.detach() for v in values], parts)
        if isinstance(first, float):
            return float(self.reduced([torch.tensor(v, dtype=torch.float64) for v in values], parts))
        if isinstance(first, Mapping):
            return {key: self._join([v.get(key) for v in values], parts) for key in first}
        if isinstance(first, (list, tuple)):
            return self._join_sequences(values, parts)
        return values[-1]

    def _join_sequences(self, values: list[Any], parts: list[int]) -> Any:
        first = values[0]
        if all(len(v) == self._sizes[i] for v, i in zip(values, parts, strict=True)):
            return type(first)(entry for value in values for entry in value)
        if len({len(v) for v in values}) > 1:
            return values[-1]
        entries = [self._join(list(column), parts) for column in zip(*values, strict=True)]
        return first._make(entries) if hasattr(first, "_make") else type(first)(entries)

    def _join_tensors(self, values: list[Tensor], parts: list[int]) -> Any:
        alike = len({v.shape[1:] for v in values}) == 1
        if alike and all(v.ndim > 0 and len(v) == self._sizes[i] for v, i in zip(values, parts, strict=True)):
            return torch.cat(values)
        if any(v.numel() != 1 or v.dtype is torch.bool for v in values):
            return values[-1]
        if values[0].is_floating_point():
            return self.reduced(values, parts).to(values[0].dtype)
        return torch.stack(values).sum(0)  # a whole number is a count


def _normalised(counts: Sequence[Number]) -> list[Number]:
    total = sum(counts)
    return [count / total for count in counts]


def _weighted(values: Sequence[Tensor], weights: Sequence[Number]) -> Tensor:
    return torch.stack([v * w for v, w in zip(values, weights, strict=True)]).sum(0)
