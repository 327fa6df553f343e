"""The dispatcher's view of k-NN attention: schema, shapes, gradient, FLOPs. Kernels only add an implementation.

`regard::knn_attention` returns, beside the output, the state from which the backward selects the same keys again
without storing an N x M mask: per row the log-sum-exp, the k-th logit and the index of the last kept tie.
"""

from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from regard.ops import _library, _triton
from regard.ops._arguments import heads_last
from regard.ops._operator import second_gradients
from regard.ops._selection import kept_by_threshold
from regard.ops.knn.call import KNNCall
from regard.ops.knn.eager import attend_with_state, gradients
from regard.ops.knn.reference import knn_attention_reference

__all__ = ["knn_attention_op"]

_INPUTS = "Tensor query, Tensor key, Tensor value, Tensor? attn_mask"
_OPTIONS = "SymInt topk, bool is_causal, float scale"
torch.library.define(
    "regard::knn_attention",
    f"({_INPUTS}, {_OPTIONS}) -> (Tensor output, Tensor lse, Tensor kth_logit, Tensor last_tie)",
)
torch.library.define(
    "regard::knn_attention_backward",
    f"(Tensor grad_output, {_INPUTS}, Tensor lse, Tensor kth_logit, Tensor last_tie, {_OPTIONS}, "
    "bool mask_gradient) -> (Tensor grad_query, Tensor grad_key, Tensor grad_value, Tensor grad_mask)",
)
torch.library.define("regard::instruction_set", "() -> int")
_library.problem()  # loads the kernels, against the schemas above

knn_attention_op = torch.ops.regard.knn_attention.default
_backward_op = torch.ops.regard.knn_attention_backward.default

State = tuple[Tensor, Tensor, Tensor, Tensor]


@torch.library.register_fake("regard::knn_attention")
def _fake(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None, topk: int, is_causal: bool, scale: float
) -> State:
    rows = query.shape[:-1]
    state = torch.promote_types(query.dtype, torch.float32)
    output = heads_last(query, (*rows, value.shape[-1]))
    lse = query.new_empty(rows, dtype=state)
    return output, lse, torch.empty_like(lse), query.new_empty(rows, dtype=torch.int32)


@torch.library.register_fake("regard::knn_attention_backward")
def _fake_backward(
    grad_output: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None,
    lse: Tensor,
    kth_logit: Tensor,
    last_tie: Tensor,
    topk: int,
    is_causal: bool,
    scale: float,
    mask_gradient: bool,
) -> State:
    grad_mask = attn_mask.new_empty(attn_mask.shape) if mask_gradient and attn_mask is not None else query.new_empty(0)
    grads = tuple(heads_last(t, tuple(t.shape)) for t in (query, key, value))
    return grads[0], grads[1], grads[2], grad_mask


def _pytorch_forward(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None, topk: int, is_causal: bool, scale: float
) -> State:
    state = attend_with_state(KNNCall(query, key, value, attn_mask, topk, 0.0, is_causal, scale))
    output = heads_last(query, tuple(state[0].shape)).copy_(state[0])
    return output, *state[1:]


def _pytorch_backward(
    grad_output: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None,
    lse: Tensor,
    kth_logit: Tensor,
    last_tie: Tensor,
    topk: int,
    is_causal: bool,
    scale: float,
    mask_gradient: bool,
) -> State:
    call = KNNCall(query, key, value, attn_mask, topk, 0.0, is_causal, scale)
    grad_query, grad_key, grad_value, grad_mask = gradients(call, grad_output, mask_gradient)
    laid = [
        heads_last(like, tuple(like.shape)).copy_(grad)
        for like, grad in ((query, grad_query), (key, grad_key), (value, grad_value))
    ]
    return laid[0], laid[1], laid[2], query.new_empty(0) if grad_mask is None else grad_mask


def _setup(ctx: Any, inputs: tuple[Any, ...], output: State) -> None:
    query, key, value, attn_mask, ctx.topk, ctx.is_causal, ctx.scale = inputs
    ctx.save_for_backward(query, key, value, attn_mask, *output[1:])
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)


def _gradient(ctx: Any, grad_output: Tensor | None, *unused: Tensor | None) -> tuple[Tensor | None, ...]:
    if grad_output is None:
        return (None,) * 7
    query, key, value, attn_mask, *state = ctx.saved_tensors
    mask_gradient = attn_mask is not None and ctx.needs_input_grad[3]
    grads = _backward_op(
        grad_output, query, key, value, attn_mask, *state, ctx.topk, ctx.is_causal, ctx.scale, mask_gradient
    )
    return *grads[:3], grads[3] if mask_gradient else None, None, None, None


def _setup_backward(ctx: Any, inputs: tuple[Any, ...], output: State) -> None:
    grad_output, query, key, value, attn_mask, *_ = inputs
    ctx.topk, ctx.is_causal, ctx.scale, ctx.mask_gradient = inputs[8:]
    ctx.save_for_backward(grad_output, query, key, value, attn_mask)


def _double_backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
    """Gradient of the gradient: no kernel has it, so it is taken through the PyTorch path."""
    grad_output, query, key, value, attn_mask = ctx.saved_tensors
    with torch.enable_grad():
        inputs = [t.detach().requires_grad_() for t in (grad_output, query, key, value)]
        mask = attn_mask.detach().requires_grad_() if ctx.mask_gradient else attn_mask
        if ctx.mask_gradient:
            inputs.append(mask)
        call = KNNCall(inputs[1], inputs[2], inputs[3], mask, ctx.topk, 0.0, ctx.is_causal, ctx.scale)
        output = knn_attention_reference(call, kept_by_threshold)
        second = second_gradients(output, inputs, grads)
    mask_grad = second[4] if ctx.mask_gradient else None
    return *second[:4], mask_grad, *(None,) * 7


# What a machine without the compiled kernels has in their place.
torch.library.impl("regard::knn_attention", "CompositeExplicitAutograd", _pytorch_forward)
torch.library.impl("regard::knn_attention_backward", "CompositeExplicitAutograd", _pytorch_backward)
_triton.register("knn_attention", "regard.ops.knn.triton", "forward", _pytorch_forward)
_triton.register("knn_attention_backward", "regard.ops.knn.triton", "backward", _pytorch_backward)
torch.library.register_autograd("regard::knn_attention", _gradient, setup_context=_setup)
torch.library.register_autograd("regard::knn_attention_backward", _double_backward, setup_context=_setup_backward)


@register_flop_formula(torch.ops.regard.knn_attention)
def forward_flops(
    query: tuple[int, ...],
    key: tuple[int, ...],
    value: tuple[int, ...],
    mask: Any,
    topk: int,
    *rest: Any,
    **kwargs: Any,
) -> int:
    """All logits, then the kept values: 2 N M D + 2 N k D_v a head."""
    batch, heads, rows, dim = query
    return 2 * batch * heads * rows * (key[2] * dim + topk * value[3])


@register_flop_formula(torch.ops.regard.knn_attention_backward)
def backward_flops(
    grad_output: tuple[int, ...],
    query: tuple[int, ...],
    key: tuple[int, ...],
    value: tuple[int, ...],
    mask: Any,
    lse: Any,
    kth_logit: Any,
    last_tie: Any,
    topk: int,
    *rest: Any,
    **kwargs: Any,
) -> int:
    """The logits again; then, for kept keys only, gradients of weight and value (D_v) and of query and key (D)."""
    batch, heads, rows, dim = query
    return 2 * batch * heads * rows * (key[2] * dim + 2 * topk * (dim + value[3]))
