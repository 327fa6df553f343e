"""Problems and judgements that the tests of neighborhood attention share."""

import dataclasses
import math
from collections.abc import Sequence

import torch
from attention_cases import Shape, within_budget
from hypothesis import strategies as st
from torch import Tensor

from regard.ops import only_backend
from regard.ops.neighborhood.api import OPERATOR
from regard.ops.neighborhood.call import NeighborhoodCall
from regard.ops.neighborhood.reference import neighborhood_attention_reference
from regard.ops.neighborhood.windows import BORDERS, Pattern, windows_of


def pattern_of(
    grid: Sequence[int],
    kernel: int | Sequence[int],
    dilation: int | Sequence[int] = 1,
    stride: int | Sequence[int] = 1,
    causal: bool | Sequence[bool] = False,
    border: str = "shift",
) -> Pattern:
    def each(option):
        return tuple(option) if isinstance(option, Sequence) else (option,) * len(grid)

    return Pattern(tuple(grid), each(kernel), each(dilation), each(stride), each(causal), border)


def random_call(
    pattern: Pattern,
    shape: Shape | None = None,
    *,
    prefix: int = 0,
    bias: bool = False,
    hidden: bool = False,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> NeighborhoodCall:
    """Random tensors; of `shape` all but the numbers of tokens counts."""
    shape = shape or Shape()
    g = torch.Generator().manual_seed(seed)
    tokens = prefix + math.prod(pattern.grid_size)

    def draw(*size: int) -> Tensor:
        return torch.randn(*size, generator=g)

    query = draw(shape.batch, shape.heads, tokens, shape.dim).to(dtype)
    key = draw(shape.batch, shape.key_heads, tokens, shape.dim).to(dtype)
    value = draw(shape.batch, shape.key_heads, tokens, shape.value_dim).to(dtype)
    table = draw(shape.heads, pattern.offsets) if bias else None
    visible = torch.rand(shape.batch, tokens, generator=g) > 0.3 if hidden else None
    return NeighborhoodCall(query, key, value, table, visible, pattern, prefix, shape.dim**-0.5)


@st.composite
def problems(draw, largest: tuple[int, int, int] = (40, 20, 7)) -> NeighborhoodCall:
    """Any call: ranks, borders, windows and dilations larger than the grid, prefix tokens, grouped heads.

    Args:
        largest: of an axis of the grid, by rank.
    """
    rank = draw(st.integers(1, 3))
    longest, widest = largest[rank - 1], (45, 9, 5)[rank - 1]
    grid = [draw(st.integers(1, longest)) for _ in range(rank)]
    kernel = [draw(st.integers(1, widest)) for _ in range(rank)]
    dilation = [draw(st.sampled_from([1, 1, 2, 3, 8])) for _ in range(rank)]
    stride = [draw(st.integers(1, w)) for w in kernel]
    causal = [draw(st.booleans()) for _ in range(rank)]
    pattern = pattern_of(grid, kernel, dilation, stride, causal, draw(st.sampled_from(BORDERS)))
    heads = draw(st.integers(1, 2))
    dims = {"dim": draw(st.integers(1, 40)), "value_dim": draw(st.integers(1, 40))}
    shape = Shape(draw(st.integers(1, 2)), heads * draw(st.integers(1, 2)), heads, **dims)
    options = {"bias": draw(st.booleans()), "hidden": draw(st.booleans())}
    return random_call(pattern, shape, prefix=draw(st.integers(0, 3)), seed=draw(st.integers(0, 999)), **options)


def attend(call: NeighborhoodCall, backend: str = "cpu") -> Tensor:
    with only_backend(backend):
        return OPERATOR.run(call)


def in_dtype(call: NeighborhoodCall, dtype: torch.dtype) -> NeighborhoodCall:
    tables = torch.promote_types(dtype, torch.float32)
    bias = None if call.attn_bias is None else call.attn_bias.to(tables)
    tensors = {name: getattr(call, name).to(dtype) for name in ("query", "key", "value")}
    return dataclasses.replace(call, **tensors, attn_bias=bias)


def in_float64(call: NeighborhoodCall) -> NeighborhoodCall:
    return in_dtype(call, torch.float64)


def requiring_grad(call: NeighborhoodCall) -> tuple[NeighborhoodCall, list[Tensor]]:
    """The call with leaves for query, key, value and, if it has one, bias; and those."""
    names = ["query", "key", "value", *(["attn_bias"] if call.attn_bias is not None else [])]
    leaves = {name: getattr(call, name).detach().clone().requires_grad_() for name in names}
    return dataclasses.replace(call, **leaves), list(leaves.values())


def grads_of(run, call: NeighborhoodCall, grad_output: Tensor) -> tuple[Tensor, ...]:
    call, leaves = requiring_grad(call)
    return torch.autograd.grad(run(call), leaves, grad_output)


def output_gradient(call: NeighborhoodCall, seed: int = 5) -> Tensor:
    size = (*call.query.shape[:3], call.value.shape[3])
    return torch.randn(size, generator=torch.Generator().manual_seed(seed)).to(call.query.dtype)


def dense_weights(call: NeighborhoodCall) -> Tensor:
    """(B, H, N, N) float64: the operator is linear in the values, and the identity hands back its weights."""
    call = in_float64(call)
    eye = torch.eye(call.key.shape[2], dtype=torch.float64).expand(*call.key.shape[:2], -1, -1)
    return neighborhood_attention_reference(dataclasses.replace(call, value=eye))


def _eager(call: NeighborhoodCall, grad_output: Tensor | None, orders: int = 3) -> list[list[Tensor]]:
    """The reference in the call's own dtype, output and gradients, with the channels summed in several orders."""
    results = []
    for seed in range(orders):
        order = torch.randperm(call.query.shape[3], generator=torch.Generator().manual_seed(seed))
        other = dataclasses.replace(call, query=call.query[..., order], key=call.key[..., order])
        other, leaves = requiring_grad(other)
        output = neighborhood_attention_reference(other)
        found = [output.detach()]
        if grad_output is not None:
            query, key, *rest = torch.autograd.grad(output, leaves, grad_output)
            found += [query[..., order.argsort()], key[..., order.argsort()], *rest]
        results.append(found)
    return [list(same) for same in zip(*results, strict=True)]


def _term_sizes(call: NeighborhoodCall, grad_output: Tensor | None) -> list[Tensor]:
    """How large the terms are that output and gradients (query, key, value, bias) sum: the scale of their rounding.

    See knn_cases.term_sizes, of which this is the counterpart.
    """
    call, weights = in_float64(call), dense_weights(call)
    roundings = 2.0 + 0.5 * max(call.key.shape[2], call.pattern.keys) ** 0.5
    query, key, value = (t.abs() for t in (call.query, call.key, call.value))
    key, value = (t.repeat_interleave(call.groups, dim=1) for t in (key, value))
    sizes = [roundings * weights @ value]
    if grad_output is None:
        return sizes
    grad_output = grad_output.double().abs()
    grad_soft = grad_output @ value.mT
    grad_logits = roundings * weights * (grad_soft + (weights * grad_soft).sum(dim=-1, keepdim=True))
    of_keys = [grad_logits.mT @ query * call.scale, roundings * weights.mT @ grad_output]
    sizes += [grad_logits @ key * call.scale, *(t.unflatten(1, (-1, call.groups)).sum(dim=2) for t in of_keys)]
    if call.attn_bias is not None:
        cells = torch.arange(call.key.shape[2] - call.num_prefix_tokens)
        windows = windows_of(call.pattern, cells)
        index = windows.key + call.num_prefix_tokens
        of_places = grad_logits[:, :, call.num_prefix_tokens :].gather(3, index.expand(*weights.shape[:2], -1, -1))
        # Keys of zeros have terms too, of the size of the mean gradient.
        of_places = of_places + roundings * (weights * grad_soft).sum(dim=-1)[:, :, call.num_prefix_tokens :, None]
        offsets = windows.offset.clamp(0, call.pattern.offsets - 1).flatten().expand(weights.shape[1], -1)
        table = torch.zeros_like(call.attn_bias)
        sizes.append(table.scatter_add(1, offsets, of_places.sum(dim=0).flatten(1)))
    return sizes


def judged(call: NeighborhoodCall, backend: str = "cpu") -> None:
    """The output is within the error budget."""
    exact = neighborhood_attention_reference(in_float64(call))
    within_budget(attend(call, backend), _eager(call, None)[0], exact, _term_sizes(call, None)[0])


def judged_gradients(call: NeighborhoodCall, backend: str = "cpu") -> None:
    """The gradients are within the error budget."""
    grad_output = output_gradient(call)
    exact = grads_of(neighborhood_attention_reference, in_float64(call), grad_output.double())
    ours = grads_of(lambda c: attend(c, backend), call, grad_output)
    eager, sizes = _eager(call, grad_output)[1:], _term_sizes(call, grad_output)[1:]
    for got, rounded, want, size in zip(ours, eager, exact, sizes, strict=True):
        within_budget(got, rounded, want, size)
