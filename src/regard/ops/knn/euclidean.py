"""Keys chosen by Euclidean distance, KVT's definition (its "slow version"): PyTorch, some blocks of queries at a time.

Within a row |q - k|^2 = |q|^2 - 2 (q . k - |k|^2 / 2), so what ranks the keys is the logit less scale |k|^2 / 2: no
distance is ever computed. The kernels rank by the very logits that they weigh with, so they refuse these calls. They
could be asked for them: with -|k|^2 / 2 as a mask they select rightly, and values times exp(|k|^2 / 2) beside a column
of exp(|k|^2 / 2) alone bring the weights back; but those exponentials leave float32's range as soon as squared key
norms differ by some hundreds, as they do in trained models, and no check of that fits into a compiled graph.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from regard.ops._arguments import full_precision, heads_last
from regard.ops._dispatch import Backend, Refusal
from regard.ops._operator import define, refusal_of_modes, second_gradients
from regard.ops._selection import kept_by_threshold
from regard.ops.knn import eager
from regard.ops.knn.call import KNNCall
from regard.ops.knn.op import backward_flops, forward_flops
from regard.ops.knn.reference import knn_attention_reference

__all__ = ["OfDotProducts", "PyTorchBackend", "attend", "euclidean_call", "gradients"]

# Elements of one block of logits: a few MB, whatever the number of queries.
_BLOCK = 1 << 20


@dataclass(frozen=True)
class OfDotProducts:
    """A kernel's backend, for the calls whose keys are chosen by dot product: the kernels choose by nothing else."""

    backend: Backend
    is_slow_path: bool = False

    @property
    def name(self) -> str:
        return self.backend.name

    def supports(self, call: KNNCall) -> Refusal | None:
        if call.metric != "dot":
            return Refusal("keys nearest in Euclidean distance are found on the PyTorch path only (metric='euclidean')")
        return self.backend.supports(call)

    def run(self, call: KNNCall) -> Tensor:
        return self.backend.run(call)


class PyTorchBackend(eager.PyTorchBackend):
    """k-NN attention's, which for Euclidean distances goes through the operator below."""

    def run(self, call: KNNCall) -> Tensor:
        if call.metric == "dot" or refusal_of_modes(call.dropout_p) is not None:
            return super().run(call)
        return knn_attention_euclidean_op(*call.operands())


