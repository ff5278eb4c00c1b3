"""Runs that are killed at random moments and resumed, again and again, are the uninterrupted run."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest
import torch
from runs import newest, trace

ROOT = Path(__file__).parent.parent
TIMEOUT = 240  # a hang is a failure
SAMPLES = 203
BASE: dict[str, Any] = {"samples": SAMPLES, "workers": 2, "epochs": 3, "pause": 0.01}


def start(folder: Path, options: dict[str, Any]) -> subprocess.Popen[str]:
    """A run in a process group of its own, workers included."""
    folder.mkdir(parents=True, exist_ok=True)
    return subprocess.Popen(
        [sys.executable, "tests/runs.py", str(folder), json.dumps({**BASE, **options})],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        cwd=ROOT,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def finish(process: subprocess.Popen[str]) -> None:
    _, error = process.communicate(timeout=TIMEOUT)
    assert process.returncode == 0, error[-3000:]


def lines_in(folder: Path) -> int:
    path = folder / "trace-0.jsonl"
    return path.read_text().count("\n") if path.exists() else 0


def kill_at(process: subprocess.Popen[str], folder: Path, lines: int, delay: float) -> bool:
    """Kill it once the trace has so many lines, a moment later; whether it was still running."""
    deadline = time.monotonic() + TIMEOUT
    while lines_in(folder) < lines and process.poll() is None:
        assert time.monotonic() < deadline, "the run hangs"
        time.sleep(0.001)
    time.sleep(delay)
    alive = process.poll() is None
    if alive:
        os.killpg(process.pid, signal.SIGKILL)
    _, error = process.communicate()
    assert process.returncode in (0, -signal.SIGKILL), error[-3000:]
    return alive


def killed_and_resumed(folder: Path, options: dict[str, Any], kills: int, seed: int) -> int:
    """A run that is killed about so often before it may end; how often it was."""
    rng = random.Random(seed)
    done = 0
    for _ in range(kills):
        lines = lines_in(folder) + rng.randint(2, 14)
        done += kill_at(start(folder, options), folder, lines, rng.uniform(0, 0.03))
        if (folder / "done-0.pt").exists():
            return done
    finish(start(folder, options))
    return done


def assert_each_sample_once(lines: list[dict[str, Any]]) -> None:
    epochs: dict[int, list[int]] = defaultdict(list)
    for line in lines:
        epochs[line["epoch"]] += line.get("indices", [])
    assert sorted(epochs) == list(range(BASE["epochs"]))
    for seen in epochs.values():
        assert sorted(seen) == list(range(SAMPLES))


def assert_survives(folder: Path, policy: str, kills: int, seed: int) -> int:
    """Compare a run that is killed with one that is not; the number of kills."""
    whole = start(folder / "whole", {"policy": policy})
    done = killed_and_resumed(folder / "killed", {"policy": policy}, kills, seed)
    finish(whole)
    lines, expected = trace(folder / "killed"), trace(folder / "whole")
    assert_each_sample_once(lines)
    if policy == "goodput":  # it reads the clock, so that two runs differ anyway
        return done
    assert lines == expected
    ours, theirs = (torch.load(folder / name / "done-0.pt") for name in ("killed", "whole"))
    weights = ours.pop("weights"), theirs.pop("weights")
    assert ours == theirs
    assert all(torch.equal(weights[0][name], value) for name, value in weights[1].items())
    assert policy == "constant" or len(ours["changes"]) > 1
    assert policy != "noise" or ours["measurements"] > 5
    return done


def test_a_killed_run_with_measured_noise_is_the_uninterrupted_one(tmp_path: Path) -> None:
    assert assert_survives(tmp_path, "noise", kills=2, seed=1) == 2


@pytest.mark.slow
@pytest.mark.parametrize("seed", [2, 3])
@pytest.mark.parametrize("policy", ["constant", "milestones", "function", "noise", "goodput"])
def test_a_run_killed_often_is_the_uninterrupted_one(tmp_path: Path, policy: str, seed: int) -> None:
    assert assert_survives(tmp_path, policy, kills=4, seed=seed) >= 3


def test_a_checkpoint_that_a_kill_has_torn_is_passed_over(tmp_path: Path) -> None:
    torch.save({"step": 1, "weights": torch.zeros(1000)}, tmp_path / "step=1.ckpt")
    whole = (tmp_path / "step=1.ckpt").read_bytes()
    for number, part in enumerate((0, 1, len(whole) // 2, len(whole) - 1)):
        torn = tmp_path / f"step={number + 2}.ckpt"
        torn.write_bytes(whole[:part])
        os.utime(torn, (2e9, 2e9))
        assert newest(tmp_path) == tmp_path / "step=1.ckpt"
