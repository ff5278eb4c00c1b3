"""Running out of memory, at every place of an update."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
import torchmetrics
from lightning_problems import Classifier, fit, loader
from torch import Tensor, nn

from adaptive_batch.callbacks import AdaptiveBatchSize

pytestmark = pytest.mark.filterwarnings("ignore:net.1 .BatchNorm1d. looks across the batch")

LIMIT = 8
SMALLER = 4


class Delicate(pl.LightningModule):
    """All that a failed attempt could spoil: statistics, masks, metrics, logs, momentum, generators."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(8, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(0.3), nn.Linear(16, 2))
        self.mean = torchmetrics.MeanMetric()
        self.total = torchmetrics.SumMetric()
        self.generator = torch.Generator().manual_seed(5)
        self.trace: list[dict[str, float]] = []
        self.hooks: list[str] = []
        self.lrs: list[float] = []

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y, _, _ = batch
        x = x + 0.1 * torch.randn(x.shape, generator=self.generator)
        x = x * (1 + 0.01 * random.random() + 0.01 * float(np.random.rand()))
        loss = nn.functional.cross_entropy(self.net(x), y)
        self.mean(loss.detach(), weight=len(y))
        self.total(len(y))
        self.log("loss", loss, on_step=True, on_epoch=True)
        self.log("largest", x.max(), on_step=True, on_epoch=True, reduce_fx="max")
        self.log("metric", self.mean, on_step=True, on_epoch=True)
        self.log("total", self.total, on_step=True, on_epoch=True)
        return loss

    def on_before_zero_grad(self, optimizer: Any) -> None:
        self.hooks.append("zero")

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        self.hooks.append("step")
        self.lrs.append(optimizer.param_groups[0]["lr"])

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        metrics = self.trainer.callback_metrics
        self.trace.append({k: float(v) for k, v in metrics.items() if not k.startswith("adaptive")})

    def on_train_epoch_end(self) -> None:
        self.trace.append({k: float(v) for k, v in self.trainer.callback_metrics.items() if "epoch" in k})

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.parameters(), lr=0.01)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))
        return [optimizer], [{"scheduler": schedule, "interval": "step"}]


class Bomb(pl.Callback):
    """Runs out of memory once, in the given pass of the given batch."""

    def __init__(self, batch: int, part: int, place: str, error: BaseException) -> None:
        self.batch, self.part, self.place, self.error = batch, part, place, error
        self.batches, self.forwards = -1, -1
        self.exploded = False

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        pl_module.net[-1].register_forward_hook(self._forward)

    def on_train_batch_start(self, *args: Any) -> None:
        self.batches, self.forwards = self.batches + 1, -1

    def _forward(self, module: nn.Module, inputs: Any, output: Tensor) -> None:
        self.forwards += 1
        if self.exploded or (self.batches, self.forwards) != (self.batch, self.part):
            return
        if self.place == "forward":
            self._explode()
        inputs[0].register_hook(lambda gradient: self._explode())

    def _explode(self) -> None:
        self.exploded = True
        raise self.error


class SplitFrom(pl.Callback):
    """The reference: splits smaller from the given batch on, without any failure."""

    def __init__(self, batch: int, callback: AdaptiveBatchSize) -> None:
        self.batch, self.callback, self.batches = batch, callback, -1

    def on_train_batch_start(self, *args: Any) -> None:
        self.batches += 1
        if self.batches == self.batch:
            self.callback._micro_batches.learned = SMALLER


def run(callbacks: list[Any], accumulate: int) -> Delicate:
    torch.manual_seed(0)
    model = Delicate()
    fit(
        model, loader(samples=75), callbacks, max_epochs=2, accumulate_grad_batches=accumulate, gradient_clip_val=0.5
    )  # fmt: skip
    return model


