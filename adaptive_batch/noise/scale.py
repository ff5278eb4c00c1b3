"""The gradient noise scale of a run: the estimates of single updates, averaged, with an interval."""

from __future__ import annotations

import math
from collections.abc import Mapping
from itertools import pairwise
from numbers import Real
from typing import Any

from torch import Tensor

from adaptive_batch.noise.estimators import Numbers, as_floats, two_batch_estimate
from adaptive_batch.noise.intervals import Covariance, fieller_interval, student_t_quantile

MAX_BLOCKS = 64
"""Blocks that the measurements are kept in; more would not make an interval visibly better."""

_SPARE_BLOCKS = 32
"""Closed on top of these before neighbours are joined again, many at once: joining looks at every block."""

MIN_MEASUREMENTS = 8
"""Measurements below which there is no interval: a variance from fewer is hardly one."""

IDENTIFIED_AT = 0.99
"""Confidence at which ``|G|^2`` has to differ from zero before there is a noise scale.

Measured with ``G = 0``, looking every ten updates over 1000 updates with a memory of 200 of them: at 95 % a
third of the runs find a noise scale at least once, at 99 % one in fourteen. A higher level makes true
ones wait, in proportion to the square of its quantile.
"""

_NOT_KNOWN = (math.nan, math.nan)

_STATE = {"memory", "blocks", "decay", "total", "gap", "units", "measurements", "skipped"}

_FINENESS = 2 * MAX_BLOCKS
"""A block is closed once it has one part in so many of all weight, so that a long run closes one now and then."""

_SMALLEST = 1e-100
"""Weights are kept divided by what they have decayed since; before that is too small they are multiplied out."""


