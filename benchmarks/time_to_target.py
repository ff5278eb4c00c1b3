"""Training time to a target loss: fixed batch sizes beside AdaptiveBatchSize with many policies and rules.

Every run is a Lightning run on one thread, over data in memory, that starts with a batch of 32 (or is fixed at the
best size) at the learning rate tuned for that size (see benchmarks/workloads.py). Time counts training only; the
target is reached when the mean of the last three validation losses is. All runs of one seed follow each other, and
ratios are within one seed. Results go to a file as they come, so a campaign can be stopped and taken up again.

    python benchmarks/time_to_target.py [--workloads fashion flights diamonds] [--variants ...] [--seeds 5]
    python benchmarks/time_to_target.py --table
"""

from __future__ import annotations

import argparse
import json
import logging
import math
import statistics
import time
import warnings
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytorch_lightning as pl
import torch
from torch import Tensor
from torch.utils.data import DataLoader
from workloads import WORKLOADS, Rows, Workload, as_it_is
from workloads import adam as adam_of_workloads

from adaptive_batch import controller
from adaptive_batch.callbacks import AdaptiveBatchSize, _executor
from adaptive_batch.noise.schedule import Schedule
from adaptive_batch.policies import CriticalBatchWarmup, GeometricGrowth, LinearRamp, Milestones

START = 32


class Trained(pl.LightningModule):
    """An ordinary module around a workload's network."""

    def __init__(self, workload: Workload, lr: float, horizon: int | None) -> None:
        super().__init__()
        self.workload, self.lr, self.horizon = workload, lr, horizon
        self.net = workload.net()

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch
        return self.workload.loss(self.net(x), y)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        x, y = batch
        self.log("val_loss", self.workload.loss(self.net(x), y), batch_size=len(y))

    def configure_optimizers(self) -> Any:
        optimizer = self.workload.optimizer(self.parameters(), self.lr)
        horizon = self.horizon
        if horizon is None:
            return optimizer
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: max(0.0, 1 - step / horizon))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


class Target(pl.Callback):
    """Stops at the target, and keeps what it took to get there."""

    def __init__(self, workload: Workload) -> None:
        self.workload = workload
        self.samples = self.updates = 0
        self.seconds = 0.0
        self.losses: list[float] = []
        self.reached = False

    def on_train_epoch_start(self, *_: Any) -> None:
        self._started = time.perf_counter()

    def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.samples += len(batch[1])
        self.updates += 1

    def on_validation_start(self, *_: Any) -> None:
        self.seconds += time.perf_counter() - self._started

    def on_validation_end(self, trainer: Any, *_: Any) -> None:
        self.losses.append(float(trainer.callback_metrics["val_loss"]))
        recent = self.losses[-3:]
        self.reached = len(recent) == 3 and statistics.mean(recent) <= self.workload.target
        trainer.should_stop = self.reached or self.samples > self.workload.give_up or not math.isfinite(recent[-1])
        self._started = time.perf_counter()

    def on_train_epoch_end(self, trainer: Any, *_: Any) -> None:
        if not trainer.should_stop:
            self.seconds += time.perf_counter() - self._started


def train(
    workload: Workload,
    data: Any,
    seed: int,
    *,
    batch_size: int = START,
    lr: float | None = None,
    horizon: int | None = None,
    adaptive: AdaptiveBatchSize | None = None,
) -> dict[str, Any]:
    x, y, val_x, val_y = data
    target = Target(workload)
    torch.manual_seed(seed)
    updates = None if horizon is None else horizon // batch_size
    module = Trained(workload, workload.rates[batch_size] if lr is None else lr, updates)
    trainer = pl.Trainer(
        max_epochs=-1, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, num_sanity_val_steps=0, val_check_interval=workload.every / len(y),
        callbacks=[target] if adaptive is None else [adaptive, target],
    )  # fmt: skip
    validation = DataLoader(Rows(val_x, val_y), len(val_y), collate_fn=as_it_is)
    trainer.fit(module, workload.loader(x, y, batch_size), validation)
    result: dict[str, Any] = {
        "reached": target.reached, "seconds": target.seconds, "samples": target.samples, "updates": target.updates,
        "best": min(target.losses),
    }  # fmt: skip
    if adaptive is not None:
        result["changes"] = [f"{c.samples}: {c.reason}" for c in adaptive.history.changes]
        result["notes"] = [f"{c.samples}: {c.reason}" for c in adaptive.history.notes]
        result["final"] = adaptive.batch_size
    return result


