"""Schedules of the learning rate, turned into growth of the batch."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from adaptive_batch.measurement import Measurement
from adaptive_batch.policies import _state
from adaptive_batch.policies._arguments import number


class _InPlaceOfDecay:
    """The part of a decay that the batch takes over.

    The user's own scheduler stays and says by how much the rate has decayed: ``f = lr / peak``, ``peak`` the highest
    rate so far, so that a warm-up is no decay. The size is ``B0 / f``; the scheduled rate of each update is
    multiplied by ``(B / B0)^power``, ``B`` the update's own size, and never to more than ``peak``.
    """

    name: str
    needs: frozenset[str] = frozenset()
    power: float

    def __init__(self, step: float = 1.1) -> None:
        step = number("step", step)
        if not 1 <= step < math.inf:
            raise ValueError(f"step={step} is no growth of a batch: pass 1 or more.")
        self.step = step
        self._peak = 0.0
        self._seen = 0

    def propose(self, measurement: Measurement) -> float:
        """Returns ``B0 peak / lr``; the present size where that is less than ``step`` away, or the rate is 0.

        An update before the last one is another run's, whose rates have nothing to do with those before.
        """
        lr, size = measurement.lr, float(measurement.batch_size)
        if measurement.update < self._seen:
            self._peak = 0.0
        self._seen = measurement.update
        if not 0 < lr < math.inf:
            return size
        self._peak = max(self._peak, lr, measurement.peak_lr if measurement.peak_lr < math.inf else lr)
        wanted = measurement.reference_batch_size * (self._peak / lr)
        return size if 1 / self.step < wanted / size < self.step else wanted

    def lr_factor(self, batch_size: float, reference_batch_size: float, lr: float = math.nan) -> float:
        """Returns ``(B / B0)^power``, which does not take the rate above its peak.

        Args:
            batch_size: of the update, in samples.
            reference_batch_size: ``B0``.
            lr: the scheduled rate of the update; NaN where it is not known.
        """
        factor = float((batch_size / reference_batch_size) ** self.power)
        return min(factor, max(1.0, self._peak / lr)) if lr > 0 and self._peak > 0 else factor

    def reason(self, measurement: Measurement, batch_size: int) -> str:
        """Says how far the schedule has decayed, such as "the schedule has the rate at 0.2 of its peak"."""
        share = measurement.lr / self._peak if self._peak else 0.0
        return f"the schedule has the learning rate at {share:.3g} of its peak"

    def state_dict(self) -> dict[str, Any]:
        """The highest rate so far, and the last update."""
        return {"peak": self._peak, "seen": self._seen}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Put back what :meth:`state_dict` gave.

        Raises:
            ValueError: if the state is not one of this policy.
        """
        state = _state.checked(self, state, peak=_state.is_weight, seen=_state.is_count)
        self._peak, self._seen = state["peak"], state["seen"]


class DontDecay(_InPlaceOfDecay):
    """Grows the batch where the schedule decays the learning rate.

    ::

        f = lr / peak      B = B0 / f      rate of an update = lr B / B0, at most peak

    ``lr`` is what the user's scheduler sets, so the rate stays at its peak while the batch grows, and decays
    once the batch has reached ``max_batch_size``. The noise scale of SGD, ``g = lr N / (B (1 - m))``, is the
    schedule's own at every update, whatever its size. Smith, Kindermans, Ying, Le, *Don't decay the learning rate,
    increase the batch size*, ICLR 2018, arXiv:1711.00489, which grows up to about a tenth of the data set (as
    reported; the default of ``max_batch_size``).

    The learning rate is part of the policy: no scaling rule goes with it. The rate of the first parameter group
    counts.

    Args:
        step: least factor between two sizes, so that a smooth schedule does not resize at every decision.

    Raises:
        ValueError: ``step`` is below 1.
    """

    name = "dont_decay"
    power = 1.0


class Seesaw(_InPlaceOfDecay):
    """Grows the batch by as much as the schedule decays the rate, and decays the rate by the root of it.

    ::

        f = lr / peak      B = B0 / f      rate of an update = lr sqrt(B / B0) = peak sqrt(f)

    Where a schedule divides the rate by ``a``, Seesaw divides it by ``sqrt(a)`` and multiplies the batch by ``a``.
    Meterez, Morwani, Wu, Oncescu, Pehlevan, Kakade, *Seesaw: accelerating training by balancing learning rate and
    batch size scheduling*, 2025, arXiv:2510.14717: for Adam and normalised SGD, at sizes up to the critical one,
    where the noise dominates ``|g_B|^2``; steeper ramps diverge.

    The learning rate is part of the policy: no scaling rule goes with it. The rate of the first parameter group
    counts. Once the batch has reached ``max_batch_size`` the rate decays with the schedule.

    Args:
        step: ``a``, the least factor between two sizes.

    Raises:
        ValueError: ``step`` is below 1.
    """

    name = "seesaw"
    power = 0.5
