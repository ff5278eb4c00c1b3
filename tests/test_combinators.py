"""Policies made of policies."""

from __future__ import annotations

import copy
import math
import pickle
from typing import Any

import pytest
from test_controller import Run, controller_of
from test_policies import affine, measurement

from adaptive_batch.measurement import Measurement
from adaptive_batch.policies import (
    CABS,
    BigBatch,
    Clamp,
    Constant,
    DontDecay,
    GeometricGrowth,
    Goodput,
    Max,
    Milestones,
    Min,
    NoiseScale,
    NormTest,
    OnlyGrow,
    Plateau,
    Sequential,
    active_policy,
    constant_size,
    is_measured,
    resolve_policy,
)


def sizes(*proposals: float) -> Any:
    return [lambda m, size=size: size for size in proposals]


def test_clamp_keeps_the_proposals_within_its_bounds():
    policy = Clamp("noise_scale", min_batch_size=50, max_batch_size=100)
    assert [policy.propose(measurement(noise_scale=phi)) for phi in (3.0, 70.0, 900.0)] == [50.0, 70.0, 100.0]
    assert policy.needs == {"noise"}


def test_a_reason_says_what_a_combination_has_made_of_the_proposal():
    def wants(m: Measurement) -> float:
        return 500.0

    m = measurement(noise_scale=70.0)
    for policy, size, words in (
        (Clamp(wants, max_batch_size=100), 100, "wants proposes 500, 500 is wanted, but Clamp leaves 100"),
        (Clamp(wants, max_batch_size=1000), 500, "wants proposes 500"),
        (Clamp("noise_scale", min_batch_size=80), 80, "noise scale 70, 70 is wanted, but Clamp leaves 80"),
        (OnlyGrow(lambda m: 8), 32, "<lambda> proposes 8, 8 is wanted, but OnlyGrow leaves 32"),
        (Max(wants, "constant"), 500, "wants proposes 500"),
        (Max(wants, "noise_scale"), 500, "wants proposes 500"),
        (Min(wants, "noise_scale"), 70, "noise_scale: noise scale 70"),
        (Sequential({0: OnlyGrow(wants)}), 500, "wants proposes 500"),
        (
            Clamp(Milestones({0: 300}), max_batch_size=100),
            100,
            "milestone at 0 epochs, 300 is wanted, but Clamp leaves 100",
        ),
    ):
        assert policy.propose(m) == size
        assert policy.reason(m, size) == words


@pytest.mark.parametrize(
    ("policy", "size"),
    [
        (Constant(), 32), (Constant(64), 64), (Clamp("constant"), 32), (Clamp("constant", max_batch_size=8), 8),
        (OnlyGrow("constant"), 32), (Sequential({0: "constant"}), 32), (Sequential({3: Constant(32)}), 32),
        (Sequential({3: Constant(64)}), None), (Max("constant", Clamp("constant")), 32), (Goodput(), None),
        (Max("constant", "goodput"), None),
    ],
)  # fmt: skip
def test_what_is_always_proposed_is_known_without_asking(policy, size):
    assert constant_size(policy, 32) == size


@pytest.mark.parametrize("bounds", [(0, None), (10, 5), (None, 0)])
def test_clamp_refuses_bounds_without_a_size(bounds):
    with pytest.raises(ValueError, match="leave no size"):
        Clamp("constant", min_batch_size=bounds[0], max_batch_size=bounds[1])


def test_only_grow_never_proposes_less_than_the_present_size():
    policy = OnlyGrow(NoiseScale())
    assert policy.propose(measurement(noise_scale=3.0)) == 32.0
    assert policy.propose(measurement(noise_scale=99.0)) == 99.0


def test_one_policy_around_another_is_that_policy_in_all_else():
    policy = OnlyGrow(Clamp("goodput", max_batch_size=64))
    m = measurement(noise_scale=300.0, step_time=affine(0.02, 4e-4))
    assert policy.propose(m) == 64.0
    assert policy.goodput(64, m) == Goodput().goodput(64, m)
    assert policy.needs == Goodput.needs
    assert is_measured(policy)
    assert not is_measured(OnlyGrow("plateau"))
    assert not hasattr(policy, "state_dict")
    assert OnlyGrow(Plateau()).state_dict() == Plateau().state_dict()
    assert OnlyGrow(CABS()).lr_factor(64, 32) == 1.0
    for copied in (copy.deepcopy(policy), pickle.loads(pickle.dumps(policy))):
        assert copied.propose(m) == 64.0


