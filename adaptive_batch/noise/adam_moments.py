"""The gradient noise from the moments that Adam keeps anyway."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.optim import Adam, Optimizer

from adaptive_batch.noise.sample import Batches, NoiseSample, equivalent_sample

__all__ = ["AdamMomentsSource"]


class AdamMomentsSource:
    """Reads ``|G|^2`` and ``tr(Sigma)`` out of Adam's own averages of ``g`` and ``g^2``.

    Over a window of ``3 / (1 - beta1)`` updates the second moments have gained ``sum w_t |g_t|^2`` (their sum
    now less the decayed sum then), whose expectation is ``|G|^2 + tr(Sigma) sum(w_t / b_t)``; the first
    moments are an average of gradients with ``|G|^2 + tr(Sigma) sum(w_t^2 / b_t)``, ``w_t`` being the weights
    of either average. Two equations, two unknowns. Windows follow each other, so that what they give is close
    to independent; the sizes of the updates are in the sums, so that a resize spoils nothing.

    It costs two sums over the optimizer's state in a window. It is valid while the gradient stands still over
    a window: what it drifts by counts as noise. Gradients must reach the optimizer as they are, neither
    clipped nor with a weight decay added.

    Source: in the form of Balles, Hennig, "Dissecting Adam", 2018, arXiv:1705.07774, here for two decay rates
    and a window.

    Args:
        optimizer: Adam without weight decay, or AdamW, with the same betas in all parameter groups.

    Raises:
        ValueError: for any other optimizer.
    """

    pending = True

    def __init__(self, optimizer: Optimizer) -> None:
        if not isinstance(optimizer, Adam):
            raise ValueError(f"{type(optimizer).__name__} keeps no moments as Adam does; choose another noise source.")
        betas = {tuple(map(float, group["betas"])) for group in optimizer.param_groups}
        if len(betas) > 1:
            raise ValueError(f"the parameter groups have different betas {sorted(betas)}; choose another noise source.")
        for group in optimizer.param_groups:
            if group["weight_decay"] and not group.get("decoupled_weight_decay"):
                raise ValueError(
                    f"Adam adds weight_decay={group['weight_decay']} to the gradients that it averages; "
                    "use AdamW, or choose another noise source."
                )
        self._optimizer = optimizer
        self._beta1, self._beta2 = betas.pop()
        self._first_noise = self._second_noise = 0.0  # sums of w_t^2 / b_t and w_t / b_t
        self._window = max(2, round(3 / (1 - self._beta1)))
        self.cancel()

    def start(self) -> None:
        """An update begins."""
        self._batches = Batches()

    def end_batch(self, size: int, share: float, scale: float | Tensor = 1.0) -> None:
        """Count the samples."""
        self._batches.add(size, share)

    def cancel(self) -> None:
        """Forget the window."""
        self._batches = Batches()
        self._previous: float | None = None  # size of the last update, whose moments are not there yet

    @torch.no_grad()
    def finish(self) -> NoiseSample | None:
        """At the end of a window, from the moments of the updates before this one."""
        if not self._batches.sizes:
            return None
        size, parts = self._batches.size, None
        if self._previous is None:
            self._begin_history(size)
        else:
            self._first_noise = self._beta1**2 * self._first_noise + (1 - self._beta1) ** 2 / self._previous
            self._second_noise = self._beta2 * self._second_noise + (1 - self._beta2) / self._previous
            self._updates += 1
        if self._updates == self._window:
            parts = self._measured()
            self._begin_window()
        self._previous = size
        return parts

    def _begin_history(self, size: float) -> None:
        """Updates from before are taken to have had the size of this one."""
        decay = self._beta1**2
        steady = (1 - self._beta1) ** 2 / (1 - decay) / size
        self._first_noise = steady * (1 - decay ** self._steps())
        self._begin_window()

    def _begin_window(self) -> None:
        self._updates = 0
        self._steps_then = self._steps()
        self._second_then = self._sums()[1]
        self._second_noise = 0.0

    def _measured(self) -> NoiseSample | None:
        steps = self._steps()
        if steps - self._steps_then != self._window:
            return None  # steps were skipped: gradients that were not finite
        first, second = self._sums()
        kept = self._beta2**self._window
        second = (second - kept * self._second_then) / (1 - kept)
        unbiased = (1 - self._beta1**steps) ** 2
        return equivalent_sample(
            second, (1 - kept) / self._second_noise, first / unbiased, unbiased / self._first_noise
        )

    def _steps(self) -> int:
        steps = (int(state["step"]) for state in self._optimizer.state.values() if "exp_avg" in state)
        return max(steps, default=0)

    def _sums(self) -> tuple[Tensor, Tensor]:
        """Sums over all elements of the squared first and of the second moments."""
        states = [state for state in self._optimizer.state.values() if "exp_avg" in state]
        if not states:
            return torch.zeros(()), torch.zeros(())
        first = torch.stack(torch._foreach_norm([state["exp_avg"] for state in states])).square().sum()
        second = torch.stack([state["exp_avg_sq"].sum() for state in states]).sum()
        return first, second
