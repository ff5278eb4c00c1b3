"""Policies made of policies."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from adaptive_batch.measurement import Measurement
from adaptive_batch.policies import _state
from adaptive_batch.policies._position import check_start, check_unit, position
from adaptive_batch.policies.resolve import Policy, resolve_policy

AnyPolicy = str | Policy | Callable[[Measurement], float]
"""What a policy can be given as."""


class Around:
    """A policy around one other, which it is in all but its proposal: needs, reason, state, evidence."""

    def __init__(self, policy: AnyPolicy) -> None:
        self.policy = resolve_policy(policy)

    def __getattr__(self, name: str) -> Any:
        if name == "policy" or name.startswith("__"):  # not there yet, as while it is copied
            raise AttributeError(name)
        return getattr(self.policy, name)


class Clamp(Around):
    """The proposals of a policy, kept within bounds of their own.

    Args:
        policy: a name, a policy or a function.
        min_batch_size: smallest proposal in samples; None is no bound.
        max_batch_size: largest; None is no bound.

    Raises:
        ValueError: a bound is below 1, or the lower one above the upper one.
    """

    def __init__(
        self, policy: AnyPolicy, *, min_batch_size: float | None = None, max_batch_size: float | None = None
    ) -> None:
        super().__init__(policy)
        smallest = 1 if min_batch_size is None else min_batch_size
        largest = math.inf if max_batch_size is None else max_batch_size
        if not 1 <= smallest <= largest:
            raise ValueError(
                f"min_batch_size={min_batch_size} and max_batch_size={max_batch_size} leave no size: "
                "pass bounds of at least 1 sample, the smaller one first."
            )
        self._bounds = (float(smallest), float(largest))

    def propose(self, measurement: Measurement) -> float:
        """Returns the policy's proposal, or the bound that it passes."""
        smallest, largest = self._bounds
        proposal = float(self.policy.propose(measurement))
        return min(max(proposal, smallest), largest) if math.isfinite(proposal) else proposal


class OnlyGrow(Around):
    """The proposals of a policy, the present size where they are smaller.

    Args:
        policy: a name, a policy or a function.
    """

    def propose(self, measurement: Measurement) -> float:
        """Returns the larger of the policy's proposal and the present size."""
        proposal = float(self.policy.propose(measurement))
        return max(proposal, float(measurement.batch_size)) if math.isfinite(proposal) else proposal


class Among:
    """A policy that takes each proposal from one of several, which is also the one that answers for it.

    Attributes:
        members: the policies.
        chosen: the one whose proposal the last one was.
        auto_lr_scaling: ``"none"`` where the batch grows in place of a decay in any of them.
    """

    name: str

    def __init__(self, members: Iterable[AnyPolicy]) -> None:
        self.members: tuple[Policy, ...] = tuple(resolve_policy(member) for member in members)
        if not self.members:
            raise ValueError(f"{type(self).__name__} has no policies to choose from: pass at least one.")
        owners = [member for member in self.members if hasattr(member, "lr_factor")]
        if owners:
            raise ValueError(
                f"{type(owners[0]).__name__} sets the learning rate together with the size and cannot be one of "
                f"several in {type(self).__name__}: use it alone, or in Clamp or OnlyGrow."
            )
        self.needs: frozenset[str] = frozenset().union(*(getattr(member, "needs", ()) for member in self.members))
        if any(hasattr(member, "auto_lr_scaling") for member in self.members):
            self.auto_lr_scaling = "none"
        self.chosen = self.members[0]

    def reason(self, measurement: Measurement, batch_size: int) -> str:
        """The reason of the policy whose proposal it was."""
        explain = getattr(self.chosen, "reason", None)
        name = getattr(self.chosen, "name", type(self.chosen).__name__)
        return name if explain is None else f"{name}: {explain(measurement, batch_size)}"

    def state_dict(self) -> dict[str, Any]:
        """The states of the members, None for those without."""
        return {"members": [m.state_dict() if hasattr(m, "state_dict") else None for m in self.members]}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Put back what :meth:`state_dict` gave.

        Raises:
            ValueError: if the state is not one of these members; nothing is changed then.
        """
        before = self.state_dict()["members"]
        states = _state.checked(self, state, members=lambda value: isinstance(value, Sequence))["members"]
        if [member is None for member in states] != [member is None for member in before]:
            raise ValueError(f"the state is one of other policies than {type(self).__name__} has; build it as before.")
        try:
            self._load(states)
        except Exception:
            self._load(before)
            raise

    def _load(self, states: Sequence[Any]) -> None:
        for member, state in zip(self.members, states, strict=True):
            if state is not None:
                member.load_state_dict(state)  # type: ignore[attr-defined]


class _Extreme(Among):
    """The policy with the most extreme proposal."""

    sign: int

    def __init__(self, *policies: AnyPolicy) -> None:
        super().__init__(policies)

    def propose(self, measurement: Measurement) -> float:
        """Returns the extreme proposal; those that are not finite do not count."""
        proposals = [float(member.propose(measurement)) for member in self.members]
        finite = [(self.sign * size, -i) for i, size in enumerate(proposals) if math.isfinite(size)]
        index = -max(finite)[1] if finite else 0
        self.chosen = self.members[index]
        return proposals[index]


class Max(_Extreme):
    """The largest proposal of several policies.

    Args:
        policies: names, policies or functions.

    Raises:
        ValueError: there is none, or one sets the learning rate together with the size.
    """

    name = "max"
    sign = 1


class Min(_Extreme):
    """The smallest proposal of several policies.

    Args:
        policies: names, policies or functions.

    Raises:
        ValueError: there is none, or one sets the learning rate together with the size.
    """

    name = "min"
    sign = -1


class Sequential(Among):
    """One policy after the other.

    Args:
        stages: position -> the policy from there on; a first one before the first position is the reference size.
        unit: what positions count: whole ``"epochs"`` from 0, ``"updates"`` or ``"samples"`` done so far.

    Raises:
        ValueError: there is no stage, a position that a run cannot be at, an unknown unit, or a policy that sets
            the learning rate together with the size.

    Example:
        >>> from adaptive_batch.policies import Sequential
        >>> policy = Sequential({0: "constant", 5: "norm_test"})  # the norm test from epoch 5 on
    """

    name = "sequential"

    def __init__(self, stages: Mapping[int, AnyPolicy] | Mapping[float, AnyPolicy], *, unit: str = "epochs") -> None:
        self.unit = check_unit(unit, "Sequential")
        for start in stages:
            check_start(start, unit, "Sequential")
        ordered = sorted(stages.items(), key=lambda stage: stage[0])
        super().__init__([policy for _, policy in ordered])
        self._starts = [start for start, _ in ordered]

    def propose(self, measurement: Measurement) -> float:
        """Returns the proposal of the policy whose turn it is; the reference size before the first one's."""
        now = position(measurement, self.unit)
        turn = sum(start <= now for start in self._starts)
        self.chosen = self.members[max(turn - 1, 0)]
        return float(self.chosen.propose(measurement)) if turn else float(measurement.reference_batch_size)
