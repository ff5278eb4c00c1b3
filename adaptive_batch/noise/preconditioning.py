"""The noise scale in the metric of Adam."""

from __future__ import annotations

from torch import Tensor, nn
from torch.optim import Optimizer

__all__ = ["AdamMetric"]

MIN_STEPS = 5
"""Steps before which Adam's second moments are too raw to be a metric (AdaptDL's value)."""


class AdamMetric:
    """Gradients as Adam's step sees them: ``P g`` with ``P = diag(1 / (sqrt(v_hat) + eps))``.

    Norms taken of ``P g`` give the preconditioned noise scale ``tr(P Sigma P') / |P G|^2`` (PGNS). It is
    another quantity than the plain one, often by a factor, and the two are never averaged together. ``v_hat``
    is that of the optimizer's last step, the same for all parts of an update. It leaves momentum out, and
    depends on the batch size itself.

    Source: Qiao et al., "Pollux", OSDI 2021, arXiv:2008.12260, equation 5, and its implementation AdaptDL.

    Args:
        optimizer: one of Adam's kind, which keeps ``exp_avg_sq`` and ``step`` for each parameter.

    Raises:
        ValueError: if the optimizer is not of that kind.
    """

    def __init__(self, optimizer: Optimizer) -> None:
        if not all("betas" in group and "eps" in group for group in optimizer.param_groups):
            raise ValueError(
                f"{type(optimizer).__name__} has no second moments to precondition with; "
                "use Adam or AdamW, or preconditioned=False."
            )
        self._optimizer = optimizer
        self._options = {
            id(p): (group["betas"][1], group["eps"]) for group in optimizer.param_groups for p in group["params"]
        }

    @property
    def ready(self) -> bool:
        """Whether every parameter that has moments has seen at least five steps; reads one counter each."""
        states = [state for state in self._optimizer.state.values() if "exp_avg_sq" in state]
        return bool(states) and all(float(state["step"]) >= MIN_STEPS for state in states)

    def __call__(self, parameter: nn.Parameter, gradient: Tensor) -> Tensor:
        """``P g``; parameters that never had a gradient before count nothing."""
        state = self._optimizer.state.get(parameter, {})
        if "exp_avg_sq" not in state:
            return gradient * 0
        beta, eps = self._options[id(parameter)]
        moment = state["exp_avg_sq"] / (1 - beta ** state["step"])
        preconditioned: Tensor = gradient / (moment.sqrt() + eps)
        return preconditioned
