"""MiniBatchTrainer: batches that do not fit into memory, at every place of an update."""

from __future__ import annotations

import copy
import math
import random
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from adaptive_batch import BatchSizeController, History, MiniBatchTrainer
from adaptive_batch.memory import SavedBytes

BATCH, LIMIT, SAMPLES = 16, 8, 75
NORM = "net.1 .BatchNorm1d. looks across the batch"
pytestmark = pytest.mark.filterwarnings(f"ignore:{NORM}")


def data(samples: int = SAMPLES) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(7)
    x = torch.randn(samples, 8, generator=generator)
    return x, (x[:, 0] > 0).long()


class Delicate(nn.Module):
    """All that a failed attempt could spoil: statistics, masks, counters, generators; fails where it is told."""

    def __init__(self, *, norm: bool = True) -> None:
        super().__init__()
        layers: list[nn.Module] = [nn.Linear(8, 16), nn.ReLU(), nn.Dropout(0.3), nn.Linear(16, 2)]
        self.net = nn.Sequential(*layers[:1], *([nn.BatchNorm1d(16)] if norm else []), *layers[1:])
        self.frozen = nn.Parameter(torch.ones(()))  # trained by nobody: its gradient is never cleared
        self.calls: Tensor
        self.register_buffer("calls", torch.zeros((), dtype=torch.long))
        self.generator = torch.Generator().manual_seed(5)
        self.sizes: list[int] = []
        self.update, self.forwards = 0, -1
        self.bombs: dict[tuple[int, int], tuple[str, BaseException]] = {}

    def forward(self, x: Tensor) -> Any:
        self.forwards += 1
        self.sizes.append(len(x))
        self.calls += 1
        x = x + 0.1 * torch.randn(x.shape, generator=self.generator)
        x = x * (1 + 0.01 * random.random() + 0.01 * float(np.random.rand()))
        x.requires_grad_()
        out = self.net(x) * self.frozen
        place, error = self.bombs.pop((self.update, self.forwards), (None, None))
        if error is not None and place == "forward":
            raise error
        if error is not None:

            def explode(gradient: Tensor) -> None:
                raise error

            (out if place == "early backward" else x).register_hook(explode)
        return out

    def next_update(self, trainer: Any) -> None:
        self.update, self.forwards = trainer.updates, -1


def seeded(**options: Any) -> Delicate:
    torch.manual_seed(0)
    np.random.seed(0)
    random.seed(0)
    return Delicate(**options)


def oom() -> BaseException:
    return torch.OutOfMemoryError("CUDA out of memory.")


def make(model: Delicate, micro: Any = LIMIT, **options: Any) -> MiniBatchTrainer:
    optimizer = torch.optim.AdamW([p for n, p in model.named_parameters() if n != "frozen"], lr=0.01)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))
    options = {"batch_size": BATCH, "micro_batch_size": micro, "scheduler": scheduler, "seed": 1, **options}
    return MiniBatchTrainer(model, nn.CrossEntropyLoss(), optimizer, progress=False, **options)


def run(bombs: dict[tuple[int, int], tuple[str, BaseException]], **options: Any) -> tuple[Delicate, MiniBatchTrainer]:
    model = seeded()
    model.bombs = dict(bombs)
    trainer = make(model, **options)
    trainer.fit(data(), epochs=2, after_update=model.next_update)
    assert not model.bombs
    return model, trainer


def run_split_from(update: int, micro: int) -> tuple[Delicate, MiniBatchTrainer]:
    """The reference: another bound from the given update on, without any failure."""
    model, states = seeded(), []
    trainer = make(model)
    if update == 0:
        trainer = make(model, micro)
        trainer.fit(data(), epochs=2)
        return model, trainer

    def keep(trainer: MiniBatchTrainer) -> None:
        if trainer.updates == update:
            states.append(copy.deepcopy(trainer.state_dict()))

    trainer.fit(data(), epochs=2, after_update=keep)
    model = Delicate()
    trainer = make(model, micro)
    trainer.load_state_dict(states[0])
    trainer.fit(data(), epochs=2 - trainer.epoch)
    return model, trainer


