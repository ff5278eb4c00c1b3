"""Shares of a batch for ranks that are not equally fast."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from adaptive_batch.shares import balanced_weights, share_sizes


@given(st.lists(st.integers(1, 200), min_size=1, max_size=12), st.integers(0, 500))
def test_shares_are_an_exact_partition_in_proportion_with_a_sample_for_everyone(weights: list[int], more: int) -> None:
    samples = len(weights) + more
    sizes = share_sizes(samples, weights)
    assert sum(sizes) == samples and min(sizes) >= 1
    exact = [samples * weight / sum(weights) for weight in weights]
    if min(exact) >= 1:
        assert all(abs(size - share) < 1 for size, share in zip(sizes, exact, strict=True))


def test_a_rank_twice_as_fast_takes_twice_as_much() -> None:
    weights = balanced_weights([1.0, 2.0, 2.0], [16, 16, 16])
    assert weights == [24, 12, 12]
    assert share_sizes(100, weights) == [50, 25, 25]


@pytest.mark.parametrize("times", [[1.0, 1.04], [0.98, 1.0], [1.0, math.nan], [0.0, 1.0], [math.inf, 1.0]])
def test_what_gains_little_or_is_not_known_changes_nothing(times: list[float]) -> None:
    assert balanced_weights(times, [16, 16]) == [16, 16]


@given(st.lists(st.floats(0.1, 10.0), min_size=2, max_size=6), st.lists(st.floats(0.99, 1.01), min_size=6, max_size=6))
def test_weights_do_not_flap(times: list[float], wobble: list[float]) -> None:
    weights = balanced_weights(times, [16] * len(times))
    again = balanced_weights([time * factor for time, factor in zip(times, wobble, strict=False)], weights)
    assert balanced_weights(times, again) == again
