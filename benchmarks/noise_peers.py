"""Noise estimators of three other packages beside ours, on the same gradients in one run.

A digits classifier stands still, so what is to be estimated is known exactly. At each update, every
estimator sees the same backward passes (gns-pytorch, which makes its own, the same samples), with averages of
the same memory. Per scenario and estimator, over independent runs, as multiples of the truth: the mean of
tr(Sigma) and of |G|^2 with its standard error, their standard deviations, the quartiles of the noise scale, how
often there is none, and how often it is off by a factor of ten or more.

The peers are not dependencies. In an environment of its own:

    pip install torch numpy scikit-learn gns-pytorch adaptdl fairscale requests "setuptools<81"
    PYTHONPATH=. python benchmarks/noise_peers.py [--runs 40] [--updates 100]
"""

from __future__ import annotations

import argparse
import copy
import importlib
import importlib.util
import math
import os
import types
import warnings
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional

from adaptive_batch.noise import GradientNoiseScale, MicroBatchSource, NoiseSample, PerExampleSource

DECAY = 0.999  # of AdaptDL's and AdaScale's averages, per part of the base size

Batches = list[tuple[Tensor, Tensor]]


class Scenario(NamedTuple):
    """The parts of each update, in the first and in the second half of a run."""

    name: str
    first: list[int]
    second: list[int]


SCENARIOS = [
    Scenario("4 parts of 16", [16] * 4, [16] * 4),
    Scenario("2 parts of 4 (small)", [4] * 2, [4] * 2),
    Scenario("uneven parts 16, 16, 16, 2", [16, 16, 16, 2], [16, 16, 16, 2]),
    Scenario("resize: 2 parts of 16, then 8", [16] * 2, [16] * 8),
]


class Estimator(Protocol):
    """Follows the updates of a run."""

    def start(self, parts: list[int]) -> None:
        """An update begins."""

    def end_part(self, size: int) -> None:
        """A backward pass has ended."""

    def end(self, batches: Batches) -> None:
        """The update's gradients are complete."""

    def result(self) -> tuple[float, float, float]:
        """``tr(Sigma)``, ``|G|^2`` and the noise scale; NaN for what it does not tell."""


class Ours:
    """One of our sources and the noise scale."""

    def __init__(self, source: MicroBatchSource | PerExampleSource, base: int) -> None:
        self._source = source
        self._scale = GradientNoiseScale(memory=-base / math.log(DECAY))

    def start(self, parts: list[int]) -> None:
        self._source.start()

    def end_part(self, size: int) -> None:
        self._source.end_batch(size, 1.0)  # the losses of the parts are added up as they are

    def end(self, batches: Batches) -> None:
        sample = self._source.finish()
        assert isinstance(sample, NoiseSample)
        self._scale.update([float(norm) for norm in sample.sq_norms], sample.sizes, sample.sq_norm)

    def result(self) -> tuple[float, float, float]:
        return self._scale.grad_variance, self._scale.grad_sq_norm, self._scale.noise_scale


class AdaptDL:
    """AdaptDL's averages; it learns the sizes of parts only through the nominal scale."""

    def __init__(self, model: nn.Module, base: int) -> None:
        os.environ.setdefault("ADAPTDL_CHECKPOINT_PATH", "/tmp")
        np.int = int  # type: ignore[attr-defined]  # removed from NumPy 1.24, used by AdaptDL
        module = importlib.import_module("adaptdl.torch.gradient_noise_scale")
        self._ddp: Any = type("Ddp", (), {"require_backward_grad_sync": False})()
        self._optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
        self._gns = module.GradientNoiseScale(self._ddp, self._optimizer, num_replicas=1, accum_scale=1.0)
        self._base = base

    def start(self, parts: list[int]) -> None:
        self._gns.reset_accumulation()
        self._gns.set_accum_scale(max(parts) / self._base)
        self._left = len(parts)
        self._ddp.require_backward_grad_sync = self._left == 1

    def end_part(self, size: int) -> None:
        self._left -= 1
        self._ddp.require_backward_grad_sync = self._left == 1

    def end(self, batches: Batches) -> None:
        pass

    def result(self) -> tuple[float, float, float]:
        variance, sq_norm = self._base * self._gns.var_avg(), self._gns.sqr_avg()
        return variance, sq_norm, variance / sq_norm if sq_norm else math.inf


class FairscaleAdaScale:
    """fairscale's AdaScale, its smoothing set to the same memory; resized as its documentation says."""

    def __init__(self, model: nn.Module, base: int, parts: list[int]) -> None:
        module = importlib.import_module("fairscale.optim")
        self._base = base
        self._optimizer = module.AdaScale(
            torch.optim.SGD(model.parameters(), lr=0.0),
            world_size=1,
            scale=sum(parts) / base,
            num_gradients_to_accumulate=len(parts),
            smoothing=DECAY ** (sum(parts) / base),
            is_scaled_loss=False,
        )
        self._parts = parts

    def start(self, parts: list[int]) -> None:
        if parts == self._parts:
            return
        self._parts = parts
        self._optimizer.set_num_gradients_to_accumulate(len(parts), update_smoothing=False)
        self._optimizer._smoothing = DECAY ** (sum(parts) / self._base)
        self._optimizer.set_scale(sum(parts) / self._base)

    def end_part(self, size: int) -> None:
        pass

    def end(self, batches: Batches) -> None:
        pass

    def result(self) -> tuple[float, float, float]:
        variance, sq_norm = self._base * self._optimizer._grad_var_avg(), self._optimizer._grad_sqr_avg()
        return variance, sq_norm, variance / sq_norm if sq_norm else math.inf


