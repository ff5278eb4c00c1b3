"""GradientNoiseMonitor: right numbers, and a run that is bit for bit the unobserved one."""

from __future__ import annotations

import io
import logging
import math
import os
import socket
import warnings
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from lightning_problems import Classifier, fit, loader
from lightning_problems import trainer as make_trainer
from reference import exact_noise, per_example_gradients
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from adaptive_batch.callbacks import AdaptiveBatchSize, GradientNoiseMonitor
from adaptive_batch.policies import Milestones

NAMES = ("noise_scale", "grad_sq_norm", "grad_variance", "noise_scale_low", "noise_scale_high")


def logged(trainer: pl.Trainer) -> dict[str, float]:
    metrics = {k.removeprefix("adaptive_batch/"): float(v) for k, v in trainer.callback_metrics.items()}
    return {name: metrics[name] for name in NAMES if name in metrics}


def trace(model: Classifier) -> list[Any]:
    """Everything that a run leaves: parameters, buffers, losses, what was logged."""
    state = [t.clone() for t in model.state_dict().values()]
    return [*state, model.loss_trace, model.logged, model.used_lr, torch.get_rng_state()]


def same(first: list[Any], second: list[Any]) -> bool:
    return all(torch.equal(a, b) if isinstance(a, Tensor) else a == b for a, b in zip(first, second, strict=True))


# ------------------------------------------------------------------------------------------ changes nothing


@pytest.mark.parametrize(
    ("noise", "expected", "options"),
    [
        ("auto", "per_example", {}),
        ("auto", "micro_batches", {"accumulate_grad_batches": 2}),
        ("auto", "per_example", {"precision": "bf16-mixed"}),
        ("auto", "per_example", {"gradient_clip_val": 0.1}),
        ("per_example", "per_example", {"accumulate_grad_batches": 3}),
        ("probe", "probe", {}),
        ("probe", "probe", {"accumulate_grad_batches": 2, "precision": "bf16-mixed"}),
        ("differenced", "differenced", {}),
    ],
)
def test_an_observed_run_is_bitwise_the_unobserved_one(noise: str, expected: str, options: dict[str, Any]) -> None:
    plain, observed = Classifier("onecycle"), Classifier("onecycle")
    fit(plain, loader(), **options)
    unobserved = trace(plain)
    monitor = GradientNoiseMonitor(noise=noise, every=1)
    fit(observed, loader(), [monitor], **options)
    assert same(unobserved, trace(observed))
    assert monitor.source == expected and monitor.noise.measurements > 5


def test_moments_of_adam_are_read_without_a_trace() -> None:
    plain, observed = Classifier(optimizer="adam"), Classifier(optimizer="adam")
    fit(plain, loader(), max_epochs=6)
    unobserved = trace(plain)
    monitor = GradientNoiseMonitor(noise="adam_moments")
    fit(observed, loader(), [monitor], max_epochs=6)
    assert same(unobserved, trace(observed)) and monitor.noise.measurements == 2


