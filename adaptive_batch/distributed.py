"""What ranks must agree on: the order of the samples, and what the measurements of all of them say."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from itertools import chain, islice
from statistics import median
from typing import Any

import torch
import torch.distributed as dist
from torch.utils.data import Sampler

from adaptive_batch.measurement import Measurement, read_numbers
from adaptive_batch.noise.sample import NoiseSample, equivalent_sample
from adaptive_batch.sampler import AdaptiveBatchSampler

__all__ = ["Agreement", "SharedOrder", "broadcast", "gather"]


def broadcast(value: Any, src: int = 0) -> Any:
    """Rank ``src``'s value."""
    values = [value]
    dist.broadcast_object_list(values, src=src)
    return values[0]


def gather(value: Any) -> list[Any]:
    """The values of all ranks, in their order."""
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


class SharedOrder(Sampler[Any]):
    """A sampler whose order is the same on all ranks: rank 0's.

    Samplers draw from random states that differ between ranks. One with a length is drawn on rank 0 alone and its
    whole order sent round once an epoch; one without a length must yield the same on all ranks by itself.

    Args:
        sampler: the user's own.
        rank: of this process.
        send: gives rank 0's value to all ranks.
    """

    def __init__(self, sampler: Any, rank: int, send: Callable[[Any], Any] = broadcast) -> None:
        self.sampler = sampler
        self._rank = rank
        self._send = send

    def __iter__(self) -> Iterator[Any]:
        try:
            length = len(self.sampler)
        except TypeError:
            return iter(self.sampler)
        own = iter(self.sampler if self._rank == 0 else ())
        # Its end is looked for when somebody asks for it: torch's samplers draw once more there.
        return chain(self._send(list(islice(own, length)) if self._rank == 0 else None), own)

    def __len__(self) -> int:
        return len(self.sampler)

    def set_epoch(self, epoch: int) -> None:
        """Tell the sampler which epoch comes next, if it wants to know."""
        if hasattr(self.sampler, "set_epoch"):
            self.sampler.set_epoch(epoch)

    @property
    def generator(self) -> Any:
        """The sampler's random generator, if it has one."""
        return getattr(self.sampler, "generator", None)


class Agreement:
    """What the ranks of a run tell each other at a decision, so that all of them take the same.

    Five exchanges, whose bytes do not depend on the number of ranks but for sixteen from each: two reductions over
    the numbers of the updates since the last decision, the time that each rank took for them, the passes of the rank
    that took longest, and rank 0's proposal.

    Args:
        device: where the process group's tensors live.
        sampler: what shares the batches out.

    Attributes:
        seconds_per_sample: the median of each rank's passes since the decision before the last.
    """

    def __init__(self, device: torch.device, sampler: AdaptiveBatchSampler) -> None:
        self._device = device
        self._sampler = sampler
        self.seconds_per_sample: list[float] = []

    def measurements(self, own: Sequence[Measurement]) -> list[Measurement]:
        """One measurement per update from those that each rank made of it.

        The update takes as long as on the slowest rank (one that has not timed it leaves it untimed) and as much
        memory as on the fullest; its parts stand for those of all ranks (:func:`equivalent_sample`); a pass of ``n``
        samples on each of ``W`` ranks is one of ``W n`` samples (with weights, of as many as all take meanwhile),
        timed on the rank whose passes took longest since the last decision.

        Args:
            own: this rank's; every rank has as many.
        """
        sums = self._reduced([_summands(m, sq_norms) for m, sq_norms in _read(own)], dist.ReduceOp.SUM)
        largest = self._reduced(
            [[_known(float(m.seconds), math.inf), _known(m.peak_memory, -math.inf)] for m in own], dist.ReduceOp.MAX
        )
        passes = self._slowest_passes(own)
        return [_merged(*update) for update in zip(own, sums, largest, passes, strict=True)]

    def proposal(self, own: float) -> float:
        """Rank 0's."""
        value = torch.tensor(own, dtype=torch.float64, device=self._device)
        dist.broadcast(value, src=0)
        return float(value)

    def _reduced(self, rows: list[list[float]], by: Any) -> list[list[float]]:
        numbers = torch.tensor(rows, dtype=torch.float64, device=self._device)
        dist.all_reduce(numbers, op=by)
        reduced: list[list[float]] = numbers.tolist()
        return reduced

    def _slowest_passes(self, own: Sequence[Measurement]) -> list[tuple[list[int], list[float]]]:
        """For each update the sizes and seconds of its passes, on the rank that they took longest on in all."""
        passes = [(list(m.pass_sizes), [float(seconds) for seconds in m.pass_seconds]) for m in own]
        per_sample = [t / n for sizes, times in passes for n, t in zip(sizes, times, strict=True)]
        times = [sum(sum(times) for _, times in passes), median(per_sample) if per_sample else math.nan]
        everyone = torch.zeros(dist.get_world_size(), 2, dtype=torch.float64, device=self._device)
        dist.all_gather_into_tensor(everyone, torch.tensor([times], dtype=torch.float64, device=self._device))
        totals, self.seconds_per_sample = everyone.T.tolist()
        rank = max(range(len(totals)), key=totals.__getitem__)
        slowest = broadcast(passes, src=rank)
        return [([self._over_ranks(size, rank) for size in sizes], times) for sizes, times in slowest]

    def _over_ranks(self, size: int, rank: int) -> int:
        """Samples on all ranks while one has a pass of ``size``."""
        weights = self._sampler.weights
        return self._sampler.world_size * size if weights is None else round(size * sum(weights) / weights[rank])


def _read(own: Sequence[Measurement]) -> list[tuple[Measurement, list[float]]]:
    """Each measurement with its loss, its squared norm and those of its parts, fetched in one transfer."""
    numbers = iter(read_numbers([n for m in own for n in (m.loss, m.sq_norm, *m.part_sq_norms)]))
    return [(m, list(islice(numbers, 2 + len(m.part_sq_norms)))) for m in own]


def _summands(m: Measurement, numbers: list[float]) -> list[float]:
    loss, sq_norm, *parts = numbers
    return [1, loss, sq_norm, len(parts), sum(parts), sum(1 / size for size in m.part_sizes), sum(m.part_sizes)]


def _merged(
    m: Measurement, sums: list[float], largest: list[float], passes: tuple[list[int], list[float]]
) -> Measurement:
    ranks, loss, sq_norm, count, parts, inverse, samples = sums
    sample = NoiseSample([], [], math.nan)
    if count:
        sample = equivalent_sample(parts / count, count / inverse, sq_norm / ranks, round(samples))
    seconds, peak_memory = largest
    return replace(
        m,
        loss=loss / ranks,
        seconds=_finite(seconds),
        peak_memory=_finite(peak_memory),
        part_sq_norms=sample.sq_norms,
        part_sizes=[int(size) for size in sample.sizes],
        sq_norm=sq_norm / ranks,
        pass_sizes=passes[0],
        pass_seconds=passes[1],
    )


def _known(number: float, otherwise: float) -> float:
    return otherwise if math.isnan(number) else number


def _finite(number: float) -> float:
    return number if math.isfinite(number) else math.nan
