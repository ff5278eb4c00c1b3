"""Every kind of loader on real Trainers: resized in mid-epoch, each sample once, in the sampler's order."""

from __future__ import annotations

import math
import os
import random
from collections.abc import Callable, Iterator
from itertools import islice, pairwise
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from lightning_problems import SAMPLES, Classifier, Recorded, fit, loader, trainer
from pytorch_lightning.utilities import CombinedLoader
from torch import Tensor
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    IterableDataset,
    RandomSampler,
    Sampler,
    SequentialSampler,
    SubsetRandomSampler,
    WeightedRandomSampler,
    default_collate,
    get_worker_info,
)

from adaptive_batch.callbacks import AdaptiveBatchSize
from adaptive_batch.data import SharedBatchSize, make_adaptive

B0 = 16
WORKERS = pytest.mark.parametrize("workers", [0, 2])


def resizing(seed: int = 1, low: int = 4, high: int = 90, **kwargs: Any) -> AdaptiveBatchSize:
    """Another size after every update."""
    rng = random.Random(seed)
    options: dict[str, Any] = {
        "min_batch_size": low,
        "max_batch_size": high,
        "adjust_every": 1,
        "lr_scaling": "linear",
        "verbose": False,
    }
    return AdaptiveBatchSize(lambda measurement: rng.randint(low, high), **{**options, **kwargs})


def run(data: Any, callback: AdaptiveBatchSize | None = None, **options: Any) -> Classifier:
    """Train; the sizes must have gone up and down, and the loop ended on each epoch's last batch."""
    model = Classifier("lambda")
    callback = callback or resizing()
    fit(model, data, [callback], **options)
    assert_books(model, callback)
    return model


def assert_books(model: Classifier, callback: AdaptiveBatchSize) -> None:
    sizes = [change.batch_size for change in callback.history.changes]
    assert any(b > a for a, b in pairwise(sizes)), "never grew: the test is vacuous"
    assert any(b < a for a, b in pairwise(sizes)), "never shrank: the test is vacuous"
    assert max(model.sizes) > B0 and len(set(model.sizes)) > 4, "no batch was resized"
    ends = [i for i, last in enumerate(model.last_batches) if last]
    lengths = [len(epoch) for epoch in model.epochs]
    assert [sum(model.sizes[: end + 1]) for end in ends] == [sum(lengths[: i + 1]) for i in range(len(lengths))]
    assert [update.batch_size for update in callback.history.updates] == model.sizes


def assert_every_sample_once(model: Classifier, epochs: int = 2) -> None:
    assert [sorted(epoch) for epoch in model.epochs] == [list(range(SAMPLES))] * epochs


class Backwards(Sampler[int]):
    """A sampler of the user's own, with an order of its own each epoch."""

    def __init__(self) -> None:
        self.rng = random.Random(5)

    def __iter__(self) -> Iterator[int]:
        start = self.rng.randrange(SAMPLES)
        return iter([(start - i) % SAMPLES for i in range(SAMPLES)])

    def __len__(self) -> int:
        return SAMPLES


class Unsized(Backwards):
    __len__ = None  # type: ignore[assignment]


SAMPLERS: dict[str, Callable[[], Any]] = {
    "sequential": lambda: SequentialSampler(range(SAMPLES)),
    "random": lambda: RandomSampler(range(SAMPLES)),
    "random_with_a_generator": lambda: RandomSampler(range(SAMPLES), generator=torch.Generator().manual_seed(9)),
    "random_with_replacement": lambda: RandomSampler(range(SAMPLES), replacement=True),
    "random_with_replacement_and_num_samples": lambda: RandomSampler(range(SAMPLES), replacement=True, num_samples=150),
    "random_without_replacement_and_num_samples": lambda: RandomSampler(range(SAMPLES), num_samples=300),
    "subset": lambda: SubsetRandomSampler(range(20, 190)),
    "weighted": lambda: WeightedRandomSampler([1.0 + i % 3 for i in range(SAMPLES)], 170),
    "of_the_users_own": Backwards,
    "of_the_users_own_without_a_length": Unsized,
}


class TestSamplers:
    @WORKERS
    @pytest.mark.parametrize("kind", SAMPLERS)
    def test_the_order_is_the_samplers_own(self, kind: str, workers: int) -> None:
        options: dict[str, Any] = {"shuffle": None, "num_workers": workers}
        plain = Classifier("lambda")
        fit(plain, loader(sampler=SAMPLERS[kind](), **options))
        model = run(loader(sampler=SAMPLERS[kind](), **options))
        assert model.epochs == plain.epochs

    @WORKERS
    def test_those_of_torchdatas_stateful_loader(self, workers: int) -> None:
        kind = pytest.importorskip("torchdata.stateful_dataloader").StatefulDataLoader
        model = run(kind(Recorded(SAMPLES), batch_size=B0, shuffle=True, num_workers=workers))
        assert_every_sample_once(model)
        first_epoch = model.sizes[: model.last_batches.index(True) + 1]
        assert len(set(first_epoch)) > 3, "resized between epochs only"

    def test_a_generator_of_the_loader(self) -> None:
        def data() -> DataLoader[Any]:
            return loader(generator=torch.Generator().manual_seed(4), num_workers=2)

        plain = Classifier("lambda")
        fit(plain, data())
        assert run(data()).epochs == plain.epochs


