"""Every policy drives a real run on sklearn's digits; what a resize promises holds under each of them."""

from __future__ import annotations

import math
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from lightning_problems import trainer
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from adaptive_batch.callbacks import AdaptiveBatchSize
from adaptive_batch.lr_scaling import LinearScaling
from adaptive_batch.policies import (
    CABS,
    BigBatch,
    Clamp,
    Constant,
    CriticalBatchWarmup,
    DontDecay,
    GeometricGrowth,
    GradientDiversity,
    InnerProductTest,
    LinearRamp,
    LossProportional,
    Max,
    Milestones,
    Min,
    NoiseScale,
    NormTest,
    OnlyGrow,
    Plateau,
    Seesaw,
    Sequential,
)

SAMPLES, B0, EPOCHS = 480, 16, 5
LR = 0.03  # the gradient is still large beside its noise at the end


class Digits(pl.LightningModule):
    """A small network that records which samples each update saw, and the rate it used."""

    def __init__(self, *, decay: float | None = None) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(64, 16), nn.ReLU(), nn.Linear(16, 10))
        self.decay = decay
        self.epochs: list[list[int]] = []
        self.sizes: list[int] = []
        self.used: list[float] = []
        self.scheduled: list[float] = []
        self.losses: list[float] = []

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y, _ = batch
        return nn.functional.cross_entropy(self.net(x), y)

    def on_train_epoch_start(self) -> None:
        self.epochs.append([])

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        self.epochs[-1] += batch[2].tolist()
        self.sizes.append(len(batch[2]))
        self.scheduled.append(self.trainer.optimizers[0].param_groups[0]["lr"])

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        self.used.append(optimizer.param_groups[0]["lr"])

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.losses.append(float(outputs["loss"]))

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), lr=LR)
        if self.decay is None:
            return optimizer
        return [optimizer], [torch.optim.lr_scheduler.ExponentialLR(optimizer, self.decay)]


@pytest.fixture(scope="module")
def digits() -> TensorDataset:
    x, y = load_digits(return_X_y=True)
    images = torch.as_tensor(x[:SAMPLES] / 16, dtype=torch.float32)
    return TensorDataset(images, torch.as_tensor(y[:SAMPLES]), torch.arange(SAMPLES))


def fit(digits: TensorDataset, model: Digits, callbacks: Any, *, batch_size: int = B0, epochs: int = EPOCHS) -> None:
    pl.seed_everything(1, verbose=False)
    for layer in model.net:
        if isinstance(layer, nn.Linear):
            layer.reset_parameters()
    trainer(callbacks, max_epochs=epochs).fit(model, DataLoader(digits, batch_size=batch_size, shuffle=True))


# policy, the sizes that the run has to have reached: at least, at most, options
RUNS: dict[str, tuple[Any, float, float, dict[str, Any]]] = {
    "goodput": (lambda: "goodput", 0, math.inf, {}),  # reads the clock
    "noise_scale": (lambda: NoiseScale(4.0), 32, math.inf, {}),
    "norm_test": (lambda: NormTest(0.2), 32, math.inf, {}),
    "inner_product_test": (lambda: InnerProductTest(0.1, 1.0), 32, math.inf, {}),
    "big_batch": (lambda: BigBatch(0.5, theta=0.5), 24, math.inf, {}),
    "cabs": (lambda: CABS(1000.0), 32, math.inf, {}),
    "cabs down": (lambda: CABS(0.01), 0, 12, {"min_batch_size": 12}),
    "gradient_diversity": (lambda: GradientDiversity(4.0), 32, math.inf, {}),
    "loss_proportional": (lambda: LossProportional(1.8), 32, math.inf, {}),
    "plateau": (lambda: Plateau(2.0, patience=0, threshold=0.5), 32, math.inf, {}),
    "critical_batch_warmup": (lambda: CriticalBatchWarmup({480: 40, 1200: 70}), 64, math.inf, {}),
    "constant": (lambda: Constant(50), 50, math.inf, {}),
    "milestones": (lambda: Milestones({1: 64, 3: 8}), 64, 8, {"min_batch_size": 4}),
    "geometric_growth": (lambda: GeometricGrowth(1.5, 1), 60, math.inf, {}),
    "geometric_growth down": (lambda: GeometricGrowth(0.8, 1), 0, 8, {"min_batch_size": 4}),
    "linear_ramp": (lambda: LinearRamp(None, 99, 1500), 99, math.inf, {}),
    "linear_ramp down": (lambda: LinearRamp(None, 10, 1500), 0, 10, {"min_batch_size": 4}),
    "dont_decay": (DontDecay, 80, math.inf, {}),
    "seesaw": (Seesaw, 80, math.inf, {}),
    "clamp": (lambda: Clamp(lambda m: 1000, max_batch_size=40), 40, math.inf, {}),
    "only_grow": (lambda: OnlyGrow(Milestones({1: 64, 3: 8})), 64, math.inf, {}),
    "max": (lambda: Max(NoiseScale(0.1), LinearRamp(None, 64, 2000)), 64, math.inf, {}),
    "min": (lambda: Min(lambda m: 500, LinearRamp(None, 64, 2000)), 64, math.inf, {}),
    "sequential": (lambda: Sequential({0: Constant(64), 20: Constant()}, unit="updates"), 64, B0, {}),
}


