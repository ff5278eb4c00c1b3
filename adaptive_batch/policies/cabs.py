"""Coupled adaptive batch size: the noise that the learning rate and the loss can bear."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from adaptive_batch.measurement import Measurement
from adaptive_batch.policies import _words
from adaptive_batch.policies._arguments import positive
from adaptive_batch.policies._loss_average import LossAverage, check_decay
from adaptive_batch.policies._size import LARGEST


class CABS:
    """Couples the batch size to the learning rate, instead of the other way round.

    ::

        B = c lr tr(Sigma) / F          F the training loss

    Balles, Romero, Hennig, *Coupling adaptive batch sizes with learning rates*, UAI 2017, arXiv:1612.05086,
    equation 22. It is the best expected gain per sample, ``2 L lr / (2 - L lr) tr(Sigma) / |G|^2``, with
    ``lr = 1 / L`` and ``|G|^2 = 2 L F``, and so speaks of plain SGD and of a loss whose minimum is 0: with label
    smoothing or an entropy that cannot be removed it grows too little; where the loss is not positive the size stays.
    ``lr`` is the scheduled rate of the first parameter group; no scaling rule goes with it.

    Args:
        c: multiplier.
        smoothing: of the loss, per update (0.95 as in the authors' implementation, here debiased). ``tr(Sigma)``
            is the controller's average.

    Raises:
        ValueError: ``c`` is not positive and finite, or ``smoothing`` not in [0, 1).
    """

    name = "cabs"
    needs: frozenset[str] = frozenset({"variance"})

    def __init__(self, c: float = 1.0, *, smoothing: float = 0.95) -> None:
        self.c = positive("c", c)
        self._loss = LossAverage(check_decay(smoothing))

    def propose(self, measurement: Measurement) -> float:
        """Returns ``c lr tr(Sigma) / F``; the present size while one is not known or not positive."""
        self._loss.update(measurement)
        variance, loss = measurement.grad_variance, self._loss.mean
        if not (variance > 0 and loss > 0 and measurement.lr > 0):
            return float(measurement.batch_size)
        return min(self.c * measurement.lr * variance / loss, LARGEST)

    def lr_factor(self, batch_size: float, reference_batch_size: float, lr: float = math.nan) -> float:
        """Returns 1: the size follows the learning rate, which stays as it is."""
        return 1.0

    def reason(self, measurement: Measurement, batch_size: int) -> str:
        """Says what the size follows, such as "learning rate 0.1, gradient variance 61.6, loss 0.42"."""
        variance = _words.count(measurement.grad_variance)
        return f"learning rate {measurement.lr:.3g}, gradient variance {variance}, loss {self._loss.mean:.3g}"

    def state_dict(self) -> dict[str, Any]:
        """The average of the loss."""
        return self._loss.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Put back what :meth:`state_dict` gave.

        Raises:
            ValueError: if the state is not one of this policy.
        """
        self._loss.load_state_dict(state)