class Buckets:
    """Batches within one bucket each, so that there are more of them than the samples need."""

    def __init__(self, batch_size: int, sized: bool = True) -> None:
        self.batch_size = batch_size
        self.sized = sized

    def __iter__(self) -> Iterator[list[int]]:
        for first in range(0, SAMPLES, 41):
            bucket = list(range(first, min(first + 41, SAMPLES)))
            while bucket:
                size = self.batch_size
                yield bucket[:size]
                bucket = bucket[size:]

    def __len__(self) -> int:
        if not self.sized:
            raise TypeError
        return sum(math.ceil(min(41, SAMPLES - first) / self.batch_size) for first in range(0, SAMPLES, 41))


class Tokens:
    """As many sequences as have at most ``batch_size`` tokens together."""

    def __init__(self, batch_size: int) -> None:
        self.batch_size = batch_size

    def __iter__(self) -> Iterator[list[int]]:
        batch: list[int] = []
        for index in range(SAMPLES):
            if batch and sum(map(tokens_of, batch)) + tokens_of(index) > self.batch_size:
                yield batch
                batch = []
            batch.append(index)
        yield batch

    def __len__(self) -> int:
        return sum(1 for _ in self)


def tokens_of(index: int) -> int:
    return 1 + index * 7 % 11


def tokens_in(batch: Any) -> int:
    return sum(map(tokens_of, batch[2].tolist()))


TOKENS = sum(map(tokens_of, range(SAMPLES)))


class TestBatchSamplers:
    @WORKERS
    @pytest.mark.parametrize("sized", [True, False])
    def test_one_with_a_settable_batch_size(self, sized: bool, workers: int) -> None:
        data = DataLoader(Recorded(), batch_sampler=Buckets(B0, sized), num_workers=workers)
        model = run(data, max_epochs=4)
        assert_every_sample_once(model, 4)
        assert model.epochs[0] == list(range(SAMPLES))

    def test_one_with_a_settable_batch_size_validates_and_steps_as_it_would_have(self) -> None:
        def train(callbacks: list[Any]) -> tuple[Classifier, pl.Trainer]:
            model = Classifier("onecycle")
            data: Any = DataLoader(Recorded(), batch_sampler=Buckets(B0))
            made = fit(model, data, callbacks, val=loader(batch_size=50, shuffle=False), val_check_interval=0.5)
            return model, made

        plain, plain_trainer = train([])
        model, made = train([resizing()])
        assert len(model.validated_at) == len(plain.validated_at) == 4
        steps = plain_trainer.lr_scheduler_configs[0].scheduler.last_epoch
        assert made.lr_scheduler_configs[0].scheduler.last_epoch == steps

    def test_a_constant_size_leaves_it_bitwise_as_it_is(self) -> None:
        runs = []
        for callbacks in ([], [AdaptiveBatchSize("constant")]):
            model = Classifier("cosine")
            data: Any = DataLoader(Recorded(), batch_sampler=Buckets(B0))
            fit(model, data, callbacks, val=loader(batch_size=50, shuffle=False), val_check_interval=0.3)
            runs.append((model.loss_trace, model.used_lr, model.epochs, model.validated_at))
        assert runs[0] == runs[1]

    def test_one_in_the_place_of_the_sampler(self) -> None:
        class Bulk(Recorded):
            def __getitem__(self, indices: Any) -> Any:
                return default_collate([super(Bulk, self).__getitem__(i) for i in indices])

        batches = BatchSampler(RandomSampler(range(SAMPLES)), B0, drop_last=False)
        assert_every_sample_once(run(DataLoader(Bulk(), batch_size=None, sampler=batches, num_workers=2)))

    def test_a_fraction_of_an_epoch_is_a_fraction_of_its_own_unit(self) -> None:
        plain = Classifier()
        fit(plain, DataLoader(Recorded(), batch_sampler=Buckets(B0)), limit_train_batches=0.5)
        same = Classifier()
        fit(
            same,
            DataLoader(Recorded(), batch_sampler=Buckets(B0)),
            [AdaptiveBatchSize("constant")],
            limit_train_batches=0.5,
        )
        assert same.epochs == plain.epochs
        model = run(DataLoader(Recorded(), batch_sampler=Buckets(B0)), limit_train_batches=0.5)
        assert all(epoch == list(range(len(epoch))) for epoch in model.epochs)
        assert all(len(epoch) < SAMPLES for epoch in model.epochs)

    def test_one_without_a_settable_batch_size_is_refused(self) -> None:
        with pytest.raises(ValueError, match="The batch sampler list cannot be resized"):
            fit(Classifier(), DataLoader(Recorded(), batch_sampler=[[0, 1], [2]]), [resizing()])


class WithArguments(DataLoader[Any]):
    """A subclass that cannot be built anew from a loader's attributes."""

    def __init__(self, path: str, size: int) -> None:
        self.path = path
        super().__init__(Recorded(), batch_size=size, shuffle=True)

    def __iter__(self) -> Any:
        return (batch for batch in super().__iter__())


class InTheWorker:
    def __init__(self) -> None:
        self.seen: dict[int, int] = {}

    def __call__(self, worker: int) -> None:
        torch.manual_seed(1000 + worker)


class Augmented(Recorded):
    """Adds what the worker's random numbers say."""

    def __getitem__(self, index: int) -> Any:
        x, y, number, pid = super().__getitem__(index)
        return x + torch.rand(()), y, number, pid


