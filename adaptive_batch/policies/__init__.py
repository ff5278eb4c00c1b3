"""What batch size next: one small class per published rule, one file each.

A policy turns a :class:`~adaptive_batch.measurement.Measurement` into a global batch size. It only says
what its formula says; rounding, clamping, evidence and hysteresis are the controller's.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol, runtime_checkable

from adaptive_batch.measurement import Measurement
from adaptive_batch.policies.constant import Constant
from adaptive_batch.policies.goodput import Goodput
from adaptive_batch.policies.milestones import Milestones
from adaptive_batch.policies.noise_scale import NoiseScale

__all__ = [
    "Constant",
    "FunctionPolicy",
    "Goodput",
    "Milestones",
    "NoiseScale",
    "Policy",
    "is_measured",
    "resolve_policy",
]


@runtime_checkable
class Policy(Protocol):
    """A policy: one method.

    More is optional: ``needs: frozenset[str]`` names the statistics to measure, out of ``"noise"`` and
    ``"step_time"`` (what nobody needs is not measured, and is NaN or None in the measurement);
    ``reason(measurement, batch_size) -> str`` says in words why that size; a policy with memory has
    ``state_dict()`` and ``load_state_dict(state)``.
    """

    def propose(self, measurement: Measurement) -> float:
        """Returns the global batch size in samples, not yet rounded or clamped."""


class FunctionPolicy:
    """A plain function of a measurement as a policy.

    Args:
        function: takes a measurement, returns a global batch size in samples. Its attribute ``needs``,
            if it has one, names the statistics to measure for it.
    """

    def __init__(self, function: Callable[[Measurement], float]) -> None:
        self.name: str = getattr(function, "__name__", type(function).__name__)
        self.needs: frozenset[str] = frozenset(getattr(function, "needs", ()))
        self._function = function

    def propose(self, measurement: Measurement) -> float:
        """Returns what the function returns."""
        return self._function(measurement)


_STATISTICS = frozenset({"noise", "step_time"})

_BY_NAME: dict[str, Callable[[], Policy]] = {cls.name: cls for cls in (Constant, Goodput, NoiseScale)}
_WITH_ARGUMENTS = {cls.name: cls for cls in (Milestones,)}

_MEASURED = (Goodput, NoiseScale)


def is_measured(policy: Policy) -> bool:
    """Whether this is a built-in policy that follows noisy measurements: its changes need evidence."""
    return isinstance(policy, _MEASURED)


def resolve_policy(policy: str | Policy | Callable[[Measurement], float]) -> Policy:
    """Returns the policy meant by a name, an object with ``propose`` or a function of a measurement.

    Raises:
        ValueError: an unknown name, or a policy that needs statistics that do not exist.
        TypeError: none of the three.
    """
    if isinstance(policy, str):
        return _named(policy)
    if isinstance(policy, type):
        raise TypeError(f"policy={policy.__name__} is a class: pass an instance of it.")
    if isinstance(policy, Policy):
        found = policy
    elif callable(policy):
        found = FunctionPolicy(policy)
    else:
        raise TypeError(
            f"policy={policy!r} is not a policy: pass a name, an object with a propose method, or a function."
        )
    unknown = sorted(set(getattr(found, "needs", ())) - _STATISTICS)
    if unknown:
        raise ValueError(
            f"policy={policy!r} needs {unknown}, which nothing measures: "
            f"its needs can be {' and '.join(sorted(_STATISTICS))}."
        )
    return found


def _named(name: str) -> Policy:
    if name in _WITH_ARGUMENTS:
        raise ValueError(f"policy={name!r} needs arguments: pass {_WITH_ARGUMENTS[name].__name__}(...) itself.")
    if name not in _BY_NAME:
        raise ValueError(f"policy={name!r} is not a known policy: use one of {', '.join(sorted(_BY_NAME))}.")
    return _BY_NAME[name]()