class Normalised(Classifier):
    """With BatchNorm, whose buffers every forward pass changes, and a metric."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(8, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 2))


def test_under_batch_normalisation_a_probe_puts_the_buffers_back() -> None:
    plain, observed = Normalised(), Normalised()
    fit(plain, loader())
    unobserved = trace(plain)
    monitor = GradientNoiseMonitor(every=2)
    fit(observed, loader(), [monitor])
    assert same(unobserved, trace(observed))
    assert monitor.source == "probe" and monitor.noise.measurements > 5


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize("noise", ["auto", "micro_batches"])
def test_compiled_models_are_measured_and_unchanged(backend: str, noise: str) -> None:
    def run(callbacks: list[pl.Callback]) -> list[Any]:
        torch._dynamo.reset()
        model = Classifier()
        model.net.compile(backend=backend)
        fit(model, loader(), callbacks, accumulate_grad_batches=2 if noise == "micro_batches" else 1)
        return trace(model)

    monitor = GradientNoiseMonitor(noise=noise, every=1)
    assert same(run([]), run([monitor]))
    assert monitor.source == ("probe" if noise == "auto" else noise) and monitor.noise.measurements > 5


def test_hooks_are_gone_after_the_fit_and_after_an_exception() -> None:
    class Failing(Classifier):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            if batch_idx == 3:
                raise RuntimeError("stop")
            return super().training_step(batch, batch_idx)

    monitor = GradientNoiseMonitor(every=1)
    model = Failing()
    with pytest.raises(RuntimeError, match="stop"):
        fit(model, loader(), [monitor])
    assert not any(layer._forward_hooks for layer in model.modules())
    assert not any(p._backward_hooks for p in model.parameters())


# ------------------------------------------------------------------------------------------- right numbers


class Frozen(Classifier):
    """Stands still, so that every update draws from the same gradients."""

    def __init__(self, optimizer: str = "sgd") -> None:
        super().__init__(optimizer=optimizer, dropout=0.0)

    def configure_optimizers(self) -> Any:
        if self.optimizer == "adam":
            return torch.optim.AdamW(self.parameters(), lr=0.0)
        return torch.optim.SGD(self.parameters(), lr=0.0)


def exact(model: Classifier, data: DataLoader[Any]) -> tuple[float, float]:
    """``(|G|^2, tr(Sigma))`` that draws without replacement can know."""
    gradients = per_example_gradients(model.net, nn.functional.cross_entropy, data.dataset.x, data.dataset.y)  # type: ignore[attr-defined]
    sq_norm, variance = exact_noise(gradients)
    return sq_norm - variance / len(gradients), variance


@pytest.mark.parametrize(
    ("noise", "options"),
    [
        ("per_example", {}),
        ("per_example", {"accumulate_grad_batches": 3}),
        ("micro_batches", {"accumulate_grad_batches": 2}),
        ("probe", {}),
        ("probe", {"gradient_clip_val": 1e-3}),
        ("differenced", {}),
        ("adam_moments", {}),
    ],
)
def test_measured_noise_agrees_with_all_per_example_gradients(noise: str, options: dict[str, Any]) -> None:
    data, model = loader(403, 16), Frozen("adam" if noise == "adam_moments" else "sgd")
    epochs = 40 if noise == "adam_moments" else 8
    monitor = GradientNoiseMonitor(noise=noise, every=1)
    trainer = fit(model, data, [monitor], max_epochs=epochs, **options)
    sq_norm, variance = exact(model, data)
    low, high = monitor.noise.interval(0.999)
    assert low < variance / sq_norm < high < math.inf
    assert monitor.noise.grad_variance == pytest.approx(variance, rel=0.15)
    assert monitor.noise.grad_sq_norm == pytest.approx(sq_norm, rel=0.35)
    values = logged(trainer)
    assert values["noise_scale"] == pytest.approx(monitor.noise.noise_scale)
    assert (values["noise_scale_low"], values["noise_scale_high"]) == pytest.approx(monitor.noise.interval())


def test_sum_reduced_losses_have_the_same_noise() -> None:
    class Summed(Frozen):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return super().training_step(batch, batch_idx) * len(batch[0])

    for noise, accumulate in (("per_example", 1), ("probe", 1), ("micro_batches", 2)):
        mean, summed = (GradientNoiseMonitor(noise=noise, loss_reduction=r, every=1) for r in ("mean", "sum"))
        fit(Frozen(), loader(80, 16), [mean], accumulate_grad_batches=accumulate)
        fit(Summed(), loader(80, 16), [summed], accumulate_grad_batches=accumulate)
        assert summed.noise.grad_variance == pytest.approx(mean.noise.grad_variance, rel=1e-4)
        assert summed.noise.grad_sq_norm == pytest.approx(mean.noise.grad_sq_norm, rel=1e-3, abs=1e-6)


def test_preconditioned_noise_is_another_quantity() -> None:
    values = []
    for preconditioned in (False, True):
        monitor = GradientNoiseMonitor(noise="probe", every=1, preconditioned=preconditioned)
        fit(Frozen("adam"), loader(), [monitor])
        values.append(monitor.noise.grad_variance)
    assert not 0.5 < values[1] / values[0] < 2
    assert monitor.noise.measurements == 26 - 5  # not before Adam has a metric


def test_confidence_is_that_of_the_logged_interval() -> None:
    monitor = GradientNoiseMonitor(every=1, confidence=0.5)
    values = logged(fit(Frozen(), loader(), [monitor], max_epochs=4))
    assert (values["noise_scale_low"], values["noise_scale_high"]) == pytest.approx(monitor.noise.interval(0.5))


def test_nothing_is_identified_before_there_is_evidence() -> None:
    monitor = GradientNoiseMonitor(every=5)
    values = logged(fit(Frozen(), loader(), [monitor]))
    assert monitor.noise.measurements == 6
    assert math.isnan(values["noise_scale"]) and math.isfinite(values["grad_variance"])


def test_updates_that_are_not_finite_are_skipped() -> None:
    class Overflowing(Frozen):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            loss = super().training_step(batch, batch_idx)
            return loss * (math.inf if batch_idx == 2 else 1.0)

        def on_before_optimizer_step(self, optimizer: Any) -> None:
            self.zero_grad()  # a step with them would leave nothing to measure

    monitor = GradientNoiseMonitor(every=1)
    fit(Overflowing(), loader(), [monitor])
    assert monitor.noise.skipped == 2 and math.isfinite(monitor.noise.grad_variance)


# ------------------------------------------------------------------------------------------------ ranks


def _rank(rank: int, folder: str, port: int) -> None:
    """One of two processes: runs with the monitor and without."""
    torch.set_num_threads(1)
    logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)
    warnings.simplefilter("ignore")
    cluster = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": 2, "RANK": rank, "LOCAL_RANK": rank}
    launched = {"TORCHELASTIC_RUN_ID": "test", "GROUP_RANK": 0, "LOCAL_WORLD_SIZE": 2}
    os.environ.update({name: str(value) for name, value in {**cluster, **launched}.items()})
    results: dict[str, Any] = {}
    for accumulate in (1, 2):
        options: dict[str, Any] = {"devices": 2, "strategy": "ddp", "accumulate_grad_batches": accumulate}
        plain, observed, frozen = Classifier(), Classifier(), Frozen()
        fit(plain, loader(104, 8), **options)
        unobserved = trace(plain)
        fit(observed, loader(104, 8), [GradientNoiseMonitor(every=1)], **options)
        unchanged = same(unobserved, trace(observed))
        monitor = GradientNoiseMonitor(every=1)
        fit(frozen, loader(404, 8), [monitor], max_epochs=8, **options)
        noise = monitor.noise
        results[str(accumulate)] = {
            "same": unchanged,
            "source": monitor.source,
            "noise": [noise.grad_sq_norm, noise.grad_variance, *noise.interval(0.999), noise.measurements],
            "exact": exact(frozen, loader(404, 8)),
        }
    torch.save(results, f"{folder}/{rank}")
    dist.destroy_process_group()


def test_several_ranks_measure_together_and_change_nothing(tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    mp.spawn(_rank, (str(tmp_path), port), nprocs=2)  # type: ignore[attr-defined]
    ranks = [torch.load(tmp_path / str(rank)) for rank in (0, 1)]
    for accumulate in ("1", "2"):
        for rank in ranks:
            found = rank[accumulate]
            assert found["same"] and found["source"] == "ranks"
            assert found["noise"] == ranks[0][accumulate]["noise"]
            sq_norm, variance = found["exact"]
            low, high = found["noise"][2:4]
            assert low < variance / sq_norm < high
            assert found["noise"][1] == pytest.approx(variance, rel=0.2)
    assert ranks[0]["1"]["noise"][4] == 8 * 26


# ------------------------------------------------------------------------------------------------ any loader


class Stream(IterableDataset[dict[str, Any]]):
    """Data without a length."""

    def __iter__(self) -> Any:
        generator = torch.Generator().manual_seed(1)
        for _ in range(100):
            yield {"x": torch.randn(8, generator=generator), "y": 1, "name": "a"}


class Named(Frozen):
    """Takes its batch as a dictionary, and no index."""

    def training_step(self, batch: Any) -> Tensor:  # type: ignore[override]
        return nn.functional.cross_entropy(self.net(batch["x"]), batch["y"])

    def on_train_batch_start(self, *args: Any) -> None:
        pass

    def on_train_batch_end(self, *args: Any) -> None:
        pass


@pytest.mark.parametrize("noise", ["per_example", "probe"])
def test_streams_and_dictionaries_are_measured(noise: str) -> None:
    monitor = GradientNoiseMonitor(noise=noise, every=1)
    fit(Named(), DataLoader(Stream(), batch_size=9), [monitor])
    assert monitor.noise.measurements == 22 if noise == "probe" else monitor.noise.measurements >= 22


def test_samples_may_be_counted_by_a_function() -> None:
    data = DataLoader(TensorDataset(torch.randn(40, 8), torch.zeros(40).long()), 8, collate_fn=_with_weights)
    with pytest.raises(ValueError, match="its layer saw 8 rows where the batch has 3 samples"):
        fit(Odd(), data, [GradientNoiseMonitor(noise="per_example")])
    monitor = GradientNoiseMonitor(every=1, batch_size_of=lambda batch: len(batch[1]))
    fit(Odd(), data, [monitor])
    assert monitor.source == "per_example" and monitor.noise.measurements == 10


def _with_weights(items: list[Any]) -> list[Tensor]:
    x, y = zip(*items, strict=True)
    return [torch.ones(3), torch.stack(x), torch.stack(y)]


class Odd(Named):
    """Gets something in its batch that is not per sample."""

    def training_step(self, batch: Any) -> Tensor:  # type: ignore[override]
        return nn.functional.cross_entropy(self.net(batch[1]), batch[2])


# ------------------------------------------------------------------------------------------------ schedule


def test_measurements_are_dense_first_and_ever_rarer() -> None:
    counts = {}
    for noise in ("per_example", "probe"):
        monitor = GradientNoiseMonitor(noise=noise)
        fit(Classifier(), loader(), [monitor], max_epochs=10)
        counts[noise] = monitor.noise.measurements
    assert counts == {"per_example": math.floor(3 * math.sqrt(130)), "probe": math.floor(math.sqrt(130))}


def test_the_probe_takes_over_where_hooks_fail_and_says_so() -> None:
    class Hidden(Classifier):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            hidden = nn.functional.linear(batch[0], self.net[0].weight)  # type: ignore[arg-type]
            return nn.functional.cross_entropy(hidden, batch[1])

    monitor = GradientNoiseMonitor(every=1)
    with pytest.warns(UserWarning, match=r"net\.0\.weight: it got a gradient .* goes on with the probe"):
        fit(Hidden(), loader(), [monitor])
    assert monitor.source == "probe" and monitor.noise.measurements == 25
    with pytest.raises(ValueError, match=r"net\.0\.weight: it got a gradient"):
        fit(Hidden(), loader(), [GradientNoiseMonitor(noise="per_example")])


class Attending(Frozen):
    """With normalisation layers, and attention that hooks do not know."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Unflatten(1, (4, 2)),
            nn.Linear(2, 8),
            nn.TransformerEncoderLayer(8, 2, 16, dropout=0.1, batch_first=True),
            nn.Flatten(),
            nn.Linear(32, 2),
        )


