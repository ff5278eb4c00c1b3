"""Every source of part norms against gradients that autograd gives for each sample alone."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from reference import exact_noise, per_example_gradients
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.grad import conv2d_weight
from torch.utils.checkpoint import checkpoint

from adaptive_batch.noise import (
    SOURCES,
    AdamMetric,
    AdamMomentsSource,
    Batches,
    DifferencedSource,
    MicroBatchSource,
    NoiseSample,
    NoiseSource,
    PerExampleNorms,
    PerExampleSource,
    RankSource,
    Unmeasurable,
    choose_source,
    equivalent_sample,
    harmonic_mean,
    ranks_sample,
    two_batch_estimate,
)
from adaptive_batch.noise.per_example import unmeasurable_parameters
from adaptive_batch.noise.sources import check_source, make_source
from adaptive_batch.noise.subset import SubsetSource


def sample_losses(output: Tensor) -> Tensor:
    """``[B]``: one loss for each sample, with gradients that differ over positions."""
    flat = output.flatten(1)
    return flat.square().mean(1) + flat.sin().sum(1)


def true_sq_norms(model: nn.Module, x: Tensor) -> Tensor:
    used = [p for p in model.parameters() if p.requires_grad]
    norms = []
    for i in range(len(x)):
        gradients = torch.autograd.grad(sample_losses(model(x[i : i + 1])).mean(), used, allow_unused=True)
        norms.append(sum(float(g.to_dense().double().square().sum()) for g in gradients if g is not None))
    return torch.tensor(norms)


def measured(model: nn.Module, x: Tensor, scale: float = 1.0) -> Tensor:
    with PerExampleNorms(model) as norms:
        (sample_losses(model(x)).mean() * scale).backward()
        norms.end_part(len(x), scale)
    return norms.sq_norms[0]


def off(found: Tensor, truth: Tensor) -> float:
    return float(((found - truth) / truth).abs().max())


def numbers(sample: NoiseSample | None) -> tuple[float, float]:
    assert sample is not None
    return two_batch_estimate([float(n) for n in sample.sq_norms], sample.sizes, float(sample.sq_norm))


# ------------------------------------------------------------------------------------------ per-example norms


class Language(nn.Module):
    """An embedding, a layer that is used twice, an output layer that may be tied."""

    def __init__(self, *, tied: bool, sparse: bool = False) -> None:
        super().__init__()
        self.embedding = nn.Embedding(11, 6, padding_idx=2, sparse=sparse)
        self.hidden = nn.Linear(6, 6)
        self.out = nn.Linear(6, 11, bias=False)
        if tied:
            self.out.weight = self.embedding.weight

    def forward(self, tokens: Tensor) -> Tensor:
        hidden = self.hidden(self.hidden(self.embedding(tokens)).tanh())
        out: Tensor = self.out(hidden)
        return out


def convolutions(*layers: nn.Module) -> nn.Module:
    return nn.Sequential(*layers)


LAYERS: dict[str, tuple[Callable[[], nn.Module], Callable[[], Tensor]]] = {
    "linear": (lambda: nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3)), lambda: torch.randn(6, 5)),
    "long sequence": (
        lambda: nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)),
        lambda: torch.randn(6, 30, 3),
    ),
    "short sequence": (
        lambda: nn.Sequential(nn.Linear(30, 40), nn.LayerNorm(40), nn.Linear(40, 30)),
        lambda: torch.randn(6, 3, 30),
    ),
    "two sequence dimensions": (
        lambda: nn.Sequential(nn.Linear(5, 8), nn.LayerNorm((2, 8)), nn.RMSNorm(8), nn.Linear(8, 3, bias=False)),
        lambda: torch.randn(6, 3, 2, 5),
    ),
    "conv1d": (
        lambda: convolutions(
            nn.Conv1d(4, 6, 3, 2, 1, dilation=2, groups=2),
            nn.ReLU(inplace=True),
            nn.Conv1d(6, 4, 2, bias=False),
        ),
        lambda: torch.randn(5, 4, 20),
    ),
    "conv2d": (
        lambda: convolutions(
            nn.Conv2d(4, 6, (3, 2), (2, 1), (1, 2), groups=2, padding_mode="circular"),
            nn.GroupNorm(3, 6),
            nn.ReLU(),
            nn.Conv2d(6, 6, 3, padding="same", groups=6),
            nn.Conv2d(6, 8, 3, dilation=(1, 2)),
        ),
        lambda: torch.randn(5, 4, 9, 8),
    ),
    "conv3d": (
        lambda: convolutions(nn.Conv3d(2, 4, 3, padding=1), nn.ReLU(), nn.Conv3d(4, 2, (1, 2, 3), (2, 1, 1))),
        lambda: torch.randn(4, 2, 4, 5, 6),
    ),
    "embedding": (lambda: Language(tied=False), lambda: torch.randint(0, 11, (6, 8))),
    "sparse embedding": (lambda: Language(tied=False, sparse=True), lambda: torch.randint(0, 11, (6, 8))),
    "tied output layer": (lambda: Language(tied=True), lambda: torch.randint(0, 11, (6, 8))),
}


@pytest.mark.parametrize("name", LAYERS)
def test_norm_of_every_example_is_that_of_its_own_gradient(name: str) -> None:
    model, x = LAYERS[name][0](), LAYERS[name][1]()
    assert off(measured(model, x), true_sq_norms(model, x)) < 2e-6


def test_norms_come_in_chunks_where_they_need_much_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("short sequence", "long sequence", "tied output layer", "conv2d"):
        torch.manual_seed(1)
        model, x = LAYERS[name][0](), LAYERS[name][1]()
        expected = measured(model, x)
        monkeypatch.setattr("adaptive_batch.noise.per_example.CHUNK_ELEMENTS", 1)
        assert off(measured(model, x), expected) < 1e-6
        monkeypatch.undo()


def test_gradient_scale_and_share_are_taken_off() -> None:
    model, x = LAYERS["conv1d"][0](), LAYERS["conv1d"][1]()
    assert off(measured(model, x, scale=1024.0), true_sq_norms(model, x)) < 2e-6


def test_frozen_layers_count_nothing() -> None:
    model, x = LAYERS["linear"][0](), LAYERS["linear"][1]()
    model[0].requires_grad_(False)  # type: ignore[index]
    model[2].bias.requires_grad_(False)  # type: ignore[index]
    assert off(measured(model, x), true_sq_norms(model, x)) < 2e-6


def test_half_precision_norms_are_as_exact_as_half_precision_gradients() -> None:
    model, x = LAYERS["short sequence"][0](), LAYERS["short sequence"][1]()
    truth = true_sq_norms(model, x)
    with PerExampleNorms(model) as norms:
        with torch.autocast("cpu", torch.bfloat16):
            loss = sample_losses(model(x).float()).mean()
        loss.backward()
        norms.end_part(len(x), 1.0)
    assert 1e-4 < off(norms.sq_norms[0], truth) < 5e-2


def test_shortcut_for_sequences_is_wrong_by_tens_of_percent() -> None:
    """``sum_t |a_t|^2 |d_t|^2`` leaves out that an example's positions add up."""
    layer, x = nn.Linear(8, 8, bias=False), torch.randn(64, 6, 8)
    out = layer(x)
    out.retain_grad()
    sample_losses(out).sum().backward()
    assert out.grad is not None
    shortcut = (x.square().sum(2) * out.grad.square().sum(2)).sum(1)
    ratio = shortcut / true_sq_norms(layer, x)
    assert ratio.min() < 0.8 and ratio.max() > 1.25
    assert off(measured(layer, x), true_sq_norms(layer, x)) < 2e-6


