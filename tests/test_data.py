"""Resizable loaders: exactly once, in the sampler's order, with true sizes, and again after a resume."""

from __future__ import annotations

import copy
import io
import itertools
import os
import pickle
import random
import warnings
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    DistributedSampler,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
    SubsetRandomSampler,
    WeightedRandomSampler,
    get_worker_info,
)

from adaptive_batch.data import AdaptiveBatchSampler, Draw, make_adaptive
from adaptive_batch.distributed import SharedOrder


class Numbers(Dataset):
    def __init__(self, length):
        self.length = length

    def __len__(self):
        return self.length

    def __getitem__(self, index):
        return index, os.getpid()


class Stream(IterableDataset):
    """Shared out to workers unevenly, so that their ends come at different times."""

    def __init__(self, length):
        self.length = length

    def __len__(self):
        return self.length

    def __iter__(self):
        info = get_worker_info()
        number, workers = (info.id, info.num_workers) if info else (0, 1)
        return (i for i in range(self.length) if (0 if i % 3 else 1) % workers == number)


class Unsized:
    def __init__(self, length):
        self.length = length

    def __iter__(self):
        return iter(range(self.length))


class BucketBatches:
    """The protocol: a settable batch_size, read for every batch."""

    def __init__(self, sampler, batch_size):
        self.sampler = sampler
        self.batch_size = batch_size

    def __iter__(self):
        batch = []
        for index in self.sampler:
            batch.append(index)
            if len(batch) >= self.batch_size:
                yield batch
                batch = []
        if batch:
            yield batch

    def __len__(self):
        return -(-len(self.sampler) // self.batch_size)


class FieldLoader(DataLoader):
    def __init__(self, secret, dataset, **kwargs):
        self.secret = secret
        super().__init__(dataset, **kwargs)

    def __iter__(self):
        for batch in super().__iter__():
            yield {"x": batch}


def adapt(loader, **ranks):
    """Untyped, as a user holds it: a DataLoader's batch_sampler may be anything."""
    return make_adaptive(loader, **ranks)


def indices(batch):
    return batch[0].tolist() if isinstance(batch, list) else batch.tolist()


def resize_through(loader, sizes):
    """Indices and draw of each batch; the next size is set after every batch."""
    sampler = loader.batch_sampler
    seen, draws = [], []
    sizes = iter(sizes)
    for batch in loader:
        seen.append(indices(batch))
        draws.append(sampler.draws.popleft())
        sampler.batch_size = next(sizes, sampler.batch_size)
    sampler.end_epoch()
    return seen, draws


def flat(batches):
    return [index for batch in batches for index in batch]


def expected_sizes(length, sizes, drop_last):
    out = []
    for size in sizes:
        if length < size:
            break
        out.append(size)
        length -= size
    return out if drop_last or not length else [*out, length]


# ---- the sampler alone


@pytest.mark.parametrize("drop_last", [False, True])
@pytest.mark.parametrize("length", [23, 24])
def test_constant_size_gives_torchs_batches(length, drop_last):
    ours = AdaptiveBatchSampler(range(length), 4, drop_last)
    torchs = BatchSampler(range(length), 4, drop_last)
    assert list(ours) == list(torchs)
    assert len(ours) == len(torchs)


@pytest.mark.parametrize("drop_last", [False, True])
def test_a_size_takes_effect_at_the_next_draw(drop_last):
    sampler = AdaptiveBatchSampler(range(30), 4, drop_last)
    sizes = iter([4, 7, 2, 9, 3])
    batches, lengths = [], []
    sampler.batch_size = next(sizes)
    for batch in sampler:
        batches.append(batch)
        sampler.batch_size = next(sizes, 3)
        lengths.append(len(sampler))
    assert [len(b) for b in batches] == [4, 7, 2, 9, 3, 3] + ([] if drop_last else [2])
    assert flat(batches) == list(range(28 if drop_last else 30))
    assert lengths[-1] == len(batches)
    assert len(sampler) == (10)  # a new epoch of 30 at 3


@given(st.data())
@settings(max_examples=150, deadline=None)
def test_random_resizes_give_each_index_once_in_order_with_true_sizes_and_length(data):
    length = data.draw(st.integers(1, 60))
    world = data.draw(st.integers(1, 4))
    drop_last = data.draw(st.booleans())
    limit = data.draw(st.none() | st.integers(1, 70))
    total = length if limit is None else min(limit, length)
    if total < world and not drop_last:
        total = length = limit = world
    sizes = data.draw(st.lists(st.integers(world, 20), min_size=1, max_size=12))
    ranks = [
        AdaptiveBatchSampler([f"i{i}" for i in range(length)], sizes[0], drop_last, rank=r, world_size=world)
        for r in range(world)
    ]
    for sampler in ranks:
        sampler.sample_limit = limit
    passes = [iter(sampler) for sampler in ranks]
    seen: list = []
    draws: list = []
    for step in range(1000):
        for sampler in ranks:
            sampler.batch_size = sizes[min(step, len(sizes) - 1)]
        promised = len(ranks[0])
        shares: list = [next(p, None) for p in passes]
        if shares[0] is None:
            assert shares == [None] * world
            assert promised == step
            break
        assert promised > step
        assert len({sampler.draws[-1] for sampler in ranks}) == 1
        draw = ranks[0].draws.popleft()
        for sampler in ranks[1:]:
            sampler.draws.popleft()
        batch: list = [None] * draw.size
        for rank, share in enumerate(shares):
            batch[rank::world] = share  # fails if the partition is not exact
        seen += batch
        assert draw.position == len(seen)
        gave_way = drop_last and draws and draw.nominal == draws[-1].nominal < ranks[0].batch_size
        assert draw.nominal == ranks[0].batch_size or gave_way
        assert not gave_way or total - len(seen) + draw.size < ranks[0].batch_size
        assert draw.size == draw.nominal or not drop_last
        assert draw.last == (len(ranks[0]) == step + 1)
        draws.append(draw)
    assert seen == [f"i{i}" for i in range(len(seen))]
    missing = total - len(seen)
    assert 0 <= missing < (ranks[0].batch_size if drop_last else 1)
    assert not draws or missing < draws[-1].nominal


@given(st.data())
@settings(max_examples=150, deadline=None)
def test_an_epoch_that_was_resized_ends_in_no_batch_that_is_too_small_for_a_layer(data):
    world, least = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 4))
    own, length = data.draw(st.integers(3, 11)), data.draw(st.integers(12, 60))
    sizes = data.draw(st.lists(st.integers(12, 20), min_size=1, max_size=8))
    stop = data.draw(st.integers(0, 8))
    ranks = [AdaptiveBatchSampler(range(length), own, rank=r, world_size=world) for r in range(world)]
    passes: list = []
    for sampler in ranks:
        sampler.least_tail = world * least
        sampler.batch_size = sizes[0]
        passes.append(iter(sampler))
    seen: list = []
    drawn: list = []
    while True:
        for r, sampler in enumerate(ranks):
            sampler.batch_size = sizes[min(len(drawn), len(sizes) - 1)]
            if len(drawn) == stop:  # and go on from a state
                state = sampler.state_dict()
                ranks[r] = AdaptiveBatchSampler(range(length), own, rank=r, world_size=world)
                ranks[r].least_tail = world * least
                ranks[r].load_state_dict(state)
                passes[r] = iter(ranks[r])
        promised = len(ranks[0])
        shares: list = [next(p, None) for p in passes]
        if shares[0] is None:
            assert promised == len(drawn)
            break
        draw, *_ = [sampler.draws.popleft() for sampler in ranks]
        drawn.append(draw)
        assert draw.last == (len(ranks[0]) == len(drawn)) == (draw.position == length)
        batch: list = [None] * draw.size
        for rank, share in enumerate(shares):
            batch[rank::world] = share
        seen += batch
    assert seen == list(range(length))
    assert min(draw.size for draw in drawn) >= world * least
    assert all(draw.size == draw.nominal for draw in drawn[:-1])


