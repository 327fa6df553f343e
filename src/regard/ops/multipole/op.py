"""The dispatcher's view of the PyTorch path of multipole attention: schema, shapes, gradient, FLOPs.

As an operator of the library it is one node in a compiled graph, at any number of tokens, and saves nothing but its
inputs: the backward computes the weights again, block by block.
"""

from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from regard.ops._selection import kept_by_threshold
from regard.ops.multipole.call import MultipoleCall
from regard.ops.multipole.reference import multipole_attention_reference
from regard.ops.multipole.streamed import attend, gradients

__all__ = ["multipole_attention_blocks"]

_INPUTS = "Tensor query, Tensor key, Tensor value, Tensor? visible, Tensor assignment"
_OPTIONS = "SymInt num_clusters, SymInt near, bool second_order, SymInt num_prefix_tokens, float scale"
torch.library.define("regard::multipole_attention_blocks", f"({_INPUTS}, {_OPTIONS}) -> Tensor")
torch.library.define(
    "regard::multipole_attention_blocks_backward",
    f"(Tensor grad_output, {_INPUTS}, {_OPTIONS}) -> (Tensor grad_query, Tensor grad_key, Tensor grad_value)",
)
multipole_attention_blocks = torch.ops.regard.multipole_attention_blocks.default
_backward_op = torch.ops.regard.multipole_attention_blocks_backward.default


def _forward(*arguments: Any) -> Tensor:
    return attend(MultipoleCall(*arguments))


def _backward(grad_output: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    call = MultipoleCall(*arguments)
    inputs = (call.query, call.key, call.value)
    return tuple(g.to(t.dtype) for g, t in zip(gradients(call, grad_output), inputs, strict=True))


@torch.library.register_fake("regard::multipole_attention_blocks")
def _fake(query: Tensor, key: Tensor, value: Tensor, *rest: Any) -> Tensor:
    return query.new_empty((*query.shape[:-1], value.shape[-1]))


@torch.library.register_fake("regard::multipole_attention_blocks_backward")
def _fake_backward(grad_output: Tensor, query: Tensor, key: Tensor, value: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    return tuple(t.new_empty(t.shape) for t in (query, key, value))


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:5])
    ctx.options = inputs[5:]


def _gradient(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
    return *_backward_op(grad_output, *ctx.saved_tensors, *ctx.options), *(None,) * 7


def _setup_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.save_for_backward(*inputs[:6])
    ctx.options = inputs[6:]


def _double_backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
    """Gradient of the gradient, through the reference."""
    grad_output, query, key, value, visible, assignment = ctx.saved_tensors
    with torch.enable_grad():
        inputs = [t.detach().requires_grad_() for t in (grad_output, query, key, value)]
        call = MultipoleCall(inputs[1], inputs[2], inputs[3], visible, assignment, *ctx.options)
        output = multipole_attention_reference(call, kept_by_threshold)
        first = torch.autograd.grad(output, inputs[1:], inputs[0], create_graph=True)
        pairs = [(f, g) for f, g in zip(first, grads, strict=True) if g is not None]
        second = torch.autograd.grad([f for f, _ in pairs], inputs, [g for _, g in pairs], allow_unused=True)
    return *second, *(None,) * 7


torch.library.impl("regard::multipole_attention_blocks", "CompositeExplicitAutograd", _forward)
torch.library.impl("regard::multipole_attention_blocks_backward", "CompositeExplicitAutograd", _backward)
torch.library.register_autograd("regard::multipole_attention_blocks", _gradient, setup_context=_setup)
torch.library.register_autograd(
    "regard::multipole_attention_blocks_backward", _double_backward, setup_context=_setup_backward
)


@register_flop_formula(torch.ops.regard.multipole_attention_blocks)
def forward_flops(
    query: tuple[int, ...],
    key: tuple[int, ...],
    value: tuple[int, ...],
    visible: Any,
    assignment: Any,
    num_clusters: int,
    *rest: Any,
    **kwargs: Any,
) -> int:
    """This path computes the logits of all keys and all clusters, and hides those that are not seen."""
    batch, heads, rows, dim = query
    return 2 * batch * heads * rows * (key[2] + num_clusters) * (dim + value[3])


@register_flop_formula(torch.ops.regard.multipole_attention_blocks_backward)
def backward_flops(
    grad_output: tuple[int, ...],
    query: tuple[int, ...],
    key: tuple[int, ...],
    value: tuple[int, ...],
    visible: Any,
    assignment: Any,
    num_clusters: int,
    *rest: Any,
    **kwargs: Any,
) -> int:
    """The logits again, then the gradients of weights, values, queries and keys."""
    batch, heads, rows, dim = query
    return 2 * batch * heads * rows * (key[2] + num_clusters) * (3 * dim + 2 * value[3])
