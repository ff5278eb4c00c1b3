"""Slow and obvious twins of what the package computes cleverly: the truth that tests compare with."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

Array = NDArray[np.float64]
LossFn = Callable[[Tensor, Tensor], Tensor]


def flat_gradient(model: nn.Module, loss: Tensor) -> Array:
    """``[P]`` gradient of ``loss`` in all of the model's trainable parameters, in float64."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
    flat = [torch.zeros_like(p) if g is None else g for p, g in zip(parameters, gradients, strict=True)]
    gradient: Array = torch.cat([g.reshape(-1) for g in flat]).double().numpy()
    return gradient


def per_example_gradients(model: nn.Module, loss_fn: LossFn, inputs: Tensor, targets: Tensor) -> Array:
    """``[N, P]`` gradients of each sample's own loss, one backward pass each."""
    rows = [flat_gradient(model, loss_fn(model(inputs[i : i + 1]), targets[i : i + 1])) for i in range(len(inputs))]
    return np.stack(rows)


def exact_noise(gradients: Array) -> tuple[float, float]:
    """``(|G_N|^2, tr(Sigma))`` of the rows of ``gradients``, the trace normalised by ``N - 1``."""
    return float((gradients.mean(0) ** 2).sum()), float(gradients.var(0, ddof=1).sum())


def superpopulation_sq_norm(gradients: Array) -> float:
    """``|G_N|^2 - tr(Sigma) / N``: what batches drawn without replacement can know about ``|G|^2``."""
    sq_norm, variance = exact_noise(gradients)
    return sq_norm - variance / len(gradients)


def part_norms(parts: Sequence[Array]) -> tuple[list[float], list[int], float]:
    """Arguments of ``GradientNoiseScale.update`` from the per-example gradients ``[b_j, P]`` of each part."""
    norms = [float((part.mean(0) ** 2).sum()) for part in parts]
    whole = np.concatenate(parts).mean(0)
    return norms, [len(part) for part in parts], float((whole**2).sum())


def decayed_average(values: Sequence[float], samples: Sequence[int], memory: float) -> float:
    """Exponential average with decay per sample: measurement ``i`` keeps ``exp(-later samples / memory)``."""
    total = weight = 0.0
    for i, value in enumerate(values):
        own = (1 - math.exp(-samples[i] / memory)) * math.exp(-sum(samples[i + 1 :]) / memory)
        total += own * value
        weight += own
    return total / weight


def delete_one_covariance(rows: Array) -> Array:
    """``[D, D]`` covariance of the mean of ``[K, D]`` independent rows: the textbook jackknife."""
    count = len(rows)
    left_out = np.stack([np.delete(rows, k, axis=0).mean(0) for k in range(count)])
    deviations = left_out - left_out.mean(0)
    covariance: Array = (count - 1) / count * deviations.T @ deviations
    return covariance