def test_what_drop_last_has_left_over_does_not_come_back_with_a_smaller_size():
    sampler = AdaptiveBatchSampler(range(18), 8, drop_last=True)
    sampler.count_popped()
    passing = iter(sampler)
    assert [len(next(passing)) for _ in range(2)] == [8, 8]
    assert next(passing, None) is None  # as workers ask ahead
    sampler.batch_size = 2
    assert len(sampler) == 2 and sampler.draws[-1].last
    assert next(passing, None) is None
    sampler.draws.popleft()
    resumed = AdaptiveBatchSampler(range(18), 8, drop_last=True)
    resumed.load_state_dict(sampler.state_dict())
    assert len(resumed) == 2
    assert list(resumed) == [list(range(8, 16))]
    assert resumed.draws[-1].last


def test_at_its_own_size_an_epoch_ends_as_it_always_did():
    sampler = AdaptiveBatchSampler(range(9), 4)
    sampler.least_tail = 2
    assert [len(batch) for batch in sampler] == [4, 4, 1]
    sampler.batch_size = 8
    assert len(sampler) == 1
    assert [len(batch) for batch in sampler] == [9]


def test_a_tail_of_fewer_samples_than_ranks_joins_the_batch_before():
    ranks = [AdaptiveBatchSampler(Unsized(18), 8, rank=r, world_size=3) for r in range(3)]
    shares = [list(sampler) for sampler in ranks]
    assert [[len(b) for b in share] for share in shares] == [[3, 4], [3, 3], [2, 3]]
    assert [d.size for d in ranks[0].draws] == [8, 10]
    assert [d.last for d in ranks[0].draws] == [False, True]
    assert len(AdaptiveBatchSampler(range(18), 8, world_size=3)) == 2


