from __future__ import annotations

import json
import math
import pickle
import re
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from adaptive_batch.measurement import Measurement
from adaptive_batch.policies import (
    CABS,
    BigBatch,
    Clamp,
    Constant,
    CriticalBatchWarmup,
    DontDecay,
    FunctionPolicy,
    GeometricGrowth,
    Goodput,
    GradientDiversity,
    InnerProductTest,
    LinearRamp,
    LossProportional,
    Max,
    Milestones,
    Min,
    NoiseScale,
    NormTest,
    OnlyGrow,
    Plateau,
    Seesaw,
    Sequential,
    is_measured,
    resolve_policy,
)
from adaptive_batch.throughput import StepTimeModel


def step_time(seconds: Callable[[int], float], sizes: Iterable[int]) -> StepTimeModel:
    model = StepTimeModel()
    for _ in range(3):
        for size in sizes:
            model.update(size, seconds(size))
    return model


def affine(alpha: float, beta: float, sizes: Iterable[int] = (16, 32, 64)) -> StepTimeModel:
    return step_time(lambda size: alpha + beta * size, sizes)


def measurement(**fields: Any) -> Measurement:
    return Measurement(**{"batch_size": 32, "reference_batch_size": 32, **fields})


# Goodput


def test_goodput_is_throughput_times_efficiency():
    m = measurement(noise_scale=300.0, step_time=affine(0.02, 4e-4))
    assert Goodput().goodput(32, m) == pytest.approx(32 / 0.0328)  # efficiency 1 at the reference
    assert Goodput().goodput(128, m) == pytest.approx(128 / 0.0712 * 332 / 428)
    assert Goodput().goodput(16, m) == pytest.approx(16 / 0.0264 * 332 / 316)  # above 1 below the reference


def test_goodput_efficiency_counts_from_the_reference_and_not_from_the_present_size():
    m = measurement(batch_size=128, noise_scale=300.0, step_time=affine(0.02, 4e-4))
    assert Goodput().goodput(128, m) == pytest.approx(128 / 0.0712 * 332 / 428)


def test_goodput_proposes_the_closed_form_optimum():
    m = measurement(noise_scale=300.0, step_time=affine(0.02, 4e-4))
    assert Goodput().propose(m) == pytest.approx(122.474, rel=1e-4)


@pytest.mark.parametrize("present", [1, 32, 37, 4096])
@pytest.mark.parametrize("phi", [1.0, 30.0, 4e3, 1e6])
@pytest.mark.parametrize(("alpha", "beta"), [(0.02, 4e-4), (1e-3, 1e-6), (1e-4, 1e-4)])
def test_goodput_proposes_the_closed_form_optimum_from_anywhere(present, phi, alpha, beta):
    m = measurement(batch_size=present, noise_scale=phi, step_time=affine(alpha, beta))
    best = min(max(math.sqrt(phi * alpha / beta), 1.0), 1024.0 * max(present, 64))
    assert Goodput().propose(m) == pytest.approx(best, rel=1e-6)


def test_goodput_finds_the_grid_maximum_of_a_bent_step_time():
    times = {16: 1.0, 32: 1.1, 64: 1.2, 128: 2.6, 256: 5.6, 512: 9.0}
    m = measurement(noise_scale=900.0, step_time=step_time(times.__getitem__, times))
    grid = np.geomspace(1, 4096, 20_001)
    best = max(Goodput().goodput(size, m) for size in grid)
    assert Goodput().goodput(Goodput().propose(m), m) >= best * (1 - 1e-12)


def test_goodput_does_not_go_beyond_a_size_where_throughput_halves():
    def seconds(size: int) -> float:
        return 0.002 + (5e-5 * size if size <= 2048 else 1e-4 * size)

    sizes = (256, 512, 1024, 2048)
    m = measurement(batch_size=2048, noise_scale=1e7, step_time=step_time(seconds, sizes))
    assert Goodput().propose(m) > 4096  # nothing tells of the cliff yet
    m = replace(m, batch_size=4096, step_time=step_time(seconds, (*sizes, 4096)))
    assert Goodput().propose(m) == pytest.approx(2048)
    assert Goodput().goodput(2048, m) > 1.8 * Goodput().goodput(4096, m)


def test_goodput_shrinks_where_time_is_proportional_to_the_batch():
    m = measurement(noise_scale=300.0, step_time=affine(0.0, 4e-4))
    assert Goodput().propose(m) == pytest.approx(1.0)


def test_goodput_is_finite_where_samples_cost_nothing():
    m = measurement(noise_scale=300.0, step_time=affine(0.02, 0.0))
    assert Goodput().propose(m) == 1024 * 64


