"""A training run on one or several gloo ranks; started by test_ranks.py, one process per rank.

python tests/ranks.py OUTPUT_FOLDER OPTIONS_AS_JSON
"""

from __future__ import annotations

import json
import logging
import os
import random
import sys
import warnings
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from adaptive_batch.callbacks import AdaptiveBatchSize


class Model(pl.LightningModule):
    def __init__(self, options: dict[str, Any]) -> None:
        super().__init__()
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

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y, _index = batch
        explosion: Any = self.options.get("explode")
        boom = explosion and self.trainer.global_rank == explosion["rank"] and self.passes == explosion["pass"]
        self.passes += 1
        if boom and not self.exploded and explosion["place"] == "forward":
            self.explode()
        hidden = self.net[:3](x)
        if boom and not self.exploded and explosion["place"] == "backward":
            hidden.register_hook(lambda gradient: self.explode())
        loss = nn.functional.cross_entropy(self.net[3](hidden), y)
        self.log("loss", loss, on_step=True, on_epoch=True, sync_dist=True)
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


def main(folder: Path, options: dict[str, Any]) -> None:
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)
    world = int(os.environ.get("WORLD_SIZE", "1"))
    pl.seed_everything(1, verbose=False)
    samples = options["samples"]
    x = torch.randn(samples, 8)
    data = TensorDataset(x, (x[:, 0] > 0).long(), torch.arange(samples))
    loader = DataLoader(
        data, options["batch_size"] // world, shuffle=True, drop_last=options.get("drop_last", False),
        num_workers=options.get("workers", 0),
    )  # fmt: skip
    rng = random.Random(int(os.environ.get("RANK", "0")))  # ranks that would disagree, were they not made to agree
    sizes = iter(options["sizes"])
    policy = options.get("policy") or (lambda m: next(sizes, m.batch_size) + 0.1 * rng.random())
    callback = AdaptiveBatchSize(
        policy,
        min_batch_size=2,
        max_batch_size=options.get("max_batch_size", 64),
        adjust_every=2,
        lr_scaling=options.get("lr_scaling", "linear"),
        micro_batch_size=options.get("micro_batch_size", "auto"),
        verbose=False,
    )
    model = Model(options)
    trainer = pl.Trainer(
        accelerator="cpu", devices=world, strategy=options.get("strategy", "ddp") if world > 1 else "auto",
        max_epochs=options.get("epochs", 2), logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, callbacks=[callback],
        accumulate_grad_batches=options.get("accumulate", 1),
    )  # fmt: skip
    trainer.fit(model, loader)
    torch.save(
        {
            "weights": {k: v for k, v in model.state_dict().items()},
            "indices": model.indices,
            "sizes": model.sizes,
            "lrs": model.lrs,
            "changes": [(c.step, c.batch_size) for c in callback.history.changes],
            "batch_sizes": [u.batch_size for u in callback.history.updates],
            "loss": float(trainer.callback_metrics["loss_epoch"]),
            "noise": [
                callback.controller.noise.grad_sq_norm,
                callback.controller.noise.grad_variance,
                callback.controller.noise.measurements,
            ],
            "exploded": model.exploded,
            "global_step": trainer.global_step,
        },
        folder / f"rank{trainer.global_rank}.pt",
    )


if __name__ == "__main__":
    main(Path(sys.argv[1]), json.loads(sys.argv[2]))
