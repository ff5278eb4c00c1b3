"""AdaptiveBatchSize on real Trainers and real DataLoaders."""

from __future__ import annotations

import csv
import itertools
import math
import random
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from lightning_problems import SAMPLES, Classifier, fit, loader, trainer
from pytorch_lightning.loggers import CSVLogger
from pytorch_lightning.tuner.tuning import Tuner
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from adaptive_batch import Measurement
from adaptive_batch.callbacks import AdaptiveBatchSize, GradientNoiseMonitor, MemoryMonitor
from adaptive_batch.policies import Constant, Milestones

B0 = 16


def random_sizes(seed: int, low: int = 4, high: int = 90) -> Any:
    """A policy of no sense: another size at every question."""
    rng = random.Random(seed)
    return lambda measurement: rng.randint(low, high)


def resizing(seed: int = 0, **kwargs: Any) -> AdaptiveBatchSize:
    options: dict[str, Any] = {
        "min_batch_size": 4,
        "max_batch_size": 90,
        "adjust_every": 2,
        "lr_scaling": "linear",
    }
    return AdaptiveBatchSize(random_sizes(seed), **{**options, **kwargs})


def _seeded(seed: int) -> AdaptiveBatchSize:
    return AdaptiveBatchSize(random_sizes(0), min_batch_size=4, max_batch_size=90, adjust_every=2, seed=seed)


def weights(model: nn.Module) -> list[torch.Tensor]:
    return [p.detach().clone() for p in model.parameters()]


