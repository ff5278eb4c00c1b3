"""What the order of a sampler follows from, and how to draw the same order again."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch.utils.data import Sampler

__all__ = [
    "SeededOrder",
    "get_generator",
    "global_random_state",
    "order_restored",
    "order_state",
    "set_epoch",
    "set_generator",
    "set_global_random_state",
]


class SeededOrder(Sampler[Any]):
    """A sampler with a length whose order follows from a seed and the epoch alone, whatever else draws numbers.

    Args:
        sampler: the user's own.
        seed: of the whole run.
    """

    def __init__(self, sampler: Any, seed: int) -> None:
        self.sampler = sampler
        self.seed = seed
        self.epoch = 0

    def __iter__(self) -> Iterator[Any]:
        own = _find_generator(self.sampler)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed + self.epoch)
            if own is not None:
                own.manual_seed(self.seed + self.epoch)
            return iter(list(self.sampler))

    def __len__(self) -> int:
        return len(self.sampler)

    def set_epoch(self, epoch: int) -> None:
        """The epoch that comes next."""
        self.epoch = epoch
        if callable(getattr(self.sampler, "set_epoch", None)):
            self.sampler.set_epoch(epoch)


def _chain(source: Any) -> Iterator[Any]:
    """A sampler and the samplers that it wraps."""
    while source is not None:
        yield source
        source = getattr(source, "sampler", None)


def _find_generator(source: Any) -> torch.Generator | None:
    found = (getattr(sampler, "generator", None) for sampler in _chain(source))
    return next((generator for generator in found if isinstance(generator, torch.Generator)), None)


def get_generator(source: Any) -> torch.Tensor | None:
    """The state of the sampler's own generator, ``None`` if it has none."""
    generator = _find_generator(source)
    return None if generator is None else generator.get_state()


def set_generator(source: Any, state: torch.Tensor | None) -> None:
    """Put back what :func:`get_generator` gave."""
    generator = _find_generator(source)
    if generator is not None and state is not None:
        generator.set_state(state)


def set_epoch(source: Any, epoch: int) -> None:
    """Tell the sampler which epoch comes next, if it wants to know."""
    for sampler in _chain(source):
        if callable(getattr(sampler, "set_epoch", None)):
            sampler.set_epoch(epoch)
            return


def global_random_state() -> dict[str, Any]:
    """The states of torch's (on the CPU), NumPy's and Python's global generators, as plain numbers and tensors."""
    version, internal, gauss = random.getstate()
    return {
        "torch": torch.get_rng_state(),
        "numpy": _plain(np.random.get_state(legacy=False)),
        "python": [version, list(internal), gauss],
    }


def set_global_random_state(state: Mapping[str, Any]) -> None:
    """Put back what :func:`global_random_state` gave.

    Raises:
        ValueError: NumPy's global generator is of another kind than it was then; nothing is changed.
    """
    kind, present = state["numpy"]["bit_generator"], np.random.get_state(legacy=False)["bit_generator"]
    if kind != present:
        raise ValueError(
            f"the state was made with NumPy's global {kind}, but this process has {present}; call "
            f"np.random.set_bit_generator(np.random.{kind}()) before."
        )
    torch.set_rng_state(state["torch"])
    np.random.set_state(state["numpy"])
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))


def _plain(state: Any) -> Any:
    if isinstance(state, Mapping):
        return {key: _plain(value) for key, value in state.items()}
    return state.tolist() if isinstance(state, np.ndarray) else state


def order_state(source: Any) -> dict[str, Any]:
    """All that the order of the next pass follows from."""
    epochs = (getattr(sampler, "epoch", None) for sampler in _chain(source))
    return {
        **global_random_state(),
        "generator": get_generator(source),
        "epoch": next((epoch for epoch in epochs if isinstance(epoch, int)), None),
    }


@contextmanager
def order_restored(source: Any, order: dict[str, Any]) -> Iterator[None]:
    """Draw as the interrupted epoch did; the global random states are given back as they were."""
    before = global_random_state()
    set_global_random_state(order)
    set_generator(source, order["generator"])
    if order["epoch"] is not None:
        set_epoch(source, order["epoch"])
    try:
        yield
    finally:
        set_global_random_state(before)
