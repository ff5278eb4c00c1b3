"""Learning rates that others set around an update, and what they see of the one that is scaled."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from lightning_problems import Classifier, fit, loader
from pytorch_lightning.callbacks import GradientAccumulationScheduler, StochasticWeightAveraging
from torch import nn

from adaptive_batch.callbacks import AdaptiveBatchSize
from adaptive_batch.lr_scaling import SDEScaling
from adaptive_batch.policies import LossProportional, Milestones


class Warm(Classifier):
    """Sets the rate by hand in ``optimizer_step``, as Lightning's documentation shows for a warm-up."""

    def __init__(self, *, before: bool) -> None:
        super().__init__(dropout=0.0)
        self.before = before
        self.given: list[float] = []

    def optimizer_step(self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Any = None) -> None:
        if self.before:
            self._warm(optimizer)
        optimizer.step(closure=optimizer_closure)
        if not self.before:
            self._warm(optimizer)

    def _warm(self, optimizer: Any) -> None:
        for group in optimizer.param_groups:
            group["lr"] = 0.1 * min(1.0, (self.trainer.global_step + 1) / 20)
        self.given.append(optimizer.param_groups[0]["lr"])


@pytest.mark.parametrize("before", [True, False])
def test_a_warm_up_by_hand_is_a_schedule_like_any_other(before: bool) -> None:
    def run(policy: Any) -> tuple[Warm, AdaptiveBatchSize]:
        model = Warm(before=before)
        callback = AdaptiveBatchSize(policy, adjust_every=1, lr_scaling="linear", max_batch_size=32)
        fit(model, loader(samples=640), [callback], max_epochs=1)
        return model, callback

    model, callback = run(Milestones({4: 32}, unit="updates"))
    scheduled = model.given if before else [0.1, *model.given[:-1]]
    assert model.given[-1] == 0.1
    assert 2.0 in callback.history.column("lr_scale")
    expected = [lr * scale for lr, scale in zip(scheduled, callback.history.column("lr_scale"), strict=True)]
    assert model.used_lr == pytest.approx(expected)
    assert model.trainer.optimizers[0].param_groups[0]["lr"] == 0.1


@pytest.mark.parametrize("rule", ["linear", SDEScaling(betas="half_life", weight_decay="timescale")])
def test_a_checkpoint_that_is_made_inside_an_update_has_the_rates_of_the_schedule(tmp_path: Path, rule: Any) -> None:
    class Saves(Classifier):
        def on_fit_start(self) -> None:
            self.epochs.append([])  # of the epoch that is gone on with

        def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
            if self.global_step == 6 and saves:
                self.trainer.save_checkpoint(tmp_path / "inside.ckpt")  # as a handler of a signal does
            return super().training_step(batch, batch_idx)

        def configure_optimizers(self) -> Any:
            return torch.optim.AdamW(self.parameters(), lr=0.01, weight_decay=0.01)

    def run(**options: Any) -> tuple[Saves, AdaptiveBatchSize]:
        model = Saves()
        callback = AdaptiveBatchSize(
            Milestones({3: 20}, unit="updates"), adjust_every=1, lr_scaling=rule, seed=0, min_batch_size=16
        )
        fit(model, loader(), [callback], **options)
        return model, callback

    saves = True
    whole, callback = run()
    assert callback.history.updates[6].lr_scale > 1
    (group,) = torch.load(tmp_path / "inside.ckpt", weights_only=False)["optimizer_states"][0]["param_groups"]
    assert (group["lr"], group["betas"], group["eps"], group["weight_decay"]) == (0.01, (0.9, 0.999), 1e-8, 0.01)
    saves = False
    resumed, _ = run(ckpt_path=tmp_path / "inside.ckpt")
    assert resumed.used_lr == whole.used_lr[6:]
    assert resumed.loss_trace == whole.loss_trace[6:]


