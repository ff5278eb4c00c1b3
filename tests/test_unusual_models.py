"""Models and training steps out of the ordinary: under each callback they train as without it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from lightning_problems import SAMPLES, Classifier, fit, loader, trainer
from torch import Tensor, nn
from torchmetrics import MeanMetric

from adaptive_batch.callbacks import AdaptiveBatchSize, AutoMicroBatch, GradientNoiseMonitor, MemoryMonitor
from adaptive_batch.measurement import Measurement

pytestmark = pytest.mark.filterwarnings(
    "ignore:per-example norms failed:UserWarning",
    "ignore:Lazy modules are a new feature:UserWarning",
    "ignore:`training_step` returned `None`:UserWarning",
    "ignore:`torch.jit.script` is deprecated:DeprecationWarning",
    "ignore:.* looks across the batch:UserWarning",
    "ignore:Trying to infer the `batch_size`:UserWarning",
)


class Keep:
    """Measures the noise and keeps the size."""

    needs = frozenset({"noise"})

    def propose(self, measurement: Measurement) -> float:
        return measurement.batch_size


def adaptive(**options: Any) -> AdaptiveBatchSize:
    return AdaptiveBatchSize(Keep(), lr_scaling="none", verbose=False, **options)


CALLBACKS: dict[str, Callable[[], Any]] = {
    "AdaptiveBatchSize": adaptive,
    "GradientNoiseMonitor": GradientNoiseMonitor,
    "MemoryMonitor": MemoryMonitor,
    "AutoMicroBatch": lambda: AutoMicroBatch(micro_batch_size=5),
}


class Plain(Classifier):
    def __init__(self) -> None:
        super().__init__(dropout=0.0)


class Frozen(Plain):
    """Its first layer, for an epoch."""

    def on_train_epoch_start(self) -> None:
        super().on_train_epoch_start()
        self.net[0].requires_grad_(self.current_epoch != 1)


class SetFree(Plain):
    """Its first layer, from the second epoch on."""

    def __init__(self) -> None:
        super().__init__()
        self.net[0].requires_grad_(False)

    def on_train_epoch_start(self) -> None:
        super().on_train_epoch_start()
        if self.current_epoch == 1:
            self.net[0].requires_grad_(True)


class GivesTuples(Plain):
    """A hook of the user's own changes what a layer returns."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(8, 16), First(), nn.ReLU(), nn.Linear(16, 2))
        self.net[0].register_forward_hook(lambda module, inputs, output: (output, output))


class First(nn.Module):
    def forward(self, pair: Any) -> Tensor:
        first: Tensor = pair[0]
        return first


class NamedInput(Plain):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(8)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, *others = batch
        return super().training_step((self.norm(x=x), *others), batch_idx)


class Lazy(Plain):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.LazyLinear(16), nn.ReLU(), nn.LazyLinear(2))


class SkipsBatches(Plain):
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return None if batch_idx % 3 == 0 else super().training_step(batch, batch_idx)

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.loss_trace.append(float(outputs.get("loss", torch.nan)))


class Scaled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("scale", torch.full((8,), 0.5))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.mul(x, self.scale)  # type: ignore[arg-type]


class Scripted(Plain):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(torch.jit.script(Scaled()), nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 2))


class ExpandedBuffer(Plain):
    mask: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mask", torch.ones(1).expand(8))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, *others = batch
        return super().training_step((x * self.mask, *others), batch_idx)


