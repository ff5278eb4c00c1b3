"""Other policies on recorded runs."""

from __future__ import annotations

import io
import math
from collections import deque
from dataclasses import replace
from typing import Any

import pytest
import torch
from lightning_problems import Classifier, fit, loader
from test_controller import Run, controller_of
from torch import nn

from adaptive_batch import BatchSizeController, History, MiniBatchTrainer, Update, replay
from adaptive_batch.callbacks import AdaptiveBatchSize
from adaptive_batch.measurement import Measurement
from adaptive_batch.policies import (
    CABS,
    BigBatch,
    DontDecay,
    GeometricGrowth,
    InnerProductTest,
    LinearRamp,
    NormTest,
    Plateau,
)


def recorded(policy: Any, updates: int = 1500, **options: Any) -> tuple[History, Run]:
    controller, history = controller_of(policy), History(20_000)
    controller.record = history.measurements.append
    run = Run(controller, **options)
    for _ in range(updates):
        run.step()
        size, seconds = run.sizes[-1], run.time(run.sizes[-1])
        history.add(Update(run.update, 0, run.samples, size, size, 1.0, 1.0, size / seconds, seconds))
    return history, run


@pytest.mark.parametrize(
    "policy",
    ["noise_scale", "norm_test", InnerProductTest(0.05, 0.05), BigBatch(), GeometricGrowth(2.0, 300, unit="updates")],
)
def test_the_policy_of_the_run_decides_as_it_did(policy):
    history, run = recorded(policy, phi=200.0)
    fresh = BigBatch() if isinstance(policy, BigBatch) else policy
    replayed = replay(history, fresh, max_batch_size=4096)
    assert [(c.step, c.batch_size, c.previous, c.reason) for c in replayed] == [
        (update, d.batch_size, d.previous, d.reason) for update, d in run.changes
    ]
    assert isinstance(policy, BigBatch) or replayed


def test_a_run_with_batches_ahead_is_replayed_as_it_was():
    controller, history = controller_of("noise_scale"), History()
    controller.record = history.measurements.append
    run, drawn = Run(controller, phi=2000.0), deque([32] * 16)
    while run.update < 600:
        drawn.append(run.batch_size)
        run.step(drawn.popleft())
    replayed = replay(history, "noise_scale", max_batch_size=4096)
    assert [(c.step, c.batch_size) for c in replayed] == [(update, d.batch_size) for update, d in run.changes]
    assert len(replayed) >= 3


def test_another_policy_on_the_same_measurements():
    history, run = recorded("noise_scale", phi=200.0)
    changes = replay(history, NormTest(0.9), max_batch_size=4096)
    assert changes[-1].batch_size == 64 < run.batch_size  # 200 (1 / 0.81 - 1) = 47
    growth = replay(history, GeometricGrowth(3.0, 700, unit="updates"), max_batch_size=4096)
    assert [(c.step, c.batch_size) for c in growth] == [(700, 96), (1400, 288)]
    assert replay(history, lambda m: 77)[0].batch_size == 77


def test_step_times_are_those_of_the_recorded_updates():
    history, _ = recorded("noise_scale", phi=320.0)
    changes = replay(history, "goodput", max_batch_size=4096)
    assert 64 <= changes[-1].batch_size <= 256  # sqrt(320 * 2 * 32) = 143
    assert "predicted" in changes[-1].reason


def test_tails_and_the_first_updates_at_a_size_are_not_timed_as_in_the_run_itself():
    history = History(1000)
    slow = {16: 0.1, 32: 1.0, 64: 1.5}
    for update in range(1, 201):
        size = 16 if update % 8 == 0 else 32 if update <= 100 else 64
        first = update in (101, 102)
        history.add(Update(update, 0, 32 * update, size, size, 1.0, 1.0, 1.0, 50.0 if first else slow[size]))
        if update % 10 == 0:
            present = 32 if update <= 100 else 64
            m = Measurement(update=update, samples=32 * update, batch_size=present, reference_batch_size=32)
            history.measurements.append(replace(m, noise_scale=300.0, interval=(250.0, 350.0)))
    seen: list[Measurement] = []

    class Looks:
        needs = frozenset({"noise", "step_time"})

        def propose(self, m: Measurement) -> float:
            seen.append(m)
            return 32.0

        def __deepcopy__(self, memo: Any) -> Any:
            return self

    replay(history, Looks())
    model = seen[-1].step_time
    assert model is not None and model.measured == [32, 64]
    assert (model.predict(32), model.predict(64)) == (1.0, 1.5)


