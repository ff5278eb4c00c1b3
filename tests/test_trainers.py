"""The three trainers: one loop, three ways to choose the batches."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator
from itertools import chain
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch
from reference import exact_noise, flat_gradient, per_example_gradients, superpopulation_sq_norm
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, IterableDataset, Sampler, TensorDataset

from adaptive_batch import (
    BatchSizeController,
    FixedBatchTrainer,
    History,
    Measurement,
    MiniBatchTrainer,
    SGDTrainer,
    make_adaptive,
)
from adaptive_batch.lr_scaling import LinearScaling
from adaptive_batch.policies import Constant, Milestones, NoiseScale

SAMPLES = 23
LR = 0.1


def problem(samples: int = SAMPLES, features: int = 3) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(5)
    x = rng.standard_normal((samples, features))
    return x, x @ np.arange(1.0, features + 1) + 0.3 * rng.standard_normal(samples)


def linear(features: int = 3, dtype: torch.dtype = torch.float64) -> nn.Linear:
    model = nn.Linear(features, 1, bias=False, dtype=dtype)
    nn.init.constant_(model.weight, 0.25)
    return model


def half_square(prediction: Tensor, y: Tensor) -> Tensor:
    return (prediction[:, 0] - y).square().mean() / 2


def weights(model: nn.Module) -> np.ndarray:
    return torch.cat([p.detach().reshape(-1) for p in model.parameters()]).double().numpy().copy()


def gradient_descent(
    x: np.ndarray, y: np.ndarray, batches: list[list[int]], lrs: list[float] | None = None
) -> np.ndarray:
    """``theta <- theta - eta * (1/len(batch)) * sum of the batch's gradients``, from 0.25."""
    theta = np.full(x.shape[1], 0.25)
    for i, batch in enumerate(batches):
        gradients = [(x[j] @ theta - y[j]) * x[j] for j in batch]
        theta = theta - (lrs[i] if lrs else LR) / len(batch) * np.sum(gradients, axis=0)
    return theta


class Spy(nn.Module):
    """A linear model that reads the samples' numbers from the inputs' last column."""

    def __init__(self, features: int = 3) -> None:
        super().__init__()
        self.linear = linear(features)
        self.batches: list[list[int]] = []

    def forward(self, x: Tensor) -> Any:
        self.batches.append(x[:, -1].long().tolist())
        return self.linear(x[:, :-1])


def numbered(samples: int = SAMPLES) -> tuple[np.ndarray, np.ndarray]:
    """The problem with the samples' numbers as last column."""
    x, y = problem(samples)
    return np.column_stack([x, np.arange(samples)]), y


def sgd(model: nn.Module, **options: Any) -> torch.optim.SGD:
    return torch.optim.SGD(model.parameters(), **{"lr": LR, **options})


def quiet(cls: Any, model: nn.Module, optimizer: Any = None, **options: Any) -> Any:
    """The trainer without a progress bar."""
    return cls(model, half_square, optimizer or sgd(model), progress=False, **options)


