"""Contract point 6 without Lightning: a run that was killed goes on as if it had not been."""

from __future__ import annotations

import io
import json
import math
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset
from trainer_run import EPOCHS, SAMPLES, Line, build, line, loader, train

from adaptive_batch import BatchSizeController, FixedBatchTrainer, MiniBatchTrainer, SGDTrainer

ROOT = Path(__file__).parent.parent


def saved(trainer: Any) -> bytes:
    file = io.BytesIO()
    torch.save(trainer.state_dict(), file)
    return file.getvalue()


def loaded(state: bytes) -> Any:
    return torch.load(io.BytesIO(state), weights_only=True)


def uninterrupted(policy: str, data: Any, **options: Any) -> tuple[list[Line], list[bytes]]:
    """What each update did, and the state after it."""
    lines: list[Line] = []
    states: list[bytes] = []

    def keep(trainer: MiniBatchTrainer) -> None:
        lines.append(line(trainer))
        states.append(saved(trainer))

    train(build(policy, **options), data, keep)
    return lines, states


def resumed(policy: str, data: Any, state: bytes, **options: Any) -> list[Line]:
    lines: list[Line] = []
    trainer = build(policy, **options)
    trainer.load_state_dict(loaded(state))
    torch.manual_seed(99)  # whatever the program did before
    train(trainer, data, lambda trainer: lines.append(line(trainer)))
    return lines


def each_sample_once_an_epoch(lines: list[Line]) -> bool:
    epochs = [[i for _, epoch, _, _, _, samples in lines if epoch == e for i in samples] for e in range(EPOCHS)]
    return all(sorted(epoch) == list(range(SAMPLES)) for epoch in epochs)


@pytest.mark.parametrize("policy", ["wander", "noise_scale", "constant"])
def test_a_run_resumed_after_any_update_repeats_the_rest_bit_for_bit(policy: str) -> None:
    lines, states = uninterrupted(policy, loader())
    assert each_sample_once_an_epoch(lines)
    sizes = {size for _, _, _, size, _, _ in lines}
    assert sizes == {16, 5} if policy == "constant" else len(sizes) > 4
    for update in range(1, len(states) + 1, 1 if policy == "wander" else 4):
        assert resumed(policy, loader(), states[update - 1]) == lines[update:], update


@pytest.mark.parametrize("policy", ["wander", "noise_scale"])
def test_a_run_with_workers_is_resumed_bit_for_bit_with_what_they_had_prefetched(policy: str) -> None:
    lines, states = uninterrupted(policy, loader(2))
    assert each_sample_once_an_epoch(lines)
    for update in random.Random(3).sample(range(1, len(states) + 1), 4):
        assert resumed(policy, loader(2), states[update - 1]) == lines[update:], update


@pytest.mark.parametrize("kind", ["generator of the loader", "seed of the trainer", "micro-batches"])
def test_other_orders_and_splits_are_resumed_bit_for_bit(kind: str) -> None:
    options: dict[str, Any] = {}
    if kind == "seed of the trainer":
        options["seed"] = 4
    if kind == "micro-batches":
        options["micro_batch_size"] = 4

    def data() -> Any:
        if kind == "seed of the trainer":
            x, y = loader().dataset.tensors  # type: ignore[attr-defined]
            return x, y
        return loader(own_generator=kind == "generator of the loader")

    lines, states = uninterrupted("wander", data(), **options)
    for update in range(1, len(states) + 1, 3):
        assert resumed("wander", data(), states[update - 1], **options) == lines[update:], update


def test_a_run_resumed_between_two_fits_repeats_the_rest_bit_for_bit() -> None:
    lines: list[Line] = []
    states: list[bytes] = []
    trainer, data = build("wander"), loader()
    for _ in range(EPOCHS):
        states.append(saved(trainer))
        trainer.fit(data, after_update=lambda trainer: lines.append(line(trainer)))
    for epoch, state in enumerate(states):
        assert resumed("wander", loader(), state) == [entry for entry in lines if entry[1] >= epoch]
    assert resumed("wander", loader(), saved(trainer)) == []


def test_a_state_that_was_not_taken_up_yet_is_saved_again() -> None:
    lines, states = uninterrupted("wander", loader())
    trainer = build("wander")
    trainer.load_state_dict(loaded(states[6]))
    trainer.fit(loader(), epochs=0)
    assert resumed("wander", loader(), saved(trainer)) == lines[7:]


