"""How large a pass may be: budgets, what failures teach, and what is kept of it.

On a CPU the bytes are those saved for backward, which are exact, so the right size is known.
"""

from __future__ import annotations

import gc
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from lightning_problems import Classifier, fit, loader
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from adaptive_batch import micro_batch_limit
from adaptive_batch.callbacks import AdaptiveBatchSize, AutoMicroBatch, MemoryMonitor
from adaptive_batch.memory import PeakMemory
from adaptive_batch.micro_batch_limit import MicroBatchLimit

PER_SAMPLE = 4 * (8 + 3 * 32 + 2) + 8  # inputs, three activations, the loss's log-softmax, the target
FIXED = 4  # the weight of the loss's mean


class Deep(pl.LightningModule):
    """Saves a known number of bytes per sample, and remembers its passes."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(),
            nn.Linear(32, 2),
        )  # fmt: skip
        self.passes: list[int] = []
        self.updates: list[list[int]] = []

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        self.passes.append(len(batch[1]))
        return nn.functional.cross_entropy(self.net(batch[0]), batch[1])

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        self.updates.append(self.passes)
        self.passes = []

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)


class Failing(Deep):
    """Runs out of memory above ``most`` samples."""

    def __init__(self, most: int) -> None:
        super().__init__()
        self.most = most
        self.errors = 0

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        if len(batch[1]) > self.most:
            self.errors += 1
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return super().training_step(batch, batch_idx)


def data(batch_size: int = 64, samples: int = 256) -> DataLoader[Any]:
    return DataLoader(TensorDataset(torch.randn(samples, 8), torch.randint(0, 2, (samples,))), batch_size)


def weights(model: nn.Module) -> Tensor:
    return torch.cat([p.detach().flatten() for p in model.parameters()])


class TestBudget:
    @pytest.mark.parametrize("fit_samples", [1, 2, 7, 30, 63])
    @pytest.mark.parametrize("make", [AutoMicroBatch, lambda **k: AdaptiveBatchSize("constant", **k)])
    def test_the_largest_micro_batch_within_it_is_used_from_the_first_update_on(
        self, make: Any, fit_samples: int
    ) -> None:
        model = Deep()
        callback = make(memory_budget=FIXED + PER_SAMPLE * fit_samples)
        fit(model, data(), [callback], max_epochs=1)
        parts = -(-64 // fit_samples)
        tried, update = model.updates[0][:-parts], model.updates[0][-parts:]
        assert max(tried) <= max(2, fit_samples)  # but for two samples nothing beyond the budget was ever run
        assert len(update) == parts and sum(update) == 64 and max(update) <= fit_samples
        assert model.updates[1:] == [update] * 3

    def test_one_byte_less_is_one_sample_less(self) -> None:
        sizes = []
        for budget in (FIXED + PER_SAMPLE * 32, FIXED + PER_SAMPLE * 32 - 1):
            model = Deep()
            fit(model, data(), [AutoMicroBatch(memory_budget=budget)], max_epochs=1)
            sizes.append(max(model.updates[-1]))
        assert sizes == [32, 22]  # 64 = 22 + 21 + 21

    def test_trying_it_out_changes_nothing(self) -> None:
        ends = []
        for callbacks in ([], [AutoMicroBatch(memory_budget="1GiB")]):
            model = Classifier(dropout=0.5)
            fit(model, loader(), callbacks)
            ends.append((weights(model), model.logged))
        assert torch.equal(ends[0][0], ends[1][0])
        assert ends[0][1] == ends[1][1]

    def test_a_batch_that_grows_is_split_in_time(self) -> None:
        model = Deep()
        callback = AdaptiveBatchSize(
            lambda m: 256, max_batch_size=256, adjust_every=1, memory_budget=FIXED + PER_SAMPLE * 100
        )
        fit(model, data(samples=1024), [callback], max_epochs=1)
        assert model.updates[1] == [86, 85, 85]
        assert callback.history.updates[1].micro_batch_size == 86
        assert not any("out of memory" in note.reason for note in callback.history.notes)

    def test_less_than_a_sample_takes_is_tried_sample_by_sample(self) -> None:
        model = Deep()
        fit(model, data(batch_size=8, samples=16), [AutoMicroBatch(memory_budget=10)], max_epochs=1)
        assert model.updates[-1] == [1] * 8

    @pytest.mark.filterwarnings("ignore:net.1 .BatchNorm1d. looks across the batch")
    def test_batch_norm_gets_no_part_of_one_sample(self) -> None:
        class Normed(Deep):
            def __init__(self) -> None:
                super().__init__()
                self.net[1] = nn.BatchNorm1d(32)

        model = Normed()
        fit(model, data(batch_size=9, samples=18), [AutoMicroBatch(memory_budget=10)], max_epochs=1)
        assert min(map(min, model.updates)) >= 2

    def test_a_sample_that_does_not_fit_is_a_clear_error(self) -> None:
        with pytest.raises(RuntimeError, match="a micro-batch of one sample does not fit into memory"):
            fit(Failing(most=0), data(), [AutoMicroBatch(memory_budget="1GiB")])

    def test_words_are_bytes(self) -> None:
        callback = AutoMicroBatch(memory_budget="20GiB")
        fit(Deep(), data(), [callback], max_epochs=1)
        assert callback.limit.budget == 20 * 1024**3

    def test_a_fraction_of_a_cpu_is_refused_at_the_start_of_fit(self) -> None:
        with pytest.raises(
            ValueError, match=r"memory_budget=0\.5 is a fraction, but this device has no memory of its own"
        ):
            fit(Deep(), data(), [AdaptiveBatchSize("constant", memory_budget=0.5)])

    def test_torch_func_cannot_be_counted_and_that_is_said(self) -> None:
        class Func(Deep):
            def training_step(self, batch: Any, batch_idx: int) -> Tensor:
                loss = super().training_step(batch, batch_idx)
                loss += 0 * torch.func.grad(lambda x: (x**2).sum())(batch[0]).sum()
                return loss

        plain, kept, rows = Func(), Func(), data()
        fit(plain, rows, max_epochs=1)
        with pytest.warns(UserWarning, match="memory_budget is not kept: the model uses torch.func"):
            fit(kept, rows, [AutoMicroBatch(memory_budget=10)], max_epochs=1)
        assert torch.equal(weights(plain), weights(kept))

    def test_memory_that_runs_out_all_the_same_is_survived(self) -> None:
        model = Failing(most=20)
        fit(model, data(), [AutoMicroBatch(memory_budget="1GiB")], max_epochs=1)
        assert model.updates[-1] == [16] * 4
        assert model.errors == 1  # while trying it out, at 32, before anything was trained

    def test_the_peak_is_logged(self) -> None:
        made = fit(
            Deep(),
            data(),
            [AdaptiveBatchSize("constant", memory_budget=FIXED + PER_SAMPLE * 16)],
            max_epochs=1,
        )
        assert made.callback_metrics["adaptive_batch/peak_memory"] == FIXED + PER_SAMPLE * 16


@pytest.mark.cuda
class TestOnAGpu:
    """The allocator's own peaks; what a pass needs is known only by running it."""

    WIDTH, BATCH = 1024, 32768  # a whole batch saves 1.1 GiB
    BUDGET = 512 * 1024**2

    def wide(self) -> Deep:
        model = Deep()
        layers: list[nn.Module] = [nn.Linear(8, self.WIDTH), nn.ReLU()]
        for _ in range(8):
            layers += [nn.Linear(self.WIDTH, self.WIDTH), nn.ReLU()]
        model.net = nn.Sequential(*layers, nn.Linear(self.WIDTH, 2))
        return model

    def rows(self) -> DataLoader[Any]:
        return data(batch_size=self.BATCH, samples=4 * self.BATCH)

    def train(self, callbacks: list[Any], **kwargs: Any) -> tuple[Deep, int]:
        model = self.wide()
        gc.collect()
        torch.cuda.empty_cache()
        with PeakMemory("cuda") as peak:
            fit(model, self.rows(), callbacks, accelerator="gpu", max_epochs=1, **kwargs)
        return model.cpu(), peak.bytes

    def test_a_batch_that_is_beyond_the_budget_trains_within_it(self) -> None:
        _, whole = self.train([])
        assert whole > 2 * self.BUDGET, "the whole batch fits: vacuous"
        callback = AdaptiveBatchSize("constant", memory_budget=self.BUDGET)
        model, peak = self.train([callback])
        assert 0.5 * self.BUDGET < peak < 1.02 * self.BUDGET
        assert [sum(update) for update in model.updates[1:]] == [self.BATCH] * 3
        assert not any("out of memory" in note.reason for note in callback.history.notes)

    def test_the_result_is_that_of_the_whole_batch(self) -> None:
        whole, _ = self.train([])
        split, _ = self.train([AutoMicroBatch(memory_budget=self.BUDGET)])
        torch.testing.assert_close(weights(split), weights(whole), rtol=1e-4, atol=1e-5)

    @pytest.mark.parametrize("callback", [AutoMicroBatch, lambda: AdaptiveBatchSize("constant")])
    def test_a_batch_that_does_not_fit_on_the_device_trains_all_the_same(self, callback: Any) -> None:
        total = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction(2 * self.BUDGET / total)
        try:
            with pytest.raises(torch.OutOfMemoryError):
                self.train([])
            gc.collect()
            torch.cuda.empty_cache()
            model, peak = self.train([callback()])
        finally:
            torch.cuda.set_per_process_memory_fraction(1.0)
        assert peak <= 2 * self.BUDGET
        assert [sum(update) for update in model.updates[1:]] == [self.BATCH] * 3

    def test_the_largest_micro_batch_is_predicted_within_five_per_cent(self) -> None:
        callback = AutoMicroBatch(memory_budget=self.BUDGET)
        self.train([callback])
        predicted = callback.limit.of(self.BATCH)
        true = self.largest_that_fits(held=callback.limit.held)
        assert predicted == pytest.approx(true, rel=0.05)

    def largest_that_fits(self, held: int) -> int:
        """The most samples whose pass stays within the budget, beside ``held`` bytes."""
        model = self.wide().cuda()
        x, y = (
            torch.randn(self.BATCH, 8, device="cuda"),
            torch.zeros(self.BATCH, dtype=torch.long, device="cuda"),
        )

        def needed(n: int) -> int:
            with PeakMemory("cuda") as memory:
                nn.functional.cross_entropy(model.net(x[:n]), y[:n]).backward()
            return memory.bytes - memory.before

        needed(1)  # the gradients
        low, high = 1, self.BATCH
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if held + needed(middle) <= self.BUDGET else (low, middle)
        return low

    def test_a_monitor_changes_nothing_and_sees_the_allocators_peak(self) -> None:
        monitor = MemoryMonitor()
        plain, _ = self.train([])
        monitored, peak = self.train([monitor])
        assert torch.equal(weights(plain), weights(monitored))
        measured = monitor.model.state_dict()["peaks"]
        assert [samples for samples, _ in measured] == [self.BATCH] * 4
        assert max(size for _, size in measured) == pytest.approx(peak, rel=0.05)

    def test_a_fraction_of_the_device_is_a_budget(self) -> None:
        callback = AutoMicroBatch(memory_budget=0.5)
        self.train([callback])
        assert callback.limit.budget == torch.cuda.mem_get_info()[1] // 2


