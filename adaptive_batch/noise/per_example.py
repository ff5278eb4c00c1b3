"""Squared gradient norms of every single example, taken while a batch is back-propagated as a whole."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from types import TracebackType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.hooks import RemovableHandle

from adaptive_batch.noise.part_norms import HALF

__all__ = ["NORM_LAYERS", "PerExampleNorms", "Unmeasurable", "unmeasurable_parameters"]

CHUNK_ELEMENTS = 2**24
"""Most elements of an intermediate result; more examples are taken one chunk after another."""


MOST_EXAMPLES = 128
MOST_DEAR_EXAMPLES = 16
"""Examples of a batch that are measured, the lesser number in models with layers that see an example at several
positions, where each costs about as much as its weight gradient. They identify ``tr(Sigma)``; what is known of
``|G|^2`` comes from the squared norms of whole batches, which cost next to nothing."""


class Unmeasurable(ValueError):
    """A model or a batch whose per-example norms the hooks cannot give; the message names what and why."""


class _Outer(NamedTuple):
    """The gradient of example ``i`` in group ``g`` is ``sum_t left[i, g, t] right[i, g, t]'``."""

    left: Tensor  # [B, G, T, q]
    right: Tensor  # [B, G, T, p]


class _Rows(NamedTuple):
    """The gradient of example ``i`` has ``right[i, t]`` added to its row ``place[i, t]``."""

    place: Tensor  # [B, T]
    right: Tensor  # [B, T, p]


class _Direct(NamedTuple):
    """The gradient of each example as it is."""

    gradient: Tensor  # [B, *shape of the parameter]


_Use = _Outer | _Rows | _Direct
_Uses = Mapping[str, Callable[[], _Use]]


def _full(value: Tensor) -> Tensor:
    """In float32 at least: sums of products of halves overflow or lose their digits."""
    return value.to(torch.promote_types(value.dtype, torch.float32))


# ------------------------------------------------------------------------------------------- rules by layer


def _linear(layer: Any, a: Tensor, d: Tensor) -> _Uses:
    rows = d.reshape(len(d), -1, d.shape[-1])
    return {
        "weight": lambda: _Outer(rows[:, None], a.reshape(len(a), -1, a.shape[-1])[:, None]),
        "bias": lambda: _Direct(_full(rows).sum(1)),
    }