def test_a_state_saved_after_an_error_is_that_of_the_last_whole_update() -> None:
    lines, _ = uninterrupted("constant", loader())
    trainer = build("constant")
    loss, calls = trainer.loss_fn, 0

    def interrupted(prediction: Tensor, y: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        if calls == 6:
            raise KeyboardInterrupt
        return loss(prediction, y)

    trainer.loss_fn = interrupted
    with pytest.raises(KeyboardInterrupt):
        trainer.fit(loader())
    rest = resumed("constant", loader(), saved(trainer))
    assert rest[0][0] == 6
    remaining = [[entry[5] for entry in run if entry[1] == 0] for run in (rest, lines[5:])]
    assert remaining[0] == remaining[1]


@pytest.mark.parametrize("stop_at", [1, 2, 3])
def test_an_error_in_any_update_of_a_fit_loses_no_sample(stop_at: int) -> None:
    x = torch.arange(64.0)[:, None]
    seen: list[float] = []
    state = None
    for fit in range(3):
        stops = stop_at if fit < 2 else math.inf

        def loss(prediction: Tensor, y: Tensor) -> Tensor:
            nonlocal stops
            stops -= 1
            if not stops:
                raise KeyboardInterrupt
            seen.extend(y[:, 0].tolist())
            return nn.functional.mse_loss(prediction, y)

        model = nn.Linear(1, 1)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
        trainer = FixedBatchTrainer(model, loss, optimizer, batch_size=8, seed=0, progress=False)
        if state is not None:
            trainer.load_state_dict(loaded(state))
        with pytest.raises(KeyboardInterrupt) if fit < 2 else nullcontext():
            trainer.fit((x, x))
        state = saved(trainer)
    assert sorted(seen) == x[:, 0].tolist()


def test_a_loss_with_parameters_of_its_own_is_resumed_and_put_back_after_out_of_memory() -> None:
    class Scaled(nn.Module):
        calls: Tensor

        def __init__(self) -> None:
            super().__init__()
            self.log_variance = nn.Parameter(torch.zeros(()))
            self.register_buffer("calls", torch.zeros(()))

        def forward(self, prediction: Tensor, y: Tensor) -> Tensor:
            self.calls += 1
            return ((prediction - y) ** 2 * torch.exp(-self.log_variance) + self.log_variance).mean()

    class Fails(nn.Linear):
        fails_in = 0

        def forward(self, x: Tensor) -> Tensor:
            self.fails_in -= 1
            if self.fails_in == 0:
                raise torch.OutOfMemoryError("CUDA out of memory.")
            return super().forward(x)

    def trainer(fails_in: int = 0, micro: int = 8) -> Any:
        torch.manual_seed(0)
        model, loss = Fails(3, 1), Scaled()
        model.fails_in = fails_in
        optimizer = torch.optim.SGD([*model.parameters(), *loss.parameters()], lr=0.1, momentum=0.9)
        return MiniBatchTrainer(model, loss, optimizer, batch_size=16, micro_batch_size=micro, seed=0, progress=False)

    x = torch.randn(64, 3, generator=torch.Generator().manual_seed(1))
    y = x.sum(1, keepdim=True)
    whole, failed = trainer(micro=4), trainer(fails_in=2)  # in the second part of the first update
    losses = [made.fit((x, y), epochs=3).column("loss") for made in (whole, failed)]
    assert losses[0] == losses[1]
    assert whole.loss_fn.calls == failed.loss_fn.calls
    assert torch.equal(whole.loss_fn.log_variance, failed.loss_fn.log_variance)
    before = trainer(micro=4)
    before.fit((x, y))
    after = trainer(micro=4)
    after.load_state_dict(loaded(saved(before)))
    assert after.fit((x, y), epochs=2).column("loss") == losses[0]


def test_a_memory_budget_is_resumed_with_the_same_passes() -> None:
    x = torch.randn(1200, 20, generator=torch.Generator().manual_seed(0))

    def trainer() -> Any:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(20, 64), nn.Tanh(), nn.Linear(64, 1))
        control = BatchSizeController(
            lambda m: 8 if m.update < 10 else 256, lr_scaling="none", max_batch_size=256, adjust_every=5
        )
        return MiniBatchTrainer(
            model, nn.MSELoss(), torch.optim.SGD(model.parameters(), 0.05), batch_size=8, controller=control,
            micro_batch_size="auto", memory_budget="1GB", seed=3, progress=False,
        )  # fmt: skip

    states: list[bytes] = []
    whole = trainer()
    whole.fit((x, x[:, :1]), after_update=lambda made: states.append(saved(made)))
    for state in states[8:-1]:
        made = trainer()
        made.load_state_dict(loaded(state))
        assert made.fit((x, x[:, :1])).column("micro_batch_size") == whole.history.column("micro_batch_size")
        assert made.history.column("loss") == whole.history.column("loss")


