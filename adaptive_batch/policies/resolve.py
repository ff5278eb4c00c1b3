"""From a name, an object or a function to a policy."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from difflib import get_close_matches
from typing import Any, Protocol, runtime_checkable

from adaptive_batch.measurement import Measurement
from adaptive_batch.policies.big_batch import BigBatch
from adaptive_batch.policies.cabs import CABS
from adaptive_batch.policies.constant import Constant
from adaptive_batch.policies.decay import DontDecay, Seesaw
from adaptive_batch.policies.goodput import Goodput
from adaptive_batch.policies.gradient_diversity import GradientDiversity
from adaptive_batch.policies.growth import GeometricGrowth
from adaptive_batch.policies.inner_product_test import InnerProductTest
from adaptive_batch.policies.loss_proportional import LossProportional
from adaptive_batch.policies.noise_scale import NoiseScale
from adaptive_batch.policies.norm_test import NormTest
from adaptive_batch.policies.plateau import Plateau

__all__ = ["FunctionPolicy", "Policy", "resolve_policy"]


@runtime_checkable
class Policy(Protocol):
    """A policy: one method.

    More is optional:

    - ``needs: frozenset[str]`` names the statistics to measure; what nobody needs is not measured, and is NaN or
      None in the measurement. ``"noise"`` is the noise scale, NaN before it is identified, when a built-in policy
      decides nothing; ``"variance"`` is measured alike, for policies that get on without ``|G|^2``;
      ``"inner_products"`` is the variance of the samples' inner products with the gradient; ``"step_time"`` the model
      of an update's time.
    - ``reason(measurement, batch_size) -> str`` says in words why that size.
    - ``state_dict()`` and ``load_state_dict(state)``, plain numbers, where it has a memory.
    - ``lr_factor(batch_size, reference_batch_size, lr) -> float``, the factor on the scheduled learning rate of
      an update, where the rate is the policy's own business: no scaling rule is combined with it then.
    - ``is_test: bool``, whether a larger proposal says that the present size fails a test, so that with quantised sizes
      one step follows however little larger it is.
    - ``auto_lr_scaling: str``, the rule that ``lr_scaling="auto"`` means for it.
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
        self.needs: frozenset[str] = frozenset(_a_set(function, getattr(function, "needs", ())))
        self._function = function

    def propose(self, measurement: Measurement) -> float:
        """Returns what the function returns."""
        return self._function(measurement)


_STATISTICS = ("noise", "variance", "inner_products", "step_time")

_BY_NAME: dict[str, Callable[[], Policy]] = {
    cls.name: cls
    for cls in (
        BigBatch,
        CABS,
        Constant,
        DontDecay,
        GeometricGrowth,
        Goodput,
        GradientDiversity,
        InnerProductTest,
        LossProportional,
        NoiseScale,
        NormTest,
        Plateau,
        Seesaw,
    )
}
_WITH_ARGUMENTS = {
    "clamp": "Clamp",
    "critical_batch_warmup": "CriticalBatchWarmup",
    "linear_ramp": "LinearRamp",
    "max": "Max",
    "milestones": "Milestones",
    "min": "Min",
    "only_grow": "OnlyGrow",
    "sequential": "Sequential",
}


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
    if not _takes_a_measurement(found.propose if found is policy else policy):
        raise TypeError(
            f"policy={policy!r} cannot be asked: let its function or propose take one argument, a measurement."
        )
    unknown = sorted(set(_a_set(policy, getattr(found, "needs", ()))).difference(_STATISTICS))
    if unknown:
        *most, last = _STATISTICS
        raise ValueError(
            f"policy={policy!r} needs {unknown}, which nothing measures: its needs can be {', '.join(most)} and {last}."
        )
    return found


def _takes_a_measurement(function: Any) -> bool:
    if not callable(function):
        return False
    try:
        inspect.signature(function).bind(Measurement())
    except TypeError:
        return False
    except ValueError:
        return True  # of a built-in function nobody knows what it takes
    return True


def _a_set(policy: object, needs: Any) -> Any:
    """``needs``; a string would be taken for the set of its letters."""
    if isinstance(needs, str):
        raise TypeError(f"policy={policy!r} has needs={needs!r}: make it a set, {{{needs!r}}}.")
    return needs


def _named(name: str) -> Policy:
    if name in _WITH_ARGUMENTS:
        raise ValueError(
            f"policy={name!r} needs arguments: pass {_WITH_ARGUMENTS[name]}(...) of adaptive_batch.policies."
        )
    if name not in _BY_NAME:
        known = sorted({*_BY_NAME, *_WITH_ARGUMENTS})
        alike = get_close_matches(name, known, 1)
        first = f"{alike[0]!r}, or another" if alike else "one"
        raise ValueError(f"policy={name!r} is not a known policy: use {first} of {', '.join(known)}.")
    return _BY_NAME[name]()
