"""Estimates of the gradient noise scale against closed forms and exact per-example gradients."""

from __future__ import annotations

import io
import itertools
import math
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from reference import (
    decayed_average,
    delete_one_covariance,
    exact_noise,
    flat_gradient,
    part_norms,
    per_example_gradients,
    superpopulation_sq_norm,
)
from sklearn.datasets import load_digits
from torch import nn

from adaptive_batch.noise import (
    GradientNoiseScale,
    fieller_interval,
    harmonic_mean,
    student_t_quantile,
    two_batch_estimate,
)
from adaptive_batch.noise.scale import jackknife
from adaptive_batch.noise.schedule import PARTS, measures_noise

Array = NDArray[np.float64]
Norms = tuple[Array, Array]
"""``[R, n]`` squared norms of the parts and ``[R]`` of the whole, of ``R`` updates."""

EIGHTS = [8] * 8
FOREVER = 1e12  # a memory of so many samples weighs all measurements alike


class Regression:
    """``y = x.w* + e``, ``x ~ N(0, diag(h))``, loss ``r^2 / 2``, at ``delta`` from the optimum."""

    d = 20
    h = np.linspace(0.2, 2.0, d)
    delta = np.linspace(0.6, 0.1, d)
    noise = 1.0
    grad_sq_norm = float(((h * delta) ** 2).sum())
    grad_variance = float(grad_sq_norm + ((h * delta**2).sum() + noise) * h.sum())

    @classmethod
    def draw(cls, rng: np.random.Generator, updates: int, sizes: Sequence[int]) -> Norms:
        batches = []
        for start in range(0, updates, 1000):  # in slices that fit into the cache
            shape = (min(1000, updates - start), sum(sizes))
            x = rng.standard_normal((*shape, cls.d)) * np.sqrt(cls.h)
            residual = x @ cls.delta - rng.standard_normal(shape) * math.sqrt(cls.noise)
            batches.append(norms_of(x * residual[..., None], sizes))
        return np.concatenate([b[0] for b in batches]), np.concatenate([b[1] for b in batches])


class NoisyQuadratic:
    """``sum h theta^2 / 2`` with gradient noise ``N(0, diag(c))`` per sample."""

    d = 20
    h = np.linspace(0.1, 2.0, d)
    c = np.linspace(0.2, 6.0, d)
    theta = 0.3
    grad_sq_norm = float(((h * theta) ** 2).sum())
    grad_variance = float(c.sum())

    @classmethod
    def draw(cls, rng: np.random.Generator, updates: int, sizes: Sequence[int], theta: float = theta) -> Norms:
        b = np.array(sizes, dtype=float)[:, None]
        parts = cls.h * theta + rng.standard_normal((updates, len(b), cls.d)) * np.sqrt(cls.c / b)
        whole = (parts * b).sum(1) / b.sum()
        return (parts**2).sum(-1), (whole**2).sum(-1)


Problem = type[Regression] | type[NoisyQuadratic]


def norms_of(gradients: Array, sizes: Sequence[int]) -> Norms:
    """Norms from per-example gradients ``[R, B, d]``."""
    starts = np.cumsum([0, *sizes[:-1]])
    sums = np.add.reduceat(gradients, starts, axis=1)
    parts, whole = sums / np.array(sizes)[:, None], sums.sum(1) / sum(sizes)
    return (parts**2).sum(-1), (whole**2).sum(-1)


def estimates(norms: Norms, sizes: Sequence[int]) -> Array:
    """``[R, 2]``: each update's own estimates."""
    parts, whole = norms[0].tolist(), norms[1].tolist()
    return np.array([two_batch_estimate(p, sizes, w) for p, w in zip(parts, whole, strict=True)])


def feed(scale: GradientNoiseScale, norms: Norms, sizes: Sequence[int]) -> GradientNoiseScale:
    for parts, whole in zip(norms[0].tolist(), norms[1].tolist(), strict=True):
        scale.update(parts, sizes, whole)
    return scale


def standard_errors_off(values: Array, truth: float) -> float:
    return float(abs(values.mean() - truth) / (values.std(ddof=1) / math.sqrt(len(values))))


# -------------------------------------------------------------------------------------------- single updates


@pytest.mark.parametrize("problem", [Regression, NoisyQuadratic])
@pytest.mark.parametrize("sizes", [EIGHTS, [5, 3, 1], [1] * 8, [32, 1]], ids=str)
def test_estimates_are_unbiased_for_any_part_sizes(problem: Problem, sizes: list[int]) -> None:
    values = estimates(problem.draw(np.random.default_rng(1), 8_000, sizes), sizes)
    assert standard_errors_off(values[:, 0], problem.grad_sq_norm) < 3
    assert standard_errors_off(values[:, 1], problem.grad_variance) < 3