def tuned(**arguments: Any) -> Callable[[], AdaptiveBatchSize]:
    return lambda: AdaptiveBatchSize(verbose=False, **arguments)


ADAPTIVE: dict[str, Callable[[], AdaptiveBatchSize]] = {
    "default": tuned(),
    **{f"goodput, {rule}": tuned(lr_scaling=rule) for rule in ("linear", "sqrt", "adascale", "adamscale", "none")},
    "goodput, sde": tuned(lr_scaling="sde", max_batch_size=9 * START),
    "goodput, by parts": tuned(noise="micro_batches"),
}
POLICIES: dict[str, Callable[[], AdaptiveBatchSize]] = {
    **{
        name: tuned(policy=name)
        for name in (
            "noise_scale", "norm_test", "inner_product_test", "big_batch", "cabs", "gradient_diversity",
            "loss_proportional", "plateau",
        )
    },
    "critical_batch_warmup": tuned(policy=CriticalBatchWarmup(lambda samples: samples / 100)),
    "milestones": tuned(policy=Milestones({10_000: 128, 40_000: 256}, unit="samples")),
    "linear_ramp": tuned(policy=LinearRamp(32, 512, 100_000)),
    "geometric_growth": tuned(policy=GeometricGrowth(2.0, every=20_000, unit="samples")),
}  # fmt: skip
WITH_DECAY: dict[str, Callable[[], AdaptiveBatchSize]] = {name: tuned(policy=name) for name in ("dont_decay", "seesaw")}
SETTINGS: dict[str, dict[str, Any]] = {
    "promise 2 %": {"MIN_PROMISE": 0.02},
    "promise 10 %": {"MIN_PROMISE": 0.1},
    "dwell 10": {"MIN_DWELL": 10},
    "dwell 40": {"MIN_DWELL": 40},
    "evidence 80 %": {"EVIDENCE": 0.8, "IDENTIFIED_AT": 0.8},
    "evidence 99 %": {"EVIDENCE": 0.99, "IDENTIFIED_AT": 0.99},
    "rate evidence 95 %": {"RATE_EVIDENCE": 0.95},
    "rate evidence 20 %": {"RATE_EVIDENCE": 0.2},
    "memory 1/64, 1/16": {"NOISE_MEMORY_FRACTIONS": (1 / 64, 1 / 16)},
    "memory 1/4, 1": {"NOISE_MEMORY_FRACTIONS": (1 / 4, 1.0)},
}
"""The default with other constants of ``adaptive_batch.controller``."""
NOISE_RATES: dict[str, dict[str, Any]] = {
    "noise rate 1/2": {"PARTS": Schedule(0, 1.5), "EXAMPLES": Schedule(8, 1.5)},
    "noise rate 2": {"PARTS": Schedule(0, 6), "EXAMPLES": Schedule(8, 6)},
}
"""The default with updates measured half and twice as often."""
CEILINGS: dict[str, Callable[[Workload, Any], int]] = {
    "ceiling 1/40": lambda workload, data: len(data[1]) // 40,
    "ceiling 1/3": lambda workload, data: len(data[1]) // 3,
}
RULES_OF_ADAM = ("goodput, adamscale", "goodput, sde")
NOT_OF_ADAM = ("rate evidence 95 %", "rate evidence 20 %")  # whose rule does not ask for the noise scale


def run(name: str, workload: Workload, data: Any, seed: int) -> dict[str, Any]:
    if name.startswith("fixed "):
        return train(workload, data, seed, batch_size=int(name.split()[1]))
    if name == "decay":
        size, lr, horizon = workload.decay
        return train(workload, data, seed, batch_size=size, lr=lr, horizon=horizon)
    if name in WITH_DECAY:
        return train(workload, data, seed, horizon=workload.decay[2], adaptive=WITH_DECAY[name]())
    if name in CEILINGS:
        return train(workload, data, seed, adaptive=tuned(max_batch_size=CEILINGS[name](workload, data))())
    if name in SETTINGS or name in NOISE_RATES:
        where, constants = (controller, SETTINGS[name]) if name in SETTINGS else (_executor, NOISE_RATES[name])
        with patch.multiple(where, **constants):
            return train(workload, data, seed, adaptive=ADAPTIVE["default"]())
    return train(workload, data, seed, adaptive={**ADAPTIVE, **POLICIES}[name]())


