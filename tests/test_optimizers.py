"""Optimizers that people use: each update at the rate of its own size, and everything put back afterwards."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from lightning_problems import Classifier, fit, loader
from torch import Tensor, nn

from adaptive_batch import BatchSizeController, MiniBatchTrainer
from adaptive_batch.callbacks import AdaptiveBatchSize
from adaptive_batch.lr_scaling import LinearScaling, NoScaling, SDEScaling, SqrtScaling, gain
from adaptive_batch.measurement import Measurement
from adaptive_batch.policies import CABS, Constant, DontDecay, LinearRamp, Milestones


class Lion(torch.optim.Optimizer):
    """As found outside torch: its own loop over ``param_groups``."""

    def __init__(self, params: Any, lr: float) -> None:
        super().__init__(params, {"lr": lr, "betas": (0.9, 0.99)})

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            first, second = group["betas"]
            for p in group["params"]:
                moment = self.state[p].setdefault("moment", torch.zeros_like(p))
                p -= group["lr"] * (first * moment + (1 - first) * p.grad).sign()
                moment.mul_(second).add_(p.grad, alpha=1 - second)
        return loss


class ScheduleFree(torch.optim.Optimizer):
    """SGD whose weights are an average weighted by the squared rate, with modes for training and evaluation."""

    def __init__(self, params: Any, lr: float) -> None:
        super().__init__(params, {"lr": lr, "weight_sum": 0.0, "train_mode": True})

    def train(self) -> None:
        self._swap(True)

    def eval(self) -> None:
        self._swap(False)

    @torch.no_grad()
    def _swap(self, mode: bool) -> None:
        for group in self.param_groups:
            if group["train_mode"] != mode:
                for p in group["params"]:
                    if "other" in self.state[p]:
                        mine = p.clone()
                        p.copy_(self.state[p]["other"])
                        self.state[p]["other"] = mine
                group["train_mode"] = mode

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            weight = group["lr"] ** 2
            group["weight_sum"] += weight
            for p in group["params"]:
                p -= group["lr"] * p.grad
                mean = self.state[p].setdefault("other", p.clone())
                mean.lerp_(p, weight / group["weight_sum"])
        return loss


OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.05),
    "momentum": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9),
    "nesterov": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, nesterov=True, weight_decay=1e-3),
    "adam": lambda p: torch.optim.Adam(p, lr=0.01),
    "adam_foreach": lambda p: torch.optim.Adam(p, lr=0.01, foreach=True),
    "adam_tensor": lambda p: torch.optim.Adam(p, lr=torch.tensor(0.01)),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.01, weight_decay=0.1),
    "adamw_fused": lambda p: torch.optim.AdamW(p, lr=0.01, fused=True),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=0.01, momentum=0.5),
    "adagrad": lambda p: torch.optim.Adagrad(p, lr=0.05),
    "lion": lambda p: Lion(p, lr=0.01),
    "schedule_free": lambda p: ScheduleFree(p, lr=0.05),
}

SIZES = [8, 8, 32, 32, 4]  # the last one is an epoch's tail, and counts for the reference of 8


def problem() -> tuple[nn.Module, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(sum(SIZES), 5, generator=generator)
    model = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 1))
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn(p.shape, generator=generator) / 3)
    return model, x, x.sum(1, keepdim=True)


def options_of(optimizer: torch.optim.Optimizer) -> list[dict[str, Any]]:
    return [
        {name: copy.deepcopy(value) for name, value in group.items() if name not in ("params", "weight_sum")}
        for group in optimizer.param_groups
    ]


def by_hand(make: Callable[[Any], torch.optim.Optimizer], rule: Any) -> list[Tensor]:
    """The same updates, each with an lr that is written into the optimizer beforehand."""
    model, x, y = problem()
    optimizer = make(model.parameters())
    position = 0
    base = options_of(optimizer)
    for size in SIZES:
        rows = slice(position, position + size)
        position += size
        scale = max(size, 8) / 8
        for group, old in zip(optimizer.param_groups, base, strict=True):
            factor = rule.factor(8 * scale, 8)
            group["lr"] = old["lr"] * factor
            if isinstance(rule, SDEScaling) and "betas" in old and "eps" in old:
                group["betas"] = tuple(1 - scale * (1 - beta) for beta in old["betas"])
                group["eps"] = old["eps"] / scale**0.5
            elif isinstance(rule, SDEScaling) and "alpha" in old:
                group["alpha"], group["eps"] = 1 - scale * (1 - old["alpha"]), old["eps"] / scale**0.5
            elif isinstance(rule, SDEScaling) and "betas" in old:
                group["betas"] = tuple(1 - scale * (1 - beta) for beta in old["betas"])
        optimizer.zero_grad()
        nn.functional.mse_loss(model(x[rows]), y[rows]).backward()
        optimizer.step()
    return [p.detach() for p in model.parameters()]


@pytest.mark.parametrize("rule", [LinearScaling(), SqrtScaling(), SDEScaling()], ids=lambda rule: rule.name)
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_each_update_has_the_rate_of_its_own_size_and_leaves_the_optimizer_as_it_was(name, rule):
    model, x, y = problem()
    optimizer = OPTIMIZERS[name](model.parameters())
    before = options_of(optimizer)
    rates = before[0]["lr"]
    controller = BatchSizeController(
        Milestones({2: 32}, unit="updates"), lr_scaling=rule, adjust_every=1, max_batch_size=32
    )
    trainer = MiniBatchTrainer(
        model, nn.functional.mse_loss, optimizer, batch_size=8, controller=controller, progress=False
    )
    data = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, y), batch_size=8)
    history = trainer.fit(data)
    assert history.column("batch_size") == SIZES
    assert options_of(optimizer) == before
    assert optimizer.param_groups[0]["lr"] == rates
    for p, expected in zip(model.parameters(), by_hand(OPTIMIZERS[name], rule), strict=True):
        assert torch.equal(p, expected)


def test_a_schedule_free_optimizer_weighs_its_average_by_the_rate_that_was_used():
    model, x, y = problem()
    optimizer = ScheduleFree(model.parameters(), lr=0.05)
    controller = BatchSizeController(Milestones({2: 32}, unit="updates"), lr_scaling="linear", adjust_every=1)
    data = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, y), batch_size=8)
    MiniBatchTrainer(model, nn.functional.mse_loss, optimizer, batch_size=8, controller=controller, progress=False).fit(
        data
    )
    assert optimizer.param_groups[0]["weight_sum"] == pytest.approx(0.05**2 * (1 + 1 + 16 + 16 + 1))
    trained = [p.detach().clone() for p in model.parameters()]
    optimizer.eval()
    assert not torch.equal(trained[0], next(model.parameters()))
    optimizer.train()
    assert torch.equal(trained[0], next(model.parameters()))


def test_the_bound_of_the_heavy_balls_rate_follows_a_momentum_that_is_scheduled():
    seen: list[tuple[int, float, float]] = []

    class Cycled(Classifier):
        def configure_optimizers(self) -> Any:
            optimizer = torch.optim.SGD(self.parameters(), lr=0.01, momentum=0.9)
            steps = int(self.trainer.estimated_stepping_batches)
            cycle = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.01, steps, base_momentum=0.3, max_momentum=0.95)
            return [optimizer], [{"scheduler": cycle, "interval": "step"}]

        def on_before_optimizer_step(self, optimizer: Any) -> None:
            noise_scale = callback.controller.rate_noise_scale
            seen.append((self.sizes[-1], optimizer.param_groups[0]["momentum"], noise_scale))

    callback = AdaptiveBatchSize(Milestones({2: 256}, unit="updates"), adjust_every=1, max_batch_size=256)
    fit(Cycled(dropout=0.0), loader(samples=800), [callback], max_epochs=6)
    momenta = [momentum for _, momentum, _ in seen]
    assert min(momenta) < 0.35 and max(momenta) == 0.95
    stable = [(1 + m) / (1 - m) for m in momenta]
    expected = [
        1.0 if math.isnan(phi) else max(gain(size, 16, phi), min(size / 16, bound, 1 + phi / 16))
        for (size, _, phi), bound in zip(seen, stable, strict=True)
    ]
    assert callback.history.column("lr_scale") == pytest.approx(expected)
    assert any(factor == bound < size / 16 for factor, bound, (size, _, _) in zip(expected, stable, seen, strict=True))


def test_lbfgs_is_not_scaled():
    class Searching(Classifier):
        def configure_optimizers(self) -> Any:
            return torch.optim.LBFGS(self.parameters(), lr=0.5, max_iter=3, line_search_fn="strong_wolfe")

    model = Searching(dropout=0.0)
    callback = AdaptiveBatchSize(Milestones({2: 48}, unit="updates"), adjust_every=1, max_batch_size=64)
    fit(model, loader(), [callback], max_epochs=1)
    assert isinstance(callback.controller.lr_scaling, NoScaling)
    assert set(callback.history.column("lr_scale")) == {1.0}
    assert 48 in model.sizes
    assert torch.isfinite(torch.tensor(model.loss_trace)).all()
    with pytest.raises(ValueError, match="LBFGS searches the length of its steps by itself"):
        fit(Searching(dropout=0.0), loader(), [AdaptiveBatchSize("constant", lr_scaling="linear")])


# The start of a fit


def test_sde_is_refused_at_the_start_of_a_fit_whose_maximum_leaves_its_range():
    model = Classifier(optimizer="adam")
    with pytest.raises(ValueError, match=r"beta=0.9 to -0.25 .* 12.5 times"):
        fit(model, loader(), [AdaptiveBatchSize("constant", lr_scaling="sde", max_batch_size=200)])
    assert model.sizes == []
    optimizer = torch.optim.Adam(model.parameters())
    controller = BatchSizeController(Constant(), lr_scaling="sde", max_batch_size=200)
    trainer = MiniBatchTrainer(model.net, nn.functional.cross_entropy, optimizer, batch_size=4, controller=controller)
    with pytest.raises(ValueError, match="50 times"):
        trainer.fit((torch.zeros(300, 8), torch.zeros(300, dtype=torch.long)))


@pytest.mark.parametrize("policy", [CABS(), DontDecay(), "seesaw"])
@pytest.mark.parametrize("rule", ["linear", "adascale", SqrtScaling()])
def test_a_rule_beside_a_policy_that_sets_the_rate_is_refused_at_construction(policy, rule):
    for make in (AdaptiveBatchSize, BatchSizeController):
        with pytest.raises(ValueError, match="sets the learning rate together with the batch size"):
            make(policy, lr_scaling=rule)


def test_inner_products_are_refused_where_only_norms_are_known():
    with pytest.raises(ValueError, match="no inner products"):
        AdaptiveBatchSize("inner_product_test", noise="per_example")


# Re-warm-up


def test_after_growth_the_rate_rises_to_that_of_the_new_size():
    controller = BatchSizeController(
        LinearRamp(None, 64, over=1), lr_scaling=LinearScaling(rewarm=4), adjust_every=1, reference_batch_size=16
    )

    assert controller.lr_factor(16) == 1.0
    controller.observe(Measurement(update=1, samples=16, batch_size=16, reference_batch_size=16))
    assert controller.batch_size == 64
    factors = []
    for update in range(2, 8):
        assert controller.lr_factor(16) == 1.0  # fetched before the change
        assert controller.lr_factor(8) == 0.5  # and a smaller one is never held up
        factors.append(controller.lr_factor(64))
        controller.observe(Measurement(update=update, samples=64 * update, batch_size=64, reference_batch_size=16))
    assert factors == pytest.approx([1.6, 2.2, 2.8, 3.4, 4.0, 4.0])


def test_a_smaller_size_has_its_rate_at_once():

    controller = BatchSizeController(
        LinearRamp(None, 4, over=1),
        lr_scaling=SqrtScaling(rewarm=10),
        adjust_every=1,
        reference_batch_size=16,
        min_batch_size=1,
    )
    controller.observe(Measurement(update=1, samples=16, batch_size=16, reference_batch_size=16))
    assert controller.lr_factor(4) == 0.5


def test_the_rate_rises_from_the_first_larger_update_and_from_the_rate_in_force() -> None:
    controller = BatchSizeController(
        Milestones({1: 64, 8: 128}, unit="updates"),
        lr_scaling=LinearScaling(rewarm=4),
        adjust_every=1,
        reference_batch_size=16,
    )
    factors = []
    for update in range(1, 14):
        size = 16 if update < 6 else 64 if update < 9 else 128  # four updates were fetched before the first change
        factors.append(controller.lr_factor(size))
        controller.observe(Measurement(update=update, batch_size=size, reference_batch_size=16))
    assert factors[:5] == [1.0] * 5
    assert factors[5:8] == pytest.approx([1.6, 2.2, 2.8])
    # the change at update 8 comes before the ramp has ended, with 3.4 due next
    assert factors[8:] == pytest.approx([3.4 + i * (8 - 3.4) / 5 for i in (1, 2, 3, 4, 5)])


class WithoutRate(torch.optim.Optimizer):
    """As those that find their own rate: ``lr=None``, or no entry at all."""

    def __init__(self, params: Any, **defaults: Any) -> None:
        super().__init__(params, defaults)

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        with torch.enable_grad():
            loss = closure()
        for p in self.param_groups[0]["params"]:
            p -= 0.01 * p.grad
        return loss


@pytest.mark.parametrize("defaults", [{"lr": None}, {"step_length": 1.0}])
def test_where_there_is_no_rate_none_is_scaled_and_that_is_said(
    defaults: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    class Own(Classifier):
        def configure_optimizers(self) -> Any:
            return WithoutRate(self.parameters(), **defaults)

        def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
            pass

        def on_before_optimizer_step(self, optimizer: Any) -> None:
            pass

    policy = Milestones({2: 20}, unit="updates")
    callback = AdaptiveBatchSize(policy, adjust_every=1)
    with caplog.at_level("INFO", logger="pytorch_lightning.adaptive_batch"):
        fit(Own(), loader(), [callback])
    assert 20 in callback.history.column("batch_size")
    assert set(callback.history.column("lr_scale")) == {1.0}
    assert "the learning rate stays what it is at every batch size, since WithoutRate has no lr" in caplog.text
    with pytest.raises(ValueError, match="cannot be scaled with the batch size, since WithoutRate has no lr"):
        fit(Own(), loader(), [AdaptiveBatchSize(policy, lr_scaling="linear")])
    with pytest.raises(ValueError, match="since WithoutRate has no lr"):  # whose policy needs a rate
        fit(Own(), loader(), [AdaptiveBatchSize("dont_decay")])

    def trainer(rule: str) -> MiniBatchTrainer:
        model, *_ = problem()
        controller = BatchSizeController(LinearRamp(None, 32, over=1), lr_scaling=rule, adjust_every=1)
        optimizer = WithoutRate(model.parameters(), **defaults)
        return MiniBatchTrainer(model, nn.functional.mse_loss, optimizer, controller=controller, batch_size=8)

    _, x, y = problem()
    assert set(trainer("none").fit((x, y), epochs=1).column("lr_scale")) == {1.0}
    with pytest.raises(ValueError, match="since WithoutRate has no lr"):
        trainer("linear").fit((x, y), epochs=1)


class TestSummedLosses:
    """A sum grows with its samples: at the rate of ``B0`` samples' sum it is the mean's run at every size."""

    @pytest.mark.parametrize("optimizer", ["sgd", "adam"])
    @pytest.mark.parametrize("accumulate", [1, 2])
    @pytest.mark.parametrize("parts", [None, 5])
    def test_the_run_is_that_of_the_mean(self, optimizer: str, accumulate: int, parts: int | None) -> None:
        def run(reduction: str) -> tuple[list[Tensor], list[float], list[float]]:
            class Model(Classifier):
                def training_step(self, batch: Any, batch_idx: int) -> Tensor:
                    x, y, _, _ = batch
                    return nn.functional.cross_entropy(self.net(x), y, reduction=reduction)

                def configure_optimizers(self) -> Any:
                    scale = 1 / 16 if reduction == "sum" else 1.0
                    if optimizer == "adam":
                        return torch.optim.Adam(self.parameters(), lr=0.01, eps=1e-8 / scale)
                    return torch.optim.SGD(self.parameters(), lr=0.1 * scale, momentum=0.9)

            torch.manual_seed(0)
            callback = AdaptiveBatchSize(
                Milestones({3: 32 * accumulate, 8: 64 * accumulate}, unit="updates"),
                adjust_every=1,
                lr_scaling="adascale",
                noise="micro_batches",
                loss_reduction=reduction,
                micro_batch_size=parts or "auto",
                seed=0,
            )
            model = Model(dropout=0.0)
            fit(model, loader(samples=640), [callback], accumulate_grad_batches=accumulate)
            history = callback.history
            return list(model.parameters()), history.column("noise_scale"), history.column("lr_scale")

        (mean, mean_noise, mean_rates), (summed, noise, rates) = run("mean"), run("sum")
        assert max(rates) > 1.0
        assert rates == pytest.approx(mean_rates, rel=1e-3)
        assert noise == pytest.approx(mean_noise, rel=1e-3, nan_ok=True)
        for one, other in zip(mean, summed, strict=True):
            torch.testing.assert_close(one, other, rtol=2e-4, atol=2e-6)

    def test_a_rate_that_is_not_scaled_leaves_the_sum_alone(self) -> None:
        class Model(Classifier):
            def training_step(self, batch: Any, batch_idx: int) -> Tensor:
                x, y, _, _ = batch
                return nn.functional.cross_entropy(self.net(x), y, reduction="sum")

            def on_after_backward(self) -> None:
                x = torch.cat([p.grad.flatten() for p in self.parameters() if p.grad is not None])
                norms.append(float(x.norm()))

            def configure_optimizers(self) -> Any:
                return torch.optim.SGD(self.parameters(), lr=0.0)

        found = []
        for rule in ("none", "linear"):
            norms: list[float] = []
            torch.manual_seed(0)
            options: dict[str, Any] = {"adjust_every": 1, "lr_scaling": rule, "loss_reduction": "sum"}
            callback = AdaptiveBatchSize(Milestones({1: 203}, unit="updates"), max_batch_size=203, **options)
            fit(Model(dropout=0.0), loader(shuffle=False), [callback])
            found.append(norms[-1])
        assert found[0] == pytest.approx(found[1] * 203 / 16, rel=1e-4)

    def test_the_plain_trainer_does_the_same(self) -> None:
        def run(reduction: str) -> tuple[list[Tensor], list[float]]:
            model, x, y = problem()
            trainer = MiniBatchTrainer(
                model,
                nn.MSELoss(reduction=reduction),
                torch.optim.SGD(model.parameters(), lr=0.1 / 8 if reduction == "sum" else 0.1),
                controller=BatchSizeController(LinearRamp(None, 32, over=1), lr_scaling="linear", adjust_every=1),
                batch_size=8,
                loss_reduction=reduction,
                seed=0,
            )
            history = trainer.fit((x, y), epochs=3)
            return list(model.parameters()), history.column("lr_scale")

        (mean, rates), (summed, summed_rates) = run("mean"), run("sum")
        assert rates == summed_rates and max(rates) == 4.0
        for one, other in zip(mean, summed, strict=True):
            torch.testing.assert_close(one, other)


def test_policies_see_the_mean_of_a_summed_loss() -> None:
    def run(reduction: str) -> list[float]:
        seen: list[float] = []

        class Model(Classifier):
            def training_step(self, batch: Any, batch_idx: int) -> Tensor:
                x, y, _, _ = batch
                return nn.functional.cross_entropy(self.net(x), y, reduction=reduction)

            def configure_optimizers(self) -> Any:
                return torch.optim.SGD(self.parameters(), lr=0.0)

        def policy(m: Measurement) -> float:
            seen.append(float(m.loss))
            return 16.0 if m.update < 5 else 64.0

        callback = AdaptiveBatchSize(policy, adjust_every=1, loss_reduction=reduction, seed=0)
        fit(Model(dropout=0.0), loader(samples=640), [callback], accumulate_grad_batches=2)
        return seen

    assert run("sum") == pytest.approx(run("mean"), rel=1e-4)