def test_bounds_are_obeyed():
    history, _ = recorded("noise_scale", phi=200.0)
    assert max(c.batch_size for c in replay(history, "noise_scale", max_batch_size=100)) == 100


def test_the_policy_that_is_passed_is_not_changed():
    history, _ = recorded("noise_scale", phi=200.0)
    policy = Plateau(patience=0)
    before = policy.state_dict()
    replay(history, policy)
    assert policy.state_dict() == before


def test_a_run_without_what_the_policy_needs_is_refused():
    with pytest.raises(ValueError, match="no decisions"):
        replay(History(), "constant")
    history, _ = recorded(lambda m: 32, updates=50, edit=lambda m: m)

    bare = History()
    for m in history.measurements:
        bare.measurements.append(type(m)(update=m.update, samples=m.samples, batch_size=32, reference_batch_size=32))
    with pytest.raises(ValueError, match=r"cabs needs 'variance'.*dry_run=True"):
        replay(bare, CABS())
    assert replay(bare, "constant") == []


def test_only_the_last_decisions_are_kept():
    controller, history = controller_of(lambda m: 32 + m.update % 7, adjust_every=1), History(10)
    controller.record = history.measurements.append
    Run(controller).steps(2100)
    assert (len(history.measurements), history.measurements[0].update) == (2000, 101)


def test_measurements_survive_a_checkpoint_bit_for_bit():
    history, _ = recorded("noise_scale", updates=300, phi=200.0)
    buffer = io.BytesIO()
    torch.save(history.state_dict(), buffer)
    buffer.seek(0)
    other = History(20_000)
    other.load_state_dict(torch.load(buffer, weights_only=True))
    assert list(map(repr, other.measurements)) == list(map(repr, history.measurements))
    assert replay(other, "noise_scale") == replay(history, "noise_scale")


def test_a_lightning_run_can_be_replayed():
    model = Classifier("lambda")
    callback = AdaptiveBatchSize("noise_scale", adjust_every=2, dry_run=True, max_batch_size=64, verbose=False)
    fit(model, loader(), [callback], max_epochs=3)
    assert not callback.history.changes or len(set(model.sizes[:12])) == 1
    changes = replay(callback.history, DontDecay(), max_batch_size=64)
    assert [change.batch_size for change in changes][-1] == 64
    assert math.isfinite(float(callback.history.measurements[0].loss))


def test_a_run_that_accumulates_is_replayed_in_its_steps():
    callback = AdaptiveBatchSize(LinearRamp(None, 100, 3000), lr_scaling="none", max_batch_size=100, verbose=False)
    fit(Classifier(), loader(batch_size=8), [callback], max_epochs=20, accumulate_grad_batches=3)
    changes = callback.history.changes
    assert {change.batch_size % 3 for change in changes} == {0} and len(changes) > 3
    assert replay(callback.history, LinearRamp(None, 100, 3000), max_batch_size=100, multiple_of=3) == changes


def test_a_run_of_the_plain_trainer_can_be_replayed():
    controller = BatchSizeController("constant", lr_scaling="none", adjust_every=2)
    model = nn.Linear(3, 1)
    trainer = MiniBatchTrainer(
        model,
        nn.functional.mse_loss,
        torch.optim.SGD(model.parameters(), lr=0.01),
        batch_size=8,
        controller=controller,
        progress=False,
    )
    history = trainer.fit((torch.randn(64, 3), torch.randn(64, 1)), epochs=2)
    changes = replay(history, GeometricGrowth(2.0, 1))
    assert [(change.step, change.batch_size) for change in changes] == [(10, 16)]


def test_what_is_no_history_is_refused():
    with pytest.raises(TypeError, match=r"\[1\] is no history: pass the history of a callback or trainer"):
        replay([1], "goodput")  # type: ignore[arg-type]