class GnsPytorch:
    """gns-pytorch on all parameters and samples, its ratios averaged as its documentation says."""

    def __init__(self, model: nn.Module, base: int) -> None:
        module: Any = importlib.import_module("gns_pytorch.gns")
        module.gc = types.SimpleNamespace(
            collect=lambda: None
        )  # each call collects garbage, which takes most of the run
        self._compute = module.compute_gns
        self._model, self._base = copy.deepcopy(model), base
        self._sum = self._weight = 0.0

    def start(self, parts: list[int]) -> None:
        self._keep = DECAY ** (sum(parts) / self._base)

    def end_part(self, size: int) -> None:
        pass

    def end(self, batches: Batches) -> None:
        x, y = (torch.cat(column) for column in zip(*batches, strict=True))
        losses = functional.cross_entropy(self._model(x), y, reduction="none")
        ratio = self._compute(losses, self._model, 1.0, 1.0, use_vmap=True)
        self._sum = self._keep * self._sum + (1 - self._keep) * ratio
        self._weight = self._keep * self._weight + (1 - self._keep)

    def result(self) -> tuple[float, float, float]:
        return math.nan, math.nan, self._sum / self._weight


def trained() -> tuple[nn.Module, Tensor, Tensor]:
    """A small classifier on the digits, after 300 steps of SGD."""
    digits = load_digits()
    x, y = torch.tensor(digits.data, dtype=torch.float32) / 16, torch.tensor(digits.target)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(300):
        rows = torch.randint(len(x), (64,))
        optimizer.zero_grad()
        functional.cross_entropy(model(x[rows]), y[rows]).backward()
        optimizer.step()
    return model, x, y


def exact(model: nn.Module, x: Tensor, y: Tensor) -> tuple[float, float]:
    """``tr(Sigma)`` and ``|G|^2`` of draws with replacement, from every example's own gradient by vmap."""
    parameters = {name: p.detach() for name, p in model.named_parameters()}

    def loss(values: dict[str, Tensor], a: Tensor, b: Tensor) -> Tensor:
        out = torch.func.functional_call(model, values, (a[None],))
        return functional.cross_entropy(out, b[None])

    by_name = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0, 0))(parameters, x, y)
    gradients = torch.cat([g.flatten(1) for g in by_name.values()], 1).double()
    return float(gradients.var(0, correction=0).sum()), float(gradients.mean(0).square().sum())


def run(model: nn.Module, x: Tensor, y: Tensor, scenario: Scenario, updates: int, seed: int) -> Any:
    """The results of all estimators over one run."""
    torch.manual_seed(seed)
    model, base = copy.deepcopy(model), max(scenario.first)
    estimators: dict[str, Estimator] = {
        "ours, micro_batches": Ours(MicroBatchSource(model.parameters()), base),
        "ours, per_example": Ours(PerExampleSource(model), base),
        "AdaptDL": AdaptDL(model, base),
        "fairscale AdaScale": FairscaleAdaScale(model, base, scenario.first),
        "gns-pytorch": GnsPytorch(model, base),
    }
    for update in range(updates):
        parts = scenario.first if update < updates // 2 else scenario.second
        model.zero_grad()
        for estimator in estimators.values():
            estimator.start(parts)
        batches = []
        for size in parts:
            rows = torch.randint(len(x), (size,))
            batches.append((x[rows], y[rows]))
            loss = functional.cross_entropy(model(x[rows]), y[rows])
            loss.backward()
            for estimator in estimators.values():
                estimator.end_part(size)
        for estimator in estimators.values():
            estimator.end(batches)
    return {name: estimator.result() for name, estimator in estimators.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=40)
    parser.add_argument("--updates", type=int, default=100)
    arguments = parser.parse_args()
    for name in ("gns_pytorch", "adaptdl", "fairscale"):
        if importlib.util.find_spec(name) is None:
            raise SystemExit(f"{name} is not installed; see the top of this file for what to install.")
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    model, x, y = trained()
    variance, sq_norm = exact(model, x, y)
    print(f"exact: tr(Sigma) {variance:.4f}, |G|^2 {sq_norm:.5f}, noise scale {variance / sq_norm:.1f}")
    for scenario in SCENARIOS:
        results = [run(model, x, y, scenario, arguments.updates, seed) for seed in range(arguments.runs)]
        print(f"\n{scenario.name}, {arguments.updates} updates, {arguments.runs} runs")
        print(f"{'':<22}{'tr(Sigma)':>18}{'sd':>7}{'|G|^2':>18}{'sd':>7}{'noise scale':>26}{'none':>7}{'far':>6}")
        for name in results[0]:
            report(name, np.array([result[name] for result in results]), variance, sq_norm)


def report(name: str, values: Any, variance: float, sq_norm: float) -> None:
    """One line: everything as a multiple of the truth."""
    cells = []
    for column, truth in ((0, variance), (1, sq_norm)):
        relative = values[:, column] / truth
        error = relative.std(ddof=1) / math.sqrt(len(relative))
        known = not np.isnan(relative).all()
        cells.append(f"{relative.mean():.3f} +- {error:.3f}" if known else "-")
        cells.append(f"{relative.std(ddof=1):.2f}" if known else "-")
    scale = values[:, 2] / (variance / sq_norm)
    none = np.isnan(scale)
    told = scale[~none]
    low, mid, high = np.quantile(told, [0.25, 0.5, 0.75]) if len(told) else [math.nan] * 3
    far = ((told > 10) | (told < 0.1)).mean() if len(told) else math.nan
    print(
        f"{name:<22}{cells[0]:>18}{cells[1]:>7}{cells[2]:>18}{cells[3]:>7}"
        f"{f'{low:.2f} [{mid:.2f}] {high:.2f}':>26}{none.mean():>7.0%}{far:>6.0%}",
        flush=True,
    )


if __name__ == "__main__":
    main()