class TestLoaderOptions:
    def test_collate_fn(self) -> None:
        collated: list[int] = []

        def collate(items: list[Any]) -> Any:
            collated.append(len(items))
            return default_collate(items)

        model = run(loader(collate_fn=collate))
        assert_every_sample_once(model)
        assert collated == model.sizes

    @WORKERS
    def test_drop_last(self, workers: int) -> None:
        model = run(loader(drop_last=True, num_workers=workers, shuffle=False), max_epochs=4)
        for epoch in model.epochs:
            assert epoch == list(range(len(epoch)))
            assert SAMPLES - len(epoch) < 90
        assert all(size >= 4 for size in model.sizes)

    def test_drop_last_with_batches_that_no_epoch_could_fill_is_refused(self) -> None:
        with pytest.raises(ValueError, match="max_batch_size=300 is more than the 203 samples of an epoch"):
            fit(Classifier(), loader(drop_last=True), [resizing(high=300)])

    @pytest.mark.cuda
    @pytest.mark.parametrize("iterable", [False, True])
    def test_pin_memory(self, iterable: bool) -> None:
        pinned: list[bool] = []

        class Looks(Classifier):
            def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
                pinned.append(batch[0].is_pinned())
                return batch

        data = DataLoader(Stream() if iterable else Recorded(), B0, num_workers=2, pin_memory=True)
        model = Looks()
        fit(model, data, [resizing()], accelerator="gpu")
        assert_every_sample_once(model)
        assert all(pinned)

    def test_pin_memory_is_kept(self) -> None:
        assert make_adaptive(loader(pin_memory=True)).pin_memory

    def test_a_loader_that_is_reloaded_keeps_its_persistent_workers_and_their_order(self) -> None:
        def made(callbacks: list[Any]) -> Classifier:
            pl.seed_everything(3, verbose=False)
            model = Classifier()
            data = loader(num_workers=2, persistent_workers=True)
            fit(model, data, callbacks, max_epochs=3, reload_dataloaders_every_n_epochs=1)
            return model

        plain, adapted = made([]), made([AdaptiveBatchSize("constant")])
        assert len(plain.pids) == len(adapted.pids) == 2
        assert plain.epochs == adapted.epochs
        assert plain.loss_trace == adapted.loss_trace

    @pytest.mark.parametrize("persistent", [False, True])
    def test_persistent_workers(self, persistent: bool) -> None:
        model = run(loader(num_workers=2, persistent_workers=persistent))
        assert_every_sample_once(model)
        assert len(model.pids) == (2 if persistent else 4)

    def test_worker_init_fn(self) -> None:
        def losses(callbacks: list[Any]) -> list[float]:
            model = Classifier(dropout=0.0)
            data = DataLoader(Augmented(), B0, num_workers=2, worker_init_fn=InTheWorker())
            fit(model, data, callbacks)
            return model.loss_trace

        assert losses([AdaptiveBatchSize("constant")]) == losses([])

    @pytest.mark.parametrize("prefetch", [1, 4])
    def test_prefetch_factor(self, prefetch: int) -> None:
        model = Classifier()
        callback = AdaptiveBatchSize(lambda m: 64, max_batch_size=64, adjust_every=1)
        fit(model, loader(num_workers=2, prefetch_factor=prefetch), [callback])
        assert model.sizes[: 2 + 2 * prefetch].count(B0) == 1 + 2 * prefetch
        assert_every_sample_once(model)

    @pytest.mark.parametrize(("context", "iterable"), [("spawn", True), ("forkserver", False)])
    def test_multiprocessing_context(self, context: str, iterable: bool) -> None:
        data = Own() if iterable else Recorded()
        size = None if iterable else B0
        model = run(DataLoader(data, size, num_workers=1, multiprocessing_context=context, persistent_workers=True))
        assert_every_sample_once(model)

    def test_timeout(self) -> None:
        assert_every_sample_once(run(loader(num_workers=2, timeout=60)))

    def test_in_order_false(self) -> None:
        with pytest.warns(UserWarning, match="in_order=False is switched off"):
            assert_every_sample_once(run(loader(num_workers=2, in_order=False)))

    def test_a_subclass_with_arguments_of_its_own(self) -> None:
        data = WithArguments("somewhere", B0)
        model = run(data)
        assert_every_sample_once(model)
        assert data.batch_size == B0

    def test_batches_of_none_are_counted_and_left_out(self) -> None:
        def collate(items: list[Any]) -> Any:
            return None if items[0][2] == 0 else default_collate(items)

        class Careful(Classifier):
            def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
                if batch is not None:
                    super().on_train_batch_end(outputs, batch, batch_idx)

        model = Careful("lambda")
        callback = resizing()
        with pytest.warns(UserWarning, match="yielded None"):
            fit(model, loader(collate_fn=collate, shuffle=False), [callback])
        assert all(epoch == list(range(SAMPLES - len(epoch), SAMPLES)) for epoch in model.epochs)
        assert [update.batch_size for update in callback.history.updates] == model.sizes


class Data(pl.LightningDataModule):
    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.options = options
        self.asked = 0

    def train_dataloader(self) -> Any:
        self.asked += 1
        return loader(**self.options)

    def val_dataloader(self) -> Any:
        return loader(batch_size=50, shuffle=False)


