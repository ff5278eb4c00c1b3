"""The gradient noise scale of a run: the estimates of single updates, averaged, with an interval."""

from __future__ import annotations

import math
from collections.abc import Mapping
from numbers import Real
from typing import Any

import numpy as np
from torch import Tensor

from adaptive_batch.noise.estimators import Numbers, as_floats, two_batch_estimate
from adaptive_batch.noise.intervals import (
    Array,
    effective_count,
    fieller_interval,
    jackknife_covariance,
    student_t_quantile,
)

MAX_BLOCKS = 64
"""Blocks that the measurements are kept in; more would not make an interval visibly better."""

MIN_MEASUREMENTS = 8
"""Measurements below which there is no interval: a variance from fewer is hardly one."""

IDENTIFIED_AT = 0.99
"""Confidence at which ``|G|^2`` has to differ from zero before there is a noise scale.

Measured with ``G = 0``, looking every ten updates over 1000 updates with a memory of 200 of them: at 95 % a
third of the runs find a noise scale at least once, at 99 % one in fourteen. A higher level would make true
ones wait, in proportion to the square of its quantile.
"""


class GradientNoiseScale:
    """``phi = tr(Sigma) / |G|^2`` in samples, averaged over the updates seen, with its uncertainty.

    Each update gives one unbiased, unclamped and very noisy estimate of ``|G|^2`` and of ``tr(Sigma)``
    (:func:`two_batch_estimate`). Both are averaged separately and exponentially, with weights that decay by
    ``exp(-samples / memory)``, and the noise scale is the ratio of the averages, never an average of
    ratios. The decay counts samples, not updates: an update of ``b`` samples weighs
    ``1 - exp(-b / memory)``, close to proportional to ``b`` as its information is, and the average looks
    back over the same stretch of data whatever the batch size. It is divided by the sum of its weights, so
    that the first update's average is the first update's estimate.

    The interval is Fieller's for a ratio of means, from the jackknife over at most 64 blocks of consecutive
    updates; whenever there is one block too many, the two neighbours that weigh least together become one.
    That keeps the weights even however the batch size changes, makes blocks of many updates (whose averages
    are nearly independent and nearly normal) in a long run, and costs the same at every update. The
    estimates are the weighted means of those same blocks.

    Until ``|G|^2`` can be told from zero (Fieller's set at 99 % has an upper end, which takes at least 8
    measurements) the noise scale is NaN: any number would come from the noise of the denominator. The level
    is stricter than the usual interval's because the question is asked again at every decision of a run.

    Source: McCandlish, Kaplan, Amodei, OpenAI Dota Team, "An Empirical Model of Large-Batch Training", 2018,
    arXiv:1812.06162, appendix A.1; decay per sample as in Qiao et al., "Pollux", OSDI 2021, arXiv:2008.12260.

    Args:
        memory: samples after which a measurement has lost all but ``1/e`` of its weight. A short memory
            follows a changing noise scale, a long one can identify a large one: up to about
            ``sqrt(d B memory) / 3`` at batch size ``B`` with noise in ``d`` effective dimensions. The default
            identifies some 2000 at ``B = 32`` and ``d = 10``, from the last 3000 updates or so.

    Raises:
        ValueError: if ``memory`` is not a positive finite number.
    """

    def __init__(self, *, memory: float = 100_000) -> None:
        self.memory = memory
        self.reset()

    @property
    def memory(self) -> float:
        """Samples that divide a measurement's weight by ``e``; may be set, for the updates to come."""
        return self._memory

    @memory.setter
    def memory(self, memory: float) -> None:
        self._memory = _checked_memory(memory)

    def reset(self) -> None:
        """Forget all measurements; ``memory`` stays."""
        # [K, 3], oldest first: weight, mean of |G|^2 and mean of tr(Sigma) of each block.
        self._blocks: Array = np.empty((0, 3))
        self._measurements = 0
        self._skipped = 0

    def update(self, part_sq_norms: Numbers, part_sizes: Numbers, sq_norm: float | Tensor) -> None:
        """Take in the parts of one update; one part or a norm that is not finite is skipped and counted.

        Args:
            part_sq_norms: ``[n]`` squared norms of the mean gradients of the update's ``n`` parts.
            part_sizes: ``[n]`` samples of each part.
            sq_norm: squared norm of the mean of the parts' gradients weighted by their sizes.

        Raises:
            ValueError: if the sequences differ in length, or a size is not positive.
        """
        sizes = as_floats(part_sizes)
        grad_sq_norm, grad_variance = two_batch_estimate(part_sq_norms, sizes, sq_norm)
        if not (math.isfinite(grad_sq_norm) and math.isfinite(grad_variance)):
            self._skipped += 1
            return
        forgotten = -math.expm1(-sum(sizes) / self.memory)
        blocks = np.vstack([self._blocks, (forgotten, grad_sq_norm, grad_variance)])
        blocks[:-1, 0] *= 1.0 - forgotten
        # A weight can decay to nothing when an update is much larger than the memory.
        blocks = blocks[blocks[:, 0] > 0]
        self._blocks = _join_lightest_pair(blocks) if len(blocks) > MAX_BLOCKS else blocks
        self._measurements += 1

    @property
    def measurements(self) -> int:
        """Updates taken in."""
        return self._measurements

    @property
    def skipped(self) -> int:
        """Updates left out: a single part, or norms that were not finite."""
        return self._skipped

    @property
    def grad_sq_norm(self) -> float:
        """``|G|^2``: unbiased average, negative at times while not identified; NaN before any measurement."""
        return self._average(1)

    @property
    def grad_variance(self) -> float:
        """``tr(Sigma)`` of one sample's gradient: unbiased average; NaN before any measurement."""
        return self._average(2)

    @property
    def identified(self) -> bool:
        """Whether ``|G|^2`` can be told from zero, so that the noise scale is a number."""
        return math.isfinite(self.interval(IDENTIFIED_AT)[1])

    @property
    def noise_scale(self) -> float:
        """``phi = tr(Sigma) / |G|^2`` in samples, at least 0; NaN while not identified."""
        return max(self.grad_variance, 0.0) / self.grad_sq_norm if self.identified else math.nan

    def interval(self, confidence: float = 0.95) -> tuple[float, float]:
        """Interval that contains the noise scale of the averaged updates with that confidence, in samples.

        Args:
            confidence: probability, between 0 and 1.

        Returns:
            ``(low, high)``; ``high`` is infinite while ``|G|^2`` cannot be told from zero. Both are NaN with
            fewer than 8 measurements, and when the memory is so short that fewer than two of them count.

        Raises:
            ValueError: if ``confidence`` is not between 0 and 1.
        """
        weights, values = self._blocks[:, 0], self._blocks[:, 2:0:-1]
        # Whole degrees of freedom are as good, and their quantiles have been computed before.
        dof = round(effective_count(weights)) - 1 if len(weights) else 0
        quantile = student_t_quantile(confidence, max(dof, 1))
        if self._measurements < MIN_MEASUREMENTS or dof < 1:
            return math.nan, math.nan
        means = weights @ values / weights.sum()
        return fieller_interval(means, jackknife_covariance(values, weights), quantile)

    def state_dict(self) -> dict[str, Any]:
        """``memory``, the blocks and the counts, as plain numbers and lists."""
        return {
            "memory": self.memory,
            "blocks": self._blocks.tolist(),
            "measurements": self._measurements,
            "skipped": self._skipped,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where ``state`` was taken, its ``memory`` included; nothing changes when it is refused.

        Raises:
            ValueError: if the state is not one that :meth:`state_dict` can have returned.
        """
        if not isinstance(state, Mapping) or set(state) != {"memory", "blocks", "measurements", "skipped"}:
            found = sorted(map(str, state)) if isinstance(state, Mapping) else type(state).__name__
            raise ValueError(
                f"a noise scale's state has memory, blocks, measurements and skipped, not {found}; "
                "load what state_dict() returned."
            )
        memory, blocks = _checked_memory(state["memory"]), _checked_blocks(state["blocks"])
        measurements = _checked_count("measurements", state["measurements"])
        skipped = _checked_count("skipped", state["skipped"])
        if measurements < len(blocks) or (measurements > 0 and len(blocks) == 0):
            raise ValueError(
                f"{measurements} measurements cannot lie in {len(blocks)} blocks; load what state_dict() returned."
            )
        self.memory, self._blocks = memory, blocks
        self._measurements, self._skipped = measurements, skipped

    def _average(self, column: int) -> float:
        weights = self._blocks[:, 0]
        return float(weights @ self._blocks[:, column] / weights.sum()) if len(weights) else math.nan


def _join_lightest_pair(blocks: Array) -> Array:
    """The blocks with those two neighbours as one that have the least weight together."""
    weights = blocks[:, 0]
    first = int(np.argmin(weights[:-1] + weights[1:]))
    pair = blocks[first : first + 2]
    weight = pair[:, 0].sum()
    joined = (weight, *(pair[:, 0] @ pair[:, 1:] / weight))
    return np.vstack([blocks[:first], joined, blocks[first + 2 :]])


def _checked_memory(memory: object) -> float:
    samples = float(memory) if isinstance(memory, Real) and not isinstance(memory, bool) else math.nan
    if not 0 < samples < math.inf:
        raise ValueError(f"memory={memory!r} is not a positive number of samples; pass 100_000, say.")
    return samples


def _checked_count(name: str, count: object) -> int:
    if not isinstance(count, int) or isinstance(count, bool) or count < 0:
        raise ValueError(f"{name}={count!r} is not a count; load what state_dict() returned.")
    return count


def _checked_blocks(rows: object) -> Array:
    try:
        blocks = np.array(rows, dtype=float).reshape(-1, 3) if rows else np.empty((0, 3))
        valid = len(blocks) == len(rows) <= MAX_BLOCKS  # type: ignore[arg-type]  # refused below
    except (TypeError, ValueError):
        valid = False
    if not valid or not np.isfinite(blocks).all() or not (blocks[:, 0] > 0).all():
        raise ValueError(
            f"blocks must be at most {MAX_BLOCKS} rows of a positive weight and two finite means; "
            "load what state_dict() returned."
        )
    return blocks