@pytest.mark.parametrize("length", [24, 25, 27])
def test_a_generator_is_where_it_would_be_on_one_rank_after_each_epoch(length):
    def epochs(world: int) -> list[list[int]]:
        sampler: Any = RandomSampler(range(length), generator=torch.Generator().manual_seed(0))
        order = sampler if world == 1 else SharedOrder(sampler, 0, lambda value: value)
        batches = AdaptiveBatchSampler(order, 8, world_size=world)
        found = []
        for _ in range(3):
            drawn = iter(batches)
            while batches.consumed < length:  # a loop that knows the length does not ask for more
                next(drawn)
            found.append([draw.position for draw in batches.draws][-1:] + sampler.generator.get_state().tolist())
            batches.end_epoch()
        return found

    assert epochs(2) == epochs(1)


def test_fewer_samples_than_ranks_are_refused():
    with pytest.raises(ValueError, match="batch of 2 samples cannot be shared by 3 ranks"):
        next(iter(AdaptiveBatchSampler(range(2), 3, world_size=3)))


@pytest.mark.parametrize("value", [0, -1, 2.5, "8", None, True])
def test_a_bad_batch_size_is_refused_and_the_old_one_stays(value):
    sampler = AdaptiveBatchSampler(range(4), 2)
    with pytest.raises(ValueError, match="not a whole number of samples"):
        sampler.batch_size = value
    assert sampler.batch_size == 2


def test_a_size_below_the_number_of_ranks_and_a_wrong_rank_are_refused():
    with pytest.raises(ValueError, match="leaves some of 4 ranks without a sample"):
        AdaptiveBatchSampler(range(9), 3, world_size=4)
    with pytest.raises(ValueError, match="rank=2 is not one of world_size=2"):
        AdaptiveBatchSampler(range(9), 3, rank=2, world_size=2)


def test_numpy_sizes_are_taken_as_ints():
    sampler = AdaptiveBatchSampler(range(4), np.int64(2))  # type: ignore[arg-type]
    assert type(sampler.batch_size) is int


def test_a_sampler_without_a_length_works_and_has_no_length():
    sampler = AdaptiveBatchSampler(Unsized(10), 5)
    assert list(sampler) == [list(range(5)), list(range(5, 10))]
    assert [d.last for d in sampler.draws] == [False, True]
    with pytest.raises(TypeError, match=r"has no len\(\)"):
        len(sampler)


def test_one_rank_never_draws_an_index_ahead():
    drawn = []

    def order():
        for i in range(9):
            drawn.append(i)
            yield i

    class Lazy:
        def __iter__(self):
            return order()

    draws = iter(AdaptiveBatchSampler(Lazy(), 4))
    assert drawn == []
    next(draws)
    assert drawn == [0, 1, 2, 3]


def test_draws_of_an_abandoned_epoch_are_cleared():
    sampler = AdaptiveBatchSampler(range(10), 4)
    next(iter(sampler))
    draws = iter(sampler)
    assert len(sampler.draws) == 1
    next(draws)
    assert list(sampler.draws) == [Draw(4, 4, 4, False)]
    assert len(sampler) == 3


def test_length_speaks_of_the_next_epoch_once_the_epoch_is_over():
    sampler = AdaptiveBatchSampler(range(30), 5)
    draws = iter(sampler)
    next(draws)
    sampler.batch_size = 25
    sampler.draws.clear()
    next(draws)
    sampler.draws.popleft()
    assert len(sampler) == 2
    assert next(draws, None) is None
    assert len(sampler) == 2  # whoever pops draws says when an epoch is over
    sampler.batch_size = 30
    sampler.end_epoch()
    assert len(sampler) == 1


