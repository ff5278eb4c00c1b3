"""Decisions of the controller in simulated runs: the truth is known, and nothing reads a clock."""

from __future__ import annotations

import collections
import copy
import io
import itertools
import math
import re
import statistics
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from adaptive_batch import controller as controller_module
from adaptive_batch import measurement as measurement_module
from adaptive_batch.controller import BatchSizeController, Decision
from adaptive_batch.lr_scaling import gain
from adaptive_batch.measurement import Measurement
from adaptive_batch.noise import GradientNoiseScale
from adaptive_batch.noise.schedule import measures_noise
from adaptive_batch.policies import (
    CABS,
    Constant,
    Goodput,
    GradientDiversity,
    InnerProductTest,
    LossProportional,
    Milestones,
    NoiseScale,
    NormTest,
)

B0 = 32
D = 50  # effective dimensions of the gradient noise
MEASURED = [
    CABS(),
    GradientDiversity(1.0),
    InnerProductTest(0.2),
    LossProportional(),
    NoiseScale(),
    NormTest(),
]
SENTENCE = re.compile(
    r"^\d+ -> \d+: noise scale [\d.]+ \[[\d.]+, ([\d.]+|inf)\], "
    r"(predicted [+-]\d+ % goodput|to learn the time of a larger update)$"
)


def controller_of(policy: Any = "goodput", **options: Any) -> BatchSizeController:
    options = {"lr_scaling": "adascale", "reference_batch_size": B0, "max_batch_size": 4096, **options}
    return BatchSizeController(policy, **options)


def part_norms(rng: np.random.Generator, phi: float, sizes: list[int]) -> tuple[list[float], float]:
    """Of parts with ``|G|^2 = 1`` and ``tr(Sigma) = phi`` in ``D`` equal directions (``phi`` inf: G = 0)."""
    signal, variance = (0.0, 1.0) if math.isinf(phi) else (1.0, phi)
    parts = rng.standard_normal((len(sizes), D)) * np.sqrt(variance / D / np.array(sizes))[:, None]
    parts[:, 0] += signal
    whole = np.array(sizes) @ parts / sum(sizes)
    return (parts**2).sum(1).tolist(), float(whole @ whole)