def test_not_finite_proposals_pass_through_unbounded():
    for policy in (Clamp(lambda m: math.nan, min_batch_size=5), OnlyGrow(lambda m: math.nan)):
        assert math.isnan(policy.propose(measurement()))


def test_max_and_min_take_the_extreme_proposal_and_its_reason():
    m = measurement(noise_scale=100.0, epoch=20)
    both = ("noise_scale", GeometricGrowth(2.0, 20))
    assert Max(*both).propose(m) == 100.0
    assert Min(*both).propose(m) == 64.0
    policy = Max(*both)
    policy.propose(m)
    assert policy.reason(m, 100) == "noise_scale: noise scale 100"
    assert policy.needs == {"noise"}
    assert Max("goodput", "norm_test", "plateau").needs == {"noise", "step_time", "variance"}


def test_proposals_that_are_not_finite_do_not_count():
    assert Max(*sizes(3.0, math.inf, 5.0, math.nan)).propose(measurement()) == 5.0
    assert Min(*sizes(math.nan, 4.0)).propose(measurement()) == 4.0
    assert math.isnan(Max(*sizes(math.nan)).propose(measurement()))


def test_sequential_switches_at_its_points():
    stages: dict[int, Any] = {0: Constant(10), 3: "noise_scale", 5: lambda m: 7.0}
    policy = Sequential(stages)
    m = [measurement(noise_scale=100.0, epoch=epoch) for epoch in range(7)]
    assert [policy.propose(x) for x in m] == [10.0, 10.0, 10.0, 100.0, 100.0, 7.0, 7.0]
    assert policy.propose(measurement(epoch=4, noise_scale=3.0)) == 3.0
    assert policy.reason(m[4], 3) == "noise_scale: noise scale 100"
    later = Sequential({100: "noise_scale"}, unit="samples")
    assert later.propose(measurement(noise_scale=99.0, samples=50)) == 32.0


def test_the_policy_that_proposed_is_the_one_that_is_measured_or_not():
    stages: dict[int, Any] = {0: GeometricGrowth(), 3: "norm_test"}
    policy = Sequential(stages)
    policy.propose(measurement(epoch=1))
    assert not is_measured(policy)
    policy.propose(measurement(epoch=3))
    assert is_measured(policy)
    assert isinstance(active_policy(policy), NormTest)
    assert is_measured(Max("norm_test")) and not is_measured(Max(BigBatch()))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Max(), "no policies"),
        (lambda: Sequential({}), "no policies"),
        (lambda: Sequential({-1: "constant"}), "position -1"),
        (lambda: Sequential({0: "constant"}, unit="days"), "'days'"),
        (lambda: Min("nonsense"), "'nonsense'"),
        (lambda: Max("constant", DontDecay()), "DontDecay sets the learning rate"),
        (lambda: Sequential({0: CABS()}), "CABS sets the learning rate"),
    ],
)
def test_combinations_without_meaning_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_states_of_the_members_are_kept_and_refused_as_one():
    def make() -> Max:
        return Max(Constant(), BigBatch(), Plateau(patience=0))

    one, other = make(), make()
    for epoch in range(5):
        one.propose(measurement(update=epoch + 1, samples=32 * (epoch + 1), epoch=epoch, loss=1.0, measured_update=9))
    state = one.state_dict()
    other.load_state_dict(state)
    assert other.state_dict() == state
    assert state["members"][0] is None
    before = make()
    for wrong in ({}, {"members": state["members"][1:]}, {"members": [None, state["members"][1], {"best": 1}]}):
        with pytest.raises(ValueError, match="state"):
            before.load_state_dict(wrong)
    assert before.state_dict() == make().state_dict()


def test_a_name_or_a_function_inside_is_resolved():
    assert isinstance(Clamp("goodput").policy, Goodput)
    assert resolve_policy(Max("goodput")).propose(measurement()) == 32.0


