"""Policies that follow a measurement: the numbers of their formulas, worked out by hand."""

from __future__ import annotations

import copy
import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from test_policies import measurement

from adaptive_batch import BatchSizeController, Measurement
from adaptive_batch.policies import (
    CABS,
    BigBatch,
    GradientDiversity,
    InnerProductTest,
    LossProportional,
    NormTest,
    Plateau,
    Sequential,
    is_measured,
)

# Norm test


def test_norm_test_asks_for_the_variance_over_the_square_of_the_gradient():
    # |G|^2 = 2, V = 96: |g_B|^2 = 2 + 96/32 = 5, V/B = 3 > 0.25 * 5; B' = 96 / (0.25 * 5) = 76.8
    assert NormTest(0.5).propose(measurement(noise_scale=48.0)) == 77.0


def test_norm_test_stays_where_it_is_passed():
    assert NormTest(0.5).propose(measurement(batch_size=160, noise_scale=48.0)) == 160.0
    assert NormTest(0.5).propose(measurement(batch_size=100, noise_scale=0.0)) == 100.0


def test_norm_test_comes_to_rest_at_its_closed_form():
    phi, theta = 26.75, 0.5  # E7: phi (1 / theta^2 - 1) = 80.25
    size = 8.0
    for _ in range(60):
        size = NormTest(theta).propose(measurement(batch_size=int(size), noise_scale=phi))
    assert size == pytest.approx(phi * (1 / theta**2 - 1), abs=1.0)


@pytest.mark.parametrize(("size", "expected"), [(40, 1.61), (80, 1.005)])
def test_norm_test_asks_for_as_much_as_linear_regression_predicts(size, expected):
    assert NormTest(0.5).propose(measurement(batch_size=size, noise_scale=26.75)) / size == pytest.approx(
        expected, abs=0.02
    )


def test_norm_test_asks_for_no_more_than_its_threshold_allows():
    assert NormTest(0.1).propose(measurement(noise_scale=math.inf)) == 3200.0
    assert NormTest(0.1).propose(measurement(noise_scale=1e12)) == 3200.0


def test_norm_test_without_a_noise_scale_goes_by_what_it_surely_exceeds():
    m = measurement(interval=(48.0, math.inf))
    assert NormTest(0.5).propose(m) == 77.0
    assert NormTest(0.5).reason(m, 77) == "gradient error 0.77 of its norm, theta is 0.5"
    assert NormTest(0.5).propose(measurement()) == 32.0
    assert NormTest(0.5).reason(measurement(), 32) == "noise scale not identified"


@pytest.mark.parametrize("theta", [0.0, 1.0, 1.5, math.nan])
def test_norm_test_refuses_a_threshold_that_tests_nothing(theta):
    with pytest.raises(ValueError, match="theta="):
        NormTest(theta)


# Big batch


def single(update: int, sq_norm: float, variance: float = 64.0, **fields: Any) -> Any:
    return measurement(measured_update=update, measured_grad_sq_norm=sq_norm, measured_grad_variance=variance, **fields)


def test_big_batch_grows_by_a_fraction_where_a_batch_is_lost_in_its_noise():
    policy = BigBatch(0.1)
    assert policy.propose(single(5, -0.1)) == 35.0  # 32 + floor(3.2)
    assert policy.propose(single(9, 0.0, batch_size=35)) == 38.0
    assert policy.propose(single(12, 0.1, batch_size=38)) == 38.0
    assert policy.propose(single(13, -1.0, batch_size=4)) == 5.0  # at least one sample


def test_big_batch_with_a_margin_asks_for_more_signal_than_noise():
    # |g_B|^2 = 2.1 + 64/32 = 4.1; theta^2 4.1 = 1.025 <= 2 fails, and at 4.1 >= 2 / 0.25 = 8 it would pass
    assert BigBatch(0.5, theta=0.5).propose(single(1, 2.1)) == 48.0
    assert BigBatch(0.5, theta=0.5).propose(single(1, 6.1)) == 32.0


def test_big_batch_tests_each_measured_update_once():
    policy = BigBatch()
    assert policy.propose(single(5, -1.0)) == 35.0
    assert policy.propose(single(5, -1.0, batch_size=35)) == 35.0
    assert policy.propose(measurement()) == 32.0
    assert not is_measured(policy)


