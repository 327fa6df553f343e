"""The dispatcher's view of neighborhood attention: schema, shapes, gradient, FLOPs.

Two operators with one schema: `regard::neighborhood_attention`, for which kernels are registered, and
`regard::neighborhood_attention_blocks`, the PyTorch path. Each is one node in a compiled graph, at any number of
tokens, and saves nothing but its inputs: the backward computes the weights again.
"""

import math
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from regard.ops import _library, _triton
from regard.ops._arguments import heads_last
from regard.ops._operator import define, second_gradients
from regard.ops.neighborhood.call import NeighborhoodCall
from regard.ops.neighborhood.reference import neighborhood_attention_reference
from regard.ops.neighborhood.streamed import attend, gradients

__all__ = ["neighborhood_attention_blocks", "neighborhood_attention_op"]

_INPUTS = "Tensor query, Tensor key, Tensor value, Tensor? attn_bias, Tensor? visible"
_OPTIONS = (
    "SymInt[] grid_size, int[] kernel_size, int[] dilation, int[] stride, int[] is_causal, str border, "
    "SymInt num_prefix_tokens, float scale"
)
_TENSORS, _OTHERS = 5, 8  # how many arguments of each kind the schema has


def _forward(*operands: Any) -> Tensor:
    output = attend(NeighborhoodCall.of_operands(*operands))
    return heads_last(output, tuple(output.shape)).copy_(output)


def _backward(grad_output: Tensor, *operands: Any) -> tuple[Tensor, ...]:
    call = NeighborhoodCall.of_operands(*operands[:-1])
    *found, grad_bias = gradients(call, grad_output, bias_gradient=operands[-1])
    inputs = (call.query, call.key, call.value)
    laid = (heads_last(like, tuple(like.shape)).copy_(grad) for like, grad in zip(inputs, found, strict=True))
    return *laid, call.query.new_empty(0) if grad_bias is None else grad_bias


def _fake(query: Tensor, key: Tensor, value: Tensor, *rest: Any) -> Tensor:
    return heads_last(query, (*query.shape[:-1], value.shape[-1]))


def _fake_backward(
    grad_output: Tensor, query: Tensor, key: Tensor, value: Tensor, attn_bias: Tensor | None, *rest: Any
) -> tuple[Tensor, ...]:
    grad_bias = attn_bias.new_empty(attn_bias.shape) if rest[-1] and attn_bias is not None else query.new_empty(0)
    return *(heads_last(t, tuple(t.shape)) for t in (query, key, value)), grad_bias


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:_TENSORS])
    ctx.options = inputs[_TENSORS:]


def _setup_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.save_for_backward(*inputs[: 1 + _TENSORS])
    ctx.options, ctx.bias_gradient = inputs[1 + _TENSORS : -1], inputs[-1]


def _double_backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
    """Gradient of the gradient, through the reference."""
    grad_output, query, key, value, attn_bias, visible = ctx.saved_tensors
    with torch.enable_grad():
        inputs = [t.detach().requires_grad_() for t in (grad_output, query, key, value)]
        bias = attn_bias
        if ctx.bias_gradient:
            bias = attn_bias.detach().requires_grad_()
            inputs.append(bias)
        call = NeighborhoodCall.of_operands(*inputs[1:4], bias, visible, *ctx.options)
        second = second_gradients(neighborhood_attention_reference(call), inputs, grads, materialize=True)
    return *second[:4], second[4] if ctx.bias_gradient else None, *(None,) * (_OTHERS + 2)


def _define(name: str) -> Any:
    """An operator with this schema and gradient, computed by PyTorch wherever no kernel is registered for it."""
    backward = define(
        f"{name}_backward",
        f"(Tensor grad_output, {_INPUTS}, {_OPTIONS}, bool bias_gradient) -> "
        "(Tensor grad_query, Tensor grad_key, Tensor grad_value, Tensor grad_bias)",
        compute=_backward,
        fake=_fake_backward,
        setup=_setup_backward,
        gradient=_double_backward,
    )

    def gradient(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        saved = ctx.saved_tensors  # read once: checkpoints take them back
        bias_gradient = saved[3] is not None and ctx.needs_input_grad[3]
        *grads, grad_bias = backward(grad_output, *saved, *ctx.options, bias_gradient)
        return *grads, grad_bias if bias_gradient else None, *(None,) * (_OTHERS + 1)

    return define(
        name, f"({_INPUTS}, {_OPTIONS}) -> Tensor", compute=_forward, fake=_fake, setup=_setup, gradient=gradient
    )


neighborhood_attention_op = _define("neighborhood_attention")
neighborhood_attention_blocks = _define("neighborhood_attention_blocks")
_triton.register("neighborhood_attention", "regard.ops.neighborhood.triton", "forward", _forward)
_triton.register("neighborhood_attention_backward", "regard.ops.neighborhood.triton", "backward", _backward)
_library.problem()  # loads the kernels


def _pairs(query: tuple[int, ...], kernel_size: list[int], prefix: int) -> int:
    """Query-key pairs of all heads: whole windows and the prefix keys, or all keys for prefix queries."""
    batch, heads, tokens, _ = query
    return batch * heads * (prefix * tokens + (tokens - prefix) * (math.prod(kernel_size) + prefix))


def forward_flops(
    query: tuple[int, ...],
    key: tuple[int, ...],
    value: tuple[int, ...],
    attn_bias: Any,
    visible: Any,
    grid_size: list[int],
    kernel_size: list[int],
    dilation: Any,
    stride: Any,
    is_causal: Any,
    border: Any,
    num_prefix_tokens: int,
    *rest: Any,
    **kwargs: Any,
) -> int:
    """A window's logits and values, the places beyond a border included."""
    kernel_size = [min(w, n) for w, n in zip(kernel_size, grid_size, strict=True)] if border == "shift" else kernel_size
    return 2 * _pairs(query, kernel_size, num_prefix_tokens) * (query[3] + value[3])


def backward_flops(
    grad_output: tuple[int, ...],
    query: tuple[int, ...],
    key: tuple[int, ...],
    value: tuple[int, ...],
    *rest: Any,
    **kwargs: Any,
) -> int:
    """The logits again, then the gradients of weights, values, queries and keys."""
    once = forward_flops(query, key, value, *rest)
    return once * (3 * query[3] + 2 * value[3]) // (query[3] + value[3])


for _name in ("neighborhood_attention", "neighborhood_attention_blocks"):
    register_flop_formula(getattr(torch.ops.regard, _name))(forward_flops)
    register_flop_formula(getattr(torch.ops.regard, f"{_name}_backward"))(backward_flops)
