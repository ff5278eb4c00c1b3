"""Splitting a batch into micro-batches, whatever its structure."""

from __future__ import annotations

import copy
import dataclasses
import enum
import functools
import numbers
from collections.abc import Callable, Iterable, Mapping, MutableMapping, Sequence, Sized
from itertools import accumulate
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

__all__ = ["balanced_sizes", "register_splitter", "split_batch"]

Splitter = Callable[[Any, Sequence[int]], Sequence[Any]]

_SHARED_TYPES = (str, bytes, numbers.Number, np.generic, type(None), torch.device, torch.dtype, enum.Enum)


def _unknown(value: Any, sizes: Sequence[int]) -> Sequence[Any]:
    raise NotImplementedError


_splitters = functools.singledispatch(_unknown)


def register_splitter(type_: type, fn: Splitter) -> None:
    """Teach :func:`split_batch` a type that it does not know, or another way to split one that it does.

    Args:
        type_: batches, or entries of a batch, of this type or a subclass are given to ``fn``; of several
            types registered the nearest one counts.
        fn: ``fn(value, sizes)`` returns one value per size; ``sizes`` sum to the samples in ``value``.

    Raises:
        TypeError: if ``type_`` is not a class or ``fn`` cannot be called.
    """
    if not isinstance(type_, type):
        raise TypeError(f"register_splitter needs a class as its first argument, got {type_!r}.")
    if not callable(fn):
        raise TypeError(f"register_splitter needs a function (value, sizes) -> parts, got {fn!r}.")
    _splitters.register(type_, fn)