class Similarities(Plain):
    """Returns what is as wide as the batch is long."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        x = batch[0]
        return {"loss": super().training_step(batch, batch_idx), "similar": x @ x.T}


class TakesOut(Plain):
    """Takes the targets out of its batch, as models from other libraries do."""

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        return dict(zip("xyip", batch, strict=True))

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        super().on_train_batch_start(list(batch.values()), batch_idx)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        y = batch.pop("y")
        return super().training_step((batch["x"], y, None, None), batch_idx)


MODELS = [
    Plain, Frozen, SetFree, GivesTuples, NamedInput, SkipsBatches, Scripted, ExpandedBuffer, Similarities, TakesOut,
]  # fmt: skip


@pytest.mark.parametrize("callback", CALLBACKS)
@pytest.mark.parametrize("model", MODELS)
def test_training_goes_as_without_the_callback(model: type[Plain], callback: str) -> None:
    plain, watched = model(), model()
    fit(plain, loader(), max_epochs=3)
    fit(watched, loader(), [CALLBACKS[callback]()], max_epochs=3)
    assert watched.epochs == plain.epochs
    assert watched.loss_trace == pytest.approx(plain.loss_trace, rel=1e-4, nan_ok=True)


@pytest.mark.parametrize("callback", CALLBACKS)
def test_lazy_layers_train_as_without_the_callback(callback: str) -> None:
    plain, watched = Lazy(), Lazy()
    for model, callbacks in ((plain, []), (watched, [CALLBACKS[callback]()])):
        torch.manual_seed(3)
        trainer(callbacks).fit(model, loader())
    assert watched.epochs == plain.epochs
    assert watched.loss_trace == pytest.approx(plain.loss_trace, rel=1e-4)


@pytest.mark.parametrize("noise", ["auto", "per_example"])
def test_layers_set_free_in_mid_run_are_measured_like_those_that_always_were(noise: str) -> None:
    """At a rate of zero the noise of an update does not depend on when its layers came to be trained."""

    class Still(SetFree):
        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), lr=0.0)

    class Always(Still):
        def __init__(self) -> None:
            super().__init__()
            self.net[0].requires_grad_(True)

    seen: dict[type[Any], list[Measurement]] = {Still: [], Always: []}
    for kind, measurements in seen.items():
        torch.manual_seed(1)
        callback = adaptive(adjust_every=1, noise=noise)
        fit(kind(), loader(), [callback], max_epochs=3)
        measurements += [m for m in callback.history.measurements if m.epoch == 2]
    pairs = [
        (m.measured_grad_variance, n.measured_grad_variance)
        for m, n in zip(seen[Still], seen[Always], strict=True)
        if m.measured_update == m.update
    ]
    assert len(pairs) >= 2
    assert [late for late, _ in pairs] == pytest.approx([always for _, always in pairs], rel=1e-4)


class TestLayersMadeInSetup:
    class Late(Plain):
        fails_at = -1

        def setup(self, stage: str) -> None:
            if stage == "fit" and not hasattr(self, "late"):
                self.late = nn.BatchNorm1d(8)
                self.mean = MeanMetric()
                self.passes: list[int] = []

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            x, *others = batch
            self.passes.append(len(x))
            loss = super().training_step((self.late(x), *others), batch_idx)
            self.mean.update(loss.detach())
            if batch_idx == self.fails_at:
                self.fails_at = -1
                raise torch.OutOfMemoryError("out of memory")
            return loss

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), lr=0.1)

    def test_are_known_to_look_across_the_batch_and_not_split_for_the_noise(self) -> None:
        model = self.Late()
        callback = adaptive()
        fit(model, loader(), [callback], max_epochs=2)
        assert set(callback.history.column("micro_batch_size")) == {16, SAMPLES % 16}

    def test_are_put_back_after_a_failure(self) -> None:
        model = self.Late()
        model.fails_at = 2
        fit(model, loader(), [AutoMicroBatch(verbose=False)], max_epochs=1)
        assert model.fails_at == -1 and max(model.passes[3:]) == 8
        tracked = model.late.num_batches_tracked
        assert tracked is not None and int(tracked) == len(model.passes) - 1  # all but the one that failed
        assert int(model.mean._update_count) == -(-SAMPLES // 16)


class TimeFirst(Plain):
    """A batch whose first dimension is not the samples', which nothing can split."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(8, 1))  # of no known layer

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        x, *others = batch
        return [x.T, *others]

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, *others = batch
        return super().training_step(((x * self.scale).T, *others), batch_idx)


@pytest.mark.parametrize("normalised", [False, True])
@pytest.mark.parametrize("make", [adaptive, lambda: GradientNoiseMonitor(batch_size_of=lambda batch: len(batch[1]))])
def test_a_batch_that_cannot_be_split_is_trained_on_and_not_measured(make: Any, normalised: bool) -> None:
    def model() -> TimeFirst:
        made = TimeFirst()
        if normalised:
            made.net = nn.Sequential(nn.BatchNorm1d(8), *made.net)
        return made

    plain, watched = model(), model()
    fit(plain, loader(), max_epochs=3)
    with pytest.warns(UserWarning, match="noise of an update is not measured: batch.* has first dimension 8") as told:
        fit(watched, loader(), [make()], max_epochs=3)
    assert sum("not measured" in str(warning.message) for warning in told) == 1
    assert watched.epochs == plain.epochs
    assert watched.loss_trace == plain.loss_trace


def test_a_batch_that_cannot_be_split_is_an_error_where_parts_were_asked_for() -> None:
    with pytest.raises(ValueError, match="has first dimension 8 where the batch has 16"):
        fit(TimeFirst(), loader(), [adaptive(noise="micro_batches")])
    with pytest.raises(ValueError, match="has first dimension 8 where the batch has 16"):
        fit(TimeFirst(), loader(), [GradientNoiseMonitor(noise="probe", batch_size_of=lambda batch: len(batch[1]))])


@pytest.mark.parametrize("callback", ["AdaptiveBatchSize", "AutoMicroBatch"])
def test_a_batch_that_lost_its_entries_in_a_failed_pass_starts_again_with_them(callback: str) -> None:
    class Fails(TakesOut):
        fails_at = 2

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            loss = super().training_step(batch, batch_idx)
            if batch_idx == self.fails_at:
                self.fails_at = -1
                raise torch.OutOfMemoryError("out of memory")
            return loss

    plain, model = TakesOut(), Fails()
    fit(plain, loader(), max_epochs=2)
    recovers = adaptive() if callback == "AdaptiveBatchSize" else AutoMicroBatch(verbose=False)
    fit(model, loader(), [recovers], max_epochs=2)
    assert model.fails_at == -1
    assert model.loss_trace == pytest.approx(plain.loss_trace, rel=1e-4)


def test_no_optimizer_is_an_error_that_says_so() -> None:
    class Without(Plain):
        def configure_optimizers(self) -> Any:
            return None

    with pytest.warns(UserWarning, match="no optimizer"), pytest.raises(ValueError, match="needs an optimizer"):
        fit(Without(), loader(), [adaptive()])


@pytest.mark.parametrize("samples", [34, 35])
def test_the_probe_leaves_out_a_tail_too_short_to_be_split(samples: int) -> None:
    class Normalised(Plain):
        def __init__(self) -> None:
            super().__init__()
            self.net = nn.Sequential(nn.Linear(8, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 2))

    monitor = GradientNoiseMonitor(noise="probe", every=1)
    fit(Normalised(), loader(samples), [monitor])
    assert monitor.noise.measurements == 4