def test_mean_size_in_place_of_the_harmonic_mean_overestimates_the_variance_by_80_percent() -> None:
    norms = Regression.draw(np.random.default_rng(2), 8_000, [5, 3, 1])
    wrong = estimates(norms, [3, 3, 3])[:, 1]
    factor = (1 / harmonic_mean([5, 3, 1]) - 1 / 9) / (1 / 3 - 1 / 9)
    assert factor == pytest.approx(1.8)
    assert standard_errors_off(wrong, factor * Regression.grad_variance) < 3
    assert standard_errors_off(wrong, Regression.grad_variance) > 20


def test_two_equal_parts_by_hand() -> None:
    assert two_batch_estimate([3.0, 3.0], [4, 4], 2.0) == pytest.approx((1.0, 8.0))
    assert two_batch_estimate([3.0, 3.0], [4, 4], 1.0) == pytest.approx((-1.0, 16.0))  # unclamped


def test_lists_arrays_and_tensors_give_the_same_estimate() -> None:
    expected = two_batch_estimate([3.0, 2.0, 4.0], [4, 2, 1], 2.0)
    norms = [3.0, 2.0, 4.0]
    assert two_batch_estimate(np.array(norms), np.array([4, 2, 1]), np.float64(2)) == expected
    assert two_batch_estimate(torch.tensor(norms), torch.tensor([4, 2, 1]), torch.tensor(2.0)) == expected
    assert two_batch_estimate([torch.tensor(n) for n in norms], (4, 2, 1), 2) == expected


@pytest.mark.parametrize(
    ("norms", "sizes", "whole"),
    [
        ([3.0], [4], 3.0),
        ([], [], math.nan),
        ([3.0, math.inf], [4, 4], 2.0),
        ([3.0, math.nan], [4, 4], 2.0),
        ([3.0, 3.0], [4, 4], math.nan),
        ([3.0, 3.0], [4, 4], math.inf),
    ],
)
def test_updates_that_say_nothing_are_nan_and_skipped(norms: list[float], sizes: list[int], whole: float) -> None:
    assert all(map(math.isnan, two_batch_estimate(norms, sizes, whole)))
    scale = GradientNoiseScale()
    scale.update([3.0, 3.0], [4, 4], 2.0)
    before = scale.grad_sq_norm, scale.grad_variance
    scale.update(norms, sizes, whole)
    assert (scale.grad_sq_norm, scale.grad_variance) == before
    assert (scale.measurements, scale.skipped) == (1, 1)


def test_without_replacement_the_superpopulation_is_estimated() -> None:
    rng = np.random.default_rng(3)
    population = rng.standard_normal((100, 20)) * 1.7 + 0.3
    drawn = np.stack([rng.choice(100, 16, replace=False) for _ in range(8_000)])
    values = estimates(norms_of(population[drawn], [4] * 4), [4] * 4)
    sq_norm, variance = exact_noise(population)
    assert standard_errors_off(values[:, 1], variance) < 3
    assert standard_errors_off(values[:, 0], superpopulation_sq_norm(population)) < 3
    assert standard_errors_off(values[:, 0], sq_norm) > 10


# -------------------------------------------------------------------------------------------------- averages


def test_first_update_is_its_own_average() -> None:
    scale = GradientNoiseScale(memory=1e6)
    assert math.isnan(scale.grad_sq_norm) and math.isnan(scale.grad_variance)
    scale.update([3.0, 3.0], [4, 4], 2.0)
    assert scale.grad_sq_norm == pytest.approx(1.0, rel=1e-12)
    assert scale.grad_variance == pytest.approx(8.0, rel=1e-12)


def test_debiasing_by_the_count_of_passes_would_shrink_the_first_parts_tenfold() -> None:
    """gpt-neox divides by ``1 - decay**passes`` though its averages move once in ten passes."""
    decay, passes = 0.99, 10
    scale = GradientNoiseScale(memory=-8 / math.log(decay))
    scale.update([3.0, 3.0], [4, 4], 2.0)
    wrong = (1 - decay) * 8.0 / (1 - decay**passes)
    assert wrong == pytest.approx(0.105 * 8.0, rel=0.01)
    assert scale.grad_variance == pytest.approx(8.0)


def test_averages_equal_the_slow_sum_over_all_updates_after_resizes_and_joined_blocks() -> None:
    rng = np.random.default_rng(4)
    scale, memory, history = GradientNoiseScale(memory=3_000), 3_000, []
    for updates, sizes in [(120, [5, 3, 1]), (60, [32] * 8), (120, [8] * 4)]:
        norms = NoisyQuadratic.draw(rng, updates, sizes)
        feed(scale, norms, sizes)
        history += [(g, s, sum(sizes)) for g, s in estimates(norms, sizes)]
    sq_norms, variances, samples = zip(*history, strict=True)
    assert scale.grad_sq_norm == pytest.approx(decayed_average(sq_norms, samples, memory), rel=1e-10)
    assert scale.grad_variance == pytest.approx(decayed_average(variances, samples, memory), rel=1e-10)


