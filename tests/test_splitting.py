"""An update that runs as micro-batches equals the whole one: gradients, weights, logs, metrics, outputs."""

from __future__ import annotations

import csv
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
import torchmetrics
from lightning_problems import fit
from pytorch_lightning.callbacks import (
    EMAWeightAveraging,
    LearningRateFinder,
    StochasticWeightAveraging,
    WeightAveraging,
)
from pytorch_lightning.loggers import CSVLogger
from pytorch_lightning.plugins import MixedPrecision
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from adaptive_batch.callbacks import AdaptiveBatchSize

SAMPLES = 53
BATCH = 16  # the last batch of an epoch has 5 samples
MICRO = 6  # 16 = 6 + 5 + 5, 5 = 5
FLOAT32, FLOAT64 = 1e-6, 1e-12
UPDATES = 5e-6  # weights in float32 after some dozen updates

Run = tuple["Module", pl.Trainer]


class Module(pl.LightningModule):
    """A classifier that keeps every gradient, logged value and output it sees."""

    reduction = "mean"

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 3))
        self.gradients: list[Tensor] = []
        self.outputs: list[Any] = []
        self.trace: list[dict[str, float]] = []
        self.steps = 0

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        x, y = batch
        loss = nn.functional.cross_entropy(self.net(x), y, reduction=self.reduction)
        self.log("loss", loss, on_step=True, on_epoch=True)
        return loss

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        self.steps += 1
        self.gradients.append(gradient_of(self))

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.outputs.append(outputs)
        self.trace.append(_seen(self.trainer))

    def on_train_epoch_end(self) -> None:
        self.trace.append(_seen(self.trainer))

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)


def _seen(trainer: pl.Trainer) -> dict[str, float]:
    seen: dict[str, Any] = {
        **trainer.callback_metrics,
        **{f"bar/{k}": v for k, v in trainer.progress_bar_metrics.items()},
    }
    return {k: float(v) for k, v in seen.items() if "adaptive" not in k}


def data(*, double: bool = False, samples: int = SAMPLES) -> DataLoader[Any]:
    generator = torch.Generator().manual_seed(1)
    x, y = torch.randn(samples, 8, generator=generator), torch.randint(0, 3, (samples,), generator=generator)
    return DataLoader(TensorDataset(x.double() if double else x, y), BATCH)


def splitting(**kwargs: Any) -> AdaptiveBatchSize:
    return AdaptiveBatchSize("constant", **{"micro_batch_size": MICRO, "verbose": False, **kwargs})


def both(
    make: Callable[[], Module], loader: Any = None, *, adaptive: dict[str, Any] | None = None, **options: Any
) -> tuple[Run, Run]:
    """The same training, plain and split."""
    runs = []
    for split in (False, True):
        callback = splitting(**(adaptive or {}))
        trainer_options = {k: v() if callable(v) else v for k, v in options.items()}
        callbacks = [*trainer_options.pop("callbacks", []), *([callback] if split else [])]
        model = make()
        trainer = fit(model, loader or data(), callbacks, **{"max_epochs": 3, **trainer_options})
        if split:
            assert max(u.micro_batch_size for u in callback.history.updates) <= MICRO
        runs.append((model, trainer))
    return runs[0], runs[1]


def relative(a: Tensor, b: Tensor) -> float:
    return float((a - b).norm() / b.norm())


def gradient_of(model: nn.Module) -> Tensor:
    return torch.cat([torch.zeros(0), *(p.grad.flatten() for p in model.parameters() if p.grad is not None)])


def weights(model: nn.Module) -> Tensor:
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def assert_equal(plain: Run, split: Run, *, gradient: float = FLOAT32, updates: float = UPDATES) -> None:
    """The first gradient is that of equal weights; the later ones have the rounding of all updates before."""
    assert relative(split[0].gradients[0], plain[0].gradients[0]) < gradient
    assert len(split[0].gradients) == len(plain[0].gradients)
    assert relative(weights(split[0]), weights(plain[0])) < updates
    assert split[1].global_step == plain[1].global_step
    assert_logs_equal(plain[0].trace, split[0].trace, max(updates, 2 * FLOAT32))