def _pieces(call: KNNCall) -> Iterator[tuple[slice, KNNCall]]:
    """Some queries at a time, each with its own rows of the mask, which holds what is_causal says."""
    batch, heads, queries, _ = call.query.shape
    rows = max(1, _BLOCK // max(1, batch * heads * call.key.shape[2]))
    for begin in range(0, queries, rows):
        some = slice(begin, min(begin + rows, queries))
        mask = call.attn_mask
        if mask is not None and mask.shape[2] > 1:
            mask = mask[:, :, some]
        if call.is_causal:
            mask = _with_causality(mask, some, call)
        yield some, replace(call, query=call.query[:, :, some], attn_mask=mask, is_causal=False)


def _with_causality(mask: Tensor | None, rows: slice, call: KNNCall) -> Tensor:
    places = torch.arange(rows.stop, device=call.query.device)[rows]
    earlier = places.unsqueeze(1) >= torch.arange(call.key.shape[2], device=call.query.device)
    if mask is None:
        return earlier[None, None]
    return mask & earlier if mask.dtype == torch.bool else mask.masked_fill(~earlier, float("-inf"))


@full_precision
def attend(call: KNNCall) -> Tensor:
    """(B, H, N, D_v) output of a checked call."""
    output = heads_last(call.query, (*call.query.shape[:-1], call.value.shape[-1]))
    for rows, piece in _pieces(call):
        output[:, :, rows] = knn_attention_reference(piece, kept_by_threshold)
    return output


@full_precision
def gradients(call: KNNCall, grad_output: Tensor, mask_gradient: bool) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Gradients of query, key, value and, if asked for, of the float mask."""
    state = torch.promote_types(call.query.dtype, torch.float32)
    grad_query, grad_key, grad_value = (torch.zeros_like(t, dtype=state) for t in (call.query, call.key, call.value))
    mask = call.attn_mask if mask_gradient else None
    grad_mask = None if mask is None else torch.zeros_like(mask, memory_format=torch.contiguous_format)
    for rows, piece in _pieces(call):
        grad_query[:, :, rows], of_key, of_value, of_mask = eager.gradients(
            piece, grad_output[:, :, rows], mask_gradient
        )
        grad_key += of_key
        grad_value += of_value
        if grad_mask is not None and of_mask is not None:
            part = grad_mask[:, :, rows] if grad_mask.shape[2] > 1 else grad_mask
            part += of_mask.sum_to_size(part.shape)
    return grad_query, grad_key, grad_value, grad_mask


def _forward(*operands: Any) -> Tensor:
    return attend(euclidean_call(*operands))


def euclidean_call(*operands: Any) -> KNNCall:
    """The call of the operator's arguments."""
    query, key, value, attn_mask, topk, is_causal, scale = operands
    return KNNCall(query, key, value, attn_mask, topk, 0.0, is_causal, scale, "euclidean")


def _backward(grad_output: Tensor, *arguments: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    *operands, mask_gradient = arguments
    call = euclidean_call(*operands)
    *grads, grad_mask = gradients(call, grad_output, mask_gradient)
    inputs = (call.query, call.key, call.value)
    laid = [heads_last(t, tuple(t.shape)).copy_(grad) for t, grad in zip(inputs, grads, strict=True)]
    return laid[0], laid[1], laid[2], call.query.new_empty(0) if grad_mask is None else grad_mask


def _fake(query: Tensor, key: Tensor, value: Tensor, *rest: Any) -> Tensor:
    return heads_last(query, (*query.shape[:-1], value.shape[-1]))


def _fake_backward(grad_output: Tensor, *arguments: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    query, key, value, attn_mask, *_, mask_gradient = arguments
    grad_mask = attn_mask.new_empty(attn_mask.shape) if mask_gradient and attn_mask is not None else query.new_empty(0)
    grads = [heads_last(t, tuple(t.shape)) for t in (query, key, value)]
    return grads[0], grads[1], grads[2], grad_mask


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:4])
    ctx.options = inputs[4:]


def _gradient(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
    saved = ctx.saved_tensors
    mask_gradient = saved[3] is not None and ctx.needs_input_grad[3]
    grads = _backward_op(grad_output, *saved, *ctx.options, mask_gradient)
    return *grads[:3], grads[3] if mask_gradient else None, None, None, None


def _setup_backward(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    ctx.save_for_backward(*inputs[:5])
    *ctx.options, ctx.mask_gradient = inputs[5:]


def _double_backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
    """Gradient of the gradient, through the reference."""
    *saved, attn_mask = ctx.saved_tensors
    with torch.enable_grad():
        leaves = [t.detach().requires_grad_() for t in saved]
        if ctx.mask_gradient:
            attn_mask = attn_mask.detach().requires_grad_()
            leaves.append(attn_mask)
        output = knn_attention_reference(euclidean_call(*leaves[1:4], attn_mask, *ctx.options), kept_by_threshold)
        second = second_gradients(output, leaves, grads)
    return *second[:4], second[4] if ctx.mask_gradient else None, *(None,) * 4


_ARGUMENTS = "Tensor query, Tensor key, Tensor value, Tensor? attn_mask, SymInt topk, bool is_causal, float scale"
_backward_op = define(
    "knn_attention_euclidean_backward",
    f"(Tensor grad_output, {_ARGUMENTS}, bool mask_gradient) -> "
    "(Tensor grad_query, Tensor grad_key, Tensor grad_value, Tensor grad_mask)",
    compute=_backward,
    fake=_fake_backward,
    setup=_setup_backward,
    gradient=_double_backward,
)
knn_attention_euclidean_op = define(
    "knn_attention_euclidean",
    f"({_ARGUMENTS}) -> Tensor",
    compute=_forward,
    fake=_fake,
    setup=_setup,
    gradient=_gradient,
)


@register_flop_formula(torch.ops.regard.knn_attention_euclidean)
def _forward_flops(*shapes: Any, **kwargs: Any) -> int:
    return forward_flops(*shapes)


@register_flop_formula(torch.ops.regard.knn_attention_euclidean_backward)
def _backward_flops(
    grad_output: Any,
    query: tuple[int, ...],
    key: tuple[int, ...],
    value: tuple[int, ...],
    mask: Any,
    topk: int,
    *rest: Any,
    **kwargs: Any,
) -> int:
    return backward_flops(grad_output, query, key, value, mask, None, None, None, topk)
