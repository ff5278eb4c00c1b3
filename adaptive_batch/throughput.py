"""Step time: how many seconds an update takes as a function of its samples."""

from __future__ import annotations

import math
from bisect import bisect_left
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from statistics import median_low
from typing import Any, NamedTuple

__all__ = ["StepTimeModel"]

_RING = 32  # observations kept per size: enough for a stable median, soon forgotten when the machine changes
_ENOUGH = 3  # observations that make a size "measured": the median then survives one outlier
_MOST_SIZES = 32
_PER_OCTAVE = 4  # sizes closer than a factor of about 2**(1/4) share a ring
_APART = 1.25  # a slope between closer sizes would be noise


class _Point(NamedTuple):
    """Median seconds at a median size, and how many times it was observed."""

    samples: int
    seconds: float
    times: int


class _Curve:
    """Seconds over samples, as medians of the last observations around each size.

    Observations of similar size share a ring. Both coordinates of its point are lower medians, and a
    lower median commutes with any non-decreasing function, so points of an affine cost lie on its line
    exactly, even where a ring mixes sizes.
    """

    def __init__(self) -> None:
        self._rings: dict[int, deque[tuple[int, float]]] = {}  # least recently observed first
        self._medians: dict[int, _Point] = {}  # of rings that are as they were when last looked at
        self._points: list[_Point] | None = None
        self._affine: tuple[float, float] | None = None

    def add(self, samples: int, seconds: float) -> None:
        """Records one observation; a time that is not positive and finite is skipped."""
        if not 1 <= samples < math.inf:
            raise ValueError(f"samples={samples} was timed, but a batch has at least 1 sample.")
        if not 0 < seconds < math.inf:
            return
        key = round(_PER_OCTAVE * math.log2(samples))
        ring = self._rings.pop(key, None)
        if ring is None:
            self._make_room()
            ring = deque(maxlen=_RING)
        ring.append((int(samples), float(seconds)))
        self._rings[key] = ring
        self._medians.pop(key, None)
        self._points = self._affine = None

    def forget_above(self, samples: float) -> None:
        """Drops the rings of larger sizes."""
        kept = {key: ring for key, ring in self._rings.items() if median_low(n for n, _ in ring) <= samples}
        if len(kept) < len(self._rings):
            self._rings, self._points, self._affine = kept, None, None

    def _make_room(self) -> None:
        if len(self._rings) < _MOST_SIZES:
            return
        oldest_first = list(self._rings)
        # Odd sizes seen once or twice (tails of epochs) go before a size that was really in use.
        rare = (key for key in oldest_first if len(self._rings[key]) < _ENOUGH)
        del self._rings[next(rare, oldest_first[0])]

    @property
    def count(self) -> int:
        """Observations that are kept."""
        return sum(map(len, self._rings.values()))

    @property
    def observations(self) -> Iterator[tuple[int, float]]:
        """All that is kept, in an order that rebuilds the same curve when it is added again."""
        return (observation for ring in self._rings.values() for observation in ring)

    @property
    def points(self) -> list[_Point]:
        """Measured sizes, ascending."""
        if self._points is None:
            self._points = sorted(self._median(key) for key, ring in self._rings.items() if len(ring) >= _ENOUGH)
        return self._points

    def _median(self, key: int) -> _Point:
        if key not in self._medians:
            samples, seconds = zip(*self._rings[key], strict=True)
            self._medians[key] = _Point(median_low(samples), median_low(seconds), len(samples))
        return self._medians[key]

    @property
    def affine(self) -> tuple[float, float]:
        """``(alpha, beta)`` of the line through the points; NaN while their sizes are too close."""
        if self._affine is None:
            self._affine = _fit(self.points)
        return self._affine


