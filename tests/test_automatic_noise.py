"""Where AdaptiveBatchSize measures the gradient noise if it is left to it."""

from __future__ import annotations

import math
from typing import Any
from unittest.mock import patch

import pytest
import torch
from lightning_problems import Classifier, Recorded, fit, loader
from pytorch_lightning.callbacks import ModelPruning
from torch import Tensor, nn
from torch.utils.data import DataLoader

from adaptive_batch.callbacks import AdaptiveBatchSize, GradientNoiseMonitor
from adaptive_batch.measurement import Measurement
from adaptive_batch.noise.schedule import measures_noise


class Keep:
    """Measures the noise and keeps the size."""

    needs = frozenset({"noise"})

    def propose(self, measurement: Measurement) -> float:
        return measurement.batch_size


class Convolutional(Classifier):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Unflatten(1, (1, 8)), nn.Conv1d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(24, 2))


class Outside(Classifier):
    """Uses a layer's weight behind the layer's back."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        first: Any = self.net[0]
        loss: Tensor = super().training_step(batch, batch_idx) + 0.1 * (first.weight**2).sum()
        return loss


def watched(model: Classifier, **options: Any) -> AdaptiveBatchSize:
    callback = AdaptiveBatchSize(Keep(), lr_scaling="none", **options)
    fit(model, loader(), [callback], max_epochs=4)
    return callback


def weights(model: Classifier) -> list[Tensor]:
    return [p.detach().clone() for p in model.parameters()]


def test_linear_layers_are_measured_by_example_and_nothing_in_the_run_changes() -> None:
    plain, measured = Classifier(), Classifier()
    fit(plain, loader(), max_epochs=4)
    callback = watched(measured)
    assert callback.controller.noise.measurements >= 20
    assert math.isfinite(callback.controller.noise.grad_sq_norm)
    assert all(torch.equal(a, b) for a, b in zip(weights(plain), weights(measured), strict=True))
    assert plain.loss_trace == measured.loss_trace


def test_convolutions_are_measured_by_parts_which_cost_less_there() -> None:
    callback = watched(Convolutional())
    halves = [u for u in callback.history.updates if 2 * u.micro_batch_size <= u.batch_size + 1]
    assert len(halves) >= 15
    assert callback.controller.noise.measurements >= 15


def test_a_weight_that_is_used_outside_of_its_layer_is_measured_by_parts_and_the_history_says_so() -> None:
    callback = watched(Outside())
    assert callback.controller.noise.measurements >= 15
    assert "measured by the parts of updates from here on: per-example norms failed at net.0.weight" in (
        callback.history.notes[0].reason
    )


def test_layers_that_are_pruned_during_training_are_measured_by_parts_from_then_on() -> None:
    plain, model = Classifier(dropout=0.0), Classifier(dropout=0.0)
    fit(plain, loader(), [pruning()], max_epochs=4)
    callback = AdaptiveBatchSize(Keep(), lr_scaling="none", verbose=False)
    fit(model, loader(), [callback, pruning()], max_epochs=4)
    assert "from here on: per-example norms failed at net." in callback.history.notes[0].reason
    assert callback.controller.noise.measurements >= 15
    assert model.loss_trace == pytest.approx(plain.loss_trace)


def test_a_monitor_of_layers_that_are_pruned_goes_on_with_the_probe() -> None:
    plain, model, monitor = Classifier(dropout=0.0), Classifier(dropout=0.0), GradientNoiseMonitor()
    fit(plain, loader(), [pruning()], max_epochs=4)
    with pytest.warns(UserWarning, match=r"per-example norms failed at net.* goes on with the probe"):
        fit(model, loader(), [monitor, pruning()], max_epochs=4)
    assert monitor.noise.measurements >= 8
    assert model.loss_trace == plain.loss_trace


class OneByOne(Classifier):
    """Calls layers on single examples, without a batch dimension."""

    def __init__(self) -> None:
        super().__init__(dropout=0.0)
        self.single = nn.Sequential(nn.Conv1d(1, 2, 3, padding=1), nn.Flatten(0), nn.Linear(16, 8), nn.LayerNorm(8))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, *others = batch
        return super().training_step((torch.stack([self.single(row[None]) for row in x]), *others), batch_idx)


@pytest.mark.parametrize("kind", [AdaptiveBatchSize, GradientNoiseMonitor])
@pytest.mark.filterwarnings("ignore:per-example norms failed:UserWarning")
def test_layers_that_see_one_example_at_a_time_are_measured_otherwise(kind: type[Any]) -> None:
    plain, model = OneByOne(), OneByOne()
    fit(plain, loader(), max_epochs=3)
    callback = kind(Keep(), lr_scaling="none", verbose=False) if kind is AdaptiveBatchSize else kind()
    fit(model, loader(), [callback], max_epochs=3)
    noise = callback.controller.noise if kind is AdaptiveBatchSize else callback.noise
    assert noise.measurements >= 4
    assert model.loss_trace == pytest.approx(plain.loss_trace, rel=1e-4)


class Exchanged(Classifier):
    """Gets another first weight in its second epoch."""

    def on_train_epoch_start(self) -> None:
        super().on_train_epoch_start()
        if self.current_epoch == 1:
            first: Any = self.net[0]
            first.weight = nn.Parameter(first.weight.detach().clone())
            self.trainer.optimizers[0].add_param_group({"params": [first.weight]})


def test_a_monitor_of_a_weight_that_is_exchanged_goes_on_with_the_probe() -> None:
    plain, model, monitor = Exchanged(dropout=0.0), Exchanged(dropout=0.0), GradientNoiseMonitor()
    fit(plain, loader(), max_epochs=4)
    with pytest.warns(UserWarning, match=r"failed at net.0: its weight is not a parameter that training began with"):
        fit(model, loader(), [monitor], max_epochs=4)
    assert monitor.source == "probe"
    assert model.loss_trace == plain.loss_trace


def test_a_weight_that_is_exchanged_during_training_is_measured_by_parts_from_then_on() -> None:
    plain, model = Exchanged(dropout=0.0), Exchanged(dropout=0.0)
    fit(plain, loader(), max_epochs=4)
    callback = watched(model, verbose=False)
    assert callback.controller.noise.measurements >= 15
    assert model.loss_trace == pytest.approx(plain.loss_trace)
    halves = [u for u in callback.history.updates if 2 * u.micro_batch_size <= u.batch_size + 1]
    assert halves and min(u.epoch for u in halves) == 1


def pruning() -> ModelPruning:
    return ModelPruning("l1_unstructured", amount=0.1)


def test_by_example_is_an_error_where_it_was_asked_for_and_cannot_be_had() -> None:
    with pytest.raises(ValueError, match=r"per-example norms failed at net\.0\.weight"):
        watched(Outside(), noise="per_example")


def test_all_updates_take_part_in_the_estimate_of_the_squared_gradient() -> None:
    """Between two measured updates the norms count: the estimate moves with them."""
    callback = watched(Classifier(dropout=0.0))
    noise, updates = callback.controller.noise, len(callback.history.updates)
    assert noise.measurements < updates
    weight = sum(block[0] for block in noise.state_dict()["blocks"])
    measured = sum(block[2] > 0 for block in noise.state_dict()["blocks"])
    assert weight > 0 and measured <= noise.measurements
    assert len([block for block in noise.state_dict()["blocks"] if block[0] > 0]) > noise.measurements


def test_under_goodput_each_sample_is_trained_on_once_also_while_times_are_learned() -> None:
    class Seen(Classifier):
        def __init__(self) -> None:
            super().__init__()
            self.seen: list[int] = []
            self.passes: list[int] = []

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            self.seen += batch[2].tolist()
            self.passes.append(len(batch[2]))
            loss: Tensor = super().training_step(batch, batch_idx)
            return loss

    model = Seen()
    callback = AdaptiveBatchSize()
    fit(model, loader(), [callback], max_epochs=4)
    assert model.seen == [index for epoch in model.epochs for index in epoch]
    assert math.isfinite(callback.controller.step_time.beta)  # by a few updates in two unequal parts
    passes = iter(model.passes)
    firsts: dict[int, set[int]] = {size: set() for size in model.sizes}
    for size in model.sizes:
        left = size
        while left:
            n = next(passes)
            if left == size:
                firsts[size].add(n)
            left -= n
    assert firsts[16] == {4, 12, 16}  # by turns: the first part also clears the gradients


def test_updates_that_hooks_make_longer_are_not_timed() -> None:
    class Timed(Keep):
        needs = frozenset({"noise", "step_time"})

    callback = AdaptiveBatchSize(Timed(), lr_scaling="none")
    fit(Classifier(), loader(), [callback], max_epochs=4)
    timed = len(callback.controller.step_time.state_dict()["updates"])
    assert 0 < timed <= len(callback.history.updates) - callback.controller.noise.measurements


def measured_under_goodput(model: Classifier) -> list[Measurement]:
    callback = AdaptiveBatchSize(max_batch_size=16)
    seen: list[Measurement] = []
    observe = callback.controller.observe

    def noting(measurement: Measurement) -> Any:
        seen.append(measurement)
        return observe(measurement)

    with patch.object(callback.controller, "observe", noting):
        fit(model, loader(), [callback], max_epochs=4)
    return seen


@pytest.mark.parametrize("model", [Classifier, Convolutional])
def test_an_update_tells_one_thing_its_noise_the_time_of_its_parts_or_its_own_time(model: type[Classifier]) -> None:
    seen = measured_under_goodput(model())
    noise = [m for m in seen if m.part_sq_norms]
    parts = [m for m in seen if len(m.pass_sizes) > 1]
    assert len(noise) > 10 and len(parts) > 5
    assert not any(m.pass_sizes for m in noise)
    assert not any(m.part_sq_norms or math.isfinite(float(m.seconds)) for m in parts)
    assert sum(math.isfinite(float(m.seconds)) for m in seen) > 10


def test_the_time_of_a_part_leaves_out_what_its_data_took() -> None:
    now = [0.0]

    class Slow(Recorded):
        """An item takes a second."""

        def __getitem__(self, index: int) -> tuple[Tensor, Tensor, Tensor, int]:
            now[0] += 1.0
            return super().__getitem__(index)

    class Timed(Classifier):
        """A pass takes a second, and a quarter of one for each sample."""

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            now[0] += 1.0 + 0.25 * len(batch[1])
            loss: Tensor = super().training_step(batch, batch_idx)
            return loss

    callback = AdaptiveBatchSize(max_batch_size=16)
    with patch("time.perf_counter", lambda: now[0]):
        fit(Timed(), DataLoader(Slow(), 16, shuffle=True), [callback], max_epochs=4)
    times = callback.controller.step_time.state_dict()
    assert {samples for samples, _ in times["passes"]} >= {4, 12}
    assert all(seconds == 1 + samples / 4 for samples, seconds in times["passes"])
    assert [16, 16 + 1 + 16 / 4] in times["updates"]  # an update's time has it


def test_where_no_larger_size_could_pay_few_updates_are_split_for_the_noise() -> None:
    now = [0.0]

    class Proportional(Convolutional):
        """Only samples take time."""

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            now[0] += len(batch[1])
            loss: Tensor = super().training_step(batch, batch_idx)
            return loss

    callback = AdaptiveBatchSize(max_batch_size=64)
    with patch("time.perf_counter", lambda: now[0]):
        fit(Proportional(), loader(batch_size=4), [callback], max_epochs=30)
    assert not callback.history.changes
    late = [u for u in callback.history.updates if u.step > 200]
    split = sum(2 * u.micro_batch_size <= u.batch_size + 1 for u in late)
    assert 0 < 3 * split < sum(measures_noise(u.step - 1) for u in late)


def test_updates_of_three_samples_are_not_timed_in_parts_and_so_measured_as_often_as_others() -> None:
    class Timed(Keep):
        needs = frozenset({"noise", "step_time"})

    counts = []
    for policy in (Keep(), Timed()):
        callback = AdaptiveBatchSize(policy, lr_scaling="none")
        fit(Classifier(), loader(batch_size=3), [callback], max_epochs=1)
        counts.append(callback.controller.noise.measurements)
    assert counts[0] == counts[1] > 20


def test_a_failed_measurement_of_an_update_in_two_parts_is_told_once() -> None:
    callback = AdaptiveBatchSize()
    fit(Outside(), loader(), [callback], max_epochs=2)
    assert sum("per-example norms failed" in note.reason for note in callback.history.notes) == 1
