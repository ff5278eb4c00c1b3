"""When schedulers that step per update should step, against contract point 8 word for word."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from adaptive_batch.clocks import GainClock, PlainEpoch, SampleClock

Clock = SampleClock | GainClock
SIZES = st.lists(st.integers(1, 200), min_size=1, max_size=60)


def epoch_of(samples: int, batch_size: int, accumulate: int = 1) -> PlainEpoch:
    return PlainEpoch(samples, math.ceil(samples / batch_size), batch_size, accumulate)


def run_epoch(clock: Clock, plain: PlainEpoch, sizes: list[int]) -> list[list[int]]:
    clock.start_epoch()
    position, due = 0, []
    for i, size in enumerate(sizes):
        position += size
        due.append(clock.advance(plain, position, 1.0, last=i == len(sizes) - 1))
    return due


def plain_indices(plain: PlainEpoch) -> list[int]:
    """The batch indices (from 1) after which Lightning alone has made an update."""
    assert plain.batches is not None
    last = plain.batches
    return sorted({*range(plain.accumulate, last + 1, plain.accumulate), last})


@given(sizes=SIZES, batch_size=st.integers(1, 50), accumulate=st.integers(1, 4))
def test_after_so_many_samples_as_many_steps_as_the_contract_says(sizes, batch_size, accumulate):
    plain = epoch_of(sum(sizes), batch_size, accumulate)
    updates = plain.updates
    assert updates is not None
    assert updates == math.ceil(math.ceil(sum(sizes) / batch_size) / accumulate)
    clock, taken, position = SampleClock(), 0, 0
    for epoch in range(2):
        clock.start_epoch()
        position = 0
        for i, size in enumerate(sizes):
            position += size
            taken += len(clock.advance(plain, position, 1.0, last=i == len(sizes) - 1))
            assert taken == epoch * updates + min(updates, math.ceil(position / (batch_size * accumulate)))
    assert taken == 2 * updates


@given(sizes=SIZES, batch_size=st.integers(1, 50), accumulate=st.integers(1, 4))
def test_the_steps_of_an_epoch_are_those_of_plain_lightning_in_order(sizes, batch_size, accumulate):
    plain = epoch_of(sum(sizes), batch_size, accumulate)
    due = run_epoch(SampleClock(), plain, sizes)
    assert [index for steps in due for index in steps] == plain_indices(plain)


@pytest.mark.parametrize(("samples", "accumulate"), [(96, 1), (100, 1), (100, 2), (128, 4), (130, 4)])
@pytest.mark.parametrize("make", [SampleClock, lambda: GainClock(math.inf)])
def test_constant_size_steps_once_after_each_update(make, samples, accumulate):
    plain = epoch_of(samples, 32, accumulate)
    full, rest = divmod(samples, 32 * accumulate)
    sizes = [32 * accumulate] * full + [rest] * bool(rest)
    clock = make()
    for _ in range(3):
        assert run_epoch(clock, plain, sizes) == [[index] for index in plain_indices(plain)]


def test_an_epoch_that_ends_early_still_takes_all_its_steps():
    plain = epoch_of(1000, 100)
    clock = SampleClock()
    assert clock.advance(plain, 250, 1.0, last=False) == [1, 2, 3]
    assert clock.advance(plain, 300, 1.0, last=True) == [4, 5, 6, 7, 8, 9, 10]


def test_with_drop_last_the_plain_number_of_steps_is_not_exceeded():
    plain = PlainEpoch(1010, 10, 100)  # plain Lightning drops ten samples, a smaller size need not
    due = run_epoch(SampleClock(), plain, [100] * 10 + [10])
    assert [len(steps) for steps in due] == [1] * 10 + [0]


def test_data_without_a_length_steps_once_per_reference_size_of_samples():
    plain = PlainEpoch(None, None, 10, 2)
    due = run_epoch(SampleClock(), plain, [20, 40, 5, 15])
    assert due == [[2], [4, 6], [8], []]


@given(gains=st.lists(st.floats(0.1, 8), min_size=1, max_size=50), horizon=st.integers(1, 60))
def test_gain_clock_has_taken_the_whole_steps_of_the_progress_within_its_horizon(gains, horizon):
    clock, taken = GainClock(horizon), 0
    plain = epoch_of(320, 32)
    for i, gain in enumerate(gains):
        taken += len(clock.advance(plain, 1, gain, last=False))
        progress = math.fsum(gains[: i + 1])
        assert taken in {min(math.floor(progress + error), horizon) for error in (-1e-5, 1e-5)}


def test_gain_clock_goes_on_across_epochs():
    clock, plain = GainClock(100), epoch_of(64, 32)
    clock.start_epoch()
    assert clock.advance(plain, 64, 1.5, last=True) == [1]
    clock.start_epoch()
    assert clock.advance(plain, 64, 1.5, last=True) == [2, 1]  # the last of one epoch, the first of the next


def test_gain_clock_does_not_lose_a_step_to_rounding():
    clock, plain = GainClock(1000), epoch_of(100, 1)
    assert sum(len(clock.advance(plain, 1, 0.1, last=False)) for _ in range(100)) == 10


@pytest.mark.parametrize("make", [SampleClock, lambda: GainClock(50)])
def test_a_clock_restored_in_mid_epoch_takes_the_same_steps(make):
    plain = epoch_of(1000, 32)
    gains, sizes = [0.7, 2.3, 1.9, 4.1, 3.3], [32, 100, 300, 400, 168]
    whole, first, second = make(), make(), make()
    whole.start_epoch()
    first.start_epoch()
    position = 0
    for i, (size, gain) in enumerate(zip(sizes, gains, strict=True)):
        position += size
        if i == 3:
            second.load_state_dict(first.state_dict())
        expected = whole.advance(plain, position, gain, last=i == 4)
        assert (first if i < 3 else second).advance(plain, position, gain, last=i == 4) == expected


@pytest.mark.parametrize("state", [{}, {"taken": -1}, {"taken": 1.5}, {"taken": True}, None])
@pytest.mark.parametrize("make", [SampleClock, lambda: GainClock(50)])
def test_a_malformed_state_is_refused_and_changes_nothing(make, state):
    clock = make()
    clock.advance(epoch_of(1000, 32), 100, 3.2, last=False)
    before = clock.state_dict()
    with pytest.raises(ValueError, match="state cannot have"):
        clock.load_state_dict(state)
    assert clock.state_dict() == before


@pytest.mark.parametrize("progress", [None, math.nan, -1.0, "3"])
def test_gain_clock_refuses_progress_that_is_no_number(progress):
    clock = GainClock(50)
    with pytest.raises(ValueError, match="progress"):
        clock.load_state_dict({"taken": 3, "progress": progress})
    assert clock.taken == 0