def identical(a: list[torch.Tensor], b: list[torch.Tensor]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


class TestConstantMeansUnchanged:
    @pytest.mark.parametrize("workers", [0, 2])
    @pytest.mark.parametrize("scheduler", [None, "onecycle", "lambda"])
    def test_weights_and_logged_losses_equal_plain_lightning_bit_for_bit(
        self, workers: int, scheduler: str | None
    ) -> None:
        runs = []
        for callbacks in ([], [AdaptiveBatchSize(policy="constant")]):
            model = Classifier(scheduler)
            fit(model, loader(num_workers=workers), callbacks, val=loader(batch_size=50, shuffle=False))
            runs.append(
                (
                    weights(model),
                    model.loss_trace,
                    model.logged,
                    model.epochs,
                    model.used_lr,
                    model.validated_at,
                )
            )
        assert identical(runs[0][0], runs[1][0])
        assert runs[0][1:] == runs[1][1:]

    @pytest.mark.parametrize(
        "options",
        [
            {"accumulate_grad_batches": 3},
            {"limit_train_batches": 7},
            {"limit_train_batches": 0.4},
            {"val_check_interval": 0.3},
            {"val_check_interval": 5},
            {"gradient_clip_val": 0.1},
            {"max_steps": 17, "max_epochs": -1},
        ],
        ids=str,
    )
    def test_trainer_options_keep_their_meaning(self, options: dict[str, Any]) -> None:
        runs = []
        for callbacks in ([], [AdaptiveBatchSize(policy="constant")]):
            model = Classifier("cosine")
            made = fit(model, loader(), callbacks, val=loader(batch_size=50, shuffle=False), **options)
            runs.append(
                (
                    weights(model),
                    model.loss_trace,
                    model.epochs,
                    model.used_lr,
                    model.validated_at,
                    made.global_step,
                )
            )
        assert identical(runs[0][0], runs[1][0])
        assert runs[0][1:] == runs[1][1:]

    def test_a_resizing_policy_does_change_the_run(self) -> None:
        plain, resized = Classifier(), Classifier()
        fit(plain, loader())
        fit(resized, loader(), [resizing()])
        assert not identical(weights(plain), weights(resized))


class TestExactlyOnce:
    @pytest.mark.parametrize("workers", [0, 2])
    @pytest.mark.parametrize("seed", [0, 1, 2])
    def test_each_epoch_delivers_every_index_once_whatever_the_sizes(self, workers: int, seed: int) -> None:
        model = Classifier()
        callback = resizing(seed)
        fit(model, loader(num_workers=workers), [callback], max_epochs=3)
        assert [sorted(epoch) for epoch in model.epochs] == [list(range(SAMPLES))] * 3
        sizes = [change.batch_size for change in callback.history.changes]
        assert any(b > a for a, b in itertools.pairwise(sizes)), "never grew: the test would be vacuous"
        assert any(b < a for a, b in itertools.pairwise(sizes)), "never shrank: the test would be vacuous"

    def test_workers_are_not_respawned_by_a_resize(self) -> None:
        model = Classifier()
        callback = resizing(adjust_every=1)
        fit(model, loader(num_workers=2, persistent_workers=True), [callback], max_epochs=3)
        assert len(callback.history.changes) > 10
        assert len(model.pids) == 2

    def test_the_order_is_that_of_the_users_own_sampler(self) -> None:
        plain, resized = Classifier(), Classifier()
        fit(plain, loader())
        fit(resized, loader(), [resizing()])
        assert resized.epochs == plain.epochs

    def test_with_a_seed_the_order_follows_from_seed_and_epoch_alone(self) -> None:
        orders = []
        for dropout, seed in ((0.2, 5), (0.0, 5), (0.2, 6)):
            model = Classifier(dropout=dropout)
            fit(model, loader(), [_seeded(seed)])
            orders.append(model.epochs)
        assert orders[0] == orders[1] != orders[2]
        assert orders[0][0] != orders[0][1]
        assert [sorted(epoch) for epoch in orders[0]] == [list(range(SAMPLES))] * 2

    def test_drop_last_loses_less_than_one_batch(self) -> None:
        model = Classifier()
        callback = resizing(adjust_every=1)
        fit(model, loader(drop_last=True), [callback], max_epochs=3)
        for epoch in model.epochs:
            assert len(set(epoch)) == len(epoch)
            assert SAMPLES - len(epoch) < 90


class TestAttribution:
    @pytest.mark.parametrize("workers", [0, 2])
    @pytest.mark.parametrize("scheduler", [None, "cosine"])
    def test_the_learning_rate_follows_the_samples_of_each_update(self, workers: int, scheduler: str | None) -> None:
        model = Classifier(scheduler)
        callback = resizing(adjust_every=1)
        fit(model, loader(num_workers=workers), [callback], max_epochs=3)
        assert sum(model.sizes) == 3 * SAMPLES
        in_epoch = 0
        for size, used, scheduled in zip(model.sizes, model.used_lr, model.scheduled_lr, strict=True):
            in_epoch = (in_epoch + size) % SAMPLES
            if scheduled == 0:
                continue
            ratio = used / scheduled
            if in_epoch == 0:  # the tail counts for no less than min(nominal, B0), and never as a large batch
                assert size / B0 - 1e-9 <= ratio <= max(size, B0) / B0 + 1e-9
            else:
                assert ratio == pytest.approx(size / B0, rel=1e-12)

    def test_a_short_tail_counts_as_the_reference_size_but_never_as_a_large_batch(self) -> None:
        model = Classifier()
        fit(
            model,
            loader(),
            [AdaptiveBatchSize(Constant(90), max_batch_size=90, lr_scaling="linear", adjust_every=1)],
        )
        tails = [i for i, size in enumerate(model.sizes) if i and size < 90 and i > 2]
        assert [model.sizes[i] for i in tails] == [SAMPLES - B0 - 2 * 90 + 0] or tails
        last = model.sizes[-1]
        assert last == SAMPLES % 90
        assert model.used_lr[-1] / 0.1 == pytest.approx(max(last, B0) / B0)

    def test_prefetched_batches_keep_their_own_size(self) -> None:
        model = Classifier()
        callback = AdaptiveBatchSize(
            Milestones({1: 64}, unit="updates"), max_batch_size=64, adjust_every=1, lr_scaling="linear"
        )
        fit(model, loader(num_workers=2), [callback], max_epochs=1)
        assert callback.history.changes[0].step == 1
        lag = model.sizes.index(64)
        assert lag == 5  # the update that decided, and two batches ahead for each of two workers
        assert model.used_lr[:lag] == [0.1] * lag

    def test_history_and_metrics_say_what_each_update_was(self) -> None:
        model = Classifier()
        callback = resizing()
        made = fit(model, loader(), [callback])
        assert [int(u.batch_size) for u in callback.history.updates] == model.sizes
        assert [u.lr_scale for u in callback.history.updates] == pytest.approx([lr / 0.1 for lr in model.used_lr])
        assert callback.history.updates[-1].samples == 2 * SAMPLES
        for name in (
            "batch_size",
            "micro_batch_size",
            "noise_scale",
            "grad_sq_norm",
            "grad_variance",
            "lr_scale",
        ):
            assert f"adaptive_batch/{name}" in made.callback_metrics
        assert made.callback_metrics["adaptive_batch/samples"] == 2 * SAMPLES
        assert made.callback_metrics["adaptive_batch/throughput"] > 0

    def test_who_looks_now_and_then_sees_the_update_before(self) -> None:
        callback, monitor = resizing(), MemoryMonitor()
        seen: list[tuple[Any, dict[str, float]]] = []
        stops_at = 10

        class Looks(pl.Callback):
            def on_train_batch_end(self, trainer: Any, *args: Any) -> None:
                if trainer.global_step == stops_at:
                    raise RuntimeError("stopped")  # with values that nobody has looked at
                if trainer.global_step % 3 == 0:
                    metrics = {k[15:]: float(v) for k, v in trainer.callback_metrics.items()}
                    seen.append((callback.history.updates[-1], metrics))

        class Silent(Classifier):
            def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
                """Looks at nothing."""

        made = trainer([monitor, callback, Looks()], log_every_n_steps=1000, max_epochs=4)
        with pytest.raises(RuntimeError, match="stopped"):
            made.fit(Silent(), loader())
        seen.clear()
        stops_at = -1
        made.fit(Silent(), loader())
        assert len(seen) > 2
        for update, metrics in seen:
            assert metrics["samples"] == update.samples
            assert metrics["throughput"] == pytest.approx(update.throughput)
            assert metrics["lr_scale"] == pytest.approx(update.lr_scale)
            assert metrics["peak_memory"] == pytest.approx(monitor.model.predict(update.batch_size), rel=1e-2)

    def test_a_logger_is_given_the_values_of_every_update_in_every_epoch(self, tmp_path: Path) -> None:
        callback, monitor = resizing(), MemoryMonitor()
        logger = CSVLogger(tmp_path)
        fit(Classifier(), loader(), [callback, monitor], logger=logger, log_every_n_steps=1, max_epochs=3)
        with (Path(logger.log_dir) / "metrics.csv").open() as file:
            rows = [row for row in csv.DictReader(file) if row["adaptive_batch/samples"]]
        assert [float(row["adaptive_batch/samples"]) for row in rows] == callback.history.column("samples")
        assert [float(row["adaptive_batch/lr_scale"]) for row in rows] == pytest.approx(
            callback.history.column("lr_scale")
        )
        assert all(float(row["adaptive_batch/peak_memory"]) > 0 for row in rows)

    def test_of_two_callbacks_that_log_a_name_the_newest_counts_and_each_logs_its_own(self) -> None:
        callback, monitor = resizing(), GradientNoiseMonitor(every=4, noise="probe")
        seen: list[dict[str, float]] = []

        class Looks(pl.Callback):
            def on_train_batch_end(self, trainer: Any, *args: Any) -> None:
                seen.append({k[15:]: float(v) for k, v in trainer.callback_metrics.items()})
                estimates.append(callback.controller.estimates[1])

        estimates: list[float] = []
        fit(Classifier(), loader(), [monitor, callback, Looks()], max_epochs=4)
        last = [metrics["grad_sq_norm"] for metrics in seen]
        assert last == pytest.approx(estimates, nan_ok=True)
        late = [metrics for metrics in seen if metrics["samples"] > 3.5 * SAMPLES]
        assert late and all("noise_scale_high" in metrics for metrics in late)

    def test_who_looks_after_an_exception_sees_the_last_update(self) -> None:
        callback, seen = resizing(), []

        class Stops(pl.Callback):
            def on_train_batch_end(self, trainer: Any, *args: Any) -> None:
                if trainer.global_step == 7:
                    raise RuntimeError("stopped")

            def on_exception(self, trainer: Any, *args: Any) -> None:
                seen.append(float(trainer.callback_metrics["adaptive_batch/samples"]))

        with pytest.raises(RuntimeError, match="stopped"):
            fit(Classifier(), loader(), [callback, Stops()])
        assert seen == [callback.history.updates[-1].samples]

    @pytest.mark.parametrize("default", [torch.float64, torch.bfloat16])
    def test_every_value_has_the_type_that_lightning_logs_in(self, default: torch.dtype) -> None:
        seen: list[tuple[torch.dtype, float]] = []

        class Looks(pl.Callback):
            def on_train_batch_end(self, trainer: Any, *args: Any) -> None:
                trainer.lightning_module.log("plain", 1.0)
                for name in ("plain", "adaptive_batch/samples"):
                    value = trainer.callback_metrics[name]
                    seen.append((value.dtype, float(value)))

        callback = resizing(lr_scaling="none")
        torch.set_default_dtype(default)
        try:
            fit(Classifier(), loader(), [callback, Looks()])
        finally:
            torch.set_default_dtype(torch.float32)
        assert {dtype for dtype, _ in seen} == {torch.float64 if default == torch.float64 else torch.float32}
        assert [value for _, value in seen[1::2]] == callback.history.column("samples")

    def test_a_name_that_the_module_logs_too_is_the_modules(self) -> None:
        class Logs(Classifier):
            def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
                super().on_train_batch_end(outputs, batch, batch_idx)
                self.log("adaptive_batch/throughput", -1.0, on_step=True, on_epoch=False)

        made = fit(Logs(), loader(), [resizing()])
        assert made.callback_metrics["adaptive_batch/throughput"] == -1.0

    @pytest.mark.parametrize("removed", [True, False])
    def test_an_epoch_in_which_nothing_is_logged_has_no_values(self, removed: bool) -> None:
        seen: list[tuple[int, bool]] = []

        class Looks(pl.Callback):
            def on_train_epoch_start(self, trainer: Any, *args: Any) -> None:
                if removed and trainer.current_epoch == 1:
                    trainer.callbacks = [c for c in trainer.callbacks if c is not monitor]

            def on_train_batch_end(self, trainer: Any, *args: Any) -> None:
                metrics = trainer._logger_connector.metrics["callback"]
                seen.append((trainer.current_epoch, "adaptive_batch/peak_memory" in metrics))

        monitor = MemoryMonitor()
        fit(Classifier(), loader(), [monitor, Looks()])
        assert all(there for epoch, there in seen if epoch == 0)
        assert [there for epoch, there in seen if epoch == 1] == [not removed] * sum(e == 1 for e, _ in seen)

    @pytest.mark.parametrize("breaks", [False, True])
    def test_the_next_run_without_the_callback_has_no_values_of_it(self, breaks: bool) -> None:
        seen: list[bool] = []

        class Looks(pl.Callback):
            def on_train_batch_end(self, trainer: Any, *args: Any) -> None:
                metrics = trainer._logger_connector.metrics["callback"]
                seen.append(any(name.startswith("adaptive_batch/") for name in metrics))
                if breaks and len(seen) == 3:
                    raise RuntimeError("stopped")  # inside an epoch

        made: Any = trainer([resizing(), MemoryMonitor(), Looks()], max_epochs=1)
        with pytest.raises(RuntimeError, match="stopped") if breaks else nullcontext():
            made.fit(Classifier(), loader())
        assert all(seen)
        assert "metrics" not in vars(made.fit_loop.epoch_loop._results)  # read by Lightning alone again
        breaks = False
        seen.clear()
        made.callbacks = [callback for callback in made.callbacks if isinstance(callback, Looks)]
        made.fit_loop.max_epochs = 2
        made.fit(Classifier(), loader())
        assert seen and not any(seen)


class TestBooks:
    def test_the_loop_ends_on_the_last_batch_of_each_epoch(self) -> None:
        model = Classifier()
        fit(model, loader(), [resizing(adjust_every=1)], max_epochs=3)
        ends = [i for i, last in enumerate(model.last_batches) if last]
        totals = [sum(model.sizes[: i + 1]) for i in ends]
        assert totals == [SAMPLES, 2 * SAMPLES, 3 * SAMPLES]

    @pytest.mark.parametrize("fraction", [1.0, 0.5, 0.25])
    def test_validation_stays_at_its_fraction_of_the_epoch(self, fraction: float) -> None:
        plain, resized = Classifier(), Classifier()
        val = loader(batch_size=50, shuffle=False)
        fit(plain, loader(), val=val, val_check_interval=fraction, max_epochs=3)
        callback = AdaptiveBatchSize(random_sizes(1, 4, 40), min_batch_size=4, max_batch_size=40, adjust_every=1)
        fit(resized, loader(), [callback], val=val, val_check_interval=fraction, max_epochs=3)
        assert len(resized.validated_at) == len(plain.validated_at)
        for due, seen in zip(plain.validated_at, resized.validated_at, strict=True):
            assert due <= seen < due + 40

    def test_validation_runs_each_epoch_when_batches_outgrow_an_interval_in_batches(self) -> None:
        model = Classifier()
        callback = AdaptiveBatchSize(lambda m: 90, max_batch_size=90, adjust_every=1)
        fit(
            model,
            loader(),
            [callback],
            val=loader(batch_size=50, shuffle=False),
            val_check_interval=10,
            max_epochs=3,
        )
        assert len(model.validated_at) == 3

    @pytest.mark.parametrize("scheduler", ["onecycle", "cosine"])
    @pytest.mark.parametrize("size", [4, 90])
    def test_a_schedule_over_the_run_still_ends_with_the_run(self, scheduler: str, size: int) -> None:
        plain, resized = Classifier(scheduler), Classifier(scheduler)
        steps = fit(plain, loader()).lr_scheduler_configs[0].scheduler.last_epoch
        callback = AdaptiveBatchSize(Constant(size), min_batch_size=4, max_batch_size=90, adjust_every=1)
        made = fit(resized, loader(), [callback])
        assert made.lr_scheduler_configs[0].scheduler.last_epoch == steps
        assert made.global_step != steps

    def test_schedule_clock_updates_leaves_schedulers_alone(self) -> None:
        model = Classifier("lambda")
        callback = AdaptiveBatchSize(Constant(64), max_batch_size=64, adjust_every=1, schedule_clock="updates")
        made = fit(model, loader(), [callback])
        assert made.lr_scheduler_configs[0].scheduler.last_epoch == made.global_step

    def test_schedule_clock_gain_advances_with_adascale_progress(self) -> None:
        model = Classifier("lambda")
        callback = AdaptiveBatchSize(Constant(64), max_batch_size=64, adjust_every=1, schedule_clock="gain")
        made = fit(model, loader(), [callback], max_epochs=1)
        # Without an identified noise scale an update is worth one of the reference size.
        assert math.isnan(callback.history.updates[-1].noise_scale)
        assert made.lr_scheduler_configs[0].scheduler.last_epoch == made.global_step

    @pytest.mark.parametrize(
        ("options", "most"), [({}, SAMPLES), ({"limit_train_batches": 0.5}, 96), ({"limit_train_batches": 2}, SAMPLES)]
    )
    def test_no_size_is_larger_than_an_epoch_and_that_is_said(
        self, options: dict[str, Any], most: int, caplog: pytest.LogCaptureFixture
    ) -> None:
        model, callback = Classifier(), AdaptiveBatchSize(lambda m: 5000, max_batch_size=4096, adjust_every=1)
        with caplog.at_level("INFO"):
            made = fit(model, loader(), [callback], max_epochs=4, **options)
        assert callback.batch_size == most == callback.history.updates[-1].batch_size
        assert float(made.callback_metrics["adaptive_batch/batch_size"]) == most
        assert (
            caplog.text.count(f"no batch has more than the {most} samples of an epoch: max_batch_size is {most}.") == 1
        )

    @pytest.mark.parametrize("workers", [0, 2])
    def test_a_resize_leaves_no_last_batch_of_one_sample_to_layers_that_look_across_the_batch(
        self, workers: int
    ) -> None:
        model = Classifier()
        model.net = nn.Sequential(nn.Linear(8, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 2))
        callback = AdaptiveBatchSize(lambda m: 101, max_batch_size=101, micro_batch_size=None, adjust_every=1)
        fit(model, loader(num_workers=workers), [callback], max_epochs=3)
        assert [sorted(epoch) for epoch in model.epochs] == [list(range(SAMPLES))] * 3
        assert model.sizes[-2:] == [101, 102]
        assert model.last_batches[-2:] == [False, True]

    def test_accumulation_counts_whole_updates(self) -> None:
        model = Classifier()
        callback = AdaptiveBatchSize(lambda m: 96, max_batch_size=96, adjust_every=1, lr_scaling="linear")
        made = fit(model, loader(batch_size=8), [callback], accumulate_grad_batches=2, max_epochs=3)
        assert callback.history.changes[0].previous == 16
        assert callback.batch_size == 96
        assert [sorted(epoch) for epoch in model.epochs] == [list(range(SAMPLES))] * 3
        assert made.global_step == len(model.used_lr) == len(callback.history.updates)
        assert max(model.sizes) == 48
        assert max(model.used_lr) == pytest.approx(0.1 * 96 / 16)

    def test_reloaded_loaders_keep_the_size(self) -> None:
        model = Classifier()

        class Data(pl.LightningDataModule):
            def train_dataloader(self) -> Any:
                return loader(num_workers=2)

        pl.seed_everything(0, verbose=False)
        callback = AdaptiveBatchSize(lambda m: 64, max_batch_size=64, adjust_every=1)
        made = pl.Trainer(
            accelerator="cpu", max_epochs=3, callbacks=[callback], reload_dataloaders_every_n_epochs=1, logger=False,
            enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
        )  # fmt: skip
        made.fit(model, datamodule=Data())
        assert [sorted(epoch) for epoch in model.epochs] == [list(range(SAMPLES))] * 3
        first_of_epoch_three = next(i for i in range(len(model.sizes)) if sum(model.sizes[:i]) == 2 * SAMPLES)
        assert model.sizes[first_of_epoch_three] == 64


class TestSplitting:
    @pytest.mark.parametrize("optimizer", ["sgd", "adam"])
    def test_micro_batches_train_like_the_whole_batch(self, optimizer: str) -> None:
        runs = []
        for micro in (None, 5):
            model = Classifier(optimizer=optimizer, dropout=0.0).double()
            callback = AdaptiveBatchSize("constant", micro_batch_size=micro)
            data = DataLoader(TensorDataset(*(_double(t) for t in _columns())), batch_size=B0, shuffle=True)
            made = fit(model, data, [callback])
            assert callback.history.updates[0].micro_batch_size == (B0 if micro is None else 4)
            runs.append((weights(model), model.logged, made.global_step))
        for a, b in zip(runs[0][0], runs[1][0], strict=True):
            torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)
        for before, after in zip(runs[0][1], runs[1][1], strict=True):
            assert after == pytest.approx(before, rel=1e-5)
        assert runs[0][2] == runs[1][2]

    def test_hooks_per_update_run_once_and_hooks_per_pass_once_a_part(self) -> None:
        calls: list[str] = []

        class Watcher(pl.Callback):
            def on_before_zero_grad(self, *args: Any) -> None:
                calls.append("zero")

            def on_before_backward(self, *args: Any) -> None:
                calls.append("backward")

            def on_before_optimizer_step(self, *args: Any) -> None:
                calls.append("step")

        model = Classifier()
        fit(
            model,
            loader(),
            [AdaptiveBatchSize("constant", micro_batch_size=8), Watcher()],
            limit_train_batches=2,
            max_epochs=1,
        )
        assert calls == ["zero", "backward", "backward", "step"] * 2

    def test_a_batch_that_cannot_be_split_is_refused_with_the_entry_named(self) -> None:
        model = Classifier()
        data = loader(collate_fn=lambda items: (*torch.utils.data.default_collate(items)[:3], torch.zeros(3)))
        with pytest.raises(ValueError, match=r"batch\[3\] has first dimension 3 where the batch has 16 samples"):
            fit(model, data, [AdaptiveBatchSize("constant", micro_batch_size=8)])