@pytest.mark.parametrize("size", [8, 64, 512])
def test_memory_is_counted_in_samples_whatever_the_batch_size(size: int) -> None:
    scale = GradientNoiseScale(memory=4096)
    for _ in range(40 * 4096 // 64):
        scale.update([3.0, 3.0], [32, 32], 2.0)  # |G|^2 = 1
    for _ in range(4096 // size):
        scale.update([4.0, 4.0], [size // 2, size // 2], 3.0)  # |G|^2 = 2
    assert scale.grad_sq_norm == pytest.approx(2 - math.exp(-1), rel=1e-9)


def test_an_eightfold_batch_weighs_eightfold() -> None:
    scale = GradientNoiseScale(memory=FOREVER)
    scale.update([3.0, 3.0], [4, 4], 2.0)  # |G|^2 = 1
    scale.update([12.0, 12.0], [32, 32], 11.0)  # |G|^2 = 10
    assert scale.grad_sq_norm == pytest.approx((1 + 8 * 10) / 9, rel=1e-3)


def test_noise_scale_is_the_ratio_of_averages_and_not_the_average_of_ratios() -> None:
    sizes = [16] * 8
    norms = Regression.draw(np.random.default_rng(5), 8_000, sizes)
    truth = Regression.grad_variance / Regression.grad_sq_norm
    values = estimates(norms, sizes)
    scale = feed(GradientNoiseScale(memory=FOREVER), norms, sizes)
    assert scale.noise_scale == pytest.approx(truth, rel=0.01)
    assert (values[:, 1] / values[:, 0]).mean() > 1.03 * truth


def test_memory_may_be_changed_between_updates() -> None:
    scale = GradientNoiseScale(memory=FOREVER)
    scale.update([3.0, 3.0], [4, 4], 2.0)
    scale.memory = 8
    scale.update([4.0, 4.0], [4, 4], 3.0)
    assert scale.grad_sq_norm == pytest.approx(2.0)  # the first one's weight, 8 / FOREVER, is next to nothing


def test_memory_and_state_stay_bounded_in_a_long_run() -> None:
    scale = GradientNoiseScale(memory=20_000)
    norms = NoisyQuadratic.draw(np.random.default_rng(6), 10_000, [8, 8])
    feed(scale, norms, [8, 8])
    blocks = scale.state_dict()["blocks"]
    assert 50 < len(blocks) <= 97 and scale.measurements == 10_000
    # Even weights: next to nothing of the 64 blocks' evidence about the spread is lost.
    squares = np.array(blocks)[:-1, 0] ** 2
    assert squares.sum() ** 2 / (squares**2).sum() > 45


def test_an_update_much_larger_than_the_memory_leaves_only_itself() -> None:
    scale = GradientNoiseScale(memory=1)
    for k in range(100):
        scale.update([3.0 + k, 3.0 + k], [4000, 4000], 2.0 + k)
    assert scale.grad_sq_norm == pytest.approx(100.0)
    assert math.isnan(scale.noise_scale) and all(map(math.isnan, scale.interval()))


def test_reset_forgets_everything_but_the_memory() -> None:
    scale = feed(GradientNoiseScale(memory=500), NoisyQuadratic.draw(np.random.default_rng(7), 9, [8, 8]), [8, 8])
    scale.update([1.0], [4], 1.0)
    scale.reset()
    assert scale.state_dict() == GradientNoiseScale(memory=500).state_dict()


# ----------------------------------------------------------------------------------------- identified or not


def test_fewer_than_eight_measurements_identify_nothing() -> None:
    scale = GradientNoiseScale()
    for count in range(1, 9):
        scale.update([3.0, 3.0], [4, 4], 2.0)
        assert scale.identified == (count == 8)
        assert math.isnan(scale.interval()[0]) == (count < 8)
    assert scale.noise_scale == pytest.approx(8.0)
    assert scale.interval() == pytest.approx((8.0, 8.0))


def test_negative_sq_norm_stays_visible_and_is_no_noise_scale() -> None:
    scale = GradientNoiseScale(memory=FOREVER)
    feed(scale, NoisyQuadratic.draw(np.random.default_rng(9), 40, EIGHTS, theta=0.0), EIGHTS)
    assert scale.grad_sq_norm < 0
    assert math.isnan(scale.noise_scale) and not scale.identified
    low, high = scale.interval()
    assert low > 10 and high == math.inf  # the data do exclude a small noise scale

    certainly_negative = GradientNoiseScale()
    for _ in range(100):
        certainly_negative.update([3.0, 3.0], [4, 4], 1.0)
    assert certainly_negative.grad_sq_norm == pytest.approx(-1.0)
    assert math.isnan(certainly_negative.noise_scale)
    assert certainly_negative.interval() == (math.inf, math.inf)


def test_all_gradients_zero_is_not_identified() -> None:
    scale = GradientNoiseScale()
    for _ in range(20):
        scale.update([0.0, 0.0], [4, 4], 0.0)
    assert math.isnan(scale.noise_scale)
    assert (scale.grad_sq_norm, scale.grad_variance) == (0.0, 0.0)
    assert scale.interval() == (0.0, math.inf)


def test_no_gradient_is_rarely_taken_for_one_however_often_it_is_looked_at() -> None:
    rng, found, runs = np.random.default_rng(9), 0, 100
    for _ in range(runs):
        scale = GradientNoiseScale(memory=64 * 100)
        identified = False
        for _ in range(30):
            feed(scale, NoisyQuadratic.draw(rng, 10, EIGHTS, theta=0.0), EIGHTS)
            identified |= scale.identified
        found += identified
    assert found / runs <= 0.08


# ------------------------------------------------------------------------------------------------- intervals


@pytest.mark.parametrize(
    ("problem", "updates", "sizes", "memory"),
    [
        pytest.param(Regression, 64, EIGHTS, FOREVER, id="regression-64-measurements"),
        pytest.param(NoisyQuadratic, 64, EIGHTS, FOREVER, id="quadratic-64-measurements"),
        pytest.param(NoisyQuadratic, 64, EIGHTS, 16 * 64, id="quadratic-memory-of-16-measurements"),
        pytest.param(NoisyQuadratic, 64, [5, 3, 1], FOREVER, id="quadratic-uneven-parts"),
        pytest.param(NoisyQuadratic, 100, EIGHTS, 60 * 64, id="quadratic-joined-blocks"),
    ],
)
def test_95_percent_interval_covers_the_truth_93_to_97_times_in_100(
    problem: Problem, updates: int, sizes: list[int], memory: float
) -> None:
    assert 0.93 <= coverage(problem, [(updates, sizes)], memory, runs=1_000) <= 0.97


def test_interval_covers_across_a_resize() -> None:
    plan = [(60, [8] * 4), (30, [32] * 8)]
    assert 0.93 <= coverage(NoisyQuadratic, plan, memory=20_000, runs=1_000) <= 0.97


def coverage(problem: Problem, plan: list[tuple[int, list[int]]], memory: float, runs: int, seed: int = 10) -> float:
    """Share of ``runs`` whose 95 % interval contains the noise scale; ``plan``: updates and their parts."""
    rng = np.random.default_rng(seed)
    truth = problem.grad_variance / problem.grad_sq_norm
    covered = 0
    for _ in range(runs):
        scale = GradientNoiseScale(memory=memory)
        for updates, sizes in plan:
            feed(scale, problem.draw(rng, updates, sizes), sizes)
        low, high = scale.interval(0.95)
        covered += low <= truth <= high
    return covered / runs


def test_more_confidence_is_a_wider_interval() -> None:
    norms = NoisyQuadratic.draw(np.random.default_rng(11), 64, EIGHTS)
    scale = feed(GradientNoiseScale(), norms, EIGHTS)
    (low50, high50), (low95, high95) = scale.interval(0.5), scale.interval(0.95)
    assert low95 < low50 < scale.noise_scale < high50 < high95


@pytest.mark.parametrize(
    ("dof", "confidence", "table"),
    [
        (1, 0.95, 12.7062),
        (2, 0.95, 4.3027),
        (7, 0.95, 2.3646),
        (10, 0.95, 2.2281),
        (30, 0.95, 2.0423),
        (63, 0.95, 1.9983),
        (1, 0.5, 1.0),
        (2, 0.99, 9.9248),
        (5, 0.99, 4.0321),
        (63, 0.99, 2.6561),
        (10, 0.999, 4.5869),
        (1e6, 0.95, 1.95997),
    ],
)
def test_t_quantile_agrees_with_printed_tables(dof: float, confidence: float, table: float) -> None:
    assert student_t_quantile(confidence, dof) == pytest.approx(table, abs=5.1e-5)


@pytest.mark.parametrize("dof", [1, 5, 10, 176, 889, 1000])
def test_t_quantile_does_not_fall_up_to_the_last_confidence_below_one(dof: float) -> None:
    quantiles = [student_t_quantile(1 - 2.0**-bits, dof) for bits in (10, 20, 30, 40, 53)]
    assert quantiles == sorted(quantiles) and quantiles[-1] < math.inf


def blocks_of(rows: Array, weights: Array) -> list[list[float]]:
    """``[K, 3]`` values of the norm, the share and the variance, as sums with ``[K]`` weights, alike for all three."""
    norm, share, variance = (weights * column for column in rows.T)
    blocks: list[list[float]] = np.stack([weights, norm, weights, share, variance], 1).tolist()
    return blocks


def test_jackknife_of_equal_weights_is_the_textbook_one() -> None:
    rows = np.random.default_rng(12).standard_normal((12, 3))
    covariance, _ = jackknife(blocks_of(rows, np.full(12, 0.3)))
    estimates = np.stack([rows[:, 2], rows[:, 0] - rows[:, 1]], 1)
    np.testing.assert_allclose(covariance, delete_one_covariance(estimates), rtol=1e-12)


def test_jackknife_is_unbiased_when_variance_is_inverse_to_weight() -> None:
    rng, weights = np.random.default_rng(13), np.array([1.0, 2, 4, 8, 16, 32])
    rows = rng.standard_normal((20_000, 6, 3)) / np.sqrt(weights)[:, None]
    variances = np.array([np.diag(jackknife(blocks_of(r, weights))[0]) for r in rows])
    assert standard_errors_off(variances[:, 0], 1 / weights.sum()) < 3
    assert standard_errors_off(variances[:, 1], 2 / weights.sum()) < 3  # of a difference of two


def test_jackknife_leaves_out_blocks_of_norms_and_of_measurements_by_their_own_weights() -> None:
    rng = np.random.default_rng(14)
    blocks = rng.uniform(0.5, 2.0, (9, 5))
    blocks[::3, 2:] = 0.0  # nothing was measured there

    def estimates(kept: Array) -> Array:
        weight, norm, measured, share, variance = kept.sum(0)
        return np.array([variance / measured, norm / weight - share / measured])

    (of_variance, joint), (_, of_sq_norm) = jackknife(blocks.tolist())[0]
    # Left out of the measurements alone, a block moves both estimates; of the norms alone, only |G|^2.
    by_variance = by_joint = by_sq_norm = 0.0
    total, measured = blocks[:, 0].sum(), blocks[:, 2].sum()
    for k in range(len(blocks)):
        without_norm, without_parts = blocks.copy(), blocks.copy()
        without_norm[k, :2], without_parts[k, 2:] = 0.0, 0.0
        from_norm = (estimates(without_norm) - estimates(blocks)) * np.sqrt(1 - blocks[k, 0] / total)
        from_parts = (estimates(without_parts) - estimates(blocks)) * np.sqrt(1 - blocks[k, 2] / measured)
        moved = from_norm + from_parts
        by_variance, by_joint = by_variance + moved[0] ** 2, by_joint + moved[0] * moved[1]
        by_sq_norm += moved[1] ** 2
    assert (of_variance, joint, of_sq_norm) == pytest.approx((by_variance, by_joint, by_sq_norm))


@pytest.mark.parametrize(
    ("weights", "freedom"),
    [
        pytest.param([0.2] * 7, 6, id="equal"),
        pytest.param([1.0, 1e-9, 1e-9], 0, id="one-has-all"),
        pytest.param([1.0, 1.0, 1.0, 1e-9], 2, id="three-have-all"),
    ],
)
def test_degrees_of_freedom_are_of_the_blocks_that_weigh(weights: list[float], freedom: int) -> None:
    rows = np.tile([[1.0, 1.0, 0.0], [2.0, 2.0, 0.0]], (4, 1))[: len(weights)]
    _, found = jackknife(blocks_of(rows, np.array(weights)))
    assert found == freedom


def test_measurements_that_have_decayed_to_nothing_say_nothing() -> None:
    scale = GradientNoiseScale(memory=10)
    for _ in range(10):
        scale.update([3.0, 3.1], [4, 4], 2.0)
    for _ in range(2000):
        scale.update_norm(2.0, 8)
    assert math.isnan(scale.grad_sq_norm) and math.isnan(scale.grad_variance) and math.isnan(scale.noise_scale)
    assert not scale.identified
    resumed = GradientNoiseScale()
    resumed.load_state_dict(scale.state_dict())
    for one in (scale, resumed):
        one.update([3.0, 3.1], [4, 4], 2.0)
    assert resumed.grad_sq_norm == scale.grad_sq_norm == pytest.approx(0.95)


@pytest.mark.parametrize("spread", [0, 1])
@pytest.mark.parametrize("magnitude", [1e160, 1e300])
def test_norms_of_a_run_that_diverges_say_nothing(magnitude: float, spread: int) -> None:
    scale = GradientNoiseScale(memory=FOREVER)
    for k in [spread * update for update in range(20)]:
        scale.update([magnitude * (3 + k), magnitude], [4, 4], magnitude * 1.5)
        scale.update_norm(magnitude / (1 + k), 8)
        assert not scale.identified and math.isnan(scale.noise_scale)


def test_fieller_ends_are_where_the_ratio_is_t_standard_errors_off() -> None:
    means, covariance, t = (60.0, 2.5), ((4.0, -0.3), (-0.3, 0.1)), 2.0
    low, high = fieller_interval(means, covariance, t)
    for ratio in (low, high):
        direction = np.array([1.0, -ratio])
        assert abs(direction @ means) == pytest.approx(t * math.sqrt(direction @ np.array(covariance) @ direction))
    assert low < 24 < high < math.inf


def test_fieller_of_means_whose_squares_overflow_says_nothing() -> None:
    assert not math.isfinite(fieller_interval((1e200, 1e200), ((0.0, 0.0), (0.0, 0.0)), 2.0)[1])


def test_fieller_has_no_upper_end_when_the_denominator_may_be_zero() -> None:
    low, high = fieller_interval((60.0, 0.1), ((4.0, 0.0), (0.0, 0.25)), 2.0)
    assert high == math.inf
    assert 60 - 0.1 * low == pytest.approx(2 * math.sqrt(4 + 0.25 * low**2))


@pytest.mark.parametrize(
    ("means", "expected"),
    [
        pytest.param((0.1, 0.1), (0.0, math.inf), id="both-near-0"),
        pytest.param((-60.0, 0.1), (0.0, math.inf), id="numerator-negative"),
        pytest.param((60.0, -5.0), (math.inf, math.inf), id="denominator-negative"),
        pytest.param((-60.0, 5.0), (0.0, 0.0), id="ratio-negative"),
    ],
)
def test_fieller_keeps_to_ratios_that_can_be(means: tuple[float, float], expected: tuple[float, float]) -> None:
    # With these variances and t = 2, zero is excluded for a numerator beyond 4 and a denominator beyond 1.
    assert fieller_interval(means, ((4.0, 0.0), (0.0, 0.25)), 2.0) == expected


# -------------------------------------------------------------------------------------------- a real network


def trained_digits_model() -> tuple[nn.Module, torch.Tensor, torch.Tensor]:
    """A small classifier on the 1797 digits after 300 steps of SGD, from then on frozen."""
    digits = load_digits()
    x, y = torch.tensor(digits.data) / 16, torch.tensor(digits.target)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10)).double()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(300):
        batch = torch.randint(len(x), (64,))
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x[batch]), y[batch]).backward()
        optimizer.step()
    return model, x, y


