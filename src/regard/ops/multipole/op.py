"""The dispatcher's view of multipole attention: schema, shapes, gradient, FLOPs.

Two operators with one schema: `regard::multipole_attention`, for which kernels are registered, and
`regard::multipole_attention_blocks`, the PyTorch path. Each is one node in a compiled graph, at any number of tokens,
and saves nothing but its inputs: the backward computes the weights again.
"""

from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from regard.ops import _library, _triton
from regard.ops._arguments import heads_last
from regard.ops._operator import define, second_gradients
from regard.ops._selection import kept_by_threshold
from regard.ops.multipole.call import MultipoleCall
from regard.ops.multipole.reference import multipole_attention_reference
from regard.ops.multipole.streamed import attend, gradients

__all__ = ["multipole_attention_blocks", "multipole_attention_op"]

_INPUTS = "Tensor query, Tensor key, Tensor value, Tensor? visible, Tensor assignment"
_OPTIONS = "SymInt num_clusters, SymInt near, bool second_order, SymInt num_prefix_tokens, float scale, float tolerance"


def _forward(*arguments: Any) -> Tensor:
    output = attend(MultipoleCall(*arguments))
    return heads_last(output, tuple(output.shape)).copy_(output)


def _backward(grad_output: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    call = MultipoleCall(*arguments)
    inputs = (call.query, call.key, call.value)
    found = zip(inputs, gradients(call, grad_output), strict=True)
    return tuple(heads_last(like, tuple(like.shape)).copy_(gradient) for like, gradient in found)


def _fake(query: Tensor, key: Tensor, value: Tensor, *rest: Any) -> Tensor:
    return heads_last(query, (*query.shape[:-1], value.shape[-1]))


def _fake_backward(grad_output: Tensor, query: Tensor, key: Tensor, value: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    return tuple(heads_last(t, tuple(t.shape)) for t in (query, key, value))


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:5])
    ctx.options = inputs[5:]


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
        second = second_gradients(output, inputs, grads)
    return *second, *(None,) * 8


def _define(name: str) -> Any:
    """An operator with this schema and gradient, computed by PyTorch wherever no kernel is registered for it."""
    backward = define(
        f"{name}_backward",
        f"(Tensor grad_output, {_INPUTS}, {_OPTIONS}) -> (Tensor grad_query, Tensor grad_key, Tensor grad_value)",
        compute=_backward,
        fake=_fake_backward,
        setup=_setup_backward,
        gradient=_double_backward,
    )

    def gradient(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        return *backward(grad_output, *ctx.saved_tensors, *ctx.options), *(None,) * 8

    return define(
        name, f"({_INPUTS}, {_OPTIONS}) -> Tensor", compute=_forward, fake=_fake, setup=_setup, gradient=gradient
    )


multipole_attention_op = _define("multipole_attention")
multipole_attention_blocks = _define("multipole_attention_blocks")
_library.problem()  # loads the kernels
_triton.register("multipole_attention", "regard.ops.multipole.triton", "forward", _forward)
_triton.register("multipole_attention_backward", "regard.ops.multipole.triton", "backward", _backward)


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


@register_flop_formula(torch.ops.regard.multipole_attention)
def kernel_flops(
    query: tuple[int, ...],
    key: tuple[int, ...],
    value: tuple[int, ...],
    visible: Any,
    assignment: Any,
    num_clusters: int,
    near: int,
    second_order: bool,
    *rest: Any,
    **kwargs: Any,
) -> int:
    """All clusters, whose second order doubles the head dim, and the keys of the near ones, were clusters alike."""
    batch, heads, rows, dim = query
    far = num_clusters * ((2 if second_order else 1) * dim + value[3])
    return 2 * batch * heads * rows * (far + near * key[2] // max(1, num_clusters) * (dim + value[3]))