class TestUnderTheController:
    def test_goodput_within_a_combination_keeps_its_trial_and_its_promise(self):
        # Without times of passes a larger size is tried once to learn its time, as for goodput alone.
        alone = Run(controller_of("goodput"), passes=False).steps(1500)
        for policy in (Clamp("goodput"), Sequential({0: "goodput"}), Max("goodput")):
            combined = Run(controller_of(policy), passes=False).steps(1500)
            assert [d.batch_size for _, d in combined.changes] == [d.batch_size for _, d in alone.changes]
        assert alone.changes

    def test_a_schedule_is_followed_at_once_while_the_measured_member_waits(self):
        policy = Max("goodput", GeometricGrowth(1.5, 100, unit="updates"))
        run = Run(controller_of(policy), phi=math.inf, time=lambda b: b / 1000).steps(250)
        assert [(update, d.batch_size) for update, d in run.changes] == [(100, 48), (200, 72)]

    def test_a_function_in_a_combination_is_asked_once_per_decision(self):
        asked: list[int] = []

        def count(m: Measurement) -> float:
            asked.append(m.update)
            return 8.0

        Run(controller_of(Max(count, "norm_test")), phi=500.0).steps(600)
        assert asked == list(range(10, 601, 10))

    @pytest.mark.parametrize("policy", ["norm_test", "goodput", "noise_scale"])
    def test_no_step_passes_the_bounds_of_a_clamp(self, policy):
        run = Run(controller_of(Clamp(policy, max_batch_size=100)), phi=5000.0).steps(400)
        assert [d.batch_size for _, d in run.changes] == [64, 100]
        small = Run(controller_of(Clamp(policy, max_batch_size=32)), phi=5000.0, passes=False).steps(400)
        assert not small.changes

    def test_a_size_beyond_a_clamp_is_left_at_once(self):
        controller = controller_of(Clamp("goodput", max_batch_size=100), min_batch_size=8)
        controller.batch_size = 128
        decision = Run(controller, phi=5000.0).steps(40).changes[0][1]
        assert (decision.batch_size, decision.reason) == (100, "128 -> 100: Clamp leaves no larger size")

    @pytest.mark.parametrize(("fixed", "largest"), [("constant", 32), (Constant(100), 100)])
    def test_a_measured_policy_takes_no_step_beyond_a_fixed_one(self, fixed, largest):
        for members in (("goodput", fixed), (fixed, "goodput")):
            run = Run(controller_of(Min(*members)), phi=5000.0, passes=False).steps(600)
            assert max([32, *(d.batch_size for _, d in run.changes)]) == largest
            assert len(run.changes) < 4

    def test_a_policy_does_nothing_before_its_turn(self):
        for policy in ("goodput", "noise_scale", "norm_test"):
            run = Run(controller_of(Sequential({300: policy}, unit="updates")), phi=5000.0).steps(299)
            assert not run.changes
            assert run.steps(200).changes

    def test_what_is_around_a_combination_changes_nothing_else(self):
        for policy in (lambda: Max("norm_test", "constant"), lambda: Max("goodput", "constant")):
            alone, around = (Run(controller_of(p), phi=500.0).steps(600) for p in (policy(), OnlyGrow(Clamp(policy()))))
            assert [(u, d.batch_size) for u, d in around.changes] == [(u, d.batch_size) for u, d in alone.changes]
            assert alone.changes

    def test_on_several_ranks_every_member_answers_as_on_rank_0(self):
        told: list[float] = []

        def of_rank_0(own: float) -> float:
            told.append(own)
            return 40.0 if own == 8.0 else own

        run = Run(controller_of(Max(lambda m: 8.0, Constant(4))))
        run.controller.agree = of_rank_0
        assert [d.batch_size for _, d in run.steps(10).changes] == [40]
        assert told == [8.0, 4.0]

    def test_what_is_no_size_is_refused_with_the_name_of_who_proposed_it(self):
        def nothing(m: Measurement) -> Any:
            return None

        for policy in (Clamp(nothing), Max("constant", nothing), Sequential({0: nothing})):
            with pytest.raises(TypeError, match="nothing proposed None, which is no batch size"):
                Run(controller_of(policy)).steps(10)


def test_the_automatic_rule_is_what_the_members_agree_on():
    class Linear:
        auto_lr_scaling = "linear"

        def propose(self, m: Measurement) -> float:
            return 64.0

    assert [p.auto_lr_scaling for p in (Max(Linear()), Clamp(Linear()), Min(Linear(), "goodput"))] == ["linear"] * 3
    assert Max(Linear(), "plateau").auto_lr_scaling == "none"
    assert not hasattr(Max("goodput", "constant"), "auto_lr_scaling")