class TestGoodputOnARealRun:
    def test_noise_and_step_time_are_measured_and_each_change_carries_its_reason(self) -> None:
        model = Classifier()
        callback = AdaptiveBatchSize(max_batch_size=64)
        fit(model, loader(), [callback], max_epochs=20)
        assert callback.controller.noise.grad_variance > 0
        assert callback.controller.step_time.measured
        for change in callback.history.changes:
            reasons = ("noise scale", f"{change.batch_size} takes less time per sample")  # as on a machine that is busy
            assert change.reason.startswith(tuple(f"{change.previous} -> {change.batch_size}: {r}" for r in reasons))
        assert callback.history.changes or callback.history.notes

    def test_dry_run_says_what_it_would_do_and_changes_nothing(self) -> None:
        plain, dry = Classifier(), Classifier()
        fit(plain, loader())
        callback = AdaptiveBatchSize(lambda m: 64, max_batch_size=64, adjust_every=1, dry_run=True)
        fit(dry, loader(), [callback])
        assert identical(weights(plain), weights(dry))
        assert [(c.previous, c.batch_size) for c in callback.history.changes] == [(16, 64)]
        assert callback.batch_size == 16

    @pytest.mark.parametrize("noise", ["auto", "micro_batches", "probe", "per_example"])
    def test_dry_run_measures_the_noise_by_passes_that_leave_no_trace(self, noise: str) -> None:
        plain, dry = Classifier(), Classifier()
        fit(plain, loader(), max_epochs=6)
        callback = AdaptiveBatchSize(dry_run=True, noise=noise)
        fit(dry, loader(), [callback], max_epochs=6)
        assert callback.controller.noise.measurements > 10
        assert identical(weights(plain), weights(dry))
        assert plain.logged == dry.logged

    def test_default_bounds_are_the_loaders_size_and_a_tenth_of_the_data(self) -> None:
        callback = AdaptiveBatchSize(lambda m: 10**6, adjust_every=1)
        fit(Classifier(), loader(), [callback])
        assert callback.batch_size == SAMPLES // 10
        callback = AdaptiveBatchSize(lambda m: 1, adjust_every=1)
        fit(Classifier(), loader(), [callback])
        assert callback.batch_size == B0

    def test_a_policy_sees_plain_numbers_once_every_adjust_every_updates(self) -> None:
        seen: list[Measurement] = []

        def policy(measurement: Measurement) -> float:
            seen.append(measurement)
            return measurement.batch_size

        fit(Classifier(), loader(), [AdaptiveBatchSize(policy, adjust_every=4)])
        assert [m.update for m in seen] == [4, 8, 12, 16, 20, 24]
        assert all(isinstance(m.loss, float) and math.isfinite(m.loss) for m in seen)
        assert {m.reference_batch_size for m in seen} == {B0}