def assert_logs_equal(plain: list[dict[str, float]], split: list[dict[str, float]], tolerance: float) -> None:
    assert len(plain) == len(split)
    for before, after in zip(plain, split, strict=True):
        assert list(after) == list(before)
        assert after == pytest.approx(before, rel=tolerance, abs=tolerance, nan_ok=True)


class TestGradients:
    def test_float32_with_an_uneven_last_part(self) -> None:
        assert_equal(*both(Module))

    def test_float64(self) -> None:
        plain, split = both(lambda: Module().double(), data(double=True))
        assert relative(split[0].gradients[0], plain[0].gradients[0]) < FLOAT64
        assert relative(weights(split[0]), weights(plain[0])) < FLOAT64

    def test_the_comparison_can_fail(self) -> None:
        plain, split = both(Module, adaptive={"loss_reduction": "sum"})
        assert relative(split[0].gradients[0], plain[0].gradients[0]) > 0.1

    def test_a_loss_that_is_a_sum(self) -> None:
        class Sum(Module):
            reduction = "sum"

            def configure_optimizers(self) -> Any:
                return torch.optim.SGD(self.parameters(), lr=0.005)

        assert_equal(*both(Sum, adaptive={"loss_reduction": "sum"}))

    @pytest.mark.parametrize("clipping", [("norm", 0.05), ("value", 0.01)])
    def test_clipping(self, clipping: tuple[str, float]) -> None:
        algorithm, value = clipping
        plain, split = both(Module, gradient_clip_val=value, gradient_clip_algorithm=algorithm)
        unclipped, _ = both(Module)
        assert relative(plain[0].gradients[0], unclipped[0].gradients[0]) < 1e-12  # seen before clipping
        assert relative(weights(plain[0]), weights(unclipped[0])) > 1e-2, "clips nothing: vacuous"
        assert_equal(plain, split)

    @pytest.mark.parametrize("accumulate", [2, 3])
    def test_accumulation_with_a_short_last_window(self, accumulate: int) -> None:
        plain, split = both(Module, accumulate_grad_batches=accumulate)
        assert plain[0].steps == 3 * math.ceil(4 / accumulate)
        assert_equal(plain, split)

    def test_closures_that_are_called_many_times(self) -> None:
        class Newton(Module):
            def configure_optimizers(self) -> Any:
                return torch.optim.LBFGS(self.parameters(), lr=0.5, max_iter=5)

        plain, split = both(lambda: Newton().double(), data(double=True), max_epochs=2)
        assert relative(weights(split[0]), weights(plain[0])) < 1e-9
        assert_logs_equal(plain[0].trace, split[0].trace, 2 * FLOAT32)

    @pytest.mark.parametrize(("precision", "rounding"), [("bf16-mixed", torch.bfloat16), ("16-mixed", torch.float16)])
    def test_mixed_precision(self, precision: Any, rounding: torch.dtype) -> None:
        def plugins() -> list[Any]:
            scaler = torch.amp.GradScaler("cpu", init_scale=2.0**14) if precision == "16-mixed" else None
            return [MixedPrecision(precision, "cpu", scaler=scaler)]

        plain, split = both(Module, plugins=plugins)
        eps = torch.finfo(rounding).eps
        assert relative(split[0].gradients[0], plain[0].gradients[0]) < eps
        assert relative(weights(split[0]), weights(plain[0])) < eps
        assert_logs_equal(plain[0].trace, split[0].trace, eps)
        assert plain[0].gradients[0].norm() == pytest.approx(split[0].gradients[0].norm(), rel=eps)

    def test_a_part_that_is_skipped_adds_nothing(self) -> None:
        class Skips(Module):
            def training_step(self, batch: Any, batch_idx: int) -> Any:
                loss = super().training_step(batch, batch_idx)
                return {"loss": loss, "rows": batch[1]} if len(batch[1]) < MICRO else None

        model = Skips()
        with pytest.warns(UserWarning, match="`training_step` returned `None`"):
            fit(model, data(), [splitting()], max_epochs=1, limit_train_batches=1)
        reference = Module()
        fit(reference, data(), max_epochs=0)
        x, y = data().dataset.tensors  # type: ignore[attr-defined]
        loss: Any = (
            5 / 16 * sum(nn.functional.cross_entropy(reference.net(x[s]), y[s]) for s in (slice(6, 11), slice(11, 16)))
        )
        loss.backward()
        assert relative(model.gradients[0], gradient_of(reference)) < FLOAT32
        assert torch.equal(model.outputs[0]["rows"], y[6:16])

    @pytest.mark.filterwarnings("ignore:`training_step` returned `None`")
    def test_batches_that_are_all_skipped_leave_the_weights(self) -> None:
        class Skips(Module):
            def training_step(self, batch: Any, batch_idx: int) -> Any:
                return None

        plain, split = both(Skips)
        assert torch.equal(weights(split[0]), weights(plain[0]))
        assert split[0].outputs == plain[0].outputs