def test_normalisation_layers_stand_for_all_after_a_fit_by_probes() -> None:
    plain, observed = Attending(), Attending()
    fit(plain, loader(), max_epochs=4)
    unobserved = trace(plain)
    monitor = GradientNoiseMonitor(noise="norm_layers", every=1)
    fit(observed, loader(), [monitor], max_epochs=4)
    assert same(unobserved, trace(observed))
    probed = GradientNoiseMonitor(every=1)
    fit(Attending(), loader(), [probed], max_epochs=4)
    assert probed.source == "probe"
    assert monitor.noise.grad_variance == pytest.approx(probed.noise.grad_variance, rel=0.15)


# ----------------------------------------------------------------------------------------------- checkpoints


def test_state_survives_a_checkpoint_and_goes_on() -> None:
    monitor, restored = GradientNoiseMonitor(every=1), GradientNoiseMonitor(every=1)
    fit(Frozen(), loader(), [monitor])
    file = io.BytesIO()
    torch.save(monitor.state_dict(), file)
    file.seek(0)
    restored.load_state_dict(torch.load(file, weights_only=True))
    assert restored.state_dict() == monitor.state_dict() != GradientNoiseMonitor(every=1).state_dict()
    fit(Frozen(), loader(), [restored])
    assert restored.noise.measurements == 2 * monitor.noise.measurements


