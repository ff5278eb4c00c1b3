"""What each Trainer option and each scheduler means while the batches grow and shrink in mid-epoch."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Callable
from datetime import timedelta
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from lightning_problems import SAMPLES, Classifier, fit, loader, trainer
from pytorch_lightning.callbacks import BatchSizeFinder, ModelCheckpoint, ProgressBar, RichProgressBar, TQDMProgressBar
from pytorch_lightning.loggers.logger import Logger
from torch import Tensor
from torch.optim import lr_scheduler
from torch.utils.data import DataLoader

from adaptive_batch.callbacks import AdaptiveBatchSize, AutoMicroBatch, GradientNoiseMonitor, MemoryMonitor
from adaptive_batch.clocks import PlainEpoch, SampleClock

B0 = 16
BATCHES = math.ceil(SAMPLES / B0)


def resizing(seed: int = 1, low: int = 4, high: int = 60, **kwargs: Any) -> AdaptiveBatchSize:
    rng = random.Random(seed)
    options: dict[str, Any] = {
        "min_batch_size": low,
        "max_batch_size": high,
        "adjust_every": 1,
        "verbose": False,
    }
    return AdaptiveBatchSize(lambda measurement: rng.randint(low, high), **{**options, **kwargs})


def val() -> DataLoader[Any]:
    return loader(batch_size=50, shuffle=False)


def train(*watchers: pl.Callback, model: Classifier | None = None, **options: Any) -> Classifier:
    """A run that grows and shrinks; the epochs must have the samples and ends that they should."""
    model = model or Classifier("lambda")
    callback = resizing(**options.pop("callback", {}))
    data = options.pop("data", None) or loader(num_workers=options.pop("workers", 0))
    fit(model, data, [callback, *watchers], val=val(), **options)
    changes = [change.batch_size - change.previous for change in callback.history.changes]
    assert min(changes) < 0 < max(changes), "the test is vacuous unless batches grow and shrink"
    return model


def batches_per_epoch(model: Classifier) -> list[int]:
    ends = [-1, *(i for i, last in enumerate(model.last_batches) if last)]
    return [b - a for a, b in pairwise(ends)]


def epoch_samples(model: Classifier) -> list[int]:
    return [len(epoch) for epoch in model.epochs]


class Watch(pl.Callback):
    """What the Trainer says of itself after each batch."""

    def __init__(self) -> None:
        self.batches: list[tuple[int, float]] = []
        self.epoch_ends: list[int] = []
        self.steps = 0

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.batches.append((batch_idx, trainer.num_training_batches))

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        self.epoch_ends.append(trainer.global_step)


class TestTheLoop:
    @pytest.mark.parametrize("workers", [0, 2])
    def test_epoch_ends_and_is_last_batch(self, workers: int) -> None:
        watch = Watch()
        model = train(watch, max_epochs=3, workers=workers)
        assert epoch_samples(model) == [SAMPLES] * 3
        counts = batches_per_epoch(model)
        assert len(counts) == 3
        assert sum(counts) == len(model.sizes)
        assert watch.epoch_ends == [sum(counts[: i + 1]) for i in range(3)]

    @pytest.mark.parametrize("workers", [0, 2])
    def test_num_training_batches(self, workers: int) -> None:
        watch = Watch()
        model = train(watch, max_epochs=3, workers=workers)
        told = iter(watch.batches)
        for count in batches_per_epoch(model):
            said = [next(told) for _ in range(count)]
            assert [index for index, _ in said] == list(range(count))
            assert all(total > index + 1 for index, total in said[:-1])
            assert said[-1][1] == count
        assert len({total for _, total in watch.batches}) > 3

    @pytest.mark.parametrize("make", [TQDMProgressBar, RichProgressBar], ids=["tqdm", "rich"])
    @pytest.mark.filterwarnings("ignore:install .* for Jupyter support")
    def test_progress_bar_totals(self, make: Callable[[], ProgressBar]) -> None:
        seen: list[tuple[int, float | None, float, bool]] = []

        class Look(pl.Callback):
            def on_train_batch_end(
                self, trainer: pl.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
            ) -> None:
                total = total_of(trainer.progress_bar_callback)
                seen.append((batch_idx, total, trainer.num_training_batches, trainer.is_last_batch))

        train(Look(), make(), max_epochs=3, enable_progress_bar=True)
        assert all(total == batches for _, total, batches, _ in seen)
        assert all(total == index + 1 for index, total, _, last in seen if last)
        in_mid_epoch = [(index, total) for index, total, _, last in seen if not last]
        assert len({total for _, total in in_mid_epoch}) > 3

    def test_max_epochs(self) -> None:
        assert epoch_samples(train(max_epochs=4)) == [SAMPLES] * 4

    def test_max_steps_counts_updates(self) -> None:
        model = train(max_epochs=-1, max_steps=17)
        assert len(model.used_lr) == len(model.sizes) == 17

    def test_max_time(self) -> None:
        model = Classifier()
        made = fit(model, loader(), [resizing()], max_epochs=-1, max_time=timedelta(microseconds=1))
        assert made.global_step == 1

    def test_log_every_n_steps_counts_updates(self) -> None:
        class Steps(Logger):
            name, version = "steps", 0

            def __init__(self) -> None:
                super().__init__()
                self.steps: list[int] = []

            def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
                pass

            def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
                if "adaptive_batch/batch_size" in metrics:
                    assert step is not None
                    self.steps.append(step)

        logger = Steps()
        model = train(logger=logger, log_every_n_steps=4, max_epochs=3)
        assert logger.steps == list(range(3, len(model.sizes), 4))

    def test_checkpoints_every_n_train_steps_count_updates(self, tmp_path: Any) -> None:
        saved = ModelCheckpoint(tmp_path, every_n_train_steps=5, save_top_k=-1, filename="{step}")
        model = train(saved, max_epochs=2, enable_checkpointing=True)
        steps = sorted(int(path.stem.split("=")[1]) for path in tmp_path.iterdir())
        assert steps == list(range(5, len(model.sizes) + 1, 5))

    def test_estimated_stepping_batches(self) -> None:
        asked: list[float] = []

        class Asks(Classifier):
            def configure_optimizers(self) -> Any:
                asked.append(self.trainer.estimated_stepping_batches)
                return super().configure_optimizers()

        train(model=Asks("lambda"), max_epochs=3)
        fit(Asks("lambda"), loader(), max_epochs=3)
        assert asked == [3 * BATCHES] * 2

    def test_accumulate_grad_batches_steps_on_the_epochs_last_batch(self) -> None:
        watch = Watch()
        model = train(watch, max_epochs=3, accumulate_grad_batches=3, callback={"low": 12, "high": 180})
        counts = batches_per_epoch(model)
        updates = [math.ceil(count / 3) for count in counts]
        assert watch.epoch_ends == [sum(updates[: i + 1]) for i in range(3)]
        assert epoch_samples(model) == [SAMPLES] * 3

    def test_fast_dev_run(self) -> None:
        model = Classifier()
        fit(model, loader(), [resizing()], fast_dev_run=True)
        assert model.sizes == [B0]

    @pytest.mark.parametrize("first", [True, False])
    def test_starts_from_the_size_that_a_finder_beside_it_has_found(self, tmp_path: Path, first: bool) -> None:
        class Sized(Classifier):
            batch_size = 4

            def train_dataloader(self) -> DataLoader[Any]:
                return loader(batch_size=self.batch_size)

            def val_dataloader(self) -> DataLoader[Any]:
                return val()

        finder, model = BatchSizeFinder("power", steps_per_trial=1, max_trials=3, init_val=4), Sized()
        callback = AdaptiveBatchSize(verbose=False)
        both = [finder, callback] if first else [callback, finder]
        made = trainer(both, enable_checkpointing=True, default_root_dir=tmp_path)
        made.fit(model)
        assert model.batch_size == 16
        assert epoch_samples(model)[-2:] == [SAMPLES] * 2
        assert callback.controller.reference_batch_size == 16
        assert callback.history.updates[0].batch_size == 16

    @pytest.mark.filterwarnings("ignore:You are trying to `self.log:UserWarning")  # the model does
    def test_barebones_resizes_and_logs_nothing(self) -> None:
        model, callback = Classifier(), resizing()
        others = [GradientNoiseMonitor(), MemoryMonitor()]
        made = pl.Trainer(barebones=True, accelerator="cpu", max_epochs=2, callbacks=[callback, *others])
        made.fit(model, loader())
        assert len(set(model.sizes)) > 1
        assert epoch_samples(model) == [SAMPLES] * 2
        assert callback.history.column("batch_size") == model.sizes
        assert not made.callback_metrics

    @pytest.mark.filterwarnings("ignore:You are trying to `self.log:UserWarning")  # the model does
    def test_barebones_keeps_the_size_and_splits(self) -> None:
        passes: list[int] = []

        class Seen(Classifier):
            def training_step(self, batch: Any, batch_idx: int) -> Tensor:
                passes.append(len(batch[0]))
                return super().training_step(batch, batch_idx)

        model = Seen()
        callback = AutoMicroBatch(micro_batch_size=B0 // 2)
        made = pl.Trainer(barebones=True, accelerator="cpu", max_epochs=1, callbacks=[callback])
        made.fit(model, loader())
        assert (sum(passes), max(passes), max(model.sizes)) == (SAMPLES, B0 // 2, B0)


class TestLimits:
    @pytest.mark.parametrize("fraction", [0.5, 0.25])
    def test_limit_train_batches_as_a_fraction_is_so_many_samples(self, fraction: float) -> None:
        plain = Classifier()
        fit(plain, loader(shuffle=False), limit_train_batches=fraction)
        model = train(data=loader(shuffle=False), limit_train_batches=fraction, max_epochs=4)
        assert model.epochs == [plain.epochs[0]] * 4
        assert len(batches_per_epoch(model)) == 4

    @pytest.mark.parametrize("limit", [4, 9])
    def test_limit_train_batches_as_a_number_is_so_many_batches_or_all_the_data(self, limit: int) -> None:
        model = train(limit_train_batches=limit, max_epochs=5)
        counts = batches_per_epoch(model)
        assert len(counts) == 5
        for count, samples in zip(counts, epoch_samples(model), strict=True):
            assert count == limit or (count < limit and samples == SAMPLES)

    def test_a_fraction_of_less_than_a_batch_is_refused(self) -> None:
        with pytest.raises(ValueError, match=r"limit_train_batches=0\.01 is less than one batch"):
            fit(Classifier(), loader(), [resizing()], limit_train_batches=0.01)

    @pytest.mark.parametrize("overfit", [0.25, 3])
    @pytest.mark.filterwarnings("ignore:You requested to overfit")
    def test_overfit_batches(self, overfit: float | int) -> None:
        plain = Classifier()
        fit(plain, loader(), overfit_batches=overfit)
        assert plain.epochs == [list(range(48))] * 2
        model = train(overfit_batches=overfit, max_epochs=6)
        for epoch in model.epochs:
            assert epoch == list(range(len(epoch)))  # not shuffled
        if overfit == 0.25:
            assert [len(epoch) for epoch in model.epochs] == [48] * 6
        else:
            assert batches_per_epoch(model) == [3] * 6


def due(model: Classifier, fraction: float, limit: int | None = None) -> list[int]:
    """The first batch ends at which so much of an epoch of samples, or of a limit in batches, is reached."""
    batches = min(BATCHES, limit or BATCHES)
    every = max(1, int(batches * fraction))
    points = [every * (i + 1) for i in range(batches // every)]
    ends, before, sizes = [], 0, iter(model.sizes)
    for epoch in model.epochs:
        position, done, count = 0, 0.0, 0
        while position < len(epoch):
            position, count = position + next(sizes), count + 1
            of_samples = position // B0 * batches / BATCHES
            now = max(of_samples, count * batches / limit if limit else 0)
            if position == len(epoch):
                now = batches
            if any(done < point <= now for point in points):
                ends.append(before + position)
            done = now
        before += len(epoch)
    return ends


class TestValidation:
    @pytest.mark.parametrize("fraction", [1.0, 0.5, 0.25, 0.1])
    def test_val_check_interval_as_a_fraction_stays_at_its_samples(self, fraction: float) -> None:
        model = train(val_check_interval=fraction, max_epochs=4)
        assert model.validated_at == due(model, fraction)

    @pytest.mark.parametrize("fraction", [1.0, 0.5])
    @pytest.mark.parametrize("limit", [6, 30])
    def test_val_check_interval_as_a_fraction_of_a_limit_in_batches(self, fraction: float, limit: int) -> None:
        model = train(val_check_interval=fraction, limit_train_batches=limit, max_epochs=4)
        assert model.validated_at == due(model, fraction, limit)

    @pytest.mark.parametrize("interval", [2, 10])
    def test_val_check_interval_as_an_int_counts_batches(self, interval: int) -> None:
        model = train(val_check_interval=interval, max_epochs=4)
        expected, samples, sizes = [], 0, iter(model.sizes)
        for count in batches_per_epoch(model):
            for batch in range(1, count + 1):
                samples += next(sizes)
                # An interval longer than a grown epoch validates at its end.
                if batch % interval == 0 or (batch == count < interval):
                    expected.append(samples)
        assert model.validated_at == expected

    def test_val_check_interval_of_more_than_an_epoch_is_refused(self) -> None:
        with pytest.raises(ValueError, match="val_check_interval=14 is more than the 13 training batches"):
            fit(Classifier(), loader(), [resizing()], val=val(), val_check_interval=14)

    def test_val_check_interval_as_a_time(self) -> None:
        model = train(val_check_interval=timedelta(microseconds=1), max_epochs=2)
        assert len(model.validated_at) == len(model.sizes)

    def test_check_val_every_n_epoch(self) -> None:
        model = train(check_val_every_n_epoch=2, max_epochs=5)
        assert model.validated_at == [2 * SAMPLES, 4 * SAMPLES]

    def test_check_val_every_n_epoch_none_counts_batches_over_epochs(self) -> None:
        model = train(check_val_every_n_epoch=None, val_check_interval=20, max_epochs=5)
        ends = [sum(model.sizes[:count]) for count in range(20, len(model.sizes) + 1, 20)]
        assert model.validated_at == ends != []

    @pytest.mark.parametrize("size", [4, 60])
    @pytest.mark.parametrize("drop_last", [False, True])
    def test_every_epoch_is_validated_once_at_any_constant_size(self, size: int, drop_last: bool) -> None:
        model = Classifier()
        callback = AdaptiveBatchSize(lambda m: size, min_batch_size=4, max_batch_size=60, adjust_every=1)
        fit(model, loader(drop_last=drop_last), [callback], val=val(), max_epochs=3)
        ends = [sum(map(len, model.epochs[: i + 1])) for i in range(3)]
        assert model.validated_at == ends


class Doubling(lr_scheduler.LRScheduler):
    """A scheduler of the user's own."""

    def get_lr(self) -> Any:
        return [base * (1 + 0.1 * self.last_epoch) for base in self.base_lrs]


