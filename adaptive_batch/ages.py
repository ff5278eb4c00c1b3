"""How far the parameter groups of an optimizer are, counted in updates of the reference size."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from torch.optim import Optimizer

__all__ = ["Age", "Ages", "corrects_bias"]


class Age(NamedTuple):
    """Steps that a parameter group has made, and how many of the reference size they are worth in samples."""

    updates: int
    reference_updates: float


_NEW = Age(0, 0.0)


class Ages:
    """The age of each parameter group of an optimizer; one that joins later is younger than the others.

    Counted here, since the optimizer's own counts may lie on a device.
    """

    def __init__(self) -> None:
        self._ages: list[Age] = []
        self._index: dict[int, int] = {}  # by the identity of a group's first parameter, which outlives the group

    def follow(self, optimizer: Optimizer) -> None:
        """Take up an optimizer at the start of a run: a new one, one that has made steps already, or a restored one."""
        known, self._ages, self._index = self._ages, [], {}
        for index, group in enumerate(optimizer.param_groups):
            age = known[index] if index < len(known) else _NEW
            self._ages.append(_started(optimizer, group, age) if corrects_bias(group) else age)
            self._index[_key(group)] = index

    def of(self, group: Mapping[str, Any]) -> Age:
        """The age of a group."""
        index = self._index.get(_key(group))
        return _NEW if index is None else self._ages[index]

    def count_step(self, optimizer: Optimizer, reference_updates: float) -> None:
        """All groups have made a step that is worth so many of the reference size."""
        for group in optimizer.param_groups:
            index = self._index.setdefault(_key(group), len(self._ages))
            if index == len(self._ages):
                self._ages.append(_NEW)
            updates, counted = self._ages[index]
            self._ages[index] = Age(updates + 1, counted + reference_updates)

    @property
    def are_plain(self) -> bool:
        """Whether the steps are worth as many of the reference size, so that there is nothing to correct."""
        return all(age.updates == age.reference_updates for age in self._ages)

    def state_dict(self) -> list[list[float]]:
        """Of each group, plain numbers."""
        return [list(age) for age in self._ages]

    def load_state_dict(self, state: list[list[float]]) -> None:
        """Put back what :meth:`state_dict` gave; :meth:`follow` says whose they are."""
        self._ages = [Age(int(updates), counted) for updates, counted in state]
        self._index = {}


def corrects_bias(group: Mapping[str, Any]) -> bool:
    """Whether a parameter group is one of Adam, AdamW or NAdam, which divide their moments by ``1 - beta^t``."""
    return "betas" in group and ("amsgrad" in group or "momentum_decay" in group) and group.get("lr") is not None


def _key(group: Mapping[str, Any]) -> int:
    return id(group["params"][0]) if group["params"] else 0


def _started(optimizer: Optimizer, group: Mapping[str, Any], age: Age) -> Age:
    states = [optimizer.state[p] for p in group["params"] if p in optimizer.state]
    if not states:
        return _NEW
    steps = max((int(state["step"]) for state in states if "step" in state), default=0)
    return age if age.updates else Age(steps, float(steps))
