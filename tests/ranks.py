"""A training run on one or several gloo ranks; started by test_ranks.py, one process per rank.

python tests/ranks.py OUTPUT_FOLDER OPTIONS_AS_JSON
"""

from __future__ import annotations

import json
import logging
import os
import random
import signal
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
import torch.distributed as dist
from pytorch_lightning.callbacks import ModelCheckpoint
from pytorch_lightning.strategies import DDPStrategy, FSDPStrategy, ModelParallelStrategy
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.tensor import DTensor
from torch.utils.data import BatchSampler, DataLoader, RandomSampler, TensorDataset

from adaptive_batch.callbacks import AdaptiveBatchSize, AutoMicroBatch
from adaptive_batch.callbacks._executor import _Passes


class CPUFSDP(FSDPStrategy):
    """Lightning's, which insists on a GPU, with torch's own wrapper told that there is none."""

    def _setup_model(self, model: nn.Module) -> nn.Module:
        return FullyShardedDataParallel(model, device_id=torch.device("cpu"), use_orig_params=True)


CAUGHT: list[warnings.WarningMessage] = []

STRATEGIES: dict[str, Callable[[], Any]] = {
    "static_graph": lambda: DDPStrategy(static_graph=True),
    "bucket_view": lambda: DDPStrategy(gradient_as_bucket_view=True),
    "short_timeout": lambda: DDPStrategy(timeout=timedelta(seconds=30)),
    "fsdp": CPUFSDP,
    "fsdp2": lambda: ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1),
    "tensor_parallel": lambda: ModelParallelStrategy(data_parallel_size=1, tensor_parallel_size=2),
}


class Rambling:
    """Proposes sizes of a list, and on each rank others."""

    def __init__(self, sizes: list[int]) -> None:
        self.sizes = list(sizes)

    def propose(self, measurement: Any) -> float:
        size = self.sizes.pop(0) if self.sizes else measurement.batch_size
        return size + 3.0 * (dist.get_rank() if dist.is_initialized() else 0)


class Model(pl.LightningModule):
    def __init__(self, options: dict[str, Any], folder: Path) -> None:
        super().__init__()
        self.folder = folder
        self.automatic_optimization = not options.get("manual")
        self.averaged = 0
        self.options = options
        width = 16
        norm = nn.BatchNorm1d(width) if options.get("batch_norm") else nn.Identity()
        self.net = nn.Sequential(nn.Linear(8, width), norm, nn.Tanh(), nn.Linear(width, 2))
        self.unused = nn.Linear(3, 3) if options.get("unused") else None
        self.indices: list[int] = []
        self.sizes: list[int] = []
        self.lrs: list[float] = []
        self.passes = 0
        self.exploded = False

    def configure_model(self) -> None:
        if self.options.get("strategy") == "fsdp2" and not isinstance(self.net[0].weight, DTensor):
            mesh: Any = self.device_mesh
            for part in (self.net[0], self.net[3]):
                fully_shard(part, mesh=mesh["data_parallel"])

    def on_train_start(self) -> None:
        if self.options.get("comm_hook"):  # which Lightning registers on GPUs only
            wrapped: Any = self.trainer.strategy.model
            wrapped.register_comm_hook(None, lambda state, bucket: self.average(bucket))

    def average(self, bucket: Any) -> Any:
        self.averaged += bucket.is_last()
        group: Any = dist.group.WORLD
        return allreduce_hook(group, bucket)

    def on_train_end(self) -> None:
        wrapped: Any = self.trainer.strategy.model
        sharded = isinstance(wrapped, FullyShardedDataParallel)
        with FullyShardedDataParallel.summon_full_params(wrapped) if sharded else nullcontext():
            weights = {name: whole(weight) for name, weight in self.state_dict().items()}
        callbacks: list[Any] = self.trainer.callbacks  # type: ignore[attr-defined]
        callback = next(c for c in callbacks if isinstance(c, AdaptiveBatchSize))
        noise = callback.controller.noise
        report = {
            "weights": weights,
            "indices": self.indices,
            "sizes": self.sizes,
            "lrs": self.lrs,
            "averaged": self.averaged,
            "changes": [(c.step, c.batch_size) for c in callback.history.changes],
            "batch_sizes": [u.batch_size for u in callback.history.updates],
            "loss": float(self.trainer.callback_metrics["loss_epoch"]),
            "noise": [noise.grad_sq_norm, noise.grad_variance, noise.measurements],
            "warnings": [str(warning.message) for warning in CAUGHT],
            "exploded": self.exploded,
            "global_step": self.trainer.global_step,
        }
        torch.save(report, self.folder / f"rank{self.trainer.global_rank}.pt")

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y, _index = batch
        explosion: Any = self.options.get("explode")
        boom = explosion and self.trainer.global_rank == explosion["rank"] and self.passes == explosion["pass"]
        self.passes += 1
        if boom and not self.exploded and explosion["place"] == "forward":
            self.explode()
        hidden = self.net[:3](x)
        fault: Any = self.options.get("fault")
        if fault and self.trainer.global_rank == 1 and self.passes == fault["pass"]:
            hidden.register_hook(lambda gradient: os.kill(os.getpid(), getattr(signal, fault["signal"])))
        if boom and not self.exploded and explosion["place"] == "backward":
            hidden.register_hook(lambda gradient: self.explode())
        losses = nn.functional.cross_entropy(self.net[3](hidden), y, reduction="none")
        weights = weigh(batch) if self.options.get("weighted") else torch.ones_like(losses)
        loss = (weights * losses).sum() / weights.sum()
        self.log("loss", loss, on_step=True, on_epoch=True, sync_dist=True)
        if not self.automatic_optimization:
            optimizer: Any = self.optimizers()
            optimizer.zero_grad()
            self.manual_backward(loss)
            optimizer.step()
        return loss

    def explode(self) -> None:
        if not self.exploded:
            self.exploded = True
            raise torch.OutOfMemoryError("CUDA out of memory.")

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        self.indices += batch[2].tolist()
        self.sizes.append(len(batch[2]))

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        self.lrs.append(optimizer.param_groups[0]["lr"])

    def configure_optimizers(self) -> Any:
        torch.manual_seed(100 + self.trainer.global_rank)  # states that differ, as they do in real runs
        optimizer = torch.optim.SGD(self.parameters(), lr=0.05, momentum=0.9)
        total = int(self.trainer.estimated_stepping_batches)
        return [optimizer], [
            {"scheduler": torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, total), "interval": "step"}
        ]