@pytest.mark.parametrize("phi", [0.0, math.inf])
def test_goodput_is_finite_at_the_limits_of_the_noise_scale(phi):
    m = measurement(noise_scale=phi, step_time=affine(0.02, 4e-4))
    assert Goodput().propose(m) == (1.0 if phi == 0 else pytest.approx(1024 * 64))


@pytest.mark.parametrize(
    "fields",
    [
        {"noise_scale": math.nan, "step_time": affine(0.02, 4e-4)},
        {"noise_scale": -5.0, "step_time": affine(0.02, 4e-4)},
        {"noise_scale": 300.0, "step_time": None},
        {"noise_scale": 300.0, "step_time": StepTimeModel()},
        {"noise_scale": 300.0, "step_time": affine(0.02, 4e-4, [48])},
        {"noise_scale": 300.0, "step_time": affine(0.02, 4e-4, [16])},
    ],
    ids=["no noise", "negative noise", "no model", "nothing timed", "present timed only", "no slope"],
)
def test_goodput_stays_while_something_is_not_known(fields):
    m = measurement(batch_size=48, **fields)
    assert Goodput().propose(m) == 48.0
    assert Goodput().reason(m, 48)


def test_goodput_reason_of_a_change_promises_a_gain():
    m = measurement(noise_scale=410.0, interval=(350.0, 480.0), step_time=affine(0.02, 4e-4))
    # 64/0.0456 * 442/474 over 32/0.0328
    assert Goodput().reason(m, 64) == "noise scale 410 [350, 480], predicted +34 % goodput"
    assert Goodput().reason(replace(m, interval=(math.nan, math.nan)), 64).startswith("noise scale 410, ")


def test_goodput_reason_for_staying_says_what_a_sample_costs():
    m = measurement(noise_scale=400.0, step_time=affine(2e-4, 5e-5))
    expected = "noise scale 400, an update takes 200 us + 50 us per sample, goodput is best at 40 (+0 %)"
    assert Goodput().reason(m, 32) == expected


def test_goodput_reason_names_what_is_missing():
    assert Goodput().reason(measurement(step_time=affine(1.0, 1.0)), 64) == "noise scale not identified"
    assert Goodput().reason(measurement(noise_scale=26.75), 64) == "noise scale 26.8, step time not known"


# NoiseScale


def test_noise_scale_is_a_multiple_of_phi():
    assert NoiseScale().propose(measurement(noise_scale=300.0)) == 300.0
    assert NoiseScale(0.5).propose(measurement(noise_scale=300.0)) == 150.0


def test_noise_scale_weighs_overhead_by_the_square_root():
    m = measurement(noise_scale=300.0, step_time=affine(0.02, 4e-4))
    assert NoiseScale(overhead_ratio=50.0).propose(m) == pytest.approx(122.474, rel=1e-5)
    assert NoiseScale(overhead_ratio="measured").propose(m) == pytest.approx(122.474, rel=1e-5)
    assert NoiseScale(2.0, overhead_ratio=50).propose(m) == pytest.approx(244.949, rel=1e-5)


@pytest.mark.parametrize(
    ("policy", "fields"),
    [
        (NoiseScale(), {"noise_scale": math.nan}),
        (NoiseScale(), {"noise_scale": math.inf}),
        (NoiseScale(), {"noise_scale": -3.0}),
        (NoiseScale(overhead_ratio=50), {"noise_scale": -3.0}),
        (NoiseScale(overhead_ratio="measured"), {"noise_scale": 300.0}),
        (NoiseScale(overhead_ratio="measured"), {"noise_scale": 300.0, "step_time": StepTimeModel()}),
        (NoiseScale(overhead_ratio="measured"), {"noise_scale": 300.0, "step_time": affine(0.1, 0.0)}),
    ],
)
def test_noise_scale_stays_while_something_is_not_known(policy, fields):
    assert policy.propose(measurement(batch_size=48, **fields)) == 48.0


def test_noise_scale_needs_step_times_only_where_it_measures_them():
    assert NoiseScale().needs == NoiseScale(overhead_ratio=5).needs == {"noise"}
    assert NoiseScale(overhead_ratio="measured").needs == {"noise", "step_time"}


def test_noise_scale_reason_has_its_interval():
    m = measurement(noise_scale=26.754, interval=(20.0, math.inf))
    assert NoiseScale().reason(m, 32) == "noise scale 26.8 [20, inf]"


@pytest.mark.parametrize("arguments", [{"multiplier": 0}, {"multiplier": math.nan}, {"overhead_ratio": -1}])
def test_noise_scale_refuses_arguments_without_a_size(arguments):
    with pytest.raises(ValueError, match="gives no size"):
        NoiseScale(**arguments)


def test_noise_scale_refuses_an_unknown_overhead():
    with pytest.raises(ValueError, match="'guessed'"):
        NoiseScale(overhead_ratio="guessed")  # type: ignore[arg-type]


# Constant


