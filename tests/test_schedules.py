"""Policies that follow a schedule: the numbers of their formulas, worked out by hand."""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import pytest
from test_policies import measurement

from adaptive_batch import BatchSizeController, History, replay
from adaptive_batch.measurement import Measurement
from adaptive_batch.policies import (
    Clamp,
    CriticalBatchWarmup,
    DontDecay,
    GeometricGrowth,
    LinearRamp,
    Seesaw,
    is_measured,
)

UNITS = [("epochs", "epoch"), ("updates", "update"), ("samples", "samples")]


@pytest.mark.parametrize(("unit", "field"), UNITS)
def test_geometric_growth_multiplies_at_each_interval(unit, field):
    policy = GeometricGrowth(2.0, every=20, unit=unit)
    sizes = [policy.propose(measurement(**{field: x})) for x in (0, 19, 20, 40, 65)]
    assert sizes == [32.0, 32.0, 64.0, 128.0, 256.0]
    assert policy.reason(measurement(**{field: 45}), 128) == f"interval 3 of 20 {unit}"


def test_geometric_growth_from_a_start_of_its_own_and_downwards():
    policy = GeometricGrowth(0.5, every=1, start=100)
    assert [policy.propose(measurement(epoch=epoch)) for epoch in range(3)] == [100.0, 50.0, 25.0]


def test_growth_beyond_all_numbers_is_still_a_size_that_bounds_can_hold():
    proposal = GeometricGrowth(1e9, every=1).propose(measurement(epoch=100))
    assert 1e15 < proposal < math.inf
    clamped = Clamp(GeometricGrowth(1e9, every=1), max_batch_size=512)
    assert clamped.propose(measurement(epoch=100)) == 512.0


@pytest.mark.parametrize(("unit", "field"), UNITS)
def test_linear_ramp_goes_from_start_to_end(unit, field):
    policy = LinearRamp(None, 512, over=100, unit=unit)
    sizes = [policy.propose(measurement(**{field: x})) for x in (0, 25, 50, 100, 900)]
    assert sizes == [32.0, 152.0, 272.0, 512.0, 512.0]
    assert policy.reason(measurement(**{field: 37}), 200) == "37 % of the ramp to 512"