@pytest.mark.parametrize("name", RUNS)
def test_each_sample_once_and_each_update_at_the_rate_of_its_own_size(digits, name):
    make, at_least, at_most, options = RUNS[name]
    policy = make()
    owns = hasattr(policy, "lr_factor")
    callback = AdaptiveBatchSize(
        policy,
        lr_scaling="auto" if owns else "linear",
        adjust_every=5,
        max_batch_size=100,
        noise="micro_batches",  # measures more of the updates of a run as short as this
        verbose=False,
        **options,
    )
    model = Digits(decay=0.6 if owns else None)
    fit(digits, model, [callback])

    assert all(sorted(epoch) == list(range(SAMPLES)) for epoch in model.epochs)
    assert max(model.sizes) >= at_least
    sizes = callback.history.column("batch_size")
    assert sizes == model.sizes
    inside = [size for update, size in zip(callback.history.updates, sizes, strict=True) if update.samples % SAMPLES]
    assert min(inside[inside.index(max(inside)) :]) <= at_most
    assert all(change.reason for change in callback.history.changes)

    nominal = {change.step: change.batch_size for change in callback.history.changes}
    peak = max(model.scheduled)
    for update, used, scheduled in zip(callback.history.updates, model.used, model.scheduled, strict=True):
        counted = update.batch_size
        if update.samples % SAMPLES == 0:  # a tail counts for no less than the size in force or the reference
            in_force = next((nominal[step] for step in sorted(nominal, reverse=True) if step < update.step), B0)
            counted = max(counted, min(in_force, B0))
        k = counted / B0
        factor = {"cabs": 1.0, "dont_decay": k, "seesaw": k**0.5}[policy.name] if owns else k
        expected = scheduled * factor
        assert used == pytest.approx(min(expected, max(peak, scheduled)) if owns else expected, rel=1e-9)
    assert model.losses[-1] < model.losses[0]


def test_the_batch_grows_where_the_schedule_decays_and_the_rate_stays(digits):
    for policy, power in (("dont_decay", 1.0), ("seesaw", 0.5)):
        model = Digits(decay=0.7)
        callback = AdaptiveBatchSize(policy, adjust_every=1, max_batch_size=1000, verbose=False)
        fit(digits, model, [callback])
        for epoch, change in enumerate(callback.history.changes[:4], start=1):
            assert change.epoch == epoch
            assert change.batch_size == round(B0 / 0.7**epoch)
            assert "learning rate" in change.reason
        assert len(callback.history.changes) == EPOCHS - 1
        fraction = 0.7 ** (EPOCHS - 1)
        settled = [u for u, s in zip(model.used, model.sizes, strict=True) if s == round(B0 / fraction)]
        assert settled[0] == pytest.approx(LR * fraction ** (1 - power), rel=0.02)


_OPTIONS = LinearScaling(betas="half_life", weight_decay="timescale", rewarm=3)


@pytest.mark.parametrize(
    ("policy", "rule"),
    [
        ("constant", "auto"),
        ("constant", _OPTIONS),
        ("constant", "sde"),
        ("dont_decay", "auto"),
        ("seesaw", "auto"),
        (GeometricGrowth(1.0), _OPTIONS),
        (Milestones({0: 64}), "sde"),
        (Clamp("constant"), "linear"),
        (OnlyGrow("constant"), "adascale"),
        (Sequential({0: "constant"}), "adascale"),
    ],
)
def test_a_size_that_stays_the_loaders_own_is_plain_lightning_bit_for_bit(digits, policy, rule):
    plain, adapted = Digits(), Digits()
    fit(digits, plain, [], batch_size=64, epochs=2)  # with a tail
    callback = AdaptiveBatchSize(policy, lr_scaling=rule, max_batch_size=96, verbose=False)
    fit(digits, adapted, [callback], batch_size=64, epochs=2)
    assert plain.losses == adapted.losses
    for p, q in zip(plain.parameters(), adapted.parameters(), strict=True):
        assert torch.equal(p, q)


def test_a_bound_that_moves_a_constant_size_has_its_rate_scaled_like_any_other(digits):
    factors = []
    for policy in ("constant", Constant(64), lambda m: 32):
        callback = AdaptiveBatchSize(policy, min_batch_size=64, lr_scaling="adascale", adjust_every=5, verbose=False)
        model = Digits()
        fit(digits, model, [callback])
        assert callback.batch_size == 64
        factors.append([u.lr_scale for u in callback.history.updates])
    assert factors[0] == factors[1] == factors[2]
    assert max(factors[0]) > 1


@pytest.mark.parametrize("make", [Plateau, CABS, DontDecay, lambda: Max(BigBatch(0.5, theta=0.5), "norm_test")])
def test_a_resumed_run_repeats_the_decisions_of_a_policy_with_a_memory(digits, make, tmp_path):
    def callback() -> AdaptiveBatchSize:
        policy = Plateau(2.0, patience=0, threshold=0.5) if make is Plateau else make()
        return AdaptiveBatchSize(policy, adjust_every=5, max_batch_size=100, verbose=False)

    def run(model: Digits, callbacks: Any, epochs: int, ckpt_path: Any = None, **options: Any) -> pl.Trainer:
        data = DataLoader(digits, batch_size=B0, shuffle=True, generator=torch.Generator().manual_seed(0))
        made = trainer(callbacks, max_epochs=epochs, **options)
        made.fit(model, data, ckpt_path=ckpt_path)
        return made

    torch.manual_seed(3)
    start = Digits(decay=0.7).state_dict()
    models = [Digits(decay=0.7) for _ in range(3)]
    for model in models:
        model.load_state_dict(start)
    whole, first, second = callback(), callback(), callback()
    run(models[0], [whole], 4)
    run(models[1], [first], 2).save_checkpoint(tmp_path / "half.ckpt")
    run(models[2], [second], 4, tmp_path / "half.ckpt")
    assert models[0].losses[len(models[1].losses) :] == models[2].losses
    assert second.history.changes == whole.history.changes
    assert models[1].losses == models[0].losses[: len(models[1].losses)]
