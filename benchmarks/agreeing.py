"""What it costs that ranks agree, per update on two gloo ranks, beside plain Lightning DDP, as ratios in one run.

Each variant trains the same model on the same batches, in turn with plain DDP; the figure is the median over pairs of
the ratio of their times per update, on the slower rank. Nothing is resized: the size is held.

    python benchmarks/agreeing.py [--pairs 7] [--updates 200]
"""

from __future__ import annotations

import argparse
import logging
import os
import statistics
import subprocess
import sys
import warnings
from collections.abc import Callable
from typing import Any

import pytorch_lightning as pl
import torch
import torch.distributed as dist
from overhead import Held, Times, cnn, hold, mlp
from torch.utils.data import DataLoader, TensorDataset

from adaptive_batch.callbacks import AdaptiveBatchSize

BATCH_SIZE = 16  # of each rank
RANKS = 2

VARIANTS: dict[str, Callable[[], list[pl.Callback]]] = {
    "plain again": lambda: [],
    "never split": lambda: [AdaptiveBatchSize("constant", micro_batch_size=None, verbose=False)],
    "ready to recover": lambda: [AdaptiveBatchSize("constant", verbose=False)],
    "all of it": lambda: [AdaptiveBatchSize(hold, verbose=False)],
}


def run(make: Callable[[], Any], callbacks: list[pl.Callback], updates: int) -> float:
    """Seconds of an update on the slower rank."""
    torch.manual_seed(0)
    net, x = make()
    data = DataLoader(TensorDataset(x, torch.randint(0, 10, (len(x),))), BATCH_SIZE, shuffle=True)
    times = Times()
    trainer = pl.Trainer(
        max_steps=updates, accelerator="cpu", devices=RANKS, strategy="ddp", logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, callbacks=[*callbacks, times],
    )  # fmt: skip
    trainer.fit(Held(net), data)
    slower = torch.tensor(times.mean)
    dist.all_reduce(slower, op=dist.ReduceOp.MAX)
    return float(slower)


def compare(pairs: int, updates: int) -> None:
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)
    first = os.environ["RANK"] == "0"
    if first:
        print(f"{'model':<8}{'variant':<20}{'plain DDP':>11}{'ratio':>9}{'[min, max]':>18}{'more':>12}")
    for make in (mlp, cnn):
        for name, callbacks in VARIANTS.items():
            measured = []
            for _ in range(pairs):
                plain = run(make, [], updates)
                measured.append((plain, run(make, callbacks(), updates)))
            ratios = [b / a for a, b in measured]
            plain = statistics.median(a for a, _ in measured)
            more = statistics.median(b - a for a, b in measured)
            if first:
                print(
                    f"{make.__name__:<8}{name:<20}{1e3 * plain:>8.2f} ms{statistics.median(ratios):>9.3f}"
                    f"{f'[{min(ratios):.3f}, {max(ratios):.3f}]':>18}{1e6 * more:>9.0f} us",
                    flush=True,
                )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=7)
    parser.add_argument("--updates", type=int, default=200)
    arguments = parser.parse_args()
    if "RANK" in os.environ:
        compare(arguments.pairs, arguments.updates)
        return
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={RANKS}"]
    subprocess.run([*torchrun, *sys.argv], check=True)


if __name__ == "__main__":
    main()
