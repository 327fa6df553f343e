"""Problems and judgements that the tests of routed attention share."""

import dataclasses
from collections.abc import Sequence

import torch
from attention_cases import Shape, inputs, within_budget
from torch import Tensor

from regard.ops import only_backend
from regard.ops.routed.api import OPERATOR
from regard.ops.routed.call import RoutedCall
from regard.ops.routed.reference import (
    block_rows,
    extra_for_heads,
    key_blocks,
    listed,
    routed_attention_reference,
    weights,
)

# Places of a call's tensors that have gradients.
DIFFERENTIABLE = ("query", "key", "value", "extra_key", "extra_value", "extra_bias")
EVERYTHING = slice(None)


def count_of(tokens: int, block: int) -> int:
    return -(-tokens // block)


def random_lists(shape: Shape, query_block: int, key_block: int, length: int, *, seed: int = 0, alike=False) -> Tensor:
    """Any blocks in any order: some are missing, some are there twice."""
    lead = (1, 1) if alike else (shape.batch, shape.heads)
    size = (*lead, count_of(shape.queries, query_block), length)
    return torch.randint(-1, count_of(shape.keys, key_block), size, generator=torch.Generator().manual_seed(seed))


def random_call(
    shape: Shape = Shape(),  # noqa: B008 - frozen
    query_block: int = 8,
    key_block: int = 8,
    length: int = 3,
    *,
    extra: int = 0,
    bias: str | None = None,
    hidden: bool = False,
    alike: bool = False,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> RoutedCall:
    """A call with random lists. `bias` of the extra keys: None, "head" (the same for all queries) or "query"."""
    g = torch.Generator().manual_seed(seed + 1)
    query, key, value = inputs(shape, seed=seed, dtype=dtype, exact=False)
    size = (shape.batch, shape.key_heads, extra)
    extra_key, extra_value = (torch.randn(*size, dim, generator=g).to(dtype) for dim in (shape.dim, shape.value_dim))
    extra_bias = None
    if bias is not None:
        rows = shape.queries if bias == "query" else 1
        extra_bias = torch.randn(shape.batch, shape.heads, rows, extra, generator=g)
        extra_bias = extra_bias.to(torch.promote_types(dtype, torch.float32))
    visible = torch.rand(shape.batch, shape.key_heads, shape.keys, generator=g) > 0.3 if hidden else None
    lists = random_lists(shape, query_block, key_block, length, seed=seed, alike=alike)
    return RoutedCall(
        query, key, value, visible, lists, extra_key, extra_value, extra_bias, query_block, key_block, shape.dim**-0.5
    )  # fmt: skip


def attend(call: RoutedCall, backend: str = "cpu") -> Tensor:
    with only_backend(backend):
        return OPERATOR.run(call)


def with_tensors(call: RoutedCall, names: Sequence[str], tensors: Sequence[Tensor]) -> RoutedCall:
    return dataclasses.replace(call, **dict(zip(names, tensors, strict=True)))


def differentiable(call: RoutedCall) -> list[str]:
    return [name for name in DIFFERENTIABLE if getattr(call, name) is not None]


def requiring_grad(call: RoutedCall) -> tuple[RoutedCall, list[Tensor]]:
    names = differentiable(call)
    leaves = [getattr(call, name).detach().requires_grad_() for name in names]
    return with_tensors(call, names, leaves), leaves


def grads_of(run, call: RoutedCall, grad_output: Tensor) -> list[Tensor]:
    """Gradients of all that can have one, in the order of `differentiable`."""
    call, leaves = requiring_grad(call)
    return list(torch.autograd.grad(run(call), leaves, grad_output))


def output_gradient(call: RoutedCall, seed: int = 5) -> Tensor:
    size = (*call.query.shape[:3], call.value.shape[3])
    return torch.randn(size, generator=torch.Generator().manual_seed(seed)).to(call.query.dtype)


def in_float64(call: RoutedCall) -> RoutedCall:
    names = differentiable(call)
    return with_tensors(call, names, [getattr(call, name).double() for name in names])


def permuted(call: RoutedCall, seed: int) -> tuple[RoutedCall, Tensor, Tensor]:
    """The same problem with channels, the keys of each block and the entries of the lists in another order: the same
    sums in other orders. Also the orders of keys and channels."""
    g = torch.Generator().manual_seed(seed)
    tokens, size = call.key.shape[2], call.key_block
    keys = torch.cat(
        [
            start + torch.randperm(min(size, tokens - start), generator=g)
            for start in range(0, tokens, size)
        ]
        or [torch.arange(0)]
    )  # fmt: skip
    channels = torch.randperm(call.query.shape[3], generator=g)
    entries = torch.randperm(call.blocks.shape[3], generator=g)
    other = dataclasses.replace(
        call,
        query=call.query[..., channels],
        key=call.key[:, :, keys][..., channels],
        value=call.value[:, :, keys],
        visible=None if call.visible is None else call.visible[:, :, keys],
        blocks=call.blocks[..., entries],
        extra_key=call.extra_key[..., channels],
    )
    return other, keys.argsort(), channels.argsort()


def yardsticks(call: RoutedCall, grad_output: Tensor | None = None, orders: int = 3) -> list[list[Tensor]]:
    """What eager PyTorch makes of the output and, given `grad_output`, of the gradients, summing in several orders.

    It is the reference in the call's own dtype, where half types are computed in float32: less forgiving than sums in
    half types would be.
    """
    results = []
    for seed in range(orders):
        other, keys, channels = permuted(call, seed)
        found = [routed_attention_reference(other)]
        if grad_output is not None:
            grads = dict(
                zip(differentiable(call), grads_of(routed_attention_reference, other, grad_output), strict=True)
            )
            for name in ("query", "key", "extra_key"):
                grads[name] = grads[name][..., channels]
            for name in ("key", "value"):
                grads[name] = grads[name][:, :, keys]
            found += grads.values()
        results.append(found)
    return [list(same) for same in zip(*results, strict=True)]


def term_sizes(call: RoutedCall, grad_output: Tensor | None = None) -> list[Tensor]:
    """How large the terms are that output and gradients sum: the scale of their rounding. See knn_cases.term_sizes."""
    call = in_float64(call)
    roundings = 2.0 + 0.5 * max(call.query.shape[2], call.key.shape[2]) ** 0.5
    bias = None if call.extra_bias is None else block_rows(call, call.extra_bias, EVERYTHING, EVERYTHING)
    rows = block_rows(call, call.query, EVERYTHING, EVERYTHING)
    soft = weights(call, listed(call, key_blocks(call), EVERYTHING), rows, bias)

    sizes, leaves = requiring_grad(
        with_tensors(call, DIFFERENTIABLE[:5], [getattr(call, n).abs() for n in DIFFERENTIABLE[:5]])
    )
    seen = listed(sizes, key_blocks(sizes), EVERYTHING)
    extra_key, extra_value = (extra_for_heads(sizes, t) for t in (sizes.extra_key, sizes.extra_value))
    length = seen.key.shape[-2]
    output = soft[..., :length] @ seen.value + soft[..., length:] @ extra_value
    size = roundings * output.detach().flatten(2, 3)[:, :, : call.query.shape[2]]
    if grad_output is None:
        return [size]
    grad = block_rows(call, grad_output.double().abs(), EVERYTHING, EVERYTHING)
    grad_soft = torch.cat([grad @ seen.value.mT, grad @ extra_value.mT], dim=-1).detach()
    grad_logits = roundings * soft * (grad_soft + (soft * grad_soft).sum(dim=-1, keepdim=True))
    query = block_rows(sizes, sizes.query, EVERYTHING, EVERYTHING) * abs(call.scale)
    extra = query @ extra_key.mT
    if bias is not None:
        extra = extra + block_rows(sizes, sizes.extra_bias, EVERYTHING, EVERYTHING)
    logits = torch.cat([query @ seen.key.mT, extra], dim=-1)
    # Linear in each: its gradient is the sum of the terms' sizes.
    total = (logits * grad_logits).sum() + roundings * (output * grad).sum()
    return [size, *torch.autograd.grad(total, leaves)]


def judged(call: RoutedCall) -> None:
    """The kernel's output is within the error budget."""
    (size,) = term_sizes(call)
    within_budget(attend(call), yardsticks(call)[0], routed_attention_reference(in_float64(call)), size)


def judged_gradients(call: RoutedCall) -> None:
    """The kernel's gradients are within the error budget."""
    grad_output = output_gradient(call)
    exact = grads_of(routed_attention_reference, in_float64(call), grad_output.double())
    ours = grads_of(attend, call, grad_output)
    eager, sizes = yardsticks(call, grad_output)[1:], term_sizes(call, grad_output)[1:]
    for got, rounded, want, size in zip(ours, eager, exact, sizes, strict=True):
        within_budget(got, rounded, want, size)
