"""What learning rate for a batch size: rules that turn ``B / B0`` into a factor on the scheduled rate.

Each rule is pure: ``factor(batch_size, reference_batch_size, noise_scale)`` depends on its arguments
only and is exactly 1 at the reference batch size.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Protocol

from torch import Tensor

if TYPE_CHECKING:
    from torch.optim import Optimizer

__all__ = [
    "AdaScale",
    "AdamScale",
    "LRScaling",
    "LinearScaling",
    "NoScaling",
    "SqrtScaling",
    "gain",
    "resolve_lr_scaling",
    "scaled_lr",
]


class LRScaling(Protocol):
    """A learning-rate rule: one method.

    A rule may name the statistics it needs in a class attribute ``needs: frozenset[str]`` out of
    ``{"noise"}``; what is not needed is not measured, and ``noise_scale`` is then NaN.
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


class NoScaling:
    """Leaves the learning rate as scheduled: factor 1.

    For policies that trade the batch size against the learning rate themselves, and for optimizers that
    search their own step length.
    """

    name = "none"
    needs: frozenset[str] = frozenset()

    def factor(self, batch_size: float, reference_batch_size: float, noise_scale: float = math.nan) -> float:
        """Returns 1."""
        _scale(batch_size, reference_batch_size)
        return 1.0


class LinearScaling:
    """The linear rule: factor ``B / B0``.

    Goyal et al., *Accurate, Large Minibatch SGD*, 2017, arXiv:1706.02677. For SGD while ``B`` is well
    below the noise scale; too much beyond it.
    """

    name = "linear"
    needs: frozenset[str] = frozenset()

    def factor(self, batch_size: float, reference_batch_size: float, noise_scale: float = math.nan) -> float:
        """Returns ``B / B0``."""
        return _scale(batch_size, reference_batch_size)


class SqrtScaling:
    """The square-root rule: factor ``sqrt(B / B0)``.

    Krizhevsky, *One weird trick for parallelizing convolutional neural networks*, 2014, arXiv:1404.5997.
    It keeps the variance of an SGD update; a safe choice for Adam and its relatives.
    """

    name = "sqrt"
    needs: frozenset[str] = frozenset()

    def factor(self, batch_size: float, reference_batch_size: float, noise_scale: float = math.nan) -> float:
        """Returns ``sqrt(B / B0)``."""
        return math.sqrt(_scale(batch_size, reference_batch_size))


class AdaScale:
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


class AdamScale:
    """AdaScale for Adam and its relatives: factor ``sqrt(r)``, ``r`` the :func:`gain`.

    Qiao et al., *Pollux*, OSDI 2021, arXiv:2008.12260, in the form of its implementation AdaptDL.
    """

    name = "adamscale"
    needs: frozenset[str] = frozenset({"noise"})

    def factor(self, batch_size: float, reference_batch_size: float, noise_scale: float = math.nan) -> float:
        """Returns ``sqrt((1 + phi / B0) / (1 + phi / B))``; 1 while the noise scale is NaN."""
        return math.sqrt(gain(batch_size, reference_batch_size, noise_scale))


_Rule = NoScaling | LinearScaling | SqrtScaling | AdaScale | AdamScale

_RULES: dict[str, type[_Rule]] = {
    rule.name: rule for rule in (NoScaling, LinearScaling, SqrtScaling, AdaScale, AdamScale)
}

# What "auto" means, by a part of the name of the optimizer's class or of a class that it inherits from.
# First match wins; optimizers of other packages are found without importing these.
_AUTO: tuple[tuple[tuple[str, ...], type[_Rule]], ...] = (
    (("lbfgs",), NoScaling),  # sets its step length by line search
    (
        ("adam", "adagrad", "adadelta", "adafactor", "adabelief", "rmsprop", "rprop", "yogi", "lamb", "lion"),
        SqrtScaling,
    ),
    (("",), AdaScale),  # SGD and whatever else applies the gradient as it is
)


def resolve_lr_scaling(rule: str | LRScaling, optimizer: Optimizer | None = None) -> LRScaling:
    """Returns the rule meant by a name, or the rule itself.

    Args:
        rule: an object with ``factor``, or ``"none"``, ``"linear"``, ``"sqrt"``, ``"adascale"``,
            ``"adamscale"`` or ``"auto"``. Auto picks by the optimizer: :class:`SqrtScaling` for Adam and
            other adaptive ones, :class:`NoScaling` for LBFGS, :class:`AdaScale` for SGD and the rest.
        optimizer: what ``"auto"`` looks at.

    Raises:
        ValueError: an unknown name, or ``"auto"`` without an optimizer.
        TypeError: neither a name nor a rule.
    """
    if rule == "auto":
        if optimizer is None:
            raise ValueError('lr_scaling="auto" picks by the optimizer: pass one, or name a rule.')
        return _auto_rule(optimizer)()
    if isinstance(rule, str):
        if rule not in _RULES:
            known = ", ".join([*_RULES, "auto"])
            raise ValueError(f"lr_scaling={rule!r} is not a known rule: use one of {known}.")
        return _RULES[rule]()
    if isinstance(rule, type) or not callable(getattr(rule, "factor", None)):
        raise TypeError(f"lr_scaling={rule!r} is not a rule: pass a name or an object with a factor method.")
    return rule


@contextmanager
def scaled_lr(optimizer: Optimizer, factor: float) -> Iterator[None]:
    """The learning rates times ``factor``, put back exactly however the block ends."""
    if factor == 1.0:
        yield
        return
    groups = [group for group in optimizer.param_groups if "lr" in group]
    saved = [group["lr"].clone() if isinstance(group["lr"], Tensor) else group["lr"] for group in groups]
    for group in groups:
        if isinstance(group["lr"], Tensor):
            group["lr"].mul_(factor)  # in place: a captured graph holds on to this tensor
        else:
            group["lr"] = group["lr"] * factor
    try:
        yield
    finally:
        for group, lr in zip(groups, saved, strict=True):
            if isinstance(group["lr"], Tensor):
                group["lr"].copy_(lr)
            else:
                group["lr"] = lr


def _auto_rule(optimizer: Optimizer) -> type[_Rule]:
    names = [cls.__name__.lower() for cls in type(optimizer).__mro__]
    return next(rule for parts, rule in _AUTO if any(part in name for part in parts for name in names))


def _scale(batch_size: float, reference_batch_size: float) -> float:
    """``B / B0``, both checked."""
    for name, value in (("batch_size", batch_size), ("reference_batch_size", reference_batch_size)):
        if not 0 < value < math.inf:
            raise ValueError(f"{name}={value} is not a size: pass a positive number of samples.")
    return batch_size / reference_batch_size