class TestAfterwards:
    def test_the_trainer_is_given_back_as_it_was(self) -> None:
        model = Classifier()
        made = fit(model, loader(), [resizing()])
        loop = made.fit_loop.epoch_loop
        for target in (made._data_connector, loop.automatic_optimization, loop):
            for name in ("_prepare_dataloader", "_make_closure", "_optimizer_step", "_update_learning_rates"):
                assert name not in target.__dict__

    def test_the_trainer_is_given_back_after_an_exception_too(self) -> None:
        class Breaks(pl.Callback):
            def on_train_batch_end(self, *args: Any) -> None:
                raise RuntimeError("on purpose")

        pl.seed_everything(0, verbose=False)
        callback = resizing()
        made = pl.Trainer(
            accelerator="cpu", max_epochs=1, callbacks=[callback, Breaks()], logger=False, enable_checkpointing=False,
            enable_progress_bar=False, enable_model_summary=False,
        )  # fmt: skip
        with pytest.raises(RuntimeError, match="on purpose"):
            made.fit(Classifier(), loader())
        assert "_make_closure" not in made.fit_loop.epoch_loop.automatic_optimization.__dict__

    @pytest.mark.parametrize("breaks", [False, True])
    def test_hooks_that_do_nothing_are_there_again_and_those_of_a_subclass_are_called(self, breaks: bool) -> None:
        called = []

        class Own(AdaptiveBatchSize):
            def on_before_backward(self, *args: Any) -> None:
                super().on_before_backward(*args)
                called.append("on_before_backward")

            def on_after_backward(self, *args: Any) -> None:
                super().on_after_backward(*args)
                called.append("on_after_backward")
                if breaks:
                    raise RuntimeError("on purpose")

        callback = Own("constant")
        with pytest.raises(RuntimeError, match="on purpose") if breaks else nullcontext():
            fit(Classifier(), loader(), [callback])
        updates = 1 if breaks else len(callback.history)
        assert called == ["on_before_backward", "on_after_backward"] * updates
        for name in ("on_before_zero_grad", "on_before_backward", "on_after_backward", "on_before_optimizer_step"):
            assert callable(getattr(callback, name))

    @pytest.mark.parametrize("scheduler", ["onecycle", "cosine"])
    def test_tuners_work_with_a_schedule_over_the_steps_of_the_run(self, scheduler: str, tmp_path: Path) -> None:
        class Tuned(Classifier):
            lr = batch_size = 4

            def train_dataloader(self) -> Any:
                return loader(batch_size=self.batch_size)

            def val_dataloader(self) -> Any:
                return loader(batch_size=32, shuffle=False)

        model, callback = Tuned(scheduler), AdaptiveBatchSize(Constant(64), max_batch_size=64, adjust_every=1)
        made = trainer([callback], max_epochs=2, default_root_dir=tmp_path)
        Tuner(made).scale_batch_size(model, max_trials=2)
        Tuner(made).lr_find(model, num_training=10, max_lr=0.5)
        model.epochs.clear()
        made.fit(model)
        assert callback.batch_size == 64
        assert [sorted(epoch) for epoch in model.epochs[-2:]] == [list(range(SAMPLES))] * 2

    def test_a_second_fit_goes_on_where_the_first_ended(self) -> None:
        callback = AdaptiveBatchSize(lambda m: 64, max_batch_size=64, adjust_every=1)
        model = Classifier()
        fit(model, loader(), [callback])
        fit(model, loader(), [callback])
        assert callback.history.updates[-1].samples == 4 * SAMPLES
        assert len(callback.history.changes) == 1


