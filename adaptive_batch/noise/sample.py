"""The squared norms of an update's parts, and shorter forms of them that say the same."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from adaptive_batch.noise.estimators import harmonic_mean

__all__ = ["Batches", "NoiseSample", "equivalent_sample", "ranks_sample", "variance_of"]


class NoiseSample(NamedTuple):
    """The arguments of ``GradientNoiseScale.update``; norms may still be tensors on their device.

    Attributes:
        sq_norms: ``[n]`` squared norms of the mean gradients of the parts.
        sizes: ``[n]`` samples of each part.
        sq_norm: squared norm of the gradient of all parts together.
    """

    sq_norms: Sequence[float | Tensor]
    sizes: Sequence[float]
    sq_norm: float | Tensor


def equivalent_sample(
    part_sq_norm: float | Tensor, part_size: float, sq_norm: float | Tensor, size: float
) -> NoiseSample:
    """Two parts whose estimates are those of any number of parts.

    Parts count only through their mean squared norm and the harmonic mean ``b`` of their sizes, so two halves
    of ``size`` samples with the squared norm ``|G|^2 + tr(Sigma) / b`` stand for all of them. That keeps a
    measurement of one sample per part as short as any other. ``size`` need not be a number of samples that
    exist: for a mean of weights ``w_j`` it is ``1 / sum(w_j^2 / b_j)``, the size of a batch that would be as
    noisy. A whole number is halved into whole numbers.

    Args:
        part_sq_norm: mean of the parts' squared norms.
        part_size: harmonic mean of the parts' sizes.
        sq_norm: squared norm of the gradient of the whole.
        size: samples of the whole.
    """
    if not part_size < size:
        return NoiseSample([part_sq_norm], [size], sq_norm)  # a single part, which says nothing
    grad_variance = (part_sq_norm - sq_norm) / (1 / part_size - 1 / size)
    first = int(size) // 2 if size >= 2 and float(size).is_integer() else size / 2
    sizes = [first, type(first)(size) - first]
    half = sq_norm + grad_variance * (1 / harmonic_mean(sizes) - 1 / size)
    return NoiseSample([half, half], sizes, sq_norm)


def variance_of(sample: NoiseSample) -> float | Tensor:
    """``tr(Sigma)`` as :func:`two_batch_estimate` has it, without waiting for the device."""
    part_size, size = harmonic_mean(sample.sizes), sum(sample.sizes)
    mean = sum(sample.sq_norms) / len(sample.sq_norms)
    return (mean - sample.sq_norm) / (1 / part_size - 1 / size)


class Batches:
    """The sizes of the batches that make up an update, and their shares of it.

    Attributes:
        sizes: samples of each batch.
        shares: what each batch's mean gradient was multiplied with, to become a summand of the update's.
    """

    def __init__(self) -> None:
        self.sizes: list[float] = []
        self.shares: list[float] = []

    def add(self, size: float, share: float) -> None:
        """One more batch."""
        self.sizes.append(size)
        self.shares.append(share)

    @property
    def share(self) -> float:
        """What the mean gradient was multiplied with in the sum of all."""
        return sum(self.shares)

    @property
    def noise(self) -> float:
        """``sum(w_j^2 / b_j)``, the trace of the sum's covariance over ``tr(Sigma)``."""
        return sum(share**2 / size for size, share in zip(self.sizes, self.shares, strict=True))

    @property
    def size(self) -> float:
        """Samples of a batch that would be as noisy as the mean: all of them, if weighted by size."""
        return self.share**2 / self.noise


def ranks_sample(
    sq_norms: Sequence[float | Tensor],
    batches: Batches,
    sq_norm: float | Tensor,
    group: dist.ProcessGroup | None = None,
) -> NoiseSample:
    """All ranks' parts as one measurement, the same on every rank; one reduction of five numbers.

    Args:
        sq_norms: squared norms of the mean gradients of this rank's batches, taken before ranks are averaged.
        batches: those batches.
        sq_norm: squared norm of the gradient after the reduction, the mean over the ranks.
        group: the ranks; ``None`` is all of them. Without a process group there is one rank.

    Returns:
        A sample that is equivalent to those of all ranks together.
    """
    norms = torch.stack([torch.as_tensor(norm).double() for norm in sq_norms])
    own = [len(norms), sum(1 / size for size in batches.sizes), batches.share, batches.noise]
    sums = torch.cat([norms.sum()[None], torch.tensor(own, dtype=torch.float64, device=norms.device)])
    ranks = 1
    if dist.is_available() and dist.is_initialized():
        dist.all_reduce(sums, group=group)
        ranks = dist.get_world_size(group)
    count, inverse, share, noise = sums[1:].tolist()
    whole = sq_norm * (ranks / share) ** 2
    return equivalent_sample(sums[0] / count, count / inverse, whole, share**2 / noise)