def gram_norms(gram: Array, drawn: NDArray[np.int64], parts: int) -> Norms:
    """Norms of the parts' and the whole's mean gradients from all inner products ``[N, N]``."""
    size = drawn.shape[1] // parts
    part_norms, whole_norms = [], []
    for rows in np.array_split(drawn, max(1, len(drawn) // 200)):
        block = gram[rows[:, :, None], rows[:, None, :]].reshape(len(rows), parts, size, parts, size)
        sums = block.sum((2, 4))
        part_norms.append(np.diagonal(sums, axis1=1, axis2=2) / size**2)
        whole_norms.append(sums.sum((1, 2)) / (parts * size) ** 2)
    return np.concatenate(part_norms), np.concatenate(whole_norms)


def test_digits_network_agrees_with_all_1797_per_example_gradients() -> None:
    model, x, y = trained_digits_model()
    gradients = per_example_gradients(model, nn.functional.cross_entropy, x, y)
    sq_norm, variance = exact_noise(gradients)
    predicted = superpopulation_sq_norm(gradients)
    rng = np.random.default_rng(14)
    drawn = np.stack([rng.choice(len(x), 64, replace=False) for _ in range(10_000)])
    norms = gram_norms(gradients @ gradients.T, drawn, parts=8)

    # What backward passes over the parts give is what these norms are.
    parts = [flat_gradient(model, nn.functional.cross_entropy(model(x[i]), y[i])) for i in drawn[0].reshape(8, 8)]
    np.testing.assert_allclose([(g**2).sum() for g in parts], norms[0][0], rtol=1e-9)
    assert part_norms([gradients[i] for i in drawn[0].reshape(8, 8)])[2] == pytest.approx(norms[1][0])

    values = estimates(norms, EIGHTS)
    assert standard_errors_off(values[:, 1], variance) < 3
    assert standard_errors_off(values[:, 0], predicted) < 3
    assert standard_errors_off(values[:, 0], sq_norm) > 3
    assert 0.2 < (values[:, 0] < 0).mean() < 0.6  # single updates say next to nothing

    scale = feed(GradientNoiseScale(memory=FOREVER), norms, EIGHTS)
    low, high = scale.interval()
    assert low <= variance / predicted <= high
    assert scale.noise_scale == pytest.approx(variance / predicted, rel=0.1)


# ----------------------------------------------------------------------------------------------------- state


def test_state_survives_a_checkpoint_and_continues_like_the_uninterrupted_run() -> None:
    sizes = [5, 3, 1]
    norms = NoisyQuadratic.draw(np.random.default_rng(15), 200, sizes)
    first, second = (norms[0][:90], norms[1][:90]), (norms[0][90:], norms[1][90:])
    uninterrupted = feed(GradientNoiseScale(memory=700), norms, sizes)

    file = io.BytesIO()
    interrupted = feed(GradientNoiseScale(memory=700), first, sizes)
    torch.save(interrupted.state_dict(), file)
    file.seek(0)
    resumed = GradientNoiseScale()
    resumed.load_state_dict(torch.load(file, weights_only=True))
    assert resumed.state_dict() == interrupted.state_dict() != uninterrupted.state_dict()
    feed(resumed, second, sizes)
    assert resumed.state_dict() == uninterrupted.state_dict()
    assert resumed.interval() == uninterrupted.interval()


def test_state_of_an_unused_scale_can_be_loaded() -> None:
    scale = GradientNoiseScale()
    scale.load_state_dict(GradientNoiseScale(memory=5).state_dict())
    assert scale.memory == 5 and scale.measurements == 0


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("memory", 0.0),
        ("memory", "long"),
        ("blocks", [[1.0, 2.0]]),
        ("blocks", [[1.0, 2.0, 1.0, 3.0, math.nan]]),
        ("blocks", [[0.0, 2.0, 0.0, 3.0, 4.0], [1.0, 2.0, 1.0, 3.0, 4.0]]),
        ("blocks", [[1.0, 2.0, -1.0, 3.0, 4.0]]),
        ("blocks", [[1.0, 2.0, 1.0, 3.0, 4.0]] * 66),
        ("blocks", [1.0, 2.0, 3.0]),
        ("blocks", "none"),
        ("blocks", None),
        ("blocks", []),
        ("units", [1.0]),
        ("measurements", -1),
        ("measurements", 1),
        ("measurements", 2.5),
        ("measurements", True),
        ("skipped", None),
        ("surplus", 1),
    ],
)
def test_malformed_state_is_refused_and_changes_nothing(key: str, value: object) -> None:
    scale = feed(GradientNoiseScale(), NoisyQuadratic.draw(np.random.default_rng(16), 3, [8, 8]), [8, 8])
    before = scale.state_dict()
    good = feed(GradientNoiseScale(memory=77), NoisyQuadratic.draw(np.random.default_rng(17), 5, [8, 8]), [8, 8])
    with pytest.raises(ValueError, match=r"pass|load what state_dict\(\) returned"):
        scale.load_state_dict({**good.state_dict(), key: value})
    assert scale.state_dict() == before