def test_set_epoch_reaches_the_sampler():
    inner: DistributedSampler = DistributedSampler(Numbers(10), num_replicas=1, rank=0)
    AdaptiveBatchSampler(inner, 2).set_epoch(7)
    assert inner.epoch == 7
    AdaptiveBatchSampler(range(3), 2).set_epoch(7)


# ---- state


def shuffled(kind, generator):
    if kind == "replacement":
        return RandomSampler(range(90), replacement=True, num_samples=70, generator=generator)
    if kind == "weighted":
        return WeightedRandomSampler([1.0, 2.0] * 40, 70, generator=generator)
    if kind == "subset":
        return SubsetRandomSampler(range(70), generator=generator)
    return RandomSampler(range(70), generator=generator)


def new_generator(own):
    return torch.Generator().manual_seed(5) if own else None


def saved(state):
    """Through a file, as plain numbers and tensors only."""
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@pytest.mark.parametrize("own", [False, True])
@pytest.mark.parametrize("kind", ["random", "replacement", "weighted", "subset"])
@pytest.mark.parametrize("stop", [0, 1, 4, 7])
def test_a_resumed_epoch_continues_with_what_was_left_and_then_with_the_next_one(kind, own, stop):
    torch.manual_seed(1)
    sampler = AdaptiveBatchSampler(shuffled(kind, new_generator(own)), 10)
    draws = iter(sampler)
    for _ in range(stop):
        next(draws)
        torch.rand(3)  # the training's own random numbers
    state, rng = saved(sampler.state_dict()), torch.get_rng_state()
    rest = list(draws)
    following = list(sampler)
    after = torch.get_rng_state()

    torch.manual_seed(99)
    again = AdaptiveBatchSampler(shuffled(kind, new_generator(own)), 3)
    again.load_state_dict(state)
    torch.set_rng_state(rng)
    assert len(again) == 7
    if stop:
        assert again.consumed == 10 * stop
    assert list(again) == rest
    assert list(again) == following
    assert torch.equal(torch.get_rng_state(), after)


def test_an_epoch_that_is_drawn_but_not_consumed_is_drawn_again_in_the_same_order():
    torch.manual_seed(2)
    loader = adapt(DataLoader(Numbers(30), 5, shuffle=True, num_workers=2))
    iter(loader)  # the workers hold four batches
    state = saved(loader.batch_sampler.state_dict())
    torch.manual_seed(2)
    expected = [indices(batch) for batch in adapt(DataLoader(Numbers(30), 5, shuffle=True, num_workers=2))]
    torch.manual_seed(88)
    again = adapt(DataLoader(Numbers(30), 5, shuffle=True))
    again.batch_sampler.load_state_dict(state)
    assert (state["consumed"], state["in_flight"]) == (0, [[5, 5]] * 4)
    assert [indices(batch) for batch in again] == expected


def test_a_state_between_epochs_starts_the_next_epoch():
    sampler = AdaptiveBatchSampler(shuffled("random", new_generator(True)), 10)
    first = list(sampler)
    state = saved(sampler.state_dict())
    second = list(sampler)
    again = AdaptiveBatchSampler(shuffled("random", new_generator(True)), 10)
    again.load_state_dict(state)
    assert list(again) == second != first


def test_end_epoch_after_loading_goes_to_the_next_epoch_as_it_would_have_been():
    sampler = AdaptiveBatchSampler(shuffled("random", new_generator(True)), 10)
    draws = iter(sampler)
    for _ in range(7):
        next(draws)
        sampler.draws.popleft()
    state = saved(sampler.state_dict())
    again = AdaptiveBatchSampler(shuffled("random", new_generator(True)), 10)
    again.load_state_dict(state)
    assert (len(again), again.consumed) == (7, 70)
    sampler.end_epoch()
    again.end_epoch()
    assert list(again) == list(sampler)


@pytest.mark.parametrize("module", ["numpy", "python"])
def test_orders_from_numpy_and_python_random_numbers_are_redrawn(module):
    class Custom:
        def __iter__(self):
            order = list(range(20))
            (np.random if module == "numpy" else random).shuffle(order)
            return iter(order)

    np.random.seed(0)
    random.seed(0)
    sampler = AdaptiveBatchSampler(Custom(), 6)
    draws = iter(sampler)
    next(draws)
    state = saved(sampler.state_dict())
    rest = list(draws)
    np.random.seed(8)
    random.seed(8)
    before = (np.random.get_state(legacy=False)["state"]["key"].tolist(), random.getstate())
    again = AdaptiveBatchSampler(Custom(), 6)
    again.load_state_dict(state)
    assert next(iter(again)) == rest[0]
    assert (np.random.get_state(legacy=False)["state"]["key"].tolist(), random.getstate()) == before


