from __future__ import annotations

import io
import math
import random
from collections.abc import Iterable

import numpy as np
import pytest
import torch

from adaptive_batch.throughput import StepTimeModel

ALPHA, BETA = 0.02, 4e-4


def affine(samples: float) -> float:
    return ALPHA + BETA * samples


def model_of(sizes: Iterable[int], times: int = 3) -> StepTimeModel:
    model = StepTimeModel()
    for _ in range(times):
        for size in sizes:
            model.update(size, affine(size))
    return model


def test_nothing_is_known_before_the_first_update():
    model = StepTimeModel()
    assert math.isnan(model.predict(32)) and math.isnan(model.alpha) and math.isnan(model.beta)
    assert model.measured == []


@pytest.mark.parametrize("sizes", [(32, 64), (1, 2), (100, 125), (8, 32, 256, 4096), (30, 31, 32, 33, 64)])
def test_affine_times_are_reproduced_exactly_everywhere(sizes):
    model = model_of(sizes)
    for samples in (0.5, 1, 7, 32, 33.3, 64, 100, 110, 3000, 4096, 100_000):
        assert model.predict(samples) == pytest.approx(affine(samples), rel=1e-9)
    assert model.alpha == pytest.approx(ALPHA, rel=1e-9)
    assert model.beta == pytest.approx(BETA, rel=1e-9)


def test_affine_times_of_random_sizes_are_reproduced_although_similar_sizes_share_memory():
    sizes = np.random.default_rng(0).integers(16, 2048, size=3000)
    model = StepTimeModel()
    for size in sizes.tolist():
        model.update(size, affine(size))
    assert len(model.measured) <= 32
    for samples in (1, 16, 500, 1999, 5000):
        assert model.predict(samples) == pytest.approx(affine(samples), rel=1e-9)


def test_a_size_is_measured_from_its_third_observation_on():
    model = StepTimeModel()
    model.update(32, 0.1)
    model.update(32, 0.2)
    assert model.measured == [] and math.isnan(model.predict(32))
    model.update(32, 0.3)
    assert model.measured == [32]
    assert model.predict(32) == 0.2


def test_alpha_and_beta_need_two_measured_sizes_far_enough_apart():
    model = model_of([100, 124])
    assert model.measured == [100, 124]
    assert math.isnan(model.alpha) and math.isnan(model.beta)
    assert math.isnan(model.predict(200)) and math.isnan(model.predict(50))
    assert model.predict(112) == pytest.approx(affine(112))
    model.update(125, affine(125))
    model.update(150, affine(150))
    model.update(150, affine(150))
    assert math.isnan(model.beta)  # 150 was seen only twice
    model.update(150, affine(150))
    assert model.beta == pytest.approx(BETA)


def test_outliers_in_a_tenth_of_the_updates_hardly_move_a_prediction():
    rng = np.random.default_rng(1)
    model = StepTimeModel()
    for size in (32, 64, 128, 256):
        seconds = affine(size) * (1 + 0.02 * rng.standard_normal(40))
        seconds[3::10] *= 10
        for value in seconds.tolist():
            model.update(size, value)
    for samples in (16, 32, 50, 64, 128, 256, 512):
        assert model.predict(samples) == pytest.approx(affine(samples), rel=0.02)
    assert model.alpha == pytest.approx(ALPHA, rel=0.05)
    assert model.beta == pytest.approx(BETA, rel=0.05)


def test_all_sizes_weigh_by_their_relative_error():
    model = StepTimeModel()
    for size, seconds in ((1, 1.0), (3, 2.0), (4, 4.0)) * 3:
        model.update(size, seconds)
    rows = np.array([[1.0, 1.0], [0.5, 1.5], [0.25, 1.0]])  # (alpha + beta * B) / t is to be 1
    alpha, beta = np.linalg.lstsq(rows, np.ones(3), rcond=None)[0]
    assert model.alpha == pytest.approx(alpha, rel=1e-12)
    assert model.beta == pytest.approx(beta, rel=1e-12)


