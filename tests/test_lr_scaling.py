from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from adaptive_batch.lr_scaling import (
    AdamScale,
    AdaScale,
    LinearScaling,
    LRScaling,
    NoScaling,
    SqrtScaling,
    gain,
    resolve_lr_scaling,
)

RULES: list[LRScaling] = [NoScaling(), LinearScaling(), SqrtScaling(), AdaScale(), AdamScale()]
NAMES: dict[str, type[Any]] = {
    "none": NoScaling,
    "linear": LinearScaling,
    "sqrt": SqrtScaling,
    "adascale": AdaScale,
    "adamscale": AdamScale,
}


def rule_id(rule: LRScaling) -> str:
    return type(rule).__name__


@pytest.mark.parametrize(
    ("rule", "expected"),
    [
        (NoScaling(), 1.0),
        (LinearScaling(), 8.0),
        (SqrtScaling(), math.sqrt(8)),
        (AdaScale(), 4.5),  # (1 + 256/32) / (1 + 256/256)
        (AdamScale(), math.sqrt(4.5)),
    ],
    ids=lambda value: rule_id(value) if not isinstance(value, float) else "",
)
def test_factor_of_eight_times_the_reference(rule, expected):
    assert rule.factor(256, 32, 256.0) == pytest.approx(expected, rel=1e-15)


@pytest.mark.parametrize(
    ("rule", "expected"),
    [
        (NoScaling(), 1.0),
        (LinearScaling(), 0.25),
        (SqrtScaling(), 0.5),
        (AdaScale(), 0.4),  # (1 + 1) / (1 + 4)
        (AdamScale(), math.sqrt(0.4)),
    ],
    ids=lambda value: rule_id(value) if not isinstance(value, float) else "",
)
def test_factor_of_a_quarter_of_the_reference(rule, expected):
    assert rule.factor(8, 32, 32.0) == pytest.approx(expected, rel=1e-15)


@pytest.mark.parametrize("rule", RULES, ids=rule_id)
@pytest.mark.parametrize("phi", [math.nan, 0.0, 0.1, 333.3, 1e300, math.inf])
@pytest.mark.parametrize("size", [1, 3, 7, 32, 1000])
def test_factor_is_exactly_one_at_the_reference(rule, phi, size):
    assert rule.factor(size, size, phi) == 1.0


@pytest.mark.parametrize("rule", [AdaScale(), AdamScale()], ids=rule_id)
def test_factor_is_one_before_the_noise_scale_is_identified(rule):
    assert rule.factor(256, 32) == 1.0
    assert rule.factor(256, 32, math.nan) == 1.0


@pytest.mark.parametrize("rule", RULES[:3], ids=rule_id)
def test_rules_of_the_size_alone_ignore_the_noise_scale(rule):
    assert rule.factor(256, 32) == rule.factor(256, 32, 5.0) == rule.factor(256, 32, math.inf)


def test_gain_between_its_limits():
    assert gain(256, 32, 0.0) == 1.0
    assert gain(256, 32, math.inf) == 8.0
    assert gain(256, 32, 1e12) == pytest.approx(8.0, rel=1e-9)
    gains = [gain(size, 32, 300.0) for size in (8, 16, 32, 64, 1024, 10**9)]
    assert gains == sorted(gains)
    assert gains[-1] == pytest.approx(1 + 300 / 32)  # the gain of a noiseless update


def test_adascale_scales_drift_and_mean_square_length_of_an_update_by_the_gain():
    # |G|^2 and tr(Sigma) of ALGORITHMS E1; at rate r an update at B against one at B0.
    square, variance, small, large = 2.3026, 61.598, 2, 8
    r = AdaScale().factor(large, small, variance / square)
    assert r == pytest.approx(3.30940, rel=1e-5)
    assert r * square / square == pytest.approx(r)
    length, reference = r**2 * (square + variance / large), square + variance / small
    assert length / reference == pytest.approx(r, rel=1e-12)


def test_gain_over_scale_is_the_efficiency_of_goodput():
    for size in (8, 32, 100, 4096):
        efficiency = (300 + 32) / (300 + size)
        assert gain(size, 32, 300.0) / (size / 32) == pytest.approx(efficiency, rel=1e-14)


@pytest.mark.parametrize("rule", RULES, ids=rule_id)
@pytest.mark.parametrize("sizes", [(0, 32), (32, 0), (-1, 32), (math.nan, 32), (32, math.inf)])
def test_sizes_that_are_none_are_refused(rule, sizes):
    with pytest.raises(ValueError, match="is not a size"):
        rule.factor(*sizes, 100.0)


def test_a_negative_noise_scale_is_refused():
    with pytest.raises(ValueError, match="pass NaN"):
        gain(64, 32, -1.0)


@pytest.mark.parametrize(("name", "rule"), NAMES.items())
def test_rules_by_name(name: str, rule: Any):
    assert rule.name == name
    assert type(resolve_lr_scaling(name)) is rule


def test_only_rules_with_a_gain_need_the_noise():
    assert {name for name, rule in NAMES.items() if rule.needs == {"noise"}} == {"adascale", "adamscale"}


def test_a_rule_is_taken_as_it_is():
    class Mine:
        def factor(self, batch_size, reference_batch_size, noise_scale=math.nan):
            return 3.0

    mine = Mine()
    assert resolve_lr_scaling(mine) is mine


class Lamb(torch.optim.Optimizer):
    """Stands for an optimizer of another package."""


class WithWarmup(torch.optim.AdamW):
    """An optimizer whose own name says nothing."""


@pytest.mark.parametrize(
    ("optimizer", "rule"),
    [
        (torch.optim.SGD, AdaScale),
        (torch.optim.ASGD, AdaScale),
        (torch.optim.Adam, SqrtScaling),
        (torch.optim.AdamW, SqrtScaling),
        (torch.optim.NAdam, SqrtScaling),
        (torch.optim.Adamax, SqrtScaling),
        (torch.optim.RMSprop, SqrtScaling),
        (torch.optim.Adagrad, SqrtScaling),
        (torch.optim.Adadelta, SqrtScaling),
        (torch.optim.Adafactor, SqrtScaling),
        (WithWarmup, SqrtScaling),
        (torch.optim.LBFGS, NoScaling),
    ],
)
def test_auto_picks_by_the_optimizer(optimizer, rule):
    parameter = torch.nn.Parameter(torch.zeros(2))
    assert type(resolve_lr_scaling("auto", optimizer([parameter], lr=0.1))) is rule


def test_auto_knows_adaptive_optimizers_of_other_packages_by_name():
    optimizer = Lamb([torch.nn.Parameter(torch.zeros(2))], {"lr": 0.1})
    assert type(resolve_lr_scaling("auto", optimizer)) is SqrtScaling


def test_auto_without_an_optimizer_is_refused():
    with pytest.raises(ValueError, match="pass one, or name a rule"):
        resolve_lr_scaling("auto")


def test_an_unknown_name_lists_the_known():
    with pytest.raises(ValueError, match=r"'cubic'.*none, linear, sqrt, adascale, adamscale, auto"):
        resolve_lr_scaling("cubic")


@pytest.mark.parametrize("rule", [None, 3, AdaScale, lambda batch_size: 1.0])
def test_what_is_no_rule_is_refused(rule):
    with pytest.raises(TypeError, match="is not a rule"):
        resolve_lr_scaling(rule)