def record(history: History) -> list[Any]:
    return [(u.step, u.epoch, u.samples, u.batch_size, u.micro_batch_size, u.lr_scale, u.loss) for u in history.updates]


def assert_equal_runs(one: tuple[Delicate, MiniBatchTrainer], other: tuple[Delicate, MiniBatchTrainer]) -> None:
    for (name, a), b in zip(one[0].state_dict().items(), other[0].state_dict().values(), strict=True):
        assert torch.equal(a, b), name
    moments = [trainer.optimizer.state_dict()["state"] for _, trainer in (one, other)]
    for a, b in zip(moments[0].values(), moments[1].values(), strict=True):
        assert all(torch.equal(a[key], b[key]) for key in a)
    assert torch.equal(one[0].generator.get_state(), other[0].generator.get_state())
    assert record(one[1].history) == record(other[1].history)


@pytest.mark.parametrize("place", ["forward", "early backward", "late backward"])
@pytest.mark.parametrize("part", [0, 1])
@pytest.mark.parametrize("update", [0, 3, 4, 6])
def test_a_run_goes_on_as_if_it_had_been_split_smaller_from_that_update_on(update: int, part: int, place: str) -> None:
    """Contract point 5; update 4 is an epoch's tail of 11 samples, whose parts are 6 and 5."""
    failed = run({(update, part): (place, oom())})
    smaller = 3 if update == 4 else 4
    assert_equal_runs(failed, run_split_from(update, smaller))
    assert failed[1].history.updates[-2].micro_batch_size == {4: 4, 3: 3}[smaller]


@pytest.mark.parametrize("place", ["forward", "late backward"])
@pytest.mark.parametrize("passes", [(0, 1), (1, 5), (0, 4)])
def test_a_retry_that_fails_as_well_leaves_nothing_behind_either(passes: tuple[int, int], place: str) -> None:
    """The second failure is in the first, the last but one and the last pass of the second attempt."""
    failed = run({(2, number): (place, oom()) for number in passes})
    assert_equal_runs(failed, run_split_from(2, 2))


@pytest.mark.parametrize("update", [0, 5])
def test_an_unbounded_batch_is_split_only_when_it_fails(update: int) -> None:
    unsplit = run({}, micro="auto")
    assert set(unsplit[0].sizes) == {16, 11}
    assert_equal_runs(unsplit, run({}, micro=None))
    failed = run({(update, 0): ("late backward", oom())}, micro="auto")
    sizes = failed[1].history.column("micro_batch_size")
    assert sizes[update:] == [8 if u.batch_size == 16 else 6 for u in failed[1].history.updates][update:]


def test_a_failed_attempt_of_a_measured_update_is_not_measured() -> None:
    class Measured:
        needs = frozenset({"noise"})

        def propose(self, measurement: Any) -> float:
            return float(measurement.batch_size)

    states = []
    for bombs, micro in (({(0, 1): ("forward", oom())}, 8), ({}, 4)):
        model = seeded(norm=False)
        model.bombs = dict(bombs)
        control = BatchSizeController(Measured(), lr_scaling="adascale", adjust_every=2)
        trainer = make(model, micro, controller=control)
        trainer.fit(data(), epochs=2, after_update=model.next_update)
        states.append((control.noise.state_dict(), record(trainer.history), model.calls.item()))
    assert states[0] == states[1]


def test_lbfgs_goes_on_after_running_out_of_memory_in_a_later_evaluation() -> None:
    model = seeded(norm=False)
    model.net = nn.Sequential(nn.Linear(8, 2))
    model.bombs = {(0, 5): ("late backward", oom())}
    optimizer = torch.optim.LBFGS(model.parameters(), max_iter=8)
    trainer = MiniBatchTrainer(
        model, nn.CrossEntropyLoss(), optimizer, batch_size=SAMPLES, micro_batch_size=40, progress=False
    )
    history = trainer.fit(data(), epochs=3)
    assert not model.bombs
    assert history.updates[-1].loss < history.updates[0].loss
    assert 20 in model.sizes or 19 in model.sizes


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("[enforce fail at alloc_cpu.cpp:75] . DefaultCPUAllocator: can't allocate memory"),
        RuntimeError("CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        MemoryError(),
    ],
    ids=lambda error: type(error).__name__,
)
def test_other_spellings_of_out_of_memory_are_survived(error: BaseException) -> None:
    _, trainer = run({(1, 0): ("forward", error)})
    assert trainer.updates == 10


