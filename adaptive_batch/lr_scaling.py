"""What learning rate for a batch size: rules that turn ``k = B / B0`` into a factor on the scheduled rate.

Each rule is pure: ``factor(batch_size, reference_batch_size, noise_scale)`` depends on its arguments
only and is exactly 1 at the reference batch size. What else of an optimizer should follow the size (decay
rates of moments, weight decay) is an option of every rule, and off unless asked for.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any, Protocol, SupportsFloat

from torch import Tensor

from adaptive_batch.ages import Age, corrects_bias

if TYPE_CHECKING:
    from torch.optim import Optimizer

__all__ = [
    "AdaScale",
    "AdamScale",
    "HeavyBallScaling",
    "LRScaling",
    "LinearScaling",
    "NoScaling",
    "SDEScaling",
    "SqrtScaling",
    "gain",
    "has_lr",
    "resolve_lr_scaling",
    "scaled_lr",
    "scheduled_lr",
    "why_not_scaled",
]


class LRScaling(Protocol):
    """A learning-rate rule: one method.

    More is optional:

    - ``needs: frozenset[str]`` names the statistics that it uses, out of ``{"noise"}``; what is not needed is not
      measured, and ``noise_scale`` is then NaN.
    - ``group_values(group, scale, factor) -> dict`` gives what other entries a parameter group should have for
      an update of ``scale`` times the reference size; it is put back after the update. An ``lr`` among them stands for
      the whole rate, ``factor`` included.
    - ``age: Age``, where the rule has it, is set to that of the group before.
    - ``rewarm: int``, updates over which the rate rises to its new value after the size has grown.
    - ``check(optimizer, scale)`` raises a ValueError where the rule has no meaning up to that scale.
    """

    def factor(self, batch_size: float, reference_batch_size: float, noise_scale: float = math.nan) -> float:
        """Returns the factor on the scheduled learning rate for an update of ``batch_size`` samples."""


def gain(batch_size: float, reference_batch_size: float, noise_scale: float) -> float:
    """What an update at ``B`` is worth in updates at ``B0``.

    ``r = (1 + phi / B0) / (1 + phi / B)``, from ``B / B0`` (``phi`` infinite: noise is all there is)
    to 1 (``phi = 0``: more samples tell nothing new). Johnson, Agrawal, Gu, Guestrin, *AdaScale SGD*,
    ICML 2020, arXiv:2007.05105, with ``S0 = tr(Sigma) / B0`` and ``phi = tr(Sigma) / |G|^2`` put into
    its ``(S0 + |G|^2) / (S0 / k + |G|^2)``, ``k = B / B0``.

    Args:
        batch_size: ``B`` in samples.
        reference_batch_size: ``B0`` in samples.
        noise_scale: ``phi`` in samples; NaN (not identified) gives 1.

    Returns:
        ``r`` in reference updates, exactly 1 at ``B == B0``; below 1 for ``B < B0``.

    Raises:
        ValueError: a size is not positive and finite, or the noise scale is negative.
    """
    k = _scale(batch_size, reference_batch_size)
    if noise_scale < 0:
        raise ValueError(f"noise_scale={noise_scale} is negative: pass NaN where it is not identified.")
    if math.isnan(noise_scale):
        return 1.0
    if math.isinf(noise_scale):
        return k
    return (1 + noise_scale / reference_batch_size) / (1 + noise_scale / batch_size)


class _Rule:
    """What every rule can do besides: options, all off by default.

    Args:
        betas: ``"half_life"`` sets ``beta2`` (RMSprop's ``alpha``) to ``beta2^k``, so that the second moments forget
            over the same number of samples; always in (0, 1). Marek, Lotfi, Somasundaram, Wilson, Goldblum,
            NeurIPS 2025, arXiv:2507.07101. ``beta1`` stays. Adam, AdamW and NAdam correct the bias of their second
            moments as if all updates had had the present ``beta2``; the rate puts that right. None leaves both alone.
        weight_decay: ``"timescale"`` multiplies a weight decay that is not marked as coupled by ``k / factor``, so that
            ``B / (lr wd)`` samples stay its timescale: by ``sqrt(k)`` under the square-root rule, by 1 under the
            linear one. Bergsma et al. 2025, arXiv:2505.13738. None leaves it alone.
        rewarm: updates over which the factor rises linearly to that of a larger size, from that of the size before.

    Raises:
        ValueError: an option that does not exist, or a negative or fractional ``rewarm``.
    """

    name: str
    needs: frozenset[str] = frozenset()
    _BETAS: tuple[str | None, ...] = (None, "half_life")

    def __init__(self, *, betas: str | None = None, weight_decay: str | None = None, rewarm: int = 0) -> None:
        for name, value, known in (
            ("betas", betas, self._BETAS),
            ("weight_decay", weight_decay, (None, "timescale")),
        ):
            if value not in known:
                raise ValueError(f"{name}={value!r} is not known: use one of {', '.join(map(repr, known))}.")
        if not isinstance(rewarm, int) or isinstance(rewarm, bool) or rewarm < 0:
            raise ValueError(f"rewarm={rewarm!r} is no number of updates: pass a whole number from 0 on.")
        self.betas = betas
        self.weight_decay = weight_decay
        self.rewarm = rewarm
        self.age = Age(0, 0.0)

    def group_values(self, group: Mapping[str, Any], scale: float, factor: float) -> dict[str, Any]:
        """What the options give this parameter group for an update of ``scale`` times the reference size.

        Args:
            group: of the optimizer, with the values that the user set.
            scale: ``k = B / B0``.
            factor: that of the learning rate.
        """
        values: dict[str, Any] = {}
        correction: Any = 1.0
        if self.betas == "half_life":
            values |= _with_decays(group, keep=lambda beta: beta, forget=lambda beta: beta**scale)
            correction = _bias_correction(group["betas"][1], scale, self.age) if corrects_bias(group) else 1.0
        if correction != 1:
            values["lr"] = group["lr"] * factor * correction
        decay = group.get("weight_decay")
        if decay and group.get("decoupled_weight_decay", True):
            kept = decay * scale / factor if self.weight_decay and factor else decay
            if kept is not decay or correction != 1:  # the correction is of the moments, which decay has no part in
                values["weight_decay"] = kept / correction
        return values


class NoScaling(_Rule):
    """Leaves the learning rate as scheduled: factor 1.

    For policies that trade the batch size against the learning rate themselves, and for optimizers that
    search their own step length.
    """

    name = "none"

    def factor(self, batch_size: float, reference_batch_size: float, noise_scale: float = math.nan) -> float:
        """Returns 1."""
        _scale(batch_size, reference_batch_size)
        return 1.0


class LinearScaling(_Rule):
    """The linear rule: factor ``B / B0``.

    Goyal et al., *Accurate, Large Minibatch SGD*, 2017, arXiv:1706.02677. For SGD while ``B`` is well
    below the noise scale; too much beyond it.
    """

    name = "linear"

    def factor(self, batch_size: float, reference_batch_size: float, noise_scale: float = math.nan) -> float:
        """Returns ``B / B0``."""
        return _scale(batch_size, reference_batch_size)


class SqrtScaling(_Rule):
    """The square-root rule: factor ``sqrt(B / B0)``.

    Krizhevsky, *One weird trick for parallelizing convolutional neural networks*, 2014, arXiv:1404.5997.
    It keeps the variance of an SGD update; a safe choice for Adam and its relatives.
    """

    name = "sqrt"

    def factor(self, batch_size: float, reference_batch_size: float, noise_scale: float = math.nan) -> float:
        """Returns ``sqrt(B / B0)``."""
        return math.sqrt(_scale(batch_size, reference_batch_size))


class AdaScale(_Rule):
    """AdaScale: factor ``r``, the :func:`gain` of the update.

    Johnson, Agrawal, Gu, Guestrin, *AdaScale SGD*, ICML 2020, arXiv:2007.05105. With it an update at
    ``B`` has the drift and the mean square length of ``r`` updates at ``B0``: linear scaling where noise
    dominates, none where the gradient is already accurate. For SGD, momentum unchanged.
    """

    name = "adascale"
    needs: frozenset[str] = frozenset({"noise"})

    def factor(self, batch_size: float, reference_batch_size: float, noise_scale: float = math.nan) -> float:
        """Returns ``(1 + phi / B0) / (1 + phi / B)``; 1 while the noise scale is NaN."""
        return gain(batch_size, reference_batch_size, noise_scale)


class HeavyBallScaling(_Rule):
    """AdaScale for SGD with momentum ``m``, linear as far as noise and momentum allow.

    The factor is ``max(r, min(k, s, 1 + phi / B0))``, ``k = B / B0`` and ``r`` AdaScale's :func:`gain`.

    Linear scaling keeps the path of SGD while its steps are short beside the curvature ``h``. A step comes to
    ``lr / (1 - m)``, which for plain SGD has to stay below ``2 / h``, and with momentum below ``2 s / h``,
    ``s = (1 + m) / (1 - m)``, 19 for ``m = 0.9``; with Nesterov's momentum ``s = (1 + m) / (1 - m) / (1 + 2 m)``, 6.8.
    A rate that suits a small batch is held down by noise, by up to ``1 + phi / B0`` times (McCandlish et al. 2018,
    arXiv:1812.06162, equation 2.6), so there is as much room for the linear rule; growth beyond it is left to AdaScale.
    Without momentum this is AdaScale, and before there is a noise scale the factor is 1, as AdaScale's.

    Source of the bound: Polyak, *Some methods of speeding up the convergence of iteration methods*, 1964, on a
    quadratic. The combination is this project's own; what it is worth is in ``docs/benchmarks.md``.

    Args:
        momentum: ``m`` of the optimizer, at least 0 and below 1; or a function that gives the present one, which a
            schedule may move.
        nesterov: whether it is Nesterov's.
        options: those of the other rules.

    Raises:
        ValueError: a momentum out of its range, or an option that does not exist.
    """

    name = "heavy ball"
    needs: frozenset[str] = frozenset({"noise"})

    def __init__(self, momentum: float | Callable[[], float], *, nesterov: bool = False, **options: Any) -> None:
        super().__init__(**options)
        self._momentum = momentum
        self.nesterov = nesterov
        if not isinstance(self.momentum, SupportsFloat) or not 0 <= self.momentum < 1:
            raise ValueError(
                f"momentum={self.momentum!r} cannot be a heavy ball's: pass the optimizer's, from 0 to below 1."
            )

    @property
    def momentum(self) -> float:
        """``m`` of the optimizer."""
        return self._momentum() if callable(self._momentum) else self._momentum

    @property
    def stable(self) -> float:
        """``s``: how many times as far as plain SGD's a step may go."""
        m = self.momentum
        return (1 + m) / (1 - m) / (1 + 2 * m if self.nesterov else 1)

    def factor(self, batch_size: float, reference_batch_size: float, noise_scale: float = math.nan) -> float:
        """Returns ``max(r, min(B / B0, s, 1 + phi / B0))``; 1 while the noise scale is NaN."""
        r = gain(batch_size, reference_batch_size, noise_scale)
        if math.isnan(noise_scale):
            return r
        return max(r, min(batch_size / reference_batch_size, self.stable, 1 + noise_scale / reference_batch_size))


class AdamScale(_Rule):
    """AdaScale for Adam and its relatives: factor ``sqrt(r)``, ``r`` the :func:`gain`.

    Qiao et al., *Pollux*, OSDI 2021, arXiv:2008.12260, in the form of its implementation AdaptDL.
    """

    name = "adamscale"
    needs: frozenset[str] = frozenset({"noise"})

    def factor(self, batch_size: float, reference_batch_size: float, noise_scale: float = math.nan) -> float:
        """Returns ``sqrt((1 + phi / B0) / (1 + phi / B))``; 1 while the noise scale is NaN."""
        return math.sqrt(gain(batch_size, reference_batch_size, noise_scale))


class SDEScaling(_Rule):
    """The square-root rule for all of Adam's or RMSprop's hyperparameters.

    ::

        lr sqrt(k)      beta -> 1 - k (1 - beta)      eps / sqrt(k)

    for both betas (RMSprop's ``alpha``); then training follows the same stochastic differential equation at either
    size. Malladi, Lyu, Panigrahi, Arora, *On the SDEs and scaling rules for adaptive gradient algorithms*, NeurIPS
    2022, arXiv:2205.10287. It holds for ``k (1 - beta) < 1`` only: with ``beta1 = 0.9`` for less than ten times the
    reference size. At the start of a fit it is refused for a ``max_batch_size`` beyond that; where no maximum is
    known, a beta does not go below 0.

    Args:
        betas: ``"sde"``, or ``"half_life"`` for ``beta2^k`` in its place, which knows no such bound, or None.
        weight_decay: ``"timescale"`` holds that of a decoupled weight decay.
        rewarm: updates over which the rate rises after the size has grown.

    Raises:
        ValueError: an option that does not exist.
    """

    name = "sde"
    _BETAS = (None, "half_life", "sde")

    def __init__(self, *, betas: str | None = "sde", weight_decay: str | None = None, rewarm: int = 0) -> None:
        super().__init__(betas=betas, weight_decay=weight_decay, rewarm=rewarm)

    def factor(self, batch_size: float, reference_batch_size: float, noise_scale: float = math.nan) -> float:
        """Returns ``sqrt(B / B0)``."""
        return math.sqrt(_scale(batch_size, reference_batch_size))

    def group_values(self, group: Mapping[str, Any], scale: float, factor: float) -> dict[str, Any]:
        """Betas, ``eps`` and what the options add; see :meth:`_Rule.group_values`."""
        values = super().group_values(group, scale, factor)
        if self.betas == "sde":
            values |= _with_decays(group, keep=lambda beta: _sde(beta, scale), forget=lambda beta: _sde(beta, scale))
        if _decays(group) and isinstance(group.get("eps"), float):
            values["eps"] = group["eps"] / math.sqrt(scale)
        return values

    def check(self, optimizer: Optimizer, scale: float) -> None:
        """Refuse a largest size that would take a beta out of (0, 1).

        Args:
            optimizer: whose parameter groups count.
            scale: the largest ``k``.

        Raises:
            ValueError: for the first beta that it would.
        """
        if self.betas != "sde":
            return
        for beta in (float(beta) for group in optimizer.param_groups for beta in _least_decays(group)):
            if 0 < beta < 1 and scale * (1 - beta) >= 1 - _ROUNDING:
                raise ValueError(
                    f'lr_scaling="sde" would set beta={beta:g} to {1 - scale * (1 - beta):.3g} at the '
                    f"largest size, {scale:g} times the reference size, and holds below {1 / (1 - beta):.4g} times "
                    'only: pass a lower max_batch_size, or use SDEScaling(betas="half_life").'
                )


def _decays(group: Mapping[str, Any]) -> tuple[Any, ...]:
    """The decay rates of a group's moments: Adam's betas, RMSprop's ``alpha``."""
    if "betas" in group:
        return tuple(group["betas"])
    return (group["alpha"],) if "alpha" in group and "centered" in group else ()  # ASGD's alpha is something else


def _bias_correction(beta: Any, scale: float, age: Age) -> Any:
    """What the root of the second moments is to be divided by, over what the optimizer divides it by.

    With ``beta^k`` at each update the moments hold ``1 - beta^n`` of all weight, ``n`` the sum of all ``k``; the
    optimizer takes ``1 - beta^(k t)`` for it.
    """
    if not 0 < beta < 1:
        return 1.0
    held = 1 - beta ** (age.reference_updates + scale)
    taken = 1 - beta ** (scale * (age.updates + 1))
    return (held / taken) ** 0.5


def _least_decays(group: Mapping[str, Any]) -> tuple[Any, ...]:
    """The same, as low as a schedule that cycles the momentum (``OneCycleLR``) takes the first."""
    first, *others = _decays(group) or (None,)
    lowest = group.get("base_momentum")
    return tuple(others) if first is None else (first if lowest is None else min(first, lowest), *others)


def _with_decays(
    group: Mapping[str, Any], *, keep: Callable[[Any], Any], forget: Callable[[Any], Any]
) -> dict[str, Any]:
    """New decay rates: ``keep`` of the first moment's, ``forget`` of the second one's."""
    if "betas" in group:
        first, *others = group["betas"]
        return {"betas": (keep(first), *map(forget, others))}
    return {"alpha": forget(group["alpha"])} if _decays(group) else {}


def _sde(beta: Any, scale: float) -> Any:
    """``1 - k (1 - beta)``, not below 0; a moment that is no average stays none."""
    return max(0.0, 1 - scale * (1 - beta)) if beta > 0 else beta


_RULES: dict[str, Callable[[], LRScaling]] = {
    rule.name: rule for rule in (NoScaling, LinearScaling, SqrtScaling, AdaScale, AdamScale, SDEScaling)
}

_ROUNDING = 1e-9

# What "auto" means, by a part of the name of the optimizer's class or of a class that it inherits from.
# First match wins; optimizers of other packages are found without importing these.
_AUTO: tuple[tuple[tuple[str, ...], Callable[[], LRScaling]], ...] = (
    (
        (
            *("adam", "adagrad", "adadelta", "adafactor", "adabelief", "adan", "ademamix", "rmsprop", "rprop", "yogi"),
            *("lamb", "lion", "muon", "shampoo", "soap", "sophia", "novograd", "prodigy", "signsgd", "signum"),
        ),
        SqrtScaling,
    ),
    (("sgd",), AdaScale),  # without momentum
    (("",), AdamScale),  # below AdaScale, for what applies the gradient as it is, and below the square root
)


def resolve_lr_scaling(
    rule: str | LRScaling, optimizer: Optimizer | None = None, policy: object | None = None
) -> LRScaling:
    """Returns the rule meant by a name, or the rule itself.

    A policy that sets the learning rate together with the batch size (it has an ``lr_factor``) goes with no rule:
    ``"auto"`` is :class:`NoScaling` then. One in which the batch grows in place of a decay names what ``"auto"``
    means for it (``auto_lr_scaling``).

    Args:
        rule: an object with ``factor``, or ``"none"``, ``"linear"``, ``"sqrt"``, ``"adascale"``,
            ``"adamscale"``, ``"sde"`` or ``"auto"``. Auto picks by the policy, and otherwise by the optimizer:
            :class:`SqrtScaling` for adaptive ones, for Adam, AdamW and NAdam with half-life betas, :class:`NoScaling`
            for LBFGS and for those without a rate, :class:`HeavyBallScaling` for SGD with momentum,
            :class:`AdaScale` for other SGD, and for any other optimizer :class:`AdamScale`, which is below both.
        optimizer: what ``"auto"`` looks at.
        policy: what the rule has to go with.

    Raises:
        ValueError: an unknown name, ``"auto"`` without an optimizer, or a rule beside a policy that sets the learning
            rate itself.
        TypeError: neither a name nor a rule.
    """
    owns_lr = hasattr(policy, "lr_factor")
    if rule == "auto":
        if owns_lr:
            return NoScaling()
        if hasattr(policy, "auto_lr_scaling"):
            return resolve_lr_scaling(policy.auto_lr_scaling)
        if optimizer is None:
            raise ValueError(
                'lr_scaling="auto" picks by the optimizer, which is not known here: name a rule, or give an optimizer.'
            )
        return _auto_rule(optimizer)
    found = _found(rule)
    if owns_lr and not isinstance(found, NoScaling):
        raise ValueError(
            f"policy={_name_of(policy)} sets the learning rate together with the batch size, and "
            f'lr_scaling={_name_of(found)} would scale it once more: leave lr_scaling at "auto" or "none".'
        )
    return found


def _found(rule: str | LRScaling) -> LRScaling:
    if isinstance(rule, str):
        if rule not in _RULES:
            known = ", ".join([*_RULES, "auto"])
            raise ValueError(f"lr_scaling={rule!r} is not a known rule: use one of {known}.")
        return _RULES[rule]()
    if isinstance(rule, type) or not callable(getattr(rule, "factor", None)):
        raise TypeError(f"lr_scaling={rule!r} is not a rule: pass a name or an object with a factor method.")
    return rule


def _name_of(thing: object) -> str:
    return repr(getattr(thing, "name", type(thing).__name__))


GroupValues = Callable[[Mapping[str, Any]], Mapping[str, Any]]
"""``group -> entries that it should have``."""


class Scaled:
    """Parameter groups whose values are others for a while.

    Attributes:
        own: for each group, its own values of what is different in it.
    """

    def __init__(self, optimizer: Optimizer, factor: float, values: GroupValues | None) -> None:
        changes = factor != 1.0 or values is not None
        self._groups = list(optimizer.param_groups) if changes else []
        self._factor, self._values = factor, values
        self._set = [_changes(group, factor, values) for group in self._groups]
        self.own = [
            {name: _copy(group[name]) for name in change} for group, change in zip(self._groups, self._set, strict=True)
        ]
        for group, change in zip(self._groups, self._set, strict=True):
            _write(group, change)
        self._written = [_version(group) for group in self._groups]

    def take_over(self) -> None:
        """A rate that has been set since is the group's own, and scaled like it."""
        for index, (group, change) in enumerate(zip(self._groups, self._set, strict=True)):
            if "lr" not in change or not self._set_since(index):
                continue
            lr = _copy(group["lr"])
            _write(group, {**self.own[index], "lr": lr})
            self._set[index] = _changes(group, self._factor, self._values)
            self.own[index]["lr"] = lr
            _write(group, self._set[index])
            self._written[index] = _version(group)

    def _set_since(self, index: int) -> bool:
        """Whether a group's rate is no longer what was written; of a tensor that is told without reading it."""
        group = self._groups[index]
        if isinstance(group["lr"], Tensor):
            return _version(group) != self._written[index]
        return bool(group["lr"] != self._set[index]["lr"])

    def put_back(self) -> None:
        """The groups have their own values again, exactly."""
        for group, own in zip(self._groups, self.own, strict=True):
            _write(group, own)


@contextmanager
def scaled_lr(optimizer: Optimizer, factor: float, values: GroupValues | None = None) -> Iterator[Scaled]:
    """The learning rates times ``factor``, put back exactly however the block ends.

    Args:
        optimizer: whose parameter groups are meant; those without ``lr`` keep what they have instead of it.
        factor: on each group's rate.
        values: gives other entries of a group that are to hold inside the block.

    Yields:
        What holds inside the block, and what the groups have of their own.
    """
    scaled = Scaled(optimizer, factor, values)
    try:
        yield scaled
    finally:
        scaled.put_back()


def scheduled_lr(optimizer: Optimizer) -> float:
    """The first group's rate; NaN where it has none."""
    lr = optimizer.param_groups[0].get("lr")
    return math.nan if lr is None else float(lr)


def has_lr(optimizer: Optimizer) -> bool:
    """Whether any parameter group has a rate to scale."""
    return any(group.get("lr") is not None for group in optimizer.param_groups)


def _changes(group: Mapping[str, Any], factor: float, values: GroupValues | None) -> dict[str, Any]:
    change = {} if values is None else dict(values(group))
    if factor != 1.0 and group.get("lr") is not None:
        change.setdefault("lr", group["lr"] * factor)
    return change


def _version(group: Mapping[str, Any]) -> tuple[int, int] | None:
    """Which tensor a group's rate is, and how often it was written to."""
    lr = group.get("lr")
    return (id(lr), lr._version) if isinstance(lr, Tensor) else None


def _copy(value: Any) -> Any:
    return value.clone() if isinstance(value, Tensor) else value


def _write(group: dict[str, Any], values: Mapping[str, Any]) -> None:
    for name, value in values.items():
        if isinstance(group[name], Tensor):
            group[name].detach().copy_(value)  # in place: a captured graph holds on to this tensor
        else:
            group[name] = value


def _least_momentum(optimizer: Optimizer) -> float:
    return min(float(group["momentum"]) for group in optimizer.param_groups)


def why_not_scaled(optimizer: Optimizer) -> str | None:
    """Why no rule goes with an optimizer, in words; ``None`` where one may."""
    name = type(optimizer).__name__
    if not has_lr(optimizer):
        return f"{name} has no lr in its parameter groups"
    if any("lbfgs" in kind for kind in _kinds(optimizer)):
        return f"{name} searches the length of its steps by itself"
    return None


def _kinds(optimizer: Optimizer) -> list[str]:
    return [cls.__name__.lower() for cls in type(optimizer).__mro__]


def _auto_rule(optimizer: Optimizer) -> LRScaling:
    if why_not_scaled(optimizer) is not None:
        return NoScaling()
    names = _kinds(optimizer)
    groups = optimizer.param_groups
    if "sgd" in names and all(0 < float(group.get("momentum", 0.0)) < 1 for group in groups):
        nesterov = any(group.get("nesterov", False) for group in groups)
        return HeavyBallScaling(partial(_least_momentum, optimizer), nesterov=nesterov)
    rule = next(rule for parts, rule in _AUTO if any(part in name for part in parts for name in names))
    # Elsewhere the second beta may be that of something else than second moments.
    return SqrtScaling(betas="half_life") if rule is SqrtScaling and all(map(corrects_bias, groups)) else rule()


def _scale(batch_size: float, reference_batch_size: float) -> float:
    """``B / B0``, both checked."""
    for name, value in (("batch_size", batch_size), ("reference_batch_size", reference_batch_size)):
        if not 0 < value < math.inf:
            raise ValueError(f"{name}={value} is not a size: pass a positive number of samples.")
    return batch_size / reference_batch_size
