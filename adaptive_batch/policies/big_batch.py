"""Big Batch SGD: grow whenever a batch's gradient is lost in its own noise."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from adaptive_batch.measurement import Measurement
from adaptive_batch.policies import _state
from adaptive_batch.policies._arguments import number


class BigBatch:
    """Grows the batch by a fraction whenever the signal of a single batch is below its noise.

    ::

        theta^2 |g_B|^2 <= V_B / B   =>   B' = B + max(1, floor(delta B))

    De, Yadav, Jacobs, Goldstein, *Automated inference with adaptive batches*, AISTATS 2017, arXiv:1610.05792.
    With ``theta = 1``, as in the paper's algorithm, a batch fails where its unbiased estimate of ``|G|^2``
    is not positive. Every measured update is tested once and by itself, the newest at each decision, and the averages
    where it is not known; ``|g_B|^2`` is put as ``|G|^2 + V_B / B`` with ``B`` the present size.

    The paper extends the batch at hand before it steps; here the batches that follow are larger. Its own step sizes
    (Barzilai-Borwein, line search) are not part of the policy.

    Args:
        delta: growth at a failed test, as a fraction of the size.
        theta: how far the noise has to stay below the signal; above 0, at most 1.

    Raises:
        ValueError: ``delta`` is not positive and finite, or ``theta`` not in (0, 1].
    """

    name = "big_batch"
    needs: frozenset[str] = frozenset({"variance"})
    is_test = True

    def __init__(self, delta: float = 0.1, *, theta: float = 1.0) -> None:
        delta, theta = number("delta", delta), number("theta", theta)
        if not 0 < delta < math.inf:
            raise ValueError(f"delta={delta} is no growth: pass a positive fraction.")
        if not 0 < theta <= 1:
            raise ValueError(f"theta={theta} is not a test that a batch can pass: pass one in (0, 1].")
        self.delta = delta
        self.theta = theta
        self._tested = 0

    def propose(self, measurement: Measurement) -> float:
        """Returns the larger size after a failed test of a new measurement, otherwise the present one."""
        size, update = measurement.batch_size, measurement.measured_update
        sq_norm, variance = measurement.measured_grad_sq_norm, measurement.measured_grad_variance
        if not update:
            sq_norm, variance = measurement.grad_sq_norm, measurement.grad_variance
        elif update == self._tested:
            return float(size)
        self._tested = update
        failed = self.theta**2 * (sq_norm + variance / size) <= variance / size
        return float(size + max(1, math.floor(self.delta * size)) if failed else size)

    def reason(self, measurement: Measurement, batch_size: int) -> str:
        """Says which update failed."""
        return f"the gradient of update {measurement.measured_update} is lost in its noise"

    def state_dict(self) -> dict[str, Any]:
        """The last update that was tested."""
        return {"tested": self._tested}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Put back what :meth:`state_dict` gave.

        Raises:
            ValueError: if the state is not one of this policy.
        """
        self._tested = _state.checked(self, state, tested=_state.is_count)["tested"]