class Collected(Classifier):
    """Takes its batches out of a collection of one."""

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        super().on_train_batch_start(_only(batch), batch_idx)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return super().training_step(_only(batch), batch_idx)


def _only(batch: Any) -> Any:
    return batch["a"] if isinstance(batch, dict) else batch[0]


MODES = ["min_size", "max_size", "max_size_cycle"]


class TestWhereLoadersComeFrom:
    def fit_here(self, model: Classifier, callback: AdaptiveBatchSize, **arguments: Any) -> pl.Trainer:
        pl.seed_everything(0, verbose=False)
        options = arguments.pop("options", {})
        made = trainer([callback], **options)
        made.fit(model, **arguments)
        return made

    def test_passed_to_fit(self) -> None:
        model, callback = Classifier(), resizing()
        self.fit_here(model, callback, train_dataloaders=loader())
        assert_books(model, callback)
        assert_every_sample_once(model)

    def test_a_data_module(self) -> None:
        model, callback = Classifier(), resizing()
        self.fit_here(model, callback, datamodule=Data(num_workers=2))
        assert_books(model, callback)
        assert_every_sample_once(model)

    def test_the_modules_own_train_dataloader(self) -> None:
        class Carries(Classifier):
            def train_dataloader(self) -> Any:
                return loader()

        model, callback = Carries(), resizing()
        self.fit_here(model, callback)
        assert_books(model, callback)
        assert_every_sample_once(model)

    @pytest.mark.parametrize("every", [1, 2])
    @WORKERS
    def test_reloaded_every_n_epochs(self, every: int, workers: int) -> None:
        model, callback, data = Classifier("onecycle"), resizing(), Data(num_workers=workers)
        made = self.fit_here(
            model,
            callback,
            datamodule=data,
            options={"reload_dataloaders_every_n_epochs": every, "max_epochs": 4, "val_check_interval": 12},
        )
        assert data.asked == 4 // every
        assert_books(model, callback)
        assert_every_sample_once(model, 4)
        assert set(model.validated_at) >= {SAMPLES * epoch for epoch in (1, 2, 3, 4)}
        assert made.lr_scheduler_configs[0].scheduler.last_epoch == 4 * math.ceil(SAMPLES / B0)

    def test_a_loader_that_was_made_adaptive_before(self) -> None:
        model, callback = Classifier("onecycle"), resizing()
        made = self.fit_here(
            model,
            callback,
            train_dataloaders=make_adaptive(loader()),
            options={"reload_dataloaders_every_n_epochs": 1, "max_epochs": 3},
        )
        assert_every_sample_once(model, 3)
        assert made.lr_scheduler_configs[0].scheduler.last_epoch == 3 * math.ceil(SAMPLES / B0)

    @pytest.mark.parametrize("mode", MODES)
    @pytest.mark.parametrize("make", [lambda one: {"a": one}, lambda one: [one]], ids=["dict", "list"])
    def test_a_collection_of_one(self, make: Callable[[Any], Any], mode: Any) -> None:
        model, callback = Collected(), resizing()
        self.fit_here(model, callback, train_dataloaders=CombinedLoader(make(loader()), mode))
        assert_books(model, callback)
        assert_every_sample_once(model)

    def test_a_collection_of_one_is_given_back(self) -> None:
        mine = loader()
        combined = CombinedLoader({"a": mine}, "min_size")
        for _ in range(2):
            callback = resizing()
            self.fit_here(Collected(), callback, train_dataloaders=combined)
            assert callback.history.changes[0].previous == B0
            assert combined.flattened == [mine]
            assert mine.batch_size == B0

    @pytest.mark.parametrize("mode", [*MODES, "sequential"])
    def test_several_in_a_combined_loader_are_refused(self, mode: Any) -> None:
        several = CombinedLoader({"a": loader(), "b": loader(batch_size=8)}, mode)
        with pytest.raises(ValueError, match="resizes one training DataLoader, but there are several"):
            self.fit_here(Collected(), resizing(), train_dataloaders=several)

    @pytest.mark.parametrize(
        "make", [lambda: {"a": loader(), "b": loader()}, lambda: [loader(), loader()]], ids=["dict", "list"]
    )
    def test_several_in_a_dict_or_list_are_refused(self, make: Callable[[], Any]) -> None:
        with pytest.raises(ValueError, match="let one DataLoader draw from all data sets"):
            self.fit_here(Collected(), resizing(), train_dataloaders=make())

    def test_what_is_no_loader_is_refused(self) -> None:
        with pytest.raises(TypeError, match="the training data is a list"):
            self.fit_here(Collected(), resizing(), train_dataloaders=[[1, 2, 3]])


class Stream(IterableDataset[Any]):
    """Shared out to the workers unevenly, so that they end at different times."""

    def __init__(self, length: int = SAMPLES) -> None:
        self.data = Recorded(length)

    def mine(self) -> list[int]:
        info = get_worker_info()
        number, workers = (info.id, info.num_workers) if info else (0, 1)
        return [i for i in range(len(self.data)) if (0 if i % 3 else 1) % workers == number]

    def __iter__(self) -> Iterator[Any]:
        return (self.data[i] for i in self.mine())


class SizedStream(Stream):
    def __len__(self) -> int:
        return len(self.data)