def test_times_that_shrink_with_the_size_give_a_slope_of_zero():
    model = StepTimeModel()
    for size, seconds in ((32, 1.0), (64, 0.5)) * 3:
        model.update(size, seconds)
    assert model.beta == 0.0
    assert model.alpha == pytest.approx((1.0 + 0.5 * 4) / 5)  # weights 1 / t^2
    assert model.predict(48) == pytest.approx(0.75)
    assert model.predict(128) == 0.5
    assert model.predict(16) == 1.0


def test_times_that_grow_faster_than_the_size_give_an_overhead_of_zero():
    model = StepTimeModel()
    for size, seconds in ((10, 1.0), (20, 4.0)) * 3:
        model.update(size, seconds)
    assert model.alpha == 0.0
    assert model.beta == pytest.approx((10 / 1 + 20 / 4) / (100 / 1 + 400 / 16))
    assert model.predict(40) == pytest.approx(4.0 + 20 * 0.3)  # the last segment is the steeper one
    assert model.predict(5) == pytest.approx(0.5)  # never a better throughput than was measured
    assert model.predict(1) > 0


def test_measured_sizes_keep_their_own_median_where_time_is_not_affine():
    times = {512: 0.1, 1024: 0.2, 2048: 0.4, 4096: 1.6}  # throughput halves above 2048
    model = StepTimeModel()
    for _ in range(5):
        for size, seconds in times.items():
            model.update(size, seconds)
    assert model.measured == [512, 1024, 2048, 4096]
    assert {size: model.predict(size) for size in model.measured} == times
    assert model.predict(3072) == pytest.approx(1.0)
    assert model.predict(8192) == pytest.approx(1.6 + 1.2 * 2)  # falls on, along the last segment


def test_the_slope_beyond_the_largest_size_does_not_come_from_a_neighbour():
    model = model_of([32, 64, 128])
    for _ in range(3):
        model.update(140, affine(140) * 1.05)  # the segment from 128 to here is nearly twice too steep
    assert model.measured == [32, 64, 128, 140]
    assert model.predict(1024) == pytest.approx(affine(1024), rel=0.15)


def test_passes_lend_their_slope_while_one_size_of_update_is_measured():
    model = model_of([64])
    assert math.isnan(model.predict(128)) and math.isnan(model.alpha)
    for size in (8, 16) * 3:
        model.update_pass(size, 0.001 + 3e-4 * size)
    assert model.beta == pytest.approx(3e-4)
    assert model.alpha == pytest.approx(affine(64) - 3e-4 * 64)
    assert model.predict(64) == affine(64)
    assert model.predict(128) == pytest.approx(affine(64) + 3e-4 * 64)
    assert model.predict(32) == pytest.approx(affine(64) - 3e-4 * 32)
    for _ in range(3):
        model.update(128, affine(128))
    assert model.beta == pytest.approx(BETA)  # updates have a slope of their own now


def test_passes_alone_predict_nothing_about_updates():
    model = StepTimeModel()
    for size in (8, 16) * 3:
        model.update_pass(size, affine(size))
    assert math.isnan(model.predict(16)) and math.isnan(model.alpha)


def test_passes_slower_than_their_update_leave_it_an_overhead_of_zero():
    model = model_of([64])
    for size in (8, 16) * 3:
        model.update_pass(size, 0.01 * size)
    assert model.alpha == 0.0
    assert model.predict(128) == pytest.approx(2 * affine(64))


def test_who_looks_at_every_observation_sees_the_same_as_who_looks_once() -> None:
    rng = random.Random(5)
    watched, model = StepTimeModel(), StepTimeModel()
    for n in range(300):
        if n == 200:
            watched.forget_above(64)
            model.forget_above(64)
        samples, seconds = rng.choice((32, 64, 128)), rng.uniform(1.0, 2.0)
        watched.update(samples, seconds)
        model.update(samples, seconds)
        seen = watched.predict(48), watched.predict(128)
    assert seen == (model.predict(48), model.predict(128))


def test_the_median_follows_a_machine_that_changes():
    model = model_of([32], times=500)
    for _ in range(32):
        model.update(32, 1.0)
    assert model.predict(32) == 1.0