def test_unconsumed_batches_are_drawn_again_with_their_sizes():
    sampler = AdaptiveBatchSampler(range(40), 4)
    draws = iter(sampler)
    for size in (4, 6, 3):
        sampler.batch_size = size
        next(draws)
    sampler.draws.popleft()
    sampler.batch_size = 10
    state = saved(sampler.state_dict())
    again = AdaptiveBatchSampler(range(40), 1)
    again.load_state_dict(state)
    assert again.consumed == 4
    assert len(again) == 3 + 3
    assert saved(again.state_dict())["in_flight"] == state["in_flight"] == [[6, 6], [3, 3]]
    draws = iter(again)
    assert [next(draws), next(draws)] == [list(range(4, 10)), list(range(10, 13))]
    assert len(again) == 6
    assert [len(b) for b in draws] == [10, 10, 7]
    assert [d.position for d in again.draws] == [10, 13, 23, 33, 40]


@pytest.mark.parametrize(("before", "after"), [(1, 3), (3, 1), (2, 4)])
def test_a_state_continues_on_another_number_of_ranks(before, after):
    def ranks(world):
        return [AdaptiveBatchSampler(range(50), 8, rank=r, world_size=world) for r in range(world)]

    def global_batches(samplers, passes):
        batches = []
        for shares in zip(*passes, strict=True):
            batch: list = [None] * sum(map(len, shares))
            for rank, share in enumerate(shares):
                batch[rank :: len(samplers)] = share
            batches.append(batch)
        return batches

    first = ranks(before)
    passes = [iter(sampler) for sampler in first]
    for _ in range(3):
        for sampler, draws in zip(first, passes, strict=True):
            next(draws)
            if len(sampler.draws) == 2:
                sampler.draws.popleft()
    state = saved(first[0].state_dict())
    second = ranks(after)
    for sampler in second:
        sampler.load_state_dict(state)
    rest = global_batches(second, [iter(sampler) for sampler in second])
    assert flat(rest) == list(range(state["consumed"], 50))
    assert [len(b) for b in rest[:3]] == [8, 8, 8]


def test_the_ranks_shares_are_kept_by_as_many_ranks_and_dropped_by_others():
    def rank(of):
        return AdaptiveBatchSampler(range(60), 12, rank=0, world_size=of)

    one = rank(2)
    one.weights = (3, 1)
    next(iter(one))
    state = saved(one.state_dict())
    again, elsewhere = rank(2), rank(3)
    for sampler in (again, elsewhere):
        sampler.load_state_dict(state)
    assert (again.weights, elsewhere.weights) == ((3, 1), None)
    assert (len(next(iter(again))), len(next(iter(elsewhere)))) == (9, 4)
    assert saved(again.state_dict())["weights"] == [3, 1]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"batch_size": 0}, "batch_size=0 is not a whole number"),
        ({"consumed": -1}, "consumed=-1"),
        ({"weights": [1, 0]}, r"weights=\[1, 0\]"),
        ({"sizes": [[0, 1]]}, "not pairs of positive numbers"),
        ({"in_flight": [[4]]}, "not pairs of positive numbers"),
        ({"order": {"torch": 1}}, "has an order of"),
        ({"generator": torch.zeros(1)}, "generator of its own"),
    ],
)
def test_a_bad_state_is_refused_and_changes_nothing(change, message):
    sampler = AdaptiveBatchSampler(range(10), 4)
    draws = iter(sampler)
    next(draws)
    state = sampler.state_dict()
    with pytest.raises(ValueError, match=message):
        sampler.load_state_dict({**state, **change})
    with pytest.raises(ValueError, match=r"lacks \['order'\]"):
        sampler.load_state_dict({key: value for key, value in state.items() if key != "order"})
    assert list(draws) == [[4, 5, 6, 7], [8, 9]]
    assert sampler.batch_size == 4