class Own(Stream):
    """Makes its batches itself, of the size that it is told."""

    def __init__(self, batch_size: Any = None) -> None:
        super().__init__()
        self.batch_size = batch_size or SharedBatchSize(B0)

    def __iter__(self) -> Iterator[Any]:
        left = self.mine()
        while left:
            size = int(self.batch_size)
            batch, left = left[:size], left[size:]
            yield default_collate([self.data[i] for i in batch])


class TestIterableDatasets:
    @pytest.mark.parametrize("workers", [0, 1, 2])
    def test_every_sample_once_with_true_sizes(self, workers: int) -> None:
        model = run(DataLoader(Stream(), B0, num_workers=workers), max_epochs=3)
        assert_every_sample_once(model, 3)

    def test_workers_are_not_respawned(self) -> None:
        model = run(DataLoader(Stream(), B0, num_workers=2, persistent_workers=True))
        assert len(model.pids) == 2

    @WORKERS
    def test_validation_follows_each_epoch(self, workers: int) -> None:
        val = loader(batch_size=50, shuffle=False)
        model = run(DataLoader(Stream(), B0, num_workers=workers), val=val, max_epochs=3)
        assert model.validated_at == [SAMPLES, 2 * SAMPLES, 3 * SAMPLES]

    @WORKERS
    def test_an_int_val_check_interval_counts_batches_and_an_epoch_that_is_shorter_validates_at_its_end(
        self, workers: int
    ) -> None:
        val = loader(batch_size=50, shuffle=False)
        model = run(DataLoader(Stream(), B0, num_workers=workers), val=val, max_epochs=3, val_check_interval=20)
        assert model.validated_at == [SAMPLES, 2 * SAMPLES, 3 * SAMPLES]

    @pytest.mark.parametrize("limit", [7, 11])
    @WORKERS
    def test_a_limit_in_batches_that_the_data_reaches_or_not(self, limit: int, workers: int) -> None:
        """At the size of the user's own there are 13 batches, at the largest there are 3."""
        val = loader(batch_size=50, shuffle=False)
        model = run(DataLoader(Stream(), B0, num_workers=workers), val=val, max_epochs=4, limit_train_batches=limit)
        ends = [i for i, last in enumerate(model.last_batches) if last]
        batches = [b - a for a, b in zip([-1, *ends], ends, strict=False)]
        assert len(model.validated_at) == len(batches) == 4
        for epoch, count in zip(model.epochs, batches, strict=True):
            assert len(set(epoch)) == len(epoch)
            assert count == limit or (count < limit and len(epoch) == SAMPLES)
        assert any(count < limit for count in batches), "the data was never out: the test is vacuous"

    def test_a_limit_in_batches_that_reloaded_data_does_not_reach(self) -> None:
        class Streams(pl.LightningDataModule):
            def train_dataloader(self) -> Any:
                return DataLoader(Stream(), B0)

            def val_dataloader(self) -> Any:
                return loader(batch_size=50, shuffle=False)

        model = Classifier()
        callback = AdaptiveBatchSize(lambda m: 90, max_batch_size=90, adjust_every=1, verbose=False)
        made = trainer([callback], max_epochs=3, limit_train_batches=7, reload_dataloaders_every_n_epochs=1)
        made.fit(model, datamodule=Streams())
        assert model.sizes[-3:] == [90, 90, 23]
        assert_every_sample_once(model, 3)
        assert model.validated_at == [SAMPLES, 2 * SAMPLES, 3 * SAMPLES]
        again = Classifier()  # starts with the size in force
        trainer([callback], max_epochs=1, limit_train_batches=7).fit(again, datamodule=Streams())
        assert again.sizes == [90, 90, 23]
        assert again.last_batches == [False, False, True]
        assert again.validated_at == [SAMPLES]

    def test_a_limit_in_batches_at_a_constant_size_is_bitwise_lightnings(self) -> None:
        runs = []
        for callbacks in ([], [AdaptiveBatchSize("constant")]):
            model = Classifier("lambda")
            fit(model, DataLoader(Stream(), B0), callbacks, limit_train_batches=5)
            runs.append((model.loss_trace, model.used_lr, model.epochs, model.last_batches))
        assert runs[0] == runs[1]

    @WORKERS
    def test_a_constant_size_is_bitwise_lightnings(self, workers: int) -> None:
        runs = []
        for callbacks in ([], [AdaptiveBatchSize("constant")]):
            model = Classifier("lambda")
            data = DataLoader(Stream(), B0, num_workers=workers)
            fit(model, data, callbacks, val=loader(batch_size=50, shuffle=False))
            runs.append((model.loss_trace, model.used_lr, model.epochs, model.last_batches, model.validated_at))
        assert runs[0] == runs[1]

    def test_a_schedule_over_data_without_a_length_steps_once_per_reference_size_of_samples(self) -> None:
        model, callback = Classifier("lambda"), resizing()
        made = fit(model, DataLoader(Stream(), B0), [callback], max_epochs=3)
        assert made.lr_scheduler_configs[0].scheduler.last_epoch == 3 * math.ceil(SAMPLES / B0)

    @WORKERS
    def test_a_schedule_over_data_that_says_its_length_ends_with_the_run(self, workers: int) -> None:
        model, callback = Classifier("onecycle"), resizing()
        made = fit(model, DataLoader(SizedStream(), B0, num_workers=workers), [callback], max_epochs=3)
        assert_books(model, callback)
        assert_every_sample_once(model, 3)
        assert made.lr_scheduler_configs[0].scheduler.last_epoch == 3 * math.ceil(SAMPLES / B0)

    def test_a_schedule_over_max_steps_of_data_without_a_length_is_not_overrun(self) -> None:
        model = Classifier("onecycle")
        callback = AdaptiveBatchSize(lambda m: 64, max_batch_size=64, adjust_every=1)
        made = fit(model, DataLoader(Stream(), B0), [callback], max_epochs=-1, max_steps=20)
        assert made.global_step == 20
        assert made.lr_scheduler_configs[0].scheduler.last_epoch == 20

    def test_a_fraction_of_data_that_says_its_length_is_kept_in_validation(self) -> None:
        val = loader(batch_size=50, shuffle=False)
        model = run(DataLoader(SizedStream(), B0), val=val, val_check_interval=0.5, max_epochs=3)
        assert model.validated_at == crossed(model, 0.5)

    @pytest.mark.parametrize(
        ("option", "sentence"),
        [
            ({"val_check_interval": 0.25}, "val_check_interval=0.25 is a fraction of an epoch"),
            ({"limit_train_batches": 0.5}, "limit_train_batches=0.5 is a fraction of an epoch"),
        ],
        ids=["val_check_interval", "limit_train_batches"],
    )
    def test_a_fraction_of_data_without_a_length_is_refused(self, option: Any, sentence: str) -> None:
        with pytest.raises(ValueError, match=sentence):
            fit(Classifier(), DataLoader(Stream(), B0), [resizing()], **option)


