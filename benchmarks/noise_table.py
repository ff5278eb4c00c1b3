"""Every source of the gradient noise beside the exact value, on models that stand still.

A digits classifier and a small transformer (an image is a sequence of eight rows) are trained a little and
then frozen, so that the truth is known: all per-example gradients over the whole set, by vmap. Each source
measures the same number of updates of 64 samples, drawn with replacement and for each source anew. The cost is
that of a measured update on top of a plain one, the two in turn; a run measures a small part of its updates.

    python benchmarks/noise_table.py [--updates 400]
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from typing import NamedTuple

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional

from adaptive_batch.noise import (
    AdamMomentsSource,
    DifferencedSource,
    GradientNoiseScale,
    MicroBatchSource,
    NoiseSample,
    NoiseSource,
    PerExampleSource,
)
from adaptive_batch.noise.subset import SubsetSource

SIZE = 64


class Transformer(nn.Module):
    """Two blocks of layers that per-example hooks know."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.embed = nn.Linear(8, width)
        self.place = nn.Embedding(8, width)
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(4))
        self.qkv = nn.ModuleList(nn.Linear(width, 3 * width) for _ in range(2))
        self.project = nn.ModuleList(nn.Linear(width, width) for _ in range(2))
        self.wide = nn.ModuleList(nn.Linear(width, 4 * width) for _ in range(2))
        self.narrow = nn.ModuleList(nn.Linear(4 * width, width) for _ in range(2))
        self.head = nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = x.unflatten(1, (8, 8))
        x = self.embed(x) + self.place(torch.arange(8).expand(len(x), 8))
        for block in range(2):
            q, k, v = self.qkv[block](self.norms[2 * block](x)).chunk(3, -1)
            x = x + self.project[block](functional.scaled_dot_product_attention(q, k, v))
            x = x + self.narrow[block](self.wide[block](self.norms[2 * block + 1](x)).relu())
        out: Tensor = self.head(x.mean(1))
        return out


class Problem(NamedTuple):
    """A model, its data and the truth."""

    model: nn.Module
    x: Tensor
    y: Tensor
    variance: float
    sq_norm: float


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))


def frozen(make: Callable[[], nn.Module], steps: int, lr: float) -> Problem:
    """The model after so many steps of Adam, and what all examples' gradients say."""
    digits = load_digits()
    x, y = torch.tensor(digits.data, dtype=torch.float32) / 16, torch.tensor(digits.target)
    torch.manual_seed(0)
    model = make()
    optimizer = torch.optim.Adam(model.parameters(), lr=lr)
    for _ in range(steps):
        rows = torch.randint(len(x), (SIZE,))
        optimizer.zero_grad()
        functional.cross_entropy(model(x[rows]), y[rows]).backward()
        optimizer.step()
    parameters = {name: p.detach() for name, p in model.named_parameters()}

    def loss(values: dict[str, Tensor], a: Tensor, b: Tensor) -> Tensor:
        return functional.cross_entropy(torch.func.functional_call(model, values, (a[None],)), b[None])

    by_example = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0, 0), chunk_size=256)
    by_name = by_example(parameters, x, y)
    gradients = torch.cat([g.detach().flatten(1) for g in by_name.values()], 1).double()
    variance = float(gradients.var(0, correction=0).sum())
    return Problem(model, x, y, variance, float(gradients.mean(0).square().sum()))


class Variant(NamedTuple):
    """A source, in how many batches it gets an update, and whether these are a pass of their own."""

    name: str
    make: Callable[[nn.Module, torch.optim.Optimizer], NoiseSource]
    batches: int = 1
    extra: bool = False
    lr: float = 0.0


def adam_source(model: nn.Module, optimizer: torch.optim.Optimizer) -> NoiseSource:
    return AdamMomentsSource(optimizer)


def parts_source(model: nn.Module, optimizer: torch.optim.Optimizer) -> NoiseSource:
    return MicroBatchSource(model.parameters())


VARIANTS = [
    Variant("micro_batches, 2 of 32", parts_source, batches=2),
    Variant("micro_batches, 8 of 8", parts_source, batches=8),
    Variant("per_example", lambda model, _: PerExampleSource(model)),
    Variant("norm_layers", lambda model, _: SubsetSource(model, model.parameters())),
    Variant("probe, 2 of 32", parts_source, batches=2, extra=True),
    Variant("adam_moments", adam_source),
    Variant("differenced, at rest", lambda model, _: DifferencedSource(model.parameters())),
    Variant("differenced, SGD at 0.1", lambda model, _: DifferencedSource(model.parameters()), lr=0.1),
]