def test_state_in_another_metric_is_left_behind() -> None:
    monitor, other = GradientNoiseMonitor(every=1), GradientNoiseMonitor(preconditioned=True)
    fit(Frozen(), loader(), [monitor])
    with pytest.warns(UserWarning, match="another quantity"):
        other.load_state_dict(monitor.state_dict())
    assert other.noise.measurements == 0


def test_malformed_state_is_refused_and_changes_nothing() -> None:
    monitor = GradientNoiseMonitor()
    good = monitor.state_dict()
    for bad in ({}, {**good, "noise": {}}, {**good, "more": 1}):
        with pytest.raises(ValueError, match=r"load what\s+state_dict\(\) returned"):
            monitor.load_state_dict(bad)
    assert monitor.state_dict() == good


# ------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"noise": "loud"}, "noise='loud' is not known"),
        ({"every": 0}, "every=0 must be"),
        ({"every": 1.5}, "every=1.5 must be"),
        ({"confidence": 95}, "confidence=95 is not a probability"),
        ({"loss_reduction": "none"}, "loss_reduction='none' is not known"),
    ],
)
def test_bad_arguments_are_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        GradientNoiseMonitor(**arguments)


class Manual(Classifier):
    """Steps by itself."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False


class Two(Classifier):
    """Has two optimizers."""

    def configure_optimizers(self) -> Any:
        return [torch.optim.SGD(self.parameters(), 0.1), torch.optim.SGD(self.parameters(), 0.1)], []


@pytest.mark.parametrize(
    ("model", "arguments", "options", "message"),
    [
        (Manual, {}, {}, "automatic_optimization=False"),
        (Classifier, {"noise": "micro_batches"}, {}, "accumulate_grad_batches=2"),
        (Classifier, {"noise": "adam_moments"}, {}, "SGD keeps no moments"),
        (Classifier, {"preconditioned": True}, {}, "SGD has no second moments"),
        (Normalised, {"noise": "per_example"}, {}, r"net\.1\.weight \(BatchNorm1d\)"),
        (Classifier, {"noise": "adam_moments"}, {"gradient_clip_val": 1.0}, "gradient_clip_val=1.0"),
    ],
)
def test_runs_that_cannot_be_measured_are_refused_at_the_start(
    model: type[Classifier], arguments: dict[str, Any], options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        fit(model(), loader(), [GradientNoiseMonitor(**arguments)], **options)


def test_one_monitor_may_watch_one_fit_after_another() -> None:
    monitor = GradientNoiseMonitor(every=1)
    for count in (1, 2):
        make_trainer([monitor], max_epochs=1).fit(Frozen(), loader())
        assert monitor.noise.measurements == 13 * count


# --------------------------------------------------------------------- the sources in AdaptiveBatchSize


def hold(measurement: Any) -> float:
    """A policy that needs the noise and keeps the size."""
    return float(measurement.batch_size)


hold.needs = frozenset({"noise"})  # type: ignore[attr-defined]


@pytest.mark.parametrize("noise", ["per_example", "probe", "micro_batches"])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_adaptive_batch_size_measures_with_the_named_source(noise: str, accumulate: int) -> None:
    data, plain, model = loader(403, 15), Frozen(), Frozen()
    fit(plain, data, max_epochs=8, accumulate_grad_batches=accumulate)
    unobserved = trace(plain)
    callback = AdaptiveBatchSize(hold, noise=noise, verbose=False, quantize=False)
    fit(model, data, [callback], max_epochs=8, accumulate_grad_batches=accumulate)
    if noise != "micro_batches" or accumulate == 2:
        assert same(unobserved[:-1], trace(model)[:-1])
    sq_norm, variance = exact(model, data)
    low, high = callback.controller.noise.interval(0.999)
    assert low < variance / sq_norm < high
    assert callback.controller.noise.grad_variance == pytest.approx(variance, rel=0.25)


def test_an_unknown_source_is_refused() -> None:
    with pytest.raises(ValueError, match="noise='ranks' is not known"):
        AdaptiveBatchSize(noise="ranks")
    with pytest.raises(ValueError, match=r"net\.1\.weight \(BatchNorm1d\)"):
        fit(Normalised(), loader(), [AdaptiveBatchSize(noise="per_example")])


def test_a_monitor_beside_a_callback_that_resizes_takes_a_sum_for_what_it_is() -> None:
    class Still(Classifier):
        def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
            x, y, _, _ = batch
            return nn.functional.cross_entropy(self.net(x), y, reduction=reduction)

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), lr=0.0)

    found = []
    for reduction in ("mean", "sum"):
        monitor = GradientNoiseMonitor(noise="micro_batches", loss_reduction=reduction, every=1)
        callback = AdaptiveBatchSize(
            Milestones({2: 64}, unit="updates"),
            adjust_every=1,
            lr_scaling="linear",
            loss_reduction=reduction,
            seed=0,
        )
        options: dict[str, Any] = {"accumulate_grad_batches": 2, "max_epochs": 1}
        fit(Still(dropout=0.0), loader(samples=640), [callback, monitor], **options)
        found.append((monitor.noise.grad_sq_norm, monitor.noise.grad_variance))
    assert found[0] == pytest.approx(found[1], rel=1e-3)
