"""The dispatcher's view of what no kernel knows of k-NN attention, Euclidean distances and sampled tails: one node in a
compiled graph, at any number of tokens.

The seed is a tensor, so a graph draws it at run time. Nothing but the inputs is saved: the backward selects the same
keys again and draws the same sample.
"""

from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from regard.ops._arguments import heads_last
from regard.ops._operator import define, second_gradients
from regard.ops._selection import kept_by_threshold
from regard.ops.knn.call import KNNCall
from regard.ops.knn.op import backward_flops, forward_flops
from regard.ops.knn.reference import knn_attention_reference
from regard.ops.knn.streamed import attend, gradients

__all__ = ["knn_attention_blocks_op"]

_INPUTS = "Tensor query, Tensor key, Tensor value, Tensor? attn_mask, Tensor? seed"
_OPTIONS = "SymInt topk, str metric, SymInt num_samples, bool is_causal, float scale"


def _forward(*operands: Any) -> Tensor:
    return attend(KNNCall.of_blocks_operands(*operands))


def _fake(query: Tensor, key: Tensor, value: Tensor, *rest: Any) -> Tensor:
    return heads_last(query, (*query.shape[:-1], value.shape[-1]))


def _backward(grad_output: Tensor, *operands: Any) -> tuple[Tensor, ...]:
    *operands, mask_gradient = operands  # type: ignore[assignment]
    call = KNNCall.of_blocks_operands(*operands)
    *grads, grad_mask = gradients(call, grad_output, mask_gradient)
    inputs = (call.query, call.key, call.value)
    laid = (heads_last(t, tuple(t.shape)).copy_(grad) for t, grad in zip(inputs, grads, strict=True))
    return *laid, call.query.new_empty(0) if grad_mask is None else grad_mask


def _fake_backward(
    grad_output: Tensor, query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None, *rest: Any
) -> tuple[Tensor, ...]:
    grad_mask = query.new_empty(0) if attn_mask is None or not rest[-1] else attn_mask.new_empty(attn_mask.shape)
    return *(heads_last(t, tuple(t.shape)) for t in (query, key, value)), grad_mask


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:5])
    ctx.options = inputs[5:]


def _gradient(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
    saved = ctx.saved_tensors  # once: activation checkpointing recomputes them here
    mask_gradient = saved[3] is not None and ctx.needs_input_grad[3]
    *grads, grad_mask = _backward_op(grad_output, *saved, *ctx.options, mask_gradient)
    return *grads, grad_mask if mask_gradient else None, *(None,) * 6


def _setup_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.save_for_backward(*inputs[:6])
    *ctx.options, ctx.mask_gradient = inputs[6:]


def _double_backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
    """Gradient of the gradient, through the reference."""
    grad_output, query, key, value, mask, seed = ctx.saved_tensors
    with torch.enable_grad():
        inputs = [t.detach().requires_grad_() for t in (grad_output, query, key, value)]
        if ctx.mask_gradient:
            mask = mask.detach().requires_grad_()
            inputs.append(mask)
        call = KNNCall.of_blocks_operands(inputs[1], inputs[2], inputs[3], mask, seed, *ctx.options)
        second = second_gradients(knn_attention_reference(call, kept_by_threshold), inputs, grads)
    return *second[:4], second[4] if ctx.mask_gradient else None, *(None,) * 7


_backward_op = define(
    "knn_attention_blocks_backward",
    f"(Tensor grad_output, {_INPUTS}, {_OPTIONS}, bool mask_gradient) -> "
    "(Tensor grad_query, Tensor grad_key, Tensor grad_value, Tensor grad_mask)",
    compute=_backward,
    fake=_fake_backward,
    setup=_setup_backward,
    gradient=_double_backward,
)
knn_attention_blocks_op = define(
    "knn_attention_blocks",
    f"({_INPUTS}, {_OPTIONS}) -> Tensor",
    compute=_forward,
    fake=_fake,
    setup=_setup,
    gradient=_gradient,
)


@register_flop_formula(torch.ops.regard.knn_attention_blocks)
def _forward_flops(query: Any, key: Any, value: Any, mask: Any, seed: Any, topk: int, *rest: Any, **kw: Any) -> int:
    """As the kernels', with the sampled keys among the kept."""
    return forward_flops(query, key, value, mask, topk + rest[1])


@register_flop_formula(torch.ops.regard.knn_attention_blocks_backward)
def _backward_flops(
    grad: Any, query: Any, key: Any, value: Any, mask: Any, seed: Any, topk: int, *rest: Any, **kw: Any
) -> int:
    return backward_flops(grad, query, key, value, mask, None, None, None, topk + rest[1])