@pytest.mark.filterwarnings("ignore:net.1 .BatchNorm1d. looks across the batch")
def test_the_pass_of_weight_averaging_over_the_data_is_no_large_batch() -> None:
    class Normed(Classifier):
        def __init__(self) -> None:
            super().__init__(dropout=0.0)
            self.net = nn.Sequential(nn.Linear(8, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 2))

    def run(*callbacks: Any) -> list[torch.Tensor]:
        averaging = StochasticWeightAveraging(swa_lrs=0.03, swa_epoch_start=2, annealing_epochs=2)
        model = Normed()
        fit(model, loader(), [*callbacks, averaging], max_epochs=5)
        return list(model.parameters())

    for one, other in zip(run(), run(AdaptiveBatchSize("constant")), strict=True):
        assert torch.equal(one, other)


def test_two_that_would_set_the_samples_of_an_update_are_refused() -> None:
    schedule = GradientAccumulationScheduler({0: 1, 1: 4})
    with pytest.raises(ValueError, match="would both set the samples of an update; leave one of them out"):
        fit(Classifier(), loader(), [schedule, AdaptiveBatchSize()])
    with pytest.raises(ValueError, match=r"or accumulate by Trainer\(accumulate_grad_batches="):
        fit(Classifier(), loader(), [GradientAccumulationScheduler({0: 2}), AdaptiveBatchSize()])
    fit(Classifier(), loader(), [GradientAccumulationScheduler({0: 1}), AdaptiveBatchSize()], max_epochs=1)
    fit(Classifier(), loader(), [schedule, AdaptiveBatchSize(dry_run=True)])


def test_where_nothing_is_saved_of_an_optimizer_a_checkpoint_can_be_saved_all_the_same() -> None:
    # Lightning has the whole state of a sharded optimizer on the first rank, and an empty one on all others.
    callback = AdaptiveBatchSize(Milestones({2: 20}, unit="updates"), adjust_every=1)
    made = fit(Classifier(), loader(), [callback], max_epochs=1)
    checkpoint: dict[str, Any] = {"callbacks": {}, "loops": {"fit_loop": {"state_dict": {}}}, "optimizer_states": [{}]}
    callback.on_save_checkpoint(made, made.lightning_module, checkpoint)
    assert checkpoint["optimizer_states"] == [{}]


class Recording(torch.optim.SGD):
    """Keeps the rate of each of its steps."""

    def step(self, closure: Any = None) -> Any:
        result = super().step(closure)
        self.__dict__.setdefault("rates", []).append(self.param_groups[0]["lr"])
        return result


class Bare(Classifier):
    """Steps the optimizer itself, not what Lightning puts around it."""

    def __init__(self, *, manual: bool) -> None:
        super().__init__(dropout=0.0)
        self.automatic_optimization = not manual

    def configure_optimizers(self) -> Any:
        return Recording(self.parameters(), lr=0.1)

    def optimizer_step(self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Any = None) -> None:
        optimizer.optimizer.step(closure=optimizer_closure)

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        loss: torch.Tensor = super().training_step(batch, batch_idx)
        if not self.automatic_optimization:
            optimizer: Any = self.optimizers(use_pl_optimizer=False)
            optimizer.zero_grad()
            self.manual_backward(loss)
            optimizer.step()
        return loss


@pytest.mark.filterwarnings("ignore:an update that does not fit into memory will not be split")
@pytest.mark.parametrize("manual", [False, True])
def test_a_step_that_goes_past_lightning_has_the_rate_of_its_size(manual: bool) -> None:
    torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.1)  # from here on its step calls hooks as well as Recording's
    model = Bare(manual=manual)
    callback = AdaptiveBatchSize(
        Milestones({4: 64}, unit="updates"), adjust_every=1, lr_scaling="linear", max_batch_size=64
    )
    made = fit(model, loader(samples=640), [callback], max_epochs=1)
    optimizer: Any = made.optimizers[0]
    assert set(model.sizes) == {16, 64}
    assert optimizer.rates == pytest.approx([0.1 * size / 16 for size in model.sizes])
    assert callback.history.column("lr_scale") == [size / 16 for size in model.sizes]
    assert optimizer.param_groups[0]["lr"] == 0.1
    optimizer.step()  # of the user's own, when the run is over
    assert optimizer.rates[-1] == 0.1


