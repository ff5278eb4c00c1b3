"""The comparison of the first batch with its parts: what it lets pass, and what it names."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from lightning_problems import Classifier, fit, loader
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from adaptive_batch.callbacks import AdaptiveBatchSize, AutoMicroBatch


class Net(pl.LightningModule):
    def __init__(self, *layers: nn.Module, reduction: str = "mean") -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(8, 16), *layers, nn.Tanh(), nn.Linear(16, 2))
        self.reduction = reduction

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return nn.functional.cross_entropy(self.net(batch[0]), batch[1], reduction=self.reduction)

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.01)


class Contrastive(Net):
    """Each sample is told from the others of its batch."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        out = self.net(batch[0])
        return nn.functional.cross_entropy(out @ (out + batch[0][:, :2]).T, torch.arange(len(out)))


class Tokens(Net):
    """A mean over the samples that are not masked."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        targets = torch.where(batch[0][:, 1] < 0.5, -100, batch[1])
        return nn.functional.cross_entropy(self.net(batch[0]), targets, ignore_index=-100)


class Noisy(Net):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return super().training_step([batch[0] + torch.randn_like(batch[0]), batch[1]], batch_idx)


def rows(samples: int = 64, dtype: torch.dtype = torch.float32) -> DataLoader[Any]:
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(samples, 8, generator=generator).to(dtype)
    return DataLoader(TensorDataset(x, (x[:, 0] > 0).long()), batch_size=16)


def check(model: pl.LightningModule, data: Any = None, **kwargs: Any) -> None:
    options = {
        "micro_batch_size": "auto",
        **{k: v for k, v in kwargs.items() if k in ("weight_fn", "loss_reduction")},
    }
    trainer = {k: v for k, v in kwargs.items() if k not in options}
    fit(model, data or rows(), [AutoMicroBatch(self_check=True, **options)], max_epochs=1, **trainer)


@pytest.mark.parametrize("layer", [lambda: nn.Dropout(0.5), lambda: nn.LayerNorm(16), nn.Identity])
@pytest.mark.parametrize("precision", ["32-true", "64-true", "bf16-mixed"])
def test_what_decomposes_passes(layer: Callable[[], nn.Module], precision: str) -> None:
    double = precision == "64-true"
    check(Net(layer()), rows(dtype=torch.float64 if double else torch.float32), precision=precision)


def test_a_model_that_passes_is_trained_as_without_the_check() -> None:
    traces, ends = [], []
    for checks in (False, True):
        model = Classifier(dropout=0.5)
        fit(model, loader(), [AdaptiveBatchSize("constant", self_check=checks)])
        traces.append(model.logged)
        ends.append(list(model.parameters()))
    assert traces[0] == traces[1]
    assert all(torch.equal(a, b) for a, b in zip(*ends, strict=True))


@pytest.mark.filterwarnings("ignore:net.1 .BatchNorm1d. looks across the batch")
@pytest.mark.parametrize("more", [[], [nn.Dropout(0.5)]], ids=["alone", "beside dropout"])
def test_batch_norm_is_named(more: list[nn.Module]) -> None:
    with pytest.raises(
        ValueError, match=r"% of its norm, most in .*: net\.1 \(BatchNorm1d\) looks across the batch; use"
    ):
        check(Net(nn.BatchNorm1d(16), *more))


def test_a_contrastive_loss_is_told_from_wrong_weights() -> None:
    with pytest.raises(ValueError, match="compares the samples of a batch with each other"):
        check(Contrastive())


def test_a_mean_over_something_else_needs_weights_and_says_which() -> None:
    with pytest.raises(
        ValueError,
        match=r"whose parts count 0\.\d+ \+ 0\.\d+ here instead of 0\.688 \+ 0\.312; give weight_fn",
    ):
        check(Tokens())


def test_a_sum_and_a_mean_are_told_apart() -> None:
    with pytest.raises(ValueError, match='the loss is a sum over the samples; set loss_reduction="sum"'):
        check(Net(reduction="sum"))
    check(Net(reduction="sum"), loss_reduction="sum")
    with pytest.raises(ValueError, match='set loss_reduction="mean"'):
        check(Net(), loss_reduction="sum")


def test_the_parameter_that_changes_most_is_named() -> None:
    with pytest.raises(ValueError, match=r"changes by \d+\.\d% of its norm, most in net\.\d\.\w+ \(\d+\.\d%\), net"):
        check(Contrastive())


def test_a_step_that_draws_random_numbers_itself_cannot_be_compared() -> None:
    with pytest.warns(UserWarning, match="self_check could compare nothing: training_step draws random numbers"):
        check(Noisy())


def test_a_batch_that_does_not_fit_is_checked_on_fewer_samples() -> None:
    check(_limited(Net(), 6))
    with pytest.raises(ValueError, match=r"split into 3 \+ 1 samples.*whose parts count"):
        check(_limited(Tokens(), 6))


def _limited(model: Net, most: int) -> Net:
    step = model.training_step

    def limited(batch: Any, batch_idx: int) -> Tensor:
        if len(batch[1]) > most:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return step(batch, batch_idx)

    model.training_step = limited  # type: ignore[method-assign]
    return model
