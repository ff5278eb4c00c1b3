"""Learning-rate rules under momentum: does a run reach its target, and in how many samples and updates.

Fashion-MNIST and the well-conditioned diamonds of benchmarks/workloads.py under SGD with several momenta, each from a
batch of 32 at the rate that is best there, as far as a step goes: the tuned rate of the workload times ``1 - m`` over
its own. The goodput policy decides about the size. No number depends on the machine's load, except through the sizes
that are chosen.

    python benchmarks/momentum_rules.py [--seeds 5]
"""

from __future__ import annotations

import argparse
import logging
import statistics
import warnings
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from time_to_target import START, train
from workloads import WORKLOADS

from adaptive_batch.callbacks import AdaptiveBatchSize

# Workload, momentum, Nesterov's or not, rate at a batch of 32.
CASES = (
    ("diamonds_log", 0.5, False, 0.14),
    ("diamonds_log", 0.8, False, 0.056),
    ("diamonds_log", 0.9, False, 0.028),
    ("diamonds_log", 0.9, True, 0.028),
    ("fashion", 0.8, False, 0.0282),
    ("fashion", 0.9, False, 0.0141),
    ("fashion", 0.9, True, 0.0141),
)
RULES = (None, "adascale", "linear", "auto")
GIVE_UP = 600_000


def described(results: list[dict[str, Any]]) -> str:
    hits = [result for result in results if result["reached"]]
    line = f"{len(hits)}/{len(results)}"
    if hits:
        samples, updates = (statistics.median(result[key] for result in hits) for key in ("samples", "updates"))
        line += f"   {samples:7.0f} samples {updates:5.0f} updates"
    return line


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)
    data = {name: WORKLOADS[name].data() for name in dict.fromkeys(case[0] for case in CASES)}
    for name, momentum, nesterov, lr in CASES:
        sgd = partial(torch.optim.SGD, momentum=momentum, nesterov=nesterov)
        workload = replace(WORKLOADS[name], optimizer=sgd, give_up=GIVE_UP)
        print(f"{name}, momentum {momentum}{', Nesterov' if nesterov else ''}, rate {lr}")
        for rule in RULES:
            results = []
            for seed in range(arguments.seeds):
                adaptive = None if rule is None else AdaptiveBatchSize(lr_scaling=rule, verbose=False)
                results.append(train(workload, data[name], seed, lr=lr, adaptive=adaptive))
            print(f"    {rule or f'fixed {START}':<10} {described(results)}", flush=True)


if __name__ == "__main__":
    main()