class Buckets:
    """Batches of a random number of indices, in an order that is drawn while they are read."""

    def __init__(self, samples: int, batch_size: int) -> None:
        self.samples, self.batch_size = samples, batch_size

    def __iter__(self) -> Iterator[list[int]]:
        left = list(range(self.samples))
        while left:
            random.shuffle(left)
            size = self.batch_size - int(torch.randint(0, 3, ()))
            size = size if len(left) - size >= 3 else len(left)
            yield left[:size]
            left = left[size:]


class Sampled(BatchSampler):
    """With an order of its own over the batches."""

    def __iter__(self) -> Iterator[list[int]]:
        batch = []
        for index in self.sampler:
            batch.append(index)
            if len(batch) >= self.batch_size:
                yield batch
                batch = []
        if batch:
            yield batch


def weigh(batch: Any) -> Tensor:
    """The samples count as much as their numbers say, from 1 to 3."""
    index: Tensor = batch[2]
    return 1 + index % 3


def whole(weight: Tensor) -> Tensor:
    return (weight.full_tensor() if isinstance(weight, DTensor) else weight).clone()


def pretend_seconds(per_sample: float) -> None:
    """Every pass takes so long on this rank, whatever the clock says."""
    run = _Passes.run

    def timed(self: Any, index: int, go: Callable[[], Any]) -> Any:
        result = run(self, index, go)
        self.seconds[-1] = per_sample * self.sizes[index]
        return result

    _Passes.run = timed  # type: ignore[method-assign, assignment]


def main(folder: Path, options: dict[str, Any]) -> None:
    torch.set_num_threads(1)
    logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)
    world = int(options.get("devices") or os.environ.get("WORLD_SIZE", "1"))
    pl.seed_everything(1, verbose=False)
    samples = options["samples"]
    x = torch.randn(samples, 8)
    data = TensorDataset(x, (x[:, 0] > 0).long(), torch.arange(samples))
    size, workers = options["batch_size"] // world, options.get("workers", 0)
    order: Any = options.get("order")
    if order == "buckets":
        loader = DataLoader(data, batch_sampler=Buckets(samples, size), num_workers=workers)
    elif order == "sampled":
        loader = DataLoader(data, batch_sampler=Sampled(RandomSampler(data), size, drop_last=False))
    else:
        drop_last = options.get("drop_last", False)
        loader = DataLoader(data, size, shuffle=True, drop_last=drop_last, num_workers=workers)
    if "seconds_per_sample" in options:
        pretend_seconds(options["seconds_per_sample"][int(os.environ.get("RANK", "0"))])
    policy = options.get("policy") or Rambling(options["sizes"])
    strategy = options.get("strategy", "ddp") if world > 1 else "auto"
    callback: Any = AdaptiveBatchSize(
        policy,
        min_batch_size=2,
        max_batch_size=options.get("max_batch_size", 64),
        adjust_every=2,
        lr_scaling=options.get("lr_scaling", "linear"),
        micro_batch_size=options.get("micro_batch_size", "auto"),
        verbose=False,
        weight_fn=(lambda part, batch: weigh(part).sum() / weigh(batch).sum()) if options.get("weighted") else None,
        batch_size_of=(lambda batch: int(weigh(batch).sum())) if options.get("weighted") else None,
        **options.get("callback", {}),
    )
    if "auto_micro_batch" in options:
        callback = AutoMicroBatch()
    model = Model(options, folder)
    callbacks = [callback]
    if "checkpoint" in options:
        callbacks.append(ModelCheckpoint(folder, "{step}", every_n_train_steps=options["checkpoint"], save_top_k=-1))
    trainer = pl.Trainer(
        accelerator="cpu", devices=world, strategy=STRATEGIES[strategy]() if strategy in STRATEGIES else strategy,
        max_epochs=options.get("epochs", 2), logger=False, enable_checkpointing="checkpoint" in options,
        enable_progress_bar=False, enable_model_summary=False, callbacks=callbacks,
        accumulate_grad_batches=options.get("accumulate", 1), sync_batchnorm=options.get("sync_batchnorm", False),
    )  # fmt: skip
    trainer.fit(model, loader, ckpt_path=options.get("resume"))


def leave() -> None:
    """Take the process group down together: a rank whose threads outlive it may abort at its exit."""
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()


if __name__ == "__main__":
    with warnings.catch_warnings(record=True) as CAUGHT:
        warnings.simplefilter("always")
        main(Path(sys.argv[1]), json.loads(sys.argv[2]))
        leave()