# ---- loaders


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("own", [False, True])
@pytest.mark.parametrize("drop_last", [False, True])
def test_a_constant_size_leaves_order_and_random_numbers_as_they_were(workers, own, drop_last):
    def run(adapt):
        torch.manual_seed(3)
        loader = adapt(
            DataLoader(
                Numbers(32),
                8,
                shuffle=True,
                num_workers=workers,
                drop_last=drop_last,
                generator=new_generator(own),
            )
        )
        seen = [(indices(batch), torch.rand(1).item()) for _ in range(2) for batch in loader]
        return (
            seen,
            torch.get_rng_state().tolist(),
            loader.generator and loader.generator.get_state().tolist(),
        )

    assert run(adapt) == run(lambda loader: loader)


@pytest.mark.parametrize("persistent", [False, True])
def test_workers_live_through_a_resize_and_no_sample_is_lost(persistent):
    loader = adapt(DataLoader(Numbers(120), 4, shuffle=True, num_workers=2, persistent_workers=persistent))
    pids = []
    for epoch in range(2):
        epoch_pids = set()
        seen = []
        for step, (batch, pid) in enumerate(loader):
            draw = loader.batch_sampler.draws.popleft()
            assert draw.size == len(batch)
            epoch_pids |= set(pid.tolist())
            seen += batch.tolist()
            assert len(loader) >= step + 1
            assert draw.last == (step + 1 == len(loader))
            loader.batch_sampler.batch_size = [4, 12, 7][step % 3]
        loader.batch_sampler.end_epoch()
        assert sorted(seen) == list(range(120)), epoch
        assert len(epoch_pids) == 2
        pids.append(epoch_pids)
    assert (pids[0] == pids[1]) == persistent


@given(st.lists(st.integers(1, 30), min_size=1, max_size=8), st.booleans(), st.sampled_from([0, 2]))
@settings(max_examples=15, deadline=None)
def test_random_resizes_of_a_loader_deliver_everything_in_order(sizes, drop_last, workers):
    loader = adapt(DataLoader(Numbers(70), sizes[0], drop_last=drop_last, num_workers=workers))
    seen, draws = resize_through(loader, sizes[1:])
    assert flat(seen) == list(range(len(flat(seen))))
    assert [len(batch) for batch in seen] == [draw.size for draw in draws]
    assert 70 - len(flat(seen)) < (max(sizes) if drop_last else 1)


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("pops", [False, True])
def test_a_resumed_loader_repeats_the_uninterrupted_run(workers, pops):
    def build():
        return adapt(DataLoader(Numbers(100), 4, shuffle=True, num_workers=workers))

    def train(loader, steps, start=0):
        seen = []
        for step, batch in enumerate(loader, start):
            if pops:
                loader.batch_sampler.draws.popleft()
            seen.append(indices(batch))
            loader.batch_sampler.batch_size = 4 + step % 5
            if step + 1 == steps:
                break
        return seen

    torch.manual_seed(0)
    whole = train(build(), None)
    torch.manual_seed(0)
    loader = build()
    head = train(loader, 5)
    state = saved(loader.batch_sampler.state_dict())
    assert state["consumed"] == len(flat(head))
    torch.manual_seed(77)
    resumed = build()
    resumed.batch_sampler.load_state_dict(state)
    assert len(resumed) > 5
    assert head + train(resumed, None, start=5) == whole
    assert sorted(flat(whole)) == list(range(100))


@pytest.mark.parametrize("workers", [0, 2])
def test_an_iterator_that_is_made_anew_before_the_first_batch_continues_the_loaded_state(workers):
    torch.manual_seed(0)
    loader = adapt(DataLoader(Numbers(40), 4, shuffle=True, num_workers=workers))
    batches = iter(loader)
    head = [indices(next(batches)) for _ in range(3)]
    state = loader.batch_sampler.state_dict()
    rest = [indices(batch) for batch in batches]
    loader.batch_sampler.load_state_dict(state)
    iter(loader)
    assert [indices(batch) for batch in loader] == rest
    assert sorted(flat(head + rest)) == list(range(40))
    assert sorted(flat([indices(batch) for batch in loader])) == list(range(40))


@pytest.mark.parametrize("workers", [0, 2])
def test_length_between_epochs_is_a_full_epochs_whoever_counts(workers):
    loader = adapt(DataLoader(Numbers(24), 4, num_workers=workers))
    for step, _ in enumerate(loader):
        if step == 0:
            loader.batch_sampler.batch_size = 3
        assert len(loader) >= step + 1
    assert len(loader) == 8