class TestDataSetsThatBatchThemselves:
    @WORKERS
    def test_one_that_reads_a_shared_batch_size_is_resized(self, workers: int) -> None:
        model = run(DataLoader(Own(), batch_size=None, num_workers=workers), max_epochs=3)
        assert_every_sample_once(model, 3)

    def test_a_second_run_starts_with_the_size_that_it_was_made_with(self) -> None:
        data = DataLoader(Own(), batch_size=None)
        for _ in range(2):
            callback = resizing()
            fit(Classifier(), data, [callback])
            assert callback.history.changes[0].previous == B0

    def test_others_are_refused(self) -> None:
        for dataset in (Own(batch_size=B0), Recorded()):
            data: Any = DataLoader(dataset, batch_size=None)
            with pytest.raises(ValueError, match="batch_size=None leaves batching to the data set"):
                fit(Classifier(), data, [resizing()])

    @pytest.mark.parametrize("size", [0, -1, 2.5, True])
    def test_a_bad_size_is_refused(self, size: Any) -> None:
        with pytest.raises(ValueError, match="is no batch size"):
            SharedBatchSize(size)

    def test_a_batch_whose_samples_cannot_be_counted_is_refused(self) -> None:
        class Opaque(Own):
            def __iter__(self) -> Iterator[Any]:
                yield object()

        with pytest.raises(TypeError, match="does not show how many samples it has"):
            fit(Classifier(), DataLoader(Opaque(), batch_size=None), [resizing()])


