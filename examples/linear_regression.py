"""What is true about batch size, in numbers: linear regression with batches of 1, 10 and 100 samples.

An often-copied introduction trains ``y = X [0.5, 0.5] + noise`` (``X`` 100 x 2, learning rate 0.01) with
three batch sizes and concludes that larger batches give more accurate gradients, cost memory, are faster per
epoch and train a worse model. On this problem the truth is known in closed form, so each claim can be judged:

    python examples/linear_regression.py [--epochs 20] [--seed 0]

The loss is half the mean square error. ``theta`` starts at zero.
"""

from __future__ import annotations

import argparse
import functools
import math
import textwrap
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from adaptive_batch import FixedBatchTrainer, MiniBatchTrainer, SGDTrainer

Array = NDArray[np.float64]
Trainer = FixedBatchTrainer | MiniBatchTrainer | SGDTrainer

SAMPLES = 100
TRUTH = np.array([0.5, 0.5])
NOISE = 0.5
LR = 0.01
BATCH_SIZES = (1, 10, 100)
SHUFFLES = 3  # runs with different orders, averaged
DRAWS = 2000  # batches whose gradients are compared with the closed form


# The problem, and what is known about it in closed form


@dataclass(frozen=True, eq=False)
class Problem:
    """``y = X [0.5, 0.5] + noise``, with standard normal ``X``."""

    x: Array
    y: Array

    @classmethod
    def draw(cls, seed: int) -> Problem:
        rng = np.random.default_rng(seed)
        x = rng.standard_normal((SAMPLES, len(TRUTH)))
        return cls(x, x @ TRUTH + NOISE * rng.standard_normal(SAMPLES))

    def loss(self, theta: Array) -> float:
        return float(np.mean((self.x @ theta - self.y) ** 2) / 2)

    def least_squares(self) -> Array:
        return np.asarray(np.linalg.lstsq(self.x, self.y, rcond=None)[0], dtype=np.float64)

    def gradients(self, theta: Array) -> Array:
        """``[100, 2]``: the gradient of each sample's own loss."""
        rows: Array = self.x * (self.x @ theta - self.y)[:, None]
        return rows

    def gradient_variance(self, theta: Array, batch_size: int) -> float:
        """``E |g_B - G|^2`` of a batch drawn without replacement: ``S/B * (N-B)/(N-1)``, S divided by N."""
        variance = float(self.gradients(theta).var(axis=0).sum())
        return variance / batch_size * (SAMPLES - batch_size) / (SAMPLES - 1)


def risk(theta: Array) -> float:
    """Expected loss on fresh data above the true weights': ``|theta - truth|^2 / 2``, as ``E xx' = I``."""
    return float(np.sum((theta - TRUTH) ** 2) / 2)


# Training


def half_mean_square(prediction: Tensor, y: Tensor) -> Tensor:
    return (prediction.squeeze(-1) - y).square().mean() / 2


def zeros() -> nn.Linear:
    model = nn.Linear(len(TRUTH), 1, bias=False, dtype=torch.float64)
    nn.init.zeros_(model.weight)
    return model


def make_trainer(model: nn.Module, optimizer: torch.optim.Optimizer, batch_size: int, seed: int) -> Trainer:
    """The trainer that this batch size has its name from."""
    if batch_size == 1:
        return SGDTrainer(model, half_mean_square, optimizer, seed=seed, progress=False)
    if batch_size == SAMPLES:
        return FixedBatchTrainer(model, half_mean_square, optimizer, progress=False)
    return MiniBatchTrainer(model, half_mean_square, optimizer, batch_size=batch_size, seed=seed, progress=False)


@dataclass(frozen=True)
class Result:
    """What a batch size came to, averaged over the shuffles."""

    batch_size: int
    lr: float
    epochs: int
    updates: int
    epoch_seconds: float
    update_seconds: float  # without an epoch's beginning
    excess: float  # training loss above the least-squares optimum
    risk: float


