"""Several gloo ranks act as one machine."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

TIMEOUT = 300  # a hang is a failure


def slow(*values: Any) -> Any:
    """A case that is left out by default: one of each kind runs."""
    return pytest.param(*values, marks=pytest.mark.slow)


BASE: dict[str, Any] = {"samples": 101, "batch_size": 12, "sizes": [12, 17, 30, 9, 7, 25, 13, 40, 6, 6, 21]}


def start(folder: Path, world: int, **options: Any) -> list[subprocess.Popen[str]]:
    """One process per rank, as torchrun would start them."""
    folder.mkdir(parents=True)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    processes = []
    for rank in range(world):
        environment = {
            **os.environ,
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
            "WORLD_SIZE": str(world),
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "GROUP_RANK": "0",
            "LOCAL_WORLD_SIZE": str(world),
            "TORCHELASTIC_RUN_ID": "test",
            "PYTHONPATH": str(Path(__file__).parent.parent),
        }
        command = [sys.executable, "tests/ranks.py", str(folder), json.dumps({**BASE, **options})]
        root = Path(__file__).parent.parent
        processes.append(subprocess.Popen(command, env=environment, cwd=root, stderr=subprocess.PIPE, text=True))
    return processes


def launch(folder: Path, world: int, **options: Any) -> list[dict[str, Any]]:
    """Train on ``world`` ranks that Lightning starts by itself."""
    folder.mkdir(parents=True)
    root = Path(__file__).parent.parent
    environment = {**os.environ, "PYTHONPATH": str(root)}
    command = [sys.executable, "tests/ranks.py", str(folder), json.dumps({**BASE, "devices": world, **options})]
    process = subprocess.Popen(command, env=environment, cwd=root, stderr=subprocess.PIPE, text=True)
    (error,) = finish([process])
    assert not error, error
    return [torch.load(folder / f"rank{rank}.pt") for rank in range(world)]


def finish(processes: list[subprocess.Popen[str]], timeout: float = TIMEOUT) -> list[str]:
    """What each rank said before it failed, empty for one that did not."""
    try:
        said = [process.communicate(timeout=timeout)[1] for process in processes]
    finally:
        for process in processes:
            process.kill()
    return [error[-3000:] if process.returncode else "" for process, error in zip(processes, said, strict=True)]


def run(folder: Path, world: int, **options: Any) -> list[dict[str, Any]]:
    """Train on ``world`` ranks; what each of them ended with."""
    errors = [error for error in finish(start(folder, world, **options)) if error]
    assert not errors, errors[0]
    return [torch.load(folder / f"rank{rank}.pt") for rank in range(world)]


def assert_one_machine(ranks: list[dict[str, Any]], one: dict[str, Any], samples: int = 101) -> None:
    for rank in ranks:
        for key in ("changes", "batch_sizes", "lrs", "global_step"):
            assert rank[key] == one[key], key
        for name, weight in one["weights"].items():
            torch.testing.assert_close(rank["weights"][name], weight, rtol=1e-5, atol=1e-6)
        for name, weight in ranks[0]["weights"].items():
            assert torch.equal(rank["weights"][name], weight), f"ranks differ in {name}"
    seen = sorted(index for rank in ranks for index in rank["indices"])
    assert seen == sorted(one["indices"])


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """One rank, with the options that all tests share."""
    return run(tmp_path_factory.mktemp("reference") / "one", 1)[0]


@pytest.mark.parametrize(
    ("world", "options"),
    [(2, {}), (3, {}), (2, {"micro_batch_size": 4}), (2, {"workers": 1, "samples": 104})],
    ids=str,
)
def test_ranks_equal_one_rank_with_the_same_samples(
    tmp_path: Path, reference: dict[str, Any], world: int, options: dict[str, Any]
) -> None:
    one = run(tmp_path / "one", 1, **options)[0] if "workers" in options else reference
    ranks = run(tmp_path / "ranks", world, **options)
    assert len(one["changes"]) > 5
    assert any(size % world for size in one["batch_sizes"])
    assert_one_machine(ranks, one)


@pytest.mark.parametrize(("place", "explosion"), [("forward", 0), ("backward", 5)])
def test_one_rank_out_of_memory_hangs_nobody_and_changes_nothing(
    tmp_path: Path, reference: dict[str, Any], place: str, explosion: int
) -> None:
    explode = {"rank": 1, "pass": explosion, "place": place}
    ranks = run(tmp_path / "ranks", 2, explode=explode)
    assert [rank["exploded"] for rank in ranks] == [False, True]
    assert_one_machine(ranks, reference)


@pytest.mark.slow
def test_steps_of_training_steps_own_are_those_of_one_rank(tmp_path: Path) -> None:
    (one,) = run(tmp_path / "one", 1, manual=True)
    assert_one_machine(run(tmp_path / "ranks", 2, manual=True), one)


@pytest.mark.parametrize("options", [{}, slow({"workers": 1, "samples": 104, "micro_batch_size": 7})], ids=str)
def test_a_rank_that_is_twice_as_fast_takes_twice_as_much_of_the_same_updates(
    tmp_path: Path, reference: dict[str, Any], options: dict[str, Any]
) -> None:
    one = run(tmp_path / "one", 1, **options)[0] if options else reference
    ranks = run(tmp_path / "ranks", 2, **options, seconds_per_sample=[1.0, 2.0], callback={"balance_ranks": True})
    assert_one_machine(ranks, one)
    sizes = list(zip(ranks[0]["sizes"], ranks[1]["sizes"], strict=True))
    assert min(min(pair) for pair in sizes) >= 1
    assert sum(abs(fast - 2 * slow) <= 2 for fast, slow in sizes) >= len(sizes) - 6


def test_shares_of_a_checkpoint_go_on_under_balance_ranks_and_are_alike_without(tmp_path: Path) -> None:
    """As they were, though both ranks are as fast in the resumed run: no decision has changed them yet."""
    sizes: dict[str, Any] = {"samples": 240, "sizes": [24], "checkpoint": 1, "callback": {"balance_ranks": True}}
    run(tmp_path / "whole", 2, **sizes, seconds_per_sample=[1.0, 2.0])
    last = str(tmp_path / "whole" / "step=15.ckpt")
    for balance, shares in ((True, (16, 8)), (False, (12, 12))):
        options = {**sizes, "callback": {"balance_ranks": balance}, "resume": last}
        resumed = run(tmp_path / f"{balance}", 2, **options, seconds_per_sample=[1.0, 1.0 if balance else 2.0])
        assert tuple(rank["sizes"][0] for rank in resumed) == shares


@pytest.mark.slow
def test_shares_are_refused_where_ranks_wait_for_each_other_inside_a_pass(tmp_path: Path) -> None:
    for error in finish(start(tmp_path / "ranks", 2, strategy="static_graph", callback={"balance_ranks": True})):
        assert "ValueError: balance_ranks=True needs passes in which no rank waits" in error


def test_accumulated_batches_count_over_all_ranks(tmp_path: Path) -> None:
    (one,) = run(tmp_path / "one", 1, accumulate=2)
    assert_one_machine(run(tmp_path / "ranks", 2, accumulate=2), one)


@pytest.mark.parametrize("options", [{"order": "buckets"}, slow({"order": "buckets", "workers": 1})], ids=str)
def test_a_batch_sampler_of_the_users_is_drawn_alike_however_it_draws(tmp_path: Path, options: dict[str, Any]) -> None:
    (one,) = run(tmp_path / "one", 1, **options)
    assert len(set(one["batch_sizes"])) > 5
    assert_one_machine(run(tmp_path / "ranks", 2, **options), one)


@pytest.mark.parametrize("order", ["sampled", slow(None)])
def test_the_order_follows_from_the_seed_on_any_number_of_ranks(tmp_path: Path, order: str | None) -> None:
    options: dict[str, Any] = {"order": order, "sizes": [], "epochs": 1}
    (one,) = run(tmp_path / "one", 1, **options, callback={"seed": 3})
    ranks = run(tmp_path / "ranks", 2, **options, callback={"seed": 3})
    assert_one_machine(ranks, one)
    in_order = [index for pair in zip(*(rank["indices"] for rank in ranks), strict=False) for index in pair]
    assert in_order[:96] == one["indices"][:96]


def test_what_batch_size_of_counts_is_added_over_the_ranks_and_weighs_them(tmp_path: Path) -> None:
    options: dict[str, Any] = {"weighted": True, "lr_scaling": "none", "max_batch_size": 128}
    (one,) = run(tmp_path / "one", 1, **options)
    assert any(size % 2 for size in one["batch_sizes"])
    assert_one_machine(run(tmp_path / "ranks", 2, **options), one)


def test_buffers_of_batch_norm_survive_one_rank_out_of_memory(tmp_path: Path) -> None:
    options = {"batch_norm": True, "micro_batch_size": 1000}
    plain = run(tmp_path / "plain", 2, **options)
    explode = {"rank": 1, "pass": 4, "place": "backward"}
    failed = run(tmp_path / "failed", 2, **options, explode=explode)
    assert plain[0]["changes"] == failed[0]["changes"]
    for rank in (*plain, *failed):
        assert all(torch.isfinite(weight).all() for weight in rank["weights"].values())


def test_unused_parameters_stay_unused(tmp_path: Path) -> None:
    options = {"unused": True, "strategy": "ddp_find_unused_parameters_true"}
    (one,) = run(tmp_path / "one", 1, unused=True)
    assert_one_machine(run(tmp_path / "ranks", 2, **options), one)


@pytest.mark.parametrize("options", [slow({}), {"strategy": "bucket_view"}], ids=str)
def test_each_update_is_averaged_once_through_the_users_communication_hook(
    tmp_path: Path, reference: dict[str, Any], options: dict[str, Any]
) -> None:
    explode = {"rank": 1, "pass": 5, "place": "backward"}
    ranks = run(tmp_path / "ranks", 2, comm_hook=True, micro_batch_size=4, explode=explode, **options)
    assert [rank["exploded"] for rank in ranks] == [False, True]
    assert_one_machine(ranks, reference)
    assert [rank["averaged"] for rank in ranks] == [reference["global_step"]] * 2


@pytest.mark.parametrize("strategy", [slow("ddp"), "ddp_spawn"])
def test_ranks_that_lightning_starts_by_itself_are_one_machine(
    tmp_path: Path, reference: dict[str, Any], strategy: str
) -> None:
    assert_one_machine(launch(tmp_path / "ranks", 2, strategy=strategy), reference)


def assert_a_lost_rank_ends_the_run_with_a_sound_checkpoint(folder: Path, signal: str, timeout: float) -> None:
    options: dict[str, Any] = {"strategy": "short_timeout", "checkpoint": 2}
    processes = start(folder / "lost", 2, **options, fault={"signal": signal, "pass": 7})
    try:
        _, error = processes[0].communicate(timeout=timeout)
    finally:
        for process in processes:
            process.kill()
            process.communicate()
    assert processes[0].returncode > 0 and "RuntimeError" in error
    assert not list((folder / "lost").glob("rank*.pt"))
    last = max((folder / "lost").glob("*.ckpt"), key=lambda path: int(path.stem.removeprefix("step=")))
    checkpoint = torch.load(last, weights_only=True)
    assert checkpoint["global_step"] == 6
    resumed = run(folder / "resumed", 2, **options, resume=str(last))
    assert resumed[0]["global_step"] > 6
    assert [sum(rank["batch_sizes"]) for rank in resumed] == [2 * BASE["samples"]] * 2


def test_the_others_end_when_a_rank_is_killed_inside_an_update_and_the_checkpoint_is_sound(tmp_path: Path) -> None:
    assert_a_lost_rank_ends_the_run_with_a_sound_checkpoint(tmp_path, "SIGKILL", TIMEOUT)


@pytest.mark.slow  # waits for the process group's timeout
def test_the_others_end_when_a_rank_stops_answering_and_the_checkpoint_is_sound(tmp_path: Path) -> None:
    assert_a_lost_rank_ends_the_run_with_a_sound_checkpoint(tmp_path, "SIGSTOP", TIMEOUT)


def test_the_ranks_are_the_parts_of_the_noise_estimate(tmp_path: Path) -> None:
    ranks = run(tmp_path / "ranks", 2, policy="goodput", epochs=8)
    assert ranks[0]["noise"] == ranks[1]["noise"]
    _, variance, measurements = ranks[0]["noise"]
    assert measurements > 20
    (one,) = run(tmp_path / "one", 1, policy="constant", lr_scaling="none", epochs=8)
    assert variance > 0
    assert ranks[0]["global_step"] <= one["global_step"]


FSDP = "under ModelParallelStrategy the ranks wait for each other inside every pass"
STATIC = "DDPStrategy(static_graph=True) allows no pass without an all-reduce"
SYNCHRONISED = "under SyncBatchNorm the ranks wait for each other inside every pass"


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (
            {"strategy": "fsdp2", "micro_batch_size": 4},
            f"micro_batch_size=4 needs updates that can be split, but {FSDP}; leave it out.",
        ),
        slow(
            {"strategy": "static_graph", "callback": {"memory_budget": "1GiB"}},
            f"memory_budget='1GiB' needs updates that can be split, but {STATIC}; leave it out.",
        ),
        slow(
            {"sync_batchnorm": True, "batch_norm": True, "callback": {"self_check": True}},
            f"self_check=True needs updates that can be split, but {SYNCHRONISED}; leave it out.",
        ),
        slow(
            {"strategy": "fsdp2", "auto_micro_batch": True},
            f"AutoMicroBatch cannot split the batches of this run: {FSDP}; leave it out.",
        ),
    ],
    ids=str,
)
def test_what_cannot_be_split_is_refused_on_every_rank_where_it_was_asked_for(
    tmp_path: Path, options: dict[str, Any], sentence: str
) -> None:
    errors = finish(start(tmp_path / "ranks", 2, **options))
    assert all(f"ValueError: {sentence}" in error for error in errors)


@pytest.mark.parametrize(("strategy", "why"), [("static_graph", STATIC), ("fsdp2", FSDP), slow("fsdp", "CPUFSDP")])
def test_what_cannot_be_split_is_resized_all_the_same(
    tmp_path: Path, reference: dict[str, Any], strategy: str, why: str
) -> None:
    ranks = run(tmp_path / "ranks", 2, strategy=strategy)
    assert_one_machine(ranks, reference)
    for rank in ranks:
        said = [warning for warning in rank["warnings"] if "will not be split" in warning]
        assert len(said) == 1 and why in said[0]


@pytest.mark.parametrize("strategy", [slow("static_graph"), slow("fsdp"), "fsdp2"])
def test_what_cannot_be_split_is_measured_all_the_same(tmp_path: Path, strategy: str) -> None:
    """Every source is unbiased, so that all of them see about the same variance."""
    options: dict[str, Any] = {"policy": "goodput", "epochs": 6, "max_batch_size": 12}
    plain = run(tmp_path / "plain", 2, **options)
    ranks = run(tmp_path / "ranks", 2, strategy=strategy, **options)
    assert ranks[0]["noise"] == ranks[1]["noise"]
    _, variance, measurements = ranks[0]["noise"]
    assert measurements == plain[0]["noise"][2] > 20
    assert 0.7 < variance / plain[0]["noise"][1] < 1.4