@pytest.mark.parametrize("key", ["memory", "blocks", "units", "measurements", "skipped"])
def test_state_without_one_of_its_parts_is_refused(key: str) -> None:
    state = GradientNoiseScale().state_dict()
    del state[key]
    with pytest.raises(ValueError, match="not \\["):
        GradientNoiseScale().load_state_dict(state)


# ------------------------------------------------------------------------------------------------- arguments


def test_sizes_and_norms_must_go_together() -> None:
    scale = GradientNoiseScale()
    with pytest.raises(ValueError, match="3 squared norms do not go with 2 part sizes"):
        scale.update([1.0, 2.0, 3.0], [4, 4], 1.0)
    with pytest.raises(ValueError, match=r"a part of 0\.0 samples"):
        scale.update([1.0, 2.0], [4, 0], 1.0)
    assert scale.measurements == scale.skipped == 0


@pytest.mark.parametrize("memory", [0, -5, math.inf, math.nan, "100", None, True])
def test_memory_must_be_a_positive_number(memory: object) -> None:
    with pytest.raises(ValueError, match="not a positive number of samples"):
        GradientNoiseScale(memory=memory)  # type: ignore[arg-type]


@pytest.mark.parametrize("confidence", [0, 1, 95, math.nan])
def test_confidence_must_be_a_probability(confidence: float) -> None:
    with pytest.raises(ValueError, match=f"confidence={confidence} is not a probability"):
        GradientNoiseScale().interval(confidence)


