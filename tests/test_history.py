"""The record of a run: bounded, complete, and the same after a round trip."""

from __future__ import annotations

import csv
import dataclasses
import io
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from adaptive_batch.history import Change, History, Update


def update(step: int, **fields: Any) -> Update:
    return Update(
        **{
            "step": step,
            "epoch": step // 10,
            "samples": 32 * step,
            "batch_size": 32,
            "micro_batch_size": 16,
            "lr_scale": 1.5,
            "noise_scale": 410.5,
            "throughput": 1e4 / 3,
            **fields,
        }
    )


CHANGE = Change(7, 0, 224, 64, 32, "32 -> 64: noise scale 410 [350, 480], predicted +31 % goodput")
NOTE = Change(9, 1, 300, 64, 64, "64 stays: because")


def filled(updates: int, size: int = 5, path: Path | None = None, start: int = 1) -> History:
    history = History(size, path=path)
    for step in range(start, start + updates):
        history.add(update(step))
    return history


def with_events(history: History) -> History:
    history.changes.append(CHANGE)
    history.notes.append(NOTE)
    return history


def steps_of(path: Path) -> list[int]:
    with path.open(newline="") as file:
        return [int(row["step"]) for row in csv.DictReader(file)]


def restored(state: dict[str, Any], history: History) -> History:
    """The history with the state loaded as from a checkpoint."""
    buffer = io.BytesIO()
    torch.save(state, buffer)
    buffer.seek(0)
    history.load_state_dict(torch.load(buffer, weights_only=True))
    return history


def test_keeps_the_last_updates_and_no_more():
    history = filled(1000, size=5)
    assert len(history) == 5
    assert history.column("step") == [996, 997, 998, 999, 1000]


def test_notes_are_bounded_and_changes_are_not():
    history = History(5)
    for _ in range(3000):
        with_events(history)
    assert len(history.changes) == 3000
    assert len(history.notes) == 1000


@pytest.mark.parametrize("size", [0, -1, 1.5, True, None])
def test_refuses_a_size_that_is_no_number_of_updates(size):
    with pytest.raises(ValueError, match="history_size"):
        History(size)


@pytest.mark.parametrize("updates", [3, 5, 6, 40])
def test_file_and_ring_hold_each_update_once(tmp_path, updates):
    path = tmp_path / "old.csv"
    history = filled(updates, path=path)
    history.close()
    older = steps_of(path) if path.exists() else []
    assert [*older, *history.column("step")] == list(range(1, updates + 1))


def test_the_file_can_be_read_while_the_run_goes_on(tmp_path):
    history = filled(9, path=tmp_path / "old.csv")
    assert steps_of(tmp_path / "old.csv") == [1, 2, 3, 4]
    history.close()


def test_closing_between_two_fits_loses_nothing(tmp_path):
    path = tmp_path / "old.csv"
    history = filled(8, path=path)
    history.close()
    history.close()
    for step in range(9, 13):
        history.add(update(step))
    history.close()
    assert [*steps_of(path), *history.column("step")] == list(range(1, 13))


def test_a_new_run_does_not_go_on_with_the_file_of_another(tmp_path):
    filled(20, path=tmp_path / "old.csv").close()
    filled(7, path=tmp_path / "old.csv").close()
    assert steps_of(tmp_path / "old.csv") == [1, 2]


def test_a_resumed_run_cuts_what_was_written_after_its_checkpoint(tmp_path):
    path = tmp_path / "old.csv"
    killed = filled(12, path=path)
    state = killed.state_dict()
    for step in range(13, 31):
        killed.add(update(step))
    killed.close()
    resumed = restored(state, History(5, path=path))
    for step in range(13, 21):
        resumed.add(update(step))
    resumed.close()
    assert [*steps_of(path), *resumed.column("step")] == list(range(1, 21))


def test_a_resumed_run_with_a_smaller_ring_writes_what_does_not_fit(tmp_path):
    path = tmp_path / "old.csv"
    history = filled(12, path=path)
    history.close()
    resumed = restored(history.state_dict(), History(2, path=path))
    resumed.close()
    assert [*steps_of(path), *resumed.column("step")] == list(range(1, 13))


