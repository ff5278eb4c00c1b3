"""A run that is resumed on another number of ranks goes on with the samples that were left."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest
import torch
from runs import trace

ROOT = Path(__file__).parent.parent
TIMEOUT = 300  # a hang is a failure
SAMPLES = 203
BASE: dict[str, Any] = {
    "samples": SAMPLES,
    "policy": "function",
    "epochs": 2,
    "dropout": 0.0,
    "save_every": 3,
    "lr_scaling": "linear",
}
STOPPED_AT = 8  # two updates after the checkpoint, in the middle of the first epoch


def run(folder: Path, world: int, **options: Any) -> None:
    """Train on ``world`` ranks, from the newest checkpoint in the folder if there is one."""
    folder.mkdir(parents=True, exist_ok=True)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    ranks = []
    for rank in range(world):
        names = {"WORLD_SIZE": world, "RANK": rank, "LOCAL_RANK": rank, "LOCAL_WORLD_SIZE": world, "GROUP_RANK": 0}
        address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "TORCHELASTIC_RUN_ID": "test", "PYTHONPATH": ROOT}
        environment = {**os.environ, **{name: str(value) for name, value in {**names, **address}.items()}}
        command = [sys.executable, "tests/runs.py", str(folder), json.dumps({**BASE, **options})]
        ranks.append(subprocess.Popen(command, env=environment, cwd=ROOT, stderr=subprocess.PIPE, text=True))
    try:
        errors = [process.communicate(timeout=TIMEOUT)[1] for process in ranks]
    finally:
        for process in ranks:
            process.kill()
    ended = {process.returncode for process in ranks}
    assert ended == {0} or "stop_after" in options, errors[0][-3000:]


def stopped(folder: Path, world: int, **options: Any) -> Path:
    run(folder, world, stop_after=STOPPED_AT, **options)
    assert (folder / "step=6.ckpt").exists()
    assert not (folder / "done-0.pt").exists()
    return folder


def seen(folder: Path, world: int, *, until: int | None = None, since: int = 0) -> dict[int, list[int]]:
    """By epoch, the samples that all ranks have seen."""
    epochs: dict[int, list[int]] = defaultdict(list)
    for rank in range(world):
        for line in trace(folder, rank):
            if "indices" in line and since < line["step"] <= (until or line["step"]):
                epochs[line["epoch"]] += line["indices"]
    return epochs


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The uninterrupted run, on one rank."""
    folder = tmp_path_factory.mktemp("whole")
    run(folder, 1)
    return folder


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that stopped on two ranks."""
    return stopped(tmp_path_factory.mktemp("two"), 2)


def assert_goes_on(folder: Path, worlds: tuple[int, int], whole: Path) -> None:
    before, after = worlds
    kept = folder.with_name(folder.name + "-kept")
    shutil.copytree(folder, kept)
    for path in folder.glob("trace-*.jsonl"):
        path.unlink()
    run(folder, after)
    seen_before, seen_after = seen(kept, before, until=6), seen(folder, after, since=6)
    assert 0 < len(seen_before[0]) < SAMPLES
    assert sorted(seen_before[0] + seen_after[0]) == list(range(SAMPLES))
    assert sorted(seen_after[1]) == list(range(SAMPLES))
    done, expected = (torch.load(path / "done-0.pt") for path in (folder, whole))
    assert done["batch_sizes"] == expected["batch_sizes"]
    assert done["changes"] == expected["changes"]
    rates = {line["step"]: line["lr"] for line in trace(whole) if "lr" in line}
    assert all(line["lr"] == rates[line["step"]] for line in trace(folder) if "lr" in line)
    # The second epoch's order depends on rank 0's random numbers, which are those of the run that was stopped.
    for name, value in expected["weights"].items():
        torch.testing.assert_close(done["weights"][name], value, rtol=1e-4, atol=1e-5)


def test_from_two_ranks_to_three(tmp_path: Path, whole: Path, two: Path) -> None:
    assert_goes_on(Path(shutil.copytree(two, tmp_path / "three")), (2, 3), whole)


@pytest.mark.slow
def test_from_one_rank_to_two(tmp_path: Path, whole: Path) -> None:
    assert_goes_on(stopped(tmp_path / "one", 1), (1, 2), whole)


@pytest.mark.slow
def test_from_two_ranks_to_one(tmp_path: Path, whole: Path, two: Path) -> None:
    assert_goes_on(Path(shutil.copytree(two, tmp_path / "one")), (2, 1), whole)


@pytest.mark.slow
def test_the_same_ranks_go_on_bit_for_bit_with_dropout_and_metrics(tmp_path: Path) -> None:
    run(tmp_path / "whole", 2, dropout=0.2, workers=1)
    run(stopped(tmp_path / "two", 2, dropout=0.2, workers=1), 2, dropout=0.2, workers=1)
    for rank in (0, 1):
        assert trace(tmp_path / "two", rank) == trace(tmp_path / "whole", rank)
    two, whole = (torch.load(tmp_path / name / "done-1.pt") for name in ("two", "whole"))
    assert all(torch.equal(two["weights"][name], value) for name, value in whole["weights"].items())


def test_between_two_decisions_each_rank_has_its_own_measurements_back(tmp_path: Path) -> None:
    options = {"policy": "noise", "adjust_every": 4, "lr_scaling": "adascale"}  # and a checkpoint after 6 updates
    run(tmp_path / "whole", 2, **options)
    run(stopped(tmp_path / "two", 2, **options), 2, **options)
    for rank in (0, 1):
        assert trace(tmp_path / "two", rank) == trace(tmp_path / "whole", rank)
    two, whole = (torch.load(tmp_path / name / "done-1.pt") for name in ("two", "whole"))
    assert two["changes"] == whole["changes"]
    assert all(torch.equal(two["weights"][name], value) for name, value in whole["weights"].items())