def test_degrees_of_freedom_must_be_at_least_one() -> None:
    with pytest.raises(ValueError, match=r"dof=0\.5"):
        student_t_quantile(0.95, 0.5)


# ------------------------------------------------------------------------- updates whose parts are not measured


def feed_some(scale: GradientNoiseScale, norms: Norms, sizes: Sequence[int], every: int) -> GradientNoiseScale:
    """The parts of each ``every``-th update, of the others the norm."""
    for k, (parts, whole) in enumerate(zip(norms[0].tolist(), norms[1].tolist(), strict=True)):
        if k % every == every - 1:
            scale.update(parts, sizes, whole)
        else:
            scale.update_norm(whole, sum(sizes))
    return scale


@pytest.mark.parametrize("problem", [Regression, NoisyQuadratic])
@pytest.mark.parametrize("sizes", [EIGHTS, [1] * 32], ids=["eights", "examples"])
def test_averages_with_norms_of_unmeasured_updates_are_unbiased(problem: Problem, sizes: list[int]) -> None:
    rng = np.random.default_rng(31)
    scales = [feed_some(GradientNoiseScale(memory=FOREVER), problem.draw(rng, 40, sizes), sizes, 8) for _ in range(400)]
    assert standard_errors_off(np.array([scale.grad_sq_norm for scale in scales]), problem.grad_sq_norm) < 3
    assert standard_errors_off(np.array([scale.grad_variance for scale in scales]), problem.grad_variance) < 3


