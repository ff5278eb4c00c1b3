"""A run that is resumed from a checkpoint repeats the uninterrupted one bit for bit."""

from __future__ import annotations

import copy
import logging
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from lightning_problems import Classifier, Recorded, fit, loader, trainer
from pytorch_lightning.callbacks import ModelCheckpoint
from pytorch_lightning.strategies import SingleDeviceStrategy
from torch import Tensor, nn
from torch.utils.data import DataLoader, DistributedSampler, IterableDataset, TensorDataset
from torchmetrics import MeanMetric

from adaptive_batch.callbacks import AdaptiveBatchSize
from adaptive_batch.policies import Milestones

pytestmark = pytest.mark.filterwarnings(
    "ignore:This DataLoader will create .* worker",
    "ignore:The dirpath has changed",
)

SAMPLES = 103


class Batch(NamedTuple):
    """What one batch was trained on, and how."""

    step: int
    epoch: int
    batch_idx: int
    indices: list[int]
    lr: float
    loss: float


class Model(pl.LightningModule):
    """Dropout, numbers from NumPy and Python, momentum, a scheduler, validation, epoch metrics."""

    def __init__(self, scheduler: str = "cosine") -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(8, 16), nn.LayerNorm(16), nn.ReLU(), nn.Dropout(0.2), nn.Linear(16, 2))
        self.mean = MeanMetric()
        self.scheduler = scheduler
        self.trace: list[Batch] = []
        self.validations: list[tuple[int, float]] = []
        self.epochs: list[dict[str, float]] = []
        self.used_lr = 0.0
        self.indices: list[int] = []

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y, _, _ = batch
        noise = 0.01 * random.random() + 0.01 * float(np.random.random())
        loss = nn.functional.cross_entropy(self.net(x + noise), y)
        self.mean.update(loss)
        self.log("loss", loss, on_step=True, on_epoch=True)
        self.log("largest", loss, on_step=False, on_epoch=True, reduce_fx="max")
        self.log("mean", self.mean, on_step=False, on_epoch=True)
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        x, y, _, _ = batch
        self.log("val_loss", nn.functional.cross_entropy(self.net(x), y))

    def on_validation_epoch_end(self) -> None:
        self.validations.append((self.trainer.global_step, float(self.trainer.callback_metrics["val_loss"])))

    def on_train_epoch_start(self) -> None:
        torch.rand(1)  # as augmentation that is chosen once per epoch

    def on_train_epoch_end(self) -> None:
        self.epochs.append({k: float(self.trainer.callback_metrics[k]) for k in ("loss_epoch", "largest", "mean")})

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        self.indices = batch[2].tolist()

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        self.used_lr = optimizer.param_groups[0]["lr"]

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        step, epoch = self.trainer.global_step, self.trainer.current_epoch
        self.trace.append(Batch(step, epoch, batch_idx, self.indices, self.used_lr, float(outputs["loss"])))
        self.used_lr = 0.0  # a batch that makes no update uses none

    def configure_optimizers(self) -> Any:
        optimizer: Any = torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)
        if self.scheduler == "adam":
            return torch.optim.Adam(self.parameters(), lr=0.01)
        if self.scheduler == "plateau":
            plateau = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, factor=0.5, patience=0, threshold=0.5)
            return [optimizer], [{"scheduler": plateau, "monitor": "val_loss"}]
        total = int(self.trainer.estimated_stepping_batches) if self.scheduler == "cosine" else 40
        if self.scheduler == "lambda":
            schedule: Any = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / total)
        else:
            schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, total)
        return [optimizer], [{"scheduler": schedule, "interval": "step"}]