class LRRecorder(torch.optim.SGD):
    """SGD that remembers the learning rate of each step."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.used: list[float] = []

    def step(self, closure: Any = None) -> Any:
        self.used.append(self.param_groups[0]["lr"])
        return super().step(closure)


def epochs_of(batches: list[list[int]], samples: int = SAMPLES) -> Iterator[list[list[int]]]:
    """The batches, cut into epochs at ``samples``."""
    epoch: list[list[int]] = []
    for batch in batches:
        epoch.append(batch)
        if sum(map(len, epoch)) >= samples:
            yield epoch
            epoch = []
    assert not epoch


def each_once(epoch: list[list[int]], samples: int = SAMPLES) -> bool:
    return sorted(chain.from_iterable(epoch)) == list(range(samples))


def in_order(epoch: list[list[int]], samples: int = SAMPLES) -> bool:
    return list(chain.from_iterable(epoch)) == list(range(samples))


class Wander:
    """A policy that proposes the sizes of a list, one after the other."""

    def __init__(self, sizes: list[int]) -> None:
        self.sizes = sizes
        self.asked = 0

    def propose(self, measurement: Measurement) -> float:
        self.asked += 1
        return self.sizes[self.asked % len(self.sizes)]


def controller(policy: Any, **options: Any) -> BatchSizeController:
    options = {"lr_scaling": "linear", "min_batch_size": 1, "adjust_every": 1, **options}
    return BatchSizeController(policy, **options)


# Batch gradient descent


def test_fixed_batch_follows_batch_gradient_descent_exactly() -> None:
    x, y = problem()
    model = linear()
    trainer = quiet(FixedBatchTrainer, model)
    theta = np.full(3, 0.25)
    for _ in range(20):
        trainer.fit((x, y), epochs=1)
        gradients = [(x[j] @ theta - y[j]) * x[j] for j in range(len(y))]
        theta = theta - LR * (1 / len(y)) * np.sum(gradients, axis=0)
        np.testing.assert_allclose(weights(model), theta, rtol=0, atol=1e-12)


def test_fixed_batch_makes_one_update_an_epoch_of_all_samples_in_order() -> None:
    model = Spy()
    history = quiet(FixedBatchTrainer, model).fit(numbered(), epochs=3)
    assert model.batches == [list(range(SAMPLES))] * 3
    assert history.column("batch_size") == [SAMPLES] * 3


def test_fixed_batch_of_a_given_size_shuffles_and_averages_each_batch_over_its_own_length() -> None:
    x, y = numbered()
    model = Spy()
    quiet(FixedBatchTrainer, model, batch_size=5, seed=1).fit((x, y), epochs=2)
    assert [len(batch) for batch in model.batches] == [5, 5, 5, 5, 3] * 2
    first, second = epochs_of(model.batches)
    assert each_once(first) and each_once(second) and first != second
    expected = gradient_descent(x[:, :-1], y, model.batches)
    np.testing.assert_allclose(weights(model), expected, rtol=0, atol=1e-12)


# One sample per update


def test_sgd_makes_an_update_for_each_sample_once_in_random_order() -> None:
    x, y = numbered()
    model = Spy()
    history = quiet(SGDTrainer, model, seed=1).fit((x, y), epochs=2)
    assert history.column("batch_size") == [1] * (2 * SAMPLES)
    first, second = epochs_of(model.batches)
    assert each_once(first) and each_once(second)
    assert not in_order(first) and not in_order(second) and first != second
    expected = gradient_descent(x[:, :-1], y, model.batches)
    np.testing.assert_allclose(weights(model), expected, rtol=0, atol=1e-12)


# Mini-batches


def test_mini_batches_are_shuffled_disjoint_and_cover_everything() -> None:
    model = Spy()
    quiet(MiniBatchTrainer, model, batch_size=4, seed=1).fit(numbered(), epochs=2)
    assert [len(batch) for batch in model.batches] == [4, 4, 4, 4, 4, 3] * 2
    first, second = epochs_of(model.batches)
    assert each_once(first) and each_once(second)
    assert not in_order(first) and first != second


def test_a_short_last_mini_batch_is_divided_by_its_own_length() -> None:
    x, y = numbered()
    model = Spy()
    quiet(MiniBatchTrainer, model, batch_size=10, seed=1).fit((x, y))
    assert len(model.batches[-1]) == 3
    expected = gradient_descent(x[:, :-1], y, model.batches)
    np.testing.assert_allclose(weights(model), expected, rtol=0, atol=1e-12)


def test_mini_batches_of_arrays_have_32_samples_by_default() -> None:
    history = quiet(MiniBatchTrainer, linear()).fit(problem(70))
    assert history.column("batch_size") == [32, 32, 6]


# Data


def test_a_dataset_arrays_tensors_and_lists_train_alike() -> None:
    x, y = problem()
    forms: list[Any] = [
        (x, y),
        (torch.from_numpy(x), torch.from_numpy(y)),
        (x.tolist(), y.tolist()),
        (x[::-1][::-1], np.broadcast_to(y, (1, SAMPLES))[0]),  # a negative stride within, a read-only array
        TensorDataset(torch.from_numpy(x), torch.from_numpy(y)),
    ]
    trained = []
    for data in forms:
        model = linear()
        quiet(MiniBatchTrainer, model, batch_size=4, seed=2).fit(data, epochs=2)
        trained.append(weights(model))
    for other in trained[1:]:
        np.testing.assert_array_equal(trained[0], other)


def test_reversed_and_read_only_arrays_are_taken_as_they_are() -> None:
    x, y = problem()
    y.flags.writeable = False
    model, straight = linear(), linear()
    quiet(FixedBatchTrainer, model).fit((x[::-1], y[::-1]))
    quiet(FixedBatchTrainer, straight).fit((x[::-1].copy(), y[::-1].copy()))
    np.testing.assert_array_equal(weights(model), weights(straight))


def test_float64_arrays_train_a_float32_model_and_stay_as_they_are() -> None:
    x, y = problem()
    before = x.copy()
    model = linear(dtype=torch.float32)
    quiet(FixedBatchTrainer, model).fit((x, y))
    np.testing.assert_allclose(weights(model), gradient_descent(x, y, [list(range(SAMPLES))]), atol=1e-6)
    assert x.dtype == np.float64
    np.testing.assert_array_equal(x, before)


def test_integer_targets_stay_integers() -> None:
    x, y = problem()
    seen = []

    def loss(prediction: Tensor, target: Tensor) -> Tensor:
        seen.append(target.dtype)
        return nn.functional.cross_entropy(prediction, target)

    model = nn.Linear(3, 2)
    trainer = MiniBatchTrainer(model, loss, sgd(model), progress=False)
    history = trainer.fit((x, (y > 0).astype(np.int64)), epochs=20)
    assert set(seen) == {torch.int64}
    assert history.updates[-1].loss < history.updates[0].loss


@pytest.mark.parametrize("workers", [0, 2])
def test_a_loader_keeps_its_size_its_workers_and_its_order(workers: int) -> None:
    x, y = map(torch.from_numpy, numbered())
    order = list(reversed(range(SAMPLES)))
    loader = DataLoader(TensorDataset(x, y), batch_size=4, sampler=order, num_workers=workers)
    model = Spy()
    quiet(MiniBatchTrainer, model).fit(loader)
    assert model.batches == [order[i : i + 4] for i in range(0, SAMPLES, 4)]


def test_a_trainers_own_size_is_used_with_a_loader() -> None:
    x, y = map(torch.from_numpy, numbered())
    loader = DataLoader(TensorDataset(x, y), batch_size=4)
    sizes = {}
    plans = {
        "all": (FixedBatchTrainer, {}),
        "fixed": (FixedBatchTrainer, {"batch_size": 8}),
        "one": (SGDTrainer, {}),
        "mini": (MiniBatchTrainer, {"batch_size": 16}),
    }
    for name, (cls, options) in plans.items():
        history = quiet(cls, Spy(), **options).fit(loader)
        sizes[name] = history.column("batch_size")
    assert sizes == {"all": [23], "fixed": [8, 8, 7], "one": [1] * 23, "mini": [16, 7]}


def test_the_users_loader_is_left_alone() -> None:
    x, y = map(torch.from_numpy, numbered())
    loader = DataLoader(TensorDataset(x, y), batch_size=4, shuffle=True)
    before = dict(loader.__dict__)
    wander = controller(Wander([2, 16]))
    quiet(MiniBatchTrainer, Spy(), controller=wander).fit(loader)
    assert type(loader) is DataLoader
    assert loader.__dict__ == before
    assert loader.batch_size == 4 and len(loader) == 6
    assert [len(batch[0]) for batch in loader] == [4, 4, 4, 4, 4, 3]


def test_drop_last_of_a_loader_is_kept() -> None:
    x, y = map(torch.from_numpy, numbered())
    loader = DataLoader(TensorDataset(x, y), batch_size=4, drop_last=True)
    history = quiet(MiniBatchTrainer, Spy()).fit(loader)
    assert history.column("batch_size") == [4] * 5


def test_a_sampler_that_wants_to_know_the_epoch_is_told() -> None:
    class Rotating(torch.utils.data.Sampler[int]):
        epoch = 0

        def set_epoch(self, epoch: int) -> None:
            self.epoch = epoch

        def __iter__(self) -> Iterator[int]:
            return iter([(i + self.epoch) % 6 for i in range(6)])

        def __len__(self) -> int:
            return 6

    x, y = map(torch.from_numpy, numbered(6))
    model = Spy()
    loader = DataLoader(TensorDataset(x, y), batch_size=6, sampler=Rotating())
    quiet(MiniBatchTrainer, model).fit(loader, epochs=3)
    assert [batch[0] for batch in model.batches] == [0, 1, 2]


class Stream(IterableDataset[tuple[Tensor, Tensor]]):
    def __init__(self) -> None:
        x, y = numbered()
        self.x, self.y = torch.from_numpy(x), torch.from_numpy(y)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        return iter(zip(self.x, self.y, strict=True))


def test_an_iterable_dataset_is_trained_on_in_its_order() -> None:
    model = Spy()
    quiet(MiniBatchTrainer, model, batch_size=10).fit(Stream(), epochs=2)
    batches = [list(range(10)), list(range(10, 20)), list(range(20, 23))]
    assert model.batches == batches * 2


def test_structured_inputs_reach_the_model() -> None:
    class Pairs(Dataset[Any]):
        def __len__(self) -> int:
            return 4

        def __getitem__(self, index: int) -> Any:
            return {"a": torch.ones(2), "rest": [torch.zeros(1), "name"]}, torch.tensor(1.0)

    class Sum(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(3, 1)

        def forward(self, x: Any) -> Any:
            assert list(x["rest"][1]) == ["name"] * len(x["a"])
            return self.linear(torch.cat([x["a"], x["rest"][0]], dim=1))

    history = quiet(MiniBatchTrainer, Sum(), batch_size=3).fit(Pairs())
    assert history.column("batch_size") == [3, 1]


# A controller


@pytest.mark.parametrize("workers", [0, 2])
def test_resizing_up_and_down_delivers_every_sample_once_and_scales_by_the_actual_size(workers: int) -> None:
    """Contract points 1 and 2: prefetched batches keep their size; tails are the next test's."""
    samples, b0 = 97, 8
    x, y = map(torch.from_numpy, numbered(samples))
    model = Spy()
    optimizer = LRRecorder(model.parameters(), lr=0.01)
    loader = DataLoader(TensorDataset(x, y), batch_size=b0, shuffle=True, num_workers=workers)
    wander = controller(Wander([8, 2, 32, 5, 16, 16, 3]), adjust_every=2)
    trainer = quiet(MiniBatchTrainer, model, optimizer, controller=wander)
    history = trainer.fit(loader, epochs=3)

    epochs = list(epochs_of(model.batches, samples))
    assert len(epochs) == 3 and all(each_once(epoch, samples) for epoch in epochs)
    sizes = [len(batch) for batch in model.batches]
    assert {change.batch_size > change.previous for change in history.changes} == {True, False}
    assert history.column("batch_size") == sizes
    tails = set(np.cumsum([len(epoch) for epoch in epochs]) - 1)
    for i, (size, lr) in enumerate(zip(sizes, optimizer.used, strict=True)):
        allowed = {size} if i not in tails else {size, *(max(size, min(n, b0)) for n in (2, 3, 5, 8, 16, 32))}
        assert any(lr == pytest.approx(0.01 * n / b0, rel=1e-12) for n in allowed)
    assert optimizer.param_groups[0]["lr"] == 0.01
    scales = [lr / 0.01 for lr in optimizer.used]
    np.testing.assert_allclose(history.column("lr_scale"), scales, rtol=1e-12)
    expected = gradient_descent(x[:, :-1].numpy(), y.numpy(), model.batches, optimizer.used)
    np.testing.assert_allclose(weights(model), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize(("nominal", "counted"), [(16, 8), (4, 4), (8, 8)], ids=["above B0", "below B0", "at B0"])
def test_the_tail_counts_as_the_reference_size_at_most_and_the_nominal_size_at_most(nominal: int, counted: int) -> None:
    samples = 8 + 2 * nominal + 3  # one batch of B0, two of the nominal size and a tail of 3
    model = Spy()
    optimizer = LRRecorder(model.parameters(), lr=0.01)
    control = controller(Milestones({0: nominal}, unit="updates"))
    history = quiet(MiniBatchTrainer, model, optimizer, batch_size=8, controller=control).fit(numbered(samples))
    assert history.column("batch_size") == [8, nominal, nominal, 3]
    np.testing.assert_allclose(optimizer.used, [0.01 * n / 8 for n in (8, nominal, nominal, counted)])


def test_a_tail_larger_than_the_reference_size_counts_as_it_is() -> None:
    optimizer = LRRecorder((model := Spy()).parameters(), lr=0.01)
    control = controller(Milestones({0: 16}, unit="updates"))
    trainer = quiet(MiniBatchTrainer, model, optimizer, batch_size=4, controller=control)
    assert trainer.fit(numbered(4 + 16 + 10)).column("batch_size") == [4, 16, 10]
    np.testing.assert_allclose(optimizer.used, [0.01, 0.04, 0.025])


def test_a_resize_takes_effect_within_the_epoch_and_is_recorded_with_its_reason() -> None:
    control = controller(Milestones({2: 10}, unit="updates"))
    history = quiet(MiniBatchTrainer, Spy(), batch_size=2, controller=control).fit(numbered())
    assert history.column("batch_size") == [2, 2, 10, 9]
    (change,) = history.changes
    assert (change.step, change.epoch, change.samples) == (2, 0, 4)
    assert (change.previous, change.batch_size) == (2, 10)
    assert change.reason.startswith("2 -> 10: milestone at 2 updates")


def test_a_constant_controller_changes_nothing() -> None:
    """Contract point 3, also where the batch is larger than the data."""
    for size in (4, 40):
        models = [linear(), linear()]
        for model, control in zip(models, (None, controller(Constant(), min_batch_size=None)), strict=True):
            trainer = quiet(MiniBatchTrainer, model, batch_size=size, controller=control, seed=3)
            history = trainer.fit(problem(), epochs=3)
            assert not history.changes
            assert set(history.column("lr_scale")) == {1.0}
        np.testing.assert_array_equal(weights(models[0]), weights(models[1]))


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.filterwarnings("ignore:1 .BatchNorm1d. looks across the batch")
def test_a_constant_size_trains_like_a_plain_loop_bit_for_bit(workers: int) -> None:
    """Contract point 3, with all that a trainer may do switched on."""

    def parts() -> tuple[nn.Module, Any, Any, DataLoader[Any]]:
        torch.manual_seed(3)
        model = nn.Sequential(nn.Linear(3, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.3), nn.Linear(8, 1)).double()
        optimizer = sgd(model, momentum=0.9)
        scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.2, total_steps=18)
        data = TensorDataset(*map(torch.from_numpy, problem(41)))
        return model, optimizer, scheduler, DataLoader(data, batch_size=7, shuffle=True, num_workers=workers)

    plain, optimizer, scheduler, loader = parts()
    losses = []
    for _ in range(3):
        for x, y in loader:
            optimizer.zero_grad()
            loss = half_square(plain(x), y)
            loss.backward()
            optimizer.step()
            scheduler.step()
            losses.append(loss.item())
    model, optimizer, scheduler, loader = parts()
    control = BatchSizeController("constant", lr_scaling="adascale")
    options: Any = {"controller": control, "scheduler": scheduler, "micro_batch_size": "auto"}
    history = quiet(MiniBatchTrainer, model, optimizer, **options).fit(loader, epochs=3)
    assert history.column("loss") == losses
    for (name, a), b in zip(model.state_dict().items(), plain.state_dict().values(), strict=True):
        assert torch.equal(a, b), name


