"""What each source of the gradient noise costs per update, beside plain Lightning, as ratios in one run.

Every second update of a run is measured, and its time compared with that of its neighbours; runs alternate with
plain ones, which gives the cost of a monitor that only waits. From the two follows what a run pays that measures
at the default rate: ``3 sqrt(u)`` of ``u`` updates, ``sqrt(u)`` by probes. Times are the processor's, on one
thread, so that other work on the machine does not count.

    python benchmarks/noise_overhead.py [--pairs 5] [--updates 200]
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
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset

from adaptive_batch.callbacks import GradientNoiseMonitor

BATCH_SIZE = 32


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


def mlp() -> tuple[nn.Module, Tensor]:
    return nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 10)), torch.randn(4096, 64)


def cnn() -> tuple[nn.Module, Tensor]:
    net = nn.Sequential(
        nn.Conv2d(3, 32, 3), nn.ReLU(), nn.Conv2d(32, 64, 3, 2), nn.ReLU(), nn.Conv2d(64, 64, 3, 2), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10),
    )  # fmt: skip
    return net, torch.randn(1024, 3, 32, 32)


def transformer() -> tuple[nn.Module, Tensor]:
    return Transformer(), torch.randint(0, 64, (1024, 64))


class Times(pl.Callback):
    """Seconds of each update, from the end of one to the end of the next."""

    def __init__(self) -> None:
        self.ends: list[float] = []
        self.steps = 0

    def on_train_batch_end(self, trainer: pl.Trainer, *args: Any) -> None:
        if trainer.global_step > self.steps:
            self.steps = trainer.global_step
            self.ends.append(time.process_time())

    @property
    def seconds(self) -> list[float]:
        """Of the second update and those after it."""
        return [after - before for before, after in zip(self.ends, self.ends[1:], strict=False)]


class Variant(NamedTuple):
    """A source, and the batches that an update of its runs is made of."""

    source: str
    accumulate: int = 1
    rate: float = 3.0


VARIANTS = [
    Variant("micro_batches", accumulate=2),
    Variant("per_example"),
    Variant("norm_layers"),
    Variant("probe", rate=1.0),
    Variant("differenced"),
    Variant("adam_moments"),
]


def run(
    make: Callable[[], tuple[nn.Module, Tensor]], updates: int, accumulate: int, *callbacks: pl.Callback
) -> list[float]:
    """Seconds of the updates of one run, the first ones left out."""
    torch.manual_seed(0)
    net, x = make()
    data = DataLoader(TensorDataset(x, torch.randint(0, 10, (len(x),))), BATCH_SIZE, shuffle=True)
    times = Times()
    trainer = pl.Trainer(
        max_steps=updates, accelerator="cpu", logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, accumulate_grad_batches=accumulate,
        callbacks=[*callbacks, times],
    )  # fmt: skip
    trainer.fit(Model(net), data)
    return times.seconds[updates // 10 :]


def compare(make: Callable[[], tuple[nn.Module, Tensor]], variant: Variant, pairs: int, updates: int) -> None:
    """Print one line."""
    waiting, measured = [], []
    for _ in range(pairs):
        plain = run(make, updates, variant.accumulate)
        idle = GradientNoiseMonitor(noise=variant.source, every=10**9)
        waiting.append(statistics.median(run(make, updates, variant.accumulate, idle)) / statistics.median(plain))
        seen = run(make, updates, variant.accumulate, GradientNoiseMonitor(noise=variant.source, every=2))
        # Recorded from the second update on: of those after a tenth of the run, which are measured?
        odd, even = statistics.median(seen[::2]), statistics.median(seen[1::2])
        measured.append(max(odd, even) / min(odd, even))
    wait, cost = statistics.median(waiting) - 1, statistics.median(measured) - 1
    if variant.source == "adam_moments":
        amortised = [f"{wait:.1%}"] * 2  # every update is the same to it
        cost = math.nan
    else:
        amortised = [f"{wait + cost * variant.rate / math.sqrt(u):.1%}" for u in (1_000, 10_000)]
    print(
        f"{make.__name__:<13}{variant.source:<15}{1e3 * statistics.median(plain):>8.2f} ms{wait:>9.1%}"
        f"{cost:>11.0%}{amortised[0]:>14}{amortised[1]:>14}",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--updates", type=int, default=200)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)
    print(f"{'model':<13}{'source':<15}{'plain':>11}{'waiting':>9}{'measured':>11}{'of 1000':>14}{'of 10 000':>14}")
    for make, updates in ((mlp, 5), (cnn, 1), (transformer, 1)):
        for variant in VARIANTS:
            if variant.source != "norm_layers" or make is transformer:
                compare(make, variant, arguments.pairs, updates * arguments.updates)


if __name__ == "__main__":
    main()
