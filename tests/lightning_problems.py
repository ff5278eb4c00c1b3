"""Small real models, data and trainers that the Lightning tests share."""

from __future__ import annotations

import os
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

SAMPLES = 203


class Recorded(Dataset[tuple[Tensor, Tensor, Tensor, int]]):
    """Random two-class data whose items say which they are and which process made them."""

    def __init__(self, samples: int = SAMPLES) -> None:
        generator = torch.Generator().manual_seed(7)
        self.x = torch.randn(samples, 8, generator=generator)
        self.y = (self.x[:, 0] > 0).long()

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor, Tensor, int]:
        return self.x[index], self.y[index], torch.tensor(index), os.getpid()


class Classifier(pl.LightningModule):
    """A small network with dropout that records what each update saw and used."""

    def __init__(self, scheduler: str | None = None, optimizer: str = "sgd", dropout: float = 0.2) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Dropout(dropout), nn.Linear(16, 2))
        self.scheduler, self.optimizer = scheduler, optimizer
        self.epochs: list[list[int]] = []
        self.sizes: list[int] = []
        self.pids: set[int] = set()
        self.used_lr: list[float] = []
        self.scheduled_lr: list[float] = []
        self.loss_trace: list[float] = []
        self.logged: list[dict[str, float]] = []
        self.last_batches: list[bool] = []
        self.validated_at: list[int] = []

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y, _, _ = batch
        loss = nn.functional.cross_entropy(self.net(x), y)
        self.log("loss", loss, on_step=True, on_epoch=True)
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        x, y, _, _ = batch
        self.log("val_loss", nn.functional.cross_entropy(self.net(x), y))

    def on_validation_start(self) -> None:
        if not self.trainer.sanity_checking:
            self.validated_at.append(sum(map(len, self.epochs)))

    def on_train_epoch_start(self) -> None:
        self.epochs.append([])

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        self.epochs[-1] += batch[2].tolist()
        self.sizes.append(len(batch[2]))
        self.pids |= set(batch[3].tolist())
        self.scheduled_lr.append(self.trainer.optimizers[0].param_groups[0]["lr"])

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        self.used_lr.append(optimizer.param_groups[0]["lr"])

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.loss_trace.append(float(outputs["loss"]))
        self.logged.append({k: float(v) for k, v in self.trainer.callback_metrics.items() if "loss" in k})
        self.last_batches.append(self.trainer.is_last_batch)

    def configure_optimizers(self) -> Any:
        if self.optimizer == "adam":
            optimizer: torch.optim.Optimizer = torch.optim.Adam(self.parameters(), lr=0.01)
        else:
            optimizer = torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)
        if self.scheduler is None:
            return optimizer
        total = int(self.trainer.estimated_stepping_batches)
        schedulers = {
            "onecycle": lambda: torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.2, total_steps=total),
            "cosine": lambda: torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, total),
            "lambda": lambda: torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0 / (1 + step)),
        }
        return [optimizer], [{"scheduler": schedulers[self.scheduler](), "interval": "step"}]


def loader(samples: int = SAMPLES, batch_size: int = 16, **kwargs: Any) -> DataLoader[Any]:
    """A shuffling loader of :class:`Recorded` data."""
    kwargs.setdefault("shuffle", True)
    return DataLoader(Recorded(samples), batch_size=batch_size, **kwargs)


def trainer(callbacks: Any = (), **kwargs: Any) -> pl.Trainer:
    """A quiet trainer on the CPU."""
    options: dict[str, Any] = {
        "accelerator": "cpu",
        "devices": 1,
        "max_epochs": 2,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "num_sanity_val_steps": 0,
    }
    return pl.Trainer(callbacks=list(callbacks), **{**options, **kwargs})


def fit(
    model: pl.LightningModule, data: Any, callbacks: Any = (), *, val: Any = None, ckpt_path: Any = None, **kwargs: Any
) -> pl.Trainer:
    """Seed, train, return the trainer."""
    pl.seed_everything(3, verbose=False)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                nn.init.kaiming_uniform_(parameter)
            else:
                parameter.zero_()
    made = trainer(callbacks, **kwargs)
    made.fit(model, data, val, ckpt_path=ckpt_path)
    return made
