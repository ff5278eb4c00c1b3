"""The best learning rate of each fixed batch size, by the samples to the target; times do not enter.

A plain training loop, on seeds that benchmarks/time_to_target.py does not use. What it prints is what
benchmarks/workloads.py holds.

    python benchmarks/tune_rates.py fashion [--sizes 32 128] [--around 0.02] [--decay]
"""

from __future__ import annotations

import argparse
import math
import statistics
from typing import Any

import torch
from workloads import WORKLOADS, Workload, batches

SEEDS = (1000, 1001)
SIZES = (32, 64, 128, 256, 512, 1024, 2048)


def samples_to_target(
    workload: Workload, data: Any, batch_size: int, lr: float, seed: int, *, horizon: int | None = None, most: float
) -> float:
    """Samples until the target is reached; infinite where it is not, within ``most`` samples."""
    x, y, val_x, val_y = data
    torch.manual_seed(seed)
    net = workload.net()
    optimizer = workload.optimizer(net.parameters(), lr)
    samples, checked, losses = 0, 0, []
    for picked in batches(len(y), batch_size, torch.Generator().manual_seed(seed)):
        if horizon is not None:
            optimizer.param_groups[0]["lr"] = lr * max(0.0, 1 - samples / horizon)
        optimizer.zero_grad()
        loss = workload.loss(net(x[picked]), y[picked])
        loss.backward()
        optimizer.step()
        samples += len(picked)
        if samples // workload.every > checked:
            checked = samples // workload.every
            with torch.no_grad():
                losses.append(float(workload.loss(net(val_x), val_y)))
            if not math.isfinite(losses[-1]) or samples > min(most, horizon or math.inf):
                return math.inf
            if len(losses) >= 3 and statistics.mean(losses[-3:]) <= workload.target:
                return samples
    raise AssertionError


def mean_samples(workload: Workload, data: Any, batch_size: int, lr: float, most: float, horizon: int | None) -> float:
    total = 0.0
    for seed in SEEDS:
        total += samples_to_target(workload, data, batch_size, lr, seed, horizon=horizon, most=most)
        if math.isinf(total):
            break
    return total / len(SEEDS)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("workload", choices=WORKLOADS)
    parser.add_argument("--sizes", type=int, nargs="*", default=SIZES)
    parser.add_argument("--around", type=float, help="rate from which the search for the first size starts")
    parser.add_argument("--decay", action="store_true", help="also the horizon of a linear decay to zero")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    workload = WORKLOADS[arguments.workload]
    data = workload.data()
    center = arguments.around or next(iter(workload.rates.values()))
    step = math.sqrt(2)
    for size in arguments.sizes:
        found: dict[int, float] = {}
        best, most = 0, float(workload.give_up)
        for exponent in (0, 1, 2, 3, 4, 5, 6, -1, -2, -3, -4):
            near = {exponent - 1, exponent + 1} & set(found)
            if near and all(found[k] > 1.3 * min(found.values()) for k in near):
                continue  # uphill
            found[exponent] = mean_samples(workload, data, size, center * step**exponent, 1.3 * most, None)
            if found[exponent] < most:
                best, most = exponent, found[exponent]
        center *= step**best
        table = {f"{center * step ** (k - best):.4g}": f"{v:.0f}" for k, v in sorted(found.items())}
        print(f"{arguments.workload} {size}: rate {center:.4g}, {most:.0f} samples   {table}", flush=True)
        if arguments.decay:
            for horizon in (0.5, 0.7, 1.0, 1.4):
                for factor in (1, step, 2, 2 * step):
                    n = int(horizon * most)
                    value = mean_samples(workload, data, size, center * factor, most, n)
                    print(f"  decay over {n}, rate {center * factor:.4g}: {value:.0f}", flush=True)


if __name__ == "__main__":
    main()