@pytest.mark.parametrize("workers", [0, 2])
def test_drop_last_leaves_out_no_more_than_a_tail_however_often_the_size_changes(workers: int) -> None:
    """Contract point 1."""
    samples = 97
    model = Spy()
    data = TensorDataset(*map(torch.from_numpy, numbered(samples)))
    loader = DataLoader(data, batch_size=8, shuffle=True, num_workers=workers, drop_last=True)
    wander = controller(Wander([8, 2, 32, 5, 16, 3]))
    history = quiet(MiniBatchTrainer, model, controller=wander).fit(loader, epochs=3)
    for epoch in range(3):
        batches = [b for u, b in zip(history.updates, model.batches, strict=True) if u.epoch == epoch]
        delivered = list(chain.from_iterable(batches))
        assert len(set(delivered)) == len(delivered)
        assert samples - len(delivered) < max(map(len, batches))


def test_no_batch_grows_beyond_the_data_and_the_users_bound_holds() -> None:
    for bound, largest in ((None, SAMPLES), (100, SAMPLES), (12, 12)):
        control = controller(lambda m: 2.0 * m.batch_size, max_batch_size=bound)
        history = quiet(MiniBatchTrainer, Spy(), batch_size=4, controller=control).fit(numbered(), epochs=6)
        assert max(change.batch_size for change in history.changes) == largest
        assert history.updates[-2].batch_size == largest


