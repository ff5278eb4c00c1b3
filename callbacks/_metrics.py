"""torchmetrics objects across the parts of a batch: whole-batch step values, and a way back.

Private names of torchmetrics: ``_defaults``, ``_reductions``, ``_update_count``, ``_computed``,
``_forward_cache``, ``_to_sync``, ``_reduce_states`` (1.0 to 1.9).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_mean

__all__ = ["Metrics"]


class Metrics:
    """The metrics that a module holds.

    Args:
        module: looked through once.
    """

    def __init__(self, module: nn.Module) -> None:
        self._metrics = [m for m in module.modules() if isinstance(m, Metric)]
        # Those that say by themselves how the states of two batches combine; the others see each batch twice.
        self._joined = [_Joined(m) for m in self._metrics if _states_combine(m)]
        self._shadowed = [_Shadowed(m) for m in self._metrics if not _states_combine(m)]
        self._saved: list[dict[str, Any]] = []

    def save(self) -> None:
        """Remember all states."""
        self._saved = [_state(m) for m in self._metrics]

    def restore(self) -> None:
        """Put the remembered states back."""
        for shadowed in self._shadowed:
            shadowed.release()
        for metric, state in zip(self._metrics, self._saved, strict=True):
            _set(metric, state)

    def forget(self) -> None:
        """Release the remembered states."""
        self._saved = []

    def state_dict(self, empty: Sequence[Metric] = ()) -> list[dict[str, Any]]:
        """What each has accumulated, its states and how many updates they are of; nothing in those of ``empty``."""
        return [_nothing(m) if any(m is other for other in empty) else _accumulated(m) for m in self._metrics]

    def load_state_dict(self, states: Sequence[Mapping[str, Any]]) -> None:
        """Put back what :meth:`state_dict` gave; metrics that are not the same ones start from nothing."""
        if [set(m._defaults) for m in self._metrics] != [set(state["states"]) for state in states]:
            return
        for metric, state in zip(self._metrics, states, strict=True):
            values = {name: _moved(value, metric.device) for name, value in state["states"].items()}
            _set(metric, {**values, "_update_count": state["updates"], "_computed": None})

    def start_parts(self, sizes: Sequence[int]) -> None:
        """A batch comes in parts of these many samples."""
        self._sizes = sizes
        for joined in self._joined:
            joined.save()  # all, before any is emptied: metrics of a collection may share their states
        for joined in self._joined:
            joined.metric.reset()
        for shadowed in self._shadowed:
            shadowed.start()

    def start_part(self, index: int) -> None:
        """The next values are of part ``index``."""
        for joined in self._joined:
            joined.start_part(sum(self._sizes[:index]) / self._sizes[index])

    @torch.no_grad()
    def end_parts(self) -> None:
        """The batch counts as one: its value is the step's, its state joins what was there before."""
        for joined in self._joined:
            joined.finish()
        for shadowed in self._shadowed:
            shadowed.finish()


class _Joined:
    """A metric that is emptied, so that the parts add up to the batch, and joined with what was before."""

    def __init__(self, metric: Metric) -> None:
        self.metric = metric
        self._averages = any(reduction is dim_zero_mean for reduction in metric._reductions.values())

    def save(self) -> None:
        self._before = _state(self.metric)
        self._used = False
        self._count: float = 0

    def start_part(self, done: float) -> None:
        """``done`` samples were before this part, in units of its own."""
        metric = self.metric
        self._used = self._used or metric._update_count != self._count
        if self._averages and self._used:
            # torchmetrics weighs the states of n updates with n - 1 to 1.
            metric._update_count = done  # type: ignore[assignment]
        self._count = metric._update_count

    def finish(self) -> None:
        metric, before = self.metric, self._before
        if not (self._used or metric._update_count != self._count):
            _set(metric, before)
            return
        if metric._forward_cache is not None:
            metric._computed, metric._to_sync = None, False
            metric._forward_cache = metric.compute()
            metric._to_sync = metric.sync_on_compute
        metric._update_count = before["_update_count"] + 1
        metric._reduce_states({name: before[name] for name in metric._defaults})
        metric._computed = None


class _Shadowed:
    """A metric that runs on from part to part, while a copy sees the batch alone, for the step's value."""

    def __init__(self, metric: Metric) -> None:
        self._metric = metric
        self._alone: Metric | None = None

    def start(self) -> None:
        self.release()  # an attempt may have ended in the middle
        if self._alone is not None:
            self._alone.reset()
        metric, forward = self._metric, self._metric.forward

        def both(*args: Any, **kwargs: Any) -> Any:
            value = forward(*args, **kwargs)
            if self._alone is None:
                self._alone = metric.clone()
                self._alone.__dict__.pop("forward")
                self._alone.reset()
            self._alone.update(*args, **kwargs)
            return value

        metric.__dict__["forward"] = both

    def finish(self) -> None:
        self.release()
        if self._alone is not None and self._alone._update_count > 0:
            self._alone._to_sync = False
            self._metric._forward_cache = self._alone.compute()

    def release(self) -> None:
        """Let the metric go on by itself."""
        self._metric.__dict__.pop("forward", None)


def _states_combine(metric: Metric) -> bool:
    return metric.full_state_update is False and not metric.dist_sync_on_step


def _accumulated(metric: Metric) -> dict[str, Any]:
    states = {name: _copied(getattr(metric, name)) for name in metric._defaults}
    return {"updates": metric._update_count, "states": states}


def _nothing(metric: Metric) -> dict[str, Any]:
    return {"updates": 0, "states": {name: _copied(default) for name, default in metric._defaults.items()}}


_PLAIN = ("_update_count", "_computed", "_forward_cache")


def _state(metric: Metric) -> dict[str, Any]:
    states = {name: _copied(getattr(metric, name)) for name in metric._defaults}
    return {**states, **{name: getattr(metric, name) for name in _PLAIN}}


def _set(metric: Metric, state: dict[str, Any]) -> None:
    for name, value in state.items():
        setattr(metric, name, _copied(value))


def _moved(value: Any, device: torch.device) -> Any:
    return [v.to(device) for v in value] if isinstance(value, list) else value.to(device)


def _copied(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.detach().clone()
    return list(value) if isinstance(value, list) else value
