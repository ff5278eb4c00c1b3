"""How well the largest micro-batch is predicted on a GPU, and what the guarded executor costs there.

For each model a batch that cannot fit is trained under a lowered per-process memory limit. Reported are the
largest micro-batch that the memory model proposes, the largest that truly runs (found by bisection under the
same limit, beside the same optimizer state), their ratio (goal: within 5 %), and the out-of-memory errors on
the way (goal: none with a budget). Then the time per update of a batch that fits, beside plain Lightning
(goal: at most 1 %).

    python benchmarks/memory_cuda.py [--limit-gib 4] [--updates 50] [--pairs 7]
"""

from __future__ import annotations

import argparse
import copy
import gc
import logging
import statistics
import time
import warnings
from collections.abc import Callable
from typing import Any

import pytorch_lightning as pl
import torch
from overhead import Held, Times, Transformer
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from adaptive_batch.callbacks import AutoMicroBatch
from adaptive_batch.memory import free_memory, is_out_of_memory

GIB = 1024**3
FITS = 256  # samples of a batch that needs no splitting


def mlp() -> tuple[nn.Module, Tensor]:
    layers = [layer for _ in range(8) for layer in (nn.Linear(2048, 2048), nn.ReLU())]
    return nn.Sequential(*layers, nn.Linear(2048, 10)), torch.randn(65536, 2048)


def cnn() -> tuple[nn.Module, Tensor]:
    net = nn.Sequential(
        nn.Conv2d(3, 64, 3), nn.ReLU(), nn.Conv2d(64, 128, 3, 2), nn.ReLU(),
        nn.Conv2d(128, 128, 3, 2), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(128, 10),
    )  # fmt: skip
    return net, torch.randn(16384, 3, 64, 64)


def transformer() -> tuple[nn.Module, Tensor]:
    return Transformer(), torch.randint(0, 64, (32768, 64))


def data(x: Tensor, batch_size: int, updates: int) -> DataLoader[Any]:
    rows = torch.arange(updates * batch_size) % len(x)
    y = torch.randint(0, 10, (len(x),))
    sampler = torch.utils.data.BatchSampler(rows.tolist(), batch_size, drop_last=False)
    return DataLoader(TensorDataset(x, y), sampler=sampler, batch_size=None)


def fit(net: nn.Module, loader: DataLoader[Any], callbacks: list[pl.Callback]) -> pl.Trainer:
    trainer = pl.Trainer(
        max_epochs=1, accelerator="gpu", devices=1, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, callbacks=callbacks,
    )  # fmt: skip
    trainer.fit(Held(net), loader)
    return trainer


def largest_that_runs(net: nn.Module, x: Tensor, held: int) -> int:
    """Bisection, with gradients in place and beside as many bytes as training holds."""
    net = copy.deepcopy(net).cuda()
    x, y = x.cuda(), torch.zeros(len(x), dtype=torch.long, device="cuda")

    def runs(n: int) -> bool:
        try:
            nn.functional.cross_entropy(net(x[:n]), y[:n]).backward()
            torch.cuda.synchronize()
            return True
        except Exception as error:
            if not is_out_of_memory(error):
                raise
        free_memory("cuda")
        return False

    runs(1)
    missing = held - torch.cuda.memory_allocated()
    ballast = torch.empty(max(0, missing), dtype=torch.uint8, device="cuda")
    low, high = 1, len(x) + 1
    while high - low > max(1, low // 200):
        middle = (low + high) // 2
        free_memory("cuda")
        low, high = (middle, high) if runs(middle) else (low, middle)
    del ballast
    return low


def predict(make: Callable[[], tuple[nn.Module, Tensor]], limit: int, updates: int) -> None:
    torch.manual_seed(0)
    net, x = make()
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction(limit / total)
    try:
        for name, budget in (("budget given", limit), ("device limit", None)):
            callback = AutoMicroBatch(memory_budget=budget, verbose=False)
            fit(copy.deepcopy(net), data(x, len(x), updates), [callback])
            proposed, held = callback.limit.of(len(x)), callback.limit.held
            free_memory("cuda")
            true = largest_that_runs(net, x, held)
            free_memory("cuda")
            print(
                f"{make.__name__:<13}{name:<14}{proposed:>10}{true:>10}{proposed / true:>9.3f}"
                f"{len(callback.failures):>9}",
                flush=True,
            )
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)


def seconds(net: nn.Module, x: Tensor, callbacks: list[pl.Callback], updates: int) -> float:
    times = Times()
    gc.collect()
    torch.cuda.synchronize()
    started = time.perf_counter()
    fit(copy.deepcopy(net), data(x, FITS, updates), [*callbacks, times])
    torch.cuda.synchronize()
    assert time.perf_counter() > started
    return times.mean


def cost(make: Callable[[], tuple[nn.Module, Tensor]], updates: int, pairs: int) -> None:
    torch.manual_seed(0)
    net, x = make()
    x = x[: 8 * FITS]
    ratios, more = [], []
    for _ in range(pairs):
        plain = seconds(net, x, [], updates)
        guarded = seconds(net, x, [AutoMicroBatch(verbose=False)], updates)
        ratios.append(guarded / plain)
        more.append(guarded - plain)
    ratio, spread = statistics.median(ratios), f"[{min(ratios):.3f}, {max(ratios):.3f}]"
    print(f"{make.__name__:<13}{ratio:>9.3f}{spread:>18}{1e6 * statistics.median(more):>9.0f} us")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--limit-gib", type=float, default=4.0)
    parser.add_argument("--updates", type=int, default=50)
    parser.add_argument("--pairs", type=int, default=7)
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("this benchmark needs a GPU.")
    warnings.filterwarnings("ignore")
    logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)
    print(f"{'model':<13}{'bound':<14}{'proposed':>10}{'true':>10}{'ratio':>9}{'errors':>9}")
    for make in (mlp, cnn, transformer):
        predict(make, int(arguments.limit_gib * GIB), updates=4)
    print(f"\n{'model':<13}{'ratio':>9}{'[min, max]':>18}{'more':>12}")
    for make in (mlp, cnn, transformer):
        cost(make, arguments.updates, arguments.pairs)


if __name__ == "__main__":
    main()