def make_scheduler(kind: str, optimizer: torch.optim.Optimizer, total: int) -> Any:
    half = total // 2
    schedulers: dict[str, Callable[[], Any]] = {
        "OneCycleLR": lambda: lr_scheduler.OneCycleLR(optimizer, 0.2, total_steps=total),
        "CosineAnnealingLR": lambda: lr_scheduler.CosineAnnealingLR(optimizer, total),
        "LambdaLR": lambda: lr_scheduler.LambdaLR(optimizer, lambda step: 1.0 / (1 + step)),
        "LinearLR": lambda: lr_scheduler.LinearLR(optimizer, 0.1, total_iters=total),
        "SequentialLR": lambda: lr_scheduler.SequentialLR(
            optimizer,
            [
                lr_scheduler.LinearLR(optimizer, 0.1, total_iters=half),
                lr_scheduler.CosineAnnealingLR(optimizer, total - half),
            ],
            milestones=[half],
        ),
        "ReduceLROnPlateau": lambda: lr_scheduler.ReduceLROnPlateau(optimizer, factor=0.7, patience=2),
        "of_the_users_own": lambda: Doubling(optimizer),
    }
    return schedulers[kind]()


class Scheduled(Classifier):
    """Two parameter groups, and any schedulers."""

    def __init__(self, *kinds: str, **config: Any) -> None:
        super().__init__(dropout=0.0)
        self.kinds, self.config = kinds, config
        self.rates: list[list[float]] = []

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        self.log("flat", 1.0)
        return super().training_step(batch, batch_idx)

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        super().on_train_batch_start(batch, batch_idx)
        self.rates.append([group["lr"] for group in self.trainer.optimizers[0].param_groups])

    def configure_optimizers(self) -> Any:
        groups = [
            {"params": list(self.net[0].parameters()), "lr": 0.05},
            {"params": list(self.net[3].parameters()), "lr": 0.02},
        ]
        optimizer = torch.optim.SGD(groups, lr=0.05, momentum=0.9)
        total = int(self.trainer.estimated_stepping_batches)
        config = {"interval": "step", "monitor": "flat", **self.config}
        schedulers = [make_scheduler(kind, optimizer, total) for kind in self.kinds]
        return [optimizer], [{**config, "scheduler": scheduler} for scheduler in schedulers]