class TestCheckpoints:
    def test_limit_and_model_are_learned_once(self, tmp_path: Path) -> None:
        callback = AdaptiveBatchSize("constant", memory_budget=FIXED + PER_SAMPLE * 30)
        made = fit(Failing(most=20), data(), [callback], max_epochs=1)
        made.save_checkpoint(tmp_path / "run.ckpt")
        again, model = AdaptiveBatchSize("constant", memory_budget=FIXED + PER_SAMPLE * 30), Failing(most=20)
        resumed = pl.Trainer(
            accelerator="cpu", max_epochs=2, logger=False, enable_progress_bar=False,
            enable_model_summary=False, enable_checkpointing=False, callbacks=[again],
        )  # fmt: skip
        resumed.fit(model, data(), ckpt_path=tmp_path / "run.ckpt", weights_only=True)
        assert again._micro_batches.model.state_dict() == callback._micro_batches.model.state_dict()
        assert again._micro_batches.learned == callback._micro_batches.learned == 15
        assert model.errors == 0
        assert model.updates[0] == [13, 13, 13, 13, 12]  # and nothing was tried out


class TestLimit:
    def limit(self, monkeypatch: pytest.MonkeyPatch, after: int = 3, **kwargs: Any) -> MicroBatchLimit:
        monkeypatch.setattr(micro_batch_limit, "RETRY_AFTER", after)
        return MicroBatchLimit(**kwargs)

    def test_the_smallest_bound_counts(self) -> None:
        limit = MicroBatchLimit(largest=40)
        assert (limit.of(30), limit.of(100)) == (30, 40)
        limit.failed(40)
        assert limit.of(100) == 20
        limit.budget = 150
        limit.model.update(1, 11)
        limit.model.update(2, 21)
        assert limit.of(100) == 4  # twice what was measured, though 14 would fit
        limit.model.update(10, 101)
        assert limit.of(100) == 14
        limit.held = 100
        assert limit.of(100) == 4

    def test_a_failure_halves_rounded_up_and_not_below_the_smallest(self) -> None:
        limit = MicroBatchLimit(smallest=2)
        for size, learned in ((9, 5), (5, 3), (3, 2), (2, 2)):
            limit.failed(size)
            assert limit.learned == learned

    def test_twice_as_many_are_tried_after_enough_successes(self, monkeypatch: pytest.MonkeyPatch) -> None:
        limit = self.limit(monkeypatch)
        limit.failed(16)
        for _ in range(2):
            limit.succeeded(16)
            assert limit.of(16) == 8
        limit.succeeded(16)
        assert limit.of(16) == 16

    def test_batches_that_fit_into_the_limit_say_nothing_about_it(self, monkeypatch: pytest.MonkeyPatch) -> None:
        limit = self.limit(monkeypatch)
        limit.failed(16)
        for _ in range(100):
            limit.succeeded(8)
        assert limit.learned == 8

    def test_each_attempt_that_fails_waits_twice_as_long_for_the_next(self, monkeypatch: pytest.MonkeyPatch) -> None:
        limit = self.limit(monkeypatch)
        limit.failed(32)
        limit.failed(16)  # the same batch again: not an attempt to grow
        waits = []
        for _ in range(3):
            wait = 0
            while limit.learned == 8:
                limit.succeeded(32)
                wait += 1
            waits.append(wait)
            limit.failed(16)
        assert waits == [3, 6, 12]

    def test_a_run_grows_again_when_memory_is_back(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(micro_batch_limit, "RETRY_AFTER", 3)
        model = Failing(most=20)

        class Freed(pl.Callback):
            def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
                model.most = 1000 if batch_idx >= 6 else 20

        callback = AutoMicroBatch()
        fit(model, data(samples=64 * 15), [callback, Freed()], max_epochs=1)
        assert [max(passes) for passes in model.updates] == [16] * 3 + [16] * 6 + [32] * 6
        assert model.errors == 3  # at 64 and 32 in the first update, at 32 in the fourth

    @pytest.mark.parametrize(
        "change",
        [{"learned": 0}, {"retry_after": "soon"}, {"succeeded": -1}, {"passes": None}, {"model": {}}],
    )
    def test_a_wrong_state_is_refused_and_changes_nothing(self, change: dict[str, Any]) -> None:
        limit = MicroBatchLimit()
        limit.failed(16)
        before = limit.state_dict()
        with pytest.raises(ValueError):
            limit.load_state_dict({**before, **change})
        assert limit.state_dict() == before
        with pytest.raises(ValueError, match="learned, model missing"):
            limit.load_state_dict({k: v for k, v in before.items() if k not in ("learned", "model")})

    def test_predictions_are_of_the_whole_peak(self) -> None:
        limit = MicroBatchLimit()
        assert limit.predicted(10) != limit.predicted(10)  # NaN
        limit.held = 1000
        limit.model.update(1, 11)
        limit.model.update(2, 21)
        assert limit.predicted(10) == 1101
