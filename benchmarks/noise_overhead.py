"""What each source of the gradient noise costs per update, beside plain Lightning, as ratios in one run.

Within each run the monitor is taken away and brought back from one update to the next, and the medians of the
two kinds of updates are compared: with a monitor that never measures, and with one that always does. From the
two follows what a run of 1000 and of 10 000 updates pays that measures at the default rate: ``3 sqrt(u)`` of
``u`` updates, ``sqrt(u)`` by probes. Times are the processor's, on one thread.

    python benchmarks/noise_overhead.py [--runs 3] [--updates 200]
"""

from __future__ import annotations

import argparse
import logging
import math
import statistics
import time
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import pytorch_lightning as pl
import torch
from overhead import BATCH_SIZE, cnn, mlp
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset

from adaptive_batch.callbacks import GradientNoiseMonitor


class Model(pl.LightningModule):
    """A classifier around a network."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch
        return functional.cross_entropy(self.net(x), y)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=1e-4)


class Block(nn.Module):
    """Attention and a wide layer, all of layers that per-example hooks know."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.first, self.second = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.project = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.wide, self.narrow = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (part.unflatten(2, (4, -1)).transpose(1, 2) for part in self.qkv(self.first(x)).chunk(3, 2))
        attended = functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        x = x + self.project(attended)
        out: Tensor = x + self.narrow(functional.gelu(self.wide(self.second(x))))
        return out


class Transformer(nn.Module):
    """Two blocks over 64 positions."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(64, 128)
        self.blocks = nn.Sequential(Block(128), Block(128))
        self.head = nn.Linear(128, 10)

    def forward(self, tokens: Tensor) -> Tensor:
        out: Tensor = self.head(self.blocks(self.embed(tokens)).mean(1))
        return out


def transformer() -> tuple[nn.Module, Tensor]:
    return Transformer(), torch.randint(0, 64, (1024, 64))


class Switch(pl.Callback):
    """Takes the monitor away and brings it back every ``block`` updates, and times the updates of both kinds."""

    def __init__(self, monitor: pl.Callback, block: int, skip: int) -> None:
        self.monitor = monitor
        self.block = block
        self.left = skip
        self.steps = 0
        self.started = math.nan
        self.seconds: dict[bool, list[float]] = {True: [], False: []}

    def on_train_batch_end(self, trainer: pl.Trainer, *args: Any) -> None:
        if trainer.global_step == self.steps:
            return  # a batch within an update
        self.steps, now = trainer.global_step, time.process_time()
        if self.left > 0:
            self.left -= 1
        elif not math.isnan(self.started) and self.steps % self.block == 0:
            present = self.monitor in trainer.callbacks  # type: ignore[attr-defined]
            self.seconds[present].append((now - self.started) / self.block)
            others = [c for c in trainer.callbacks if c is not self.monitor]  # type: ignore[attr-defined]
            trainer.callbacks = others if present else [self.monitor, *others]  # type: ignore[attr-defined]
        if self.steps % self.block == 0:
            self.started = time.process_time()


class Variant(NamedTuple):
    """A source, the batches that an update of its runs is made of, and how often it measures."""

    source: str
    accumulate: int = 1
    rate: float = 3.0
    block: int = 1


VARIANTS = [
    Variant("micro_batches", accumulate=2),
    Variant("per_example"),
    Variant("norm_layers"),
    Variant("probe", rate=1.0),
    Variant("differenced"),
    Variant("adam_moments", block=41),  # two windows in a row, as every update is the same to it
]


def cost(
    make: Callable[[], tuple[nn.Module, Tensor]], variant: Variant, every: int, updates: int
) -> tuple[float, float]:
    """Seconds of a plain update, and the ratio of one beside the monitor to it."""
    torch.manual_seed(0)
    net, x = make()
    data = DataLoader(TensorDataset(x, torch.randint(0, 10, (len(x),))), BATCH_SIZE, shuffle=True)
    monitor = GradientNoiseMonitor(noise=variant.source, every=every)
    switch = Switch(monitor, variant.block, skip=updates // 10)
    trainer = pl.Trainer(
        max_steps=updates, accelerator="cpu", logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, accumulate_grad_batches=variant.accumulate,
        callbacks=[monitor, switch],
    )  # fmt: skip
    trainer.fit(Model(net), data)
    plain = statistics.median(switch.seconds[False])
    return plain, statistics.median(switch.seconds[True]) / plain


def compare(make: Callable[[], tuple[nn.Module, Tensor]], variant: Variant, runs: int, updates: int) -> None:
    """Print one line."""
    updates *= 4 if variant.block > 1 else 1
    idle = [cost(make, variant, 10**9, updates) for _ in range(runs)]
    busy = [cost(make, variant, 1, updates) for _ in range(runs)]
    waiting = statistics.median(ratio for _, ratio in idle) - 1
    measured = statistics.median(ratio for _, ratio in busy) - 1
    shares = [min(1.0, variant.rate / math.sqrt(u)) if variant.block == 1 else 1.0 for u in (1_000, 10_000)]
    amortised = [waiting + share * (measured - waiting) for share in shares]
    plain = statistics.median(seconds for seconds, _ in idle)
    print(
        f"{make.__name__:<13}{variant.source:<15}{1e3 * plain:>8.2f} ms{waiting:>9.1%}{measured:>11.1%}"
        f"{amortised[0]:>12.1%}{amortised[1]:>12.1%}",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--updates", type=int, default=200)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)
    print(f"{'model':<13}{'source':<15}{'plain':>11}{'waiting':>9}{'measured':>11}{'of 1000':>12}{'of 10 000':>12}")
    for make, updates in ((mlp, 5), (cnn, 1), (transformer, 1)):
        for variant in VARIANTS:
            if variant.source != "norm_layers" or make is transformer:
                compare(make, variant, arguments.runs, updates * arguments.updates)


if __name__ == "__main__":
    main()
