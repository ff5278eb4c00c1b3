"""Squared norms of parts against gradients that autograd gives for each part alone."""

from __future__ import annotations

import itertools
from collections.abc import Iterable

import pytest
import torch
from torch import Tensor, nn

from adaptive_batch.noise.part_norms import PartNorms, grad_sq_norm
from adaptive_batch.noise.schedule import measures_noise

SIZES = [1, 4, 2]
TOTAL = sum(SIZES)


class Tied(nn.Module):
    """A weight used twice, a frozen layer, an embedding, a parameter that nothing uses."""

    def __init__(self, *, sparse: bool = False) -> None:
        super().__init__()
        self.embedding = nn.Embedding(11, 6, sparse=sparse)
        self.mixed = nn.Linear(6, 6)
        self.again = nn.Linear(6, 6, bias=False)
        self.again.weight = self.mixed.weight
        self.frozen = nn.Linear(6, 6).requires_grad_(False)
        self.unused = nn.Parameter(torch.ones(3))

    def forward(self, tokens: Tensor) -> Tensor:
        hidden = self.embedding(tokens) + self.embedding(tokens.flip(1))
        out: Tensor = self.again(self.frozen(self.mixed(hidden).tanh()))
        return out.square().mean(dim=(1, 2))


def tokens() -> list[Tensor]:
    return list(torch.randint(0, 11, (TOTAL, 5)).split(SIZES))


def true_sq_norm(model: nn.Module, x: Tensor) -> float:
    """Of the mean gradient over ``x``."""
    used = [p for p in model.parameters() if p.requires_grad]
    grads = torch.autograd.grad(model(x).mean(), used, allow_unused=True)
    dense = [g.to_dense() for g in grads if g is not None]
    return sum(float(g.double().square().sum()) for g in dense)


def measured(model: nn.Module, parts: list[Tensor], scale: float = 1.0) -> PartNorms:
    model.zero_grad()
    with PartNorms(model.parameters()) as norms:
        for part in parts:
            weight = scale * len(part) / TOTAL
            (model(part).mean() * weight).backward()
            norms.end_part(len(part), weight)
    return norms


def whole_sq_norm(parameters: Iterable[nn.Parameter]) -> float:
    """Of the gradients that have been accumulated."""
    total = grad_sq_norm(parameters)
    assert total is not None
    return float(total)


def hooks(model: nn.Module) -> int:
    return sum(len(p._backward_hooks or ()) for p in model.parameters())


@pytest.mark.parametrize("sparse", [False, True])
@pytest.mark.parametrize("scale", [1.0, 1024.0])
def test_each_part_has_the_norm_of_its_own_mean_gradient(sparse, scale):
    model, parts = Tied(sparse=sparse), tokens()
    norms = measured(model, parts, scale)
    assert norms.sizes == SIZES
    torch.testing.assert_close(torch.stack(norms.sq_norms), torch.tensor([true_sq_norm(model, part) for part in parts]))
    assert whole_sq_norm(model.parameters()) / scale**2 == pytest.approx(
        true_sq_norm(model, torch.cat(parts)), rel=1e-5
    )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_norms_are_as_exact_as_the_gradients_and_do_not_overflow(dtype):
    weight = nn.Parameter(torch.zeros(4, 1000, dtype=dtype))
    other = nn.Parameter(torch.zeros(7))  # a model can mix types
    x = torch.full((4, 1000), 300.0, dtype=dtype)
    with PartNorms([weight, other]) as norms:
        ((weight * x).sum() + other.sum()).backward()
        norms.end_part(1, 1.0)
    expected = 4000 * 300.0**2 + 7  # beyond float16
    assert float(norms.sq_norms[0]) == pytest.approx(expected, rel=1e-6)
    assert whole_sq_norm([weight, other]) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("width", [3, 400], ids=["few numbers", "many numbers"])
def test_the_norm_of_all_gradients_is_that_of_each_together(width):
    torch.manual_seed(0)
    gradients = [torch.randn(width, width, dtype=torch.float64).T, torch.randn(width, dtype=torch.float64)]
    parameters = [nn.Parameter(torch.zeros_like(gradient)) for gradient in gradients]
    for parameter, gradient in zip(parameters, gradients, strict=True):
        parameter.grad = gradient
    expected = sum(float((gradient**2).sum()) for gradient in gradients)
    assert whole_sq_norm(parameters) == pytest.approx(expected, rel=1e-12)


def test_a_parameter_given_twice_counts_once():
    weight = nn.Parameter(torch.ones(3))
    with PartNorms([weight, weight]) as norms:
        weight.sum().backward()
        norms.end_part(1, 1.0)
    assert float(norms.sq_norms[0]) == pytest.approx(3)
    assert whole_sq_norm([weight, weight]) == pytest.approx(3)


def test_parameters_that_only_some_parts_reach_count_where_they_are_reached():
    first, second = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(3))
    with PartNorms([first, second]) as norms:
        for parameters in ([first], [first, second]):
            torch.stack([p.sum() for p in parameters]).sum().backward()
            norms.end_part(1, 1.0)
    assert [float(n) for n in norms.sq_norms] == pytest.approx([2, 5])


def test_a_part_that_reaches_no_parameter_has_a_zero_gradient():
    weight, elsewhere = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2))
    with PartNorms([weight]) as norms:
        for parameter in (weight, elsewhere):
            (parameter.sum() * 0.5).backward()
            norms.end_part(4, 0.5)
    assert norms.sizes == [4, 4]
    assert [float(n) for n in norms.sq_norms] == pytest.approx([2, 0])
    assert whole_sq_norm([weight]) == pytest.approx(0.5)  # of the mean of the two


def test_weights_may_be_tensors():
    weight = nn.Parameter(torch.ones(2))
    with PartNorms([weight]) as norms:
        (weight.sum() * 8).backward()
        norms.end_part(1, torch.tensor(8.0))
    assert float(norms.sq_norms[0]) == pytest.approx(2)


def test_gradients_stay_what_they_are():
    model, parts = Tied(), tokens()
    measured(model, parts)
    with_hooks = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    model.zero_grad()
    for part in parts:
        (model(part).mean() * (len(part) / TOTAL)).backward()
    without = [p.grad for p in model.parameters() if p.grad is not None]
    for one, other in itertools.zip_longest(with_hooks, without):
        assert torch.equal(one, other)


def test_hooks_are_gone_afterwards_also_after_an_exception():
    model = Tied()
    measured(model, tokens())
    assert hooks(model) == 0
    with pytest.raises(RuntimeError, match="halfway"), PartNorms(model.parameters()) as norms:
        assert hooks(model) > 0
        model(tokens()[0]).mean().backward()
        raise RuntimeError("halfway")
    assert hooks(model) == 0
    assert norms.sq_norms == []


def test_without_gradients_there_is_no_norm_of_the_whole():
    assert grad_sq_norm(nn.Linear(2, 2).parameters()) is None


def test_measured_updates_are_dense_first_and_then_three_square_roots():
    counts = list(itertools.accumulate(map(measures_noise, range(10_000))))
    assert counts[8] == 9
    for updates in (100, 400, 10_000):
        assert abs(counts[updates - 1] - 3 * updates**0.5) <= 1


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_square_of_a_half_precision_norm_may_be_more_than_that_precision_holds(dtype: torch.dtype) -> None:
    parameters = [nn.Parameter(torch.zeros(n, dtype=dtype)) for n in (200, 100)]
    for parameter in parameters:
        parameter.grad = torch.full_like(parameter, 128.0)
    total = grad_sq_norm(parameters)
    assert total is not None and total.item() == 300 * 128.0**2