def test_a_resumed_run_without_its_file_starts_one(tmp_path):
    killed = filled(12, path=tmp_path / "old.csv")
    killed.close()
    resumed = restored(killed.state_dict(), History(5, path=tmp_path / "elsewhere.csv"))
    resumed.add(update(13))
    resumed.close()
    assert steps_of(tmp_path / "elsewhere.csv") == [8]


def test_csv_round_trip(tmp_path):
    history = filled(3)
    history.add(update(4, noise_scale=math.nan, loss=0.1 + 0.2))
    history.to_csv(tmp_path / "run.csv")
    with (tmp_path / "run.csv").open(newline="") as file:
        rows = [{name: float(value) for name, value in row.items()} for row in csv.DictReader(file)]
    assert list(map(str, rows)) == [
        str({k: float(v) for k, v in dataclasses.asdict(u).items()}) for u in history.updates
    ]


def test_json_round_trip_in_strict_json(tmp_path):
    history = with_events(filled(2))
    history.add(update(3, noise_scale=math.nan, throughput=math.inf))
    history.to_json(tmp_path / "run.json")

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is no JSON")

    record = json.loads((tmp_path / "run.json").read_text(), parse_constant=refuse)
    assert record["updates"][1] == {**dataclasses.asdict(update(2)), "seconds": None, "loss": None}
    assert record["updates"][2]["noise_scale"] is None
    assert record["updates"][2]["throughput"] is None
    assert [Change(**change) for change in record["changes"]] == [CHANGE]
    assert [Change(**note) for note in record["notes"]] == [NOTE]


@pytest.mark.parametrize("noise_scale", [410.0, math.nan])
@pytest.mark.parametrize("updates", [0, 1, 20])
def test_plot_writes_a_picture_whatever_is_known(tmp_path, updates, noise_scale):
    pytest.importorskip("matplotlib")
    history = with_events(History(50)) if updates else History(50)
    for step in range(1, updates + 1):
        history.add(update(step, noise_scale=noise_scale))
    figure = history.plot(tmp_path / "run.png", series={"accuracy": ([32, 320], [0.2, 0.9])})
    assert (tmp_path / "run.png").read_bytes().startswith(b"\x89PNG")
    assert [axes.get_ylabel() for axes in figure.axes][-1] == "accuracy"


def test_plot_draws_every_series(tmp_path):
    pytest.importorskip("matplotlib")
    series = {f"curve {i}": ([1, 2], [i, i + 1]) for i in range(9)}
    figure = filled(3).plot(series=series)
    assert [axes.get_ylabel() for axes in figure.axes[3:]] == list(series)
    assert all(axes.lines for axes in figure.axes[3:])


@pytest.mark.parametrize("updates", [0, 1, 5, 40])
def test_state_round_trip(updates):
    history = with_events(filled(updates))
    other = restored(history.state_dict(), filled(3, start=900))
    assert list(map(repr, other.updates)) == list(map(repr, history.updates))  # NaN equals NaN
    assert other.changes == [CHANGE]
    assert list(other.notes) == [NOTE]
    assert all(isinstance(u.samples, int) for u in other.updates)


def good_state() -> dict[str, Any]:
    return with_events(filled(3)).state_dict()


@pytest.mark.parametrize(
    "wrong",
    [
        {"updates": None},
        {"updates": torch.zeros(2, 3)},
        {"updates": torch.full((1, 10), math.nan)},
        {"updates": torch.full((1, 10), math.inf)},
        {"updates": torch.zeros(4)},
        {"changes": [{}]},
        {"changes": [dataclasses.asdict(CHANGE) | {"reason": 3}]},
        {"notes": [dataclasses.asdict(NOTE) | {"step": "x"}]},
        {"notes": None},
        {"written": None},
    ],
)
def test_a_malformed_state_is_refused_and_changes_nothing(wrong):
    history = with_events(filled(4))
    before = repr(history.state_dict())
    with pytest.raises(ValueError, match="not the state of a History"):
        history.load_state_dict({**good_state(), **wrong})
    with pytest.raises(ValueError, match="not the state of a History"):
        history.load_state_dict({key: value for key, value in good_state().items() if key not in wrong})
    assert repr(history.state_dict()) == before
