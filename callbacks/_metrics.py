"""torchmetrics objects across the parts of a batch: whole-batch step values, and a way back.

Private names of torchmetrics: ``_defaults``, ``_update_count``, ``_computed``, ``_forward_cache``, ``_to_sync``,
``_reduce_states`` (1.0 to 1.9).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torchmetrics import Metric, MetricCollection

__all__ = ["Metrics"]


class Metrics:
    """The metrics that a module holds.

    Args:
        module: looked through once.
    """

    def __init__(self, module: nn.Module) -> None:
        self._metrics = [m for m in module.modules() if isinstance(m, Metric)]
        collections = [m for m in module.modules() if isinstance(m, MetricCollection)]
        grouped = {id(m) for collection in collections for m in collection.modules()}
        # Only these say by themselves how states of two batches combine.
        self._joinable = [m for m in self._metrics if m.full_state_update is False and id(m) not in grouped]
        self._saved: list[dict[str, Any]] = []

    def save(self) -> None:
        """Remember all states."""
        self._saved = [_state(m) for m in self._metrics]

    def restore(self) -> None:
        """Put the remembered states back."""
        for metric, state in zip(self._metrics, self._saved, strict=True):
            _set(metric, state)

    def forget(self) -> None:
        """Release the remembered states."""
        self._saved = []

    def start_parts(self) -> None:
        """Empty the metrics, so that the parts of one batch add up to that batch alone."""
        self._before = [_state(m) for m in self._joinable]
        for metric in self._joinable:
            metric.reset()

    @torch.no_grad()
    def end_parts(self) -> None:
        """The batch counts as one: its value is the step's, its state joins what was there before."""
        for metric, before in zip(self._joinable, self._before, strict=True):
            if metric._update_count == 0:
                _set(metric, before)
                continue
            if metric._forward_cache is not None:
                metric._computed, metric._to_sync = None, False
                metric._forward_cache = metric.compute()
                metric._to_sync = metric.sync_on_compute
            metric._update_count = before["_update_count"] + 1
            metric._reduce_states({name: before[name] for name in metric._defaults})
            metric._computed = None
        self._before = []


_PLAIN = ("_update_count", "_computed", "_forward_cache")


def _state(metric: Metric) -> dict[str, Any]:
    states = {name: _copied(getattr(metric, name)) for name in metric._defaults}
    return {**states, **{name: getattr(metric, name) for name in _PLAIN}}


def _set(metric: Metric, state: dict[str, Any]) -> None:
    for name, value in state.items():
        setattr(metric, name, _copied(value))


def _copied(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.detach().clone()
    return list(value) if isinstance(value, list) else value
