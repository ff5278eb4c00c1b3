"""What a failed update leaves behind, and how to put it back."""

from __future__ import annotations

import ctypes
import random
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from adaptive_batch.order import global_random_state, set_global_random_state

__all__ = ["Rollback", "random_state", "set_random_state"]


class Rollback:
    """Puts back what forward and backward passes change: buffers, random states, gradients.

    The random states are torch's default generators of the CPU and of the GPUs in use, NumPy's, Python's, and
    generators that modules hold as attributes. Gradients are not copied at the start of an update, where
    putting them back means dropping them; inside an accumulation window those of the batches before are.

    Args:
        module: the model that is trained; looked through once.
    """

    def __init__(self, module: nn.Module) -> None:
        modules = list(module.modules())
        # Of a ScriptModule they are no dictionary, and cannot be gone through themselves.
        self._buffered = [(m, name) for m in modules for name in m._buffers.keys()]  # noqa: SIM118
        self._parameters = list(module.parameters())  # frozen ones too: they may be trained later
        self._no_gradients = [None for _ in self._parameters]
        self._generators = _generators(modules)
        self._numpy, self._python = _NumpyState(), _PythonState()
        self._buffers: list[tuple[Tensor, Tensor] | None] = []
        self._gradients: Sequence[Tensor | None] = []
        self._random: _RandomStates | None = None

    def save(self, *, accumulated: bool) -> None:
        """Remember the present state; ``accumulated`` says that the gradients hold earlier batches."""
        present = (m._buffers[name] if name in m._buffers else None for m, name in self._buffered)  # noqa: SIM401
        self._buffers = [_with_copy(buffer) for buffer in present]
        self._gradients = [_copy(p.grad) for p in self._parameters] if accumulated else self._no_gradients
        self._random = _RandomStates(self._generators, self._numpy.now(), self._python.now())

    @torch.no_grad()
    def restore(self, *, gradients: bool) -> None:
        """Put the remembered state back, as often as needed.

        Args:
            gradients: also the gradients; ``False`` where the update has not yet cleared the old ones.
        """
        for (module, name), saved in zip(self._buffered, self._buffers, strict=True):
            if saved is not None:
                buffer, copy = saved
                if copy is not buffer:
                    buffer.copy_(copy)  # the same tensor: others may hold on to it
                if getattr(module, name, None) is not buffer:
                    setattr(module, name, buffer)
        if gradients:
            for parameter, gradient in zip(self._parameters, self._gradients, strict=True):
                parameter.grad = _copy(gradient)
        if self._random is not None:
            self._random.restore()

    @contextmanager
    def undone(self) -> Iterator[None]:
        """A context in which gradients start from nothing, and after which everything is as before."""
        gradients = [(p, p.grad) for p in self._parameters]
        self.save(accumulated=False)
        try:
            self.restore(gradients=True)
            yield
        finally:
            self.restore(gradients=False)
            self.forget()
            for parameter, gradient in gradients:
                parameter.grad = gradient

    def forget(self) -> None:
        """Release the copies."""
        self._buffers, self._gradients, self._random = [], [], None


class _RandomStates:
    """The states of all generators at one moment."""

    def __init__(self, own: Iterable[torch.Generator], numpy_state: Any, python_state: Any) -> None:
        self._torch = torch.get_rng_state()
        self._cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else None  # type: ignore[no-untyped-call]
        self._numpy = numpy_state
        self._python = python_state
        self._own = [(generator, generator.get_state()) for generator in own]

    def restore(self) -> None:
        torch.set_rng_state(self._torch)
        if self._cuda is not None:
            torch.cuda.set_rng_state_all(self._cuda)
        np.random.set_state(self._numpy)
        random.setstate(self._python)
        for generator, state in self._own:
            generator.set_state(state)


class _NumpyState:
    """The state of NumPy's global generator, copied only if it may have moved since the last time.

    NumPy's copy takes longer than all the rest of a snapshot. Every draw moves the twister's words, which are cheap
    to compare; but a normal number that was drawn with the one before it and put by moves nothing when it is taken.
    """

    def __init__(self) -> None:
        self._generator: Any = None
        self._address: int | None = None
        self._words = b""
        self._state: Any = None

    def now(self) -> Any:
        """What ``np.random.set_state`` takes."""
        generator = np.random.get_bit_generator()  # type: ignore[attr-defined]  # numpy's stubs leave it out
        if generator is not self._generator:
            twister = isinstance(generator, np.random.MT19937)
            self._generator, self._address = generator, generator.ctypes.state_address if twister else None
        if self._address is None:
            return np.random.get_state(legacy=False)
        words = ctypes.string_at(self._address, _TWISTER_BYTES)
        if words != self._words or self._state[3]:  # a normal number is put by
            self._words, self._state = words, np.random.get_state()
        return self._state


class _PythonState:
    """The state of Python's global generator, copied only if it may have moved since the last time.

    Its copy is a tuple of 625 numbers, made and thrown away. The generator's words lie in the object itself, so one
    whose memory and put-by normal number are what they were has not moved; CPython alone says where the memory is.
    """

    def __init__(self) -> None:
        self._generator: Any = getattr(random.getstate, "__self__", None)
        self._readable = sys.implementation.name == "cpython" and type(self._generator) is random.Random
        self._seen: tuple[Any, ...] = ()
        self._state: Any = None

    def now(self) -> Any:
        """What ``random.setstate`` takes."""
        if not self._readable:
            return random.getstate()
        memory = ctypes.string_at(id(self._generator), object.__sizeof__(self._generator))
        seen = (memory, self._generator.gauss_next)
        if seen != self._seen:
            self._seen, self._state = seen, random.getstate()
        return self._state


_TWISTER_BYTES = 625 * 4
"""The Mersenne Twister's 624 words and its place among them."""


def random_state(module: nn.Module) -> dict[str, Any]:
    """The same states as plain numbers and tensors, for a run that is to be resumed."""
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []  # type: ignore[no-untyped-call]
    own = [generator.get_state() for generator in _generators(module.modules())]
    return {**global_random_state(), "cuda": cuda, "own": own}


def set_random_state(module: nn.Module, state: Mapping[str, Any]) -> None:
    """Put back what :func:`random_state` gave."""
    set_global_random_state(state)
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        torch.cuda.set_rng_state_all(state["cuda"][: torch.cuda.device_count()])
    for generator, saved in zip(_generators(module.modules()), state["own"], strict=True):
        generator.set_state(saved)


def _generators(modules: Iterable[nn.Module]) -> list[torch.Generator]:
    held: Iterable[Any] = (value for module in modules for value in vars(module).values())
    return list({id(g): g for g in held if isinstance(g, torch.Generator)}.values())


def _with_copy(buffer: Tensor | None) -> tuple[Tensor, Tensor] | None:
    if buffer is None:
        return None
    expanded = any(size > 1 and stride == 0 for size, stride in zip(buffer.shape, buffer.stride(), strict=True))
    return buffer, buffer if expanded else buffer.detach().clone()  # nothing can write into an expanded one


def _copy(gradient: Tensor | None) -> Tensor | None:
    return None if gradient is None else gradient.detach().clone()