class Run:
    """A run that takes ``time(B)`` seconds for an update and has the noise scale ``phi(run)``."""

    def __init__(
        self,
        controller: BatchSizeController,
        *,
        phi: float | Callable[[Run], float] = 320.0,
        time: Callable[[int], float] = lambda b: 2.0 + b / 32,
        seed: int = 0,
        jitter: float = 0.1,
        passes: bool = True,
        edit: Callable[[Measurement], Measurement] = lambda m: m,
    ) -> None:
        self.controller, self.time, self.jitter, self.passes, self.edit = (
            controller,
            time,
            jitter,
            passes,
            edit,
        )
        self.phi = phi if callable(phi) else lambda run: phi
        self.rng = np.random.default_rng(seed)
        self.batch_size = controller.batch_size or B0
        self.update = self.samples = 0
        self.changes: list[tuple[int, Decision]] = []
        self.notes: list[str] = []
        self.sizes: list[int] = []

    def seconds(self, samples: int) -> float:
        slow = 10.0 if self.jitter and self.rng.random() < 0.01 else 1.0
        return self.time(samples) * slow * math.exp(self.jitter * self.rng.standard_normal())

    def measurement(self, samples: int) -> Measurement:
        fields: dict[str, Any] = {}
        sizes = [samples]
        if measures_noise(self.update - 1) and samples > 1:
            sizes = [samples - samples // 2, samples // 2]
            norms, norm = part_norms(self.rng, self.phi(self), sizes)
            fields = {"part_sq_norms": norms, "part_sizes": sizes, "sq_norm": norm}
        times = [self.seconds(size) for size in sizes]
        if self.passes:
            fields |= {"pass_sizes": sizes, "pass_seconds": times}
        return Measurement(
            update=self.update,
            samples=self.samples,
            batch_size=samples,
            reference_batch_size=B0,
            loss=1.0,
            seconds=sum(times),
            **fields,
        )

    def step(self, samples: int | None = None) -> Decision | None:
        samples = samples or self.batch_size
        self.update += 1
        self.samples += samples
        self.sizes.append(samples)
        decision = self.controller.observe(self.edit(self.measurement(samples)))
        if decision is not None:
            self.batch_size = decision.batch_size
            self.changes.append((self.update, decision))
        note = self.controller.note
        if note is not None and note not in self.notes[-1:]:
            self.notes.append(note)
        return decision

    def steps(self, updates: int) -> Run:
        for _ in range(updates):
            self.step()
        return self


def with_estimates(phi: float, spread: float = 0.0) -> Callable[[Measurement], Measurement]:
    """Norms that give exactly ``|G|^2 = 1 +- spread`` in turn, and ``tr(Sigma) = phi``."""
    signs = itertools.cycle((-1.0, 1.0))

    def edit(m: Measurement) -> Measurement:
        if not m.part_sizes:
            return m
        signal = 1.0 + next(signs) * spread
        norms = [signal + phi / size for size in m.part_sizes]
        return replace(m, part_sq_norms=norms, sq_norm=signal + phi / m.batch_size)

    return edit


def decisions(run: Run) -> list[Decision]:
    return [decision for _, decision in run.changes]


def due(controller: BatchSizeController | None = None) -> int:
    """Of updates 1000 to 20,000 those whose noise is measured, by a controller or by the schedule alone."""
    return sum(map(measures_noise if controller is None else controller.measures_noise, range(1000, 20_000)))


class Asked:
    """A policy that proposes what it is given, one after the other, and remembers what it saw."""

    name = "asked"
    needs: frozenset[str] = frozenset()

    def __init__(self, *proposals: Any) -> None:
        self.proposals = list(proposals)
        self.seen: list[Measurement] = []

    def propose(self, measurement: Measurement) -> float:
        self.seen.append(measurement)
        proposal: float = self.proposals[min(len(self.seen), len(self.proposals)) - 1]
        return proposal


def answers(policy: Any, updates: int, **options: Any) -> list[int]:
    """Sizes in force after each question, for a policy asked at every update."""
    controller = controller_of(policy, lr_scaling="none", **{"adjust_every": 1, "max_batch_size": None, **options})
    run = Run(controller, jitter=0.0)
    return [(run.step(), run.batch_size)[1] for _ in range(updates)]


class TestGoodputInSimulation:
    @pytest.mark.parametrize("seed", range(3))
    @pytest.mark.parametrize(
        ("phi", "alpha", "beta"),
        [(32.0, 2.0, 1 / 32), (160.0, 2.0, 1 / 32), (320.0, 8.0, 1 / 32), (500.0, 1.0, 1 / 100)],
    )
    def test_settles_near_the_optimum(self, phi, alpha, beta, seed):
        run = Run(controller_of(), phi=phi, time=lambda b: alpha + beta * b, seed=seed).steps(3000)
        optimum = math.sqrt(phi * alpha / beta)
        assert optimum / 2 <= run.batch_size <= 2 * optimum
        assert len(run.changes) <= 8

    def test_every_change_is_a_step_of_two_after_a_dwell_and_says_why(self):
        run = Run(controller_of(), phi=lambda r: 320.0 if r.update < 800 else 5.0).steps(8000)
        assert max(run.sizes) >= 128
        assert run.batch_size == B0  # it shrinks again
        updates = [0, *(update for update, _ in run.changes)]
        assert min(np.diff(updates)) >= controller_module.MIN_DWELL
        for decision in decisions(run):
            assert max(decision.batch_size, decision.previous) == 2 * min(decision.batch_size, decision.previous)
            assert SENTENCE.match(decision.reason), decision.reason
            assert float(decision.reason.split("predicted ")[1].split(" %")[0]) >= 5

    @pytest.mark.parametrize("seed", range(4))
    def test_step_time_proportional_to_the_batch_never_grows_and_says_why(self, seed):
        run = Run(controller_of(), time=lambda b: b / 1000, seed=seed).steps(1500)
        assert run.changes == []
        costs = [re.search(r"an update of 64 takes ([\d.]+) times as long", note) for note in run.notes]
        assert any(cost is not None and 1.7 < float(cost[1]) < 2.3 for cost in costs), run.notes

    def test_noise_that_could_change_nothing_is_measured_a_quarter_as_often(self):
        controller = controller_of()
        assert due(controller) == due()  # before anything is known
        run = Run(controller, phi=1e4, time=lambda b: b / 1000, jitter=0.0).steps(20)
        assert math.isfinite(controller.step_time.beta) and due(controller) == due()  # a few times tell little
        run.steps(180)
        assert due(controller) == pytest.approx(due() / 4, abs=1)
        restored = controller_of()
        restored.load_state_dict(controller.state_dict())
        assert due(restored) == due(controller)

    @pytest.mark.parametrize(
        ("policy", "options", "phi", "time"),
        [
            ("goodput", {}, 10.0, lambda b: 2.0 + b / 32),
            ("goodput", {"max_batch_size": B0}, 1e4, lambda b: 2.0 + b / 32),
            ("goodput", {}, 1e4, lambda b: max(1.0, b / 64)),
            ("goodput", {"lr_scaling": "sqrt", "min_batch_size": B0 // 2}, 1e4, lambda b: b / 1000),
            ("goodput", {"quantize": False}, 10.0, lambda b: b / 1000),
            ("noise_scale", {}, 10.0, lambda b: b / 1000),
        ],
        ids=[
            "a larger size might pay",
            "above the maximum one might",
            "the rate follows it",
            "a smaller size might pay",
            "each proposal counts",
            "no time",
        ],
    )
    def test_noise_that_could_change_something_is_measured_as_often_as_ever(self, policy, options, phi, time):
        controller = controller_of(policy, **options)
        Run(controller, time=time, jitter=0.0, edit=with_estimates(phi)).steps(400)
        assert due(controller) == due()

    def test_noise_is_measured_again_when_a_larger_size_may_pay_after_all(self):
        run = Run(controller_of(), phi=1e4, time=lambda b: b / 1000, jitter=0.0).steps(200)
        assert due(run.controller) < due()
        run.time = lambda b: 0.1 if b == B0 else b / 1000  # passes as before, an update much more
        run.passes = False
        assert due(run.steps(100).controller) == due()

    def test_a_promise_below_five_per_cent_is_not_worth_a_change(self):
        run = Run(controller_of(), jitter=0.0, edit=with_estimates(38.0)).steps(600)
        assert run.changes == []
        assert "32 stays: noise scale 38 [38, 38], 64 promises +3 % goodput, less than +5 %" in run.notes[-1]

    def test_a_change_must_be_right_at_the_pessimistic_end_of_the_interval(self):
        run = Run(controller_of(), jitter=0.0, edit=with_estimates(45.0, spread=0.9)).steps(40)
        assert run.changes == []
        assert run.notes[-1].endswith("does not rule out a loss of goodput at 64")
        assert run.controller.noise_scale == pytest.approx(45, rel=0.2)
        certain = Run(controller_of(), jitter=0.0, edit=with_estimates(45.0)).steps(40)
        assert [d.batch_size for d in decisions(certain)] == [64]

    def test_at_the_maximum_no_cost_is_blamed_for_staying(self):
        run = Run(controller_of(max_batch_size=B0), phi=math.inf, jitter=0.0).steps(60)
        assert run.notes == ["32 stays: the gradient noise scale is not identified yet"]

    def test_where_growth_pays_at_no_noise_scale_this_is_said_before_one_is_known(self):
        run = Run(controller_of(), phi=math.inf, time=lambda b: b / 1000, jitter=0.0).steps(60)
        assert run.notes[-1] == (
            "32 stays: it would not pay at any noise scale, an update of 64 takes 2.00 times as long"
        )

    def test_a_size_that_turns_out_slow_is_left_again(self):
        cliff = 128
        run = Run(controller_of(), phi=2000.0, time=lambda b: 1 + b / 100 + (b >= cliff) * b / 10).steps(6000)
        assert max(run.sizes) == cliff  # it did try
        assert run.sizes.count(cliff) < 0.1 * len(run.sizes)
        assert run.batch_size == cliff // 2

    def test_the_optimum_is_followed_when_the_noise_scale_jumps(self):
        run = Run(controller_of(), phi=lambda r: min(640.0, 10.0 * math.exp(r.update / 100))).steps(6000)
        assert run.sizes[40] == B0
        assert run.batch_size >= 100

    def test_reasons_to_stay_are_given_once_between_changes(self):
        run = Run(controller_of(), phi=50.0).steps(4000)
        kinds = 6
        assert len(run.notes) <= kinds * (len(run.changes) + 1)
        assert len(run.notes) < 20
        assert all(re.match(r"^\d+ stays: ", note) for note in run.notes)

    def test_a_time_that_no_pass_tells_is_learned_by_one_step(self):
        run = Run(controller_of(), phi=320.0, passes=False).steps(2000)
        first = run.changes[0][1]
        assert (first.previous, first.batch_size) == (B0, 2 * B0)
        assert first.reason.endswith("to learn the time of a larger update")
        assert 70 <= run.batch_size <= 290

    def test_a_smaller_time_that_no_pass_tells_is_learned_by_one_step_down(self):
        controller = controller_of(min_batch_size=B0)
        controller.batch_size = 16 * B0
        run = Run(controller, phi=40.0, passes=False, time=lambda b: b / 32).steps(1500)
        first = run.changes[0][1]
        assert (first.previous, first.batch_size) == (16 * B0, 8 * B0)
        assert first.reason.endswith("to learn the time of a smaller update")
        assert run.batch_size == B0

    @pytest.mark.parametrize("seed", range(4))
    def test_a_size_below_the_noise_scale_is_enough_to_learn_the_time(self, seed):
        run = Run(controller_of(), phi=60.0, passes=False, time=lambda b: 40 + b / 32, seed=seed).steps(1500)
        assert run.batch_size >= 4 * B0  # the best is near 280

    def test_a_step_to_learn_the_time_is_taken_back_where_it_does_not_pay(self):
        run = Run(controller_of(), passes=False, time=lambda b: b / 1000).steps(3000)
        assert [d.batch_size for d in decisions(run)[:2]] == [2 * B0, B0]
        assert run.sizes.count(2 * B0) <= 0.06 * len(run.sizes)

    def test_a_size_left_as_slow_is_tried_again_ever_more_rarely(self):
        def time(samples: int) -> float:
            return 2.0 + samples / 32 + 5.0 * (samples > B0 and slow)

        slow = True
        run = Run(controller_of(), time=time).steps(300)
        assert [d.batch_size for d in decisions(run)] == [2 * B0, B0]  # the machine was slow when it was tried
        slow = False
        run.steps(controller_module.RETRY + 100)
        assert run.batch_size > B0
        always = Run(controller_of(), passes=False, time=lambda b: b / 1000).steps(6000)
        tried = [update for update, d in always.changes if d.batch_size > d.previous]
        assert len(tried) >= 3
        assert all(later > 1.5 * earlier for earlier, later in itertools.pairwise(np.diff(tried)))

    def test_no_step_to_learn_the_time_above_the_noise_scale(self):
        run = Run(controller_of(), passes=False, phi=20.0).steps(500)
        assert run.changes == []
        assert run.notes[-1] == "32 stays: the time of a larger update is not known yet"


class TestHazards:
    """What made other controllers run away."""

    @pytest.mark.parametrize("passes", [True, False])
    def test_without_a_gradient_signal_the_size_grows_no_further_than_the_evidence(self, passes):
        runs = [Run(controller_of(), phi=math.inf, seed=seed, passes=passes).steps(600) for seed in range(12)]
        for run in runs:  # where noise is all, no size is too large; but it takes measurements to know
            grown = [d for d in decisions(run) if d.batch_size > d.previous]
            lows = [float(d.reason.split("[")[1].split(",")[0]) for d in grown]
            assert all(low > d.previous for low, d in zip(lows, grown, strict=True))
        assert max(max(run.sizes) for run in runs) <= 8 * B0

    def test_a_noise_scale_too_large_to_be_identified_is_no_reason_to_stay(self):
        runs = [Run(controller_of(), phi=10_000.0, seed=seed).steps(600) for seed in range(12)]
        assert statistics.median(run.batch_size for run in runs) >= 4 * B0
        unidentified = [run for run in runs if math.isnan(run.controller.noise.noise_scale)]
        assert len(unidentified) > 6
        for run in unidentified:  # the rate follows the least that is certain, which is less than the truth
            most = gain(256, B0, 10_000.0)
            assert 1.0 <= run.controller.lr_factor(256) < most

    @pytest.mark.parametrize("policy", ["goodput", "noise_scale"])
    def test_a_negative_gradient_norm_is_no_evidence(self, policy):
        def negative(m: Measurement) -> Measurement:
            # The whole's norm is below what the parts' noise alone would leave: |G|^2 < 0, significantly.
            return replace(m, part_sq_norms=(9.0, 11.0), sq_norm=3.0 + 0.1 * (m.update % 3)) if m.part_sizes else m

        run = Run(controller_of(policy), edit=negative).steps(600)
        assert run.controller.noise.grad_sq_norm < 0
        assert run.changes == []
        assert run.notes == ["32 stays: the gradient noise scale is not identified yet"]
        assert run.controller.lr_factor(256) == 1.0

    @pytest.mark.parametrize("policy", MEASURED, ids=lambda policy: policy.name)
    def test_no_measured_policy_leaves_its_bounds_or_its_pace(self, policy):
        """Steps of two after a dwell, whatever it measures: G = 0, then a signal, then an update that is not one."""

        def broken(m: Measurement) -> Measurement:
            return replace(m, sq_norm=math.nan, loss=math.inf) if m.update % 11 == 0 else replace(m, lr=0.1)

        policy = copy.deepcopy(policy)
        noise = [math.inf, 300.0, 5.0]
        controller = controller_of(policy, lr_scaling="none")
        run = Run(controller, phi=lambda r: noise[min(r.update // 500, 2)], edit=broken).steps(1500)
        updates = [0, *(update for update, _ in run.changes)]
        assert min(np.diff(updates), default=20) >= controller_module.MIN_DWELL
        assert all(0.5 <= d.batch_size / d.previous <= 2 for d in decisions(run))
        assert all(B0 <= size <= 4096 for size in run.sizes)

    @pytest.mark.parametrize("policy", MEASURED, ids=lambda policy: policy.name)
    def test_no_measured_policy_decides_by_its_first_updates(self, policy):
        for seed in range(5):
            edit = lambda m: replace(m, lr=10.0, loss=1.0 / m.update)  # noqa: E731
            controller = controller_of(copy.deepcopy(policy), lr_scaling="none")
            run = Run(controller, phi=5000.0, seed=seed, edit=edit)
            assert run.steps(controller_module.MIN_DWELL - 1).changes == []

    @pytest.mark.parametrize("seed", range(3))
    @pytest.mark.parametrize("theta", [0.5, 0.8])
    def test_the_norm_test_settles_at_the_first_size_that_passes(self, theta, seed):
        phi = 200.0
        rest = phi * (1 / theta**2 - 1)  # 600 and 112
        run = Run(controller_of(NormTest(theta)), phi=phi, seed=seed).steps(4000)
        assert rest / 2 <= run.batch_size <= 2 * rest
        assert len(run.changes) <= 5

    def test_the_norm_test_grows_where_the_gradient_has_vanished(self):
        # The noise scale is not identified then, but surely large: the plateau that the test was made for.
        run = Run(controller_of(NormTest(0.5), max_batch_size=256), phi=2e5).steps(3000)
        assert math.isnan(run.controller.noise.noise_scale) or run.controller.noise_scale > 1000
        assert run.batch_size == 256

    def test_the_inner_product_test_settles_where_its_closed_form_says(self):
        # Equal noise in D directions, |G| = 1: Var(p) = phi/D + phi^2/(D B), |g_B|^2 = 1 + phi/B.
        # The test asks for phi B / (D theta^2 (B + phi)), and is passed from phi (1 / (D theta^2) - 1) = 155.6 on.
        phi, theta = 400.0, 0.12

        def asked(size: float) -> float:
            return (phi / D + phi**2 / D / size) / (theta * (1 + phi / size)) ** 2

        rest = phi * (1 / (D * theta**2) - 1)
        assert asked(rest) == pytest.approx(rest) == pytest.approx(155.6, abs=0.1)
        sizes = [
            Run(controller_of(InnerProductTest(theta, None)), phi=phi, seed=seed).steps(4000).batch_size
            for seed in range(4)
        ]
        # Its own uncertainty, which has to rule a step out, leaves it below; nothing takes it beyond one step above.
        assert all(64 <= size <= 256 for size in sizes)

    def test_the_first_noisy_updates_decide_nothing(self):
        for seed in range(20):
            run = Run(controller_of(), phi=5000.0, seed=seed).steps(controller_module.MIN_DWELL - 1)
            assert run.changes == []

    def test_outliers_in_seconds_do_not_decide(self):
        def slow(m: Measurement) -> Measurement:
            return replace(m, seconds=1000.0) if m.update % 7 == 0 else m

        plain = Run(controller_of(), phi=160.0).steps(2000)
        outliers = Run(controller_of(), phi=160.0, edit=slow).steps(2000)
        assert outliers.batch_size / plain.batch_size in (0.5, 1.0, 2.0)

    def test_the_first_updates_at_a_size_are_not_timed(self):
        def slow(m: Measurement) -> Measurement:
            return replace(m, seconds=1000.0) if m.update in (1, 2) else m

        run = Run(controller_of(adjust_every=1), jitter=0.0, passes=False, edit=slow)
        for _ in range(12):
            run.step()
            assert not run.controller.step_time.predict(B0) > 10
        assert run.controller.step_time.predict(B0) < 10

    @pytest.mark.parametrize("bad", [math.nan, math.inf, -1.0, 0.0])
    def test_seconds_that_are_no_time_are_not_used(self, bad):
        run = Run(controller_of(), edit=lambda m: replace(m, seconds=bad)).steps(300)
        assert run.changes == []
        assert run.controller.step_time.measured == []
        assert "32 stays: the time of a larger update is not known yet" in run.notes

    @pytest.mark.parametrize("bad", [math.nan, math.inf])
    def test_norms_and_losses_that_are_not_finite_are_not_used(self, bad):
        def sometimes(m: Measurement) -> Measurement:
            norm = bad if m.update % 3 == 0 else m.sq_norm
            return replace(m, loss=bad, sq_norm=norm)

        run = Run(controller_of(), phi=160.0, edit=sometimes).steps(2000)
        assert 64 <= run.batch_size <= 256
        assert math.isfinite(run.controller.noise.grad_sq_norm)

    def test_noise_that_follows_size_over_rate_settles_with_the_scaled_rate(self):
        # The plateau of phi is proportional to B / lr; AdaScale's gain keeps B / lr from running away.
        def phi(run: Run) -> float:
            return 100.0 * run.batch_size / B0 / run.controller.lr_factor(run.batch_size)

        run = Run(controller_of("noise_scale", max_batch_size=4096), phi=phi).steps(6000)
        assert max(run.sizes) < 4096
        assert len(set(run.sizes[-2000:])) == 1

    def test_noise_that_runs_away_stops_at_the_maximum(self):
        run = Run(
            controller_of("noise_scale", max_batch_size=512, lr_scaling="none"),
            phi=lambda r: 2.5 * r.batch_size,
        )
        run.steps(4000)
        assert max(run.sizes) == run.batch_size == 512
        assert run.controller.note is not None
        assert run.controller.note.endswith("max_batch_size is 512")

    @pytest.mark.parametrize("policy", [NormTest(0.3), GradientDiversity(1.0), CABS(20.0), "goodput"])
    def test_a_noise_scale_that_grows_with_the_size_ends_at_the_maximum_and_stays_there(self, policy):
        # An unscaled rate: phi and tr(Sigma) follow B / lr, each growth seems to ask for the next.
        def follows(m: Measurement) -> Measurement:
            return replace(m, lr=0.1, loss=1.0)

        policy = copy.deepcopy(policy)
        controller = controller_of(policy, max_batch_size=512, lr_scaling="none")
        run = Run(controller, phi=lambda r: 3.0 * r.batch_size, edit=follows, time=lambda b: 20 + b / 32).steps(4000)
        assert run.batch_size == 512
        assert len(run.changes) == 4  # straight up, one step of two at a time, and no swinging

    @pytest.mark.parametrize("policy", [NormTest(0.5), NoiseScale(), GradientDiversity(1.0)])
    def test_a_step_time_that_jumps_is_nothing_to_those_that_count_no_time(self, policy):
        runs = [
            Run(controller_of(copy.deepcopy(policy)), time=time).steps(1200)
            for time in (lambda b: 1.0, lambda b: b * (1 + b % 7))
        ]
        assert runs[0].changes == runs[1].changes != []

    @given(phi=st.floats(0, 1e30), size=st.integers(1, 10**6))
    def test_the_rate_is_never_scaled_by_more_than_the_batch(self, phi, size):
        controller = controller_of()
        state = controller.state_dict()
        controller.load_state_dict({**state, "noise_scale": phi})
        factor = controller.lr_factor(size)
        assert min(1.0, size / B0) * (1 - 1e-9) <= factor <= max(1.0, size / B0) * (1 + 1e-9)

    @pytest.mark.parametrize("every", [3, 11, 50])
    def test_the_odd_tail_of_an_epoch_does_not_disturb(self, every):
        run = Run(controller_of(), phi=160.0)
        for i in range(1, 2001):
            run.step(7 if i % every == 0 else None)
        assert 64 <= run.batch_size <= 256
        assert all(size >= B0 for size in run.controller.step_time.measured)

    @pytest.mark.parametrize("ahead", [0, 5, 16, 64])
    @pytest.mark.parametrize("policy", ["goodput", "noise_scale"])
    def test_a_size_is_kept_for_twenty_updates_that_were_made_at_it(self, policy, ahead):
        run = Run(controller_of(policy), phi=1000.0, time=lambda b: 1 + b / 100)
        drawn = collections.deque([B0] * ahead)
        made: collections.Counter[int] = collections.Counter()
        while run.update < 1500:
            drawn.append(run.batch_size)
            size = drawn.popleft()
            made[size] += 1
            decision = run.step(size)
            if decision is not None:
                assert made[decision.previous] >= controller_module.MIN_DWELL
                made.clear()
        assert len(run.changes) >= 3

    def test_with_many_batches_ahead_a_size_that_turns_out_slow_is_still_left_again(self):
        run = Run(controller_of(), phi=300.0, time=lambda b: 0.01 + b / 1e6 if b < 100 else 0.05)
        drawn = collections.deque([B0] * 16)
        while run.update < 800:
            drawn.append(run.batch_size)
            run.step(drawn.popleft())
        assert max(run.sizes) == 128 and run.batch_size == 64

    def test_a_size_that_no_batch_ever_has_is_left_again_all_the_same(self):
        run = Run(controller_of(lambda m: 64.0 if m.update < 40 else 32.0, quantize=True))
        while run.update < 600:
            run.step(B0)
        assert [d.batch_size for d in decisions(run)] == [64, 32]

    def test_batches_that_vary_around_the_size_are_timed(self):
        run = Run(controller_of(), phi=160.0)
        sizes = np.random.default_rng(1)
        for _ in range(2000):
            run.step(round(run.batch_size * sizes.uniform(0.8, 1.2)))
        assert 64 <= run.batch_size <= 256

    def test_batches_fetched_before_a_change_are_not_its_times(self):
        # The first update of each size would be ten times as long as it should.
        run = Run(controller_of(), phi=320.0, jitter=0.0)
        for _ in range(1500):
            late = run.changes and run.update - run.changes[-1][0] < 4
            run.step(run.changes[-1][1].previous if late else None)
        assert run.batch_size >= 64
        for size in run.controller.step_time.measured:
            assert run.controller.step_time.predict(size) == pytest.approx(run.time(size))

    def test_updates_split_on_purpose_are_not_timed_unless_all_are(self, monkeypatch):
        split = Run(controller_of(adjust_every=1), jitter=0.0)
        for _ in range(100):
            split.step(B0)
            assert not split.controller.step_time.predict(B0) > split.time(B0) + 1e-9
        assert split.controller.step_time.predict(B0) == pytest.approx(split.time(B0))
        monkeypatch.setattr("test_controller.measures_noise", lambda update: True)
        always = Run(controller_of(), phi=1.0, jitter=0.0).steps(60)
        assert always.controller.step_time.predict(B0) == pytest.approx(2 * always.time(B0 // 2))


class TestRounding:
    def test_schedules_are_only_rounded_and_clamped(self):
        sizes = answers(Asked(10, 48.4, 1000, 5000, 3, -7, 0), 7, min_batch_size=8, max_batch_size=777)
        assert sizes == [10, 48, 777, 777, 8, 8, 8]

    def test_functions_too_and_at_the_very_first_update(self):
        assert answers(lambda m: 100.0 * m.update, 3) == [100, 200, 300]

    def test_milestones_and_constant(self):
        assert answers(Milestones({2: 50, 4: 70}, unit="updates"), 5) == [32, 50, 50, 70, 70]
        assert answers(Constant(), 3) == [32] * 3
        assert answers(Constant(100), 2) == [100] * 2

    @pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
    def test_proposals_that_are_not_finite_change_nothing(self, bad):
        for quantize in (True, False):
            controller = controller_of(Asked(bad), adjust_every=1, quantize=quantize)
            assert Run(controller).steps(30).changes == []
            assert controller.note == f"32 stays: the policy proposed {bad}"

    @pytest.mark.parametrize("bad", [None, "many", [64]])
    def test_proposals_that_are_no_numbers_are_refused(self, bad):
        with pytest.raises(TypeError, match=r"asked proposed .* return a number of samples"):
            answers(Asked(bad), 1)

    def test_the_reason_names_the_policy_that_gives_none(self):
        run = Run(controller_of(Asked(48), adjust_every=1)).steps(1)
        assert decisions(run) == [Decision(48, 32, "32 -> 48: asked proposes 48")]

    def test_quantize_forces_steps_of_two_and_the_dwell(self):
        run = Run(controller_of(Asked(1000), adjust_every=1, quantize=True)).steps(150)
        assert [d.batch_size for d in decisions(run)] == [64, 128, 256, 512]
        assert min(np.diff([update for update, _ in run.changes])) == controller_module.MIN_DWELL

    def test_without_quantize_the_noise_scale_is_followed_at_once(self):
        controller = controller_of("noise_scale", quantize=False)
        run = Run(controller, phi=64.0).steps(400)
        assert run.changes[0][0] < controller_module.MIN_DWELL
        assert any(math.log2(size / B0) % 1 for size in run.sizes)

    @pytest.mark.parametrize("maximum", [100, 127, 1000])
    def test_a_maximum_off_the_grid_is_reached_and_left_onto_the_grid(self, maximum):
        policy = Asked(*[1e6] * 200, *[1] * 200)
        run = Run(controller_of(policy, adjust_every=1, quantize=True, max_batch_size=maximum)).steps(400)
        grid = [B0 * 2**k for k in range(6) if B0 * 2**k < maximum]
        assert [d.batch_size for d in decisions(run)] == [*grid[1:], maximum, *grid[::-1]]
        note = run.notes[0]
        assert note == f"{maximum} stays: asked proposes 1000000, max_batch_size is {maximum}"

    @pytest.mark.parametrize("minimum", [1, 3, 10])
    def test_below_the_reference_the_grid_goes_on_to_the_minimum(self, minimum):
        run = Run(controller_of(Asked(1), adjust_every=1, quantize=True, min_batch_size=minimum)).steps(200)
        grid = [B0 // 2**k for k in range(1, 6) if B0 // 2**k > minimum]
        assert [d.batch_size for d in decisions(run)] == [*grid, minimum]

    @pytest.mark.parametrize("reference", [30, 50, 75, 100, 300])
    @pytest.mark.parametrize("step", [1, 3])
    def test_rounded_sizes_are_left_both_ways_like_any_other(self, reference, step):
        reference *= step
        controller = controller_of("noise_scale", reference_batch_size=reference, min_batch_size=1, multiple_of=step)
        run = Run(controller, jitter=0.0, edit=with_estimates(2.0 * step)).steps(1000)
        assert run.batch_size <= 4 * step
        down = [d.batch_size for d in decisions(run)]
        run.edit = with_estimates(4000.0)
        run.steps(2000)
        assert run.batch_size >= 1000
        up = [d.batch_size for d in decisions(run)[len(down) :]]
        assert up[: len(down)] == [*reversed(down[:-1]), reference]

    @pytest.mark.parametrize(("bounds", "size"), [({"min_batch_size": 50}, 50), ({"max_batch_size": 20}, 20)])
    def test_a_start_outside_the_bounds_is_left_at_the_first_question(self, bounds, size):
        run = Run(controller_of("goodput", **bounds)).steps(10)
        assert run.batch_size == size
        assert decisions(run)[0].reason == f"32 -> {size}: {next(iter(bounds))} is {size}"

    @given(
        step=st.integers(1, 12),
        proposals=st.lists(st.floats(-10, 1e4), min_size=1, max_size=30),
        maximum=st.integers(12, 5000),
        quantize=st.booleans(),
    )
    def test_every_size_is_a_multiple_within_the_bounds(self, step, proposals, maximum, quantize):
        controller = controller_of(
            Asked(*proposals),
            adjust_every=7,
            quantize=quantize,
            multiple_of=step,
            reference_batch_size=step,
            min_batch_size=step,
            max_batch_size=maximum,
        )
        run = Run(controller, jitter=0.0)
        for _ in range(7 * len(proposals)):
            decision = run.step()
            if decision is not None:
                assert decision.batch_size % step == 0
                assert step <= decision.batch_size <= maximum
                assert decision.batch_size != decision.previous
                assert not quantize or decision.batch_size <= 2 * decision.previous + step

    def test_the_policy_is_asked_once_every_so_many_updates(self):
        for quantize in (True, False):
            policy = Asked(64)
            policy.needs = frozenset({"noise"})
            Run(controller_of(policy, adjust_every=25, quantize=quantize)).steps(249)
            assert [m.update for m in policy.seen] == list(range(25, 250, 25))

    @pytest.mark.parametrize(
        "options",
        [
            {"adjust_every": 0},
            {"adjust_every": True},
            {"adjust_every": 2.5},
            {"multiple_of": 0},
            {"min_batch_size": 0},
            {"max_batch_size": 2.5},
            {"min_batch_size": 64, "max_batch_size": 32},
            {"reference_batch_size": 0},
            {"reference_batch_size": 32.0},
        ],
    )
    def test_bad_arguments_are_refused(self, options):
        with pytest.raises(ValueError, match=next(iter(options))):
            controller_of(**options)


class TestWhatAPolicySees:
    def test_plain_numbers_and_the_estimates(self):
        policy = Asked(32)
        Run(controller_of(policy), phi=64.0).steps(500)
        seen = policy.seen[-1]
        assert seen.interval[0] < seen.noise_scale < seen.interval[1]
        assert seen.noise_scale == pytest.approx(seen.grad_variance / seen.grad_sq_norm)
        assert seen.step_time is not None
        assert seen.step_time.predict(32) == pytest.approx(3.0, rel=0.2)
        assert (seen.batch_size, seen.loss, seen.part_sizes, seen.pass_sizes) == (32, 1.0, (), ())

    def test_tensors_are_read_together_and_only_when_the_policy_is_asked(self, monkeypatch):
        reads = []
        read_numbers = measurement_module.read_numbers

        def counted(values: Sequence[Any]) -> list[float]:
            reads.append(len(values))
            return read_numbers(values)

        monkeypatch.setattr(controller_module, "read_numbers", counted)

        def on_device(m: Measurement) -> Measurement:
            norms: Any = torch.tensor(m.part_sq_norms) if m.part_sizes else ()
            return replace(m, part_sq_norms=norms, sq_norm=torch.tensor(m.sq_norm), loss=torch.tensor(m.loss))

        policy = Asked(32)
        tensors = Run(controller_of(policy), phi=16.0, edit=on_device).steps(40)
        assert len(reads) == 4
        assert policy.seen[0].loss == 1.0
        numbers = Run(controller_of(Asked(32)), phi=16.0).steps(40)
        assert tensors.controller.noise.noise_scale == pytest.approx(numbers.controller.noise.noise_scale, rel=1e-3)

    def test_what_nobody_needs_is_not_asked_for(self):
        assert controller_of(Constant()).needs == frozenset()
        assert controller_of("goodput", lr_scaling="none").needs == {"noise", "step_time"}
        assert controller_of(Asked(1), lr_scaling="sqrt").needs == frozenset()
        assert controller_of(Asked(1)).needs == {"noise"}
        assert controller_of(Asked(1)).policy_needs == frozenset()

    def test_the_reference_size_comes_with_the_first_measurement(self):
        controller = BatchSizeController(lambda m: 48, lr_scaling="linear")
        assert controller.lr_factor(64) == 1.0
        controller.observe(Measurement(batch_size=16, reference_batch_size=16))
        assert (controller.reference_batch_size, controller.batch_size) == (16, 16)
        assert controller.lr_factor(64) == 4.0

    def test_the_factor_uses_the_noise_scales_lower_quartile(self):
        run = Run(controller_of(), phi=100.0).steps(600)
        low, high = run.controller.noise.interval(0.5)
        assert 60 < low < run.controller.noise_scale < high
        assert (run.controller.rate_noise_scale, run.controller.noise_scale) == (low, run.controller.noise.noise_scale)
        assert run.controller.lr_factor(64) == pytest.approx((1 + low / 32) / (1 + low / 64))

    @pytest.mark.parametrize("factor", [math.nan, math.inf, -1.0, "2x", None])
    def test_a_policys_own_factor_that_is_none_is_refused(self, factor):
        policy: Any = Asked(64.0)
        policy.lr_factor = lambda *_: factor
        with pytest.raises(ValueError, match=r"asked gave the factor .* for 64 samples; return a number from 0 on"):
            controller_of(policy, lr_scaling="none").lr_factor(64, 0.1)

    def test_the_factor_keeps_the_last_noise_scale_while_nothing_tells(self):
        negative = False

        def edit(m: Measurement) -> Measurement:
            if negative and m.part_sizes:
                return replace(m, part_sq_norms=(900.0, 1100.0), sq_norm=300.0)
            return m

        run = Run(controller_of(), phi=100.0, edit=edit).steps(300)
        negative = True
        known = run.controller.rate_noise_scale
        while run.controller.noise.grad_sq_norm > 0:
            known = run.controller.rate_noise_scale
            run.steps(10)
        run.steps(100)
        assert run.controller.rate_noise_scale == known > 0


def reloaded(state: dict[str, Any]) -> Any:
    buffer = io.BytesIO()
    torch.save(state, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)


class Counting:
    """A policy with a memory of its own."""

    needs: frozenset[str] = frozenset()

    def __init__(self) -> None:
        self.count = 0

    def propose(self, measurement: Measurement) -> float:
        self.count += 1
        return 32.0 + self.count

    def state_dict(self) -> dict[str, Any]:
        return {"count": self.count}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if not isinstance(state, dict) or not isinstance(state.get("count"), int):
            raise ValueError("no state of Counting")
        self.count = state["count"]


class TestState:
    @pytest.mark.parametrize("at", [0, 5, 10, 93, 400, 1217])
    @pytest.mark.parametrize("policy", ["goodput", "noise_scale", Counting])
    def test_a_restored_controller_goes_on_bit_for_bit(self, at, policy):
        def on_device(m: Measurement) -> Measurement:
            norms: Any = [torch.tensor(n) for n in m.part_sq_norms]
            return replace(m, part_sq_norms=norms, sq_norm=torch.tensor(m.sq_norm), loss=torch.tensor(0.1))

        def make() -> BatchSizeController:
            return controller_of(policy() if isinstance(policy, type) else policy)

        whole, cut = (Run(make(), phi=160.0, edit=on_device) for _ in range(2))
        whole.steps(at)
        cut.steps(at)
        state = reloaded(cut.controller.state_dict())
        cut.controller = make()
        cut.controller.load_state_dict(state)
        assert repr(cut.controller.state_dict()) == repr(whole.controller.state_dict())
        assert repr(cut.controller.estimates) == repr(whole.controller.estimates)
        whole.steps(800)
        cut.steps(800)
        assert cut.changes == whole.changes
        assert cut.controller.note == whole.controller.note
        assert repr(cut.controller.state_dict()) == repr(whole.controller.state_dict())
        assert cut.controller.lr_factor(77) == whole.controller.lr_factor(77)

    def test_saving_does_not_change_the_run(self):
        one, other = Run(controller_of(), phi=160.0), Run(controller_of(), phi=160.0)
        for _ in range(300):
            one.step()
            one.controller.state_dict()
        assert one.changes == other.steps(300).changes

    def test_a_state_holds_no_part_of_the_controller(self):
        run = Run(controller_of(), phi=160.0).steps(205)
        state = run.controller.state_dict()
        before = repr(state)
        other = controller_of()
        other.load_state_dict(state)
        run.steps(300)
        Run(other).steps(300)
        assert repr(state) == before

    def test_a_lower_maximum_at_resume_is_obeyed(self):
        run = Run(controller_of(), phi=640.0).steps(3000)
        assert run.batch_size >= 128
        resumed = controller_of(max_batch_size=100)
        resumed.load_state_dict(run.controller.state_dict())
        run.controller = resumed
        assert [run.step() for _ in range(10)][-1].batch_size == 100  # type: ignore[union-attr]

    @pytest.mark.parametrize(
        "wrong",
        [
            {"reference_batch_size": 0},
            {"batch_size": "64"},
            {"batch_size": 64.0},
            {"note": 3},
            {"noted": "near"},
            {"updates": -1},
            {"updates": None},
            {"changed_at": 1.5},
            {"measured_samples": None},
            {"settled": True},
            {"noise_scale": None},
            {"noise_scale": -2.0},
            {"level": [1.0, 1.0]},
            {"level": [-1.0, 1.0, 32.0]},
            {"level": [1.0, math.nan, 32.0]},
            {"level": [math.inf, 1.0, 32.0]},
            {"newest": [0, 1.0]},
            {"noise": {}},
            {"step_time": {}},
            {"step_time": None},
            {"pending": None},
            {"pending": [3]},
            {"pending": [{}]},
            {"pending": [{"update": 3}]},
            {"policy": {"count": None}},
        ],
    )
    def test_a_malformed_state_is_refused_and_changes_nothing(self, wrong):
        run = Run(controller_of(Counting()), phi=160.0).steps(208)
        state = run.controller.state_dict()
        other = Run(controller_of(Counting())).steps(33).controller
        before = repr(other.state_dict())
        with pytest.raises(ValueError):
            other.load_state_dict({**state, **wrong})
        with pytest.raises(ValueError, match="missing"):
            other.load_state_dict({key: value for key, value in state.items() if key not in wrong})
        assert repr(other.state_dict()) == before

    @pytest.mark.parametrize(
        "wrong",
        [
            {"batch_size": "32"},
            {"part_sizes": [0, 3]},
            {"part_sq_norms": [1.0]},
            {"pass_sizes": [1.5, 2.5]},
            {"pass_seconds": "ab"},
            {"seconds": None},
            {"unknown": 1},
        ],
    )
    def test_a_malformed_pending_measurement_is_refused(self, wrong):
        state = Run(controller_of()).steps(3).controller.state_dict()
        pending = [*state["pending"][:-1], {**state["pending"][-1], **wrong}]
        other = controller_of()
        with pytest.raises(ValueError, match="pending measurement"):
            other.load_state_dict({**state, "pending": pending})
        assert repr(other.state_dict()) == repr(controller_of().state_dict())

    def test_something_else_than_a_state_is_refused(self):
        with pytest.raises(ValueError, match="not the state"):
            controller_of().load_state_dict([1, 2])  # type: ignore[arg-type]


def test_policies_of_the_same_run_agree_on_the_words() -> None:
    """One number style: a change by either policy quotes the noise scale in the same way."""
    for policy in (Goodput(), NoiseScale()):
        run = Run(controller_of(policy), phi=320.0).steps(1500)
        assert run.changes
        for decision in decisions(run):
            assert re.search(r": noise scale [\d.]+ \[[\d.]+, ([\d.]+|inf)\]", decision.reason)


def without_a_signal(m: Measurement) -> Measurement:
    """Norms that say ``tr(Sigma) = 100`` and a slightly negative ``|G|^2``."""
    if not m.part_sizes:
        return m
    return replace(m, part_sq_norms=[100 / size - 0.01 for size in m.part_sizes], sq_norm=100 / m.batch_size - 0.01)


class TestSizesThatAreSlow:
    def at_256(self, edit: Callable[[Measurement], Measurement], slow: float) -> Run:
        run = Run(controller_of("goodput"), time=lambda b: (2.0 + b / 32) * (slow if b >= 256 else 1.0), edit=edit)
        run.controller.batch_size = run.batch_size = 128
        run.steps(60)
        assert not run.changes
        run.controller.batch_size = run.batch_size = 256
        return run.steps(60)

    def test_a_size_that_takes_longer_per_sample_is_left_without_any_signal(self):
        changes = decisions(self.at_256(without_a_signal, slow=5.0))
        assert [d.batch_size for d in changes] == [128]
        assert changes[0].reason == "256 -> 128: 128 takes less time per sample, whatever the noise scale"

    def test_a_size_that_takes_less_per_sample_is_kept_without_a_signal(self):
        assert not self.at_256(without_a_signal, slow=1.0).changes

    @pytest.mark.parametrize(("passes", "seed", "calm"), [(True, 0, 700), (True, 9, 700), (False, 2, 1500)])
    def test_times_of_long_ago_do_not_keep_a_run_from_growing(self, passes, seed, calm):
        # The small sizes were timed while an update had hardly a cost of its own.
        fixed = {"cost": 2.0}
        run = Run(
            controller_of("goodput"), phi=1000.0, time=lambda b: fixed["cost"] + b / 32, seed=seed, passes=passes
        ).steps(calm)
        assert run.batch_size <= 256
        fixed["cost"] = 40.0
        assert run.steps(2500).batch_size >= 512


def longer(more: Callable[[int], float], phi: float) -> Callable[[Measurement], Measurement]:
    """Gradients whose squared norm is that of noise scale ``phi`` and ``more(update)``; each update tells its own."""

    def edit(m: Measurement) -> Measurement:
        added = more(m.update)
        sq_norm = m.sq_norm if len(m.part_sq_norms) else 1 + phi / m.batch_size
        return replace(m, part_sq_norms=[n + added for n in m.part_sq_norms], sq_norm=sq_norm + added)

    return edit


def at_eight_times_the_size(edit: Callable[[Measurement], Measurement]) -> Run:
    """600 updates at a noise scale of 400, which the size has grown to 8 B0 with."""
    run = Run(controller_of("noise_scale", max_batch_size=8 * B0), phi=400.0, edit=edit).steps(600)
    assert run.batch_size == 8 * B0 and run.controller.lr_factor(8 * B0) > 4
    return run


def test_gradients_that_grow_as_before_a_divergence_take_the_rate_back() -> None:
    # Holding on to the last identified scale kept the rate up, and runs that would have recovered diverged.
    def grow(update: int) -> float:
        return float(1.3 ** max(update - 600, 0)) - 1

    controller = at_eight_times_the_size(longer(grow, 400.0)).steps(20).controller
    assert controller.lr_factor(8 * B0) < 1.5


def test_one_wild_batch_that_was_not_measured_does_not_take_the_rate_back() -> None:
    assert not measures_noise(600)
    run = at_eight_times_the_size(longer(lambda update: 1e4 * (update == 601), 400.0))
    before = run.controller.lr_factor(8 * B0)
    while run.update < 700:
        run.step()
        assert run.controller.lr_factor(8 * B0) > 0.7 * before
    assert math.isfinite(run.controller.noise_scale)


def test_a_gradient_that_has_fallen_a_thousandfold_is_forgotten_as_soon_as_any_other() -> None:
    falls = longer(lambda update: 1000.0 * (update <= 200), 100.0)
    run = Run(controller_of(lambda m: B0), phi=100.0, edit=falls).steps(200)
    assert run.controller.noise.grad_sq_norm == pytest.approx(1000, rel=0.1)
    # 32 updates of memory at least: of plain averages more than a hundred would still be there.
    assert run.steps(60).controller.noise.grad_sq_norm < 10


def test_a_noise_scale_that_stays_while_gradients_fall_does_not_raise_the_rate() -> None:
    # Norms of updates that are not measured fall at once, and tr(Sigma) is measured later.
    def fall(m: Measurement) -> Measurement:
        times = 1e-3 if m.update > 2000 else 1.0
        sq_norm = m.sq_norm if len(m.part_sq_norms) else 1 + 30 / m.batch_size
        return replace(m, part_sq_norms=[times * n for n in m.part_sq_norms], sq_norm=times * sq_norm)

    run = Run(controller_of(lambda m: 16 * B0), phi=30.0, edit=fall)
    run.batch_size = 16 * B0
    run.steps(2000)
    before = run.controller.lr_factor(16 * B0)
    while run.update < 2300:
        run.step()
        assert 0.9 * before < run.controller.lr_factor(16 * B0) < 1.1 * before
    assert run.controller.noise.grad_sq_norm == pytest.approx(1e-3, rel=0.3)
    assert run.controller.noise.grad_variance == pytest.approx(30e-3, rel=0.3)


def test_tails_that_are_not_measured_are_no_outliers() -> None:
    # Each norm is what it is expected to be: a tail's is 125 times that of the other updates.
    controller = controller_of(lambda m: 256, reference_batch_size=256)
    for update in range(1, 1001):
        size = 256 if update % 10 else 2
        measured = update % 7 == 0 and size > 2
        parts: dict[str, Any] = {"part_sq_norms": [1 + 2000 / 128] * 2, "part_sizes": [128, 128]} if measured else {}
        controller.observe(Measurement(update=update, batch_size=size, sq_norm=1 + 2000 / size, **parts))
    assert controller.noise.grad_sq_norm == pytest.approx(1.0)
    assert controller.noise.grad_variance == pytest.approx(2000.0)


def test_without_an_interval_the_rate_stays() -> None:
    run = Run(controller_of(lambda m: B0), phi=100.0, edit=longer(lambda update: 0.0, 100.0)).steps(600)
    known = run.controller.rate_noise_scale
    state = run.controller.state_dict()
    run.controller.load_state_dict({**state, "noise": [GradientNoiseScale().state_dict() for _ in state["noise"]]})
    run.steps(30)
    assert math.isnan(run.controller.noise.interval(0.5)[0]) and run.controller.noise.grad_sq_norm > 0
    assert run.controller.rate_noise_scale == known > 0


def test_averages_in_units_of_the_level_are_unbiased() -> None:
    found = [
        (run.controller.noise.grad_sq_norm, run.controller.noise.grad_variance)
        for run in (Run(controller_of(lambda m: B0), phi=30.0, seed=seed).steps(150) for seed in range(60))
    ]
    for values, truth in zip(np.array(found).T, (1.0, 30.0), strict=True):
        assert abs(values.mean() - truth) < 3 * values.std(ddof=1) / math.sqrt(len(values))


def test_while_no_noise_scale_is_the_least_the_rate_may_fall_and_not_rise() -> None:
    # Two wild measurements that nearly cancel leave nothing to say about |G|^2 and tr(Sigma) but their estimates.
    extremes = [(100.0, 3000.0), (3900.0, 1000.0)]

    def wild(m: Measurement) -> Measurement:
        if m.update <= 600 or not m.part_sq_norms or not extremes:
            return m
        of_parts, of_whole = extremes.pop()
        return replace(m, part_sq_norms=[of_parts, of_parts], sq_norm=of_whole)

    run = at_eight_times_the_size(wild)
    fallen = 0
    while run.update < 1200:
        before = run.controller.rate_noise_scale
        run.step()
        now, noise = run.controller.rate_noise_scale, run.controller.noise
        if noise.interval(controller_module.RATE_EVIDENCE) == (0, math.inf):
            assert now <= before
            assert noise.grad_sq_norm <= 0 or now <= max(noise.grad_variance, 0) / noise.grad_sq_norm
            fallen += now < before
    assert fallen


def test_a_bound_that_keeps_a_schedule_from_its_size_is_named() -> None:
    def first(policy: Any, **options: Any) -> tuple[Decision | None, str | None]:
        controller = controller_of(policy, lr_scaling="none", adjust_every=1, **options)
        return Run(controller, jitter=0.0).step(), controller.note

    grown, _ = first(Milestones({0: 1024}), max_batch_size=100)
    assert grown is not None
    assert grown.reason == "32 -> 100: milestone at 0 epochs, 1024 is wanted, but max_batch_size is 100"
    assert first(Milestones({0: 8}), min_batch_size=B0) == (
        None,
        "32 stays: milestone at 0 epochs, 8 is wanted, but min_batch_size is 32",
    )
    assert first(lambda m: 8, min_batch_size=B0) == (None, "32 stays: <lambda> proposes 8, min_batch_size is 32")
    assert first(lambda m: 31.7, min_batch_size=B0) == (None, None)
    assert first(Milestones({0: 32})) == (None, None)
    grown, _ = first(Milestones({0: 1024}), max_batch_size=100, multiple_of=16)
    assert grown is not None and grown.reason.startswith("32 -> 96: ")
    assert grown.reason.endswith("1024 is wanted, but max_batch_size is 100 and every size a multiple of 16")


def test_what_is_neither_true_nor_false_is_no_flag() -> None:
    with pytest.raises(ValueError, match="quantize='no' must be True or False"):
        controller_of(quantize="no")
    assert controller_of(quantize=np.bool_(True)) is not None