@functools.cache  # what several comparisons share runs once
def train(problem: Problem, batch_size: int, lr: float, epochs: int, seed: int) -> Result:
    shuffles = 1 if batch_size == SAMPLES else SHUFFLES  # the order of one batch's samples does not matter
    optimum = problem.loss(problem.least_squares())
    found = []
    for shuffle in range(shuffles):
        model = zeros()
        optimizer = torch.optim.SGD(model.parameters(), lr=lr)
        trainer = make_trainer(model, optimizer, batch_size, seed + shuffle)
        started = time.perf_counter()
        history = trainer.fit((problem.x, problem.y), epochs=epochs)
        epoch_seconds = (time.perf_counter() - started) / epochs
        theta = model.weight.detach().numpy()[0]
        update_seconds = float(np.median(history.column("seconds")))
        found.append((epoch_seconds, update_seconds, problem.loss(theta) - optimum, risk(theta)))
    means = map(float, np.mean(found, axis=0))
    return Result(batch_size, lr, epochs, history.updates[-1].step, *means)


# The accuracy of the gradients


def measured_variance(problem: Problem, batch_size: int, seed: int) -> float:
    """Mean square distance to the full gradient of the gradients that a trainer uses, frozen at zero."""
    model = zeros()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    drawn: list[Array] = []
    optimizer.register_step_post_hook(lambda *_: drawn.append(gradient_of(model)))
    epochs = math.ceil(DRAWS * batch_size / SAMPLES)
    make_trainer(model, optimizer, batch_size, seed).fit((problem.x, problem.y), epochs=epochs)
    full = problem.gradients(np.zeros(2)).mean(axis=0)
    return float(np.mean(np.sum((np.stack(drawn) - full) ** 2, axis=1)))


def gradient_of(model: nn.Linear) -> Array:
    assert model.weight.grad is not None
    gradient: Array = model.weight.grad.numpy()[0].copy()
    return gradient


# Memory


def bytes_held(problem: Problem, batch_size: int) -> int:
    """Bytes of the batch and of what its forward pass keeps for the backward pass, each storage once."""
    model = zeros()
    x, y = torch.from_numpy(problem.x[:batch_size].copy()), torch.from_numpy(problem.y[:batch_size].copy())
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in (x, y)}
    kept: list[Tensor] = []  # held on to, so that no two of them can have the same address

    def pack(tensor: Tensor) -> Tensor:
        if tensor.untyped_storage().data_ptr() != model.weight.untyped_storage().data_ptr():
            storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            kept.append(tensor)
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        half_mean_square(model(x), y)
    return sum(storages.values())


def split_update_difference(problem: Problem, micro_batch_size: int) -> float:
    """Largest difference in the weights after one update on all samples, split and not split."""
    weights = []
    for size in (None, micro_batch_size):
        model = zeros()
        MiniBatchTrainer(
            model,
            half_mean_square,
            torch.optim.SGD(model.parameters(), lr=LR),
            batch_size=SAMPLES,
            micro_batch_size=size,
            seed=0,
            progress=False,
        ).fit((problem.x, problem.y))
        weights.append(model.weight.detach().numpy())
    return float(np.abs(weights[0] - weights[1]).max())


# The copied code


def copied_windows(batch_size: int) -> Iterator[range]:
    """``for i in range(m): X[i:i + b]``: overlapping windows, in order."""
    for start in range(SAMPLES):
        yield range(start, min(start + batch_size, SAMPLES))


def copied_training(problem: Problem, batch_size: int, epochs: int) -> Array:
    """``theta -= lr / m * sum(gradients of the window)``: divided by all samples, whatever the window."""
    theta = np.zeros(2)
    for _ in range(epochs):
        for window in copied_windows(batch_size):
            x, y = problem.x[window.start : window.stop], problem.y[window.start : window.stop]
            theta = theta - LR / SAMPLES * x.T @ (x @ theta - y)
    return theta


# What it all says


