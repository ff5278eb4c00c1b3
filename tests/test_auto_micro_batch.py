"""AutoMicroBatch: the user's own batch size, and never out of memory."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from lightning_problems import Classifier, Recorded, fit, loader
from torch import Tensor, nn
from torch.utils.data import DataLoader, DistributedSampler

from adaptive_batch import register_splitter
from adaptive_batch.callbacks import AdaptiveBatchSize, AutoMicroBatch


class Limited(Classifier):
    """A device on which no more than ``most`` samples fit."""

    def __init__(self, most: int, **kwargs: Any) -> None:
        super().__init__(dropout=0.0, **kwargs)
        self.most = most
        self.passes: list[int] = []

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        if len(batch[1]) > self.most:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        self.passes.append(len(batch[1]))
        return super().training_step(batch, batch_idx)


def weights(model: nn.Module) -> Tensor:
    return torch.cat([p.detach().flatten() for p in model.parameters()])


class Endless:
    """Not a DataLoader, and without a length."""

    def __iter__(self) -> Iterator[Any]:
        while True:
            yield torch.randn(12, 8), torch.randint(0, 2, (12,)), torch.zeros(12), torch.zeros(12)


@pytest.mark.parametrize("accumulate", [1, 3])
@pytest.mark.parametrize("scheduler", [None, "onecycle"])
def test_what_fits_is_trained_as_in_plain_lightning_bit_for_bit(accumulate: int, scheduler: str | None) -> None:
    runs = []
    for callbacks in ([], [AutoMicroBatch()]):
        model = Classifier(scheduler)
        made = fit(model, loader(), callbacks, accumulate_grad_batches=accumulate)
        runs.append((weights(model), model.loss_trace, model.logged, model.used_lr, made.global_step))
    assert torch.equal(runs[0][0], runs[1][0])
    assert runs[0][1:] == runs[1][1:]


def test_what_does_not_fit_is_trained_with_the_same_batches_in_parts() -> None:
    plain, limited = Classifier(dropout=0.0), Limited(5)
    fit(plain, loader())
    callback = AutoMicroBatch()
    made = fit(limited, loader(), [callback])
    assert limited.sizes == plain.sizes
    assert limited.used_lr == plain.used_lr
    torch.testing.assert_close(weights(limited), weights(plain), rtol=1e-5, atol=1e-6)
    assert limited.loss_trace == pytest.approx(plain.loss_trace, rel=1e-5)
    assert callback.failures == [
        "out of memory at a micro-batch of 16, at most 8 from here on",
        "out of memory at a micro-batch of 8, at most 4 from here on",
    ]
    assert max(limited.passes) == 4
    assert callback.micro_batch_size == 4
    assert made.callback_metrics["adaptive_batch/micro_batch_size"] == 4


def test_a_number_is_an_upper_bound() -> None:
    model = Limited(100)
    fit(model, loader(), [AutoMicroBatch(micro_batch_size=7)])
    assert max(model.passes) == 6  # 16 = 6 + 5 + 5


@pytest.mark.parametrize(
    "data",
    [
        Endless(),
        DataLoader([next(iter(Endless()))] * 5, batch_size=None),  # type: ignore[arg-type]
    ],
    ids=["an iterable", "a loader that does not batch"],
)
def test_data_that_cannot_be_resized_can_be_split(data: Any) -> None:
    class Own(Limited):
        def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
            self.sizes.append(len(batch[1]))  # seen whole

        def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
            pass

    model = Own(5)
    fit(model, data, [AutoMicroBatch()], max_epochs=1, limit_train_batches=5)
    assert model.sizes == [12] * 5
    assert max(model.passes) == 3


class Shared(list[Any]):
    """For all samples of a batch."""

    def __init__(self, value: Any) -> None:
        super().__init__([value])


register_splitter(Shared, lambda value, sizes: [value] * len(sizes))


@pytest.mark.filterwarnings("ignore:Trying to infer the `batch_size`")  # Lightning's, for self.log
def test_batch_size_of_says_how_many_samples_there_are() -> None:
    class Transposed(Limited):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return super().training_step([batch["x"], batch["y"], None, None], batch_idx)

        def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
            pass

        def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
            pass

    # Lightning would take the rows of the first tensor, the weights of two classes, for samples.
    row = {"x": torch.randn(12, 8), "y": torch.randint(0, 2, (12,))}
    data: DataLoader[Any] = DataLoader([{"weights": Shared(torch.ones(2)), **row}] * 4, batch_size=None)  # type: ignore[arg-type]
    model = Transposed(5)
    fit(model, data, [AutoMicroBatch(batch_size_of=lambda batch: len(batch["x"]))], max_epochs=1)
    assert max(model.passes) == 3


def test_what_was_learned_is_in_the_checkpoint(tmp_path: Path) -> None:
    made = fit(Limited(5), loader(), [AutoMicroBatch()], max_epochs=1)
    made.save_checkpoint(tmp_path / "run.ckpt")
    torch.load(tmp_path / "run.ckpt", weights_only=True)

    callback, model = AutoMicroBatch(), Limited(5)
    resumed = pl.Trainer(
        accelerator="cpu", max_epochs=2, logger=False, enable_progress_bar=False, enable_model_summary=False,
        enable_checkpointing=False, callbacks=[callback],
    )  # fmt: skip
    resumed.fit(model, loader(), ckpt_path=tmp_path / "run.ckpt")
    assert model.passes and max(model.passes) == 4
    assert callback.failures == []


def test_the_trainer_is_given_back_as_it_was() -> None:
    made = fit(Classifier(), loader(), [AutoMicroBatch()])
    assert "_make_closure" not in made.fit_loop.epoch_loop.automatic_optimization.__dict__


def test_a_sum_is_split_as_a_sum() -> None:
    class Sum(Limited):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return super().training_step(batch, batch_idx) * len(batch[1])

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), lr=0.005)

    whole, parts = Sum(100), Sum(5)
    fit(whole, loader())
    fit(parts, loader(), [AutoMicroBatch(loss_reduction="sum")])
    torch.testing.assert_close(weights(parts), weights(whole), rtol=1e-5, atol=1e-6)


class TestRefusals:
    @pytest.mark.parametrize(
        ("arguments", "error", "sentence"),
        [
            ({"micro_batch_size": None}, ValueError, "micro_batch_size=None would never split"),
            ({"micro_batch_size": 0}, ValueError, "micro_batch_size=0"),
            ({"micro_batch_size": True}, ValueError, "micro_batch_size=True"),
            ({"loss_reduction": "median"}, ValueError, "loss_reduction='median'"),
            ({"weight_fn": 3}, TypeError, "weight_fn=3 must be a function"),
            ({"batch_size_of": 3}, TypeError, "batch_size_of=3 must be a function"),
            ({"memory_budget": "a lot"}, ValueError, "memory_budget='a lot' is not a size"),
        ],
        ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
    )
    def test_a_bad_argument_is_one_clear_sentence(
        self, arguments: dict[str, Any], error: type[Exception], sentence: str
    ) -> None:
        with pytest.raises(error, match=sentence):
            AutoMicroBatch(**arguments)

    def test_it_is_not_needed_beside_adaptive_batch_size(self) -> None:
        with pytest.raises(ValueError, match="leave AutoMicroBatch out"):
            fit(Classifier(), loader(), [AdaptiveBatchSize(), AutoMicroBatch()])

    def test_manual_optimization_cannot_be_split(self) -> None:
        model = Classifier()
        model.automatic_optimization = False
        with pytest.raises(ValueError, match="AutoMicroBatch cannot split a batch whose backward pass"):
            fit(model, loader(), [AutoMicroBatch()])


class Plain(Classifier):
    """Trained by two ranks, the second of which has the smaller memory."""

    def __init__(self) -> None:
        super().__init__(dropout=0.0)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        if self.trainer.world_size > 1 and self.global_rank == 1 and len(batch[1]) > 5:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return super().training_step(batch, batch_idx)


def rank_main(folder: Path) -> None:
    torch.set_num_threads(1)
    model = Plain()
    callback = AutoMicroBatch(verbose=False)
    rank = int(os.environ.get("LOCAL_RANK", "0"))
    sampler: DistributedSampler[Any] = DistributedSampler(Recorded(192), num_replicas=2, rank=rank, shuffle=False)
    data = DataLoader(Recorded(192), 16, sampler=sampler)
    made = fit(model, data, [callback], devices=2, strategy="ddp", max_epochs=2)
    torch.save((weights(model), callback.failures), folder / f"{made.global_rank}.pt")


def test_ranks_of_which_one_runs_out_of_memory_train_as_one_process(tmp_path: Path) -> None:
    root = Path(__file__).parent.parent
    environment = {**os.environ, "PYTHONPATH": str(root)}
    done = subprocess.run(
        [sys.executable, __file__, str(tmp_path)],
        env=environment, cwd=root, capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    (first, none), (second, failures) = (torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1))
    assert len(failures) == 2 and none == []
    assert torch.equal(first, second)
    one = Plain()
    fit(one, loader(192, 32, shuffle=False), max_epochs=2)
    torch.testing.assert_close(first, weights(one), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("callback", [AdaptiveBatchSize, AutoMicroBatch, lambda: AdaptiveBatchSize(micro_batch_size=5)])
def test_a_batch_is_let_go_when_its_update_is_done_without_waiting_for_the_garbage_collector(callback: Any) -> None:
    class Counted(Classifier):
        def __init__(self) -> None:
            super().__init__()
            self.batches: list[weakref.ref[Tensor]] = []
            self.alive: list[int] = []

        def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
            super().on_train_batch_start(batch, batch_idx)
            self.batches.append(weakref.ref(batch[0]))
            self.alive.append(sum(one() is not None for one in self.batches))

    model = Counted()
    gc.disable()
    try:
        fit(model, loader(), [callback()], max_epochs=2)
    finally:
        gc.enable()
    assert max(model.alive) <= 2  # this one, and what Lightning still holds of the last


if __name__ == "__main__":
    rank_main(Path(sys.argv[1]))
