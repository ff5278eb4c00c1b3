"""The record of a run: every change of the batch size, and the last updates."""

from __future__ import annotations

import csv
import dataclasses
import json
import math
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import torch

from adaptive_batch.measurement import Measurement

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["Change", "History", "Update"]


@dataclass(slots=True)  # like measurements
class Update:
    """One optimizer update.

    Attributes:
        step: updates made, this one included.
        epoch: from 0.
        samples: samples consumed so far, this update's included.
        batch_size: samples of this update, over all ranks and micro-batches.
        micro_batch_size: samples of its largest forward/backward pass.
        lr_scale: factor on the scheduled learning rate.
        noise_scale: last identified noise scale, in samples.
        throughput: samples per second.
        seconds: wall time, waiting for data included.
        loss: mean loss, where it was read.
    """

    step: int
    epoch: int
    samples: int
    batch_size: int
    micro_batch_size: int
    lr_scale: float
    noise_scale: float
    throughput: float
    seconds: float = math.nan
    loss: float = math.nan


@dataclass(frozen=True)
class Change:
    """One change of the batch size, or one reason to stay.

    Attributes:
        step: updates made when it was decided.
        epoch: from 0.
        samples: samples consumed when it was decided.
        batch_size: the new size; the current one where nothing changed.
        previous: the size before.
        reason: why, in words.
    """

    step: int
    epoch: int
    samples: int
    batch_size: int
    previous: int
    reason: str


_UPDATE_FIELDS = [field.name for field in dataclasses.fields(Update)]
_COUNTS = 5  # the leading fields are whole numbers

_MOST_MEASUREMENTS = 2000
_MEASURED_COUNTS = (
    "update",
    "epoch",
    "samples",
    "batch_size",
    "reference_batch_size",
    "updates_at_size",
    "measured_update",
)
_MEASURED_NUMBERS = (
    "lr",
    "peak_lr",
    "loss",
    "noise_scale",
    "grad_sq_norm",
    "grad_variance",
    "inner_product_variance",
    "inner_product_lower",
    "inner_product_sq_norm",
    "measured_grad_sq_norm",
    "measured_grad_variance",
)


def _without_nan(fields: dict[str, Any]) -> dict[str, Any]:
    """JSON has no numbers that are not finite."""
    return {
        name: None if isinstance(value, float) and not math.isfinite(value) else value for name, value in fields.items()
    }


def _measurement_row(measurement: Measurement) -> list[float]:
    names = (*_MEASURED_COUNTS, *_MEASURED_NUMBERS)
    return [*(float(getattr(measurement, name)) for name in names), *measurement.interval]


def _measurement_from_row(row: list[float]) -> Measurement:
    *numbers, low, high = row
    counts = map(int, numbers[: len(_MEASURED_COUNTS)])
    named: dict[str, Any] = {
        **dict(zip(_MEASURED_COUNTS, counts, strict=True)),
        **dict(zip(_MEASURED_NUMBERS, numbers[len(_MEASURED_COUNTS) :], strict=True)),
    }
    return Measurement(**named, interval=(low, high))


def _update_from_row(row: list[float]) -> Update:
    return Update(*map(int, row[:_COUNTS]), *row[_COUNTS:])