@pytest.mark.parametrize("arguments", [{"delta": 0}, {"delta": math.inf}, {"theta": 0}, {"theta": 1.1}])
def test_big_batch_refuses_arguments_that_test_or_grow_nothing(arguments):
    with pytest.raises(ValueError, match=next(iter(arguments))):
        BigBatch(**arguments)


# CABS


def seen(update: int, loss: float, **fields: Any) -> Any:
    return measurement(update=update, samples=32 * update, loss=loss, **fields)


def test_cabs_is_learning_rate_times_variance_over_loss():
    assert CABS().propose(seen(10, 0.5, lr=0.1, grad_variance=600.0)) == pytest.approx(120.0)
    assert CABS(c=2.0).propose(seen(10, 0.5, lr=0.1, grad_variance=600.0)) == pytest.approx(240.0)


def test_cabs_smooths_the_loss_per_update_and_takes_each_once():
    policy = CABS(smoothing=0.95)
    policy.propose(seen(10, 2.0, lr=0.1, grad_variance=600.0))
    m = seen(20, 1.0, lr=0.1, grad_variance=600.0)
    kept, first = 0.95**10, 1 - 0.95**10
    mean = (kept * first * 2.0 + first * 1.0) / (kept * first + first)
    assert policy.propose(m) == policy.propose(m) == pytest.approx(0.1 * 600 / mean)


@pytest.mark.parametrize(
    "unknown", [{"grad_variance": math.nan}, {"grad_variance": -1.0}, {"loss": -0.1}, {"loss": math.nan}, {"lr": 0.0}]
)
def test_cabs_stays_where_its_formula_has_no_meaning(unknown):
    m = replace(seen(10, 0.5, lr=0.1, grad_variance=600.0), **unknown)
    assert CABS().propose(m) == 32.0


def test_cabs_leaves_the_learning_rate_alone():
    assert CABS().lr_factor(512, 32, 0.1) == 1.0
    assert is_measured(CABS())


# Gradient diversity


def test_gradient_diversity_of_a_batch_is_one_plus_the_noise_scale():
    rng = np.random.default_rng(0)
    g = 0.4 + rng.standard_normal((50, 7))
    diversity = len(g) * (g**2).sum() / (g.sum(0) ** 2).sum()
    centred = g - g.mean(0)
    phi = (centred**2).sum() / len(g) / (g.mean(0) ** 2).sum()
    assert diversity == pytest.approx(1 + phi, rel=1e-12)
    assert GradientDiversity(10.0).propose(measurement(noise_scale=phi)) == pytest.approx(10 * diversity)


def test_gradient_diversity_never_shrinks():
    assert GradientDiversity().propose(measurement(noise_scale=999.0)) == pytest.approx(100.0)
    assert GradientDiversity().propose(measurement(noise_scale=99.0)) == 32.0
    assert GradientDiversity().propose(measurement()) == 32.0
    with pytest.raises(ValueError, match="delta=0"):
        GradientDiversity(0)


# Loss


def test_loss_proportional_is_inverse_to_the_excess_loss():
    policy = LossProportional(0.5, initial_loss=2.5, smoothing=0.0)
    assert policy.propose(seen(10, 1.5)) == 64.0
    assert policy.propose(seen(20, 1.1)) == 107.0  # ceil(32 * 2 / 0.6)
    assert policy.propose(seen(30, 2.5)) == 32.0


def test_loss_proportional_starts_from_the_first_loss():
    policy = LossProportional(smoothing=0.0)
    assert policy.propose(seen(10, 2.0)) == 32.0
    assert policy.propose(seen(20, 0.5)) == 128.0
    assert policy.reason(seen(20, 0.5), 128) == "loss 0.5, 2 at the start"


def test_loss_proportional_stays_at_or_below_the_minimum():
    policy = LossProportional(0.5, initial_loss=2.5, smoothing=0.0)
    assert policy.propose(replace(seen(10, 0.5), batch_size=77)) == 77.0
    assert policy.propose(replace(seen(20, math.nan), batch_size=77)) == 77.0


@pytest.mark.parametrize(
    "arguments", [{"minimum": math.nan}, {"minimum": 1.0, "initial_loss": 1.0}, {"smoothing": 1.0}]
)
def test_loss_proportional_refuses_what_is_no_loss(arguments):
    with pytest.raises(ValueError, match="="):
        LossProportional(**arguments)


