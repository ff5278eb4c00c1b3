"""Training data as pairs ``(x, y)``: from arrays, and onto a device."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

__all__ = ["Rows", "no_collate", "to_device"]


class Rows(Dataset[Any]):
    """Rows of two arrays, fetched a batch at a time.

    Args:
        x: an array, a tensor or a list, one sample per row.
        y: likewise.
        dtype: what values in floating point are converted to.

    Raises:
        TypeError: for values that are no numbers.
        ValueError: if ``x`` and ``y`` differ in length, or have none.
    """

    def __init__(self, x: Any, y: Any, dtype: torch.dtype) -> None:
        self.x, self.y = _as_tensor("X", x, dtype), _as_tensor("y", y, dtype)
        if len(self.x) != len(self.y):
            raise ValueError(f"X has {len(self.x)} samples and y has {len(self.y)}; they must have as many.")

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return self.x[index], self.y[index]

    def __getitems__(self, indices: list[int]) -> tuple[Tensor, Tensor]:
        return self.x[indices], self.y[indices]


def no_collate(batch: Any) -> Any:
    """For rows that were fetched as a batch."""
    return batch


def _as_tensor(name: str, values: Any, dtype: torch.dtype) -> Tensor:
    tensor = values if isinstance(values, Tensor) else _from_array(name, values)
    if tensor.ndim == 0:
        raise ValueError(f"{name} is a single number; it must have one sample per row.")
    return tensor.to(dtype) if tensor.is_floating_point() else tensor


def _from_array(name: str, values: Any) -> Tensor:
    array = np.require(values, requirements=["C", "W"])  # what a tensor can share memory with
    if array.dtype.kind not in "biufc":
        raise TypeError(f"{name} holds values of type {array.dtype.name}; it must hold numbers.")
    return torch.from_numpy(array)


def to_device(batch: Any, device: torch.device) -> tuple[Any, Any]:
    """The pair that a batch has to be, with all its tensors on the device."""
    if not isinstance(batch, (tuple, list)) or len(batch) != 2:
        count = f" of {len(batch)}" if isinstance(batch, (tuple, list)) else ""
        raise TypeError(f"a batch must be a pair (x, y), but the data gave a {type(batch).__name__}{count}.")
    x, y = batch
    return _moved(x, device), _moved(y, device)


def _moved(value: Any, device: torch.device) -> Any:
    if hasattr(value, "to"):
        return value.to(device)
    if isinstance(value, dict):
        return {key: _moved(entry, device) for key, entry in value.items()}
    if isinstance(value, (tuple, list)):
        entries = [_moved(entry, device) for entry in value]
        return type(value)(*entries) if hasattr(value, "_fields") else type(value)(entries)
    return value