class LanguageModel(Module):
    """A loss that is the mean over the tokens that are not padding."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Embedding(11, 8), nn.Linear(8, 11))

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        tokens, targets = batch["tokens"], batch["targets"]
        logits = self.net(tokens)
        loss = nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-100)
        counted = targets != -100
        accuracy = (logits.argmax(-1) == targets)[counted].float().mean()
        self.log("loss", loss, on_step=True, on_epoch=True, prog_bar=True)
        self.log("by_sentence", loss, on_step=True, on_epoch=True, batch_size=len(tokens))
        self.log("accuracy", accuracy, on_step=True, on_epoch=True)
        self.log("tokens", counted.sum().float(), on_step=True, on_epoch=True, reduce_fx="sum")
        return {"loss": loss, "accuracy": accuracy}


def tokens_of(part: Any, whole: Any) -> Any:
    return (part["targets"] != -100).sum() / (whole["targets"] != -100).sum()


class TestTokenMeans:
    @staticmethod
    def sentences() -> DataLoader[Any]:
        generator = torch.Generator().manual_seed(2)
        rows = []
        for i in range(SAMPLES):
            tokens = torch.randint(0, 11, (12,), generator=generator)
            length = int(torch.randint(1, 12, (1,), generator=generator)) if i % 16 < 6 else 1
            targets = torch.where(torch.arange(12) < length, tokens.roll(1), -100)
            rows.append({"tokens": tokens, "targets": targets})
        return DataLoader(rows, BATCH)  # type: ignore[arg-type]

    def test_weight_fn_makes_gradients_logs_and_outputs_equal(self) -> None:
        plain, split = both(LanguageModel, self.sentences(), adaptive={"weight_fn": tokens_of})
        assert_equal(plain, split)
        for a, b in zip(plain[0].outputs, split[0].outputs, strict=True):
            assert float(b["loss"]) == pytest.approx(float(a["loss"]), rel=1e-5)
            assert float(b["accuracy"]) == pytest.approx(float(a["accuracy"]), rel=1e-5)

    def test_sample_weights_would_be_wrong_by_several_per_cent(self) -> None:
        plain, split = both(LanguageModel, self.sentences())
        assert relative(split[0].gradients[0], plain[0].gradients[0]) > 0.03


class Logs(Module):
    """Everything that self.log can do."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        x, y = batch
        logits = self.net(x)
        loss = nn.functional.cross_entropy(logits, y)
        hits = (logits.argmax(-1) == y).float()
        self.log("both", loss, on_step=True, on_epoch=True, prog_bar=True)
        self.log("step", loss, on_step=True, on_epoch=False)
        self.log("epoch", loss, on_step=False, on_epoch=True)
        self.log("accuracy", hits.mean(), on_step=True, on_epoch=True)
        self.log("average", hits.mean(), on_step=True, on_epoch=True, reduce_fx="avg")
        self.log("hits", hits.sum(), on_step=True, on_epoch=True, reduce_fx="sum")
        self.log("total", hits.sum(), on_step=True, on_epoch=True, reduce_fx=torch.sum, prog_bar=True)
        self.log("highest", x.max(), on_step=True, on_epoch=True, reduce_fx="max")
        self.log("lowest", x.min(), on_step=True, on_epoch=True, reduce_fx=min)
        self.log("highest_loss", loss, on_step=True, on_epoch=True, reduce_fx="max")
        self.log("sum_of_losses", loss, on_step=True, on_epoch=True, reduce_fx="sum")
        self.log("number", float(x.mean()), on_step=True, on_epoch=True)
        self.log("constant", 7.0, on_step=True, on_epoch=True)
        self.log("weighted", hits.mean(), on_step=True, on_epoch=True, batch_size=2 * len(y))
        self.log("unlogged", loss, logger=False)
        self.log_dict({"first": loss, "second": x.mean()}, on_step=True, on_epoch=True, prog_bar=True)
        if batch_idx % 2 == 0:
            self.log("sometimes", x.mean(), on_step=True, on_epoch=True)
        return loss

    def on_after_backward(self) -> None:
        self.log("grad_norm", gradient_of(self).norm(), on_step=True, on_epoch=True)

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        self.log("at_start", float(batch_idx), on_step=True, on_epoch=True)


