"""Distorted handwritten digits, trained with a fixed batch of 32 and with AdaptiveBatchSize.

The only difference between the two runs is one callback. Both start from the same weights, with the same
learning rate, which was tuned for the batch of 32; time counts training only, not validation.

    python examples/digits.py [--seed 0] [--epochs 75] [--plot digits.png]
"""

from __future__ import annotations

import argparse
import logging
import sys
import time
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from adaptive_batch.callbacks import AdaptiveBatchSize

BATCH_SIZE = 32
LEARNING_RATE = 0.02  # the best of 0.01, 0.02 and 0.03 for a batch of 32
TARGET = 0.94  # validation accuracy, mean of the last three
TRAIN_IMAGES = 1408
PASSES = 8  # distorted copies of each image per epoch


class Digits(Dataset[tuple[Tensor, Tensor]]):
    """The 8x8 digits, each several times per epoch; the model distorts every copy differently."""

    def __init__(self, images: Tensor, labels: Tensor) -> None:
        self.images, self.labels = images, labels

    def __len__(self) -> int:
        return PASSES * len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return self.images[index % len(self.images)], self.labels[index % len(self.images)]


def distort(images: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """Rotate by up to 29 degrees, zoom by up to 20 %, shift by up to a pixel, add noise."""
    n = len(images)
    u = 2 * torch.rand(4, n, generator=generator) - 1
    angle, zoom = 0.5 * u[0], 1 + 0.2 * u[1]
    cos, sin = zoom * torch.cos(angle), zoom * torch.sin(angle)
    affine = torch.stack([cos, -sin, 0.25 * u[2], sin, cos, 0.25 * u[3]], 1).view(n, 2, 3)
    grid = F.affine_grid(affine, [n, 1, 8, 8], align_corners=False)
    moved = F.grid_sample(images.unsqueeze(1), grid, align_corners=False)
    return moved + 0.1 * torch.randn(moved.shape, generator=generator)


def loaders() -> tuple[DataLoader[Any], DataLoader[Any]]:
    """Training data, and held-out images under fixed distortions as one batch."""
    digits = load_digits()
    order = torch.randperm(len(digits.target), generator=torch.Generator().manual_seed(0))
    images = torch.tensor(digits.images, dtype=torch.float32)[order] / 16
    labels = torch.tensor(digits.target)[order]
    train = Digits(images[:TRAIN_IMAGES], labels[:TRAIN_IMAGES])
    held_out = distort(images[TRAIN_IMAGES:].repeat(8, 1, 1), torch.Generator().manual_seed(1234))
    validation: Any = [(held_out, labels[TRAIN_IMAGES:].repeat(8))]
    return DataLoader(train, BATCH_SIZE, shuffle=True), DataLoader(validation, batch_size=None)


class Classifier(pl.LightningModule):
    """An ordinary LightningModule: it knows nothing of adaptive batch sizes."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Flatten(), nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 128), nn.ReLU(), nn.Linear(128, 10)
        )

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        images, labels = batch
        loss = F.cross_entropy(self.net(distort(images)), labels)
        self.log("train_loss", loss, prog_bar=True)
        return loss

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        images, labels = batch
        accuracy = (self.net(images).argmax(1) == labels).float().mean()
        self.log("val_accuracy", accuracy, prog_bar=True, batch_size=len(labels))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=LEARNING_RATE, momentum=0.9)


@dataclass
class Curve(pl.Callback):
    """Validation accuracy over samples, updates and seconds of training."""

    samples: list[int] = field(default_factory=list)
    updates: list[int] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    accuracy: list[float] = field(default_factory=list)
    _seen: int = 0
    _trained: float = 0.0
    _started: float = 0.0

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._started = time.perf_counter()

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._seen += len(batch[0])

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._trained += time.perf_counter() - self._started

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.samples.append(self._seen)
        self.updates.append(trainer.global_step)
        self.seconds.append(self._trained)
        self.accuracy.append(float(trainer.callback_metrics["val_accuracy"]))
        self._started = time.perf_counter()

    @property
    def hit(self) -> int | None:
        """Index of the first validation at which the mean of the last three reached the target."""
        means = (sum(self.accuracy[i - 2 : i + 1]) / 3 for i in range(2, len(self.accuracy)))
        return next((i + 2 for i, mean in enumerate(means) if mean >= TARGET), None)


def train(seed: int, epochs: int, callbacks: list[pl.Callback]) -> Curve:
    """One run; the callbacks are all that can differ."""
    pl.seed_everything(seed, verbose=False)
    curve = Curve()
    train_loader, validation_loader = loaders()
    trainer = pl.Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        callbacks=[*callbacks, curve],
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        enable_progress_bar=sys.stderr.isatty(),
        num_sanity_val_steps=0,
    )
    trainer.fit(Classifier(), train_loader, validation_loader)
    return curve


def table(runs: dict[str, Curve]) -> str:
    """Time, updates and samples to the target, and the accuracy in the end."""
    lines = [f"{'':<20}{'to ' + format(TARGET, '.0%'):>10}{'updates':>10}{'samples':>10}{'in the end':>12}{'total':>9}"]
    for name, curve in runs.items():
        final = sum(curve.accuracy[-3:]) / len(curve.accuracy[-3:])
        if curve.hit is None:
            reached = f"{'missed':>10}{'-':>10}{'-':>10}"
        else:
            reached = f"{curve.seconds[curve.hit]:>8.1f} s{curve.updates[curve.hit]:>10}{curve.samples[curve.hit]:>10}"
        lines.append(f"{name:<20}{reached}{final:>12.1%}{curve.seconds[-1]:>7.1f} s")
    return "\n".join(lines)


def main() -> None:
    """Train both ways, print what happened, draw it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--epochs", type=int, default=75)
    parser.add_argument("--plot", type=Path, default=Path("digits.png"))
    arguments = parser.parse_args()

    # The network is too small for a second thread to help, in either run.
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", ".*does not have many workers.*")
    warnings.filterwarnings("ignore", ".*LeafSpec.* is deprecated")  # Lightning's own, on a newer torch
    logging.getLogger("pytorch_lightning.utilities.rank_zero").setLevel(logging.WARNING)

    print(f"fixed batch size {BATCH_SIZE} ({arguments.epochs} epochs) ...", flush=True)
    fixed = train(arguments.seed, arguments.epochs, [])
    print("AdaptiveBatchSize() ...", flush=True)
    adaptive_batch_size = AdaptiveBatchSize()
    adaptive = train(arguments.seed, arguments.epochs, [adaptive_batch_size])

    print()
    print(table({f"fixed {BATCH_SIZE}": fixed, "AdaptiveBatchSize": adaptive}))
    print("\nBatch size over time, and why")
    for change in adaptive_batch_size.history.changes:
        print(f"  epoch {change.epoch:>2}, {change.samples:>7} samples: {change.reason}")
    print("\nThe learning rate is constant in both runs; a schedule that lowers it would speed up both.")

    series = {"validation\naccuracy": (adaptive.samples, adaptive.accuracy)}
    adaptive_batch_size.history.plot(arguments.plot, series=series)
    print(f"Plot: {arguments.plot}")


if __name__ == "__main__":
    main()