@pytest.mark.parametrize("sizes", [EIGHTS, [1] * 32], ids=["eights", "examples"])
def test_intervals_with_norms_of_unmeasured_updates_cover_the_truth(sizes: list[int]) -> None:
    rng, truth = np.random.default_rng(32), NoisyQuadratic.grad_variance / NoisyQuadratic.grad_sq_norm
    hits = []
    for _ in range(600):
        norms = NoisyQuadratic.draw(rng, 320, sizes)
        low, high = feed_some(GradientNoiseScale(memory=FOREVER), norms, sizes, 8).interval(0.95)
        hits.append(low <= truth <= high)
    assert 0.93 <= np.mean(hits) <= 0.97


def test_norms_of_all_updates_identify_what_the_measured_ones_alone_do_not() -> None:
    """At ``phi = 20 B``, with the norms of single examples in each eighth of 800 updates."""
    theta = math.sqrt(NoisyQuadratic.grad_variance / (20 * 32) / float((NoisyQuadratic.h**2).sum()))
    sizes, rng = [1] * 32, np.random.default_rng(33)
    with_norms, without = 0, 0
    for _ in range(20):
        norms = NoisyQuadratic.draw(rng, 800, sizes, theta)
        with_norms += feed_some(GradientNoiseScale(memory=FOREVER), norms, sizes, 8).identified
        without += feed(GradientNoiseScale(memory=FOREVER), (norms[0][::8], norms[1][::8]), sizes).identified
    assert with_norms > 2 * without and with_norms > 10


