"""What one update showed: the only thing that flows from the executor to the controller and the policies."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, SupportsFloat, TypeAlias

import torch
from torch import Tensor

if TYPE_CHECKING:
    from adaptive_batch.throughput import StepTimeModel

Number: TypeAlias = float | Tensor
"""A number, or a zero-dimensional tensor that is left on its device until somebody has to know it."""


def read_numbers(values: Sequence[Number]) -> list[float]:
    """All numbers as floats, fetching those that live on a device in one transfer."""
    found = [_read(v) for v in values]
    there = [v for v in found if isinstance(v, Tensor)]
    fetched = iter(_stacked(there).tolist() if there else ())
    return [next(fetched) if isinstance(v, Tensor) else v for v in found]


def _read(value: Number) -> Number:
    """A float, if it can be had without waiting for a device."""
    if not isinstance(value, Tensor):
        return float(value)
    return float(value.item()) if value.is_cpu else value.detach()


def _stacked(tensors: list[Tensor]) -> Tensor:
    first = tensors[0]
    if all(t.dtype == first.dtype and t.dim() == 0 for t in tensors):
        return torch.stack(tensors)
    wide = torch.float32 if first.device.type == "mps" else torch.float64  # which MPS does not have
    return torch.stack([t.reshape(()).to(wide) for t in tensors])


@dataclass(slots=True)  # made at every update, where a frozen one takes six times as long
class Measurement:
    """The record of one update, and what the controller made of it.

    The executor fills the fields up to ``sq_norm``; numbers that live on a device stay there as
    tensors until the controller reads them all together. The controller fills the rest before it
    asks a policy, so a policy sees plain numbers only. ``NaN`` means "not known".

    Attributes:
        update: updates made before and including this one.
        epoch: epoch this update belongs to, from 0.
        samples: samples consumed up to and including this update, over all epochs and ranks.
        batch_size: ``B``, samples of this update over all ranks and micro-batches.
        reference_batch_size: ``B0``, the size that the learning rate was tuned for.
        updates_at_size: for a policy, updates made at ``batch_size`` since it was decided.
        lr: the scheduled learning rate of the first parameter group, before scaling.
        peak_lr: for a policy, the highest such rate so far.
        loss: mean loss of the update's samples; for a policy, of all updates since it was last asked.
        seconds: wall time of the update, waiting for data included.
        peak_memory: most bytes in use during the update.
        part_sq_norms: ``[n]`` squared norms of the mean gradients of the update's ``n`` parts.
        part_sizes: ``[n]`` samples of each part.
        pass_sizes: ``[m]`` samples of each forward/backward pass.
        pass_seconds: ``[m]`` time of each pass; on several ranks its share of the wait for data is included.
        sq_norm: squared norm of the mean gradient over all parts.
        noise_scale: ``phi = tr(Sigma) / |G|^2`` in samples, smoothed.
        grad_sq_norm: ``|G|^2``, smoothed and unbiased.
        grad_variance: ``tr(Sigma)`` of one sample's gradient, smoothed and unbiased.
        interval: 95 % confidence interval of ``noise_scale``, in samples.
        inner_product_variance: variance of ``<g_i, g_B>`` over the samples' gradients ``g_i``, averaged.
        inner_product_lower: lower end of the 95 % confidence interval of ``inner_product_variance``.
        inner_product_sq_norm: ``|g_B|^2``, averaged over the same updates as ``inner_product_variance``.
        measured_update: the newest update whose parts were measured, 0 before there is one.
        measured_grad_sq_norm: unbiased estimate of ``|G|^2`` from that update alone; often negative.
        measured_grad_variance: unbiased estimate of ``tr(Sigma)`` from that update alone.
        step_time: the model of an update's seconds as a function of its samples.
    """

    update: int = 0
    epoch: int = 0
    samples: int = 0
    batch_size: int = 1
    reference_batch_size: int = 1
    updates_at_size: int = 0
    lr: float = math.nan
    peak_lr: float = math.nan
    loss: Number = math.nan
    seconds: SupportsFloat = math.nan
    peak_memory: float = math.nan
    part_sq_norms: Sequence[Number] = ()
    part_sizes: Sequence[int] = ()
    pass_sizes: Sequence[int] = ()
    pass_seconds: Sequence[SupportsFloat] = ()
    sq_norm: Number = math.nan
    noise_scale: float = math.nan
    grad_sq_norm: float = math.nan
    grad_variance: float = math.nan
    interval: tuple[float, float] = (math.nan, math.nan)
    inner_product_variance: float = math.nan
    inner_product_lower: float = math.nan
    inner_product_sq_norm: float = math.nan
    measured_update: int = 0
    measured_grad_sq_norm: float = math.nan
    measured_grad_variance: float = math.nan
    step_time: StepTimeModel | None = None