def passes(problem: Problem, rows: Tensor, batches: int, source: NoiseSource | None) -> None:
    """Forward and backward of an update, measured or not."""
    problem.model.zero_grad()
    for part in rows.chunk(batches):
        loss = functional.cross_entropy(problem.model(problem.x[part]), problem.y[part])
        (loss / batches).backward()
        if source is not None:
            source.end_batch(len(part), 1 / batches)


def measured(problem: Problem, variant: Variant, source: NoiseSource, rows: Tensor) -> NoiseSample | None:
    """One update's measurement, its gradients left for the optimizer."""
    if isinstance(source, SubsetSource) and source.calibrating:
        probe = MicroBatchSource(problem.model.parameters())
        probe.start()
        passes(problem, rows, 8, probe)
        full = probe.finish()
        assert full is not None
        source.calibrate(full)
    source.start()
    passes(problem, rows, variant.batches, source)
    sample = source.finish()
    if variant.extra:
        passes(problem, rows, 1, None)
    return sample


def measure(problem: Problem, variant: Variant, updates: int, seed: int) -> None:
    """Print one line of the table."""
    torch.manual_seed(seed)
    parameters = list(problem.model.parameters())
    start = [p.detach().clone() for p in parameters]
    resting = torch.optim.AdamW(parameters, lr=0.0)
    moving = torch.optim.SGD(parameters, lr=variant.lr) if variant.lr else None
    source, scale, samples = variant.make(problem.model, resting), GradientNoiseScale(memory=1e9), 0
    seconds: dict[str, list[float]] = {"plain": [], "measured": []}
    for update in range(updates):
        rows = torch.randint(len(problem.x), (SIZE,))
        started = time.perf_counter()
        passes(problem, rows, 1, None)
        between = time.perf_counter()
        sample = measured(problem, variant, source, rows)
        seconds["measured"].append(time.perf_counter() - between)
        seconds["plain"].append(between - started)
        samples += SIZE
        if sample is not None:
            scale.update([float(norm) for norm in sample.sq_norms], sample.sizes, sample.sq_norm)
        (moving or resting).step()
        if moving is not None and update % 2 == 1:
            put(parameters, start)
    report(problem, variant.name, scale, samples, seconds)
    put(parameters, start)


@torch.no_grad()
def put(parameters: list[nn.Parameter], values: list[Tensor]) -> None:
    for parameter, value in zip(parameters, values, strict=True):
        parameter.copy_(value)


def report(
    problem: Problem, name: str, scale: GradientNoiseScale, samples: int, seconds: dict[str, list[float]]
) -> None:
    truth = problem.variance / problem.sq_norm
    low, high = scale.interval()
    inside = "yes" if low <= truth <= high else "no"
    # The mean: what is paid only now and then counts with its share.
    cost = statistics.mean(seconds["measured"]) / statistics.mean(seconds["plain"]) - 1
    print(
        f"{name:<26}{scale.grad_variance:>10.3f}{scale.grad_sq_norm:>11.5f}{scale.noise_scale:>9.1f}"
        f"{f'[{low:.1f}, {high:.1f}]':>20}{inside:>8}{samples:>9}{scale.measurements:>7}{cost:>8.0%}",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--updates", type=int, default=400)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    for name, make, lr in (("MLP", mlp, 3e-3), ("transformer", Transformer, 1e-3)):
        problem = frozen(make, 150, lr)
        count = sum(p.numel() for p in problem.model.parameters())
        print(f"\n{name}, {count} parameters, {arguments.updates} updates of {SIZE} samples")
        print(
            f"{'source':<26}{'tr(Sigma)':>10}{'|G|^2':>11}{'scale':>9}{'95 % interval':>20}{'holds':>8}"
            f"{'samples':>9}{'n':>7}{'cost':>8}"
        )
        truth = problem.variance / problem.sq_norm
        print(f"{'exact':<26}{problem.variance:>10.3f}{problem.sq_norm:>11.5f}{truth:>9.1f}")
        for seed, variant in enumerate(VARIANTS):
            if variant.name != "norm_layers" or name == "transformer":
                measure(problem, variant, arguments.updates, seed)


if __name__ == "__main__":
    main()
