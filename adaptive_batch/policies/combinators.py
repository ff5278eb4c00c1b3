"""Policies made of policies."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from adaptive_batch.measurement import Measurement
from adaptive_batch.policies import _state, _words
from adaptive_batch.policies._arguments import check_mapping, number
from adaptive_batch.policies._position import check_start, check_unit, position
from adaptive_batch.policies.combined import Answer, Combined, constant_size, is_measured
from adaptive_batch.policies.constant import Constant
from adaptive_batch.policies.resolve import Policy, resolve_policy

AnyPolicy = str | Policy | Callable[[Measurement], float]
"""What a policy can be given as."""


class Around(Combined):
    """A policy around one other, which it is in all but its proposal: needs, reason, state, evidence."""

    def __init__(self, policy: AnyPolicy) -> None:
        self.policy = self.chosen = resolve_policy(policy)
        self._proposed = math.nan

    def __getattr__(self, name: str) -> Any:
        if name == "policy" or name.startswith("__"):  # not there yet, as while it is copied
            raise AttributeError(name)
        return getattr(self.policy, name)

    def propose_with(self, measurement: Measurement, answer: Answer) -> float:
        """Returns what is left of the policy's proposal."""
        proposal = answer(self.policy, measurement)
        self._proposed = proposal
        return self.bounded(proposal, measurement.batch_size) if math.isfinite(proposal) else proposal

    def constant_size(self, reference_batch_size: int) -> float | None:
        """Returns what is left of the policy's."""
        size = constant_size(self.policy, reference_batch_size)
        return None if size is None else self.bounded(size, reference_batch_size)

    def reason(self, measurement: Measurement, batch_size: int) -> str:
        """The reason of the policy, and what is left of its proposal where that is less or more."""
        words = _words.reason(self.policy, measurement, batch_size, self._proposed)
        left = self.bounded(self._proposed, measurement.batch_size)
        if left == self._proposed:
            return words
        return (
            f"{words}, {_words.count(self._proposed)} is wanted, but {type(self).__name__} leaves {_words.count(left)}"
        )


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
        smallest = 1 if min_batch_size is None else number("min_batch_size", min_batch_size)
        largest = math.inf if max_batch_size is None else number("max_batch_size", max_batch_size)
        if not 1 <= smallest <= largest or math.isinf(smallest):
            raise ValueError(
                f"min_batch_size={min_batch_size} and max_batch_size={max_batch_size} leave no size: "
                "pass bounds of at least 1 sample, the smaller one first."
            )
        self._bounds = (float(smallest), float(largest))

    def bounded(self, batch_size: float, present: int) -> float:
        """Returns ``batch_size``, or the bound that it passes."""
        smallest, largest = self._bounds
        return min(max(batch_size, smallest), largest)


class OnlyGrow(Around):
    """The proposals of a policy, the present size where they are smaller.

    Args:
        policy: a name, a policy or a function.
    """

    def bounded(self, batch_size: float, present: int) -> float:
        """Returns the larger of ``batch_size`` and the present one."""
        return max(batch_size, float(present))


class Among(Combined):
    """A policy that takes each proposal from one of several, which is also the one that answers for it.

    Attributes:
        members: the policies.
        chosen: the one whose proposal the last one was.
        auto_lr_scaling: the rule that those who name one agree on, ``"none"`` where they do not; absent without any.
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
        rules = {member.auto_lr_scaling for member in self.members if hasattr(member, "auto_lr_scaling")}
        if rules:
            self.auto_lr_scaling: str = rules.pop() if len(rules) == 1 else "none"
        self.chosen = self.members[0]
        self._proposed = math.nan

    def reason(self, measurement: Measurement, batch_size: int) -> str:
        """The reason of the policy whose proposal it was."""
        words = _words.reason(self.chosen, measurement, batch_size, self._proposed)
        name = _words.name(self.chosen)
        return words if words.startswith(f"{name} ") else f"{name}: {words}"

    def constant_size(self, reference_batch_size: int) -> float | None:
        """Returns the one that all members propose."""
        sizes = {constant_size(member, reference_batch_size) for member in self._all}
        return sizes.pop() if len(sizes) == 1 else None

    @property
    def _all(self) -> tuple[Policy, ...]:
        """Whoever may be chosen."""
        return self.members

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
        self._fixed: list[float] = []  # proposals of the others that need no evidence

    def propose_with(self, measurement: Measurement, answer: Answer) -> float:
        """Returns the extreme proposal; those that are not finite do not count."""
        proposals = [answer(member, measurement) for member in self.members]
        finite = [(self.sign * size, -i) for i, size in enumerate(proposals) if math.isfinite(size)]
        index = -max(finite)[1] if finite else 0
        self.chosen = self.members[index]
        self._proposed = proposals[index]
        self._fixed = [proposals[-i] for _, i in finite if -i != index and not is_measured(self.members[-i])]
        return proposals[index]

    def bounded(self, batch_size: float, present: int) -> float:
        """Returns the extreme of ``batch_size`` and what the others want that need no evidence."""
        return self.sign * max(self.sign * size for size in (batch_size, *self._fixed))


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
        check_mapping("stages", stages)
        for start in stages:
            check_start(start, unit, "Sequential")
        ordered = sorted(stages.items(), key=lambda stage: stage[0])
        super().__init__([policy for _, policy in ordered])
        self._starts = [start for start, _ in ordered]
        self._before = Constant()
        self.chosen = self._at(0)

    def _at(self, position: float) -> Policy:
        turn = sum(start <= position for start in self._starts)
        return self.members[turn - 1] if turn else self._before

    def propose_with(self, measurement: Measurement, answer: Answer) -> float:
        """Returns the proposal of the policy whose turn it is; the reference size before the first one's."""
        self.chosen = self._at(position(measurement, self.unit))
        self._proposed = answer(self.chosen, measurement)
        return self._proposed

    @property
    def _all(self) -> tuple[Policy, ...]:
        return (*self.members, self._before)

    def bounded(self, batch_size: float, present: int) -> float:
        """Returns ``batch_size``: it is the chosen policy's turn."""
        return batch_size