@pytest.mark.parametrize("how", ["a number", "a tensor that is filled", "another tensor"])
def test_a_rate_that_is_set_in_the_training_step_is_the_schedules(how: str) -> None:
    class Sets(Classifier):
        def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
            lr = 0.1 * min(1.0, (self.global_step + 1) / 20)
            for group in self.trainer.optimizers[0].param_groups:
                if how == "a tensor that is filled":
                    group["lr"].fill_(lr)
                else:
                    group["lr"] = lr if how == "a number" else torch.tensor(lr)
            loss: torch.Tensor = super().training_step(batch, batch_idx)
            return loss

        def on_before_optimizer_step(self, optimizer: Any) -> None:
            used.append(float(optimizer.param_groups[0]["lr"]))

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), lr=0.1 if how == "a number" else torch.tensor(0.1))

    used: list[float] = []
    model = Sets(dropout=0.0)
    callback = AdaptiveBatchSize(
        Milestones({4: 32}, unit="updates"), adjust_every=1, lr_scaling="linear", max_batch_size=32
    )
    made = fit(model, loader(samples=640), [callback], max_epochs=1)
    assert set(model.sizes) == {16, 32}
    scheduled = [0.1 * min(1.0, (step + 1) / 20) for step in range(len(model.sizes))]
    assert used == pytest.approx([lr * n / 16 for lr, n in zip(scheduled, model.sizes, strict=True)])
    assert float(made.optimizers[0].param_groups[0]["lr"]) == pytest.approx(0.1)


@pytest.mark.parametrize(("start", "then"), [(16, 512), (256, 8)])
def test_parameters_that_join_adam_later_step_as_far_as_the_rate_says(start: int, then: int) -> None:
    class Joining(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.parts = nn.ParameterList(nn.Parameter(torch.zeros(1, dtype=torch.float64)) for _ in range(2))
            self.steps: list[list[float]] = []

        def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
            self.before = [part.item() for part in self.parts]
            loss: torch.Tensor = self.parts[0].sum() + self.parts[1].sum()  # gradients of one: a step is the rate
            return loss

        def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
            if self.global_step == 20:
                self.trainer.optimizers[0].add_param_group({"params": [self.parts[1]]})

        def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
            self.steps.append([b - part.item() for b, part in zip(self.before, self.parts, strict=True)])

        def configure_optimizers(self) -> Any:
            return torch.optim.Adam([self.parts[0]], lr=0.01)

    model = Joining()
    callback = AdaptiveBatchSize(
        Milestones({10: then}, unit="updates"), adjust_every=1, min_batch_size=8, max_batch_size=512
    )
    fit(model, loader(samples=20 * max(start, then), batch_size=start), [callback], max_epochs=1, max_steps=26)
    expected = 0.01 * (then / start) ** 0.5
    assert model.steps[15] == pytest.approx([expected, 0.0], rel=1e-5)
    assert model.steps[22] == pytest.approx([expected, expected], rel=1e-5)
    assert model.steps[25] == pytest.approx([expected, expected], rel=1e-5)


@pytest.mark.filterwarnings("ignore:an update that does not fit into memory will not be split")
def test_several_steps_of_adam_in_a_batch_are_resumed_exactly(tmp_path: Path) -> None:
    class Twice(Classifier):
        def __init__(self) -> None:
            super().__init__(optimizer="adam", dropout=0.0)
            self.automatic_optimization = False

        def on_fit_start(self) -> None:
            self.epochs.append([])

        def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
            loss: torch.Tensor = super().training_step(batch, batch_idx)
            optimizer: Any = self.optimizers()
            self.manual_backward(loss)
            for _ in range(2):
                optimizer.step()
            optimizer.zero_grad()
            return loss

        def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
            super().on_train_batch_end({"loss": outputs["loss"]}, batch, batch_idx)
            if len(self.sizes) == 8 and saves:
                self.trainer.save_checkpoint(tmp_path / "middle.ckpt")

    def run(**options: Any) -> Twice:
        model = Twice()
        callback = AdaptiveBatchSize(Milestones({4: 64}, unit="updates"), adjust_every=1, max_batch_size=64, seed=0)
        fit(model, loader(samples=1280), [callback], max_epochs=1, **options)
        return model

    saves = True
    whole = run()
    saves = False
    resumed = run(ckpt_path=tmp_path / "middle.ckpt")
    assert whole.used_lr[0] < whole.used_lr[-1] and whole.sizes[8] == 64
    assert resumed.used_lr == whole.used_lr[-len(resumed.used_lr) :]
    assert resumed.loss_trace == whole.loss_trace[8:]


class Summed(Classifier):
    """Returns the sum over the samples, at a rate that is as much less."""

    def __init__(self) -> None:
        super().__init__(dropout=0.0)

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        x, y, _, _ = batch
        return nn.functional.cross_entropy(self.net(x), y, reduction="sum")

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1 / 16)