def balanced_sizes(n: int, largest: int, smallest: int = 1) -> list[int]:
    """Sizes of the fewest parts of ``n`` samples that are at most ``largest``, as equal as possible.

    None is below ``smallest``, even if one must then be above ``largest``.

    Raises:
        ValueError: if either is below one.

    >>> balanced_sizes(10, 4)
    [4, 3, 3]
    """
    if n < 1 or largest < 1:
        raise ValueError(f"{n} samples cannot be split into parts of at most {largest}; both must be positive.")
    parts = max(1, min(-(-n // largest), n // smallest))
    size, longer = divmod(n, parts)
    return [size + 1] * longer + [size] * (parts - longer)


UNEQUAL = 4
"""To time passes of two sizes, a batch is split into one part in so many of its samples and the rest."""


def unequal_sizes(n: int, *, few_first: bool) -> list[int]:
    """Sizes of two parts of ``n`` samples whose times tell what a sample costs; fewer than four stay one part.

    The first part also clears the gradients, so ``few_first`` should be true by turns.
    """
    few = n // UNEQUAL
    if not few:
        return [n]
    return [few, n - few] if few_first else [n - few, few]


def split_batch(batch: Any, sizes: Sequence[int], n: int) -> list[Any]:
    """Split a batch of ``n`` samples into consecutive micro-batches.

    Tensors and arrays whose first dimension is ``n`` are sliced (views, no copies), and so is what names
    its own ``batch_size`` dimension (TensorDict); mappings, sequences, named tuples and dataclasses are
    rebuilt with their own type; a sequence of ``n`` entries that are not themselves splittable has one
    entry per sample; numbers, strings, ``None`` and zero-dimensional tensors go to every part.

    A list of ``n`` tensors that all have ``n`` rows can be read both ways. At the top it is taken as the
    columns that PyTorch's collate function makes; further inside it is refused if its entries look alike.

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
    slices = [slice(stop - size, stop) for size, stop in zip(sizes, accumulate(sizes), strict=True)]
    parts = _split(batch, _Plan(n, list(sizes), slices), "batch")
    if parts is None:
        raise ValueError(f"split_batch found nothing with {n} samples in a batch of type {type(batch).__name__}.")
    return parts


def split_pair(pair: tuple[Any, Any], sizes: Sequence[int], n: int) -> list[tuple[Any, Any]]:
    """:func:`split_batch` for a batch that is known to be a pair, not two samples.

    Raises:
        ValueError: as there.
    """
    return [(x, y) for x, y in split_batch(_Pair(*pair), sizes, n)]


class _Pair(NamedTuple):
    x: Any
    y: Any


class _Plan(NamedTuple):
    n: int
    sizes: list[int]
    slices: list[slice]


class _CannotSplit(ValueError):
    """An entry that is neither per sample nor shared; the message names it."""


def _split(value: Any, plan: _Plan, path: str) -> list[Any] | None:
    """One part of ``value`` per size; ``None`` if it has no samples and goes to every part as it is."""
    splitter = _splitters.dispatch(type(value))
    if splitter is not _unknown:
        return _by_splitter(splitter, value, plan, path)
    if isinstance(value, _SHARED_TYPES):
        return None
    if isinstance(value, (Tensor, np.ndarray)):
        return _split_array(value, plan, path)
    batch_shape = getattr(value, "batch_size", None)
    if isinstance(batch_shape, torch.Size) and len(batch_shape) > 0:
        return _split_rows(value, batch_shape[0], plan, path)
    if isinstance(value, Mapping):
        return _split_mapping(value, plan, path)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return _split_dataclass(value, plan, path)
    if isinstance(value, Sequence):
        return _split_sequence(value, plan, path)
    name = type(value).__name__
    raise _CannotSplit(
        f"{path} of type {name} cannot be split into micro-batches; teach it with "
        f"register_splitter({name}, fn), or set micro_batch_size=None."
    )


def _by_splitter(splitter: Splitter, value: Any, plan: _Plan, path: str) -> list[Any]:
    parts = list(splitter(value, plan.sizes))
    if len(parts) != len(plan.sizes):
        raise ValueError(
            f"the splitter registered for {path} of type {type(value).__name__} returned {len(parts)} parts "
            f"for {len(plan.sizes)} sizes; return one part per size."
        )
    return parts


def _split_array(value: Tensor | np.ndarray, plan: _Plan, path: str) -> list[Any] | None:
    if isinstance(value, Tensor) and (value.is_nested or value.layout is not torch.strided):
        raise _CannotSplit(
            f"{path} is a nested or sparse tensor, which cannot be sliced by sample; "
            "put it into a type of its own and teach that with register_splitter."
        )
    return None if value.ndim == 0 else _split_rows(value, value.shape[0], plan, path)


def _split_rows(value: Any, rows: int, plan: _Plan, path: str) -> list[Any]:
    if rows != plan.n:
        raise _CannotSplit(
            f"{path} has first dimension {rows} where the batch has {plan.n} samples; put the samples first, "
            "or put it into a type of its own and teach that with register_splitter."
        )
    return [value[s] for s in plan.slices]


def _columns(entries: Iterable[tuple[str, Any]], plan: _Plan) -> list[list[Any]] | None:
    """The parts of each entry, the shared ones repeated; ``None`` if all are shared."""
    values, columns = [], []
    for path, value in entries:
        values.append(value)
        columns.append(_split(value, plan, path))
    if all(column is None for column in columns):
        return None
    shared = len(plan.sizes)
    return [[v] * shared if c is None else c for v, c in zip(values, columns, strict=True)]


def _split_mapping(value: Any, plan: _Plan, path: str) -> list[Any] | None:
    columns = _columns(((f"{path}[{key!r}]", entry) for key, entry in value.items()), plan)
    if columns is None:
        return None
    parts = [_copied(value, path) for _ in plan.sizes]
    for (key, entry), column in zip(list(value.items()), columns, strict=True):
        for part, piece in zip(parts, column, strict=True):
            part[key] = piece
            if piece is not entry and value[key] is piece:  # the copies share their entries with the batch
                value[key] = entry
                raise _CannotSplit(_no_rebuilding(path, value))
    return parts


def _copied(value: Any, path: str) -> Any:
    """A shallow copy, which keeps the subclass and what else it carries (an encoding, a default factory)."""
    if not isinstance(value, MutableMapping):
        raise _CannotSplit(_no_rebuilding(path, value))
    copied = copy.copy(value)
    for name, attribute in getattr(copied, "__dict__", {}).items():
        if isinstance(attribute, dict):  # where a mapping that is no dict keeps its entries
            copied.__dict__[name] = attribute.copy()
    return copied


def _no_rebuilding(path: str, value: Any) -> str:
    name = type(value).__name__
    return f"{path} of type {name} cannot be rebuilt from parts; teach it with register_splitter({name}, fn)."


def _split_dataclass(value: Any, plan: _Plan, path: str) -> list[Any] | None:
    names = [field.name for field in dataclasses.fields(value)]
    columns = _columns(((f"{path}.{name}", getattr(value, name)) for name in names), plan)
    if columns is None:
        return None
    parts = [copy.copy(value) for _ in plan.sizes]
    for name, column in zip(names, columns, strict=True):
        for part, piece in zip(parts, column, strict=True):
            object.__setattr__(part, name, piece)  # frozen ones too; __post_init__ ran once
    return parts


def _split_sequence(value: Any, plan: _Plan, path: str) -> list[Any] | None:
    """Columns if it can be split entry by entry, otherwise an entry per sample."""
    named = hasattr(value, "_fields")
    per_sample = len(value) == plan.n and not named
    try:
        columns = _columns(((f"{path}[{i}]", entry) for i, entry in enumerate(value)), plan)
    except _CannotSplit:
        if per_sample:
            return _sample_rows(value, plan, path)
        raise
    if columns is None:
        return _split_shared(value, plan, path, per_sample)
    if per_sample and len(value) > 1 and _looks_per_sample(value, path):
        raise _CannotSplit(
            f"{path} has {plan.n} entries that are alike, and each could be one of the {plan.n} samples "
            "or have a row for each; put it into a type of its own and teach that with register_splitter."
        )
    rows = zip(*columns, strict=True)
    return [value._make(row) for row in rows] if named else _rebuilt(value, rows, path)


def _split_shared(value: Any, plan: _Plan, path: str, per_sample: bool) -> list[Any] | None:
    """A sequence of what has no samples: an entry per sample, or nothing at all."""
    if per_sample:
        return _sample_rows(value, plan, path)
    if len(value) == 0:
        return None
    raise _CannotSplit(
        f"{path} is a sequence of {len(value)} where the batch has {plan.n} samples; give it an entry per "
        "sample, or put it into a type of its own and teach that with register_splitter."
    )


def _sample_rows(value: Any, plan: _Plan, path: str) -> list[Any]:
    entries = list(value)
    return _rebuilt(value, (entries[s] for s in plan.slices), path)


def _rebuilt(value: Any, parts: Iterable[Iterable[Any]], path: str) -> list[Any]:
    try:
        return [type(value)(part) for part in parts]
    except TypeError as error:
        raise _CannotSplit(_no_rebuilding(path, value)) from error


def _looks_per_sample(value: Sequence[Any], path: str) -> bool:
    """Whether all entries are alike, as samples are and as input and target are not.

    Tensors at the top are the columns of PyTorch's collate function, alike or not. Further inside samples may lack what
    others have: an entry of ``None``, an empty one, keys.
    """
    if path != "batch":
        fullest = max((entry for entry in value if isinstance(entry, Sized)), key=len, default=None)
        return all(_alike(fullest, entry) for entry in value)
    if all(isinstance(entry, (Tensor, np.ndarray)) for entry in value):
        return False
    return len({_form(entry) for entry in value}) == 1


def _alike(one: Any, other: Any) -> bool:
    if one is None or other is None:
        return True
    if isinstance(one, (Tensor, np.ndarray)) and isinstance(other, (Tensor, np.ndarray)):
        return (one.ndim, str(one.dtype)) == (other.ndim, str(other.dtype))
    if isinstance(one, Mapping) and isinstance(other, Mapping):
        return all(_alike(one[key], other[key]) for key in one.keys() & other.keys())
    texts = isinstance(one, (str, bytes)) or isinstance(other, (str, bytes))
    if isinstance(one, Sequence) and isinstance(other, Sequence) and not texts:
        return all(map(_alike, one, other))
    return type(one) is type(other)


def _form(value: Any) -> Any:
    if isinstance(value, (Tensor, np.ndarray)):
        return value.ndim, str(value.dtype)
    if isinstance(value, Mapping):
        return tuple((key, _form(entry)) for key, entry in value.items())
    if isinstance(value, Sequence) and not isinstance(value, (str, bytes)):
        return tuple(_form(entry) for entry in value)
    return type(value)