def test_another_error_is_not_swallowed() -> None:
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        run({(1, 0): ("forward", RuntimeError("mat1 and mat2 shapes cannot be multiplied"))})


def test_without_micro_batches_the_error_is_the_users() -> None:
    with pytest.raises(torch.OutOfMemoryError):
        run({(1, 0): ("forward", oom())}, micro=None)


class Hungry(nn.Module):
    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(8, 2), *layers)

    def forward(self, x: Tensor) -> Any:
        self.net(x)
        raise oom()


@pytest.mark.parametrize(
    ("layers", "words"),
    [
        ((), "a micro-batch of one sample does not fit into memory; use a smaller model"),
        (
            (nn.BatchNorm1d(2),),
            r"2 samples, the least that net.1 \(BatchNorm1d\) can take, does not fit",
        ),
    ],
    ids=["one sample", "two for BatchNorm"],
)
@pytest.mark.filterwarnings("ignore:net.1 .BatchNorm1d. looks across the batch")
@pytest.mark.parametrize("options", [{}, {"memory_budget": "1MB"}], ids=["no budget", "exploring"])
def test_what_does_not_fit_at_all_is_a_clear_error(layers: Any, words: str, options: dict[str, Any]) -> None:
    model = Hungry(*layers)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    trainer = MiniBatchTrainer(
        model, nn.CrossEntropyLoss(), optimizer, micro_batch_size="auto", progress=False, **options
    )
    with pytest.raises(RuntimeError, match=words):
        trainer.fit(data())


def test_the_history_says_what_was_learned() -> None:
    _, trainer = run({(2, 0): ("late backward", oom())})
    (note,) = trainer.history.notes
    assert note.reason == "out of memory at a micro-batch of 8, at most 4 from here on"
    assert (note.step, note.batch_size) == (3, BATCH)


def test_what_was_learned_is_in_the_state() -> None:
    _, trainer = run({(2, 0): ("late backward", oom())}, micro="auto")
    model = Delicate()
    resumed = make(model, "auto")
    resumed.load_state_dict(trainer.state_dict())
    resumed.fit(data())
    assert set(model.sizes) == {8, 6, 5}


# What is equal to the whole batch


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("micro", [1, 4, 5, 74])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.float64, 1e-12)])
def test_parts_have_the_gradient_and_the_loss_of_the_whole(
    dtype: torch.dtype, tolerance: float, micro: int, reduction: str
) -> None:
    """Contract point 4."""
    x, y = data()
    seen = []
    for size in (None, micro):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 2)).to(dtype)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
        loss = nn.CrossEntropyLoss(reduction=reduction)
        options: Any = {"batch_size": SAMPLES, "micro_batch_size": size, "loss_reduction": reduction, "seed": 0}
        history = MiniBatchTrainer(model, loss, optimizer, progress=False, **options).fit((x.to(dtype), y))
        gradient = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
        seen.append((gradient, history.updates[-1].loss))
    assert torch.linalg.vector_norm(seen[1][0] - seen[0][0]) <= tolerance * torch.linalg.vector_norm(seen[0][0])
    assert seen[1][1] == pytest.approx(seen[0][1], rel=tolerance)
    assert seen[0][1] == pytest.approx(math.log(2), rel=0.5)  # a mean, whatever the reduction


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_the_noise_is_that_of_the_mean_gradient_whatever_the_reduction(reduction: str) -> None:
    x, y = data()
    model = nn.Linear(8, 2, dtype=torch.float64)
    control = BatchSizeController("noise_scale", lr_scaling="none", adjust_every=1)
    torch.manual_seed(1)
    nn.init.normal_(model.weight)
    options: Any = {"controller": control, "loss_reduction": reduction, "batch_size": 25, "seed": 0}
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    loss = nn.CrossEntropyLoss(reduction=reduction)
    MiniBatchTrainer(model, loss, optimizer, progress=False, **options).fit((x.double(), y), epochs=3)
    rows = torch.stack([torch.autograd.grad(nn.functional.cross_entropy(model(a), b), model.weight)[0].flatten()
                        for a, b in zip(x.double(), y, strict=True)])  # fmt: skip
    assert control.noise.grad_variance == pytest.approx(float(rows.var(dim=0).sum()), rel=0.3)