class StepTimeModel:
    """Seconds of an update as a function of its samples, learned while training.

    ``T(B) = alpha + beta * B``: ``alpha`` seconds per update whatever its size, ``beta`` seconds per
    sample (the gradient time of Qiao et al., *Pollux*, OSDI 2021, arXiv:2008.12260, section 3.2). The two
    minimise the squared *relative* error of the median time at each measured size, under ``alpha >= 0``
    and ``beta >= 0``, so that neither a few slow updates nor the largest sizes decide alone.

    The line serves :meth:`predict` only where nothing was measured, since caches and kernels bend the
    real curve: at a measured size it returns that size's median, between two it interpolates, below the
    smallest it follows ``beta`` (but never promises a higher throughput than the smallest size had), and
    beyond the largest it follows the steeper of ``beta`` and the last segment, so that a throughput
    which has begun to fall is expected to go on falling.

    While only one size of update is measured, forward/backward passes over parts of a batch
    (:meth:`update_pass`) lend their slope as ``beta``. It leaves out what an update costs per sample
    outside the passes (waiting for data), so it is dropped as soon as updates have a slope of their own.

    A size is measured once it has 3 observations. At most 32 observations are kept of each of at most
    32 sizes (sizes within about 20 % count as one), so memory is constant. The first updates after a
    resize (autotuning, recompilation) do not belong in the model: the caller leaves them out.

    Example:
        >>> model = StepTimeModel()
        >>> for size in (32, 64) * 3:
        ...     model.update(size, 0.01 + 0.001 * size)
        >>> round(model.predict(128), 6), round(model.alpha, 6), round(model.beta, 6)
        (0.138, 0.01, 0.001)
    """

    def __init__(self) -> None:
        self._updates = _Curve()
        self._passes = _Curve()

    def update(self, samples: int, seconds: float) -> None:
        """Records the wall time of one update.

        Args:
            samples: samples of the update, at least 1.
            seconds: its wall time; skipped unless positive and finite.

        Raises:
            ValueError: ``samples`` is below 1.
        """
        self._updates.add(samples, seconds)

    def update_pass(self, samples: int, seconds: float) -> None:
        """Records the wall time of one forward/backward pass over a part (or the whole) of a batch.

        Args:
            samples: samples of the pass, at least 1.
            seconds: its wall time; skipped unless positive and finite.

        Raises:
            ValueError: ``samples`` is below 1.
        """
        self._passes.add(samples, seconds)

    @property
    def measured(self) -> list[int]:
        """Sizes of update with enough observations, ascending."""
        return [point.samples for point in self._updates.points]

    @property
    def wants_passes(self) -> bool:
        """Whether times of passes would make the slope better known: while updates have none, and few were timed."""
        return self._passes.count < _RING and math.isnan(self._updates.affine[1])

    def forget_above(self, samples: float) -> None:
        """Drop what is known of updates and passes over more than ``samples``, or what counts as the same size."""
        self._updates.forget_above(_APART * samples)
        self._passes.forget_above(_APART * samples)

    @property
    def alpha(self) -> float:
        """Seconds per update whatever its size; NaN until two sizes 1.25x apart are measured."""
        return self._line()[0]

    @property
    def beta(self) -> float:
        """Seconds per sample; NaN until two sizes (of update, else of pass) 1.25x apart are measured."""
        return self._line()[1]

    def _line(self) -> tuple[float, float]:
        points = self._updates.points
        alpha, beta = self._updates.affine
        if not points or not math.isnan(beta):
            return alpha, beta
        last = points[-1]
        beta = self._passes.affine[1]
        if beta * last.samples > last.seconds:  # passes slower than the update that they are part of
            return 0.0, last.seconds / last.samples
        return last.seconds - beta * last.samples, beta

    def predict(self, samples: float) -> float:
        """Returns the seconds that an update over ``samples`` takes.

        NaN while nothing is measured, and away from the measured sizes while no slope is known.

        Raises:
            ValueError: ``samples`` is not positive.
        """
        if not samples > 0:
            raise ValueError(f"The time of {samples} samples was asked for: ask for more than 0.")
        points = self._updates.points
        if not points:
            return math.nan
        first, last = points[0], points[-1]
        if samples < first.samples:
            return first.seconds + self._slope_below() * (samples - first.samples)
        if samples > last.samples:
            return last.seconds + self._slope_beyond() * (samples - last.samples)
        i = bisect_left(points, samples, key=lambda point: point.samples)
        high = points[i]
        if high.samples == samples:
            return high.seconds
        low = points[i - 1]
        return low.seconds + _slope(low, high) * (samples - low.samples)

    def _slope_below(self) -> float:
        first = self._updates.points[0]
        beta = self.beta
        return beta if math.isnan(beta) else min(beta, first.seconds / first.samples)

    def _slope_beyond(self) -> float:
        points = self._updates.points
        last = points[-1]
        before = next((p for p in reversed(points) if p.samples * _APART <= last.samples), None)
        return self.beta if before is None else max(self.beta, _slope(before, last))

    def state_dict(self) -> dict[str, Any]:
        """Returns the observations as plain numbers."""
        return {
            "updates": [list(observation) for observation in self._updates.observations],
            "passes": [list(observation) for observation in self._passes.observations],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Puts back what :meth:`state_dict` returned.

        Raises:
            ValueError: the state is not one of this class; nothing is changed then.
        """
        if not isinstance(state, Mapping) or set(state) != {"updates", "passes"}:
            found = sorted(map(str, state)) if isinstance(state, Mapping) else type(state).__name__
            raise ValueError(f"A StepTimeModel state has the keys passes and updates, not {found}.")
        updates, passes = _curve_of(state["updates"]), _curve_of(state["passes"])
        self._updates, self._passes = updates, passes


def _slope(low: _Point, high: _Point) -> float:
    return (high.seconds - low.seconds) / (high.samples - low.samples)


def _fit(points: Sequence[_Point]) -> tuple[float, float]:
    """Minimises ``sum times * ((alpha + beta * samples - seconds) / seconds)^2``, both >= 0."""
    if not points or points[-1].samples < _APART * points[0].samples:
        return math.nan, math.nan
    weighted = [(times / seconds**2, samples, seconds) for samples, seconds, times in points]
    total = sum(w for w, _, _ in weighted)
    mean_b = sum(w * b for w, b, _ in weighted) / total
    mean_t = sum(w * t for w, _, t in weighted) / total
    cross = sum(w * (b - mean_b) * (t - mean_t) for w, b, t in weighted)
    beta = cross / sum(w * (b - mean_b) ** 2 for w, b, _ in weighted)
    alpha = mean_t - beta * mean_b
    # At most one of the two can be negative, and the constrained optimum then lies where it is 0.
    if beta < 0:
        return mean_t, 0.0
    if alpha < 0:
        return 0.0, sum(w * b * t for w, b, t in weighted) / sum(w * b * b for w, b, _ in weighted)
    return alpha, beta


def _curve_of(observations: Iterable[Any]) -> _Curve:
    curve = _Curve()
    if not isinstance(observations, Iterable):
        raise ValueError(f"A StepTimeModel state holds lists of [samples, seconds], not {observations!r}.")
    for observation in observations:
        if not _is_observation(observation):
            raise ValueError(f"A StepTimeModel state holds [samples >= 1, seconds > 0], not {observation!r}.")
        curve.add(*observation)
    return curve


def _is_observation(value: Any) -> bool:
    if not isinstance(value, (list, tuple)) or len(value) != 2:
        return False
    samples, seconds = value
    if type(samples) is not int or not isinstance(seconds, (int, float)):
        return False
    return samples >= 1 and 0 < seconds < math.inf
