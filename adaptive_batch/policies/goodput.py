"""The batch size that makes the most progress per second."""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import pairwise
from typing import TYPE_CHECKING

from adaptive_batch.measurement import Measurement
from adaptive_batch.policies import _words

if TYPE_CHECKING:
    from adaptive_batch.throughput import StepTimeModel

_REACH = 1024.0  # how many times larger than anything known a proposal can be


class Goodput:
    """Maximises goodput: throughput times statistical efficiency.

    ::

        goodput(B) = B / T(B) * (phi + B0) / (phi + B)      useful samples per second

    ``T(B)`` is the seconds of an update, ``phi`` the gradient noise scale in samples, ``B0`` the reference
    batch size. Qiao, Choe, Subramanya, Neiswanger, Ho, Zhang, Ganger, Xing, *Pollux*, OSDI 2021,
    arXiv:2008.12260, equations 4 to 7.

    Where ``T(B) = alpha + beta * B`` the maximum is at ``sqrt(phi * alpha / beta)`` (McCandlish et al.
    2018, arXiv:1812.06162, equation D.6). Measured step times are not always affine, so the maximum is
    taken over all pieces between neighbouring measured sizes, each affine and each with its own
    ``alpha`` and ``beta``; a size that was measured to be slow is therefore left again, and where time is
    proportional to the batch (``alpha = 0``) the smallest size is best.

    A proposal is at least 1 and at most 1024 times the present size (or the largest measured size, if
    that is more). The bound matters only where a sample seems to cost no time: it keeps the proposal finite.

    Nothing to decide by (no noise scale, no step time, or no slope yet): the present size.
    """

    name = "goodput"
    needs: frozenset[str] = frozenset({"noise", "step_time"})

    def propose(self, measurement: Measurement) -> float:
        """Returns the size of the highest goodput, the present one if none is higher."""
        best, highest = float(measurement.batch_size), self.goodput(measurement.batch_size, measurement)
        if measurement.step_time is None or math.isnan(highest):
            return best
        for size in _candidates(measurement.step_time, best, measurement.noise_scale):
            goodput = self.goodput(size, measurement)
            if goodput > highest:
                best, highest = size, goodput
        return best

    def goodput(self, batch_size: float, measurement: Measurement) -> float:
        """Returns the useful samples per second at ``batch_size``; NaN where it cannot be told."""
        phi = measurement.noise_scale
        if measurement.step_time is None or not phi >= 0:
            return math.nan
        throughput = batch_size / measurement.step_time.predict(batch_size)
        return throughput * _efficiency(batch_size, measurement.reference_batch_size, phi)

    def reason(self, measurement: Measurement, batch_size: int) -> str:
        """Says why ``batch_size``, or why the present size is kept.

        Such as "noise scale 410 [350, 480], predicted +31 % goodput", or, for the present size, "noise
        scale 410 [350, 480], an update takes 200 us + 50 us per sample, goodput is best at 40 (+1 %)".
        """
        noise = _words.noise_scale(measurement)
        if math.isnan(measurement.noise_scale):
            return noise
        model = measurement.step_time
        present = self.goodput(measurement.batch_size, measurement)
        promised = self.goodput(batch_size, measurement) / present
        if model is None or math.isnan(promised) or math.isnan(model.beta):
            return f"{noise}, step time not known"
        if batch_size != measurement.batch_size:
            return f"{noise}, predicted {_words.percent(promised)} goodput"
        best = self.propose(measurement)
        promised = self.goodput(best, measurement) / present
        cost = f"{_words.seconds(model.alpha)} + {_words.seconds(model.beta)} per sample"
        where = f"{_words.count(best)} ({_words.percent(promised)})"
        return f"{noise}, an update takes {cost}, goodput is best at {where}"


def _efficiency(batch_size: float, reference_batch_size: float, phi: float) -> float:
    """Progress per sample at ``B`` over that at ``B0`` (Pollux, equation 7); 1 where noise is everything."""
    return 1.0 if math.isinf(phi) else (phi + reference_batch_size) / (phi + batch_size)


def _candidates(step_time: StepTimeModel, present: float, phi: float) -> Iterator[float]:
    """The sizes at which the maximum can be: ends of affine pieces, and stationary points inside them."""
    measured = step_time.measured
    ends = sorted({1.0, *map(float, measured), _REACH * max([present, *measured])})
    for low, high in pairwise(ends):
        yield low
        seconds = step_time.predict(low)
        beta = (step_time.predict(high) - seconds) / (high - low)
        alpha = seconds - beta * low
        if alpha > 0 and beta > 0:
            stationary = math.sqrt(phi * alpha / beta)
            if low < stationary < high:
                yield stationary
    yield ends[-1]