KINDS = [
    "OneCycleLR",
    "CosineAnnealingLR",
    "LambdaLR",
    "LinearLR",
    "SequentialLR",
    "ReduceLROnPlateau",
    "of_the_users_own",
]


def assert_on_the_sample_clock(model: Scheduled, plain: Scheduled) -> None:
    """Before each update the rates are plain Lightning's after so many steps as the samples are worth."""
    assert len(plain.rates) == BATCHES * len(plain.epochs)
    used = iter(zip(model.sizes, model.rates, strict=True))
    for epoch, indices in enumerate(model.epochs):
        position = 0
        while position < len(indices):
            size, rates = next(used)
            steps = epoch * BATCHES + min(BATCHES, math.ceil(position / B0))
            assert rates == pytest.approx(plain.rates[steps], rel=1e-12)
            position += size


class TestSampleClock:
    def runs(self, make: Callable[[], Scheduled], **options: Any) -> tuple[Scheduled, Scheduled]:
        plain, model = make(), make()
        plain_trainer = fit(plain, loader(), **{"max_epochs": 3, **options})
        made = fit(model, loader(), [resizing()], **{"max_epochs": 3, **options})
        for ours, theirs in zip(made.lr_scheduler_configs, plain_trainer.lr_scheduler_configs, strict=True):
            assert ours.scheduler.last_epoch == theirs.scheduler.last_epoch
        for a, b in zip(made.optimizers[0].param_groups, plain_trainer.optimizers[0].param_groups, strict=True):
            assert a["lr"] == pytest.approx(b["lr"], rel=1e-12)
        assert made.global_step != plain_trainer.global_step
        return model, plain

    @pytest.mark.parametrize("kind", KINDS)
    def test_a_scheduler_that_steps_per_update_follows_the_samples(self, kind: str) -> None:
        model, plain = self.runs(lambda: Scheduled(kind))
        assert_on_the_sample_clock(model, plain)
        assert len({tuple(rates) for rates in plain.rates}) > 5

    @pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "OneCycleLR"])
    def test_a_scheduler_that_steps_per_epoch_does_so(self, kind: str) -> None:
        model, plain = self.runs(lambda: Scheduled(kind, interval="epoch"), max_epochs=6)
        starts = [sum(batches_per_epoch(model)[:epoch]) for epoch in range(6)]
        assert [model.rates[i] for i in starts] == [plain.rates[BATCHES * epoch] for epoch in range(6)]

    @pytest.mark.parametrize("frequency", [2, 3, 5])
    def test_frequency(self, frequency: int) -> None:
        model, plain = self.runs(lambda: Scheduled("LambdaLR", frequency=frequency))
        assert_on_the_sample_clock(model, plain)

    @pytest.mark.filterwarnings("ignore:The default behavior of LearningRateMonitor")
    def test_several_schedulers(self) -> None:
        model, plain = self.runs(lambda: Scheduled("LinearLR", "of_the_users_own"))
        assert_on_the_sample_clock(model, plain)

    def test_an_overridden_lr_scheduler_step(self) -> None:
        class Overridden(Scheduled):
            def __init__(self) -> None:
                super().__init__("of_the_users_own")
                self.stepped = 0

            def lr_scheduler_step(self, scheduler: Any, metric: Any) -> None:
                self.stepped += 1
                scheduler.step()

        model, plain = self.runs(Overridden)
        assert_on_the_sample_clock(model, plain)
        assert isinstance(model, Overridden)
        assert model.stepped == 3 * BATCHES

    def test_accumulated_batches_are_one_step(self) -> None:
        def make() -> Scheduled:
            return Scheduled("CosineAnnealingLR")

        plain, model = make(), make()
        options: dict[str, Any] = {"accumulate_grad_batches": 2, "max_epochs": 3}
        plain_trainer = fit(plain, loader(), **options)
        made = fit(model, loader(), [resizing(low=8, high=120)], **options)
        steps = plain_trainer.lr_scheduler_configs[0].scheduler.last_epoch
        assert made.lr_scheduler_configs[0].scheduler.last_epoch == steps == 3 * math.ceil(BATCHES / 2)

    @pytest.mark.parametrize("kind", ["OneCycleLR", "CosineAnnealingLR"])
    def test_a_schedule_over_max_steps_is_not_overrun(self, kind: str) -> None:
        model = Scheduled(kind)
        callback = AdaptiveBatchSize(lambda m: 60, max_batch_size=60, adjust_every=1)
        made = fit(model, loader(), [callback], max_epochs=-1, max_steps=20)
        assert made.global_step == made.lr_scheduler_configs[0].scheduler.last_epoch == 20

    def test_a_limit_in_batches_keeps_the_steps_of_an_epoch(self) -> None:
        model = Scheduled("OneCycleLR")
        callback = AdaptiveBatchSize(lambda m: 60, max_batch_size=60, adjust_every=1)
        made = fit(model, loader(), [callback], limit_train_batches=6, max_epochs=3)
        assert made.lr_scheduler_configs[0].scheduler.last_epoch == 18

    def test_a_clock_does_not_pass_its_horizon(self) -> None:
        clock = SampleClock(horizon=5)
        plain = PlainEpoch(SAMPLES, BATCHES, B0)
        assert len(clock.advance(plain, 3 * B0, 1.0, last=False)) == 3
        restored = SampleClock(horizon=5)
        restored.load_state_dict(clock.state_dict())
        for one in (clock, restored):
            assert len(one.advance(plain, 9 * B0, 1.0, last=False)) == 2
            assert one.advance(plain, SAMPLES, 1.0, last=True) == []