def test_with_another_number_of_workers_each_sample_is_still_seen_once() -> None:
    lines, states = uninterrupted("wander", loader(2))
    rest = resumed("wander", loader(0), states[4])
    assert each_sample_once_an_epoch(lines[:5] + rest)
    assert rest[0][5] == lines[5][5]


def test_under_a_policy_that_reads_the_clock_the_restored_state_is_exact() -> None:
    _, states = uninterrupted("goodput", loader())
    trainer = build("goodput")
    for state in states[::7]:
        trainer.load_state_dict(loaded(state))
        assert repr(trainer.state_dict()["controller"]) == repr(loaded(state)["controller"])  # NaN included


def test_the_history_and_the_counts_go_on() -> None:
    trainer = build("wander")
    states: list[bytes] = []
    history = trainer.fit(loader(), EPOCHS, after_update=lambda trainer: states.append(saved(trainer)))
    again = build("wander")
    again.load_state_dict(loaded(states[8]))
    assert (again.updates, again.epoch, again.samples) == (9, 0, again.history.updates[-1].samples)
    resumed_history = again.fit(loader(), EPOCHS)
    fields = ("step", "epoch", "samples", "batch_size", "micro_batch_size", "lr_scale", "loss")
    for field in fields:
        assert resumed_history.column(field) == history.column(field)
    assert resumed_history.changes == history.changes
    assert (again.updates, again.epoch, again.samples) == (trainer.updates, trainer.epoch, trainer.samples)


def test_loading_leaves_the_state_as_it_was() -> None:
    _, states = uninterrupted("wander", loader())
    state = loaded(states[5])
    trainer = build("wander")
    trainer.load_state_dict(state)
    trainer.fit(loader(), EPOCHS)
    file = io.BytesIO()
    torch.save(state, file)
    assert resumed("wander", loader(), file.getvalue()) == resumed("wander", loader(), states[5])


@pytest.mark.parametrize("cls", [FixedBatchTrainer, SGDTrainer])
def test_the_trainers_of_fixed_sizes_are_resumed_as_well(cls: Any) -> None:
    x, y = torch.randn(11, 3), torch.randn(11)

    def made() -> Any:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(3, 4), nn.Dropout(0.5), nn.Linear(4, 1), nn.Flatten(0))
        optimizer = torch.optim.Adam(model.parameters(), lr=0.1)
        options = {"batch_size": 4} if cls is FixedBatchTrainer else {}
        return cls(model, nn.MSELoss(), optimizer, seed=2, progress=False, **options)

    states: list[bytes] = []
    losses = made().fit((x, y), 3, after_update=lambda trainer: states.append(saved(trainer))).column("loss")
    for state in states[::4]:
        trainer = made()
        trainer.load_state_dict(loaded(state))
        assert trainer.fit((x, y), 3 - trainer.epoch).column("loss") == losses


# Killed