def test_leaving_out_the_cross_terms_of_tied_weights_is_wrong_by_tens_of_percent() -> None:
    tied, untied = (nn.Sequential(nn.Embedding(11, 6), nn.Linear(6, 11, bias=False)) for _ in range(2))
    tied[1].weight = tied[0].weight
    untied.load_state_dict(tied.state_dict())
    x = torch.randint(0, 11, (64, 8))
    ratio = true_sq_norms(untied, x) / true_sq_norms(tied, x)  # each use by itself, squared and added up
    assert ratio.min() < 0.8
    assert off(measured(tied, x), true_sq_norms(tied, x)) < 2e-6


def test_squaring_before_the_sum_over_positions_is_wrong_for_convolutions() -> None:
    """CABS's shortcut: the convolution's own backward pass over squared inputs and squared gradients."""
    layer, x = nn.Conv2d(2, 3, 3, bias=False), torch.randn(16, 2, 6, 6).relu()
    out = layer(x)
    out.retain_grad()
    sample_losses(out).sum().backward()
    assert out.grad is not None
    squares = conv2d_weight(x.square(), layer.weight.shape, out.grad.square())
    truth = true_sq_norms(layer, x).sum()
    assert float(squares.sum() / truth) < 0.5
    assert float(measured(layer, x).sum() / truth) == pytest.approx(1, rel=1e-6)