class History:
    """What happened in a run, in constant memory.

    All changes are kept; of the updates a ring of the last ``size``. Older ones are written to ``path``
    as they leave the ring, if one is given, so that file and ring together hold every update once; a
    resumed run goes on with the file where its checkpoint was taken.

    Args:
        size: updates to keep.
        path: CSV file for the updates that leave the ring; opened when the first one does. A file of an
            earlier run is overwritten.

    Attributes:
        updates: the last updates, oldest first.
        changes: every change of the batch size, oldest first.
        notes: the last 1000 reasons to keep the size, one entry whenever the reason becomes another one.
        measurements: the last 2000 measurements that the policy was asked with; see :func:`~adaptive_batch.replay`.
    """

    def __init__(self, size: int = 10_000, *, path: str | Path | None = None) -> None:
        if not isinstance(size, int) or isinstance(size, bool) or size < 1:
            raise ValueError(f"history_size={size!r} must be a positive number of updates to keep.")
        self.updates: deque[Update] = deque(maxlen=size)
        self.changes: list[Change] = []
        self.notes: deque[Change] = deque(maxlen=1000)
        self.measurements: deque[Measurement] = deque(maxlen=_MOST_MEASUREMENTS)
        self._path = None if path is None else Path(path)
        self._file: IO[str] | None = None
        self._written = 0

    def __len__(self) -> int:
        return len(self.updates)

    def add(self, update: Update) -> None:
        """Record an update."""
        if self._path is not None and len(self.updates) == self.updates.maxlen:
            self._write(self.updates[0])
        self.updates.append(update)

    def _write(self, update: Update) -> None:
        if self._file is None:
            self._file = self._open()
        csv.writer(self._file).writerow(dataclasses.astuple(update))
        self._written += 1

    def _open(self) -> IO[str]:
        """The file of older updates, cut behind those that this history wrote (a killed run had more)."""
        assert self._path is not None
        if self._written and self._path.exists():
            file = self._path.open("r+", newline="", buffering=1)
            for _ in range(1 + self._written):
                file.readline()
            file.seek(file.tell())
            file.truncate()
            return file
        file = self._path.open("w", newline="", buffering=1)
        csv.writer(file).writerow(_UPDATE_FIELDS)
        return file

    def close(self) -> None:
        """Close the file of older updates, if one was opened."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def column(self, name: str) -> list[float]:
        """One field of all kept updates."""
        return [getattr(update, name) for update in self.updates]

    def to_csv(self, path: str | Path) -> None:
        """Write the kept updates, one a row."""
        with Path(path).open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(_UPDATE_FIELDS)
            writer.writerows(dataclasses.astuple(update) for update in self.updates)

    def to_json(self, path: str | Path) -> None:
        """Write changes, notes and kept updates; what is not known (``NaN``) is ``null``."""
        record = {
            "updates": [_without_nan(dataclasses.asdict(update)) for update in self.updates],
            "changes": [dataclasses.asdict(change) for change in self.changes],
            "notes": [dataclasses.asdict(note) for note in self.notes],
        }
        Path(path).write_text(json.dumps(record, allow_nan=False))

    def plot(self, path: str | Path | None = None, *, series: Mapping[str, Any] | None = None) -> Figure:
        """Draw batch size, noise scale, learning-rate factor and ``series`` over the samples seen.

        Args:
            path: where to write the figure; its ending chooses the format.
            series: more panels, ``{label: (samples, values)}``.

        Raises:
            ImportError: without matplotlib.
        """
        try:
            from matplotlib.figure import Figure
        except ImportError as error:
            raise ImportError(
                "History.plot needs matplotlib: install it with `pip install adaptive-batch[plot]`."
            ) from error
        extra = dict(series or {})
        figure = Figure(figsize=(9, 2.1 * (3 + len(extra)) + 0.6), layout="constrained")
        panels = figure.subplots(3 + len(extra), sharex=True)
        samples = self.column("samples")
        panels[0].step(samples, self.column("batch_size"), where="pre", color="C0")
        panels[0].set(ylabel="batch size")
        panels[0].set_yscale("log", base=2)
        panels[1].plot(samples, self.column("noise_scale"), color="C1")
        panels[1].set(ylabel="noise scale", yscale="log")
        panels[2].plot(samples, self.column("lr_scale"), color="C2")
        panels[2].set(ylabel="learning-rate\nfactor")
        for index, (label, (x, y)) in enumerate(extra.items(), start=3):
            panels[index].plot(x, y, color=f"C{index}", marker=".")
            panels[index].set(ylabel=label)
        for panel in panels:
            panel.grid(alpha=0.3)
            for change in self.changes:
                panel.axvline(change.samples, color="0.6", linewidth=0.7, linestyle=":")
        panels[-1].set(xlabel="samples")
        if path is not None:
            figure.savefig(path)
        return figure

    def state_dict(self) -> dict[str, Any]:
        """Changes and notes as plain values; updates and measurements as ``[n, fields]`` tensors: quick to save."""
        rows = [[getattr(update, name) for name in _UPDATE_FIELDS] for update in self.updates]
        return {
            "updates": torch.tensor(rows, dtype=torch.float64),
            "changes": [dataclasses.asdict(change) for change in self.changes],
            "notes": [dataclasses.asdict(note) for note in self.notes],
            "measurements": torch.tensor([_measurement_row(m) for m in self.measurements], dtype=torch.float64),
            "written": self._written,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Put back what :meth:`state_dict` gave.

        Raises:
            ValueError: if the state is not one of a history; nothing is changed then.
        """
        try:
            updates = [_update_from_row(row) for row in state["updates"].tolist()]
            changes = [_checked(Change(**row)) for row in state["changes"]]
            notes = [_checked(Change(**row)) for row in state["notes"]]
            measurements = [_measurement_from_row(row) for row in state["measurements"].tolist()]
            written = int(state["written"])
        except (AttributeError, KeyError, OverflowError, TypeError, ValueError) as error:
            raise ValueError(f"this is not the state of a History ({error}).") from error
        self.close()
        self._written = written
        self.updates.clear()
        for update in updates:
            self.add(update)
        self.changes[:] = changes
        self.notes.clear()
        self.notes.extend(notes)
        self.measurements.clear()
        self.measurements.extend(measurements)


def _checked(change: Change) -> Change:
    counts = (change.step, change.epoch, change.samples, change.batch_size, change.previous)
    if not all(isinstance(count, int) for count in counts) or not isinstance(change.reason, str):
        raise TypeError(f"{change} is no change")
    return change
