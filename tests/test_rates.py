"""Learning rates that others set around an update, and what they see of the one that is scaled."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning_problems import Classifier, fit, loader
from pytorch_lightning.callbacks import GradientAccumulationScheduler, StochasticWeightAveraging
from torch import nn

from adaptive_batch.callbacks import AdaptiveBatchSize
from adaptive_batch.lr_scaling import SDEScaling
from adaptive_batch.policies import Milestones


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