def table(title: str, header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    print(f"\n{title}")
    for row in (header, *rows):
        print("  " + "   ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)))


def show_training(title: str, results: Sequence[Result]) -> None:
    header = ["batch", "lr", "epochs", "updates", "ms/epoch", "us/update", "loss - optimum", "risk"]
    rows = [
        [
            f"{r.batch_size}",
            f"{r.lr:g}",
            f"{r.epochs}",
            f"{r.updates}",
            f"{1e3 * r.epoch_seconds:.2f}",
            f"{1e6 * r.update_seconds:.0f}",
            f"{r.excess:.2e}",
            f"{r.risk:.2e}",
        ]
        for r in results
    ]
    table(title, header, rows)


def yes_no(condition: bool) -> str:
    return "true" if condition else "false"


def compare(large: float, small: float) -> str:
    """The larger batch's risk beside the smaller one's; within a factor of two is called alike."""
    if large > 2 * small:
        return f"worse ({large / small:.1f} times the risk)"
    if small > 2 * large:
        return f"better ({small / large:.1f} times less risk)"
    return f"alike ({large / small:.1f} times the risk)"


def show_gradients(problem: Problem, seed: int) -> str:
    start = np.zeros(2)
    sq_norm = float(np.sum(problem.gradients(start).mean(axis=0) ** 2))
    expected = [problem.gradient_variance(start, size) for size in BATCH_SIZES]
    measured = [measured_variance(problem, size, seed) for size in BATCH_SIZES]
    rows = [
        [
            f"{size}",
            f"{m:.5f}",
            f"{e:.5f}",
            f"{m / e:.3f}" if e > 0 else "-",
            f"{math.sqrt(m / sq_norm):.3f}",
        ]
        for size, m, e in zip(BATCH_SIZES, measured, expected, strict=True)
    ]
    table(
        f"Gradients at theta = 0: E |g_B - G|^2 over {DRAWS} batches; closed form S/B * (N-B)/(N-1)",
        ["batch", "measured", "closed form", "ratio", "RMS error / |G|"],
        rows,
    )
    small, middle, large = measured
    noise_scale = problem.gradient_variance(start, 1) / sq_norm
    return (
        f"{yes_no(small > middle > large)}: from {BATCH_SIZES[0]} to {BATCH_SIZES[1]} samples the variance "
        f"falls {small / middle:.1f}-fold (closed form {expected[0] / expected[1]:.1f}), with all samples to "
        f"{large:.0e}; noise and gradient are equal at the noise scale, S/|G|^2 = {noise_scale:.1f} samples"
    )


def show_memory(problem: Problem) -> str:
    held = [bytes_held(problem, size) for size in BATCH_SIZES]
    parameters = zeros().weight
    fixed = 2 * parameters.numel() * parameters.element_size()
    micro = BATCH_SIZES[1]
    difference = split_update_difference(problem, micro)
    rows = [[f"{size}", f"{fixed}", f"{b}"] for size, b in zip(BATCH_SIZES, held, strict=True)]
    table(
        "Memory in bytes: what stays (weights, gradient), and the batch with what backward needs of it",
        ["batch", "stays", "grows"],
        rows,
    )
    per_sample = (held[-1] - held[0]) / (BATCH_SIZES[-1] - BATCH_SIZES[0])
    return (
        f"{yes_no(per_sample > 0)}: {per_sample:.0f} bytes more for each sample of a pass; but an update of "
        f"{SAMPLES} in passes of {micro} holds {held[1]} bytes instead of {held[2]}, and its weights differ "
        f"by {difference:.0e}"
    )


def time_verdict(results: Sequence[Result]) -> str:
    small, large = results[0], results[-1]
    per_epoch = small.epoch_seconds / large.epoch_seconds
    per_update = large.update_seconds / small.update_seconds
    return (
        f"{yes_no(per_epoch > 1)} here: an epoch at {small.batch_size} takes {per_epoch:.0f} times as long "
        f"as at {large.batch_size}, for {small.updates // large.updates} times the updates; an update of "
        f"{large.batch_size} takes {per_update:.2f} times as long as one of {small.batch_size}"
    )


def model_verdict(settings: dict[str, Sequence[Result]]) -> str:
    found = {name: compare(results[-1].risk, results[0].risk) for name, results in settings.items()}
    kinds = {words.split()[0] for words in found.values()}
    verdict = "depends on what is held equal" if len(kinds) > 1 else yes_no(kinds == {"worse"})
    sizes = f"{BATCH_SIZES[-1]} against {BATCH_SIZES[0]}"
    said = "; ".join(f"{words} at {name}" for name, words in found.items())
    return f"{verdict}: {sizes} is {said}"


def show_copied_code(problem: Problem, results: Sequence[Result], epochs: int) -> str:
    optimum = problem.loss(problem.least_squares())
    rows, losses = [], []
    for result in results:
        sizes = [len(window) for window in copied_windows(result.batch_size)]
        uses = np.bincount([i for window in copied_windows(result.batch_size) for i in window])
        losses.append(problem.loss(copied_training(problem, result.batch_size, epochs)) - optimum)
        updates = result.updates // epochs
        rows.append(
            [
                f"{result.batch_size}",
                f"{len(sizes)} ({updates})",
                f"{sum(sizes)} ({SAMPLES})",
                f"{sum(LR * size / SAMPLES for size in sizes):.4g} ({LR * updates:.4g})",
                f"{uses[0]}:{uses[-1]} (1:1)",
                f"{losses[-1]:.2e} ({result.excess:.2e})",
            ]
        )
    table(
        f"The copied code (overlapping windows, divided by {SAMPLES}); in brackets what is right, per epoch",
        [
            "batch",
            "updates",
            "gradients",
            "sum of lr",
            "first:last sample",
            f"loss - optimum, {epochs} epochs",
        ],
        rows,
    )
    copied, right = (ranking(values) for values in (losses, [result.excess for result in results]))
    return f"from best to worst it ranks the batch sizes {copied}, where right code at equal rate has {right}"


def ranking(losses: Sequence[float]) -> str:
    return ", ".join(f"{size}" for _, size in sorted(zip(losses, BATCH_SIZES, strict=True)))


def run(epochs: int, seed: int) -> None:
    problem = Problem.draw(seed)
    optimum = problem.least_squares()
    print(
        f"y = X {TRUTH.tolist()} + {NOISE:g} noise, X {SAMPLES} x {len(TRUTH)}; least squares: theta = "
        f"[{optimum[0]:.4f}, {optimum[1]:.4f}], loss {problem.loss(optimum):.6f}, risk {risk(optimum):.2e}\n"
        f"(risk: expected loss on fresh data above the true weights'; means over {SHUFFLES} shuffles)"
    )

    def results(lr: Callable[[int], float], epochs_of: Callable[[int], int]) -> list[Result]:
        return [train(problem, size, lr(size), epochs_of(size), seed) for size in BATCH_SIZES]

    settings: dict[str, Sequence[Result]] = {
        "equal epochs and rate": results(lambda size: LR, lambda size: epochs),
        "equal updates and rate": results(lambda size: LR, lambda size: epochs * size),
        "equal epochs and rate per sample": results(lambda size: LR * size, lambda size: epochs),
    }
    for name, rows in settings.items():
        show_training(name.capitalize(), rows)
    same_epochs = settings["equal epochs and rate"]
    verdicts = {
        "more accurate gradients": show_gradients(problem, seed),
        "cost memory": show_memory(problem),
        "faster per epoch": time_verdict(same_epochs),
        "a worse model": model_verdict(settings),
        "the copied code": show_copied_code(problem, same_epochs, epochs),
    }
    print("\nWhat is true of larger batches")
    for claim, verdict in verdicts.items():
        print(textwrap.fill(f"{claim}: {verdict}", 100, initial_indent="  ", subsequent_indent="    "))


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Batch size on linear regression, against closed forms.")
    parser.add_argument("--epochs", type=int, default=20, help="passes over the data at equal epochs")
    parser.add_argument("--seed", type=int, default=0, help="of the data and the shuffling")
    options = parser.parse_args(arguments)
    if options.epochs < 1:
        parser.error("--epochs must be at least 1")
    torch.set_num_threads(1)  # there is nothing here to share
    run(options.epochs, options.seed)


if __name__ == "__main__":
    main()
