"""Layers for which the samples of a batch are not independent."""

from __future__ import annotations

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

__all__ = ["batch_dependent_layers"]


def batch_dependent_layers(module: nn.Module) -> list[str]:
    """Names of the layers that normalise over the batch, each with its type.

    A micro-batch means something else to them than the whole batch, and they need two samples at least.
    """
    return [
        f"{name} ({type(layer).__name__})" for name, layer in module.named_modules() if isinstance(layer, _BatchNorm)
    ]