class TestLogs:
    def test_every_kind_of_logged_value(self) -> None:
        plain, split = both(Logs)
        assert {"both_step", "both_epoch", "highest", "sum_of_losses_epoch", "grad_norm"} <= set(plain[0].trace[-1])
        assert any(key.startswith("bar/") for key in plain[0].trace[0])
        assert_equal(plain, split)

    def test_the_loss_of_a_sum_is_logged_as_the_sum(self) -> None:
        class Sum(Logs):
            def training_step(self, batch: Any, batch_idx: int) -> Any:
                x, y = batch
                logits = self.net(x)
                loss = nn.functional.cross_entropy(logits, y, reduction="sum")
                self.log("loss", loss, on_step=True, on_epoch=True)
                self.log("accuracy", (logits.argmax(-1) == y).float().mean(), on_step=True, on_epoch=True)
                return {"loss": loss, "mean": loss.detach() / len(y)}

            def configure_optimizers(self) -> Any:
                return torch.optim.SGD(self.parameters(), lr=0.005)

        plain, split = both(Sum, adaptive={"loss_reduction": "sum"})
        assert_equal(plain, split)
        for a, b in zip(plain[0].outputs, split[0].outputs, strict=True):
            assert float(b["mean"]) == pytest.approx(float(a["mean"]), rel=1e-5)

    def test_values_under_accumulation(self) -> None:
        class NoNorm(Logs):
            def on_after_backward(self) -> None:
                pass

        assert_equal(*both(NoNorm, accumulate_grad_batches=2))

    def test_a_reduction_that_lightning_refuses_is_refused_alike(self) -> None:
        class Custom(Module):
            def training_step(self, batch: Any, batch_idx: int) -> Any:
                loss = super().training_step(batch, batch_idx)
                self.log("custom", loss, reduce_fx=lambda values: values.median())
                return loss

        for callbacks in ([], [splitting()]):
            with pytest.raises(Exception, match=r"Only `self\.log.* are supported"):
                fit(Custom(), data(), callbacks)

    def test_what_the_logger_gets(self, tmp_path: Path) -> None:
        rows = []
        for name, callbacks in (("plain", []), ("split", [splitting()])):
            logger = CSVLogger(tmp_path, name=name)
            fit(Logs(), data(), callbacks, logger=logger, log_every_n_steps=1, max_epochs=2)
            with open(Path(logger.log_dir) / "metrics.csv") as file:
                rows.append([{k: v for k, v in row.items() if "adaptive" not in k} for row in csv.DictReader(file)])
        assert len(rows[0]) == len(rows[1]) > 8
        for before, after in zip(*rows, strict=True):
            assert {k: float(v) for k, v in after.items() if v} == pytest.approx(
                {k: float(v) for k, v in before.items() if v}, rel=UPDATES, abs=UPDATES
            )


class Spread(torchmetrics.Metric):
    """A metric of a user's own: states of every kind, and nothing said about how they combine."""

    total: Tensor
    number: Tensor
    top: Tensor
    bottom: Tensor
    values: list[Tensor]

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.add_state("total", torch.tensor(0.0), dist_reduce_fx="sum")
        self.add_state("number", torch.tensor(0.0), dist_reduce_fx="sum")
        self.add_state("top", torch.tensor(-math.inf), dist_reduce_fx="max")
        self.add_state("bottom", torch.tensor(math.inf), dist_reduce_fx="min")
        self.add_state("values", [], dist_reduce_fx="cat")

    def update(self, values: Tensor) -> None:
        self.total = self.total + values.sum()
        self.number = self.number + len(values)
        self.top = torch.maximum(self.top, values.max())
        self.bottom = torch.minimum(self.bottom, values.min())
        self.values.append(values)

    def compute(self) -> Any:
        values = torchmetrics.utilities.dim_zero_cat(self.values)
        return (self.top - self.bottom) * self.total / self.number + values.median()


