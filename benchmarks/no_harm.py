"""Where the batch of 32 is already best, AdaptiveBatchSize must stay out of the way.

The time of an update is proportional to its samples here: each sample is run by itself, at a cost
beside which nothing else counts. A larger batch then buys nothing. Plain Lightning and AdaptiveBatchSize() train in
turn on the same samples; the figure is the ratio of their training times.

    python benchmarks/no_harm.py [--pairs 5] [--epochs 3]
"""

from __future__ import annotations

import argparse
import logging
import statistics
import time
import warnings
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from adaptive_batch.callbacks import AdaptiveBatchSize


class OneByOne(pl.LightningModule):
    """A classifier whose cost is all per sample: a recurrent network that takes one sequence at a time."""

    def __init__(self) -> None:
        super().__init__()
        self.cell = nn.RNNCell(8, 64)
        self.head = nn.Linear(64, 10)

    def forward(self, sequence: Tensor) -> Tensor:
        state = torch.zeros(64)
        for element in sequence:
            state = self.cell(element, state)
        scores: Tensor = self.head(state)
        return scores

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch
        return nn.functional.cross_entropy(torch.stack([self(sequence) for sequence in x]), y)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.05)


def train(callbacks: list[pl.Callback], epochs: int) -> float:
    torch.manual_seed(0)
    x = torch.randn(2048, 32, 8)
    y = x.mean(1).argmax(1)
    trainer = pl.Trainer(
        max_epochs=epochs, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, callbacks=callbacks,
    )  # fmt: skip
    started = time.perf_counter()
    trainer.fit(OneByOne(), DataLoader(TensorDataset(x, y), 32, shuffle=True))
    return time.perf_counter() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--epochs", type=int, default=3)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)
    ratios = []
    for _ in range(arguments.pairs):
        plain = train([], arguments.epochs)
        callback = AdaptiveBatchSize(verbose=False)
        adaptive = train([callback], arguments.epochs)
        ratios.append(adaptive / plain)
        print(f"fixed 32: {plain:.2f} s, AdaptiveBatchSize: {adaptive:.2f} s, ratio {ratios[-1]:.3f}", flush=True)
    print(f"\nratio: median {statistics.median(ratios):.3f}, from {min(ratios):.3f} to {max(ratios):.3f}")
    changes, notes = callback.history.changes, callback.history.notes
    print(f"changes: {[change.reason for change in changes] or 'none'}")
    print(f"because: {notes[-1].reason if notes else '-'}")


if __name__ == "__main__":
    main()