def test_a_later_fit_on_more_data_may_grow_further() -> None:
    control = controller(lambda m: 2.0 * m.batch_size)
    trainer = quiet(MiniBatchTrainer, Spy(), batch_size=4, controller=control)
    trainer.fit(numbered(), epochs=6)
    history = trainer.fit(numbered(90), epochs=6)
    assert history.updates[-1].batch_size == 90


def test_data_is_shuffled_when_the_size_starts_at_all_samples_and_shrinks() -> None:
    model = Spy()
    control = controller(Milestones({1: 5}, unit="updates"))
    quiet(MiniBatchTrainer, model, batch_size=SAMPLES, controller=control, seed=1).fit(numbered(), epochs=2)
    second = model.batches[1:]
    assert [len(batch) for batch in second] == [5, 5, 5, 5, 3]
    assert each_once(second) and not in_order(second)


def test_why_the_size_stays_is_noted_once() -> None:
    control = BatchSizeController("noise_scale", lr_scaling="none", adjust_every=1)
    history = quiet(MiniBatchTrainer, linear(), sgd(linear()), batch_size=8, controller=control).fit(
        problem(), epochs=2
    )
    (note,) = history.notes
    assert note.reason == "8 stays: the gradient noise scale is not identified yet"
    assert (note.step, note.batch_size, note.previous) == (1, 8, 8)


def test_layers_that_look_across_the_batch_are_not_split_for_a_measurement() -> None:
    control = BatchSizeController(NoiseScale(), lr_scaling="none")
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 1))
    with pytest.warns(UserWarning, match=r"1 \(BatchNorm1d\) looks across the batch, so no update is split to measure"):
        history = quiet(MiniBatchTrainer, model, batch_size=8, controller=control).fit(problem(40))
    assert history.column("micro_batch_size") == [8] * 5
    plain = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 1))
    history = quiet(MiniBatchTrainer, plain, batch_size=8, controller=control).fit(problem(40))
    assert history.column("micro_batch_size") == [4] * 5


def test_the_measured_noise_scale_agrees_with_the_closed_form() -> None:
    """Frozen weights on linear regression, drawn without replacement: the superpopulation's ``|G|^2``."""
    samples, features = 512, 4
    rng = np.random.default_rng(0)
    x = rng.standard_normal((samples, features))
    y = x @ np.array([1.0, -0.5, 0.5, 0.0]) + 0.5 * rng.standard_normal(samples)
    model = linear(features)
    rows = per_example_gradients(model, half_square, torch.from_numpy(x), torch.from_numpy(y))
    _, variance = exact_noise(rows)
    sq_norm = superpopulation_sq_norm(rows)

    control = BatchSizeController(Measured(), lr_scaling="none")
    trainer = quiet(MiniBatchTrainer, model, sgd(model, lr=0.0), batch_size=64, controller=control, seed=0)
    trainer.fit((x, y), epochs=300)
    low, high = control.noise.interval(0.99)
    assert low < variance / sq_norm < high
    assert control.noise.grad_variance == pytest.approx(variance, rel=0.1)
    assert control.noise.grad_sq_norm == pytest.approx(sq_norm, rel=0.1)
    assert control.noise_scale == pytest.approx(variance / sq_norm, rel=0.15)


class Measured:
    """Needs the noise, and keeps the size."""

    needs = frozenset({"noise"})

    def propose(self, measurement: Measurement) -> float:
        return measurement.batch_size