class TestRefusals:
    @pytest.mark.parametrize(
        ("arguments", "sentence"),
        [
            ({"policy": "goodputt"}, "goodputt"),
            ({"lr_scaling": "cubic"}, "cubic"),
            ({"schedule_clock": "wall"}, "schedule_clock='wall'"),
            ({"loss_reduction": "median"}, "loss_reduction='median'"),
            ({"micro_batch_size": 0}, "micro_batch_size=0"),
            ({"min_batch_size": 64, "max_batch_size": 32}, "min_batch_size=64 is above max_batch_size=32"),
            ({"max_batch_size": 0}, "max_batch_size=0"),
            ({"adjust_every": 0}, "adjust_every=0"),
            ({"history_size": 0}, "history_size=0"),
            ({"policy": "godput"}, "'godput' is not a known policy: use 'goodput', or another of"),
            ({"dry_run": "no"}, "dry_run='no' must be True or False"),
            ({"verbose": "yes"}, "verbose='yes' must be True or False"),
            ({"quantize": "no"}, "quantize='no' must be True or False"),
            ({"seed": "x"}, "seed='x' must be a whole number, or None"),
        ],
        ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
    )
    def test_a_bad_argument_is_one_clear_sentence(self, arguments: dict[str, Any], sentence: str) -> None:
        with pytest.raises(ValueError, match=sentence):
            AdaptiveBatchSize(**arguments)

    def test_a_maximum_below_the_loaders_size_is_refused_at_the_start_of_fit(self) -> None:
        with pytest.raises(ValueError, match="max_batch_size=8 is below the batch size 16"):
            fit(Classifier(), loader(), [AdaptiveBatchSize(max_batch_size=8)])

    def test_a_loader_that_does_not_batch_is_refused(self) -> None:
        with pytest.raises(ValueError, match="batch_size=None"):
            fit(Classifier(), loader(batch_size=None, shuffle=False), [AdaptiveBatchSize()])  # type: ignore[arg-type]

    def test_several_optimizers_are_refused(self) -> None:
        class Two(Classifier):
            def __init__(self) -> None:
                super().__init__()
                self.automatic_optimization = False

            def configure_optimizers(self) -> Any:
                return [torch.optim.SGD(self.parameters(), 0.1), torch.optim.SGD(self.parameters(), 0.1)]

        with pytest.raises(ValueError, match="exactly one optimizer, but configure_optimizers returned 2"):
            fit(Two(), loader(), [AdaptiveBatchSize(micro_batch_size=None)])

    def test_data_that_is_no_loader_is_refused(self) -> None:
        with pytest.raises(TypeError, match="DataLoader"):
            fit(Classifier(), [1, 2, 3], [AdaptiveBatchSize()])


def _columns() -> list[torch.Tensor]:
    data = loader().dataset
    return [data.x, data.y, torch.arange(SAMPLES), torch.zeros(SAMPLES)]  # type: ignore[attr-defined]


def _double(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.double() if tensor.is_floating_point() else tensor
