from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch

from adaptive_batch import BatchSizeController
from adaptive_batch.lr_scaling import (
    AdamScale,
    AdaScale,
    HeavyBallScaling,
    LinearScaling,
    LRScaling,
    NoScaling,
    SDEScaling,
    SqrtScaling,
    gain,
    resolve_lr_scaling,
    scaled_lr,
)
from adaptive_batch.policies import CABS, DontDecay, LossProportional, Max, OnlyGrow, Plateau, Policy, Seesaw

RULES: list[LRScaling] = [
    NoScaling(), LinearScaling(), SqrtScaling(), AdaScale(), HeavyBallScaling(0.9), AdamScale(), SDEScaling(),
]  # fmt: skip
NAMES: dict[str, type[Any]] = {
    "none": NoScaling,
    "linear": LinearScaling,
    "sqrt": SqrtScaling,
    "adascale": AdaScale,
    "adamscale": AdamScale,
    "sde": SDEScaling,
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
        (SDEScaling(), math.sqrt(8)),
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


@pytest.mark.parametrize("nesterov", [False, True])
def test_auto_is_the_heavy_balls_rule_for_sgd_with_momentum(nesterov):
    class Own(torch.optim.SGD):
        pass

    groups = [{"params": [torch.nn.Parameter(torch.zeros(2))], "momentum": m} for m in (0.9, 0.8)]
    rule = resolve_lr_scaling("auto", Own(groups, lr=0.1, momentum=0.5, nesterov=nesterov))
    assert isinstance(rule, HeavyBallScaling)
    assert (rule.momentum, rule.nesterov) == (0.8, nesterov)
    groups = [{"params": [torch.nn.Parameter(torch.zeros(2))], "momentum": m} for m in (0.9, 0.0)]
    assert type(resolve_lr_scaling("auto", torch.optim.SGD(groups, lr=0.1))) is AdaScale


def test_what_others_than_sgd_call_momentum_is_no_heavy_ball():
    class SGDScheduleFree(torch.optim.Optimizer):
        def step(self, closure=None):
            return None

    optimizer = SGDScheduleFree([torch.nn.Parameter(torch.zeros(2))], {"lr": 0.1, "momentum": 0.9})
    assert type(resolve_lr_scaling("auto", optimizer)) is AdaScale


@pytest.mark.parametrize(
    ("momentum", "nesterov", "k", "noise_scale", "expected"),
    [
        (0.9, False, 4, 50.0, 2.5625),  # 1 + 50 / 32; AdaScale alone: 2.5625 / 1.390625 = 1.84
        (0.9, False, 4, 100.0, 4.0),
        (0.9, False, 4, math.nan, 1.0),  # nothing is known of the noise
        (0.9, False, 40, 320.0, 11.0),  # AdaScale alone: 11 / 1.25 = 8.8
        (0.9, False, 40, 640.0, 19.0),  # AdaScale alone: 21 / 1.5 = 14
        (0.9, False, 40, math.inf, 40.0),
        (0.9, False, 40, 3200.0, 101 / 3.5),
        (0.5, False, 8, 32.0, 2.0),
        (0.5, False, 8, 80.0, 3.0),
        (0.5, True, 8, 32.0, 2 / 1.125),
        (0.9, True, 16, 0.0, 1.0),
        (0.9, True, 16, 200.0, 1.9 / 0.1 / 2.8),
        (0.9, False, 0.5, 32.0, 2 / 3),
    ],
)
def test_heavy_ball_is_linear_up_to_the_bound_of_momentum(momentum, nesterov, k, noise_scale, expected):
    rule = HeavyBallScaling(momentum, nesterov=nesterov)
    assert rule.factor(k * 32, 32, noise_scale) == pytest.approx(expected)


def test_heavy_ball_without_momentum_is_adascale():
    for size, noise_scale in itertools.product((16, 32, 64, 4096), (0.0, 20.0, 500.0, math.inf, math.nan)):
        assert HeavyBallScaling(0.0).factor(size, 32, noise_scale) == AdaScale().factor(size, 32, noise_scale)


@pytest.mark.parametrize("nesterov", [False, True])
@pytest.mark.parametrize("momentum", [0.3, 0.5, 0.9])
def test_the_heavy_balls_bound_is_that_of_sgd_on_a_quadratic(momentum, nesterov):
    plain_limit = 2.0  # of lr / (1 - m), for f = x^2 / 2

    def end(factor: float) -> float:
        x = torch.nn.Parameter(torch.ones((), dtype=torch.float64))
        rate = factor * plain_limit * (1 - momentum)
        optimizer = torch.optim.SGD([x], lr=rate, momentum=momentum, nesterov=nesterov)
        for _ in range(3000):
            x.grad = x.detach().clone()
            optimizer.step()
        return abs(x.item())

    stable = HeavyBallScaling(momentum, nesterov=nesterov).stable
    assert end(0.99 * stable) < 1e-3
    assert end(1.01 * stable) > 1e3


@pytest.mark.parametrize("momentum", [-0.1, 1.0, math.nan])
def test_a_momentum_that_is_no_heavy_balls_is_refused(momentum):
    with pytest.raises(ValueError, match="cannot be a heavy ball's"):
        HeavyBallScaling(momentum)


def test_auto_knows_adaptive_optimizers_of_other_packages_by_name():
    optimizer = Lamb([torch.nn.Parameter(torch.zeros(2))], {"lr": 0.1})
    assert type(resolve_lr_scaling("auto", optimizer)) is SqrtScaling


def test_auto_without_an_optimizer_is_refused():
    with pytest.raises(ValueError, match="name a rule, or give an optimizer"):
        resolve_lr_scaling("auto")


def test_an_unknown_name_lists_the_known():
    with pytest.raises(ValueError, match=r"'cubic'.*none, linear, sqrt, adascale, adamscale, sde, auto"):
        resolve_lr_scaling("cubic")


@pytest.mark.parametrize("rule", [None, 3, AdaScale, lambda batch_size: 1.0])
def test_what_is_no_rule_is_refused(rule):
    with pytest.raises(TypeError, match="is not a rule"):
        resolve_lr_scaling(rule)


# Options: what else follows the size


def adam(**options: Any) -> torch.optim.Adam:
    return torch.optim.Adam([torch.nn.Parameter(torch.zeros(2))], lr=0.1, **options)


def adamw(**options: Any) -> torch.optim.AdamW:
    return torch.optim.AdamW([torch.nn.Parameter(torch.zeros(2))], lr=0.1, **options)


def values(rule: Any, optimizer: torch.optim.Optimizer, scale: float) -> dict[str, Any]:
    factor = rule.factor(32 * scale, 32, 64.0)
    changed: dict[str, Any] = rule.group_values(optimizer.param_groups[0], scale, factor)
    return changed


def test_sde_scales_betas_and_eps_with_the_size():
    changed = values(SDEScaling(), adam(betas=(0.9, 0.999), eps=1e-8), 4.0)
    assert changed["betas"] == pytest.approx((0.6, 0.996))
    assert changed["eps"] == pytest.approx(5e-9)
    assert set(changed) == {"betas", "eps"}


def test_sde_below_the_reference_and_for_rmsprop():
    changed = values(SDEScaling(), adam(), 0.25)
    assert changed["betas"] == pytest.approx((0.975, 0.99975))
    assert changed["eps"] == pytest.approx(2e-8)
    rmsprop = torch.optim.RMSprop([torch.nn.Parameter(torch.zeros(2))], alpha=0.9)
    assert values(SDEScaling(), rmsprop, 4.0) == {"alpha": pytest.approx(0.6), "eps": pytest.approx(5e-9)}


def test_sde_does_not_leave_the_range_of_a_decay_rate():
    assert values(SDEScaling(), adam(), 64.0)["betas"] == (0.0, pytest.approx(0.936))
    assert values(SDEScaling(), adam(betas=(0.0, 0.9)), 4.0)["betas"] == (0.0, pytest.approx(0.6))


def test_sde_refuses_a_maximum_beyond_its_range():
    SDEScaling().check(adam(), 9.9)
    SDEScaling(betas="half_life").check(adam(), 1000.0)
    SDEScaling().check(torch.optim.SGD([torch.nn.Parameter(torch.zeros(2))], lr=0.1), 1000.0)
    with pytest.raises(ValueError, match=r"beta=0.9 to -0.6 .* 16 times .* below 10 times only"):
        SDEScaling().check(adam(), 16.0)


def test_half_life_keeps_what_the_second_moments_forget_per_sample():
    # ALGORITHMS C: 0.9^8 = 0.430
    for rule in (SqrtScaling(betas="half_life"), NoScaling(betas="half_life")):
        assert values(rule, adam(betas=(0.9, 0.9)), 8.0) == {"betas": (0.9, pytest.approx(0.43046721))}
    changed = values(SDEScaling(betas="half_life"), adam(), 64.0)
    assert changed["betas"] == (0.9, pytest.approx(0.999**64))
    rmsprop = torch.optim.RMSprop([torch.nn.Parameter(torch.zeros(2))], alpha=0.99)
    assert values(LinearScaling(betas="half_life"), rmsprop, 2.0) == {"alpha": pytest.approx(0.9801)}


@pytest.mark.parametrize(
    ("rule", "factor"),
    [
        (SqrtScaling(weight_decay="timescale"), 2.0),
        (LinearScaling(weight_decay="timescale"), 1.0),
        (NoScaling(weight_decay="timescale"), 4.0),
    ],
)
def test_timescale_keeps_samples_over_rate_times_weight_decay(rule, factor):
    assert values(rule, adamw(weight_decay=0.01), 4.0) == {"weight_decay": pytest.approx(0.01 * factor)}
    lr, wd = 0.1 * rule.factor(128, 32), 0.01 * factor
    assert 128 / (lr * wd) == pytest.approx(32 / (0.1 * 0.01))


def test_timescale_leaves_a_decay_that_is_part_of_the_gradient_alone():
    assert values(SqrtScaling(weight_decay="timescale"), adam(weight_decay=0.01), 4.0) == {}
    assert values(SqrtScaling(weight_decay="timescale"), adamw(weight_decay=0.0), 4.0) == {}


@pytest.mark.parametrize("rule", RULES, ids=rule_id)
def test_without_options_nothing_but_the_rate_changes(rule):
    changed = values(rule, adamw(weight_decay=0.01), 4.0)
    assert set(changed) == ({"betas", "eps"} if isinstance(rule, SDEScaling) else set())


@pytest.mark.parametrize(
    "options", [{"betas": "sde"}, {"weight_decay": "x"}, {"rewarm": -1}, {"rewarm": 1.5}, {"rewarm": True}]
)
def test_options_that_do_not_exist_are_refused(options):
    with pytest.raises(ValueError, match=next(iter(options))):
        SqrtScaling(**options)


# Applying it, and taking it off again


@pytest.mark.parametrize("tensor", [False, True])
def test_every_group_is_scaled_by_its_own_values_and_put_back_exactly(tensor):
    parameters = [torch.nn.Parameter(torch.zeros(2)) for _ in range(2)]
    lr: Any = torch.tensor(0.1) if tensor else 0.1
    groups: list[dict[str, Any]] = [
        {"params": parameters[:1]},
        {"params": parameters[1:], "lr": 0.3, "betas": (0.8, 0.9)},
    ]
    optimizer = torch.optim.Adam(groups, lr=lr)
    before = [dict(group) for group in optimizer.param_groups]
    rule = SDEScaling()
    with pytest.raises(RuntimeError), scaled_lr(optimizer, 2.0, lambda group: rule.group_values(group, 4.0, 2.0)):
        assert [float(group["lr"]) for group in optimizer.param_groups] == pytest.approx([0.2, 0.6])
        assert [group["betas"][0] for group in optimizer.param_groups] == pytest.approx([0.6, 0.2])
        if tensor:
            assert optimizer.param_groups[0]["lr"] is lr
        raise RuntimeError
    for group, old in zip(optimizer.param_groups, before, strict=True):
        assert {name: value for name, value in group.items() if name != "params"} == {
            name: value for name, value in old.items() if name != "params"
        }


def test_what_the_optimizer_changes_by_itself_stays_changed():
    optimizer = adam()
    optimizer.param_groups[0]["k"] = 3
    with scaled_lr(optimizer, 2.0):
        optimizer.param_groups[0]["k"] += 1
    assert (optimizer.param_groups[0]["k"], optimizer.param_groups[0]["lr"]) == (4, 0.1)


# Policies with a learning rate of their own


@pytest.mark.parametrize("policy", [CABS(), DontDecay(), Seesaw(), OnlyGrow(CABS())])
def test_a_policy_that_sets_the_rate_goes_with_no_rule(policy):
    assert type(resolve_lr_scaling("auto", adam(), policy)) is NoScaling
    assert type(resolve_lr_scaling("auto", None, policy)) is NoScaling
    assert type(resolve_lr_scaling("none", None, policy)) is NoScaling
    for rule in ("linear", "sde", AdaScale()):
        with pytest.raises(ValueError, match=r"sets the learning rate together with the batch size.*\"auto\""):
            resolve_lr_scaling(rule, adam(), policy)


@pytest.mark.parametrize("policy", [Plateau(), LossProportional(), Max("constant", Plateau()), OnlyGrow("plateau")])
def test_where_the_batch_grows_in_place_of_a_decay_auto_scales_nothing(policy: Policy):
    assert type(resolve_lr_scaling("auto", adam(), policy)) is NoScaling
    assert type(resolve_lr_scaling("linear", adam(), policy)) is LinearScaling
    assert type(resolve_lr_scaling("auto", adam(), Max("constant"))) is SqrtScaling


# Closed forms: linear regression with y = x w* + e, x ~ N(0, H), Var e = s2 (McCandlish et al. 2018, equations 2.6-2.8)


def regression(curvatures: list[float], s2: float = 1.0) -> tuple[Any, Any, Any]:
    h = torch.tensor(curvatures, dtype=torch.float64)
    delta = torch.linspace(0.2, 0.6, len(h), dtype=torch.float64)
    g = h * delta
    sigma = torch.outer(g, g) + (delta @ g + s2) * torch.diag(h)
    return h, g, sigma


def decrease(lr: torch.Tensor, size: float, h: Any, g: Any, sigma: Any) -> torch.Tensor:
    """Expected decrease of the loss in one update at rate ``lr``."""
    curvature = g @ (h * g) + torch.trace(h[:, None] * sigma) / size
    expected: torch.Tensor = lr * (g @ g) - lr**2 / 2 * curvature
    return expected


@pytest.mark.parametrize("size", [4, 32, 1024])
def test_the_best_rate_of_a_quadratic_is_its_closed_form(size):
    h, g, sigma = regression([0.2, 1.0, 3.0])
    noise = torch.trace(h[:, None] * sigma) / (g @ (h * g))
    best = (g @ g) / (g @ (h * g)) / (1 + noise / size)
    rates = torch.linspace(0.5, 1.5, 2001, dtype=torch.float64) * best
    found = rates[decrease(rates, size, h, g, sigma).argmax()]
    assert float(found) == pytest.approx(float(best), rel=1e-3)
    most = (g @ g) ** 2 / (2 * (g @ (h * g))) / (1 + noise / size)
    assert float(decrease(best, size, h, g, sigma)) == pytest.approx(float(most), rel=1e-12)


def test_adascale_is_the_ratio_of_the_best_rates_where_all_curvatures_are_alike():
    h, g, sigma = regression([1.5, 1.5, 1.5, 1.5])
    phi = float(torch.trace(sigma) / (g @ g))
    best = [1 / (1 + phi / size) for size in (32, 200)]
    noise = torch.trace(h[:, None] * sigma) / (g @ (h * g))
    assert phi == pytest.approx(float(noise), rel=1e-12)
    assert AdaScale().factor(200, 32, phi) == pytest.approx(best[1] / best[0], rel=1e-12)


def test_the_automatic_rule_of_adam_forgets_over_the_same_samples_at_every_size():
    parameter = torch.nn.Parameter(torch.zeros(2))
    optimizer = torch.optim.AdamW([parameter], lr=0.1, betas=(0.9, 0.99))
    controller = BatchSizeController(
        lambda m: 64, lr_scaling=resolve_lr_scaling("auto", optimizer), reference_batch_size=16
    )
    assert controller.group_values(16, 1.0) is None
    values = controller.group_values(64, 2.0)
    assert values is not None
    assert values(optimizer.param_groups[0]) == {"betas": (0.9, pytest.approx(0.99**4))}


@pytest.mark.parametrize("make", [torch.optim.Adam, torch.optim.AdamW, torch.optim.NAdam])
@pytest.mark.parametrize("joined", [0, 40])
def test_steps_of_adam_are_as_long_as_the_rate_says_while_sizes_come_and_go(make, joined):
    # With a gradient of 1 every moment is 1 once its bias is corrected, so each step is the rate.
    parameter = torch.nn.Parameter(torch.zeros(1, dtype=torch.float64))
    optimizer = make([parameter], lr=1e-3, weight_decay=0.0, eps=1e-30, betas=(0.0, 0.999))
    parameter.grad = torch.ones_like(parameter)
    for _ in range(joined):
        optimizer.step()
    rule = resolve_lr_scaling("auto", optimizer)
    assert isinstance(rule, SqrtScaling) and rule.betas == "half_life"
    controller = BatchSizeController(lambda m: 16, lr_scaling=rule, reference_batch_size=16, max_batch_size=4096)
    controller.check_optimizer(optimizer)
    for update in range(1, 200):
        size = 16 if update < 30 else 32 if update < 60 else 256 if update < 120 else 16 if update < 150 else 64
        factor = controller.lr_factor(size)
        before = parameter.item()
        with scaled_lr(optimizer, factor, controller.group_values(size, factor)):
            optimizer.step()
        if make is not torch.optim.NAdam:  # whose step has a part of its own momentum's schedule
            assert before - parameter.item() == pytest.approx(1e-3 * factor, rel=1e-6)
        controller.count_step(optimizer, size)
        if update == 100:  # as on resuming
            state = controller.state_dict()
            controller = BatchSizeController(lambda m: 16, lr_scaling=rule, reference_batch_size=16)
            controller.load_state_dict(state)
            controller.check_optimizer(optimizer)
    group = optimizer.param_groups[0]
    assert (group["lr"], group["betas"]) == (1e-3, (0.0, 0.999))


@pytest.mark.parametrize("make", [torch.optim.RAdam, torch.optim.Adamax, torch.optim.RMSprop])
def test_the_automatic_rule_leaves_the_decays_of_others_than_adam_alone(make):
    rule = resolve_lr_scaling("auto", make([torch.nn.Parameter(torch.zeros(2))], lr=0.1))
    assert isinstance(rule, SqrtScaling) and rule.betas is None


@pytest.mark.parametrize(
    ("name", "rule"), [("Muon", SqrtScaling), ("SignSGD", SqrtScaling), ("Prodigy", SqrtScaling), ("Own", AdamScale)]
)
def test_auto_is_careful_with_what_is_not_sgd(name, rule):
    made = type(name, (torch.optim.Optimizer,), {"step": lambda self, closure=None: None})
    assert type(resolve_lr_scaling("auto", made([torch.nn.Parameter(torch.zeros(2))], {"lr": 0.1}))) is rule


def test_sde_is_refused_at_exactly_its_bound_and_for_the_least_momentum_of_a_cycle():
    optimizer = adam()
    with pytest.raises(ValueError, match=r"holds below 10 times only"):
        SDEScaling().check(optimizer, 10.0)
    SDEScaling().check(optimizer, 9.9)
    torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, 100, base_momentum=0.5)
    with pytest.raises(ValueError, match=r"beta=0.5.*holds below 2 times only"):
        SDEScaling().check(optimizer, 4.0)