class TestBatchSizeOf:
    """One count of samples for the learning rate, the history, the schedule and the bounds."""

    def train(
        self, workers: int = 0, watch: Any = None, **options: Any
    ) -> tuple[Classifier, AdaptiveBatchSize, pl.Trainer]:
        model = Classifier("lambda")
        callback = resizing(low=40, high=400, batch_size_of=tokens_in)
        data: Any = DataLoader(Recorded(), batch_sampler=Tokens(100), num_workers=workers)
        callbacks = [callback, *([watch] if watch else [])]
        return model, callback, fit(model, data, callbacks, **{"max_epochs": 3, **options})

    @WORKERS
    def test_token_bucketed_batches_count_their_tokens_everywhere(self, workers: int) -> None:
        nominal = Nominal()
        model, callback, made = self.train(workers, watch=nominal)
        assert_every_sample_once(model, 3)
        updates = list(callback.history.updates)
        counted = tokens_of_updates(model)
        assert [u.batch_size for u in updates] == counted != model.sizes
        assert updates[-1].samples == made.callback_metrics["adaptive_batch/samples"] == 3 * TOKENS
        ends = [i for i, last in enumerate(model.last_batches) if last]
        for i, update in enumerate(updates):
            if i not in ends:  # one that is short of its size counts as the user's own would have
                worth = max(counted[i], min(nominal.sizes[i], 100))
                assert update.lr_scale == pytest.approx(worth / 100)
        assert any(count > 100 for count in counted)
        # Every epoch takes the steps of the 39 batches that Lightning alone would have had.
        plain = len(Tokens(100))
        assert made.lr_scheduler_configs[0].scheduler.last_epoch == 3 * plain
        assert callback.history.changes[0].previous == 100

    def test_the_sample_clock_counts_what_the_user_counts(self) -> None:
        watch = Nominal()
        model, _, _ = self.train(watch=watch, max_epochs=1)
        seen = 0.0
        for tokens, nominal, taken in zip(tokens_of_updates(model), watch.sizes, watch.steps, strict=True):
            assert taken == min(len(Tokens(100)), math.ceil(seen / 100))
            seen += max(tokens, min(nominal, 100))

    def test_validation_at_a_fraction_of_the_tokens(self) -> None:
        model, _, _ = self.train(val=loader(batch_size=50, shuffle=False), val_check_interval=0.5)
        assert model.validated_at[1::2] == [SAMPLES, 2 * SAMPLES, 3 * SAMPLES]
        assert len(model.validated_at) == 6

    def test_lists_of_variable_length_items(self) -> None:
        class Ragged(Classifier):
            def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
                self.epochs[-1] += [int(number) for _, number in batch]
                self.sizes.append(len(batch))

            def training_step(self, batch: Any, batch_idx: int) -> Tensor:
                return torch.stack([self.net(x).square().mean() for x, _ in batch]).mean()

            def on_train_batch_end(self, *args: Any) -> None:
                self.last_batches.append(self.trainer.is_last_batch)

        def collate(items: list[Any]) -> Any:
            return [(x.repeat(1 + int(i) % 4, 1), i) for x, _, i, _ in items]

        model = Ragged()
        callback = AdaptiveBatchSize(
            lambda m: 40, max_batch_size=40, adjust_every=1, batch_size_of=len, micro_batch_size=5
        )
        fit(model, loader(collate_fn=collate), [callback])
        assert_every_sample_once(model)
        assert [u.batch_size for u in callback.history.updates] == model.sizes
        assert {u.micro_batch_size for u in callback.history.updates} <= {4, 5, 3, 2, 1}

    def test_a_collate_function_that_leaves_samples_out(self) -> None:
        def collate(items: list[Any]) -> Any:
            return default_collate([item for item in items if int(item[2]) % 5])

        losses = []
        for micro in (None, 4):
            model = Classifier(dropout=0.0)
            callback = AdaptiveBatchSize(
                lambda m: 40,
                max_batch_size=40,
                adjust_every=1,
                micro_batch_size=micro,
                batch_size_of=lambda batch: len(batch[0]),
                lr_scaling="linear",
            )
            fit(model, loader(collate_fn=collate), [callback])
            kept = [i for i in range(SAMPLES) if i % 5]
            assert [sorted(epoch) for epoch in model.epochs] == [kept] * 2
            assert [u.batch_size for u in callback.history.updates] == model.sizes
            assert callback.history.updates[-1].samples == 2 * len(kept)
            losses.append(model.loss_trace)
        assert losses[1] == pytest.approx(losses[0], rel=1e-4)

    def test_a_count_in_another_unit_than_the_loaders_is_refused(self) -> None:
        with pytest.raises(ValueError, match="batch_size_of counts 96 in a batch of a loader with batch_size=16"):
            fit(Classifier(), loader(), [resizing(batch_size_of=lambda batch: 6 * len(batch[0]))])


class Nominal(pl.Callback):
    """Records the size in force at each update, and the scheduler's steps before it."""

    def __init__(self) -> None:
        self.sizes: list[float] = []
        self.steps: list[int] = []

    def on_train_batch_start(self, trainer: pl.Trainer, *args: Any) -> None:
        self.steps.append(trainer.lr_scheduler_configs[0].scheduler.last_epoch)

    def on_train_batch_end(self, trainer: pl.Trainer, *args: Any) -> None:
        self.sizes.append(float(trainer.callback_metrics["adaptive_batch/batch_size"]))


def tokens_of_updates(model: Classifier) -> list[int]:
    seen = iter([index for epoch in model.epochs for index in epoch])
    return [sum(map(tokens_of, islice(seen, size))) for size in model.sizes]


