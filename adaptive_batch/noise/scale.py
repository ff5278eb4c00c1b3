"""The gradient noise scale of a run: the estimates of single updates, averaged, with an interval."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from numbers import Real
from typing import Any

import numpy as np
from torch import Tensor

from adaptive_batch.noise.estimators import Numbers, as_floats, two_batch_estimate
from adaptive_batch.noise.intervals import (
    Array,
    effective_count,
    fieller_interval,
    jackknife_influence,
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


_STATE = {"memory", "blocks", "open", "decay", "since", "measurements", "skipped"}

_FINENESS = 2 * MAX_BLOCKS
"""A block is closed once it has one part in so many of all weight, so that a long run closes one now and then."""


class GradientNoiseScale:
    """``phi = tr(Sigma) / |G|^2`` in samples, averaged over the updates seen, with its uncertainty.

    A gradient of ``B`` samples has ``E|g_B|^2 = |G|^2 + tr(Sigma) / B``. An update whose parts were measured gives an
    unbiased, unclamped and very noisy estimate of ``tr(Sigma)`` (:func:`two_batch_estimate`); any update gives its
    ``|g_B|^2``, at next to no cost (:meth:`update_norm`). All are averaged separately and exponentially::

        tr(Sigma) = EMA(tr Sigma)          |G|^2 = EMA(|g_B|^2) - EMA(tr Sigma / B)

    and the noise scale is the ratio of the averages, never an average of ratios. Where all updates are measured the
    second average is that of the usual two-batch estimates of ``|G|^2``; where few are, the many norms make it
    more exact, by far if ``tr(Sigma)`` comes from the norms of single examples.

    A measurement weighs ``1 - exp(-samples / memory)``, close to proportional to the samples it stands for (those
    since the last one of its kind), and decays by ``exp(-samples / memory)``: the averages look back over the same
    stretch of data whatever the batch size. They are divided by the sum of their weights, so that the first
    update's average is the first update's estimate.

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
            follows a changing noise scale, a long one can identify a large one: from parts alone up to about
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
        # [K, 5], oldest first: of each block the weight and mean of |g_B|^2, and the weight of the measured
        # updates with their means of tr(Sigma) / B and tr(Sigma).
        self._blocks: Array = np.empty((0, 5))
        self._decay = 1.0  # of the blocks' weights since the last one was closed
        self._open = (0.0, 0.0, 0.0, 0.0, 0.0)  # the same of the newest block, sums in the place of means
        self._since = 0.0  # samples since the last measured update
        self._measurements = 0
        self._skipped = 0
        self._answers: dict[float | None, tuple[float, float]] = {}  # kept until the next update

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
        self._measurements += 1
        self._add(sum(sizes), float(sq_norm), grad_variance)

    def update_norm(self, sq_norm: float | Tensor, size: float) -> None:
        """Take in an update whose parts were not measured.

        Args:
            sq_norm: squared norm ``|g_B|^2`` of its mean gradient; skipped unless finite.
            size: its samples.

        Raises:
            ValueError: if the size is not positive.
        """
        if not 0 < size < math.inf:
            raise ValueError(f"an update of {size} samples cannot be measured; pass a positive size.")
        value = float(sq_norm)
        if math.isfinite(value):
            self._add(size, value, None)

    def _add(self, size: float, sq_norm: float, grad_variance: float | None) -> None:
        """One more update; without ``grad_variance`` its norm alone."""
        self._answers.clear()
        self._since += size
        kept = math.exp(-size / self.memory)
        new = -math.expm1(-size / self.memory)
        weight, norms, measured, shares, variances = (kept * value for value in self._open)
        weight, norms = weight + new, norms + new * sq_norm
        if grad_variance is not None:
            new = -math.expm1(-self._since / self.memory)
            measured, self._since = measured + new, 0.0
            shares, variances = shares + new * grad_variance / size, variances + new * grad_variance
        self._open = (weight, norms, measured, shares, variances)
        self._decay *= kept
        if _FINENESS * weight >= self._decay * self._blocks[:, 0].sum():
            self._blocks, self._decay, self._open = self._rows, 1.0, (0.0, 0.0, 0.0, 0.0, 0.0)
            if len(self._blocks) > MAX_BLOCKS:
                self._blocks = _join_lightest_pair(self._blocks)

    @property
    def _rows(self) -> Array:
        """All blocks with their present weights."""
        rows = self._blocks.copy()
        rows[:, (0, 2)] *= self._decay
        # A weight can decay to nothing when an update is much larger than the memory.
        rows = rows[rows[:, 0] > 0]
        return np.vstack([rows, _means(self._open)]) if self._open[0] > 0 else rows

    @property
    def measurements(self) -> int:
        """Updates taken in with their parts."""
        return self._measurements

    @property
    def skipped(self) -> int:
        """Updates left out: a single part, or norms that were not finite."""
        return self._skipped

    @property
    def grad_sq_norm(self) -> float:
        """``|G|^2``: unbiased average, negative at times while not identified; NaN before any measurement."""
        return self._estimates()[1]

    @property
    def grad_variance(self) -> float:
        """``tr(Sigma)`` of one sample's gradient: unbiased average; NaN before any measurement."""
        return self._estimates()[0]

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
        if confidence not in self._answers:
            self._answers[confidence] = self._interval(confidence)
        return self._answers[confidence]

    def _interval(self, confidence: float) -> tuple[float, float]:
        rows = self._rows
        norm_influence = jackknife_influence(rows[:, 1:2], rows[:, 0])
        influence = jackknife_influence(rows[:, 3:5], rows[:, 2])
        # Whole degrees of freedom are as good, and their quantiles have been computed before.
        dof = round(_degrees_of_freedom(rows, norm_influence[:, 0], influence[:, 0]))
        quantile = student_t_quantile(confidence, max(dof, 1))
        if self._measurements < MIN_MEASUREMENTS or dof < 1:
            return math.nan, math.nan
        both = np.column_stack([influence[:, 1], norm_influence[:, 0] - influence[:, 0]])
        return fieller_interval(np.array(self._estimates()), both.T @ both, quantile)

    def _estimates(self) -> tuple[float, float]:
        """``tr(Sigma)`` and ``|G|^2``."""
        if not self._measurements:
            return math.nan, math.nan
        if None not in self._answers:
            rows = self._rows
            norm = rows[:, 0] @ rows[:, 1] / rows[:, 0].sum()
            share, variance = rows[:, 2] @ rows[:, 3:5] / rows[:, 2].sum()
            self._answers[None] = float(variance), float(norm - share)
        return self._answers[None]

    def state_dict(self) -> dict[str, Any]:
        """``memory``, the blocks and the counts, as plain numbers and lists."""
        return {
            "memory": self.memory,
            "blocks": self._blocks.tolist(),
            "open": list(self._open),
            "decay": self._decay,
            "since": self._since,
            "measurements": self._measurements,
            "skipped": self._skipped,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where ``state`` was taken, its ``memory`` included; nothing changes when it is refused.

        Raises:
            ValueError: if the state is not one that :meth:`state_dict` can have returned.
        """
        if not isinstance(state, Mapping) or set(state) != _STATE:
            found = sorted(map(str, state)) if isinstance(state, Mapping) else type(state).__name__
            raise ValueError(
                f"a noise scale's state has {', '.join(sorted(_STATE))}, not {found}; load what state_dict() returned."
            )
        memory, blocks = _checked_memory(state["memory"]), _checked_blocks(state["blocks"])
        newest = _checked_numbers("open", state["open"], 5)
        decay, since = _checked_numbers("decay and since", [state["decay"], state["since"]], 2)
        measurements = _checked_count("measurements", state["measurements"])
        skipped = _checked_count("skipped", state["skipped"])
        holding = int((blocks[:, 2] > 0).sum()) + (newest[2] > 0)
        if measurements < holding or (measurements > 0 and not holding):
            raise ValueError(f"{measurements} measurements do not go with the blocks; load what state_dict() returned.")
        self.memory, self._blocks, self._decay, self._since = memory, blocks, decay, since
        self._open = (newest[0], newest[1], newest[2], newest[3], newest[4])
        self._measurements, self._skipped = measurements, skipped
        self._answers.clear()


def _means(sums: Sequence[float]) -> list[float]:
    """A block's row from its sums."""
    weight, norms, measured, shares, variances = sums
    if not measured:
        return [weight, norms / weight, 0.0, 0.0, 0.0]
    return [weight, norms / weight, measured, shares / measured, variances / measured]


def _join_lightest_pair(blocks: Array) -> Array:
    """The blocks with those two neighbours as one that have the least weight together."""
    weights = blocks[:, 0]
    first = int(np.argmin(weights[:-1] + weights[1:]))
    pair = blocks[first : first + 2]
    (weight, measured) = pair[:, (0, 2)].sum(0)
    sums = [weight, pair[:, 0] @ pair[:, 1], measured, *(pair[:, 2] @ pair[:, 3:])]
    return np.vstack([blocks[:first], _means(sums), blocks[first + 2 :]])


def _degrees_of_freedom(rows: Array, norm_influence: Array, share_influence: Array) -> float:
    """Of the variance of ``|G|^2``, by Satterthwaite from those of its two averages; 0 if one cannot be told."""
    counts = [effective_count(weights) - 1 for weights in (rows[:, 0], rows[:, 2])]
    variances = [float(influence @ influence) for influence in (norm_influence, share_influence)]
    if min(counts) < 1:
        return 0.0
    terms = sum(variance**2 / count for variance, count in zip(variances, counts, strict=True))
    return min(sum(variances) ** 2 / terms, counts[0]) if terms > 0 else counts[0]


def _checked_memory(memory: object) -> float:
    samples = float(memory) if isinstance(memory, Real) and not isinstance(memory, bool) else math.nan
    if not 0 < samples < math.inf:
        raise ValueError(f"memory={memory!r} is not a positive number of samples; pass 100_000, say.")
    return samples


def _checked_count(name: str, count: object) -> int:
    if not isinstance(count, int) or isinstance(count, bool) or count < 0:
        raise ValueError(f"{name}={count!r} is not a count; load what state_dict() returned.")
    return count


def _checked_numbers(name: str, numbers: object, count: int) -> list[float]:
    found = list(numbers) if isinstance(numbers, (list, tuple)) else []
    if len(found) != count or not all(isinstance(n, (int, float)) and math.isfinite(n) for n in found):
        raise ValueError(f"{name}={numbers!r} must be {count} finite numbers; load what state_dict() returned.")
    return [float(number) for number in found]


def _checked_blocks(rows: object) -> Array:
    try:
        blocks = np.array(rows, dtype=float).reshape(-1, 5) if rows else np.empty((0, 5))
        valid = len(blocks) == len(rows) <= MAX_BLOCKS  # type: ignore[arg-type]  # refused below
    except (TypeError, ValueError):
        valid = False
    if not valid or not np.isfinite(blocks).all() or not (blocks[:, 0] > 0).all() or not (blocks[:, 2] >= 0).all():
        raise ValueError(
            f"blocks must be at most {MAX_BLOCKS} rows of a positive weight and a mean, and a weight and two means; "
            "load what state_dict() returned."
        )
    return blocks