def test_memory_is_bounded_and_odd_tails_do_not_drive_out_sizes_in_use():
    model = model_of([32, 64], times=10)
    for exponent in range(70):
        model.update(int(1.25**exponent) + 200, 1.0)
    assert {32, 64} <= set(model.measured)
    for exponent in range(300):
        for _ in range(5):
            model.update(int(1.3**exponent) + 200, 1.0)
    assert len(model.measured) <= 32
    assert len(model.state_dict()["updates"]) <= 32 * 32


@pytest.mark.parametrize("seconds", [math.nan, math.inf, 0.0, -1.0])
def test_times_that_are_none_are_skipped(seconds):
    model = model_of([32, 64])
    before = model.state_dict()
    model.update(32, seconds)
    model.update_pass(32, seconds)
    assert model.state_dict() == before


@pytest.mark.parametrize("samples", [0, -3, math.nan, math.inf])
def test_sizes_that_are_none_are_refused(samples):
    model = StepTimeModel()
    with pytest.raises(ValueError, match="at least 1 sample"):
        model.update(samples, 0.1)
    with pytest.raises(ValueError, match="at least 1 sample"):
        model.update_pass(samples, 0.1)


@pytest.mark.parametrize("samples", [0, -1.0, math.nan])
def test_the_time_of_no_samples_is_refused(samples):
    with pytest.raises(ValueError, match="more than 0"):
        model_of([32, 64]).predict(samples)


def test_a_saved_model_continues_as_if_it_had_not_been_interrupted():
    rng = np.random.default_rng(2)
    model = StepTimeModel()
    for size in rng.integers(1, 10_000, size=2000).tolist():
        model.update(size, affine(size) * rng.uniform(0.9, 1.1))
        model.update_pass(size // 4 + 1, affine(size) / 4)
    buffer = io.BytesIO()
    torch.save(model.state_dict(), buffer)
    buffer.seek(0)
    restored = StepTimeModel()
    restored.update(5, 3.0)
    restored.load_state_dict(torch.load(buffer, weights_only=True))
    assert restored.state_dict() == model.state_dict()
    for size in rng.integers(1, 100_000, size=200).tolist():
        assert restored.predict(size) == model.predict(size)
        model.update(size, 0.5)
        restored.update(size, 0.5)
    assert restored.state_dict() == model.state_dict()


@pytest.mark.parametrize(
    "state",
    [
        {},
        None,
        {"updates": []},
        {"updates": [], "passes": [], "more": []},
        {"updates": [[32, 0.1]], "passes": 3},
        {"updates": [[32, 0.1]], "passes": [[32]]},
        {"updates": [[32, 0.1]], "passes": [[0, 0.1]]},
        {"updates": [[32, 0.1]], "passes": [[32.5, 0.1]]},
        {"updates": [[32, 0.1]], "passes": [[32, math.nan]]},
        {"updates": [[32, 0.1]], "passes": [[32, "0.1"]]},
    ],
)
def test_a_state_that_is_none_is_refused_and_changes_nothing(state):
    model = model_of([32, 64])
    before = model.state_dict()
    with pytest.raises(ValueError, match="StepTimeModel state"):
        model.load_state_dict(state)
    assert model.state_dict() == before


def test_what_is_forgotten_of_larger_sizes_is_expected_from_the_smaller_ones_again():
    model = model_of([32, 64])
    for _ in range(3):
        model.update(128, 10.0)
    assert model.predict(128) == 10.0
    model.forget_above(64)
    assert model.measured == [32, 64]
    assert model.predict(128) == pytest.approx(affine(128))
    model.forget_above(64)
    assert model.measured == [32, 64]


def test_passes_are_wanted_until_enough_were_timed_or_updates_of_two_sizes_were():
    model = model_of([32])
    assert model.wants_passes
    for _ in range(16):
        model.update_pass(8, affine(8))
        model.update_pass(24, affine(24))
    assert not model.wants_passes
    assert not model_of([32, 64]).wants_passes