def life(policy: str, workers: int, checkpoint: Path, updates: int, pause: float) -> list[Line]:
    """One process of the run, killed a moment after it has reported so many updates; what it reported."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONWARNINGS": "ignore"}
    command = [sys.executable, str(Path(__file__).with_name("trainer_run.py")), policy, str(workers), str(checkpoint)]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=environment
    ) as run:
        assert run.stdout is not None
        try:
            reported = "".join(run.stdout.readline() for _ in range(updates))
            time.sleep(pause)
        finally:
            run.kill()
        reported += run.stdout.read()  # not communicate(), which passes over what readline() has buffered
        assert run.wait() == -signal.SIGKILL
    return [json.loads(text) for text in reported.splitlines(keepends=True) if text.endswith("\n")]


def killed_again_and_again(policy: str, workers: int, kills: int, seed: int, checkpoint: Path) -> list[Line]:
    """The updates that count, of a run whose process is killed so often and then left to end."""
    moments = random.Random(seed)
    done: list[Line] = []
    for _ in range(kills):
        lines = life(policy, workers, checkpoint, moments.randint(1, 6), moments.uniform(0, 0.02))
        known = loaded(checkpoint.read_bytes())["updates"] if checkpoint.exists() else 0
        for entry in lines:  # an update after the last checkpoint is made once more, and is the same
            assert entry[0] > len(done) or entry == done[entry[0] - 1]
            done[entry[0] - 1 :] = [entry]
        assert known in (len(done), len(done) - 1)
    return done[: known or 0] + (
        resumed(policy, loader(workers), checkpoint.read_bytes())
        if known
        else uninterrupted(policy, loader(workers))[0]
    )


@pytest.mark.parametrize(("policy", "workers", "kills"), [("wander", 0, 2), ("noise_scale", 2, 1)])
def test_a_killed_run_repeats_the_uninterrupted_one(policy: str, workers: int, kills: int, tmp_path: Path) -> None:
    lines, _ = uninterrupted(policy, loader(workers))
    assert killed_again_and_again(policy, workers, kills, 11, tmp_path / "run.pt") == lines


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("policy", ["wander", "noise_scale"])
@pytest.mark.parametrize("seed", range(5))
def test_runs_killed_many_times_repeat_the_uninterrupted_one(
    seed: int, policy: str, workers: int, tmp_path: Path
) -> None:
    lines, _ = uninterrupted(policy, loader(workers))
    assert killed_again_and_again(policy, workers, 5, seed, tmp_path / "run.pt") == lines


# What is refused


def test_a_state_inside_an_epoch_of_an_iterable_data_set_is_refused() -> None:
    class Stream(IterableDataset[Any]):
        def __iter__(self) -> Iterator[Any]:
            return iter([(torch.ones(3), torch.ones(1))] * 10)

    def made() -> MiniBatchTrainer:
        model = nn.Linear(3, 1)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        return MiniBatchTrainer(model, nn.MSELoss(), optimizer, batch_size=4, progress=False)

    states: list[bytes] = []
    whole = made()
    whole.fit(Stream(), after_update=lambda trainer: states.append(saved(trainer)))
    trainer = made()
    trainer.load_state_dict(loaded(states[0]))
    with pytest.raises(ValueError, match="only an iterable data set itself could know where it stands"):
        trainer.fit(Stream())
    trainer.load_state_dict(loaded(saved(whole)))
    assert trainer.fit(Stream()).column("batch_size") == [4, 4, 2] * 2


def test_other_data_than_the_states_is_refused() -> None:
    _, states = uninterrupted("constant", loader())
    trainer = build("constant")
    trainer.load_state_dict(loaded(states[5]))
    with pytest.raises(ValueError, match="the state is of 96 samples into an epoch, but the data has only 20"):
        trainer.fit(DataLoader(TensorDataset(torch.ones(20, 5), torch.ones(20)), batch_size=8, shuffle=True))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"optimizer": None}, "optimizer missing"),
        ({"epoch": -1}, "cannot have epoch=-1"),
        ({"scheduler": "none"}, "the trainer has a scheduler and the state has none"),
        ({"controller": "none"}, "the trainer has a controller and the state has none"),
    ],
)
def test_a_state_that_does_not_fit_is_refused_in_a_sentence(change: dict[str, Any], words: str) -> None:
    trainer = build("constant")
    state = trainer.state_dict()
    for name, value in change.items():
        if value is None:
            del state[name]
        else:
            state[name] = None if value == "none" else value
    with pytest.raises(ValueError, match=words) as raised:
        trainer.load_state_dict(state)
    assert str(raised.value).count(". ") == 0


def test_a_controller_that_the_trainer_lacks_is_refused() -> None:
    state = build("constant").state_dict()
    model = nn.Linear(1, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scheduler = torch.optim.lr_scheduler.ConstantLR(optimizer)
    trainer = MiniBatchTrainer(model, nn.MSELoss(), optimizer, scheduler=scheduler, progress=False)
    with pytest.raises(ValueError, match="the state has a controller and the trainer has none"):
        trainer.load_state_dict(state)