def test_constant_is_the_reference_or_its_own_size():
    m = measurement(batch_size=64, reference_batch_size=32)
    assert Constant().propose(m) == 32.0
    assert Constant(100).propose(m) == 100.0


def test_constant_refuses_an_empty_batch():
    with pytest.raises(ValueError, match="batch_size=0"):
        Constant(0)


# Milestones


@pytest.mark.parametrize(("unit", "field"), [("epochs", "epoch"), ("updates", "update"), ("samples", "samples")])
def test_milestones_hold_from_their_position_on(unit, field):
    policy = Milestones({10: 128, 5: 64}, unit=unit)
    sizes = {x: policy.propose(measurement(**{field: x})) for x in (0, 4, 5, 9, 10, 1000)}
    assert sizes == {0: 32.0, 4: 32.0, 5: 64.0, 9: 64.0, 10: 128.0, 1000: 128.0}


def test_milestones_can_start_at_a_size_of_their_own_and_shrink():
    policy = Milestones({0.0: 256, 3: 16})
    assert [policy.propose(measurement(epoch=epoch)) for epoch in range(4)] == [256.0] * 3 + [16.0]


def test_milestones_leave_the_callers_mapping_alone():
    sizes = {5: 64, 0: 32}
    policy = Milestones(sizes)
    sizes[5] = 1
    assert policy.propose(measurement(epoch=5)) == 64.0


def test_milestones_reason_names_the_position():
    policy = Milestones({2: 64}, unit="updates")
    assert policy.reason(measurement(update=7), 64) == "milestone at 2 updates"
    assert policy.reason(measurement(update=1), 32) == "before the first milestone"


@pytest.mark.parametrize(
    ("milestones", "unit", "message"),
    [
        ({}, "epochs", "empty"),
        ({-1: 32}, "epochs", "position -1"),
        ({math.nan: 32}, "epochs", "position nan"),
        ({0.5: 32}, "epochs", "whole epochs"),
        ({math.inf: 32}, "epochs", "position inf"),
        ({1: 0}, "updates", "size 0"),
        ({1: 32}, "steps", "epochs, updates, samples"),
    ],
)
def test_milestones_refuse_what_is_no_schedule(milestones, unit, message):
    with pytest.raises(ValueError, match=message):
        Milestones(milestones, unit=unit)


# resolve_policy


@pytest.mark.parametrize(
    "policy",
    [
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
    ],
)
def test_policies_by_name(policy: Any):
    assert policy.name == re.sub(r"(?<=[a-z])(?=[A-Z])", "_", policy.__name__).lower()
    assert type(resolve_policy(policy.name)) is policy


def test_an_unknown_name_lists_the_known():
    with pytest.raises(ValueError, match=r"'goodputs'.*constant, .*goodput, .*sequential"):
        resolve_policy("goodputs")


@pytest.mark.parametrize("policy", [Clamp, CriticalBatchWarmup, LinearRamp, Max, Milestones, Min, OnlyGrow, Sequential])
def test_a_name_without_its_arguments_says_what_to_pass(policy):
    name = re.sub(r"(?<=[a-z])(?=[A-Z])", "_", policy.__name__).lower()
    with pytest.raises(ValueError, match=rf"'{name}' needs arguments: pass {policy.__name__}\(\.\.\.\)"):
        resolve_policy(name)


def test_an_object_with_propose_is_taken_as_it_is():
    class Mine:
        def propose(self, measurement: Measurement) -> float:
            return 7.0

    mine = Mine()
    assert resolve_policy(mine) is mine
    assert not is_measured(mine)


def test_a_function_is_a_policy_that_needs_nothing():
    def halve(measurement: Measurement) -> float:
        return measurement.batch_size / 2

    policy = resolve_policy(halve)
    assert isinstance(policy, FunctionPolicy)
    assert policy.propose(measurement(batch_size=64)) == 32.0
    assert (policy.name, policy.needs) == ("halve", frozenset())


def test_a_function_can_ask_for_statistics():
    def follow(measurement: Measurement) -> float:
        return measurement.noise_scale

    follow.needs = {"noise"}  # type: ignore[attr-defined]
    policy = resolve_policy(follow)
    assert isinstance(policy, FunctionPolicy)
    assert policy.needs == {"noise"}
    assert not is_measured(policy)


def test_a_policy_that_needs_an_unknown_statistic_is_refused():
    class Mine:
        needs = frozenset({"noise", "weather"})

        def propose(self, measurement: Measurement) -> float:
            return 7.0

    with pytest.raises(ValueError, match=r"weather.*noise, variance, inner_products and step_time"):
        resolve_policy(Mine())


@pytest.mark.parametrize("policy", [None, 64, Goodput])
def test_what_is_no_policy_is_refused(policy):
    with pytest.raises(TypeError, match=r"is not a policy|is a class"):
        resolve_policy(policy)


