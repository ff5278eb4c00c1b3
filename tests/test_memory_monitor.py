"""MemoryMonitor measures, predicts, logs, and changes nothing."""

from __future__ import annotations

from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from lightning_problems import Classifier, fit, loader
from torch import Tensor, nn
from torch.utils.data import DataLoader

from adaptive_batch.callbacks import AdaptiveBatchSize, AutoMicroBatch, MemoryMonitor
from adaptive_batch.policies import Milestones


class Trace(pl.Callback):
    def __init__(self) -> None:
        self.rows: list[dict[str, float]] = []

    def on_train_batch_end(self, trainer: Any, *args: Any) -> None:
        self.rows.append(
            {k[15:]: float(v) for k, v in trainer.callback_metrics.items() if k.startswith("adaptive_batch/")}
        )


class Plain(Classifier):
    """For batches of any kind."""

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        pass

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        pass


def batches(*sizes: int) -> DataLoader[Any]:
    rows: Any = [(torch.randn(n, 8), torch.randint(0, 2, (n,)), torch.zeros(n), torch.zeros(n)) for n in sizes]
    return DataLoader(rows, batch_size=None)


@pytest.mark.parametrize("others", [list, lambda: [AdaptiveBatchSize("constant")]], ids=["alone", "beside"])
def test_the_run_stays_what_it_is_bit_for_bit(others: Any) -> None:
    plain, monitored = Classifier("cosine"), Classifier("cosine")
    fit(plain, loader())
    fit(monitored, loader(), [MemoryMonitor(), *others()])
    assert plain.logged == monitored.logged
    assert all(torch.equal(a, b) for a, b in zip(plain.parameters(), monitored.parameters(), strict=True))


def test_it_measures_what_is_saved_for_backward() -> None:
    trace = Trace()
    fit(Plain(dropout=0.0), batches(10, 20, 40), [MemoryMonitor(), trace], max_epochs=1)
    peaks = [row["peak_memory"] for row in trace.rows]
    # Per sample: 8 inputs, 16 outputs of ReLU (once: they are the next layer's inputs), 2 of the log-softmax
    # in float32, and a target; beside them the weight of the mean.
    assert peaks == [10 * ((8 + 16 + 2) * 4 + 8) + 4, 20 * 112 + 4, 40 * 112 + 4]


def test_it_predicts_a_size_from_two_others_and_logs_the_error() -> None:
    trace = Trace()
    monitor = MemoryMonitor()
    fit(Plain(), batches(10, 20, 64), [monitor, trace], max_epochs=1)
    first, second, third = trace.rows
    assert first["predicted_peak_memory"] != first["predicted_peak_memory"]  # nothing is known yet
    assert second["peak_memory_error"] != second["peak_memory_error"]
    assert third["predicted_peak_memory"] == pytest.approx(third["peak_memory"], rel=1e-6)
    assert third["peak_memory_error"] == pytest.approx(0.0, abs=1e-6)
    assert monitor.model.measured == [10, 20, 64]


def test_an_error_is_an_error() -> None:
    class Bent(Plain):
        """Samples that take more, the more there are."""

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            repeated = batch[0].repeat(1 + len(batch[0]) // 50, 1)
            loss: Tensor = self.net(repeated).exp().mean()
            return loss

    trace = Trace()
    fit(Bent(), batches(10, 20, 60), [MemoryMonitor(), trace], max_epochs=1)
    last = trace.rows[-1]
    assert last["peak_memory_error"] == pytest.approx(last["predicted_peak_memory"] / last["peak_memory"] - 1)
    assert last["peak_memory_error"] < -0.4


@pytest.mark.parametrize("order", [1, -1])
def test_of_a_batch_in_parts_the_largest_counts(order: int) -> None:
    monitor = MemoryMonitor()
    fit(Classifier(), loader(), [monitor, AutoMicroBatch(micro_batch_size=6)][::order])
    assert monitor.model.measured == [6]  # 16 = 6 + 5 + 5, and a tail of 11 = 6 + 5


def test_beside_a_batch_size_that_grows_it_follows() -> None:
    monitor, trace = MemoryMonitor(), Trace()
    callback = AdaptiveBatchSize(Milestones({3: 32, 6: 64}, unit="updates"), max_batch_size=64, adjust_every=1)
    fit(Classifier(), loader(), [callback, monitor, trace], max_epochs=2)
    assert {16, 32, 64} <= set(monitor.model.measured)
    grown = next(row for row in trace.rows if row["batch_size"] == 64)
    assert grown["peak_memory_error"] == pytest.approx(0.0, abs=1e-6)


def test_torch_func_is_left_alone_with_one_warning() -> None:
    class Func(Plain):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            slope = torch.func.grad(lambda x: (x**2).sum())(batch[0])
            return nn.functional.cross_entropy(self.net(slope), batch[1])

    monitor = MemoryMonitor()
    plain, monitored = Func(), Func()
    fit(plain, batches(10, 20), max_epochs=2)
    with pytest.warns(UserWarning, match="MemoryMonitor measures nothing here: training_step uses torch.func"):
        fit(monitored, batches(10, 20), [monitor], max_epochs=2)
    assert monitor.model.measured == []


def test_what_was_measured_goes_on_after_a_checkpoint() -> None:
    monitor, again = MemoryMonitor(), MemoryMonitor()
    fit(Plain(), batches(10, 20), [monitor], max_epochs=1)
    again.load_state_dict(monitor.state_dict())
    assert again.model.predict(100) == monitor.model.predict(100)


def test_an_exception_ends_the_measurement() -> None:
    class Breaks(Plain):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            raise RuntimeError("on purpose")

    with pytest.raises(RuntimeError, match="on purpose"):
        fit(Breaks(), batches(10), [MemoryMonitor()])
    assert torch.func.grad(torch.sin)(torch.tensor(0.0)) == 1.0  # which refuses to run under hooks


def test_a_wrong_argument_is_refused() -> None:
    with pytest.raises(TypeError, match="batch_size_of=3 must be a function"):
        MemoryMonitor(batch_size_of=3)  # type: ignore[arg-type]