@pytest.mark.parametrize(("batch", "micro"), [(9, 2), (3, 2), (16, 1), (5, 4)])
def test_batch_norm_never_gets_a_part_of_one_sample(batch: int, micro: int) -> None:
    model = Delicate()
    make(model, micro, batch_size=batch).fit(data(batch))
    assert sum(model.sizes) == batch and min(model.sizes) >= 2


@pytest.mark.filterwarnings(f"default:{NORM}")
@pytest.mark.parametrize("micro", ["auto", 4])
def test_a_layer_that_looks_across_the_batch_is_named_once(micro: Any) -> None:
    with pytest.warns(UserWarning, match=r"net.1 \(BatchNorm1d\) looks across the batch") as caught:
        trainer = make(Delicate(), micro)
        trainer.fit(data(20))
        trainer.fit(data(20))
    assert len([w for w in caught if "looks across" in str(w.message)]) == 1


def test_without_splitting_there_is_nothing_to_warn_of(recwarn: pytest.WarningsRecorder) -> None:
    make(Delicate(), None).fit(data(20))
    assert not recwarn.list


# A budget


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 64), nn.Tanh(), nn.Dropout(0.2), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 2))


def train(model: nn.Module, **options: Any) -> History:
    torch.manual_seed(1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    trainer = MiniBatchTrainer(model, nn.CrossEntropyLoss(), optimizer, seed=2, progress=False, **options)
    return trainer.fit(data(), epochs=2)


def test_a_budget_on_a_cpu_is_kept_from_the_first_update_on_and_exploring_leaves_no_trace() -> None:
    model = network()
    with SavedBytes(model.parameters()) as unsplit:
        train(model, batch_size=BATCH)
    budget = unsplit.bytes // 3
    model = network()
    with SavedBytes(model.parameters()) as split:
        history = train(model, batch_size=BATCH, micro_batch_size="auto", memory_budget=budget)
    assert split.bytes <= budget < unsplit.bytes
    found = max(int(size) for size in history.column("micro_batch_size"))
    assert found in (4, 5)
    told = network()
    assert record(train(told, batch_size=BATCH, micro_batch_size=found)) == record(history)
    for a, b in zip(model.parameters(), told.parameters(), strict=True):
        assert torch.equal(a, b)


def test_a_model_with_torch_func_trains_without_its_budget_and_says_so() -> None:
    class Jacobian(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(8, 2)

        def forward(self, x: Tensor) -> Any:
            return self.linear(x) + 0 * torch.func.grad(lambda z: z.square().sum())(x).sum()

    with pytest.warns(UserWarning, match="memory_budget is not kept: the model uses torch.func"):
        history = train(Jacobian(), batch_size=BATCH, micro_batch_size="auto", memory_budget="1MB")
    assert history.column("micro_batch_size") == history.column("batch_size")


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"micro_batch_size": "auto", "memory_budget": "lots"}, ValueError, "memory_budget='lots' is not a size"),
        ({"micro_batch_size": "auto", "memory_budget": [1]}, TypeError, r"memory_budget=\[1\] is of type list"),
        ({"micro_batch_size": "auto", "memory_budget": 0.5}, ValueError, "no memory of its own"),
        ({"memory_budget": "1MB"}, ValueError, "micro_batch_size is None"),
        ({"micro_batch_size": "many"}, ValueError, "micro_batch_size='many' must be a positive number"),
        ({"micro_batch_size": 0}, ValueError, "micro_batch_size=0 must be a positive number"),
        ({"loss_reduction": "none"}, ValueError, "loss_reduction='none' is not known"),
    ],
)
def test_bad_arguments_are_refused_in_a_sentence(options: dict[str, Any], error: Any, words: str) -> None:
    with pytest.raises(error, match=words) as raised:
        train(network(), **options)
    assert str(raised.value).count(". ") == 0