def test_a_measured_pass_is_bitwise_the_unmeasured_one() -> None:
    for name in LAYERS:
        model, x = LAYERS[name][0](), LAYERS[name][1]()
        sample_losses(model(x)).mean().backward()
        plain = [p.grad.to_dense().clone() for p in model.parameters() if p.grad is not None]
        model.zero_grad()
        state = torch.get_rng_state()
        measured(model, x)
        assert torch.equal(torch.get_rng_state(), state)
        seen = [p.grad.to_dense() for p in model.parameters() if p.grad is not None]
        assert all(torch.equal(a, b) for a, b in zip(plain, seen, strict=True))


def test_hooks_are_gone_afterwards_also_after_an_exception() -> None:
    model, x = LAYERS["linear"][0](), LAYERS["linear"][1]()
    with pytest.raises(RuntimeError, match="stop"), PerExampleNorms(model) as norms:
        loss = sample_losses(model(x)).mean()
        raise RuntimeError("stop")
    assert not any(layer._forward_hooks for layer in model.modules())
    loss.backward()  # a graph that outlives the measurement
    assert norms.sq_norms == []


class Functional(nn.Module):
    """Uses a layer's weight behind its back."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(5, 5)

    def forward(self, x: Tensor) -> Tensor:
        return functional.linear(self.layer(x).tanh(), self.layer.weight)


class Bypassed(Functional):
    """Never calls the layer whose weight it uses."""

    def forward(self, x: Tensor) -> Tensor:
        return functional.linear(x, self.layer.weight)


class Flattened(Functional):
    """Gives its layer the positions of all samples as if they were samples."""

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.layer(x.reshape(-1, 5)).reshape(len(x), -1)
        return out


class Reentrant(Functional):
    """Uses a layer in two pieces that are each back-propagated by themselves."""

    def forward(self, x: Tensor) -> Tensor:
        x = x.requires_grad_()
        for _ in range(2):
            x = checkpoint(self.layer, x, use_reentrant=True)
        return x


@pytest.mark.parametrize(
    ("model", "shape", "why"),
    [
        (Functional, (4, 5), "layer.weight: its examples' gradients do not add up"),
        (Bypassed, (4, 5), "layer.weight: it got a gradient that did not pass through its layer"),
        (Flattened, (4, 2, 5), "its layer saw 8 rows where the batch has 4 samples"),
        (Reentrant, (4, 5), "its gradient came in several pieces"),
    ],
)
def test_what_the_hooks_cannot_explain_is_refused_by_name(
    model: Callable[[], nn.Module], shape: tuple[int, ...], why: str
) -> None:
    norms = PerExampleNorms(module := model())
    with pytest.raises(Unmeasurable, match=why), norms:
        sample_losses(module(torch.randn(shape))).mean().backward()
        norms.end_part(4, 1.0)
    assert norms.sq_norms == []


def test_checkpointed_activations_give_the_same_norms() -> None:
    class Checkpointed(Functional):
        def forward(self, x: Tensor) -> Tensor:
            for _ in range(2):
                x = checkpoint(self.layer, x, use_reentrant=False).tanh()
            return x

    model, x = Checkpointed(), torch.randn(6, 5)
    assert off(measured(model, x), true_sq_norms(model, x)) < 2e-6


class Scaled(nn.Linear):
    """A subclass that computes something else."""

    def forward(self, input: Tensor) -> Tensor:
        return 2 * super().forward(input)


@pytest.mark.parametrize(
    ("model", "names"),
    [
        (nn.LSTM(4, 4), "weight_ih_l0 (LSTM)"),
        (nn.MultiheadAttention(4, 2), "in_proj_weight (MultiheadAttention)"),
        (nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)), "1.weight (BatchNorm1d)"),
        (nn.Sequential(Scaled(4, 4)), "0.weight (Scaled)"),
        (nn.Sequential(nn.Embedding(4, 4, scale_grad_by_freq=True)), "0.weight (Embedding)"),
        (nn.utils.parametrizations.weight_norm(nn.Linear(4, 4)), "original0 (ParametrizationList)"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_layers_that_are_not_known_are_refused_by_name(model: nn.Module, names: str) -> None:
    assert any(name.endswith(names) for name in unmeasurable_parameters(model))
    with pytest.raises(Unmeasurable, match=r"use noise=\"probe\""):
        PerExampleNorms(model)
    assert unmeasurable_parameters(model.requires_grad_(False)) == []


# ------------------------------------------------------------------------------------------- shorter samples


def test_equivalent_sample_has_the_estimates_of_all_its_parts() -> None:
    norms, sizes, whole = [3.0, 2.5, 4.0], [5, 3, 1], 2.0
    expected = two_batch_estimate(norms, sizes, whole)
    assert numbers(equivalent_sample(sum(norms) / 3, harmonic_mean(sizes), whole, 9)) == pytest.approx(expected)


def test_a_single_part_says_nothing() -> None:
    assert math.isnan(numbers_or_nan(equivalent_sample(2.0, 8, 2.0, 8)))


def numbers_or_nan(sample: NoiseSample) -> float:
    return two_batch_estimate([float(n) for n in sample.sq_norms], sample.sizes, float(sample.sq_norm))[0]


@pytest.mark.parametrize("shares", [(0.5, 0.5), (8.0, 2.0)], ids=["alike", "by size"])
def test_batches_of_any_size_and_share_are_unbiased(shares: tuple[float, float]) -> None:
    rng, sizes = np.random.default_rng(1), np.array([8.0, 2.0])
    mean, noise = np.linspace(0.1, 1, 20), np.linspace(0.2, 6, 20)
    parts = mean + rng.standard_normal((8000, 2, 20)) * np.sqrt(noise / sizes[:, None])
    whole = (parts * np.array(shares)[:, None]).sum(1) / sum(shares)
    batches = Batches()
    for size, share in zip(sizes, shares, strict=True):
        batches.add(size, share)
    values = np.array(
        [
            numbers(equivalent_sample(norm, harmonic_mean(sizes.tolist()), total, batches.size))
            for norm, total in zip((parts**2).sum(2).mean(1), (whole**2).sum(1), strict=True)
        ]
    )
    errors = (values.mean(0) - ((mean**2).sum(), noise.sum())) / (values.std(0) / math.sqrt(len(values)))
    assert np.abs(errors).max() < 3


# -------------------------------------------------------------------------------------- sources on real nets


def problem(samples: int = 24) -> tuple[nn.Module, Tensor, Tensor]:
    return (
        nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3)),
        torch.randn(samples, 6),
        torch.randint(0, 3, (samples,)),
    )


def update(source: NoiseSource, model: nn.Module, batches: list[tuple[Tensor, Tensor]]) -> NoiseSample | None:
    """One update as Lightning accumulates it, with an AMP scale on the way."""
    model.zero_grad()
    source.start()
    for x, y in batches:
        share = 1 / len(batches)
        (functional.cross_entropy(model(x), y) * share * 512.0).backward()
        source.end_batch(len(x), share, 512.0)
    with torch.no_grad():
        for p in model.parameters():
            if p.grad is not None:
                p.grad /= 512.0
    return source.finish()


def test_per_example_source_is_the_exact_estimate_from_all_gradients() -> None:
    model, x, y = problem()
    gradients = per_example_gradients(model, functional.cross_entropy, x, y)
    sq_norm, variance = exact_noise(gradients)
    found = numbers(update(PerExampleSource(model), model, [(x, y)]))
    assert found == pytest.approx((sq_norm - variance / len(x), variance), rel=1e-5)


@pytest.mark.parametrize("name", ["micro_batches", "ranks", "per_example"])
def test_accumulated_batches_give_the_estimate_of_their_gradients(name: str) -> None:
    model, x, y = problem()
    batches = list(zip(x.split([12, 12]), y.split([12, 12]), strict=True))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    gradients = per_example_gradients(model, functional.cross_entropy, x, y)
    if name == "per_example":
        sq_norm, variance = exact_noise(gradients)
        expected = sq_norm - variance / len(x), variance
    else:
        halves = [float((gradients[i : i + 12].mean(0) ** 2).sum()) for i in (0, 12)]
        expected = two_batch_estimate(halves, [12, 12], float((gradients.mean(0) ** 2).sum()))
    found = numbers(update(make_source(name, model, optimizer), model, batches))
    assert found == pytest.approx(expected, rel=1e-5)


def test_differenced_source_takes_two_updates_for_the_parts_of_one() -> None:
    model, x, y = problem()
    gradients = per_example_gradients(model, functional.cross_entropy, x, y)
    source = DifferencedSource(model.parameters())
    assert update(source, model, [(x[:8], y[:8])]) is None and source.pending
    found = update(source, model, [(x[8:], y[8:])])
    norms = [float((part.mean(0) ** 2).sum()) for part in (gradients[:8], gradients[8:])]
    expected = two_batch_estimate(norms, [8, 16], float((gradients.mean(0) ** 2).sum()))
    assert numbers(found) == pytest.approx(expected, rel=1e-4) and not source.pending
    update(source, model, [(x[:8], y[:8])])
    source.cancel()
    assert not source.pending


@pytest.mark.parametrize("name", ["micro_batches", "per_example", "differenced", "adam_moments"])
def test_an_update_without_a_backward_pass_says_nothing(name: str) -> None:
    model, *_ = problem()
    source = make_source(name, model, torch.optim.Adam(model.parameters()))
    source.start()
    assert source.finish() is None
    source.cancel()


def test_differenced_source_is_biased_by_the_learning_rate_as_predicted() -> None:
    """On a quadratic with curvature ``h`` the mean is ``|G|^2 - lr (G'HG + tr(H Sigma) / b)``."""
    torch.manual_seed(3)
    h, noise, lr, b, runs = torch.linspace(0.1, 2, 10), torch.linspace(0.5, 3, 10), 0.3, 4, 4000
    start = torch.full((10,), 1.5)
    first = h * start + torch.randn(runs, 10) * (noise / b).sqrt()
    second = h * (start - lr * first) + torch.randn(runs, 10) * (noise / b).sqrt()
    values = np.array(
        [
            two_batch_estimate([float(a @ a), float(c @ c)], [b, b], float(((a + c) / 2).square().sum()))
            for a, c in zip(first, second, strict=True)
        ]
    )
    gradient = h * start
    bias = lr * float((gradient**2 * h).sum() + (h * noise).sum() / b)
    error = values[:, 0].std() / math.sqrt(runs)
    assert abs(values[:, 0].mean() - (float(gradient @ gradient) - bias)) < 3 * error
    assert bias > 20 * error  # so it does not pass for unbiased


def adam_run(sizes: list[int], *, amsgrad: bool = False) -> tuple[np.ndarray, float, float]:
    """Estimates while Adam stands still (its rate is 0) before gradients of known mean and noise."""
    mean, noise = torch.linspace(0.1, 1, 400) / 8, torch.linspace(0.2, 1.8, 400) / 20
    parameter = nn.Parameter(torch.zeros(400))
    optimizer = torch.optim.AdamW([parameter], lr=0.0, amsgrad=amsgrad)
    source, values = AdamMomentsSource(optimizer), []
    for size in sizes:
        parameter.grad = mean + torch.randn(400) * (noise / size).sqrt()
        source.start()
        source.end_batch(size, 1.0)
        sample = source.finish()
        if sample is not None:
            values.append(numbers(sample))
        optimizer.step()
    return np.array(values), float(mean @ mean), float(noise.sum())


@pytest.mark.parametrize("sizes", [[8] * 9000, ([8] * 30 + [32] * 45) * 120], ids=["constant", "resized"])
def test_moments_of_adam_are_unbiased_where_the_gradient_stands_still(sizes: list[int]) -> None:
    values, sq_norm, variance = adam_run(sizes)
    values = values[5:]  # the first moments take a while to forget that they began at zero
    errors = (values.mean(0) - (sq_norm, variance)) / (values.std(0) / math.sqrt(len(values)))
    assert len(values) > 290 and np.abs(errors).max() < 3


def test_moments_with_skipped_steps_are_left_out() -> None:
    parameter = nn.Parameter(torch.zeros(4))
    optimizer = torch.optim.Adam([parameter])
    source, seen = AdamMomentsSource(optimizer), []
    for step in range(121):
        parameter.grad = torch.randn(4)
        source.start()
        source.end_batch(8, 1.0)
        seen.append(source.finish() is not None)
        if step != 40:  # as a loss scaler does it
            optimizer.step()
    assert [i for i, found in enumerate(seen) if found] == [30, 90, 120]


def test_moments_need_adam_as_it_is() -> None:
    parameter = nn.Parameter(torch.zeros(4))
    with pytest.raises(ValueError, match="SGD keeps no moments"):
        AdamMomentsSource(torch.optim.SGD([parameter], lr=0.1))
    with pytest.raises(ValueError, match=r"weight_decay=0\.1"):
        AdamMomentsSource(torch.optim.Adam([parameter], weight_decay=0.1))
    AdamMomentsSource(torch.optim.AdamW([parameter], weight_decay=0.1))
    groups: list[dict[str, Any]] = [
        {"params": [parameter]},
        {"params": [nn.Parameter(torch.zeros(2))], "betas": (0.8, 0.9)},
    ]
    with pytest.raises(ValueError, match="different betas"):
        AdamMomentsSource(torch.optim.Adam(groups))


# -------------------------------------------------------------------------------------------- preconditioning


def adam_problem(steps: int) -> tuple[nn.Module, Tensor, Tensor, torch.optim.Adam]:
    model, x, y = problem()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    for _ in range(steps):
        optimizer.zero_grad()
        functional.cross_entropy(model(x), y).backward()
        optimizer.step()
    return model, x, y, optimizer


@pytest.mark.parametrize("name", ["micro_batches", "differenced"])
def test_preconditioned_norms_are_those_of_adams_step_without_momentum(name: str) -> None:
    model, x, y, optimizer = adam_problem(6)
    gradients = per_example_gradients(model, functional.cross_entropy, x, y)
    moments = torch.cat([optimizer.state[p]["exp_avg_sq"].flatten() for p in model.parameters()]).double()
    scaled = gradients / ((moments / (1 - 0.999**6)).sqrt() + 1e-8).numpy()
    norms = [float((part.mean(0) ** 2).sum()) for part in (scaled[:12], scaled[12:])]
    expected = two_batch_estimate(norms, [12, 12], float((scaled.mean(0) ** 2).sum()))
    source = make_source(name, model, optimizer, AdamMetric(optimizer))
    batches = list(zip(x.split(12), y.split(12), strict=True))
    if name == "differenced":
        update(source, model, batches[:1])
        batches = batches[1:]
    found = numbers(update(source, model, batches))
    assert found == pytest.approx(expected, rel=1e-3)
    batches = list(zip(x.split(12), y.split(12), strict=True))
    plain = numbers(update(MicroBatchSource(model.parameters()), model, batches))
    assert not 0.8 < (found[1] / found[0]) / (plain[1] / plain[0]) < 1.25  # another quantity


def test_metric_waits_for_five_steps() -> None:
    for steps in (0, 4, 5):
        assert AdamMetric(adam_problem(steps)[3]).ready == (steps == 5)


def test_only_adams_kind_has_a_metric_and_only_some_sources_take_one() -> None:
    model, *_ = problem()
    with pytest.raises(ValueError, match="SGD has no second moments"):
        AdamMetric(torch.optim.SGD(model.parameters(), lr=0.1))
    optimizer = torch.optim.Adam(model.parameters())
    for name in ("per_example", "adam_moments", "norm_layers"):
        with pytest.raises(ValueError, match=f'noise="{name}" has no norms in another metric'):
            make_source(name, model, optimizer, AdamMetric(optimizer))


# ------------------------------------------------------------------------------------------- a fitted subset


class Block(nn.Module):
    """A small transformer of layers that are all known."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(12, 16)
        self.norm1, self.norm2 = nn.LayerNorm(16), nn.LayerNorm(16)
        self.qkv, self.project = nn.Linear(16, 48), nn.Linear(16, 16)
        self.wide, self.narrow = nn.Linear(16, 32), nn.Linear(32, 16)
        self.head = nn.Linear(16, 3)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        q, k, v = self.qkv(self.norm1(x)).chunk(3, -1)
        x = x + self.project(functional.scaled_dot_product_attention(q, k, v))
        x = x + self.narrow(self.wide(self.norm2(x)).relu())
        out: Tensor = self.head(x.mean(1))
        return out


def test_subset_of_normalisation_layers_follows_all_layers_by_its_fitted_slope() -> None:
    torch.manual_seed(4)
    model = Block()
    subset, full = SubsetSource(model, model.parameters()), PerExampleSource(model)
    ratios = []
    for _ in range(60):
        batch = torch.randint(0, 12, (32, 5)), torch.randint(0, 3, (32,))
        truth = update(full, model, [batch])
        assert truth is not None
        if subset.calibrating:
            subset.calibrate(truth)
        found = numbers(update(subset, model, [batch]))
        ratios.append(found[1] / numbers(truth)[1])
        assert found[0] + found[1] / 32 == pytest.approx(float(truth.sq_norm), rel=1e-4)
    assert np.mean(ratios[8:]) == pytest.approx(1, abs=0.05)
    assert np.std(ratios[8:]) < 0.2


def test_subset_says_nothing_before_it_is_fitted_and_needs_such_layers() -> None:
    model = Block()
    source = SubsetSource(model, model.parameters())
    assert source.calibrating
    assert update(source, model, [(torch.randint(0, 12, (8, 5)), torch.randint(0, 3, (8,)))]) is None
    with pytest.raises(Unmeasurable, match="no layer has parameters"):
        SubsetSource(problem()[0], [])


# ---------------------------------------------------------------------------------------------------- ranks


def _rank(rank: int, folder: str) -> None:
    """One of two processes: half of the batch, in two accumulated batches, averaged by DDP."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{folder}/meet", rank=rank, world_size=2)
    torch.manual_seed(5)
    model, x, y = problem()
    parallel = nn.parallel.DistributedDataParallel(model)
    source = RankSource(model.parameters())
    source.start()
    for step, rows in enumerate(torch.arange(24)[rank::2].split(6)):
        context = parallel.no_sync() if step == 0 else torch.enable_grad()
        with context:
            (functional.cross_entropy(parallel(x[rows]), y[rows]) / 2).backward()
        source.end_batch(6, 0.5)
    torch.save(source.finish()._asdict(), f"{folder}/{rank}")  # type: ignore[union-attr]
    dist.destroy_process_group()


