"""What a model's layers say about how it can be measured."""

from __future__ import annotations

import warnings

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

__all__ = ["batch_dependent_layers", "is_compiled", "least_batch", "warn_of_splitting"]


def batch_dependent_layers(module: nn.Module) -> list[str]:
    """Names of the layers that normalise over the batch, each with its type.

    A micro-batch means something else to them than the whole batch, and they need two samples at least.
    """
    return [
        f"{name} ({type(layer).__name__})" for name, layer in module.named_modules() if isinstance(layer, _BatchNorm)
    ]


def least_batch(module: nn.Module) -> int:
    """Fewest samples that a model can be trained on."""
    return 2 if batch_dependent_layers(module) else 1


def is_compiled(module: nn.Module) -> bool:
    """Whether ``torch.compile`` was applied to the model or a part of it: hooks on its layers cost a recompilation."""
    return any(
        getattr(part, name, None) is not None
        for part in module.modules()
        for name in ("_orig_mod", "_compiled_call_impl", "_compiler_ctx")  # the last one is Lightning's
    )


def warn_of_splitting(module: nn.Module) -> None:
    """One warning that names the first of these layers, if there is one, where updates may be split."""
    layers = batch_dependent_layers(module)
    if layers:
        warnings.warn(
            f"{layers[0]} looks across the batch: an update that is split, which happens only where "
            "memory demands it, normalises over its micro-batches.",
            stacklevel=3,
        )
