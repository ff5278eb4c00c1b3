"""A run of MiniBatchTrainer with all that a resumed run has to repeat; as a script, one that can be killed.

Usage: ``python trainer_run.py POLICY WORKERS CHECKPOINT``; writes one line per update to the standard output.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from adaptive_batch import BatchSizeController, Measurement, MiniBatchTrainer

SAMPLES, B0, EPOCHS = 197, 16, 3
SIZES = (16, 3, 40, 24, 7, 61, 11)

Line = list[Any]


class Wander:
    """A policy with a memory: the next of some sizes whenever it is asked."""

    def __init__(self) -> None:
        self.asked = 0

    def propose(self, measurement: Measurement) -> float:
        self.asked += 1
        return SIZES[self.asked % len(SIZES)]

    def state_dict(self) -> dict[str, int]:
        return {"asked": self.asked}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.asked = state["asked"]


POLICIES: dict[str, Callable[[], Any]] = {
    "wander": Wander,
    "noise_scale": lambda: "noise_scale",
    "constant": lambda: "constant",
    "goodput": lambda: "goodput",
}


class Net(nn.Module):
    """Dropout, numbers from a generator of its own, and a record of the samples it saw."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Dropout(0.1), nn.Linear(16, 1))
        self.generator = torch.Generator().manual_seed(5)
        self.seen: list[int] = []

    def forward(self, x: Tensor) -> Any:
        self.seen += x[:, -1].int().tolist()
        x = x[:, :-1]
        return self.net(x + 0.1 * torch.randn(x.shape, generator=self.generator))


def half_square(prediction: Tensor, y: Tensor) -> Tensor:
    return (prediction[:, 0] - y).square().mean() / 2


def build(policy: str, *, micro_batch_size: Any = None, seed: int | None = None) -> MiniBatchTrainer:
    torch.manual_seed(0)
    model = Net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.001, momentum=0.9)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.002, total_steps=EPOCHS * -(-SAMPLES // B0))
    # Two updates of noise are evidence enough here, so that the measured policy changes the size often.
    controller = BatchSizeController(
        POLICIES[policy](), lr_scaling="adascale", min_batch_size=2, adjust_every=3, quantize=False
    )
    return MiniBatchTrainer(
        model,
        half_square,
        optimizer,
        controller=controller,
        scheduler=scheduler,
        micro_batch_size=micro_batch_size,
        seed=seed,
        progress=False,
    )


def loader(workers: int = 0, *, own_generator: bool = False) -> DataLoader[Any]:
    generator = torch.Generator().manual_seed(7)
    x = torch.randn(SAMPLES, 4, generator=generator).sign()
    y = x @ torch.arange(1.0, 5.0) + 0.3 * torch.randn(SAMPLES, generator=generator)
    dataset = TensorDataset(torch.column_stack([x, torch.arange(SAMPLES)]), y)
    shared = generator if own_generator else None
    return DataLoader(dataset, batch_size=B0, shuffle=True, num_workers=workers, generator=shared)


def line(trainer: MiniBatchTrainer) -> Line:
    """What the update that has just ended did, to the last bit."""
    trainer.state_dict()  # brings the history up to date
    update = trainer.history.updates[-1]
    net: Any = trainer.model
    samples, net.seen = net.seen, []
    lr = trainer.optimizer.param_groups[0]["lr"]
    weight = sum(float(p.detach().double().sum()) for p in net.parameters())
    numbers = [float(n).hex() for n in (update.lr_scale, lr, update.loss, weight)]
    return [update.step, update.epoch, update.samples, update.batch_size, numbers, samples]


def train(trainer: MiniBatchTrainer, data: Any, after_update: Callable[[MiniBatchTrainer], Any]) -> None:
    trainer.fit(data, EPOCHS - trainer.epoch, after_update=after_update)


def main(policy: str, workers: int, checkpoint: Path) -> None:
    torch.set_num_threads(1)
    trainer = build(policy)
    if checkpoint.exists():
        trainer.load_state_dict(torch.load(checkpoint, weights_only=True))

    def save(trainer: MiniBatchTrainer) -> None:
        print(json.dumps(line(trainer)), flush=True)
        unfinished = checkpoint.with_suffix(".tmp")
        torch.save(trainer.state_dict(), unfinished)
        os.replace(unfinished, checkpoint)

    train(trainer, loader(workers), save)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), Path(sys.argv[3]))
