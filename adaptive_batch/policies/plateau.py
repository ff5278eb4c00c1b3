"""A larger batch where a scheduler would lower the learning rate: when the loss stops falling."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from adaptive_batch.measurement import Measurement
from adaptive_batch.policies import _state
from adaptive_batch.policies._arguments import number
from adaptive_batch.policies._position import check_length, check_unit, position
from adaptive_batch.policies._size import grown


class Plateau:
    """Multiplies the batch when the training loss has stopped falling.

    ``B = B0 factor^n`` after ``n`` plateaus. The training loss is averaged over windows of ``every`` epochs
    (updates, samples); a window improves where its mean is below ``(1 - threshold)`` times the best one; more than
    ``patience`` windows in a row without improvement are a plateau. That is torch's ``ReduceLROnPlateau`` with a
    growing batch in the place of a falling learning rate, the substitution of Smith, Kindermans, Ying, Le, *Don't
    decay the learning rate, increase the batch size*, ICLR 2018, arXiv:1711.00489. The learning rate stays, so
    ``"auto"`` picks no scaling rule.

    A decision between two windows belongs to the later one. Losses are taken to be positive.

    Args:
        factor: growth at a plateau, above 1.
        patience: windows without improvement that are borne with.
        threshold: relative improvement that counts.
        every: length of a window.
        unit: of ``every``: ``"epochs"``, ``"updates"`` or ``"samples"``.

    Raises:
        ValueError: an argument is out of its range.
    """

    name = "plateau"
    needs: frozenset[str] = frozenset()
    auto_lr_scaling = "none"

    def __init__(
        self,
        factor: float = 2.0,
        *,
        patience: int = 10,
        threshold: float = 1e-4,
        every: float = 1,
        unit: str = "epochs",
    ) -> None:
        factor, threshold = number("factor", factor), number("threshold", threshold)
        if not 1 < factor < math.inf:
            raise ValueError(f"factor={factor} does not grow the batch: pass one above 1.")
        if not _state.is_count(patience):
            raise ValueError(f"patience={patience!r} is no number of windows: pass a whole number from 0 on.")
        if not 0 <= threshold < 1:
            raise ValueError(f"threshold={threshold} is no relative improvement: pass one in [0, 1).")
        self.factor = factor
        self.patience = patience
        self.threshold = threshold
        self.unit = check_unit(unit, "Plateau")
        self.every = check_length("every", every, unit)
        self._start()

    def _start(self) -> None:
        self._window = self._seen = self._bad = self._plateaus = 0
        self._sum = self._samples = 0.0
        self._best = math.inf

    def propose(self, measurement: Measurement) -> float:
        """Returns ``B0 factor^n``; samples fewer than before are another run's."""
        if measurement.samples < self._seen:
            self._start()
        if measurement.samples != self._seen or not measurement.samples:
            self._take(measurement)
        return grown(measurement.reference_batch_size, self.factor, self._plateaus)

    def _take(self, measurement: Measurement) -> None:
        window = math.floor(position(measurement, self.unit) / self.every)
        if window != self._window:
            self._close()
            self._window = window
        # What it was not asked about, as in a later stage of Sequential, is not its first loss's.
        since = self._seen or measurement.samples - measurement.batch_size
        weight, loss = measurement.samples - since, float(measurement.loss)
        self._seen = measurement.samples
        if math.isfinite(loss):
            self._sum += weight * loss
            self._samples += weight

    def _close(self) -> None:
        if not self._samples:
            return
        mean = self._sum / self._samples
        self._sum = self._samples = 0.0
        if mean < (1 - self.threshold) * self._best:
            self._best, self._bad = mean, 0
            return
        self._bad += 1
        if self._bad > self.patience:
            self._plateaus, self._bad = self._plateaus + 1, 0

    def reason(self, measurement: Measurement, batch_size: int) -> str:
        """Says that the loss has stopped falling, and where."""
        return f"plateau {self._plateaus}, the loss has not fallen below {self._best:.4g}"

    def state_dict(self) -> dict[str, Any]:
        """The open window, the best one and the plateaus."""
        return {name: getattr(self, f"_{name}") for name in _STATE}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Put back what :meth:`state_dict` gave.

        Raises:
            ValueError: if the state is not one of this policy.
        """
        for name, value in _state.checked(self, state, **_STATE).items():
            setattr(self, f"_{name}", value)


_STATE = {
    **dict.fromkeys(("window", "seen", "bad", "plateaus"), _state.is_count),
    **dict.fromkeys(("sum", "best"), _state.is_number),
    "samples": _state.is_weight,
}
