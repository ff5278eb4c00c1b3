"""Splitting a batch into micro-batches, whatever its structure."""

from __future__ import annotations

import copy
import dataclasses
import enum
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

__all__ = ["balanced_sizes", "register_splitter", "split_batch"]

Splitter = Callable[[Any, Sequence[int]], Sequence[Any]]

_SPLITTERS: dict[type, Splitter] = {}
_BROADCAST_TYPES = (str, bytes, int, float, complex, bool, type(None), torch.device, torch.dtype, enum.Enum)


def register_splitter(type_: type, fn: Splitter) -> None:
    """Teach :func:`split_batch` a type that it does not know.

    Args:
        type_: batches, or entries of a batch, of this type or a subclass are given to ``fn``.
        fn: ``fn(value, sizes)`` returns one value per size; ``sizes`` sum to the samples in ``value``.

    Raises:
        TypeError: if ``type_`` is not a class or ``fn`` cannot be called.
    """
    if not isinstance(type_, type):
        raise TypeError(f"register_splitter needs a class as its first argument, got {type_!r}.")
    if not callable(fn):
        raise TypeError(f"register_splitter needs a function (value, sizes) -> parts, got {fn!r}.")
    _SPLITTERS[type_] = fn


def balanced_sizes(n: int, largest: int) -> list[int]:
    """Sizes of the fewest parts of ``n`` samples that are at most ``largest``, as equal as possible.

    >>> balanced_sizes(10, 4)
    [4, 3, 3]
    """
    parts = -(-n // largest)
    size, longer = divmod(n, parts)
    return [size + 1] * longer + [size] * (parts - longer)


def split_batch(batch: Any, sizes: Sequence[int], n: int) -> list[Any]:
    """Split a batch of ``n`` samples into consecutive micro-batches.

    Tensors and arrays whose first dimension is ``n`` are sliced (views, no copies); mappings, sequences,
    named tuples and dataclasses are rebuilt with their own type; a sequence of ``n`` entries that are
    not themselves splittable is taken as one entry per sample; numbers, strings, ``None`` and
    zero-dimensional tensors go to every part.

    Args:
        batch: what the loader yielded.
        sizes: samples of each part, summing to ``n``.
        n: the known number of samples in ``batch``.

    Returns:
        One micro-batch per size, of the batch's own type.

    Raises:
        ValueError: if the sizes do not sum to ``n``, or an entry cannot be split unambiguously.
    """
    if sum(sizes) != n or min(sizes, default=0) < 1:
        raise ValueError(f"split_batch needs positive sizes that sum to n={n}, got {list(sizes)}.")
    if _kind(batch, n, "batch") is not _Kind.SPLIT:
        raise ValueError(
            f"split_batch found nothing with {n} samples in a batch of type {type(batch).__name__}."
        )
    stops = np.cumsum(sizes).tolist()
    slices = [slice(stop - size, stop) for stop, size in zip(stops, sizes, strict=True)]
    return _parts(batch, _Plan(n, sizes, slices))


class _Plan(NamedTuple):
    n: int
    sizes: Sequence[int]
    slices: list[slice]


class _Kind(enum.Enum):
    """What an entry is to a split."""

    SPLIT = enum.auto()  # it, or something in it, has the n samples
    PER_SAMPLE = enum.auto()  # a sequence with one opaque entry per sample
    BROADCAST = enum.auto()  # the same for every part


class _CannotSplit(ValueError):
    """An entry that is neither per sample nor shared; the message names it."""


def _splitter_for(value: Any) -> Splitter | None:
    return next((_SPLITTERS[cls] for cls in type(value).__mro__ if cls in _SPLITTERS), None)


def _is_batch_indexed(value: Any) -> bool:
    """TensorDict and its like: indexable along a batch dimension that they name themselves."""
    size = getattr(value, "batch_size", None)
    return isinstance(size, torch.Size) and len(size) > 0 and hasattr(value, "__getitem__")


def _kind(value: Any, n: int, path: str) -> _Kind:
    if _splitter_for(value) is not None:
        return _Kind.SPLIT
    if isinstance(value, (Tensor, np.ndarray)):
        return _array_kind(value, n, path)
    if isinstance(value, _BROADCAST_TYPES):
        return _Kind.BROADCAST
    if _is_batch_indexed(value):
        return _first_dimension_kind(value.batch_size[0], n, path)
    if isinstance(value, Mapping):
        return _joint_kind([_kind(v, n, f"{path}[{k!r}]") for k, v in value.items()])
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = dataclasses.fields(value)
        return _joint_kind([_kind(getattr(value, f.name), n, f"{path}.{f.name}") for f in fields])
    if isinstance(value, Sequence):
        return _sequence_kind(value, n, path)
    raise _CannotSplit(
        f"{path} of type {type(value).__name__} cannot be split into micro-batches; teach it with "
        f"register_splitter({type(value).__name__}, fn), or set micro_batch_size=None."
    )


def _array_kind(value: Tensor | np.ndarray, n: int, path: str) -> _Kind:
    if isinstance(value, Tensor) and (value.is_nested or value.layout is not torch.strided):
        raise _CannotSplit(
            f"{path} is a nested or sparse tensor, which cannot be sliced by sample; "
            "put it into a type of its own and teach that with register_splitter."
        )
    return _Kind.BROADCAST if value.ndim == 0 else _first_dimension_kind(value.shape[0], n, path)


def _first_dimension_kind(size: int, n: int, path: str) -> _Kind:
    if size == n:
        return _Kind.SPLIT
    raise _CannotSplit(
        f"{path} has first dimension {size} where the batch has {n} samples; put the samples first, or "
        "teach its type with register_splitter."
    )


def _joint_kind(kinds: Sequence[_Kind]) -> _Kind:
    return _Kind.BROADCAST if all(kind is _Kind.BROADCAST for kind in kinds) else _Kind.SPLIT


def _sequence_kind(value: Sequence[Any], n: int, path: str) -> _Kind:
    """A structure of splittable entries if it can be one, otherwise a list with an entry per sample."""
    try:
        kind = _joint_kind([_kind(v, n, f"{path}[{i}]") for i, v in enumerate(value)])
    except _CannotSplit:
        if len(value) == n and not _is_named_tuple(value):
            return _Kind.PER_SAMPLE
        raise
    if kind is _Kind.BROADCAST and len(value) > 0:
        if len(value) == n and not _is_named_tuple(value):
            return _Kind.PER_SAMPLE
        raise _CannotSplit(
            f"{path} is a sequence of {len(value)} where the batch has {n} samples; give it an entry per "
            "sample, or wrap it in a type of its own and teach that with register_splitter."
        )
    return kind


def _is_named_tuple(value: Any) -> bool:
    return isinstance(value, tuple) and hasattr(value, "_fields")


def _parts(value: Any, plan: _Plan) -> list[Any]:
    """One part of ``value`` per slice; ``_kind`` has already accepted it."""
    splitter = _splitter_for(value)
    if splitter is not None:
        return list(splitter(value, plan.sizes))
    kind = _kind(value, plan.n, "batch")
    if kind is _Kind.BROADCAST:
        return [value] * len(plan.slices)
    if kind is _Kind.PER_SAMPLE or isinstance(value, (Tensor, np.ndarray)) or _is_batch_indexed(value):
        return [value[s] for s in plan.slices]
    if isinstance(value, Mapping):
        return _mapping_parts(value, plan)
    if dataclasses.is_dataclass(value):
        return _dataclass_parts(value, plan)
    return _structure_parts(value, plan)


def _mapping_parts(value: Any, plan: _Plan) -> list[Any]:
    # A shallow copy keeps the subclass and whatever else it carries (an encoding, a default factory).
    parts = [copy.copy(value) for _ in plan.slices]
    for key, entry in value.items():
        for part, entry_part in zip(parts, _parts(entry, plan), strict=True):
            part[key] = entry_part
    return parts


def _dataclass_parts(value: Any, plan: _Plan) -> list[Any]:
    parts = [copy.copy(value) for _ in plan.slices]
    for field in dataclasses.fields(value):
        for part, entry_part in zip(parts, _parts(getattr(value, field.name), plan), strict=True):
            object.__setattr__(part, field.name, entry_part)  # frozen ones too; __post_init__ ran once
    return parts


def _structure_parts(value: Sequence[Any], plan: _Plan) -> list[Any]:
    columns = zip(*(_parts(entry, plan) for entry in value), strict=True)
    if _is_named_tuple(value):
        return [type(value)(*column) for column in columns]
    return [type(value)(column) for column in columns]  # type: ignore[call-arg]
