"""What the callbacks cost per update, beside plain Lightning, as ratios in one run.

Each variant trains the same model on the same batches, in turn with plain Lightning; the figure is the median over
pairs of the ratio of their times per update. Nothing is resized: the size is held, so that only the cost shows.

    python benchmarks/overhead.py [--pairs 7] [--updates 600]
"""

from __future__ import annotations

import argparse
import logging
import statistics
import time
import warnings
from collections.abc import Callable
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from adaptive_batch.callbacks import AdaptiveBatchSize

BATCH_SIZE = 32


class Held(pl.LightningModule):
    """A classifier around a network."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch
        loss = nn.functional.cross_entropy(self.net(x), y)
        self.log("loss", loss)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.01, momentum=0.9)


class Transformer(nn.Module):
    """Two encoder layers over 64 positions."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(64, 128)
        layer = nn.TransformerEncoderLayer(128, 4, 256, dropout=0.0, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2)
        self.head = nn.Linear(128, 10)

    def forward(self, tokens: Tensor) -> Tensor:
        scores: Tensor = self.head(self.encoder(self.embed(tokens)).mean(1))
        return scores


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
    """Seconds of each update, from the end of one to the end of the next.

    Processor time of the one thread that works: other programs on the machine change it little.
    """

    def __init__(self) -> None:
        self.ends: list[float] = []

    def on_train_batch_end(self, *args: Any) -> None:
        self.ends.append(time.process_time())

    @property
    def mean(self) -> float:
        """Over the run, without its first tenth: costs that come now and then count with their share."""
        ends = self.ends[len(self.ends) // 10 :]
        return (ends[-1] - ends[0]) / (len(ends) - 1)


def hold(measurement: Any) -> float:
    """A policy that measures everything and keeps the size."""
    return float(measurement.batch_size)


hold.needs = frozenset({"noise", "step_time"})  # type: ignore[attr-defined]

VARIANTS: dict[str, Callable[[], list[pl.Callback]]] = {
    "guarded executor": lambda: [AdaptiveBatchSize("constant", verbose=False)],
    "all of it": lambda: [AdaptiveBatchSize(hold, verbose=False)],
}


def run(make: Callable[[], tuple[nn.Module, Tensor]], callbacks: list[pl.Callback], updates: int) -> float:
    torch.manual_seed(0)
    net, x = make()
    data = DataLoader(TensorDataset(x, torch.randint(0, 10, (len(x),))), BATCH_SIZE, shuffle=True)
    times = Times()
    trainer = pl.Trainer(
        max_steps=updates, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, callbacks=[*callbacks, times],
    )  # fmt: skip
    trainer.fit(Held(net), data)
    return times.mean


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=7)
    parser.add_argument("--updates", type=int, default=600)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)
    print(f"{'model':<13}{'variant':<20}{'plain':>10}{'ratio':>9}{'[min, max]':>18}{'more':>12}")
    for make, updates in ((mlp, 4), (cnn, 1), (transformer, 1)):
        for name, callbacks in VARIANTS.items():
            pairs = []
            for _ in range(arguments.pairs):
                plain = run(make, [], updates * arguments.updates)
                pairs.append((plain, run(make, callbacks(), updates * arguments.updates)))
            ratios = [b / a for a, b in pairs]
            plain = statistics.median(a for a, _ in pairs)
            more = statistics.median(b - a for a, b in pairs)
            print(
                f"{make.__name__:<13}{name:<20}{1e3 * plain:>7.2f} ms{statistics.median(ratios):>9.3f}"
                f"{f'[{min(ratios):.3f}, {max(ratios):.3f}]':>18}{1e6 * more:>9.0f} us",
                flush=True,
            )


if __name__ == "__main__":
    main()