# Plateau


def sizes_over_epochs(policy: Plateau, losses: list[float], per_epoch: int = 3) -> list[float]:
    """The size at the first decision of each epoch after the first one, whose losses are given."""
    sizes, update = [], 0
    for epoch, loss in enumerate([*losses, losses[-1]]):
        for i in range(per_epoch):
            update += 1
            proposed = policy.propose(seen(update, loss, epoch=epoch))
            if epoch and i == 0:
                sizes.append(proposed)
    return sizes


def test_plateau_multiplies_the_size_where_reduce_lr_on_plateau_divides_the_rate():
    losses = [1.0, 0.9, 0.9, 0.95, 0.9, 0.8, 0.8, 0.8, 0.8, 0.8, 0.7999999, 0.81, 0.6, 0.6]
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, factor=0.5, patience=2)
    factors = []
    for loss in losses:
        scheduler.step(loss)
        factors.append(1 / optimizer.param_groups[0]["lr"])
    assert max(factors) == 8.0
    assert sizes_over_epochs(Plateau(2.0, patience=2), losses) == [32 * factor for factor in factors]


def test_plateau_averages_a_window_by_samples():
    policy = Plateau(2.0, patience=0, every=64, unit="samples")
    for update, loss in ((1, 1.0), (2, 0.0), (3, 2.0), (4, 0.9)):  # windows 32-63, 64-127, 128-
        size = policy.propose(seen(update, loss))
    assert size == 64.0  # mean(0, 2) = 1.0 is no better than 1.0


def test_plateau_restored_goes_on_as_before():
    losses = [1.0, 0.9, 0.9, 0.95, 0.9, 0.8]
    whole, cut = Plateau(patience=1), Plateau(patience=1)
    for i, loss in enumerate(losses):
        restored = Plateau(patience=1)
        restored.load_state_dict(cut.state_dict())
        cut = restored
        m = seen(i + 1, loss, epoch=i)
        assert whole.propose(m) == cut.propose(m)
    assert cut.state_dict() == whole.state_dict()


@pytest.mark.parametrize(
    "arguments",
    [{"factor": 1.0}, {"patience": -1}, {"patience": 1.5}, {"threshold": 1.0}, {"every": 0}, {"unit": "days"}],
)
def test_plateau_refuses_arguments_out_of_range(arguments):
    with pytest.raises(ValueError, match=next(iter(arguments))):
        Plateau(**arguments)


@pytest.mark.parametrize("make", [BigBatch, CABS, LossProportional, Plateau])
def test_a_state_is_plain_checked_and_goes_on(make):
    one, other = make(), make()
    for i in range(1, 5):
        fields = {"lr": 0.1, "grad_variance": 600.0, "measured_update": i, "measured_grad_sq_norm": -1.0}
        one.propose(seen(10 * i, 1.0 / i, measured_grad_variance=3.0, **fields))
    other.load_state_dict(one.state_dict())
    m = seen(50, 0.1, lr=0.1, grad_variance=600.0)
    assert one.propose(m) == other.propose(m)
    assert other.state_dict() == one.state_dict()
    before = one.state_dict()
    for wrong in (None, {}, {**before, "more": 1}, dict.fromkeys(before, "x")):
        with pytest.raises(ValueError, match="not the state"):
            one.load_state_dict(wrong)
    assert one.state_dict() == before


def test_a_loss_that_reaches_zero_asks_for_the_largest_size():
    controller = BatchSizeController(
        "loss_proportional", lr_scaling="none", reference_batch_size=32, max_batch_size=512, adjust_every=1000
    )
    for update in range(1, 20_001):
        loss = 1.0 if update <= 10 else 0.0
        controller.observe(measurement(update=update, loss=loss))
    assert controller.batch_size == 512