def up_and_down() -> Callable[[Any], int]:
    """A policy that is a function of the updates made."""
    sizes = [16, 7, 12, 24, 32, 9, 20]
    return lambda m: sizes[m.update // 2 % len(sizes)]


class Run(NamedTuple):
    model: Model
    callback: AdaptiveBatchSize
    trainer: pl.Trainer

    @property
    def weights(self) -> list[Tensor]:
        return [value.clone() for value in self.model.state_dict().values()]


def train(
    folder: Path,
    ckpt: Path | None = None,
    *,
    data: Callable[[], DataLoader[Any]] | None = None,
    policy: Any = None,
    scheduler: str = "cosine",
    callback: dict[str, Any] | None = None,
    plugin: bool = True,
    looks: bool = False,
    **options: Any,
) -> Run:
    """One run that saves a checkpoint at every step and at each epoch's end, or goes on from one."""
    pl.seed_everything(3 if ckpt is None else 77, verbose=False)
    if "strategy" in options:
        options |= {"strategy": options["strategy"](), "accelerator": "auto"}
    model = Model(scheduler)
    adaptive = AdaptiveBatchSize(
        up_and_down() if policy is None else policy() if callable(policy) else policy,
        **{"min_batch_size": 4, "max_batch_size": 40, "adjust_every": 2, "lr_scaling": "linear",
           "micro_batch_size": None, "verbose": False,
           **(callback or {})},
    )  # fmt: skip
    savers = [
        ModelCheckpoint(folder, "{step}", every_n_train_steps=1, save_top_k=-1),
        ModelCheckpoint(folder, "end-{epoch}", every_n_epochs=1, save_top_k=-1, save_on_train_epoch_end=True),
        ModelCheckpoint(folder, "val-{step}", monitor="val_loss", save_top_k=-1, save_on_train_epoch_end=False),
    ]
    made = trainer(
        [*savers, *([adaptive] if plugin else []), *([Looks(adaptive)] if looks else [])],
        **{"enable_checkpointing": True, "max_epochs": 3, **options},
    )
    train_loader = loader(SAMPLES, 8) if data is None else data()
    made.fit(model, train_loader, loader(20, 10, shuffle=False), ckpt_path=ckpt, weights_only=True)
    return Run(model, adaptive, made)


def assert_repeats(whole: Run, resumed: Run, ckpt: Path) -> None:
    saved = torch.load(ckpt, weights_only=True)
    progress = saved["loops"]["fit_loop"]["epoch_loop.batch_progress"]
    done = progress["total"]["ready"]
    assert resumed.model.trace == whole.model.trace[done:], ckpt.name
    assert all(map(torch.equal, resumed.weights, whole.weights)), ckpt.name
    left = len(resumed.model.validations)
    assert resumed.model.validations == whole.model.validations[len(whole.model.validations) - left :], ckpt.name
    due = [v for v in whole.model.validations if v[0] > saved["global_step"]]
    assert left >= len(due), ckpt.name
    ends = len(resumed.model.epochs)
    assert resumed.model.epochs == whole.model.epochs[len(whole.model.epochs) - ends :], ckpt.name
    assert ends == len(whole.model.epochs) - ("end-" in ckpt.name) - saved["epoch"], ckpt.name
    ours, theirs = resumed.callback.history, whole.callback.history
    assert ours.changes == theirs.changes, ckpt.name
    assert ours.column("batch_size") == theirs.column("batch_size"), ckpt.name
    assert resumed.trainer.global_step == whole.trainer.global_step
    assert resumed.trainer.current_epoch == whole.trainer.current_epoch


def checkpoints(folder: Path, some: int | None) -> list[Path]:
    """All, or some that are spread over the run: inside epochs, at their last batches, ends and validations."""
    found = sorted(folder.glob("*.ckpt"), key=lambda path: path.stat().st_mtime_ns)
    return found if some is None else random.Random(1).sample(found, some)


def assert_any_checkpoint_repeats(folder: Path, *, some: int | None, **options: Any) -> Run:
    whole = train(folder / "whole", **options)
    assert len(whole.callback.history.changes) > 5
    seen = [index for batch in whole.model.trace for index in batch.indices if batch.epoch == 1]
    assert len(set(seen)) == len(seen) > 0.8 * SAMPLES
    for ckpt in checkpoints(folder / "whole", some):
        assert_repeats(whole, train(folder / "resumed", ckpt, **options), ckpt)
    return whole


def stateful(**options: Any) -> DataLoader[Any]:
    """torchdata's loader, which has a state of its own."""
    kind: Any = pytest.importorskip("torchdata.stateful_dataloader").StatefulDataLoader
    data: DataLoader[Any] = kind(Recorded(SAMPLES), batch_size=8, shuffle=True, **options)
    return data


SETUPS: dict[str, dict[str, Any]] = {
    "cosine": {"scheduler": "cosine"},
    "a schedule in a closure": {"scheduler": "lambda", "val_check_interval": 0.4},
    "plateau": {"scheduler": "plateau", "val_check_interval": 0.4},
    "max_steps": {"max_epochs": -1, "max_steps": 25},
    "accumulation": {"accumulate_grad_batches": 3, "val_check_interval": 0.4},
    "validation by batches": {"val_check_interval": 5, "check_val_every_n_epoch": None},
    "clock gain": {"callback": {"schedule_clock": "gain", "lr_scaling": "adascale"}},
    "clock updates": {"callback": {"schedule_clock": "updates"}, "scheduler": "fixed"},
    "half-life betas": {"callback": {"lr_scaling": "auto"}, "scheduler": "adam"},
    "drop_last": {"data": lambda: loader(SAMPLES, 8, drop_last=True)},
    "workers": {"data": lambda: loader(SAMPLES, 8, num_workers=1)},
    "persistent workers": {"data": lambda: loader(SAMPLES, 8, num_workers=2, persistent_workers=True)},
    "generator": {"data": lambda: loader(SAMPLES, 8, generator=torch.Generator().manual_seed(5))},
    "generator, workers": {
        "data": lambda: loader(SAMPLES, 8, generator=torch.Generator().manual_seed(5), num_workers=2)
    },
    "seed": {"callback": {"seed": 11}},
    "stateful loader": {"data": stateful},
    "stateful loader, workers": {"data": lambda: stateful(num_workers=2)},
    "distributed sampler": {
        "data": lambda: loader(SAMPLES, 8, shuffle=False, sampler=DistributedSampler(Recorded(SAMPLES), 1, 0))
    },
}


@pytest.mark.parametrize("setup", SETUPS)
def test_a_run_resumed_from_a_checkpoint_repeats_the_uninterrupted_one(tmp_path: Path, setup: str) -> None:
    assert_any_checkpoint_repeats(tmp_path, some=2, **SETUPS[setup])


@pytest.mark.filterwarnings("ignore:get_state and legacy can only be used")  # Lightning asks for it so
@pytest.mark.parametrize("kind", [np.random.PCG64, np.random.SFC64])
def test_a_run_under_another_generator_of_numpys_repeats_and_needs_the_same_one(tmp_path: Path, kind: Any) -> None:
    before = np.random.get_bit_generator()  # type: ignore[attr-defined]  # numpy's stubs leave it out

    def train_under(folder: Path, ckpt: Path | None = None, *, generator: Any = kind) -> Run:
        def data() -> DataLoader[Any]:
            np.random.set_bit_generator(generator(5))  # type: ignore[attr-defined]
            return loader(SAMPLES, 8)

        try:
            return train(folder, ckpt, data=data)
        finally:
            np.random.set_bit_generator(before)  # type: ignore[attr-defined]

    whole = train_under(tmp_path / "whole")
    for ckpt in checkpoints(tmp_path / "whole", 2):
        assert_repeats(whole, train_under(tmp_path / "resumed", ckpt), ckpt)
    with pytest.raises(ValueError, match=f"made with NumPy's global {kind.__name__}.* MT19937; call np.random.set_bit"):
        train_under(tmp_path / "refused", ckpt, generator=np.random.MT19937)


@pytest.mark.slow
@pytest.mark.parametrize("setup", SETUPS)
def test_a_run_resumed_from_any_checkpoint_repeats_the_uninterrupted_one(tmp_path: Path, setup: str) -> None:
    assert_any_checkpoint_repeats(tmp_path, some=None, **SETUPS[setup])


def seen_in(run: Run, epoch: int) -> list[int]:
    return [index for batch in run.model.trace for index in batch.indices if batch.epoch == epoch]


def test_lightning_does_not_warn_that_the_loader_cannot_be_resumed(tmp_path: Path, recwarn: Any) -> None:
    train(tmp_path / "whole", max_epochs=1)
    train(tmp_path / "resumed", tmp_path / "whole" / "step=4.ckpt", max_epochs=1)
    assert not [w for w in recwarn if "not resumable" in str(w.message)]


class TestWithAndWithoutTheCallback:
    @pytest.mark.filterwarnings(
        "ignore:Be aware that when using `ckpt_path`", "ignore:You're resuming from a checkpoint that ended before"
    )
    def test_a_checkpoint_made_with_the_callback_loads_without_it(self, tmp_path: Path) -> None:
        train(tmp_path / "with", max_epochs=2)
        for name in ("step=4.ckpt", "end-epoch=0.ckpt"):
            resumed = train(tmp_path / "without", tmp_path / "with" / name, plugin=False, max_epochs=2)
            assert resumed.trainer.current_epoch == 2
            assert sorted(seen_in(resumed, 1)) == list(range(SAMPLES))

    @pytest.mark.parametrize("shuffle", [False, True])
    @pytest.mark.parametrize("workers", [0, 1])
    def test_a_checkpoint_made_without_the_callback_loads_with_it(
        self, tmp_path: Path, shuffle: bool, workers: int, caplog: pytest.LogCaptureFixture
    ) -> None:
        def data() -> DataLoader[Any]:
            return loader(SAMPLES, 8, shuffle=shuffle, num_workers=workers)

        train(tmp_path / "without", plugin=False, max_epochs=2, data=data)
        saved = tmp_path / "without" / "step=4.ckpt"
        with caplog.at_level(logging.INFO, "pytorch_lightning.adaptive_batch"):
            resumed = train(tmp_path / "with", saved, max_epochs=2, data=data, callback={"verbose": True})
        (message,) = [record.message for record in caplog.records if "without AdaptiveBatchSize" in record.message]
        assert "the loader's own, 8" in message and "after 32 samples" in message
        assert len(resumed.callback.history.changes) > 2
        assert resumed.callback.controller.reference_batch_size == 8
        assert len(set(seen_in(resumed, 0))) == SAMPLES - 32
        assert shuffle or seen_in(resumed, 0) == list(range(32, SAMPLES))
        assert sorted(seen_in(resumed, 1)) == list(range(SAMPLES))
        assert resumed.trainer.current_epoch == 2
        assert len(resumed.model.validations) == 2
        (scheduler,) = resumed.trainer.lr_scheduler_configs
        assert scheduler.scheduler.last_epoch == 26  # twice the 13 updates of a plain epoch

    @pytest.mark.parametrize("name", ["step=13.ckpt", "end-epoch=0.ckpt"])
    def test_an_epoch_that_ended_without_the_callback_is_over(self, tmp_path: Path, name: str) -> None:
        train(tmp_path / "without", plugin=False, max_epochs=2)
        resumed = train(tmp_path / "with", tmp_path / "without" / name, max_epochs=2)
        assert seen_in(resumed, 0) == []
        assert sorted(seen_in(resumed, 1)) == list(range(SAMPLES))


class TestOtherArguments:
    @pytest.mark.parametrize("before", [None, "plateau"])
    @pytest.mark.parametrize("policy", ["plateau", "loss_proportional", "dont_decay"])
    def test_a_policy_with_a_memory_begins_anew_in_a_run_of_another(
        self, tmp_path: Path, policy: str, before: str | None
    ) -> None:
        train(tmp_path / "before", max_epochs=1, policy=before)
        resumed = train(
            tmp_path / "after", tmp_path / "before" / "step=4.ckpt", policy=policy, callback={"lr_scaling": "auto"}
        )
        assert sorted(seen_in(resumed, 2)) == list(range(SAMPLES))

    @pytest.mark.parametrize("clocks", [("samples", "gain"), ("gain", "samples")])
    def test_another_schedule_clock_goes_on_where_the_schedule_is(self, tmp_path: Path, clocks: Any) -> None:
        before = train(tmp_path / "before", max_epochs=1, policy="constant", callback={"schedule_clock": clocks[0]})
        saved = tmp_path / "before" / "step=4.ckpt"
        after = train(
            tmp_path / "after", saved, max_epochs=1, policy="constant", callback={"schedule_clock": clocks[1]}
        )
        steps = [made.trainer.lr_scheduler_configs[0].scheduler.last_epoch for made in (before, after)]
        assert steps == [13, 13]

    def test_another_seed_is_refused_inside_an_epoch(self, tmp_path: Path) -> None:
        train(tmp_path / "before", max_epochs=2)
        with pytest.raises(ValueError, match="seed=5 gives the samples another order than the checkpoint's seed=None"):
            train(tmp_path / "after", tmp_path / "before" / "step=4.ckpt", callback={"seed": 5})
        resumed = train(tmp_path / "after", tmp_path / "before" / "end-epoch=0.ckpt", callback={"seed": 5})
        assert sorted(seen_in(resumed, 1)) == list(range(SAMPLES))


class Breaks(pl.Callback):
    """Raises in the middle of a batch."""

    def __init__(self, hook: str, batch: int) -> None:
        self.batch = batch
        setattr(self, hook, self.explode)

    def explode(self, trainer: pl.Trainer, *_: Any) -> None:
        if trainer.fit_loop.epoch_loop.batch_idx == self.batch:
            raise RuntimeError("stop")


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("hook", ["on_train_batch_start", "on_before_backward", "on_after_backward"])
def test_a_batch_that_an_exception_interrupts_comes_again(tmp_path: Path, hook: str, workers: int) -> None:
    def run(ckpt: Path | None, *callbacks: Any) -> Model:
        pl.seed_everything(3, verbose=False)
        model = Model()
        adaptive = AdaptiveBatchSize(up_and_down(), max_batch_size=40, micro_batch_size=None, verbose=False)
        saver = ModelCheckpoint(tmp_path, "broken", save_top_k=0, save_on_exception=True)
        made = trainer([adaptive, saver, *callbacks], enable_checkpointing=True, max_epochs=1)
        made.fit(model, loader(SAMPLES, 8, num_workers=workers), ckpt_path=ckpt, weights_only=True)
        return model

    broken = Breaks(hook, 3)
    with pytest.raises(RuntimeError, match="stop"):
        run(None, broken)
    saved = torch.load(tmp_path / "broken.ckpt", weights_only=True)
    resumed = run(tmp_path / "broken.ckpt")
    consumed = saved["callbacks"]["AdaptiveBatchSize"]["sampler"]["consumed"]
    indices = [index for batch in resumed.trace for index in batch.indices]
    assert len(set(indices)) == len(indices) == SAMPLES - consumed
    assert resumed.trace[0].batch_idx == 3


class Late(SingleDeviceStrategy):
    """Restores callbacks after the set-up, as FSDP and DeepSpeed do."""

    restore_checkpoint_after_setup = True

    def __init__(self) -> None:
        super().__init__("cpu")


@pytest.mark.parametrize("workers", [0, 1])
def test_strategies_that_restore_late_go_on_alike(tmp_path: Path, workers: int) -> None:
    assert_any_checkpoint_repeats(tmp_path, some=2, strategy=Late, data=lambda: loader(SAMPLES, 8, num_workers=workers))


def test_an_iterable_data_set_says_that_it_begins_anew(tmp_path: Path) -> None:
    class Stream(IterableDataset[Any]):
        def __iter__(self) -> Any:
            return iter(Recorded(SAMPLES))

    def data() -> DataLoader[Any]:
        return DataLoader(Stream(), batch_size=8)

    whole = train(tmp_path / "whole", data=data, scheduler="fixed")
    with pytest.warns(UserWarning, match="IterableDataset begins anew when a run is resumed inside an epoch"):
        resumed = train(tmp_path / "inside", tmp_path / "whole" / "step=4.ckpt", data=data, scheduler="fixed")
    assert resumed.callback.history.changes[:1] == whole.callback.history.changes[:1]
    ckpt = tmp_path / "whole" / "end-epoch=0.ckpt"
    assert_repeats(whole, train(tmp_path / "ends", ckpt, data=data, scheduler="fixed"), ckpt)


class Looks(pl.Callback):
    """Takes the callback's state when the loop goes on, before the first batch reaches it."""

    def __init__(self, adaptive: AdaptiveBatchSize) -> None:
        self.adaptive = adaptive
        self.state: dict[str, Any] = {}

    def on_train_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        transfer = module.on_before_batch_transfer

        def look(batch: Any, dataloader_idx: int) -> Any:
            if trainer.training and not self.state:
                self.state = copy.deepcopy(self.adaptive.state_dict())
            return transfer(batch, dataloader_idx)

        module.__dict__["on_before_batch_transfer"] = look


def test_under_goodput_the_restored_state_is_the_saved_one(tmp_path: Path) -> None:
    options: dict[str, Any] = {"policy": "goodput", "scheduler": "fixed", "callback": {"noise": "probe"}}
    train(tmp_path / "whole", **options)
    ckpt = tmp_path / "whole" / "step=17.ckpt"
    saved = torch.load(ckpt, weights_only=True)["callbacks"]["AdaptiveBatchSize"]
    assert saved["controller"]["pending"]
    resumed = train(tmp_path / "resumed", ckpt, looks=True, **options)
    callbacks: list[Any] = resumed.trainer.callbacks  # type: ignore[attr-defined]
    (looks,) = [callback for callback in callbacks if isinstance(callback, Looks)]
    for state in (saved, looks.state):
        state["sampler"].pop("in_flight")  # the batch that is on its way
        state.pop("validation_follows")
        state["ranks"][0].pop("callback_metrics")
    assert plain(looks.state) == plain(saved)


def plain(value: Any) -> Any:
    """Comparable, with NaN equal to NaN."""
    if isinstance(value, Tensor):
        return plain(value.tolist())
    if isinstance(value, dict):
        return {key: plain(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(entry) for entry in value]
    return repr(value)


def test_a_dry_run_that_goes_on_from_a_resized_one_is_at_the_loaders_own_size(tmp_path: Path) -> None:
    callback = AdaptiveBatchSize(Milestones({3: 20}, unit="updates"), adjust_every=1, lr_scaling="linear", seed=0)
    made = fit(Classifier(), loader(), [callback], max_epochs=1)
    assert callback.batch_size == 20
    made.save_checkpoint(tmp_path / "resized.ckpt")
    dry = AdaptiveBatchSize(lambda m: 20, adjust_every=1, lr_scaling="linear", seed=0, dry_run=True)
    model = Classifier()
    fit(model, loader(), [dry], max_epochs=2, ckpt_path=tmp_path / "resized.ckpt")
    assert model.sizes == [16] * 12 + [203 - 12 * 16]
    assert set(dry.history.column("lr_scale")[-13:]) == {1.0}


@pytest.mark.parametrize("options", [{}, {"val_check_interval": 0.25}])
def test_the_metrics_of_a_validation_that_a_checkpoint_follows_start_from_nothing(
    tmp_path: Path, options: dict[str, Any]
) -> None:
    class Validated(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net, self.mean = nn.Linear(8, 2), MeanMetric()
            self.found: list[tuple[int, float, int]] = []

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return nn.functional.cross_entropy(self.net(batch[0]), batch[1])

        def validation_step(self, batch: Any, batch_idx: int) -> None:
            self.mean(nn.functional.cross_entropy(self.net(batch[0]), batch[1]))
            self.log("mean", self.mean)

        def on_validation_end(self) -> None:
            count = int(self.mean._update_count)
            self.found.append((self.global_step, float(self.trainer.callback_metrics["mean"]), count))

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), lr=0.1)

    def run(checkpoint: Any = None) -> list[tuple[int, float, int]]:
        pl.seed_everything(0, verbose=False)
        model = Validated()
        x = torch.randn(SAMPLES, 8)
        data = TensorDataset(x, (x[:, 0] > 0).long())
        saves = ModelCheckpoint(
            tmp_path, save_top_k=-1, monitor="mean", filename="{step}", save_on_train_epoch_end=False
        )
        made = pl.Trainer(
            max_epochs=3, accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False,
            callbacks=[AdaptiveBatchSize("constant"), saves], num_sanity_val_steps=0, **options,
        )  # fmt: skip
        training = DataLoader(data, 8, shuffle=True)
        made.fit(model, training, DataLoader(data, 32), ckpt_path=checkpoint, weights_only=False)
        return model.found

    found = run()
    assert {count for _, _, count in found} == {4}
    for step, _, _ in found[:-1]:
        assert run(tmp_path / f"step={step}.ckpt") == [entry for entry in found if entry[0] > step]