@pytest.mark.parametrize("factor", [math.nan, -1.0, math.inf, None, "a lot"])
def test_a_rule_whose_factor_is_no_factor_is_refused(factor):
    class Own:
        def factor(self, batch_size: float, reference_batch_size: float, noise_scale: float = math.nan) -> Any:
            return factor

    controller = BatchSizeController("constant", lr_scaling=Own(), reference_batch_size=16)
    with pytest.raises(ValueError, match=r"Own gave the factor .* for 32 samples; return a number"):
        controller.lr_factor(32)


@pytest.mark.parametrize(("weight_decay", "kept"), [(None, 1.0), ("timescale", 4.0 / 2.0)])
def test_what_corrects_adams_bias_leaves_its_decay_alone(weight_decay, kept):
    parameter = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.AdamW([parameter], lr=0.1, weight_decay=0.01)
    rule = SqrtScaling(betas="half_life", weight_decay=weight_decay)
    controller = BatchSizeController(lambda m: 16, lr_scaling=rule, reference_batch_size=16)
    parameter.grad = torch.ones(1)
    controller.check_optimizer(optimizer)
    for _ in range(20):
        optimizer.step()
        controller.count_step(optimizer, 16)
    with scaled_lr(optimizer, 2.0, controller.group_values(64, 2.0)):
        (group,) = optimizer.param_groups
        assert group["lr"] < 0.19  # 20 of the 84 samples' worth that the optimizer takes to be there
        assert group["lr"] * group["weight_decay"] == pytest.approx(0.1 * 2.0 * 0.01 * kept)
    assert (group["lr"], group["weight_decay"], group["betas"]) == (0.1, 0.01, (0.9, 0.999))


def test_a_momentum_that_is_no_number_is_refused():
    with pytest.raises(ValueError, match=r"momentum='0\.9' cannot be a heavy ball's"):
        HeavyBallScaling("0.9")  # type: ignore[arg-type]


def test_a_new_adam_in_an_old_controller_starts_at_the_beginning():
    rule = SqrtScaling(betas="half_life")
    controller = BatchSizeController(lambda m: 16, lr_scaling=rule, reference_batch_size=16)
    for _ in range(2):
        parameter = torch.nn.Parameter(torch.zeros(1, dtype=torch.float64))
        optimizer = torch.optim.Adam([parameter], lr=1e-3, eps=1e-30)
        parameter.grad = torch.ones_like(parameter)
        controller.check_optimizer(optimizer)
        for size in (*[16] * 20, *[128] * 5):
            before = parameter.item()
            factor = controller.lr_factor(size)
            with scaled_lr(optimizer, factor, controller.group_values(size, factor)):
                optimizer.step()
            controller.count_step(optimizer, size)
            assert before - parameter.item() == pytest.approx(1e-3 * factor, rel=1e-6)