def test_plateaus_without_end_ask_for_the_largest_size():
    controller = BatchSizeController(
        Plateau(patience=0, every=1, unit="epochs"), lr_scaling="none", reference_batch_size=32, max_batch_size=512
    )
    for update in range(1, 12_001):
        controller.observe(measurement(update=update, epoch=update // 10, samples=32 * update, loss=1.0))
    assert controller.batch_size == 512


def test_a_plateau_policy_whose_turn_comes_late_weighs_its_first_loss_like_the_others():
    def grown(policy: Any) -> list[int]:
        found = []
        for step in range(400):
            epoch, loss = step // 20, 0.97 ** (step // 20) * (0.8 if step == 100 else 1.0)
            at = {"update": 10 * (step + 1), "epoch": epoch, "samples": 320 * (step + 1)}
            if policy.propose(measurement(**at, loss=loss)) > 32:
                found.append(epoch)
        return found

    stages: dict[int, Any] = {0: "constant", 5: Plateau(patience=3)}
    assert grown(Plateau(patience=3)) == grown(Sequential(stages)) == []


@pytest.mark.parametrize(("size", "multiple"), [(16, 4), (8, 2), (20, 4)])
def test_a_failed_test_adds_at_least_what_is_accumulated(size, multiple):
    controller = BatchSizeController("big_batch", lr_scaling="none", reference_batch_size=size, multiple_of=multiple)
    sizes = []
    for update in range(1, 101):
        present = controller.batch_size or size
        parts = {"part_sq_norms": [2.0, 2.0], "part_sizes": [present // 2, present - present // 2], "sq_norm": 0.5}
        controller.observe(measurement(update=update, batch_size=present, reference_batch_size=size, **parts))
        sizes.append(controller.batch_size or size)
    assert sizes[9] == size + multiple
    assert sizes[-1] >= size + 10 * multiple and not any(s % multiple for s in sizes)


def test_without_the_variance_across_the_gradient_the_augmented_test_keeps_the_size():
    m = measurement(inner_product_variance=1e6, inner_product_sq_norm=1.0, grad_variance=math.nan)
    assert InnerProductTest().propose(m) == 32.0
    assert InnerProductTest(nu=None).propose(m) > 32.0


@pytest.mark.parametrize("policy", [LossProportional(), LossProportional(initial_loss=5.0), CABS()])
def test_a_policy_that_is_used_for_another_run_forgets_the_losses_of_the_first(policy):
    def sizes(asked, losses):
        seen = (
            measurement(update=10 * i, batch_size=32, lr=0.1, loss=loss, grad_variance=1e4)
            for i, loss in enumerate(losses, 1)
        )
        return [asked.propose(m) for m in seen]

    expected = sizes(copy.deepcopy(policy), [4.0, 3.0, 2.0, 1.0])
    assert len(set(expected)) > 2
    sizes(policy, [9.0, 1.0, 0.1, 0.01, 0.01])
    assert sizes(policy, [4.0, 3.0, 2.0, 1.0]) == expected


def test_plateau_that_is_used_for_another_run_forgets_the_first():
    policy = Plateau(patience=0, every=1, unit="updates")

    def run() -> list[float]:
        return [policy.propose(measurement(update=n, samples=32 * n, loss=1.0)) for n in range(1, 6)]

    assert run() == run() == [32.0, 32.0, 64.0, 128.0, 256.0]


def test_big_batch_that_is_used_for_another_run_tests_its_updates():
    policy = BigBatch()
    lost = {"measured_grad_sq_norm": -1.0, "measured_grad_variance": 100.0}
    assert policy.propose(measurement(measured_update=900, **lost)) == 35.0
    assert policy.propose(measurement(measured_update=900, **lost)) == 32.0  # tested already
    assert policy.propose(measurement(measured_update=10, **lost)) == 35.0


def test_policies_go_by_a_measurement_that_does_not_say_which_update_it_is():
    # 0.1 * 1200 / 0.6 = 200;  32 * 2 / 1 = 64;  32 + floor(0.1 * 32) = 35
    assert CABS().propose(Measurement(batch_size=32, lr=0.1, loss=0.6, grad_variance=1200.0)) == pytest.approx(200.0)
    m = Measurement(batch_size=48, reference_batch_size=32, loss=1.0)
    assert LossProportional(initial_loss=2.0).propose(m) == 64.0
    assert BigBatch().propose(Measurement(batch_size=32, grad_sq_norm=-0.1, grad_variance=100.0)) == 35.0
    assert BigBatch().propose(Measurement(batch_size=32, grad_sq_norm=5.0, grad_variance=100.0)) == 32.0
    plateau = Plateau(patience=0)
    sizes = [plateau.propose(Measurement(epoch=n, reference_batch_size=32, loss=1.0)) for n in range(4)]
    assert sizes == [32.0, 32.0, 64.0, 128.0]