def test_a_measurement_describes_its_update() -> None:
    seen: list[Measurement] = []

    def policy(measurement: Measurement) -> float:
        seen.append(measurement)
        return 4

    scheduler_lr = []
    model = linear()
    optimizer = sgd(model)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))
    for step in range(12):
        scheduler_lr.append(LR / (1 + step))
    trainer = quiet(
        MiniBatchTrainer, model, optimizer, batch_size=4, controller=controller(policy), scheduler=scheduler
    )
    history = trainer.fit(problem(), epochs=2)
    assert [m.update for m in seen] == list(range(1, 13))
    assert [m.epoch for m in seen] == [0] * 6 + [1] * 6
    assert [m.samples for m in seen] == [4, 8, 12, 16, 20, 23, 27, 31, 35, 39, 43, 46]
    assert {m.reference_batch_size for m in seen} == {4}
    np.testing.assert_allclose([m.lr for m in seen], scheduler_lr, rtol=1e-12)
    assert [m.loss for m in seen] == history.column("loss")


# Schedulers


def cosine(optimizer: Any, steps: int) -> torch.optim.lr_scheduler.LRScheduler:
    return torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)


@pytest.mark.parametrize("cls", [FixedBatchTrainer, SGDTrainer, MiniBatchTrainer])
def test_a_scheduler_steps_once_per_update(cls: Any) -> None:
    model = linear()
    optimizer = LRRecorder(model.parameters(), lr=1.0)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0 / (1 + step))
    options = {} if cls is SGDTrainer else {"batch_size": 4}
    quiet(cls, model, optimizer, scheduler=scheduler, **options).fit(problem(), epochs=2)
    np.testing.assert_allclose(optimizer.used, [1 / (1 + i) for i in range(len(optimizer.used))])
    assert scheduler.last_epoch == len(optimizer.used)


@pytest.mark.parametrize("drop_last", [False, True])
def test_a_schedule_over_the_run_ends_with_the_run_whatever_the_sizes(drop_last: bool) -> None:
    """Contract point 8: ``min(U, ceil(s / B0))`` steps after ``s`` samples of an epoch, ``U`` at its end."""
    samples, b0, epochs = 97, 8, 4
    updates = samples // b0 if drop_last else math.ceil(samples / b0)
    model = Spy()
    optimizer = LRRecorder(model.parameters(), lr=1.0)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1e-3 / (1 + step))
    x, y = map(torch.from_numpy, numbered(samples))
    loader = DataLoader(TensorDataset(x, y), batch_size=b0, drop_last=drop_last, shuffle=True)
    wander = controller(Wander([8, 40, 24, 3, 64, 16]), lr_scaling="none")
    trainer = quiet(MiniBatchTrainer, model, optimizer, controller=wander, scheduler=scheduler)
    for epoch in range(epochs):
        history = trainer.fit(loader)
        assert scheduler.last_epoch == (epoch + 1) * updates
    for i, update in enumerate(list(history.updates)[:-1]):
        following = optimizer.used[i + 1]
        if history.updates[i + 1].epoch == update.epoch:
            start = sum(u.batch_size for u in history.updates if u.epoch < update.epoch)
            in_epoch = min(updates, math.ceil((update.samples - start) / b0))
            assert following == pytest.approx(1e-3 / (1 + update.epoch * updates + in_epoch), rel=1e-12)


def test_the_clock_keeps_the_reference_size_in_a_later_fit() -> None:
    x, y = map(torch.from_numpy, numbered(64))
    loader = make_adaptive(DataLoader(TensorDataset(x, y), batch_size=8))
    model = Spy()
    optimizer = sgd(model)
    scheduler = cosine(optimizer, 16)
    trainer = quiet(
        MiniBatchTrainer,
        model,
        optimizer,
        scheduler=scheduler,
        controller=controller(Milestones({0: 32}, unit="updates")),
    )
    trainer.fit(loader)
    trainer.fit(loader)
    assert scheduler.last_epoch == 16
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.0, abs=1e-12)


# Micro-batches


@pytest.mark.parametrize("micro", [1, 2, 3, 5, 22, 23, 100])
def test_micro_batches_give_the_gradient_of_the_whole_batch(micro: int) -> None:
    """Contract point 4, uneven parts included."""
    torch.manual_seed(1)
    x, y = problem()
    model = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 1)).double()
    expected = flat_gradient(model, half_square(model(torch.from_numpy(x)), torch.from_numpy(y)))
    trainer = quiet(MiniBatchTrainer, model, sgd(model, lr=0.0), batch_size=SAMPLES, micro_batch_size=micro, seed=0)
    history = trainer.fit((x, y))
    gradient = torch.cat([p.grad.reshape(-1) for p in model.parameters() if p.grad is not None]).numpy()
    np.testing.assert_allclose(gradient, expected, rtol=1e-12, atol=1e-12)
    parts = math.ceil(SAMPLES / micro)
    assert history.column("micro_batch_size") == [math.ceil(SAMPLES / parts)]


def test_micro_batches_are_balanced_and_no_larger_than_asked() -> None:
    model = Spy()
    quiet(MiniBatchTrainer, model, batch_size=10, micro_batch_size=4, seed=0).fit(numbered())
    assert [len(batch) for batch in model.batches] == [4, 3, 3, 4, 3, 3, 3]


def test_the_loss_of_an_update_is_the_mean_over_its_samples_however_it_is_split() -> None:
    x, y = problem()
    losses = []
    for micro in (None, 2):
        trainer = quiet(MiniBatchTrainer, linear(), sgd(linear()), batch_size=10, micro_batch_size=micro, seed=1)
        losses.append(trainer.fit((x, y)).column("loss"))
    np.testing.assert_allclose(losses[1], losses[0], rtol=1e-6)
    # Frozen weights (another model is stepped): the epoch's mean is the mean over all samples.
    mean = np.mean((x @ np.full(3, 0.25) - y) ** 2) / 2
    assert np.average(losses[0], weights=[10, 10, 3]) == pytest.approx(mean, rel=1e-6)


# Optimizers


def test_lbfgs_works_and_its_loss_is_that_before_the_step() -> None:
    x, y = problem()
    best, *_ = np.linalg.lstsq(x, y, rcond=None)
    for options in ({}, {"micro_batch_size": 4}):
        model = linear()
        optimizer = torch.optim.LBFGS(model.parameters(), line_search_fn="strong_wolfe")
        trainer = quiet(MiniBatchTrainer, model, optimizer, batch_size=SAMPLES, **options)
        history = trainer.fit((x, y), epochs=3)
        np.testing.assert_allclose(weights(model), best, atol=1e-6)
        start = np.mean((x @ np.full(3, 0.25) - y) ** 2) / 2
        assert history.updates[0].loss == pytest.approx(start, rel=1e-6)
        assert len(history) == 3