def _conv(layer: Any, a: Tensor, d: Tensor) -> _Uses:
    return {
        "weight": lambda: _Outer(
            d.reshape(len(d), layer.groups, d.shape[1] // layer.groups, -1).transpose(2, 3),
            _windows(layer, a),
        ),
        "bias": lambda: _Direct(_full(d).flatten(2).sum(2)),
    }


def _windows(layer: Any, a: Tensor) -> Tensor:
    """``[B, G, T, C / G * window]``: what the kernel sees at each of its ``T`` places."""
    mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
    a = functional.pad(a, layer._reversed_padding_repeated_twice, mode=mode).contiguous()
    reach = [d * (k - 1) + 1 for k, d in zip(layer.kernel_size, layer.dilation, strict=True)]
    places = [(n - r) // s + 1 for n, r, s in zip(a.shape[2:], reach, layer.stride, strict=True)]
    steps = a.stride()[2:]
    view = a.as_strided(
        (*a.shape[:2], *layer.kernel_size, *places),
        (
            *a.stride()[:2],
            *(step * d for step, d in zip(steps, layer.dilation, strict=True)),
            *(step * s for step, s in zip(steps, layer.stride, strict=True)),
        ),
    )
    return view.reshape(len(a), layer.groups, -1, math.prod(places)).transpose(2, 3)


def _embedding(layer: Any, index: Tensor, d: Tensor) -> _Uses:
    rows = d.reshape(len(d), -1, d.shape[-1])
    flat = index.reshape(len(index), -1)
    if layer.padding_idx is not None:
        rows = rows * (flat != layer.padding_idx)[..., None]
    return {"weight": lambda: _Rows(flat, rows)}


def _trailing_norm(layer: Any, normalised: Tensor, d: Tensor) -> _Uses:
    shape = layer.weight.shape
    return {
        "weight": lambda: _Direct((_full(d) * _full(normalised)).reshape(len(d), -1, *shape).sum(1)),
        "bias": lambda: _Direct(_full(d).reshape(len(d), -1, *shape).sum(1)),
    }


def _layer_norm(layer: Any, a: Tensor, d: Tensor) -> _Uses:
    return _trailing_norm(layer, functional.layer_norm(a, layer.normalized_shape, eps=layer.eps), d)


def _rms_norm(layer: Any, a: Tensor, d: Tensor) -> _Uses:
    return _trailing_norm(layer, functional.rms_norm(a, layer.normalized_shape, eps=layer.eps), d)


def _group_norm(layer: Any, a: Tensor, d: Tensor) -> _Uses:
    def weight() -> _Use:
        normalised = functional.group_norm(a, layer.num_groups, eps=layer.eps)
        return _Direct((_full(d) * _full(normalised)).flatten(2).sum(2))

    return {"weight": weight, "bias": lambda: _Direct(_full(d).flatten(2).sum(2))}


_RULES: dict[type[nn.Module], Callable[[Any, Tensor, Tensor], _Uses]] = {
    nn.Linear: _linear,
    nn.Conv1d: _conv,
    nn.Conv2d: _conv,
    nn.Conv3d: _conv,
    nn.Embedding: _embedding,
    nn.LayerNorm: _layer_norm,
    nn.RMSNorm: _rms_norm,
    nn.GroupNorm: _group_norm,
}

NORM_LAYERS: tuple[type[nn.Module], ...] = (nn.LayerNorm, nn.RMSNorm, nn.GroupNorm)
"""The layers of the subset whose norms come at next to no cost."""


def _rule(layer: nn.Module) -> Callable[[Any, Tensor, Tensor], _Uses] | None:
    """The rule for a layer, which must be its type: a subclass may have its own ``forward``."""
    for kind, rule in _RULES.items():
        if isinstance(layer, kind) and type(layer).forward is kind.forward:
            scaled = isinstance(layer, nn.Embedding) and layer.scale_grad_by_freq
            return None if scaled or set(layer._parameters) - {"weight", "bias"} else rule
    return None


def unmeasurable_parameters(module: nn.Module) -> list[str]:
    """Names of the trainable parameters that no known layer owns, each with its owner's type."""
    owners = [(prefix, layer) for prefix, layer in module.named_modules() if _rule(layer) is None]
    known = {id(p) for layer in module.modules() if _rule(layer) for p in layer.parameters(recurse=False)}
    return [
        f"{prefix}.{name} ({type(layer).__name__})".lstrip(".")
        for prefix, layer in owners
        for name, p in layer.named_parameters(recurse=False)
        if p.requires_grad and id(p) not in known
    ]


# --------------------------------------------------------------------------------------------- squared norms


def _chunks(elements_per_example: int, *tensors: Tensor) -> Iterable[Sequence[Tensor]]:
    """The tensors in pieces of so many examples that an intermediate result stays small."""
    size = max(1, CHUNK_ELEMENTS // max(1, elements_per_example))
    return zip(*(torch.split(tensor, size) for tensor in tensors), strict=True)


def _sq_norm(rows: Tensor) -> Tensor:
    """Of the last dimension, in float32 at least."""
    norm: Tensor = torch.linalg.vector_norm(rows, dim=-1, dtype=torch.promote_types(rows.dtype, torch.float32))
    return norm.square()


def _outer_sq_norms(use: _Outer) -> Tensor:
    """``[B]`` of ``|sum_t left_t right_t'|^2``, by inner products or by the sum, whichever is cheaper."""
    _, groups, length, q = use.left.shape
    p = use.right.shape[-1]
    if length == 1:
        return (_sq_norm(use.left) * _sq_norm(use.right)).sum((1, 2))
    gram = length * (p + q) < p * q
    norms = []
    for left, right in _chunks(groups * (length**2 if gram else p * q), *use):
        left, right = _full(left), _full(right)
        if gram:
            product = (left @ left.transpose(2, 3)) * (right @ right.transpose(2, 3))
            norms.append(product.sum((1, 2, 3)))
        else:
            norms.append((left.transpose(2, 3) @ right).square().sum((1, 2, 3)))
    return torch.cat(norms)


def _rows_sq_norms(use: _Rows) -> Tensor:
    """``[B]``: what goes to the same row is added up before it is squared."""
    batch, length = use.place.shape
    device = use.place.device
    own = use.place + torch.arange(batch, device=device)[:, None] * (use.place.max() + 1)
    rows, which = torch.unique(own.reshape(-1), return_inverse=True)
    right = _full(use.right).reshape(batch * length, -1)
    sums = right.new_zeros(len(rows), right.shape[1]).index_add_(0, which, right)
    example = which.new_empty(len(rows))
    example[which] = torch.arange(batch, device=device).repeat_interleave(length)
    return sums.new_zeros(batch).index_add_(0, example, sums.square().sum(1))


def _cross_terms(outer: _Outer, rows: _Rows) -> Tensor:
    """``[B]`` inner products of the gradients of two uses of one weight, as in a tied output layer."""
    terms = []
    length = outer.left.shape[2] * rows.place.shape[1]
    for left, right, index, added in _chunks(length, outer.left[:, 0], outer.right[:, 0], *rows):
        at_rows = _full(left).gather(2, index[:, None].expand(-1, left.shape[1], -1))
        terms.append((at_rows * (_full(right) @ _full(added).transpose(1, 2))).sum((1, 2)))
    return torch.cat(terms)


def _joined(pieces: Sequence[Tensor], dim: int) -> Tensor:
    return pieces[0] if len(pieces) == 1 else torch.cat(list(pieces), dim)


class _Gradient:
    """The per-example gradients of one parameter, in factors: all its uses in one backward pass."""

    def __init__(self, uses: Sequence[_Use], parameter: nn.Parameter) -> None:
        outer = [use for use in uses if isinstance(use, _Outer)]
        rows = [use for use in uses if isinstance(use, _Rows)]
        direct = [use.gradient for use in uses if isinstance(use, _Direct)]
        self._outer = _Outer(*(_joined(part, 2) for part in zip(*outer, strict=True))) if outer else None
        self._rows = _Rows(*(_joined(part, 1) for part in zip(*rows, strict=True))) if rows else None
        self._direct = torch.stack(direct).sum(0) if direct else None
        if direct and (outer or rows):
            raise ValueError("one weight is used by layers of different kinds")
        if self._outer is not None and self._rows is not None and self._outer.left.shape[1] != 1:
            raise ValueError("one weight is used by layers of different kinds")
        self._shape = parameter.shape

    @property
    def is_cheap(self) -> bool:
        """Whether each example is seen at one position."""
        return self._rows is None and (self._outer is None or self._outer.left.shape[2] == 1)

    def sq_norms(self) -> Tensor:
        """``[B]`` squared norms."""
        if self._direct is not None:
            return _sq_norm(self._direct.flatten(1))
        terms = []
        if self._outer is not None:
            terms.append(_outer_sq_norms(self._outer))
        if self._rows is not None:
            terms.append(_rows_sq_norms(self._rows))
        if self._outer is not None and self._rows is not None:
            terms.append(2 * _cross_terms(self._outer, self._rows))
        return torch.stack(terms).sum(0)

    def explains(self, gradient: Tensor, *, tolerance: float) -> bool:
        """Whether the examples' gradients add up to ``gradient``, looked at in one random direction."""
        total = _full(gradient.to_dense() if gradient.is_sparse else gradient)
        source = torch.Generator().manual_seed(0)  # the run's own random state stays as it is

        def direction(*shape: int) -> Tensor:
            return torch.randn(shape, generator=source).to(total)

        if self._direct is not None:
            along = direction(*self._shape)
            expected, terms = (total * along).sum(), [(self._direct * along).flatten(1).sum(1)]
        else:
            groups = 1 if self._outer is None else self._outer.left.shape[1]
            matrix = total.reshape(groups, self._shape[0] // groups, -1)
            u, v = direction(groups, matrix.shape[1], 1), direction(groups, matrix.shape[2], 1)
            expected, terms = (u.transpose(1, 2) @ matrix @ v).sum(), []
            if self._outer is not None:
                terms.append((_full(self._outer.left) @ u) * (_full(self._outer.right) @ v))
            if self._rows is not None:
                terms.append(u[0, self._rows.place] * (_full(self._rows.right) @ v[0]))
        found, magnitude = sum(t.sum() for t in terms), sum(t.abs().sum() for t in terms)
        return bool((found - expected).abs() <= tolerance * magnitude)


class PerExampleNorms:
    """Records the squared gradient norm of each example of an update, which is run as it is.

    Module hooks keep each layer's input ``a`` and the gradient ``d`` of its output; an example's weight
    gradient is ``sum_t d_t a_t'`` over its positions, and its squared norm needs no gradient of that size:
    ``|a|^2 |d|^2`` for one position, ``sum_st (a_s . a_t)(d_s . d_t)`` or the sum itself for several,
    whichever takes less work. Biases and normalisation weights are small enough to be summed, rows of an
    embedding are added up where an example uses one twice, convolutions are linear layers on their windows. A
    layer that is used twice, and weights that are tied, have their cross terms. Nothing in the run changes,
    not even in its last bit.

    Sources: Goodfellow, "Efficient Per-Example Gradient Computations", 2015, arXiv:1510.01799; Gray, Tiwari,
    Bergsma, Hestness, "Normalization Layer Per-Example Gradients are Sufficient to Predict Gradient Noise
    Scale in Transformers", 2024, arXiv:2411.00999.

    The first dimension of every layer's input must be the batch. At the first measured batch each parameter's
    gradient is compared with the sum over the examples in a random direction, so a weight that is also used
    outside of its layer, or a layer that sees something else than the batch, is found and refused by name.
    Under ``torch.compile`` module hooks may be left out of the compiled graph, which is refused in the same
    way.

    From the second measured batch on the first 128 examples of each batch are measured, the first 16 where layers see
    an example at several positions, as convolutions do and linear layers on sequences.

    Use as a context around the passes of one update and call :meth:`end_part` after each, as with
    ``PartNorms``.

    Args:
        module: what is trained. Known are Linear, Conv1d, Conv2d, Conv3d, Embedding, LayerNorm, RMSNorm,
            GroupNorm.
        only: measure layers of these types alone, for example ``NORM_LAYERS``; ``None`` measures all.

    Attributes:
        parameters: those whose gradients are measured; the norm of the whole is to be taken over the same.

    Raises:
        Unmeasurable: if a trainable parameter belongs to a layer that is not known.
    """

    def __init__(self, module: nn.Module, *, only: tuple[type[nn.Module], ...] | None = None) -> None:
        unknown = unmeasurable_parameters(module) if only is None else []
        if unknown:
            names = ", ".join(unknown[:3]) + " and others" * (len(unknown) > 3)
            raise Unmeasurable(
                f'per-example norms are not known for {names}; use noise="probe" or noise="micro_batches".'
            )
        self._layers = [
            (place or "the model", layer, rule)
            for place, layer in module.named_modules()
            if (rule := _rule(layer)) is not None
            and (only is None or isinstance(layer, only))
            and any(p.requires_grad for p in layer.parameters(recurse=False))
        ]
        self._names = {id(p): name for name, p in module.named_parameters()}
        owned = (p for _, layer, _ in self._layers for p in layer.parameters(recurse=False))
        self.parameters = [p for p in dict.fromkeys(owned) if p.requires_grad]
        if not self.parameters:
            raise Unmeasurable('no layer has parameters to take per-example norms of; use noise="probe".')
        self._handles: list[RemovableHandle] = []
        self._verified: set[int] = set()
        self._cheap: set[int] = set()
        self._forget()

    def _forget(self) -> None:
        self._uses: dict[int, list[_Use]] = {}
        self._terms: dict[int, Tensor] = {}
        self._problem: str | None = None
        self._tolerance = 1e-4
        # Not before each parameter's gradient was compared with the sum over all examples.
        self._examples: int | None = None
        if len(self._verified) == len(self.parameters):
            self._examples = MOST_DEAR_EXAMPLES if self.is_dear else MOST_EXAMPLES

    def __enter__(self) -> PerExampleNorms:
        self.sq_norms: list[Tensor] = []
        self.sizes: list[int] = []
        self._forget()
        self._handles = [
            layer.register_forward_hook(partial(self._forward, place, rule), with_kwargs=True)
            for place, layer, rule in self._layers
        ]
        for p in self.parameters:
            if not p.requires_grad:  # frozen since: no example has a gradient
                continue
            hook = partial(self._backward, p)
            self._handles.append(p.register_hook(hook))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._forget()

    def _forward(self, place: str, rule: Any, layer: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        a = args[0] if args else next(iter(kwargs.values()), None)
        # Where a hook or a forward of the user's own makes something else of either, the weight's gradient is found to
        # have come another way.
        if isinstance(a, Tensor) and isinstance(output, Tensor) and output.requires_grad:
            hook = partial(self._output, place, rule, layer, a.detach())
            output.register_hook(hook)  # type: ignore[no-untyped-call]

    @torch.no_grad()
    def _output(self, place: str, rule: Any, layer: nn.Module, a: Tensor, d: Tensor) -> None:
        if not self._handles:  # a graph that outlives the measured update
            return
        if d.dtype in HALF:
            self._tolerance = 3e-2
        with self._noting(place):
            uses = rule(layer, a[: self._examples], d[: self._examples])
            for name, parameter in layer.named_parameters(recurse=False):
                if not parameter.requires_grad:
                    continue
                if name not in uses or id(parameter) not in self._names:
                    raise ValueError(f"its {name} is not a parameter that training began with (pruning?)")
                self._uses.setdefault(id(parameter), []).append(uses[name]())

    @torch.no_grad()
    def _backward(self, parameter: nn.Parameter, gradient: Tensor) -> None:
        """All uses of the parameter are known now: autograd has added up its gradient."""
        uses = self._uses.pop(id(parameter), [])
        with self._noting(self._names[id(parameter)]):
            if not uses:
                raise ValueError("it got a gradient that did not pass through its layer")
            if id(parameter) in self._terms:
                raise ValueError("its gradient came in several pieces (reentrant activation checkpointing?)")
            combined = _Gradient(uses, parameter)
            verified = id(parameter) in self._verified
            if not verified and not combined.explains(gradient, tolerance=self._tolerance):
                raise ValueError(
                    "its examples' gradients do not add up to its gradient; is it used outside of its layer?"
                )
            if combined.is_cheap:
                self._cheap.add(id(parameter))
            self._terms[id(parameter)] = combined.sq_norms()

    @contextmanager
    def _noting(self, place: str) -> Iterator[None]:
        """An error would end the user's backward pass, so the first problem is only noted."""
        try:
            yield
        except (ValueError, RuntimeError, IndexError) as error:
            self._problem = self._problem or f"{place}: {error}"

    def end_part(self, size: int, weight: float | Tensor) -> None:
        """Close the batch whose backward pass has just ended.

        Args:
            size: its examples.
            weight: what their mean gradient was multiplied with (the batch's share of the update, a loss
                scale).

        Raises:
            Unmeasurable: if the hooks did not see what they have to see; nothing of this batch is kept.
        """
        found, problem = self._terms, self._problem
        measured = size if self._examples is None else min(size, self._examples)
        self._forget()
        for key, term in found.items():
            if len(term) != measured:
                problem = f"{self._names[key]}: its layer saw {len(term)} rows where the batch has {size} samples"
        if problem is not None:
            raise Unmeasurable(f'per-example norms failed at {problem}; use noise="probe" or noise="micro_batches".')
        self._verified.update(found)  # only now: a batch that is refused proves nothing
        terms = list(found.values()) or [torch.zeros(size)]
        total = torch.stack([term.to(terms[0].device) for term in terms]).sum(0)
        self.sq_norms.append(total * (size / weight) ** 2)
        self.sizes.append(size)

    @property
    def is_dear(self) -> bool:
        """Whether a layer sees each example at several positions, so that measuring costs a good part of a pass."""
        return not self._verified <= self._cheap

    @property
    def mean_sq_norm(self) -> Tensor:
        """Mean over the measured examples of the update, of which part norms of one sample each would be the list."""
        return torch.cat(self.sq_norms).mean()