class GradientNoiseScale:
    """``phi = tr(Sigma) / |G|^2`` in samples, averaged over the updates seen, with its uncertainty.

    A gradient of ``B`` samples has ``E|g_B|^2 = |G|^2 + tr(Sigma) / B``. An update whose parts were measured gives an
    unbiased, unclamped and very noisy estimate of ``tr(Sigma)`` (:func:`two_batch_estimate`); any update gives its
    ``|g_B|^2``, at next to no cost (:meth:`update_norm`). All are averaged separately and exponentially::

        tr(Sigma) = EMA(tr Sigma)          |G|^2 = EMA(|g_B|^2) - EMA(tr Sigma / B)

    and the noise scale is the ratio of the averages, never an average of ratios. Where all updates are measured the
    second average is that of the usual two-batch estimates of ``|G|^2``; where few are, the many norms make it
    more exact, by far if ``tr(Sigma)`` comes from the norms of single examples. A measured ``tr(Sigma)`` stands for
    the updates since the one before, each of its own ``B``: small ones, such as the tails of epochs, are noisier.

    An update weighs ``1 - exp(-samples / memory)``, close to proportional to its samples, and decays by
    ``exp(-samples / memory)``: the averages look back over the same stretch of data whatever the batch size. They are
    divided by the sum of their weights, so that the first update's average is the first update's estimate.

    Each update's squared norms may be given in a ``unit`` of its own, for a gradient that changes by orders of
    magnitude: the noise scale is then the ratio of the averages in these units, which speak of all updates alike, and
    ``|G|^2`` and ``tr(Sigma)`` are the averages times the units' harmonic mean.

    The interval is Fieller's for a ratio of means, from the jackknife over some 64 blocks of consecutive updates;
    when there are too many, those neighbours that weigh least together become one.
    That keeps the weights even however the batch size changes, makes blocks of many updates (whose averages
    are nearly independent and nearly normal) in a long run, and costs the same at every update. The
    estimates are the weighted means of those same blocks.

    Until ``|G|^2`` can be told from zero (Fieller's set at ``confidence`` has an upper end, which takes at
    least 8 measurements) the noise scale is NaN: any number would come from the noise of the denominator. The
    level is stricter than the usual interval's because the question is asked again and again in a run.

    Source: McCandlish, Kaplan, Amodei, OpenAI Dota Team, "An Empirical Model of Large-Batch Training", 2018,
    arXiv:1812.06162, appendix A.1; decay per sample as in Qiao et al., "Pollux", OSDI 2021, arXiv:2008.12260.

    Args:
        memory: samples after which a measurement has lost all but ``1/e`` of its weight. A short memory
            follows a changing noise scale, a long one can identify a large one: from parts alone up to about
            ``sqrt(d B memory) / 3`` at batch size ``B`` with noise in ``d`` effective dimensions. The default
            identifies some 2000 at ``B = 32`` and ``d = 10``, from the last 3000 updates or so.
        confidence: at which ``|G|^2`` has to differ from zero before there is a noise scale.

    Raises:
        ValueError: if ``memory`` is not a positive finite number, or ``confidence`` no probability.
    """

    def __init__(self, *, memory: float = 100_000, confidence: float = IDENTIFIED_AT) -> None:
        if not 0 < confidence < 1:
            raise ValueError(f"confidence={confidence} is not a probability between 0 and 1; pass 0.99, say.")
        self.memory = memory
        self.confidence = confidence
        self.reset()

    @property
    def memory(self) -> float:
        """Samples that divide a measurement's weight by ``e``; may be set, for the updates to come."""
        return self._memory

    @memory.setter
    def memory(self, memory: float) -> None:
        self._memory = memory if type(memory) is float and 0 < memory < math.inf else _checked_memory(memory)

    def reset(self) -> None:
        """Forget all measurements; ``memory`` stays."""
        # Oldest first: sums over the updates of a block of the weight, |g_B|^2 times the weight, and over those that
        # its measured ones stand for the weight, tr(Sigma) / B and tr(Sigma) times it. The weights have yet to decay,
        # the norms are in their updates' units.
        self._blocks: list[list[float]] = [[0.0] * 5]
        self._decay = 1.0
        self._total = 0.0  # weight of all blocks but the last
        self._gap = [0.0, 0.0]  # sums of weight and weight / B over the updates that the next measured one stands for
        self._units = [0.0, 0.0]  # sums of weight and weight / unit over all updates
        self._measurements = 0
        self._skipped = 0
        self._forget_answers()

    def update(
        self, part_sq_norms: Numbers, part_sizes: Numbers, sq_norm: float | Tensor, *, unit: float = 1.0
    ) -> None:
        """Take in the parts of one update; one part or a norm that is not finite is skipped and counted.

        Args:
            part_sq_norms: ``[n]`` squared norms of the mean gradients of the update's ``n`` parts.
            part_sizes: ``[n]`` samples of each part.
            sq_norm: squared norm of the mean of the parts' gradients weighted by their sizes.
            unit: what the norms are averaged in; it must not depend on them, or the averages are biased.

        Raises:
            ValueError: if the sequences differ in length, or a size is not positive.
        """
        sizes = as_floats(part_sizes)
        grad_sq_norm, grad_variance = two_batch_estimate(part_sq_norms, sizes, sq_norm)
        if not (math.isfinite(grad_sq_norm) and math.isfinite(grad_variance)):
            self._skipped += 1
            return
        self._measurements += 1
        self._add(sum(sizes), float(sq_norm), grad_variance, unit)

    def update_norm(self, sq_norm: float | Tensor, size: float, *, unit: float = 1.0) -> None:
        """Take in an update whose parts were not measured.

        Args:
            sq_norm: squared norm ``|g_B|^2`` of its mean gradient; skipped unless finite.
            size: its samples.
            unit: as for :meth:`update`.

        Raises:
            ValueError: if the size is not positive.
        """
        if not 0 < size < math.inf:
            raise ValueError(f"an update of {size} samples cannot be measured; pass a positive size.")
        value = float(sq_norm)
        if math.isfinite(value):
            self._add(size, value, None, unit)

    def _add(self, size: float, sq_norm: float, grad_variance: float | None, unit: float) -> None:
        """One more update; without ``grad_variance`` its norm alone."""
        if self._estimated is not None or self._intervals:
            self._forget_answers()
        self._decay *= math.exp(-size / self._memory)
        if self._decay < _SMALLEST:
            self._multiply_out()
        newest = self._blocks[-1]
        weight = -math.expm1(-size / self._memory) / self._decay
        newest[0] += weight
        newest[1] += weight * (sq_norm / unit)
        gap, units = self._gap, self._units
        units[0] += weight
        units[1] += weight / unit
        gap[0] += weight
        gap[1] += weight / size
        if grad_variance is not None:
            grad_variance /= unit
            newest[2] += gap[0]
            newest[3] += gap[1] * grad_variance
            newest[4] += gap[0] * grad_variance
            gap[0] = gap[1] = 0.0
        if _FINENESS * newest[0] >= self._total:
            self._total += newest[0]
            self._blocks.append([0.0] * 5)
            if len(self._blocks) > MAX_BLOCKS + _SPARE_BLOCKS + 1:
                self._blocks = _join_lightest_pairs(self._blocks, len(self._blocks) - MAX_BLOCKS - 1)

    def _multiply_out(self) -> None:
        blocks = ([self._decay * value for value in block] for block in self._blocks[:-1])
        self._blocks = [block for block in blocks if block[0] > 0] + [[self._decay * v for v in self._blocks[-1]]]
        self._total = sum(block[0] for block in self._blocks[:-1])
        self._gap = [self._decay * value for value in self._gap]
        self._units = [self._decay * value for value in self._units]
        self._decay = 1.0

    def _forget_answers(self) -> None:
        self._estimated: tuple[float, float] | None = None
        self._spread: tuple[Covariance, int] | None = None
        self._intervals: dict[float, tuple[float, float]] = {}

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
        return self._estimates()[1] * self._unit

    @property
    def grad_variance(self) -> float:
        """``tr(Sigma)`` of one sample's gradient: unbiased average; NaN before any measurement."""
        return self._estimates()[0] * self._unit

    @property
    def identified(self) -> bool:
        """Whether ``|G|^2`` can be told from zero, so that the noise scale is a number."""
        return math.isfinite(self.interval(self.confidence)[1])

    @property
    def noise_scale(self) -> float:
        """``phi = tr(Sigma) / |G|^2`` in samples, at least 0; NaN while not identified."""
        if not self.identified:
            return math.nan
        grad_variance, grad_sq_norm = self._estimates()
        return max(grad_variance, 0.0) / grad_sq_norm

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
        if not 0 < confidence < 1:
            raise ValueError(f"confidence={confidence} is not a probability between 0 and 1; pass 0.95, say.")
        if confidence not in self._intervals:
            self._intervals[confidence] = self._interval(confidence)
        return self._intervals[confidence]

    def _interval(self, confidence: float) -> tuple[float, float]:
        if self._measurements < MIN_MEASUREMENTS:
            return math.nan, math.nan
        if self._spread is None:
            self._spread = jackknife(self._blocks)
        covariance, dof = self._spread
        if not dof:
            return math.nan, math.nan
        return fieller_interval(self._estimates(), covariance, student_t_quantile(confidence, dof))

    def _estimates(self) -> tuple[float, float]:
        """``tr(Sigma)`` and ``|G|^2`` in the updates' units."""
        if self._estimated is None:
            weight, norm, measured, share, variance = map(sum, zip(*self._blocks, strict=True))
            if measured:
                grad_variance = variance / measured
                # Updates since the last measured one are taken to be as noisy as those before.
                mean_share = (share + self._gap[1] * grad_variance) / (measured + self._gap[0])
                self._estimated = grad_variance, norm / weight - mean_share
            else:  # all that was measured may have decayed to nothing
                self._estimated = _NOT_KNOWN
        return self._estimated

    @property
    def _unit(self) -> float:
        """The harmonic mean of the updates' units."""
        weight, inverse = self._units
        return weight / inverse if inverse else math.nan

    def state_dict(self) -> dict[str, Any]:
        """``memory``, the blocks and the counts, as plain numbers and lists."""
        return {
            "memory": self.memory,
            "blocks": [list(block) for block in self._blocks],
            "decay": self._decay,
            "total": self._total,
            "gap": list(self._gap),
            "units": list(self._units),
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
        decay, total = _checked_numbers("decay and total", [state["decay"], state["total"]], 2)
        gap = _checked_numbers("gap", state["gap"], 2)
        units = _checked_numbers("units", state["units"], 2)
        measurements = _checked_count("measurements", state["measurements"])
        skipped = _checked_count("skipped", state["skipped"])
        holding = sum(block[2] > 0 for block in blocks)
        if measurements < holding or not decay > 0:
            raise ValueError(f"{measurements} measurements do not go with the blocks; load what state_dict() returned.")
        self.memory, self._blocks, self._gap, self._units = memory, blocks, gap, units
        self._decay, self._total = decay, total
        self._measurements, self._skipped = measurements, skipped
        self._forget_answers()


def _join_lightest_pairs(blocks: list[list[float]], count: int) -> list[list[float]]:
    """Make one of each of ``count`` pairs of neighbours, those that have the least weight; not of the open last."""
    weights = [one[0] + next_one[0] for one, next_one in pairwise(blocks[:-1])]
    firsts: set[int] = set()
    for first in sorted(range(len(weights)), key=weights.__getitem__):
        if len(firsts) < count and not {first - 1, first + 1} & firsts:
            firsts.add(first)
    seconds = {first + 1 for first in firsts}
    return [
        [a + b for a, b in zip(block, blocks[index + 1], strict=True)] if index in firsts else block
        for index, block in enumerate(blocks)
        if index not in seconds
    ]


def jackknife(blocks: list[list[float]]) -> tuple[Covariance, int]:
    """Covariance of the estimates of ``tr(Sigma)`` and ``|G|^2``, and its degrees of freedom, 0 if it cannot be told.

    By the jackknife. With shares ``p_k = w_k / sum(w)`` and means ``m_(-k)`` without block ``k`` its covariance is
    ``sum_k (1 - p_k) (m_(-k) - m)(m_(-k) - m)'``: the usual one with its factor ``(K - 1) / K`` where all weights are
    equal, and unbiased where a block's variance is inversely proportional to its weight.

    In plain Python: over so few numbers one loop takes a third of the time of NumPy's many small steps, where other
    programs have driven these out of the processor's caches.
    """
    weight, norms, measured, shares, variances = map(sum, zip(*blocks, strict=True))
    if not measured:
        return (_NOT_KNOWN, _NOT_KNOWN), 0
    mean_norm, mean_share, mean_variance = norms / weight, shares / measured, variances / measured
    of_variance = joint = of_sq_norm = of_norms = of_shares = 0.0
    squares, fourths, measured_squares, measured_fourths = 0.0, 0.0, 0.0, 0.0
    sqrt = math.sqrt
    for w, norm, m, share, variance in blocks:
        p, q = w / weight, m / measured
        # What leaving the block out does to the averages; of one that has all the weight nobody knows.
        norm = (norm - w * mean_norm) / (weight * sqrt(1 - p)) if p < 1 else 0.0
        scale = measured * sqrt(1 - q) if q < 1 else math.inf
        share, variance = (share - m * mean_share) / scale, (variance - m * mean_variance) / scale
        sq_norm = norm - share
        of_variance += variance * variance
        joint += variance * sq_norm
        of_sq_norm += sq_norm * sq_norm
        of_norms += norm * norm
        of_shares += share * share
        p, q = p * p, q * q
        squares += p
        fourths += p * p
        measured_squares += q
        measured_fourths += q * q
    # Equally weighted blocks that would tell as much about their own variance: Satterthwaite's count.
    counts = squares**2 / fourths, measured_squares**2 / measured_fourths
    # Whole degrees of freedom are as good, and their quantiles have been computed before.
    dof = round(_degrees_of_freedom(*counts, of_norms, of_shares))
    return ((of_variance, joint), (joint, of_sq_norm)), dof


def _degrees_of_freedom(norms: float, shares: float, of_norms: float, of_shares: float) -> float:
    """Of the variance of ``|G|^2``, by Satterthwaite from the counts and variances of its two averages."""
    norms, shares = norms - 1, shares - 1
    if min(norms, shares) < 1:
        return 0.0
    terms = of_norms * of_norms / norms + of_shares * of_shares / shares
    if not math.isfinite(terms):  # a run that diverges
        return 0.0
    return min((of_norms + of_shares) * (of_norms + of_shares) / terms, norms) if terms > 0 else norms


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


def _checked_blocks(rows: object) -> list[list[float]]:
    valid = isinstance(rows, list) and 1 <= len(rows) <= MAX_BLOCKS + _SPARE_BLOCKS + 1
    blocks = [_checked_numbers("a block", row, 5) for row in rows] if valid else []  # type: ignore[attr-defined]
    if not valid or any(row[0] < 0 or row[2] < 0 for row in blocks) or not all(row[0] for row in blocks[:-1]):
        raise ValueError(
            f"blocks must be 1 to {MAX_BLOCKS + _SPARE_BLOCKS + 1} rows of five sums, the weights positive; "
            "load what state_dict() returned."
        )
    return blocks
