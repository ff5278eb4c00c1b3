"""The examples run, and what they print follows from what they computed."""

from __future__ import annotations

import importlib.util
import re
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"


def load(name: str) -> ModuleType:
    """The example as a module."""
    spec = importlib.util.spec_from_file_location(f"example_{name}", EXAMPLES / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def rows_below(output: str, title: str) -> list[list[str]]:
    """The cells of the table with that title, without its header."""
    lines = output[output.index(title) :].split("\n\n")[0].splitlines()[2:]
    return [re.split(r" {2,}", line.strip()) for line in lines]


# Linear regression


@pytest.fixture(scope="module")
def regression() -> Any:
    return load("linear_regression")


@pytest.fixture(scope="module")
def printed(regression: Any) -> str:
    with pytest.MonkeyPatch.context() as patch:
        lines: list[str] = []
        patch.setattr("builtins.print", lambda *words: lines.append(" ".join(words)))
        regression.main(["--epochs", "3", "--seed", "1"])
    return "\n".join(lines)


def test_the_example_counts_updates_and_epochs_of_each_comparison(printed: str) -> None:
    titles = ("Equal epochs and rate\n", "Equal updates and rate\n", "Equal epochs and rate per sample\n")
    assert [[row[:4] for row in rows_below(printed, title)] for title in titles] == [
        [["1", "0.01", "3", "300"], ["10", "0.01", "3", "30"], ["100", "0.01", "3", "3"]],
        [["1", "0.01", "3", "300"], ["10", "0.01", "30", "300"], ["100", "0.01", "300", "300"]],
        [["1", "0.01", "3", "300"], ["10", "0.1", "3", "30"], ["100", "1", "3", "3"]],
    ]


def test_the_example_measures_the_closed_forms_gradient_variance(printed: str) -> None:
    one, ten, all_samples = rows_below(printed, "Gradients at theta = 0")
    assert one[3] == "1.000"  # whole epochs of single samples: exact
    assert float(ten[3]) == pytest.approx(1.0, abs=0.15)
    assert float(all_samples[1]) == float(all_samples[2]) == 0.0


def test_the_closed_form_is_that_of_drawing_without_replacement(regression: Any) -> None:
    problem = regression.Problem.draw(3)
    theta = np.array([0.2, -0.1])
    gradients = problem.gradients(theta)
    full = gradients.mean(axis=0)
    rng = np.random.default_rng(0)
    for size in (1, 7, 50):
        draws = [gradients[rng.permutation(100)[:size]].mean(axis=0) for _ in range(5000)]
        measured = np.mean(np.sum((np.stack(draws) - full) ** 2, axis=1))
        assert problem.gradient_variance(theta, size) == pytest.approx(measured, rel=0.06)
    assert problem.gradient_variance(theta, 100) == 0.0


def test_the_full_batch_reaches_the_least_squares_optimum_and_gradient_descent_exactly(
    regression: Any,
) -> None:
    problem = regression.Problem.draw(0)
    result = regression.train(problem, 100, 0.01, 30, 0)
    theta = np.zeros(2)
    for _ in range(30):
        theta = theta - 0.01 * problem.gradients(theta).mean(axis=0)
    optimum = problem.loss(problem.least_squares())
    assert result.excess == pytest.approx(problem.loss(theta) - optimum, rel=1e-10)
    assert result.risk == pytest.approx(regression.risk(theta), rel=1e-10)
    assert regression.train(problem, 100, 1.0, 40, 0).excess < 1e-12


def test_the_copied_code_is_counted_as_its_loop_runs(printed: str) -> None:
    """ALGORITHMS.md, section F."""
    rows = [row[:5] for row in rows_below(printed, "The copied code")]
    assert rows == [
        ["1", "100 (100)", "100 (100)", "0.01 (1)", "1:1 (1:1)"],
        ["10", "100 (10)", "955 (100)", "0.0955 (0.1)", "1:10 (1:1)"],
        ["100", "100 (1)", "5050 (100)", "0.505 (0.01)", "1:100 (1:1)"],
    ]


def test_the_copied_code_trains_as_its_effective_learning_rates_say(regression: Any) -> None:
    problem = regression.Problem.draw(0)
    theta = np.zeros(2)
    for start in range(100):
        window = problem.gradients(theta)[start : start + 10]
        theta = theta - 0.01 * len(window) / 100 * window.mean(axis=0)
    np.testing.assert_allclose(regression.copied_training(problem, 10, 1), theta, rtol=1e-12)


def test_memory_grows_by_the_same_bytes_for_each_sample(printed: str) -> None:
    rows = np.array(rows_below(printed, "Memory in bytes"), dtype=int)
    assert (rows[:, 1] == 2 * 2 * 8).all()  # two weights and their gradient in float64
    per_sample = rows[:, 2] / rows[:, 0]
    assert per_sample.min() == per_sample.max() >= (2 + 1) * 8


def test_the_verdict_about_the_model_follows_from_the_numbers(regression: Any) -> None:
    result = regression.Result(1, 0.01, 1, 100, 1.0, 0.01, 0.0, 1.0)

    def verdict(*risks: float) -> str:
        settings = {f"setting {i}": [result, replace(result, risk=risk)] for i, risk in enumerate(risks)}
        said: str = regression.model_verdict(settings)
        return said

    assert verdict(3.0, 4.0).startswith("true: 100 against 1 is worse (3.0 times the risk) at setting 0")
    assert verdict(0.2, 0.25).startswith("false: 100 against 1 is better (5.0 times less risk)")
    assert verdict(1.0, 1.5).startswith("false: 100 against 1 is alike")
    assert verdict(3.0, 1.0).startswith("depends on what is held equal")


def test_the_verdict_about_time_follows_from_the_numbers(regression: Any) -> None:
    slow = regression.Result(1, 0.01, 1, 100, 1.0, 0.01, 0.0, 1.0)
    fast = regression.Result(100, 0.01, 1, 1, 0.02, 0.02, 0.0, 1.0)
    words = regression.time_verdict([slow, fast])
    assert words.startswith("true here: an epoch at 1 takes 50 times as long as at 100")
    assert "100 times the updates" in words and "an update of 100 takes 2.00 times" in words
    assert regression.time_verdict([fast, replace(slow, updates=1)]).startswith("false")


def test_the_example_gives_a_verdict_on_each_claim_and_fits_a_terminal(printed: str) -> None:
    verdicts = printed[printed.index("What is true of larger batches") :]
    claims = (
        "more accurate gradients",
        "cost memory",
        "faster per epoch",
        "a worse model",
        "the copied code",
    )
    for claim in claims:
        assert f"  {claim}: " in verdicts
    assert max(map(len, printed.splitlines())) <= 115


def test_the_example_prints_no_progress_bar(regression: Any, capsys: pytest.CaptureFixture[str]) -> None:
    regression.train(regression.Problem.draw(0), 10, 0.01, 1, 0)
    assert capsys.readouterr() == ("", "")


def test_the_example_refuses_no_epochs(regression: Any, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        regression.main(["--epochs", "0"])
    assert "--epochs must be at least 1" in capsys.readouterr().err


# Digits