def test_lbfgs_is_measured_at_its_first_evaluation_only() -> None:
    x, y = problem(40)
    model = linear()
    rows = per_example_gradients(model, half_square, torch.from_numpy(x), torch.from_numpy(y))
    seen = []

    class Spying(BatchSizeController):
        def observe(self, measurement: Measurement) -> Any:
            seen.append(measurement)
            return super().observe(measurement)

    control = Spying(Measured(), lr_scaling="none")
    optimizer = torch.optim.LBFGS(model.parameters(), max_iter=5)
    quiet(MiniBatchTrainer, model, optimizer, batch_size=40, controller=control).fit((x, y))
    (measurement,) = seen
    assert len(measurement.part_sq_norms) == len(measurement.part_sizes) == 2
    assert float(measurement.sq_norm) == pytest.approx((rows.mean(0) ** 2).sum(), rel=1e-9)


def test_tensor_learning_rates_are_scaled_and_put_back() -> None:
    model = Spy()
    optimizer = sgd(model, lr=torch.tensor(0.01))
    control = controller(Milestones({0: 16}, unit="updates"))
    quiet(MiniBatchTrainer, model, optimizer, batch_size=8, controller=control).fit(numbered(24))
    assert optimizer.param_groups[0]["lr"] == torch.tensor(0.01)
    expected = gradient_descent(
        numbered(24)[0][:, :-1], numbered(24)[1], model.batches, [0.01 * len(b) / 8 for b in model.batches]
    )
    np.testing.assert_allclose(weights(model), expected, atol=1e-9)


# Runs


def test_the_history_tells_each_update() -> None:
    model = Spy()
    history = quiet(MiniBatchTrainer, model, batch_size=10).fit(numbered(), epochs=2)
    assert isinstance(history, History)
    assert history.column("step") == [1, 2, 3, 4, 5, 6]
    assert history.column("epoch") == [0, 0, 0, 1, 1, 1]
    assert history.column("samples") == [10, 20, 23, 33, 43, 46]
    assert history.column("batch_size") == [10, 10, 3] * 2
    assert history.column("micro_batch_size") == [10, 10, 3] * 2
    assert history.column("lr_scale") == [1.0] * 6
    assert all(map(math.isnan, history.column("noise_scale")))
    for update in history.updates:
        assert update.seconds > 0 and math.isfinite(update.loss)
        assert update.throughput == pytest.approx(update.batch_size / update.seconds)
    assert not history.changes and not history.notes


def test_the_history_is_as_long_as_asked() -> None:
    history = quiet(SGDTrainer, Spy(), history_size=5).fit(numbered())
    assert history.column("step") == [19, 20, 21, 22, 23]


def test_the_history_is_complete_when_a_run_breaks_off() -> None:
    calls = 0

    def loss(prediction: Tensor, y: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        if calls == 8:
            raise KeyboardInterrupt
        return half_square(prediction, y)

    model = linear()
    trainer = SGDTrainer(model, loss, sgd(model), progress=False)
    with pytest.raises(KeyboardInterrupt):
        trainer.fit(problem())
    assert trainer.history.column("step") == [1, 2, 3, 4, 5, 6, 7]


def test_fit_twice_is_fit_once_for_longer() -> None:
    runs = []
    for parts in ([4], [1, 3], [2, 0, 2]):
        model = Spy()
        optimizer = sgd(model, momentum=0.9, lr=0.01)
        scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.95)
        control = controller(Wander([4, 9, 2]), adjust_every=3)
        trainer = quiet(
            MiniBatchTrainer,
            model,
            optimizer,
            batch_size=4,
            controller=control,
            scheduler=scheduler,
            seed=5,
        )
        for epochs in parts:
            history = trainer.fit(numbered(), epochs=epochs)
        record = [(u.step, u.epoch, u.samples, u.batch_size, u.lr_scale, u.loss) for u in history.updates]
        runs.append((record, weights(model).tolist(), model.batches, history.changes))
    assert runs[0] == runs[1] == runs[2]
    assert len({epoch for _, epoch, *_ in runs[0][0]}) == 4


@pytest.mark.parametrize("cls", [SGDTrainer, MiniBatchTrainer])
def test_a_seed_fixes_the_order_and_leaves_the_global_random_numbers_alone(cls: Any) -> None:
    model = Spy()

    def order(seed: int) -> list[list[int]]:
        model.batches = []
        quiet(cls, model, seed=seed).fit(numbered(70), epochs=2)
        return model.batches

    states = torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate()  # type: ignore[index]
    first = order(1)
    assert torch.equal(torch.get_rng_state(), states[0])
    assert np.random.get_state()[1].tolist() == states[1]  # type: ignore[index]
    assert random.getstate() == states[2]
    torch.rand(3)
    assert order(1) == first
    assert order(2) != first


def test_without_a_seed_the_order_follows_torchs_global_one() -> None:
    orders = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        model = Spy()
        quiet(MiniBatchTrainer, model, batch_size=4).fit(numbered())
        orders.append(model.batches)
    assert orders[0] == orders[1] != orders[2]


def test_a_seeded_run_repeats_bit_for_bit() -> None:
    runs = []
    for _ in range(2):
        torch.manual_seed(3)
        model = nn.Sequential(nn.Linear(3, 8), nn.Dropout(0.5), nn.Linear(8, 1))
        quiet(MiniBatchTrainer, model, batch_size=4, seed=1).fit(problem(), epochs=3)
        runs.append(weights(model))
    np.testing.assert_array_equal(runs[0], runs[1])


def test_the_model_is_trained_in_training_mode() -> None:
    model = nn.Sequential(nn.Dropout(1.0), linear())
    model.eval()
    before = weights(model)
    quiet(FixedBatchTrainer, model).fit(problem())
    np.testing.assert_array_equal(weights(model), before)  # everything dropped out: no gradient