class Combining(Spread):
    full_state_update = False


class MeanState(torchmetrics.Metric):
    """A state that is a mean of means."""

    mean: Tensor
    full_state_update = False

    def __init__(self) -> None:
        super().__init__()
        self.add_state("mean", torch.tensor(0.0), dist_reduce_fx="mean")

    def update(self, values: Tensor) -> None:
        self.mean = values.mean()

    def compute(self) -> Tensor:
        return self.mean


class Measured(Module):
    """torchmetrics objects of all kinds, used in all ways."""

    read: list[dict[str, float]]

    def __init__(self) -> None:
        super().__init__()
        task: Any = {"task": "multiclass", "num_classes": 3}
        self.mean = torchmetrics.MeanMetric()
        self.total = torchmetrics.SumMetric()
        self.cat = torchmetrics.CatMetric()
        self.highest = torchmetrics.MaxMetric()
        self.accuracy = torchmetrics.Accuracy(**task)
        self.area = torchmetrics.AUROC(**task)  # keeps every prediction
        self.correlation = torchmetrics.PearsonCorrCoef()  # needs its full state
        self.spread, self.combining, self.means = Spread(), Combining(), MeanState()
        self.unused = torchmetrics.MeanMetric()
        self.called = torchmetrics.MetricCollection(
            [torchmetrics.Precision(**task, average="macro"), torchmetrics.Recall(**task, average="macro")],
            prefix="called_",
        )
        self.updated = torchmetrics.MetricCollection(
            {"f1": torchmetrics.F1Score(**task, average="macro"), "recall": torchmetrics.Recall(**task)},
            prefix="updated_",
        )
        self.read = []

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        x, y = batch
        logits = self.net(x)
        loss = nn.functional.cross_entropy(logits, y)
        each: Any = {"on_step": True, "on_epoch": True}
        self.mean(loss.detach(), weight=len(y))
        self.total(len(y))
        self.cat.update(logits.detach()[:, 0])
        self.highest(x.max())
        self.accuracy(logits, y)
        self.area(logits.softmax(-1), y)
        self.correlation(x[:, 0], logits.detach()[:, 0])
        for metric in (self.spread, self.combining, self.means):
            metric(x[:, 1])
        for name in (
            "mean",
            "total",
            "highest",
            "accuracy",
            "area",
            "correlation",
            "spread",
            "combining",
            "means",
        ):
            self.log(name, getattr(self, name), **each)
        self.called(logits, y)
        self.log_dict(self.called, **each)
        self.updated.update(logits, y)
        self.log_dict(self.updated, on_step=False, on_epoch=True)
        return loss

    def on_train_epoch_end(self) -> None:
        super().on_train_epoch_end()
        cat = self.cat.compute()
        self.cat.reset()
        self.read.append({"cat": float(cat.sum()), "rows": float(len(cat)), "unused": float(self.unused.mean_value)})


@pytest.mark.filterwarnings("ignore:No positive samples in targets")  # of an area under a part's curve
class TestMetrics:
    def test_step_and_epoch_values_of_all_kinds(self) -> None:
        plain, split = both(Measured)
        names = set(plain[0].trace[-1])
        assert {
            "area_step",
            "spread_step",
            "called_MulticlassRecall_step",
            "updated_f1",
            "correlation_epoch",
        } <= names
        assert_equal(plain, split, updates=2e-5)
        read: list[Any] = [plain[0].read, split[0].read]
        assert_logs_equal(read[0], read[1], 2e-5)
        assert read[0][0]["rows"] == SAMPLES

    def test_the_metrics_are_given_back_as_they_were(self) -> None:
        _, (model, _) = both(Measured)
        assert all("forward" not in m.__dict__ for m in model.modules() if isinstance(m, torchmetrics.Metric))