def weights_of(model: torch.nn.Module) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def test_a_dry_run_leaves_a_sum_over_batches_of_any_size_as_it_is() -> None:
    def run(*callbacks: Any) -> torch.Tensor:
        model = Summed()
        fit(model, loader(), callbacks)
        return weights_of(model)

    dry = AdaptiveBatchSize(
        dry_run=True,
        loss_reduction="sum",
        lr_scaling="adascale",
        batch_size_of=lambda batch: 1 + 2 * int((batch[0][:, 0] > 0).sum()),
    )
    assert torch.equal(run(dry), run())


def test_where_the_policy_takes_the_place_of_a_decay_a_sum_trains_as_a_mean_does() -> None:
    class Mean(Classifier):
        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), lr=0.1)

    def run(model: Classifier, **options: Any) -> tuple[torch.Tensor, list[int]]:
        policy = LossProportional(minimum=0.3)
        callback = AdaptiveBatchSize(policy, adjust_every=5, max_batch_size=64, min_batch_size=4, **options)
        fit(model, loader(samples=640), [callback], max_epochs=3)
        return weights_of(model), model.sizes

    weights, sizes = run(Mean(dropout=0.0))
    summed, same = run(Summed(), loss_reduction="sum")
    assert sizes == same and len(set(sizes)) > 2
    torch.testing.assert_close(summed, weights, rtol=1e-4, atol=1e-6)


def test_all_samples_of_an_update_weigh_alike_in_a_sum() -> None:
    class Weighing(pl.LightningModule):
        """The gradient of sample i is in weight i."""

        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.zeros(200))
            self.seen: list[list[float]] = []

        def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
            return self.w[batch[2]].sum()

        def on_before_optimizer_step(self, optimizer: Any) -> None:
            assert self.w.grad is not None
            self.seen.append(self.w.grad[self.w.grad != 0].tolist())

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), lr=0.1)

    model = Weighing()
    callback = AdaptiveBatchSize(
        Milestones({3: 48}, unit="updates"), adjust_every=1, max_batch_size=48, loss_reduction="sum",
        lr_scaling="linear",
    )  # fmt: skip
    fit(model, loader(samples=200, batch_size=12), [callback], max_epochs=1, accumulate_grad_batches=2)
    assert [len(update) for update in model.seen] == [24, 24, 24, 48, 48, 32]
    assert [set(update) for update in model.seen] == [{0.5}] * 3 + [{0.25}] * 3


def test_a_size_of_one_sample_is_told_to_have_no_noise(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    fit(Classifier(), loader(samples=8, batch_size=1), [AdaptiveBatchSize()], max_epochs=1)
    assert "cannot measure the gradient noise of updates of a single sample" in caplog.text


def test_a_policy_that_waits_for_a_decay_tells_that_nothing_decays(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    fit(Classifier(), loader(), [AdaptiveBatchSize("dont_decay")], max_epochs=1)
    assert "returned no scheduler that would lower it" in caplog.text
    caplog.clear()
    fit(Classifier("cosine"), loader(), [AdaptiveBatchSize("dont_decay")], max_epochs=1)
    assert "no scheduler" not in caplog.text