def test_the_progress_bar_counts_samples_and_can_be_switched_off(capsys: pytest.CaptureFixture[str]) -> None:
    model = linear()
    FixedBatchTrainer(model, half_square, sgd(model)).fit(problem())
    assert f"{SAMPLES}" in capsys.readouterr().err
    FixedBatchTrainer(model, half_square, sgd(model), progress=False).fit(problem())
    assert capsys.readouterr() == ("", "")


# What is refused


class Endless(Dataset[tuple[Tensor, Tensor]]):
    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return torch.ones(3), torch.tensor(1.0)


class Batches:
    """A user's batch sampler without a sampler: what it counts are batches."""

    batch_size = 4

    def __iter__(self) -> Iterator[list[int]]:
        yield from ([i, i + 1] for i in range(0, 20, 2))

    def __len__(self) -> int:
        return 10


def tensors() -> TensorDataset:
    return TensorDataset(*map(torch.from_numpy, problem()))


REFUSED_DATA: dict[str, tuple[Any, Callable[[], Any], type[Exception], str]] = {
    "list": (MiniBatchTrainer, lambda: list(problem()), TypeError, "list cannot be trained on"),
    "array": (MiniBatchTrainer, lambda: problem()[0], TypeError, "ndarray cannot be trained on"),
    "text": (MiniBatchTrainer, lambda: "data", TypeError, "str cannot be trained on"),
    "mapping": (MiniBatchTrainer, lambda: {"X": 1}, TypeError, "dict cannot be trained on"),
    "triple": (MiniBatchTrainer, lambda: (*problem(), 1), TypeError, "tuple cannot be trained on"),
    "lengths": (SGDTrainer, lambda: (np.ones((3, 3)), np.ones(2)), ValueError, "X has 3 samples and y has 2"),
    "words": (SGDTrainer, lambda: (np.ones((2, 3)), np.array(["a", "b"])), TypeError, "y holds values"),
    "number": (SGDTrainer, lambda: (1.0, np.ones(2)), ValueError, "X is a single number"),
    "no rows": (FixedBatchTrainer, lambda: (np.ones((0, 3)), np.ones(0)), ValueError, "no samples"),
    "no rows, mini": (MiniBatchTrainer, lambda: (np.ones((0, 3)), np.ones(0)), ValueError, "no samples"),
    "no rows, loader": (
        FixedBatchTrainer,
        lambda: DataLoader(TensorDataset(torch.ones(0, 3), torch.ones(0))),
        ValueError,
        "no samples",
    ),
    "no full batch": (
        MiniBatchTrainer,
        lambda: DataLoader(tensors(), batch_size=32, drop_last=True),
        ValueError,
        "drop_last leaves no batch of 32 out of 23 samples",
    ),
    "unbatched": (
        MiniBatchTrainer,
        lambda: DataLoader(tensors(), batch_size=None),
        ValueError,
        "batch_size=None",
    ),
    "no length": (FixedBatchTrainer, Endless, ValueError, "Endless has no length"),
    "no length, mini": (MiniBatchTrainer, Endless, ValueError, "Endless has no length"),
    "stream": (FixedBatchTrainer, Stream, ValueError, "give FixedBatchTrainer a batch_size"),
    "batches only": (
        FixedBatchTrainer,
        lambda: DataLoader(tensors(), batch_sampler=Batches()),
        ValueError,
        "give FixedBatchTrainer a batch_size",
    ),
    "inputs only": (
        MiniBatchTrainer,
        lambda: DataLoader(TensorDataset(torch.ones(4, 3)), batch_size=2),
        TypeError,
        "must be a pair (x, y), but the data gave a list of 1",
    ),
    "bare inputs": (
        MiniBatchTrainer,
        lambda: DataLoader(torch.ones(4, 3), batch_size=2),  # type: ignore[arg-type]
        TypeError,
        "must be a pair (x, y), but the data gave a Tensor",
    ),
}  # fmt: skip


def one_sentence(message: str) -> bool:
    return "\n" not in message and message.endswith(".") and message.count(". ") == 0


@pytest.mark.parametrize("case", REFUSED_DATA)
def test_data_that_cannot_be_trained_on_is_refused_in_a_sentence(case: str) -> None:
    cls, data, error, words = REFUSED_DATA[case]
    model = linear()
    with pytest.raises(error) as raised:
        quiet(cls, model).fit(data())
    assert words in str(raised.value)
    assert one_sentence(str(raised.value))
    np.testing.assert_array_equal(weights(model), [0.25] * 3)


@pytest.mark.parametrize(
    ("cls", "options", "words"),
    [
        (FixedBatchTrainer, {"batch_size": 0}, "batch_size=0 must be a positive whole number"),
        (FixedBatchTrainer, {"batch_size": 2.5}, "batch_size=2.5"),
        (MiniBatchTrainer, {"batch_size": True}, "batch_size=True"),
        (MiniBatchTrainer, {"batch_size": -1}, "batch_size=-1"),
        (MiniBatchTrainer, {"micro_batch_size": 0}, "micro_batch_size=0"),
        (SGDTrainer, {"history_size": 0}, "history_size=0"),
        (
            MiniBatchTrainer,
            {"batch_size": 64, "controller": controller(Constant(), reference_batch_size=32)},
            "batch_size=64 is not the controller's reference_batch_size=32",
        ),
    ],
)
def test_bad_arguments_are_refused_in_a_sentence(cls: Any, options: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError) as raised:
        quiet(cls, linear(), **options)
    assert words in str(raised.value)
    assert one_sentence(str(raised.value))


@pytest.mark.parametrize("epochs", [-1, 1.5, "2", True])
def test_bad_epochs_are_refused(epochs: Any) -> None:
    with pytest.raises(ValueError, match="whole number from 0 on"):
        quiet(SGDTrainer, linear()).fit(problem(), epochs=epochs)


def test_whole_numbers_of_numpy_are_sizes_and_epochs() -> None:
    history = quiet(MiniBatchTrainer, linear(), batch_size=np.int64(10)).fit(problem(), epochs=np.int64(1))
    assert history.column("batch_size") == [10, 10, 3]


def test_a_loss_per_sample_is_refused() -> None:
    model = linear()
    trainer = MiniBatchTrainer(model, lambda p, y: (p[:, 0] - y) ** 2, sgd(model), progress=False)
    with pytest.raises(ValueError, match="loss_fn returned 23 numbers; it must return one"):
        trainer.fit(problem())