class TestOutputs:
    def test_entries_per_sample_are_joined_and_scalars_weighted(self) -> None:
        class Returns(Module):
            def training_step(self, batch: Any, batch_idx: int) -> Any:
                x, y = batch
                logits = self.net(x)
                loss = nn.functional.cross_entropy(logits, y)
                return {
                    "loss": loss,
                    "copy": loss.detach(),
                    "logits": logits,
                    "mean": x.mean(),
                    "number": float(x.mean()),
                    "hits": (logits.argmax(-1) == y).sum(),
                    "names": [f"row {int(i)}" for i in y],
                    "nested": {"rows": x, "pair": (x[:, 0], x.mean())},
                    "word": "train",
                    "index": batch_idx,
                    "nothing": None,
                }

        plain, split = both(Returns)
        for a, b in zip(plain[0].outputs, split[0].outputs, strict=True):
            assert list(a) == list(b)
            for name in ("names", "word", "index", "nothing"):
                assert a[name] == b[name]
            for name in ("loss", "copy", "logits", "mean", "hits"):
                torch.testing.assert_close(b[name].detach(), a[name].detach(), rtol=1e-4, atol=1e-5)
            assert b["number"] == pytest.approx(a["number"], rel=1e-5)
            assert torch.equal(a["nested"]["rows"], b["nested"]["rows"])
            assert torch.equal(a["nested"]["pair"][0], b["nested"]["pair"][0])
            torch.testing.assert_close(b["nested"]["pair"][1], a["nested"]["pair"][1])

    def test_joined_outputs_hold_no_graph(self) -> None:
        class Returns(Module):
            def training_step(self, batch: Any, batch_idx: int) -> Any:
                return {"loss": super().training_step(batch, batch_idx), "logits": self.net(batch[0])}

        _, (model, _) = both(Returns, max_epochs=1)
        assert model.outputs[0]["logits"].grad_fn is None
        assert model.outputs[0]["loss"].grad_fn is None


class TestCompiled:
    def test_updates_are_not_recompiled(self) -> None:
        compiled: list[int] = []

        def backend(graph: Any, inputs: Any) -> Any:
            compiled.append(len(updates))
            return graph.forward

        updates: list[int] = []

        class Compiled(Module):
            def __init__(self) -> None:
                super().__init__()
                self.net = torch.compile(self.net, backend=backend, dynamic=False)  # type: ignore[assignment]

            def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
                super().on_train_batch_end(outputs, batch, batch_idx)
                updates.append(batch_idx)

        torch._dynamo.reset()
        plain, _ = both(Module, max_epochs=4)
        model = Compiled()
        fit(model, data(), [splitting()], max_epochs=4)
        assert relative(weights(model), weights(plain[0])) < UPDATES
        assert len(updates) == 16
        assert compiled == [0, 0]  # once for 6 samples, once for 5, and that is all


class TestOtherCallbacks:
    @pytest.mark.filterwarnings(
        "ignore:Be aware that when using `ckpt_path`"
    )  # Lightning's, of any callback with a state
    def test_the_learning_rate_finder(self, tmp_path: Path) -> None:
        class Finds(Module):
            lr = 0.1

            def configure_optimizers(self) -> Any:
                return torch.optim.SGD(self.parameters(), lr=self.lr)

        plain, split = both(
            Finds,
            callbacks=lambda: [LearningRateFinder(num_training_steps=30, early_stop_threshold=None)],
            max_epochs=8,
            default_root_dir=tmp_path,
        )
        assert plain[0].lr != 0.1
        assert split[0].lr == pytest.approx(plain[0].lr, rel=1e-6)
        assert_equal(plain, split)

    @pytest.mark.parametrize(
        "make",
        [
            lambda: StochasticWeightAveraging(swa_lrs=0.05, swa_epoch_start=2),
            lambda: WeightAveraging(),
            lambda: EMAWeightAveraging(decay=0.9),
        ],
        ids=["stochastic", "average", "exponential"],
    )
    def test_averages_of_the_weights(self, make: Any) -> None:
        plain, split = both(Module, callbacks=lambda: [make()], max_epochs=5)
        alone, _ = both(Module, max_epochs=5)
        assert relative(weights(plain[0]), weights(alone[0])) > 1e-3, "averages nothing: vacuous"
        assert_equal(plain, split)