class _WithoutArgument:
    def propose(self) -> float:
        return 7.0


class _Number:
    propose = 7


@pytest.mark.parametrize("policy", [lambda: 7, lambda m, n: 7, _WithoutArgument(), _Number()])
def test_what_does_not_take_a_measurement_is_refused_at_once(policy: Any) -> None:
    with pytest.raises(TypeError, match="take one argument, a measurement"):
        resolve_policy(policy)


@pytest.mark.parametrize("policy", [lambda m, n=3: 7, lambda *m: 7])
def test_what_can_be_called_with_a_measurement_is_a_policy(policy: Any) -> None:
    assert resolve_policy(policy).propose(Measurement()) == 7


def test_only_built_in_policies_that_measure_count_as_measured():
    assert is_measured(Goodput()) and is_measured(NoiseScale())
    assert not is_measured(Constant()) and not is_measured(Milestones({1: 2}))


WRONG: Any = "a"
"""What is no number and no mapping."""
ENDLESS: Any = math.inf
NOTHING: Any = []


@pytest.mark.parametrize(
    ("make", "name"),
    [
        (lambda: Constant(WRONG), "batch_size"),
        (lambda: Milestones({0: WRONG}), "milestones"),
        (lambda: Milestones({WRONG: 64}), "position"),
        (lambda: NormTest(WRONG), "theta"),
        (lambda: InnerProductTest(WRONG), "theta"),
        (lambda: BigBatch(WRONG), "delta"),
        (lambda: CABS(WRONG), "c"),
        (lambda: CABS(smoothing=WRONG), "smoothing"),
        (lambda: GradientDiversity(WRONG), "delta"),
        (lambda: LossProportional(WRONG), "minimum"),
        (lambda: LossProportional(initial_loss=WRONG), "initial_loss"),
        (lambda: Plateau(WRONG), "factor"),
        (lambda: Plateau(threshold=WRONG), "threshold"),
        (lambda: CriticalBatchWarmup({0: WRONG}), "critical"),
        (lambda: GeometricGrowth(WRONG), "factor"),
        (lambda: GeometricGrowth(every=WRONG), "every"),
        (lambda: GeometricGrowth(start=WRONG), "start"),
        (lambda: LinearRamp(None, WRONG, 3), "end"),
        (lambda: DontDecay(WRONG), "step"),
        (lambda: NoiseScale(WRONG), "multiplier"),
        (lambda: NoiseScale(overhead_ratio=NOTHING), "overhead_ratio"),
        (lambda: Clamp("constant", max_batch_size=WRONG), "max_batch_size"),
    ],
)
def test_what_is_no_number_is_refused_by_name(make, name):
    with pytest.raises(ValueError, match=f"{name}.*is not a number: pass one"):
        make()


@pytest.mark.parametrize("make", [lambda: Milestones(WRONG), lambda: Sequential(WRONG)])
def test_what_is_no_mapping_is_refused(make):
    with pytest.raises(ValueError, match="is no mapping: pass a dict of positions"):
        make()


def test_sizes_without_end_and_parts_of_epochs_are_refused():
    for make in (
        lambda: Constant(ENDLESS),
        lambda: Milestones({0: ENDLESS}),
        lambda: Clamp("constant", min_batch_size=math.inf),
        lambda: GeometricGrowth(2.0, 0.5),
        lambda: LinearRamp(None, 64, 0.5, unit="epochs"),
        lambda: Plateau(every=0.5),
    ):
        with pytest.raises(ValueError, match=r"pass|use"):
            make()


def test_needs_as_a_string_are_refused():
    class Reads:
        needs = "noise"

        def propose(self, m: Measurement) -> float:
            return 1.0

    def function(m: Measurement) -> float:
        return 1.0

    function.needs = "noise"  # type: ignore[attr-defined]
    for policy in (Reads(), function):
        with pytest.raises(TypeError, match=r"make it a set, \{'noise'\}"):
            resolve_policy(policy)


def test_numbers_of_other_packages_count_as_numbers():
    m = measurement(noise_scale=800.0)
    assert NoiseScale(overhead_ratio=np.int64(50)).propose(m) == NoiseScale(overhead_ratio=50).propose(m) == 200.0  # type: ignore[arg-type]
    policy = LossProportional(initial_loss=np.float32(2.0))  # type: ignore[arg-type]
    policy.load_state_dict(json.loads(json.dumps(policy.state_dict())))
    assert policy.propose(measurement(update=1, loss=1.0)) == 64.0


def test_every_policy_with_arguments_can_be_sent_to_another_process():
    policy = CriticalBatchWarmup({0: 100, 50_000: 300})
    m = measurement(samples=60_000, batch_size=64)
    assert pickle.loads(pickle.dumps(policy)).propose(m) == policy.propose(m) == 128.0