def best_size(workload: Workload, results: list[dict[str, Any]]) -> int:
    """Of the fixed sizes with a tuned rate, the one that took the least median time in ``results``."""
    seconds: dict[int, list[float]] = {}
    for result in results:
        if result["variant"].startswith("fixed "):
            size = int(result["variant"].split()[1])
            seconds.setdefault(size, []).append(result["seconds"] if result["reached"] else math.inf)
    return min(seconds, key=lambda size: statistics.median(seconds[size]))


def spread(values: list[float]) -> str:
    return f"{statistics.median(values):.2f} [{min(values):.2f}, {max(values):.2f}]"


def table(results: list[dict[str, Any]]) -> None:
    for workload in dict.fromkeys(result["workload"] for result in results):
        own = [result for result in results if result["workload"] == workload]
        best = best_size(WORKLOADS[workload], own)
        of = {(result["variant"], result["seed"]): result for result in own}
        print(f"{workload}: best fixed size {best}")
        print(
            f"  {'variant':<22}{'hits':>6}{'seconds':>9}{'updates':>9}{'samples':>10}   beside 32, beside the best size"
        )
        for variant in dict.fromkeys(result["variant"] for result in own):
            runs = [result for result in own if result["variant"] == variant]
            hits = [result for result in runs if result["reached"]]
            line = f"  {variant:<22}{len(hits):>3}/{len(runs):<2}"
            if hits:
                line += "".join(
                    f"{statistics.median(result[key] for result in hits):>{width}.{digits}f}"
                    for key, width, digits in (("seconds", 9, 2), ("updates", 9, 0), ("samples", 10, 0))
                )
                for base in (f"fixed {START}", f"fixed {best}"):
                    bases = [(of.get((base, result["seed"])), result) for result in hits]
                    ratios = [b["seconds"] / r["seconds"] for b, r in bases if b is not None and b["reached"]]
                    line += f"   {spread(ratios)}x" if ratios else "   -"
            print(line)


def wanted(arguments: argparse.Namespace, workload: Workload) -> Iterable[str]:
    chosen: list[str] | None = arguments.variants
    if chosen:
        return chosen
    adam = workload.optimizer is adam_of_workloads
    left_out = NOT_OF_ADAM if adam else RULES_OF_ADAM
    names = [
        *(f"fixed {size}" for size in workload.rates),
        "decay",
        *ADAPTIVE,
        *POLICIES,
        *WITH_DECAY,
        *SETTINGS,
        *NOISE_RATES,
        *CEILINGS,
    ]
    return [name for name in names if name not in left_out]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workloads", nargs="*", default=list(WORKLOADS), choices=WORKLOADS)
    parser.add_argument("--variants", nargs="*", help="all by default")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--results", type=Path, default=Path("time_to_target.jsonl"))
    parser.add_argument("--table", action="store_true", help="only print what the file has")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)
    lines = arguments.results.read_text().splitlines() if arguments.results.exists() else []
    results = [json.loads(line) for line in lines]
    done = {(result["workload"], result["variant"], result["seed"]) for result in results}
    for name in [] if arguments.table else arguments.workloads:
        workload = WORKLOADS[name]
        data = workload.data()
        train(replace(workload, give_up=0), data, 0)  # the first run of a process is slower
        for seed in range(arguments.seeds):
            for variant in wanted(arguments, workload):
                if (name, variant, seed) in done:
                    continue
                result = {"workload": name, "variant": variant, "seed": seed, **run(variant, workload, data, seed)}
                results.append(result)
                with arguments.results.open("a") as file:
                    file.write(json.dumps(result) + "\n")
                print(
                    f"{name} {seed} {variant}: {'' if result['reached'] else 'missed, '}{result['seconds']:.2f} s, "
                    f"{result['updates']} updates, {result['samples']} samples, {result.get('final', '')}",
                    flush=True,
                )
    table(results)


if __name__ == "__main__":
    main()