def test_a_scheduler_that_waits_for_a_metric_is_refused() -> None:
    model = linear()
    optimizer = sgd(model)
    scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer)
    with pytest.raises(ValueError, match="ReduceLROnPlateau waits for a metric"):
        quiet(MiniBatchTrainer, model, optimizer, scheduler=scheduler)


def test_a_bound_below_the_start_is_refused_unless_shrinking_is_allowed() -> None:
    control = BatchSizeController(Constant(), lr_scaling=LinearScaling(), max_batch_size=8)
    with pytest.raises(ValueError, match="max_batch_size=8 is below the batch size 16"):
        quiet(MiniBatchTrainer, linear(), batch_size=16, controller=control).fit(problem())
    shrinking = controller(Milestones({0: 4}, unit="updates"), max_batch_size=8)
    history = quiet(MiniBatchTrainer, Spy(), batch_size=16, controller=shrinking).fit(numbered())
    assert history.column("batch_size") == [16, 4, 3]


def test_a_resize_leaves_no_last_batch_of_one_sample_to_layers_that_look_across_the_batch() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 1))
    x = torch.randn(61, 3, generator=torch.Generator().manual_seed(0))
    control = controller(Milestones({1: 20}, unit="updates"), adjust_every=1, max_batch_size=20)
    trainer = quiet(MiniBatchTrainer, model, batch_size=8, controller=control)
    assert trainer.fit((x, x.sum(1, keepdim=True)), epochs=2).column("batch_size")[-3:] == [20, 20, 21]


class Pairs(Dataset[Any]):
    """Inputs and targets of the same form."""

    def __len__(self) -> int:
        return 10

    def __getitem__(self, index: int) -> Any:
        return {"v": torch.full((3,), float(index))}, {"v": torch.full((1,), float(index))}


class OfDict(nn.Linear):
    def forward(self, x: Any) -> Tensor:
        return super().forward(x["v"])


def test_a_pair_of_two_samples_is_a_pair_whatever_its_forms() -> None:
    def train(**options: Any) -> list[Tensor]:
        torch.manual_seed(0)
        model = OfDict(3, 1)
        loss = lambda p, y: ((p - y["v"]) ** 2).mean()  # noqa: E731
        MiniBatchTrainer(model, loss, sgd(model, lr=1e-3), batch_size=4, seed=0, progress=False, **options).fit(Pairs())
        return list(model.parameters())

    for whole, split in zip(train(), train(micro_batch_size=1), strict=True):
        torch.testing.assert_close(whole, split)


@pytest.mark.parametrize("policy", ["goodput", "noise_scale"])
def test_a_batch_that_cannot_be_split_is_trained_on_unmeasured_with_one_warning(policy: str) -> None:
    class Recurrent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rnn, self.head = nn.RNN(3, 4), nn.Linear(4, 1)

        def forward(self, x: Any) -> Tensor:
            out: Tensor = self.head(self.rnn(x)[1][0])
            return out

    def packed(samples: Any) -> Any:
        sequences = [torch.randn(1 + int(y) % 5, 3) for _, y in samples]
        return nn.utils.rnn.pack_sequence(sequences, enforce_sorted=False), torch.stack([y[None] for _, y in samples])

    model = Recurrent()
    data = TensorDataset(torch.zeros(64), torch.arange(64.0))
    control = BatchSizeController(policy, lr_scaling="none", max_batch_size=32)
    trainer = MiniBatchTrainer(model, nn.MSELoss(), sgd(model), controller=control, progress=False)
    with pytest.warns(UserWarning, match="the gradient noise of an update is not measured: batch") as caught:
        trainer.fit(DataLoader(data, 4, collate_fn=packed))
    assert len(caught) == 1
    assert trainer.updates == 16
    assert control.noise.measurements == 0


def test_a_fixed_size_steps_its_scheduler_once_an_update_whatever_the_loader_counts() -> None:
    class Uneven(Sampler[list[int]]):
        batch_size = 8

        def __iter__(self) -> Iterator[list[int]]:
            return iter([[0], [1, 2, 3], [4, 5], [6, 7, 8, 9]])

        def __len__(self) -> int:
            return 4

    model = nn.Linear(1, 1)
    optimizer = sgd(model)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.9)
    x = torch.ones(10, 1)
    trainer = FixedBatchTrainer(model, half_square, optimizer, batch_size=8, scheduler=scheduler, progress=False)
    steps: list[int] = []
    trainer.fit(
        DataLoader(TensorDataset(x, x), batch_sampler=Uneven()),
        epochs=2,
        after_update=lambda made: steps.append(scheduler.last_epoch),
    )
    assert steps == list(range(1, 9))


def test_a_trainer_times_parts_that_nothing_else_makes_slower_and_updates_that_run_whole() -> None:
    now = [0.0]

    class Slow(nn.Linear):
        """A pass takes a second, and a quarter of one for each sample."""

        def forward(self, input: Tensor) -> Tensor:
            now[0] += 1 + len(input) / 4
            return super().forward(input)

    model = Slow(4, 1)
    controller = BatchSizeController("goodput", lr_scaling="none", max_batch_size=16)
    x = torch.randn(160, 4, generator=torch.Generator().manual_seed(0))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    with patch("time.perf_counter", lambda: now[0]):
        MiniBatchTrainer(model, nn.functional.mse_loss, optimizer, batch_size=16, controller=controller).fit(
            (x, x.sum(1, keepdim=True)), epochs=6
        )
    times = controller.step_time.state_dict()
    assert {tuple(one) for one in times["passes"]} == {(4, 2.0), (12, 4.0)}
    assert {tuple(one) for one in times["updates"]} == {(16, 5.0)}
    assert controller.noise.measurements > 10


def test_a_controller_that_is_none_and_a_seed_that_is_none_are_refused():
    model = torch.nn.Linear(2, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(TypeError, match="controller='goodput' decides nothing: pass a BatchSizeController"):
        MiniBatchTrainer(model, torch.nn.functional.mse_loss, optimizer, controller="goodput")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="seed='x' must be a whole number, or None"):
        MiniBatchTrainer(model, torch.nn.functional.mse_loss, optimizer, seed="x")  # type: ignore[arg-type]
