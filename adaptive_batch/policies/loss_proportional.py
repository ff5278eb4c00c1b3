"""AdaDamp: a batch that grows as the loss falls."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from adaptive_batch.measurement import Measurement
from adaptive_batch.policies import _state
from adaptive_batch.policies._arguments import number
from adaptive_batch.policies._loss_average import LossAverage, check_decay
from adaptive_batch.policies._size import LARGEST


class LossProportional:
    """Grows the batch in inverse proportion to the excess loss.

    ::

        B = ceil(B0 (F0 - F*) / (F - F*))

    ``F0`` is the loss at the start, ``F`` now, ``F*`` the least there can be. Sievert, Charles, *Improving the
    convergence of SGD through adaptive batch sizes*, 2019, arXiv:1910.08222 (AdaDamp). The learning rate stays, so
    ``"auto"`` picks no scaling rule; the paper's decay of it at the largest size is left to a scheduler.

    ``F`` is the smoothed training loss, which a heavy regularisation or augmentation keeps from falling. The
    size stays while ``F`` is at or below ``F*``.

    Args:
        minimum: ``F*``.
        initial_loss: ``F0``; None takes the mean loss of the updates before the first decision.
        smoothing: of the loss, per update.

    Raises:
        ValueError: ``smoothing`` is not in [0, 1), or ``initial_loss`` not above ``minimum``.
    """

    name = "loss_proportional"
    needs: frozenset[str] = frozenset()
    auto_lr_scaling = "none"

    def __init__(self, minimum: float = 0.0, *, initial_loss: float | None = None, smoothing: float = 0.95) -> None:
        minimum = number("minimum", minimum)
        if not math.isfinite(minimum):
            raise ValueError(f"minimum={minimum} is no loss: pass the least loss that there can be.")
        initial = math.nan if initial_loss is None else number("initial_loss", initial_loss)
        if initial_loss is not None and not minimum < initial < math.inf:
            raise ValueError(f"initial_loss={initial_loss} is not above minimum={minimum}: swap or correct them.")
        self.minimum = minimum
        self._given = self._initial = initial
        self._loss = LossAverage(check_decay(smoothing))

    def propose(self, measurement: Measurement) -> float:
        """Returns the size by the formula; the present one while a loss is not known or not above ``F*``."""
        if self._loss.update(measurement):
            self._initial = self._given
        loss = self._loss.mean
        if math.isnan(self._initial) and loss > self.minimum:
            self._initial = loss
        if not (loss > self.minimum and self._initial > self.minimum):
            return float(measurement.batch_size)
        excess = (self._initial - self.minimum) / (loss - self.minimum)
        return float(math.ceil(min(measurement.reference_batch_size * excess, LARGEST) - 1e-9))

    def reason(self, measurement: Measurement, batch_size: int) -> str:
        """Says how far the loss has fallen, such as "loss 0.31, 2.3 at the start"."""
        return f"loss {self._loss.mean:.3g}, {self._initial:.3g} at the start"

    def state_dict(self) -> dict[str, Any]:
        """The loss at the start, and its average."""
        return {"initial": self._initial, "loss": self._loss.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Put back what :meth:`state_dict` gave.

        Raises:
            ValueError: if the state is not one of this policy.
        """
        fits = {"initial": _state.is_number, "loss": lambda loss: isinstance(loss, Mapping)}
        state = _state.checked(self, state, **fits)
        self._loss.load_state_dict(state["loss"])
        self._initial = state["initial"]