@pytest.mark.parametrize("workers", [0, 1, 2])
def test_with_drop_last_a_size_that_shrinks_at_the_end_of_an_epoch_loses_no_validation(workers: int) -> None:
    sizes = [8, 16, 5, 32, 9, 4, 20, 33]
    model = Scheduled("CosineAnnealingLR")
    callback = AdaptiveBatchSize(
        lambda m: sizes[m.update // 2 % 8], min_batch_size=4, max_batch_size=48, adjust_every=2, lr_scaling="linear"
    )
    totals: list[tuple[int, int]] = []

    class Bar(pl.Callback):
        def on_train_epoch_end(self, trainer: pl.Trainer, *args: Any) -> None:
            totals.append((int(trainer.num_training_batches), len(model.sizes)))

    made = fit(model, loader(drop_last=True, num_workers=workers), [callback, Bar()], val=val(), max_epochs=3)
    assert len(model.validated_at) == 3
    assert sum(model.last_batches) == 3
    assert made.lr_scheduler_configs[0].scheduler.last_epoch == 3 * (SAMPLES // B0)
    done = [0, *(batches for _, batches in totals)]
    assert [total for total, _ in totals] == [after - before for before, after in itertools.pairwise(done)]


class TestOtherClocks:
    @pytest.mark.parametrize("kind", KINDS)
    def test_updates_leaves_schedulers_alone(self, kind: str) -> None:
        if kind == "OneCycleLR":
            pytest.skip("ends too soon by itself when there are more updates than it was told")
        model = Scheduled(kind)
        made = fit(model, loader(), [resizing(schedule_clock="updates")], max_epochs=3)
        assert made.lr_scheduler_configs[0].scheduler.last_epoch == made.global_step

    def test_gain_without_a_known_noise_scale_is_one_step_an_update_up_to_the_end(self) -> None:
        model = Scheduled("OneCycleLR")
        small = AdaptiveBatchSize(
            lambda m: 4, min_batch_size=4, max_batch_size=60, adjust_every=1, schedule_clock="gain"
        )
        made = fit(model, loader(), [small], max_epochs=3)
        assert made.global_step > 3 * BATCHES
        assert made.lr_scheduler_configs[0].scheduler.last_epoch == 3 * BATCHES

    @pytest.mark.parametrize(("needs", "rule"), [({"noise"}, "auto"), (set(), "sqrt")])
    def test_gain_adds_up_the_gains_whether_or_not_policy_and_rule_ask_for_the_noise(
        self, needs: set[str], rule: str
    ) -> None:
        class Known(pl.Callback):
            def on_train_batch_start(self, trainer: pl.Trainer, *args: Any) -> None:
                now.append(callback.controller.rate_noise_scale)

        now: list[float] = []
        model = Scheduled("LambdaLR")
        policy: Any = lambda m: 48  # noqa: E731
        policy.needs = frozenset(needs)
        callback = AdaptiveBatchSize(policy, max_batch_size=48, adjust_every=1, schedule_clock="gain", lr_scaling=rule)
        made = fit(model, loader(), [callback, Known()], max_epochs=4)
        assert any(math.isfinite(value) and value > 0 for value in now)
        progress = 0.0
        for update, phi in zip(callback.history.updates, now, strict=True):
            size = max(update.batch_size, min(B0, 48))
            progress += 1.0 if not phi > 0 else (1 + phi / B0) / (1 + phi / size)
        assert made.lr_scheduler_configs[0].scheduler.last_epoch == min(4 * BATCHES, math.floor(progress + 1e-6))


def total_of(bar: Any) -> float | None:
    """The total that a progress bar shows."""
    if isinstance(bar, TQDMProgressBar):
        total: float | None = bar.train_progress_bar.total
        return total
    return bar.progress.tasks[bar.train_progress_bar_id].total  # type: ignore[no-any-return]