def test_the_given_loader_stays_as_it_is():
    loader = DataLoader(Numbers(12), 4)
    adaptive = adapt(loader)
    adaptive.batch_sampler.batch_size = 6
    assert [len(batch[0]) for batch in adaptive] == [6, 6]
    assert [len(batch[0]) for batch in loader] == [4, 4, 4]
    assert type(loader.batch_sampler) is BatchSampler
    assert (loader.batch_size, adaptive.batch_size) == (4, 6)
    assert adapt(adaptive) is adaptive


def test_a_subclass_with_its_own_arguments_and_iteration_is_kept():
    adaptive = adapt(FieldLoader("secret", Numbers(12), batch_size=4))
    adaptive.batch_sampler.batch_size = 5
    assert isinstance(adaptive, FieldLoader)
    assert adaptive.secret == "secret"
    assert [len(batch["x"][0]) for batch in adaptive] == [5, 5, 2]


@pytest.mark.parametrize("dataset", [Numbers(12), Stream(12)])
def test_an_adaptive_loader_can_be_copied_and_pickled(dataset):
    adaptive = adapt(DataLoader(dataset, batch_size=4))
    for twin in (copy.copy(adaptive), pickle.loads(pickle.dumps(adaptive))):
        assert type(twin) is type(adaptive)
        twin.batch_sampler.batch_size = 6
        assert [len(indices(batch)) for batch in twin] == [6, 6]


def test_in_order_false_is_switched_off_aloud():
    with pytest.warns(UserWarning, match="in_order=False is switched off"):
        adaptive = adapt(DataLoader(Numbers(8), 2, in_order=False))
    assert adaptive.in_order


def test_a_distributed_sampler_is_unwrapped_into_the_order_that_it_shares_out():
    data = Numbers(11)
    samplers: list = [DistributedSampler(data, num_replicas=2, rank=r, seed=3) for r in range(2)]
    loaders = [adapt(DataLoader(data, 2, sampler=sampler), rank=r, world_size=2) for r, sampler in enumerate(samplers)]
    for epoch in range(2):
        for loader in loaders:
            loader.sampler.set_epoch(epoch)  # as Lightning does
        shares = [flat([indices(b) for b in loader]) for loader in loaders]
        order: list | None = list(DistributedSampler(data, 1, 0, seed=3)) if epoch == 0 else None
        assert sorted(shares[0] + shares[1]) == list(range(11))
        if order:
            assert shares[0][:2] == order[:4:2]
            first = shares
    assert shares != first
    assert loaders[0].batch_sampler.batch_size == 4
    assert loaders[0].batch_size == 2


def test_the_epoch_of_the_order_is_resumed():
    def build():
        return AdaptiveBatchSampler(DistributedSampler(Numbers(20), 1, 0), 6)

    sampler = build()
    sampler.set_epoch(3)
    draws = iter(sampler)
    next(draws)
    state = saved(sampler.state_dict())
    again = build()
    again.load_state_dict(state)
    assert list(again) == list(draws)


# ---- batch samplers of the user's own


@pytest.mark.parametrize("workers", [0, 2])
def test_a_batch_sampler_with_a_settable_size_is_resized(workers):
    own = BucketBatches(SequentialSampler(range(40)), 4)
    loader = adapt(DataLoader(Numbers(40), batch_sampler=own, num_workers=workers))
    assert len(loader) == 10
    seen, draws = resize_through(loader, [5, 9, 2, 8])
    assert flat(seen) == list(range(40))
    assert [draw.size for draw in draws] == [len(batch) for batch in seen]
    assert draws[-1].last and not draws[-2].last
    assert len({draw.size for draw in draws}) > 2
    assert own.batch_size == 4
    assert len(loader) == 5
    assert loader.batch_size is None


def test_a_batch_sampler_of_the_users_own_resumes():
    def build():
        generator = torch.Generator().manual_seed(4)
        own = BucketBatches(RandomSampler(range(40), generator=generator), 4)
        return adapt(DataLoader(Numbers(40), batch_sampler=own)).batch_sampler

    sampler = build()
    draws = iter(sampler)
    drawn = []
    for size in (4, 7, 3):
        sampler.batch_size = size
        drawn.append(next(draws))
    sampler.draws.popleft()
    sampler.draws.popleft()
    state = saved(sampler.state_dict())
    rest = list(draws)
    again = build()
    again.load_state_dict(state)
    draws = iter(again)
    assert next(draws) == drawn[2]
    assert list(draws) == rest