def adaptive() -> AdaptiveBatchSize:
    return AdaptiveBatchSize("constant", micro_batch_size=LIMIT)


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("place", ["forward", "backward"])
@pytest.mark.parametrize("part", [0, 1])
@pytest.mark.parametrize("batch", [0, 3, 6])
def test_a_run_goes_on_as_if_it_had_been_split_smaller_from_that_batch_on(
    batch: int, part: int, place: str, accumulate: int
) -> None:
    callback = adaptive()
    bomb = Bomb(batch, part, place, torch.OutOfMemoryError("CUDA out of memory."))
    failed = run([callback, bomb], accumulate)
    assert bomb.exploded

    reference_callback = adaptive()
    reference = run([reference_callback, SplitFrom(batch, reference_callback)], accumulate)
    for (name, a), b in zip(failed.state_dict().items(), reference.state_dict().values(), strict=True):
        assert torch.equal(a, b), name
    assert failed.trace == reference.trace
    assert failed.hooks == reference.hooks
    assert failed.lrs == reference.lrs
    assert torch.equal(failed.generator.get_state(), reference.generator.get_state())
    assert [u.micro_batch_size for u in callback.history.updates][-1] == SMALLER


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("HIP out of memory."),
        RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB"),
        RuntimeError("[enforce fail at alloc_cpu.cpp:75] . DefaultCPUAllocator: can't allocate memory"),
        RuntimeError("CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        MemoryError(),
    ],
    ids=lambda error: type(error).__name__,
)
def test_every_spelling_of_out_of_memory_is_survived(error: BaseException) -> None:
    bomb = Bomb(1, 0, "forward", error)
    model = run([adaptive(), bomb], 1)
    assert bomb.exploded
    assert len(model.lrs) == 10


def test_another_error_is_not_swallowed() -> None:
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        run([adaptive(), Bomb(1, 0, "forward", RuntimeError("mat1 and mat2 shapes cannot be multiplied"))], 1)


def test_a_sample_that_does_not_fit_is_a_clear_error() -> None:
    class Hungry(Classifier):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            raise torch.OutOfMemoryError("CUDA out of memory.")

    with pytest.raises(RuntimeError, match="a micro-batch of one sample does not fit into memory"):
        fit(Hungry(), loader(), [adaptive()])


def test_a_model_with_batch_norm_is_not_split_into_single_samples() -> None:
    class Hungry(Delicate):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            raise torch.OutOfMemoryError("CUDA out of memory.")

    with pytest.raises(RuntimeError, match=r"2 samples, the least that net.1 \(BatchNorm1d\) can take"):
        fit(Hungry(), loader(), [adaptive()])


def test_without_micro_batches_the_error_is_the_users() -> None:
    callback = AdaptiveBatchSize("constant", micro_batch_size=None)
    with pytest.raises(torch.OutOfMemoryError):
        run([callback, Bomb(1, 0, "forward", torch.OutOfMemoryError("CUDA out of memory."))], 1)


def test_the_history_says_what_was_learned() -> None:
    callback = adaptive()
    run([callback, Bomb(2, 0, "backward", torch.OutOfMemoryError("CUDA out of memory."))], 1)
    assert any("out of memory at a micro-batch of 8" in note.reason for note in callback.history.notes)


@pytest.mark.filterwarnings("default:net.1 .BatchNorm1d. looks across the batch")
def test_a_layer_that_looks_across_the_batch_is_named_once_at_the_start() -> None:
    with pytest.warns(UserWarning, match=r"net.1 \(BatchNorm1d\) looks across the batch") as caught:
        run([adaptive()], 1)
    assert len([w for w in caught if "looks across" in str(w.message)]) == 1


def test_the_guard_alone_changes_nothing() -> None:
    guarded, plain = run([AdaptiveBatchSize("constant")], 2), run([], 2)
    assert guarded.trace == plain.trace
    for a, b in zip(guarded.state_dict().values(), plain.state_dict().values(), strict=True):
        assert torch.equal(a, b)