def crossed(model: Classifier, fraction: float, batches: int | None = None, size: int = B0) -> list[int]:
    """Where validation is due: the ends of the batches that reach a point, and of the epochs."""
    batches = batches or math.ceil(SAMPLES / size)
    every = max(1, int(batches * fraction))
    points = [every * (i + 1) * size for i in range(batches // every)]
    if every * len(points) == batches:
        points[-1] = 10**9  # the end
    due, before = [], 0
    sizes = iter(model.sizes)
    for epoch in model.epochs:
        position = 0
        while position < len(epoch):
            reached = sum(p <= position for p in points)
            position += next(sizes)
            last = position == len(epoch)
            if sum(p <= position for p in points) > reached or (last and reached < len(points)):
                due.append(before + position)
        before += len(epoch)
    return due


# ---- any data, any sizes, any moment


ORDERS: dict[str, Callable[[int], Any]] = {
    "sequential": lambda n: SequentialSampler(range(n)),
    "random": lambda n: RandomSampler(range(n), generator=torch.Generator().manual_seed(n)),
    "replacement": lambda n: RandomSampler(
        range(n), replacement=True, num_samples=n + 3, generator=torch.Generator().manual_seed(n)
    ),
    "subset": lambda n: SubsetRandomSampler(range(0, n, 2), generator=torch.Generator().manual_seed(n)),
    "weighted": lambda n: WeightedRandomSampler(
        [1.0 + i % 3 for i in range(n)], n, generator=torch.Generator().manual_seed(n)
    ),
}


@st.composite
def cases(draw: st.DrawFn, samples: int = 120, workers: tuple[int, int] = (0, 0)) -> dict[str, Any]:
    return {
        "samples": draw(st.integers(1, samples)),
        "size": draw(st.integers(1, 24)),
        "kind": draw(st.sampled_from(sorted(ORDERS))),
        "drop_last": draw(st.booleans()),
        "workers": draw(st.integers(*workers)),
        # After which batch of the run the size becomes what.
        "resizes": draw(st.dictionaries(st.integers(0, 25), st.integers(1, 60), max_size=12)),
    }


class Numbers(torch.utils.data.Dataset[int]):
    def __init__(self, samples: int) -> None:
        self.samples = samples

    def __len__(self) -> int:
        return self.samples

    def __getitem__(self, index: int) -> int:
        return index


def check_bare_loader(case: dict[str, Any]) -> None:
    order: Any = ORDERS[case["kind"]](case["samples"])
    twin: Any = ORDERS[case["kind"]](case["samples"])
    given: Any = DataLoader(
        Numbers(case["samples"]),
        case["size"],
        sampler=order,
        drop_last=case["drop_last"],
        num_workers=case["workers"],
    )
    data: Any = make_adaptive(given)
    step = 0
    for _ in range(2):
        expected = list(twin)
        seen: list[int] = []
        drawn: list[Any] = []
        for batch in data:
            drawn.append(data.batch_sampler.draws.popleft())
            seen += batch.tolist()
            assert drawn[-1].size == len(batch)
            assert drawn[-1].position == len(seen)
            data.batch_sampler.batch_size = case["resizes"].get(step, data.batch_sampler.batch_size)
            step += 1
            assert len(data) >= len(drawn)
        assert len(data) == len(drawn)
        data.batch_sampler.end_epoch()
        assert seen == expected[: len(seen)]
        missing = len(expected) - len(seen)
        assert sum(draw.size for draw in drawn) + missing == len(expected)
        if case["drop_last"]:
            assert all(draw.size == draw.nominal for draw in drawn)
            assert missing < max([case["size"], *case["resizes"].values()])
        else:
            assert missing == 0
            assert all(draw.size == draw.nominal for draw in drawn[:-1])


@given(cases())
@settings(max_examples=300)
def test_any_loader_delivers_the_samplers_order_once_whenever_it_is_resized(case: dict[str, Any]) -> None:
    check_bare_loader(case)


@pytest.mark.filterwarnings("ignore:This DataLoader will create 3 worker processes")
@given(cases(workers=(1, 3)))
@settings(max_examples=15)
def test_any_loader_with_workers_delivers_the_samplers_order_once(case: dict[str, Any]) -> None:
    check_bare_loader(case)


class Noting(Sampler[int]):
    """Remembers what a sampler gave in each pass."""

    def __init__(self, sampler: Any) -> None:
        self.sampler = sampler
        self.passes: list[list[int]] = []

    def __iter__(self) -> Iterator[int]:
        self.passes.append([])
        for index in self.sampler:
            self.passes[-1].append(index)
            yield index

    def __len__(self) -> int:
        return len(self.sampler)


def check_trainer(case: dict[str, Any], fraction: float) -> None:
    samples, size = case["samples"], case["size"]
    order = Noting(ORDERS[case["kind"]](samples))
    total = len(order)
    batches = total // size if case["drop_last"] else math.ceil(total / size)
    assume(batches > 0)
    if case["drop_last"]:  # larger ones are refused
        case["resizes"] = {update: min(size, total) for update, size in case["resizes"].items()}
    data = DataLoader(Recorded(samples), size, sampler=order, drop_last=case["drop_last"], num_workers=case["workers"])
    model = Classifier("lambda", dropout=0.0)
    callback = AdaptiveBatchSize(
        lambda m: case["resizes"].get(m.update - 1, m.batch_size if m.update < 2 else callback.batch_size),
        min_batch_size=1,
        max_batch_size=min(max(60, size), total) if case["drop_last"] else max(60, size),
        adjust_every=1,
        verbose=False,
    )
    made = fit(model, data, [callback], val=loader(8, 8, shuffle=False), val_check_interval=fraction, max_epochs=2)
    for epoch, order_of_epoch in zip(model.epochs, order.passes, strict=True):
        assert epoch == order_of_epoch[: len(epoch)]
        missing = total - len(epoch)
        assert missing == 0 or (case["drop_last"] and missing < max([size, *case["resizes"].values()]))
    ends = [i for i, last in enumerate(model.last_batches) if last]
    reached = [sum(model.sizes[: end + 1]) for end in ends]
    assert reached == [len(model.epochs[0]), len(model.epochs[0]) + len(model.epochs[1])]
    assert [u.batch_size for u in callback.history.updates] == model.sizes
    assert model.validated_at == crossed(model, fraction, batches, size)
    assert made.lr_scheduler_configs[0].scheduler.last_epoch == 2 * batches


@given(cases(samples=80), st.sampled_from([1.0, 0.5, 0.3]))
@settings(max_examples=60)
def test_any_trainer_ends_its_epochs_and_validates_where_the_samples_say(case: dict[str, Any], fraction: float) -> None:
    check_trainer(case, fraction)


@pytest.mark.filterwarnings("ignore:This DataLoader will create 3 worker processes")
@given(cases(samples=80, workers=(1, 3)), st.sampled_from([1.0, 0.5, 0.3]))
@settings(max_examples=6)
def test_any_trainer_with_workers_ends_its_epochs_where_the_samples_say(case: dict[str, Any], fraction: float) -> None:
    check_trainer(case, fraction)


def test_the_process_that_trains_makes_no_samples_where_there_are_workers() -> None:
    model = run(loader(num_workers=2))
    assert os.getpid() not in model.pids
