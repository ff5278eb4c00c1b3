"""A training run in a process of its own, on one or several gloo ranks, that can be killed and resumed.

python tests/runs.py FOLDER OPTIONS_AS_JSON

It goes on from the newest complete checkpoint in the folder, if there is one. To ``trace-RANK.jsonl`` it writes the
step that it begins at, and a line for each batch that is done; at the end it writes ``done-RANK.pt``.
"""

from __future__ import annotations

import json
import logging
import os
import pickle
import sys
import time
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
import torch.distributed as dist
from pytorch_lightning.callbacks import ModelCheckpoint
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics import MeanMetric

from adaptive_batch.callbacks import AdaptiveBatchSize
from adaptive_batch.policies import Milestones, NoiseScale


def wave(m: Any) -> int:
    """Up and down, as a function of the updates made."""
    return (16, 7, 12, 24, 32, 9, 20)[m.update // 2 % 7]


POLICIES: dict[str, Callable[[], Any]] = {
    "constant": lambda: "constant",
    "milestones": lambda: Milestones({100: 24, 300: 12, 500: 40, 800: 16}, unit="samples"),
    "function": lambda: wave,
    "noise": lambda: NoiseScale(4.0),  # as it is measured, without quantising
    "goodput": lambda: "goodput",
}


def newest(folder: Path) -> Path | None:
    """The newest checkpoint that is complete; one that was being written when the run was killed is passed over."""
    for path in sorted(folder.glob("*.ckpt"), key=lambda path: path.stat().st_mtime_ns, reverse=True):
        try:
            torch.load(path, weights_only=True)
        except (RuntimeError, EOFError, OSError, pickle.UnpicklingError, zipfile.BadZipFile):
            continue
        return path
    return None


class Model(pl.LightningModule):
    def __init__(self, dropout: float) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Dropout(dropout), nn.Linear(16, 2))
        self.mean = MeanMetric()

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y, _ = batch
        loss = nn.functional.cross_entropy(self.net(x), y)
        self.mean.update(loss)
        self.log("loss", loss, on_step=True, on_epoch=True, sync_dist=True)
        self.log("mean", self.mean, on_step=False, on_epoch=True)
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", nn.functional.cross_entropy(self.net(batch[0]), batch[1]), sync_dist=True)

    def configure_optimizers(self) -> Any:
        torch.manual_seed(100 + self.global_rank)  # states that differ between ranks, and rank 0's is one rank's
        optimizer = torch.optim.SGD(self.parameters(), lr=0.05, momentum=0.9)
        total = int(self.trainer.estimated_stepping_batches)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=total)
        return [optimizer], [{"scheduler": schedule, "interval": "step"}]


class Trace(pl.Callback):
    """Writes what happens before a checkpoint of it is saved; ends the process, as a kill would, after some updates."""

    def __init__(self, folder: Path, stop_after: int | None, pause: float) -> None:
        self.folder, self.stop_after, self.pause = folder, stop_after, pause
        self.indices: list[int] = []
        self.lr = 0.0

    def on_train_start(self, trainer: pl.Trainer, *_: Any) -> None:
        self.file = (self.folder / f"trace-{trainer.global_rank}.jsonl").open("a", buffering=1)
        self.write(begins=trainer.global_step)

    def on_train_batch_start(self, trainer: pl.Trainer, module: Any, batch: Any, batch_idx: int) -> None:
        if trainer.global_step == self.stop_after:
            os._exit(9)
        self.indices = batch[2].tolist()

    def on_before_optimizer_step(self, trainer: pl.Trainer, module: Any, optimizer: Any) -> None:
        self.lr = optimizer.param_groups[0]["lr"]

    def on_train_batch_end(self, trainer: pl.Trainer, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        done = {"epoch": trainer.current_epoch, "step": trainer.global_step, "batch": batch_idx}
        self.write(**done, indices=self.indices, lr=self.lr, loss=float(outputs["loss"]))
        time.sleep(self.pause)

    def on_train_epoch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        metrics = {name: float(trainer.callback_metrics[name]) for name in ("mean", "loss_epoch")}
        self.write(epoch=trainer.current_epoch, step=trainer.global_step, **metrics)

    def write(self, **line: Any) -> None:
        self.file.write(json.dumps(line) + "\n")


def trace(folder: Path, rank: int = 0) -> list[dict[str, Any]]:
    """The lines that count: a run that goes on from a step takes back what was after it."""
    lines: list[dict[str, Any]] = []
    for text in (folder / f"trace-{rank}.jsonl").read_text().splitlines():
        line = json.loads(text)
        if "begins" in line:
            lines = [before for before in lines if before["step"] <= line["begins"]]
            # What belongs to a step's end is written again where the checkpoint came before it.
        elif line not in lines:
            lines.append(line)
    return lines


def main(folder: Path, options: dict[str, Any]) -> None:
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)
    world = int(os.environ.get("WORLD_SIZE", "1"))
    ckpt = newest(folder)
    pl.seed_everything(1 if ckpt is None else 2, verbose=False)
    samples, size = options.get("samples", 203), options.get("batch_size", 12)
    x = torch.randn(samples, 8, generator=torch.Generator().manual_seed(3))
    x[:, 0] += x[:, 0].sign()  # clear enough for the noise scale to be identified in a few updates
    data = TensorDataset(x, (x[:, 0] > 0).long(), torch.arange(samples))
    model = Model(options.get("dropout", 0.1))
    loader = DataLoader(data, max(1, size // world), shuffle=True, num_workers=options.get("workers", 0))
    callback = AdaptiveBatchSize(
        POLICIES[options["policy"]](), min_batch_size=4, max_batch_size=options.get("max_batch_size", 48),
        adjust_every=options.get("adjust_every", 3), micro_batch_size=None, verbose=False,
        lr_scaling=options.get("lr_scaling", "auto"), quantize=False if options["policy"] == "noise" else None,
    )  # fmt: skip
    saver = ModelCheckpoint(folder, "{step}", every_n_train_steps=options.get("save_every", 4), save_top_k=-1)
    writer = Trace(folder, options.get("stop_after"), options.get("pause", 0.0))
    trainer = pl.Trainer(
        accelerator="cpu", devices=world, strategy="ddp" if world > 1 else "auto", max_epochs=options.get("epochs", 4),
        logger=False, enable_progress_bar=False, enable_model_summary=False, val_check_interval=0.5,
        num_sanity_val_steps=0, callbacks=[writer, callback, saver],
    )  # fmt: skip
    trainer.fit(model, loader, DataLoader(data, 64), ckpt_path=ckpt, weights_only=True)
    torch.save(
        {
            "weights": {name: value.clone() for name, value in model.state_dict().items()},
            "batch_sizes": [update.batch_size for update in callback.history.updates],
            "changes": [(change.step, change.batch_size) for change in callback.history.changes],
            "measurements": callback.controller.noise.measurements,
            "global_step": trainer.global_step,
        },
        folder / f"done-{trainer.global_rank}.pt",
    )


def leave() -> None:
    """Take the process group down together: a rank whose threads outlive it may abort at its exit."""
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), json.loads(sys.argv[2]))
    leave()
