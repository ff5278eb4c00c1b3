"""The variance of inner products from the norms of two parts, against the samples' own gradients."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from test_policies import measurement

from adaptive_batch.noise import InnerProducts, inner_product_variance
from adaptive_batch.policies import InnerProductTest


def gradients(samples: int = 8, dimensions: int = 5, seed: int = 0) -> np.ndarray:
    """Skewed, of unequal variance, and not centred."""
    rng = np.random.default_rng(seed)
    return 0.3 + rng.exponential(1.0, (samples, dimensions)) * np.arange(1, dimensions + 1)


def estimate(g: np.ndarray, first: list[int]) -> float:
    other = [i for i in range(len(g)) if i not in first]
    parts = [g[first].mean(0), g[other].mean(0)]
    whole = g.mean(0)
    return inner_product_variance([float(p @ p) for p in parts], [len(first), len(other)], float(whole @ whole))


@pytest.mark.parametrize("first", [1, 3, 4, 7])
def test_over_all_splits_the_mean_is_exactly_the_samples_variance(first):
    g = gradients()
    splits = [estimate(g, list(part)) for part in itertools.combinations(range(len(g)), first)]
    assert np.mean(splits) == pytest.approx((g @ g.mean(0)).var(ddof=1), rel=1e-10)


def test_two_equal_parts_need_the_difference_of_their_norms_alone():
    # |g_1|^2 - |g_2|^2 = 2 <d, g_B>; with b = 16 each, Var = <d, g_B>^2 * 8
    assert inner_product_variance([5.0, 3.0], [16, 16], 2.5) == pytest.approx(8.0)


@pytest.mark.parametrize(
    ("norms", "sizes"), [([5.0], [32]), ([1.0, 2.0, 3.0], [8, 8, 8]), ([math.nan, 1.0], [8, 8]), ([], [])]
)
def test_other_than_two_finite_parts_tell_nothing(norms, sizes):
    assert math.isnan(inner_product_variance(norms, sizes, 1.0))


def test_the_average_is_not_known_before_16_measurements_and_counts_samples():
    average = InnerProducts(memory=1000)
    values = []
    for i in range(40):
        average.update([5.0 + i % 3, 3.0], [16, 16], 3.0)
        values.append(2.0 * (2.0 + i % 3) ** 2)  # ((|g_1|^2 - |g_2|^2) / 2)^2 * 8
        assert math.isnan(average.variance) == (i < 15)
    weights = np.exp(-32 / 1000 * np.arange(len(values))[::-1])
    assert average.variance == pytest.approx(np.average(values, weights=weights))
    assert average.sq_norm == pytest.approx(3.0)


def test_what_is_no_pair_is_left_out_of_the_average():
    average = InnerProducts()
    for _ in range(16):
        average.update([5.0, 3.0], [16, 16], 2.5)
    average.update([1.0, 2.0, 3.0], [8, 8, 8], 1.0)
    average.update([math.inf, 3.0], [16, 16], 2.5)
    assert average.variance == pytest.approx(8.0)


def test_the_lower_end_covers_as_often_as_it_says():
    rng = np.random.default_rng(0)
    covered = 0
    for _ in range(2000):
        average = InnerProducts(memory=1e9)  # all alike
        for apart in rng.standard_normal(20):  # |g_1|^2 - |g_2|^2 = 2 apart, so Var = 8 apart^2 with mean 8
            average.update([5.0 + apart, 5.0 - apart], [16, 16], 3.0)
        covered += average.lower <= 8.0
    assert covered / 2000 == pytest.approx(0.975, abs=0.012)


def test_a_restored_average_goes_on():
    one, other = InnerProducts(memory=500), InnerProducts(memory=500)
    for i in range(20):
        one.update([5.0 + i, 3.0], [10, 16], 3.0)
    other.load_state_dict(one.state_dict())
    one.update([9.0, 3.0], [16, 16], 3.0)
    other.update([9.0, 3.0], [16, 16], 3.0)
    assert other.state_dict() == one.state_dict()


@pytest.mark.parametrize(
    "wrong", [{}, None, {"total": 1.0, "norms": 1.0, "weight": -1.0, "squares": 1.0, "samples": 1.0, "measurements": 3}]
)
def test_something_else_than_a_state_is_refused(wrong):
    with pytest.raises(ValueError, match="not the state of InnerProducts"):
        InnerProducts().load_state_dict(wrong)


def exact_tests(g: np.ndarray, theta: float, nu: float) -> tuple[float, float]:
    """What Bollapragada, Byrd and Nocedal's two tests ask for, from the gradient of every sample."""
    whole = g.mean(0)
    inner, square = g @ whole, whole @ whole
    across = (g**2).sum(1) - inner**2 / square
    return inner.var(ddof=1) / (theta * square) ** 2, across.sum() / (len(g) - 1) / (nu**2 * square)


@pytest.mark.parametrize(("theta", "nu"), [(0.9, 5.84), (0.2, 0.5), (0.3, 0.1), (1.0, 1.0)])
def test_both_tests_equal_those_of_the_samples_gradients(theta, nu):
    g = gradients(16, 6, seed=3)
    whole = g.mean(0)
    variance = g.var(0, ddof=1).sum()
    m = measurement(
        batch_size=16,
        grad_variance=float(variance),
        inner_product_sq_norm=float(whole @ whole),
        inner_product_variance=float((g @ whole).var(ddof=1)),
    )
    policy = InnerProductTest(theta, nu)
    along, across = exact_tests(g, theta, nu)
    assert policy.propose(m) == max(16, math.ceil(max(along, across)))
    assert InnerProductTest(theta, None).propose(m) == max(16, math.ceil(along))
    assert policy.reason(m, 16) == (
        f"inner-product test asks for {math.ceil(along)}, orthogonality test for {math.ceil(across)}"
    )


def test_at_theta_and_nu_of_one_the_tests_add_up_to_the_norm_test():
    g = gradients(16, 6, seed=5)
    along, across = exact_tests(g, 1.0, 1.0)
    whole = g.mean(0)
    assert along + across == pytest.approx(g.var(0, ddof=1).sum() / (whole @ whole), rel=1e-12)


@pytest.mark.parametrize(
    "unknown",
    [{"inner_product_variance": math.nan}, {"inner_product_sq_norm": math.nan}, {"inner_product_sq_norm": 0.0}],
)
def test_the_size_stays_while_something_is_not_known(unknown):
    known = {"grad_variance": 64.0, "inner_product_sq_norm": 1.0, "inner_product_variance": 50.0}
    assert InnerProductTest(0.1).propose(measurement(**known)) > 32
    m = measurement(**known | unknown)
    assert InnerProductTest(0.1).propose(m) == 32.0
    assert InnerProductTest(0.1).reason(m, 32).startswith("inner products not known")


@pytest.mark.parametrize("arguments", [{"theta": 0.0}, {"nu": -1.0}, {"nu": math.inf}])
def test_thresholds_without_a_size_are_refused(arguments):
    with pytest.raises(ValueError, match="gives no size"):
        InnerProductTest(**arguments)


def test_a_diverging_run_has_no_inner_products_rather_than_an_error():
    assert math.isnan(inner_product_variance([1e200, 3e200], [4, 4], 1.5e200))
    asked = measurement(batch_size=32, inner_product_variance=1.0, inner_product_sq_norm=1e-300, grad_variance=1.0)
    assert InnerProductTest().propose(asked) == 32
    asked = measurement(batch_size=32, inner_product_variance=1.0, inner_product_sq_norm=5e-324, grad_variance=1.0)
    assert InnerProductTest(0.1).propose(asked) == 32
