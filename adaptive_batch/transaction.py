"""What a failed update leaves behind, and how to put it back."""

from __future__ import annotations

import random
from collections.abc import Iterable

import numpy as np
import torch
from torch import Tensor, nn

__all__ = ["RandomStates", "Snapshot", "generators_in"]


def generators_in(module: nn.Module) -> list[torch.Generator]:
    """Generators of their own that modules hold as attributes."""
    held = (value for m in module.modules() for value in vars(m).values())
    return list({id(g): g for g in held if isinstance(g, torch.Generator)}.values())


class RandomStates:
    """The state of every source of random numbers that a training step may draw from.

    Torch's default generators of the CPU and of the GPUs in use, NumPy's, Python's, and ``generators``.
    """

    def __init__(self, generators: Iterable[torch.Generator] = ()) -> None:
        self._torch = torch.get_rng_state()
        self._cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else None
        self._numpy = np.random.get_state()
        self._python = random.getstate()
        self._own = [(generator, generator.get_state()) for generator in generators]

    def restore(self) -> None:
        """Continue all of them from here."""
        torch.set_rng_state(self._torch)
        if self._cuda is not None:
            torch.cuda.set_rng_state_all(self._cuda)
        np.random.set_state(self._numpy)
        random.setstate(self._python)
        for generator, state in self._own:
            generator.set_state(state)


class Snapshot:
    """What a forward and backward pass may change: buffers, random states, gradients.

    Gradients are not copied at the start of an update, where putting them back is dropping them; inside an
    accumulation window those of the batches before are.

    Args:
        module: the model that is trained.
        accumulated: whether its gradients hold earlier batches of the update.
        generators: random generators beside the global ones.
    """

    def __init__(
        self, module: nn.Module, *, accumulated: bool, generators: Iterable[torch.Generator] = ()
    ) -> None:
        self._buffers = [
            (owner, name, buffer, buffer.detach().clone())
            for owner in module.modules()
            for name, buffer in owner._buffers.items()
            if buffer is not None
        ]
        self._parameters = [p for p in module.parameters() if p.requires_grad]
        self._gradients = [_copy(p.grad) for p in self._parameters] if accumulated else None
        self._random = RandomStates(generators)

    @torch.no_grad()
    def restore(self, *, gradients: bool) -> None:
        """Put everything back.

        Args:
            gradients: also the gradients; ``False`` where the update has not yet cleared the old ones.
        """
        for owner, name, buffer, saved in self._buffers:
            owner._buffers[name] = buffer.copy_(saved)  # the same tensor: others may hold on to it
        if gradients:
            saved_gradients = self._gradients or [None] * len(self._parameters)
            for parameter, gradient in zip(self._parameters, saved_gradients, strict=True):
                parameter.grad = _copy(gradient)
        self._random.restore()


def _copy(gradient: Tensor | None) -> Tensor | None:
    return None if gradient is None else gradient.detach().clone()