def test_the_norm_of_an_unmeasured_update_must_be_finite_and_have_a_size() -> None:
    scale = GradientNoiseScale()
    scale.update_norm(math.nan, 8)
    assert scale.state_dict() == GradientNoiseScale().state_dict()
    with pytest.raises(ValueError, match="an update of 0 samples cannot be measured"):
        scale.update_norm(1.0, 0)


def test_norms_alone_say_nothing() -> None:
    scale = GradientNoiseScale()
    for _ in range(50):
        scale.update_norm(1.0, 8)
    assert math.isnan(scale.grad_sq_norm) and math.isnan(scale.noise_scale)


def test_a_confidence_that_is_no_probability_is_refused() -> None:
    with pytest.raises(ValueError, match=r"confidence=1\.0 is not a probability"):
        GradientNoiseScale(confidence=1.0)


@pytest.mark.parametrize(
    ("sizes", "variance"),
    [([32, 32, 32, 4], 320.0), ([32] * 6 + [8], 320.0), ([16] * 112 + [2], 1000.0), ([16, 48, 20, 44, 30], 320.0)],
)
def test_tails_and_other_small_updates_do_not_bias_an_average_of_few_measurements(
    sizes: list[int], variance: float
) -> None:
    # Norms as exact as can be, |G|^2 = 1: what is left is the weighting, of measurements that grow rare.
    scale, found = GradientNoiseScale(), []
    for update, size in zip(range(4000), itertools.cycle(sizes), strict=False):
        scale.memory = max(32 * size, sum(sizes) / len(sizes) * update / 4)
        parts = [size - size // 2, size // 2]
        if measures_noise(update, PARTS):
            scale.update([1 + variance / n for n in parts], parts, 1 + variance / size)
        else:
            scale.update_norm(1 + variance / size, size)
        if update > 2000:
            found.append(scale.grad_sq_norm)
    assert np.mean(found) == pytest.approx(1.0, abs=0.02)
    assert all(0.85 < sq_norm < 1.15 for sq_norm in found)
    assert scale.identified


def test_updates_since_the_last_measured_one_do_not_bias_the_average_after_a_resize() -> None:
    scale = GradientNoiseScale(memory=20_000)
    for update in range(2000):
        if update % 10 == 9:
            scale.update([1 + 256 / 32] * 2, [32, 32], 1 + 256 / 64)
        else:
            scale.update_norm(1 + 256 / 64, 64)
    for _ in range(30):
        scale.update_norm(1 + 256 / 512, 512)
        assert scale.grad_sq_norm == pytest.approx(1.0, rel=1e-9)


def test_norms_in_units_of_their_own_by_hand() -> None:
    # |G|^2 of 4 and 1, tr(Sigma) of 80 and 20: in units of 4 and 1 both are 1 and 20; 2 / (1/4 + 1) = 1.6.
    scale = GradientNoiseScale(memory=1e9)
    for unit in (4.0, 1.0):
        scale.update([unit * (1 + 20 / 8)] * 2, [8, 8], unit * (1 + 20 / 16), unit=unit)
        scale.update_norm(unit * (1 + 20 / 16), 16, unit=unit)
    assert scale.grad_sq_norm == pytest.approx(1.6)
    assert scale.grad_variance == pytest.approx(32.0)
    again = GradientNoiseScale()
    again.load_state_dict(scale.state_dict())
    assert (again.grad_sq_norm, again.grad_variance) == (scale.grad_sq_norm, scale.grad_variance)


def test_a_unit_is_forgotten_with_the_norms_that_were_in_it() -> None:
    scale = GradientNoiseScale(memory=16)
    for update in range(1000):
        unit = 1e6 if update < 500 else 1.0
        scale.update([unit * (1 + 20 / 8)] * 2, [8, 8], unit * (1 + 20 / 16), unit=unit)
    assert (scale.grad_sq_norm, scale.grad_variance) == pytest.approx((1.0, 20.0))


def test_a_unit_that_all_norms_share_changes_nothing() -> None:
    rng = np.random.default_rng(0)
    plain, scaled = GradientNoiseScale(memory=3000), GradientNoiseScale(memory=3000)
    for _ in range(400):
        parts, norm = (10 + 3 * rng.standard_normal(2)).tolist(), 8 + rng.standard_normal()
        plain.update(parts, [8, 8], norm)
        scaled.update(parts, [8, 8], norm, unit=1e-3)
    assert scaled.grad_sq_norm == pytest.approx(plain.grad_sq_norm)
    assert scaled.grad_variance == pytest.approx(plain.grad_variance)
    assert scaled.interval() == pytest.approx(plain.interval())
    assert scaled.noise_scale == pytest.approx(plain.noise_scale)
