"""A batch size proportional to the gradient noise scale."""

from __future__ import annotations

import math
from typing import Literal

from adaptive_batch.measurement import Measurement
from adaptive_batch.policies import _words
from adaptive_batch.policies._arguments import positive


class NoiseScale:
    """Follows the gradient noise scale: ``B = c * phi``, or ``B = c * sqrt(rho * phi)``.

    ``phi = tr(Sigma) / |G|^2`` in samples; at ``B = phi`` an update makes half the progress of a noiseless
    one and a sample half that of a tiny batch. McCandlish, Kaplan, Amodei, OpenAI Dota Team, *An Empirical
    Model of Large-Batch Training*, 2018, arXiv:1812.06162; the second form is its appendix D, equation
    D.6, which weighs the overhead of an update against that of a sample.

    ``phi`` itself follows ``B / lr``, so with an unscaled learning rate this policy feeds back on itself:
    combine it with a scaling rule and a maximum size.

    Args:
        multiplier: ``c``, positive.
        overhead_ratio: ``rho``, the time of an update that does not depend on its size over the time per
            sample, in samples. ``"measured"`` takes ``alpha / beta`` of the step-time model; None uses
            the first form.

    Raises:
        ValueError: ``multiplier`` or ``overhead_ratio`` is not positive and finite.
    """

    name = "noise_scale"
    needs: frozenset[str] = frozenset({"noise"})

    def __init__(self, multiplier: float = 1.0, *, overhead_ratio: float | Literal["measured"] | None = None) -> None:
        self.multiplier = positive("multiplier", multiplier)
        if isinstance(overhead_ratio, str):
            if overhead_ratio != "measured":
                raise ValueError(f'overhead_ratio={overhead_ratio!r} is not known: pass samples, "measured" or None.')
            self.needs = frozenset({"noise", "step_time"})
        elif overhead_ratio is not None:
            overhead_ratio = positive("overhead_ratio", overhead_ratio)
        self.overhead_ratio: float | Literal["measured"] | None = overhead_ratio

    def propose(self, measurement: Measurement) -> float:
        """Returns ``c * phi`` or ``c * sqrt(rho * phi)``; the present size while either is not known."""
        phi = measurement.noise_scale
        if phi >= 0:
            size = phi if self.overhead_ratio is None else math.sqrt(self._ratio(measurement) * phi)
            if math.isfinite(size):
                return self.multiplier * size
        return float(measurement.batch_size)

    def _ratio(self, measurement: Measurement) -> float:
        """``rho``; NaN while no slope of the step time is known, or a sample seems to cost nothing."""
        if isinstance(self.overhead_ratio, int | float):
            return self.overhead_ratio
        model = measurement.step_time
        return model.alpha / model.beta if model is not None and model.beta > 0 else math.nan

    def reason(self, measurement: Measurement, batch_size: int) -> str:
        """Says what the size follows, such as "noise scale 410 [350, 480]"."""
        return _words.noise_scale(measurement)