def test_ranks_measure_what_one_process_would_with_all_their_batches() -> None:
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(_rank, (folder,), nprocs=2)  # type: ignore[attr-defined]
        found = [NoiseSample(**torch.load(f"{folder}/{rank}")) for rank in (0, 1)]
    torch.manual_seed(5)
    model, x, y = problem()
    gradients = per_example_gradients(model, functional.cross_entropy, x, y)
    parts = [gradients[rank::2][i : i + 6].mean(0) for rank in (0, 1) for i in (0, 6)]
    whole = float((gradients.mean(0) ** 2).sum())
    expected = two_batch_estimate([float((p**2).sum()) for p in parts], [6] * 4, whole)
    assert numbers(found[0]) == pytest.approx(expected, rel=1e-4)
    assert numbers(found[0]) == numbers(found[1])


def test_one_rank_without_a_process_group_is_itself() -> None:
    batches = Batches()
    for size in (5, 3, 1):
        batches.add(size, size / 9)
    sample = ranks_sample([3.0, 2.5, 4.0], batches, 2.0)
    assert numbers(sample) == pytest.approx(two_batch_estimate([3.0, 2.5, 4.0], [5, 3, 1], 2.0))


# --------------------------------------------------------------------------------------------- what is chosen


@pytest.mark.parametrize(
    ("module", "options", "expected"),
    [
        (nn.Linear(2, 2), {}, "per_example"),
        (nn.Linear(2, 2), {"batches": 2}, "micro_batches"),
        (nn.Linear(2, 2), {"batches": 2, "ranks": 2}, "ranks"),
        (nn.Linear(2, 2), {"metric": True}, "probe"),
        (nn.LSTM(2, 2), {}, "probe"),
        (nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2, affine=False)), {}, "probe"),
        (nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2)), {"batches": 2}, "micro_batches"),
    ],
)
def test_auto_takes_what_is_there_then_examples_then_a_probe(
    module: nn.Module, options: dict[str, Any], expected: str
) -> None:
    assert choose_source(module, **options) == expected
    assert not SOURCES[expected].biased


def test_auto_leaves_compiled_models_to_the_probe() -> None:
    module = nn.Sequential(nn.Linear(2, 2))
    assert choose_source(torch.compile(module, backend="eager")) == "probe"  # type: ignore[arg-type]
    module[0].compile(backend="eager")
    assert choose_source(module) == "probe"


def test_every_source_says_what_it_costs_and_when_it_is_wrong() -> None:
    for facts in SOURCES.values():
        assert facts.cost and facts.invalid
    assert {name for name, facts in SOURCES.items() if facts.changes_run} == {"micro_batches"}
    assert check_source("auto") == "auto"
    with pytest.raises(ValueError, match="is not known; choose one of 'auto', 'micro_batches'"):
        check_source("magic")