def test_ranks_share_the_batches_of_a_batch_sampler():
    own = BucketBatches(range(20), 3)
    loader = DataLoader(Numbers(20), batch_sampler=own)
    shares = [list(adapt(loader, rank=r, world_size=2).batch_sampler) for r in range(2)]
    assert [len(batch) for batch in shares[0]] == [3, 3, 3, 1]
    assert sorted(flat(shares[0]) + flat(shares[1])) == list(range(20))


class ReadsItsSizeOnce(BatchSampler):
    def __iter__(self):
        size, indices = self.batch_size, list(self.sampler)
        for start in range(0, len(indices), size):
            yield indices[start : start + size]


def test_a_batch_sampler_that_goes_on_with_its_old_size_is_told_of_once():
    loader = adapt(DataLoader(Numbers(60), batch_sampler=ReadsItsSizeOnce(range(60), 4, False)))
    batches = iter(loader)
    next(batches)
    loader.batch_sampler.batch_size = 8
    with pytest.warns(
        UserWarning, match="ReadsItsSizeOnce still yields batches of 4 after its batch_size was set to 8"
    ):
        rest = list(batches)
    assert len(rest) == 14


class Tokens(BatchSampler):
    """Whose size counts something else than samples."""

    def __iter__(self):
        indices = iter(self.sampler)
        while batch := list(itertools.islice(indices, max(1, self.batch_size // 3))):
            yield batch


@pytest.mark.parametrize(
    ("batch_sampler", "size", "first"),
    [(BucketBatches(SequentialSampler(range(60)), 4), 8, 4), (Tokens(range(60), 6, False), 9, 2)],
    ids=["that reads its size", "whose size counts something else"],
)
def test_no_other_batch_sampler_is_told_of(batch_sampler, size, first):
    loader = adapt(DataLoader(Numbers(60), batch_sampler=batch_sampler))
    batches = iter(loader)
    next(batches)
    loader.batch_sampler.batch_size = size
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert flat([indices(batch) for batch in batches]) == list(range(first, 60))


class FrozenBatches(BatchSampler):
    batch_size = property(lambda self: 4, lambda self, value: self._refuse(value))

    def _refuse(self, value):
        if hasattr(self, "drop_last"):
            raise AttributeError("read only")

    def __iter__(self):
        return iter([[0, 1], [2]])


@pytest.mark.parametrize(
    ("loader", "error", "message"),
    [
        (DataLoader(Numbers(4), batch_size=None), ValueError, "batch_size=None leaves batching"),
        ([1, 2, 3], TypeError, "list is not a torch DataLoader"),
        (
            DataLoader(Numbers(4), batch_sampler=[[0, 1], [2]]),
            ValueError,
            "batch sampler list cannot be resized",
        ),
        (
            DataLoader(Numbers(4), batch_sampler=FrozenBatches(range(4), 2, False)),
            ValueError,
            "batch sampler FrozenBatches cannot be resized",
        ),
    ],
    ids=["unbatched", "no loader", "list of batches", "read-only size"],
)
def test_what_cannot_be_resized_is_refused(loader, error, message):
    with pytest.raises(error, match=message):
        adapt(loader)


# ---- iterable data sets


@pytest.mark.parametrize(("workers", "persistent"), [(0, False), (1, False), (2, False), (2, True)])
def test_an_iterable_data_set_is_resized_with_true_sizes(workers, persistent):
    loader = adapt(DataLoader(Stream(101), 4, num_workers=workers, persistent_workers=persistent))
    for _ in range(2):
        loader.batch_sampler.batch_size = 4
        seen, draws = resize_through(loader, [9, 5, 13])
        assert sorted(flat(seen)) == list(range(101))
        assert [draw.size for draw in draws] == [len(batch) for batch in seen]
        assert draws[-1].position == 101
        assert {draw.nominal for draw in draws} == {4, 9, 5, 13} if workers == 0 else {4, 13}
        assert all(draw.size <= draw.nominal for draw in draws)
        assert not loader.batch_sampler.draws
    with pytest.raises(TypeError, match=r"no len\(\)"):
        len(loader)


def test_an_iterable_subclass_meets_only_its_own_batches():
    loader = adapt(FieldLoader("secret", Stream(9), batch_size=4))
    assert [batch["x"].tolist() for batch in loader] == [[0, 1, 2, 3], [4, 5, 6, 7], [8]]


def test_an_iterable_data_set_saves_its_size_only():
    loader = adapt(DataLoader(Stream(30), 4))
    next(iter(loader))
    state = saved(loader.batch_sampler.state_dict())
    assert (state["batch_size"], state["consumed"], state["order"]) == (4, 0, None)
