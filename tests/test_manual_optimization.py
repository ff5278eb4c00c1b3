"""A training_step that makes its own backward passes and steps: resized and scaled, never split."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from lightning_problems import SAMPLES, Classifier, fit, loader
from torch import Tensor, nn

from adaptive_batch.callbacks import AdaptiveBatchSize

pytestmark = pytest.mark.filterwarnings("ignore:an update that does not fit into memory will not be split")

B0 = 16


class Manual(Classifier):
    """Steps every ``every`` batches, its own scheduler with it."""

    def __init__(self, every: int = 1, times: int = 1) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.every, self.times = every, times

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = super().training_step(batch, batch_idx)
        self.manual_backward(loss / self.every)
        if (batch_idx + 1) % self.every == 0 or self.trainer.is_last_batch:
            optimizer: Any = self.optimizers()
            for _ in range(self.times):
                optimizer.step()
            optimizer.zero_grad()
        return loss


class Two(Manual):
    def configure_optimizers(self) -> Any:
        return [torch.optim.SGD(self.parameters(), 0.1), torch.optim.SGD(self.parameters(), 0.1)]


def growing(**kwargs: Any) -> AdaptiveBatchSize:
    options: dict[str, Any] = {"max_batch_size": 64, "adjust_every": 2, "lr_scaling": "linear"}
    return AdaptiveBatchSize(lambda m: 2 * m.batch_size, **{**options, **kwargs})


@pytest.mark.parametrize("every", [1, 2])
def test_a_constant_size_is_plain_lightning_bit_for_bit(every: int) -> None:
    runs = []
    for callbacks in ([], [AdaptiveBatchSize("constant", lr_scaling="linear")]):
        model = Manual(every)
        made = fit(model, loader(), callbacks)
        runs.append((list(model.parameters()), model.loss_trace, model.logged, made.global_step))
    assert all(torch.equal(a, b) for a, b in zip(runs[0][0], runs[1][0], strict=True))
    assert runs[0][1:] == runs[1][1:]


def test_the_loader_is_resized_and_each_step_has_the_rate_of_its_batch() -> None:
    model = Manual()
    callback = growing()
    fit(model, loader(), [callback], max_epochs=3)
    assert [sorted(epoch) for epoch in model.epochs] == [list(range(SAMPLES))] * 3
    assert {16, 32, 64} <= set(model.sizes)
    whole = [(n, lr) for n, lr in zip(model.sizes, model.used_lr, strict=True) if n in (16, 32, 64)]
    assert [lr for _, lr in whole] == pytest.approx([0.1 * n / B0 for n, _ in whole])
    assert model.scheduled_lr == [0.1] * len(model.sizes)
    assert [u.batch_size for u in callback.history.updates] == model.sizes
    assert [u.micro_batch_size for u in callback.history.updates] == model.sizes


def test_batches_that_the_user_accumulates_are_part_of_the_users_rate() -> None:
    model = Manual(every=2)
    callback = AdaptiveBatchSize("constant", lr_scaling="linear")
    made = fit(model, loader(), [callback], max_epochs=1)
    assert model.used_lr == [0.1] * len(model.used_lr)
    assert len(callback.history.updates) == len(model.used_lr) == made.global_step == 7


def test_several_steps_for_a_batch_all_have_its_rate() -> None:
    model = Manual(times=3)
    callback = AdaptiveBatchSize(lambda m: 32, max_batch_size=32, adjust_every=1, lr_scaling="linear")
    fit(model, loader(), [callback], max_epochs=1)
    assert model.used_lr[:6] == pytest.approx([0.1] * 3 + [0.2] * 3)
    assert len(callback.history.updates) == len(model.sizes)


def test_the_time_of_a_step_is_measured() -> None:
    callback = growing()
    fit(Manual(), loader(), [callback], max_epochs=6)
    assert callback.controller.step_time.measured
    assert callback.history.updates[-1].throughput > 0


def test_what_needs_the_noise_stays_as_it_is_and_that_is_said() -> None:
    model = Manual()
    callback = AdaptiveBatchSize(max_batch_size=64)
    with pytest.warns(UserWarning, match="cannot measure the gradient noise in manual optimization"):
        fit(model, loader(), [callback])
    assert callback.history.changes == []
    assert callback.history.updates[-1].noise_scale != callback.history.updates[-1].noise_scale  # NaN


@pytest.mark.filterwarnings("default:an update that does not fit")
def test_auto_is_switched_off_with_one_warning() -> None:
    with pytest.warns(UserWarning, match="will not be split: in manual optimization the backward passes") as caught:
        fit(Manual(), loader(), [AdaptiveBatchSize("constant", lr_scaling="none")])
    assert len([w for w in caught if "will not be split" in str(w.message)]) == 1


@pytest.mark.parametrize("wish", [{"micro_batch_size": 8}, {"memory_budget": "1GiB"}, {"self_check": True}])
def test_what_was_asked_for_is_refused(wish: dict[str, Any]) -> None:
    (name, value) = next(iter(wish.items()))
    with pytest.raises(ValueError, match=f"{name}={value!r} needs updates that can be split, but in manual"):
        fit(Manual(), loader(), [AdaptiveBatchSize("constant", **wish)])


def test_several_optimizers_are_refused() -> None:
    with pytest.raises(ValueError, match="exactly one optimizer, but configure_optimizers returned 2"):
        fit(Two(), loader(), [AdaptiveBatchSize("constant")])


def test_the_strategy_is_given_back_as_it_was() -> None:
    made = fit(Manual(), loader(), [growing()])
    assert "optimizer_step" not in made.strategy.__dict__
    assert isinstance(made.lightning_module.net, nn.Sequential)