def test_linear_ramp_can_go_down():
    assert LinearRamp(116, 16, over=10).propose(measurement(samples=4)) == 76.0


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: GeometricGrowth(0), "factor=0"),
        (lambda: GeometricGrowth(every=0), "every=0"),
        (lambda: GeometricGrowth(start=0), "start=0"),
        (lambda: GeometricGrowth(unit="steps"), "epochs, updates, samples"),
        (lambda: LinearRamp(None, 0, over=1), "end=0"),
        (lambda: LinearRamp(None, 64, over=math.inf), "over=inf"),
        (lambda: LinearRamp(None, 64, over=1, unit="tokens"), "tokens"),
        (lambda: CriticalBatchWarmup({}), "empty"),
        (lambda: CriticalBatchWarmup({-1: 100}), "position -1"),
        (lambda: CriticalBatchWarmup({0: 0}), "size 0"),
        (lambda: CriticalBatchWarmup({0.5: 10}, unit="epochs"), "whole epochs"),
        (lambda: DontDecay(step=0.5), "step=0.5"),
    ],
)
def test_schedules_refuse_arguments_out_of_range(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_critical_batch_warmup_doubles_when_outgrown():
    policy = CriticalBatchWarmup({100: 65, 200: 600})
    size, sizes = 32, []
    for samples in (0, 99, 100, 150, 200, 210, 220, 230, 240):
        size = int(policy.propose(measurement(samples=samples, batch_size=size)))
        sizes.append(size)
    assert sizes == [32, 32, 64, 64, 128, 256, 512, 512, 512]  # 600 is not above 2 * 512
    assert policy.reason(measurement(samples=300), 64) == "critical batch size 600"


def test_critical_batch_warmup_takes_a_fitted_curve():
    policy = CriticalBatchWarmup(lambda samples: 2.0 * samples**0.5)
    assert policy.propose(measurement(samples=1024)) == 32.0  # 64 is not above 64
    assert policy.propose(measurement(samples=1030)) == 64.0
    with pytest.raises(TypeError, match="critical=3"):
        CriticalBatchWarmup(3)  # type: ignore[arg-type]


# Decay of the learning rate, turned into growth


def run(policy: Any, rates: list[float], maximum: float = math.inf) -> list[tuple[int, float]]:
    """Size and rate of each update, for a size that is decided before every one."""
    size, seen = 32, []
    for rate in rates:
        proposal = policy.propose(Measurement(batch_size=size, reference_batch_size=32, lr=rate))
        size = round(min(proposal, maximum))
        seen.append((size, rate * policy.lr_factor(size, 32, rate)))
    return seen


def test_dont_decay_grows_by_what_the_schedule_decays_and_keeps_the_rate():
    assert run(DontDecay(), [0.1, 0.1, 0.02, 0.004]) == [
        (32.0, 0.1),
        (32.0, 0.1),
        (pytest.approx(160.0), pytest.approx(0.1)),
        (pytest.approx(800.0), pytest.approx(0.1)),
    ]


def test_dont_decay_decays_once_the_size_has_reached_its_maximum():
    sizes, rates = zip(*run(DontDecay(), [0.1, 0.05, 0.025, 0.0125], maximum=64), strict=True)
    assert sizes == (32.0, 64.0, 64.0, 64.0)
    assert rates == pytest.approx((0.1, 0.1, 0.05, 0.025))


def test_dont_decay_keeps_the_noise_scale_of_the_schedule_at_any_size():
    policy, rates = DontDecay(), 0.1 * np.cos(np.linspace(0, 1.5, 300))
    for (size, used), rate in zip(run(policy, rates.tolist(), maximum=400), rates, strict=True):
        assert used == pytest.approx(min(0.1, rate * size / 32), rel=1e-12)
        assert size > 380 or used == pytest.approx(0.1, rel=0.1)  # a step
    assert policy.lr_factor(17, 32, 0.05) == 17 / 32  # a batch that was fetched before a change, or a tail


def test_seesaw_divides_the_rate_by_the_root_of_what_it_multiplies_the_size_with():
    assert run(Seesaw(), [0.1, 0.05, 0.025]) == [
        (32.0, 0.1),
        (pytest.approx(64.0), pytest.approx(0.1 / math.sqrt(2))),
        (pytest.approx(128.0), pytest.approx(0.05)),
    ]


@pytest.mark.parametrize("kind", [DontDecay, Seesaw])
def test_a_decay_of_another_run_is_not_one_of_this(kind: Any) -> None:
    policy = kind()
    assert policy.propose(measurement(update=900, lr=0.1, peak_lr=0.1)) == 32.0
    assert policy.propose(measurement(update=910, lr=0.05, peak_lr=0.1)) == 64.0
    assert policy.propose(measurement(update=10, lr=0.01, peak_lr=0.01)) == 32.0
    assert policy.propose(measurement(update=20, lr=0.005, peak_lr=0.01)) == 64.0


@pytest.mark.parametrize("policy", [DontDecay(), Seesaw()])
def test_a_warm_up_is_no_decay(policy):
    rates = [0.01, 0.05, 0.1]
    assert run(policy, rates) == [(32.0, rate) for rate in rates]
    assert policy.lr_factor(32, 32, 0.5) == 1.0  # above the highest rate that was seen at a decision


def test_a_smooth_schedule_moves_in_steps():
    rates = (0.1 * np.cos(np.linspace(0, 1.4, 1000))).tolist()
    sizes = [size for size, _ in run(Seesaw(step=1.2), rates)]
    changes = [b / a for a, b in itertools.pairwise(sizes) if a != b]
    assert 5 < len(changes) < 12
    assert min(changes) >= 1.18  # sizes are whole


def test_a_restart_of_the_schedule_does_not_take_the_rate_above_its_peak():
    policy = DontDecay()
    run(policy, [0.1, 0.001])
    assert 0.1 * policy.lr_factor(3200, 32, 0.1) == pytest.approx(0.1)  # a batch of before the restart
    assert policy.propose(measurement(batch_size=3200, lr=0.1)) == 32.0


@pytest.mark.parametrize("lr", [0.0, math.nan, -1.0])
def test_no_rate_no_change(lr):
    assert DontDecay().propose(measurement(batch_size=48, lr=lr)) == 48.0


def test_the_peak_is_kept_in_the_state():
    one, other = DontDecay(), DontDecay()
    run(one, [0.1, 0.05])
    other.load_state_dict(one.state_dict())
    assert other.propose(measurement(lr=0.02)) == one.propose(measurement(lr=0.02)) == pytest.approx(160)
    assert one.reason(measurement(lr=0.02), 160) == "the schedule has the learning rate at 0.2 of its peak"
    with pytest.raises(ValueError, match="not the state of a DontDecay"):
        other.load_state_dict({"peak": -1.0})


@pytest.mark.parametrize("m", [2.0, 4.0])
def test_growing_the_batch_reaches_the_same_stationary_loss_as_decaying_the_rate(m):
    # Noisy quadratic (Zhang et al. 2019): h/2 E theta^2 = lr c / (2 B (2 - lr h)), in the limit of a small rate.
    def stationary(lr: float, size: float, h: float = 1.0, c: float = 3.0) -> float:
        theta = 0.0
        for _ in range(20_000):
            theta = (1 - lr * h) ** 2 * theta + lr**2 * c / size
        assert theta == pytest.approx(lr * c / (size * h * (2 - lr * h)))
        return theta

    (_, first), (grown, rate) = run(DontDecay(), [0.01, 0.01 / m])
    assert grown == 32 * m
    assert rate == pytest.approx(first)
    assert stationary(rate, grown) == pytest.approx(stationary(0.01 / m, 32), rel=0.01)
    assert stationary(rate, grown) == pytest.approx(stationary(0.01, 32) / m)


def test_schedules_are_not_measured():
    policies: list[Any] = [
        GeometricGrowth(),
        LinearRamp(None, 64, 1),
        CriticalBatchWarmup({0: 1}),
        DontDecay(),
        Seesaw(),
    ]
    assert not any(map(is_measured, policies))


@pytest.mark.parametrize("policy", ["dont_decay", "seesaw"])
def test_a_peak_between_two_decisions_counts(policy):
    controller = BatchSizeController(policy, lr_scaling="none", reference_batch_size=32)
    for update in range(1, 21):
        lr = 0.1 if update <= 7 else 0.01
        controller.observe(Measurement(update=update, batch_size=32, reference_batch_size=32, loss=1.0, lr=lr))
    assert controller.batch_size == 320
    history = History()
    again = BatchSizeController(policy, lr_scaling="none", reference_batch_size=32)
    again.record = history.measurements.append
    for update in range(1, 21):
        lr = 0.1 if update <= 7 else 0.01
        again.observe(Measurement(update=update, batch_size=32, reference_batch_size=32, loss=1.0, lr=lr))
    assert [change.batch_size for change in replay(history, policy)] == [320]


def test_a_warm_up_from_zero_has_a_reason_too():
    for options in ({"min_batch_size": 64}, {"quantize": True}):
        controller = BatchSizeController("dont_decay", lr_scaling="none", reference_batch_size=32, **options)
        for update in range(1, 31):
            controller.observe(Measurement(update=update, batch_size=32, reference_batch_size=32, loss=1.0, lr=0.0))
        assert controller.batch_size == options.get("min_batch_size", 32)
