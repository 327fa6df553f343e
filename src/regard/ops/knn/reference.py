"""The specification of k-NN attention, in any dtype, differentiable by autograd. All else is checked against it."""

from collections.abc import Callable

import torch
from torch import Tensor

from regard.ops._arguments import full_precision
from regard.ops.knn.call import KNNCall

__all__ = ["kept_by_stable_sort", "knn_attention_reference", "logits", "mix", "softmax_of_kept", "weights"]


def logits(call: KNNCall) -> Tensor:
    """(B, H, N, M) scaled logits after bias and masks; hidden keys are -inf. Half types are raised to float32."""
    query, key = _compute(call.query), _compute(call.key)
    key = key.repeat_interleave(call.groups, dim=1)
    scores = torch.einsum("bhnd,bhmd->bhnm", query * call.scale, key)
    if call.attn_mask is not None:
        if call.attn_mask.dtype == torch.bool:
            scores = scores.masked_fill(~call.attn_mask, float("-inf"))
        else:
            scores = scores + call.attn_mask.to(scores.dtype)
    if call.is_causal:
        causal = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
        scores = scores.masked_fill(~causal, float("-inf"))
    return scores


def kept_by_stable_sort(scores: Tensor, topk: int) -> Tensor:
    """Boolean (..., N, M): the topk largest logits of each row, ties to the lowest index, hidden keys never."""
    order = scores.sort(dim=-1, descending=True, stable=True).indices[..., :topk]
    kept = torch.zeros_like(scores, dtype=torch.bool).scatter(-1, order, True)
    return kept & (scores != float("-inf"))


def weights(call: KNNCall, select: Callable[[Tensor, int], Tensor] = kept_by_stable_sort) -> Tensor:
    """(B, H, N, M) attention weights: softmax over the kept keys, zero elsewhere; rows that keep none are all zero."""
    scores = logits(call)
    return softmax_of_kept(scores, select(scores.detach(), call.topk))


def softmax_of_kept(scores: Tensor, kept: Tensor) -> Tensor:
    """Softmax of each row's logits (..., N, M) over its kept keys alone; zeros where a row keeps none."""
    soft = scores.masked_fill(~kept, float("-inf")).softmax(dim=-1)
    return soft.masked_fill(~kept.any(dim=-1, keepdim=True), 0.0)


@full_precision
def knn_attention_reference(call: KNNCall, select: Callable[[Tensor, int], Tensor] = kept_by_stable_sort) -> Tensor:
    """(B, H, N, D_v) output of a checked call; `select` answers which keys a row keeps."""
    return mix(call, weights(call, select))


def mix(call: KNNCall, soft: Tensor) -> Tensor:
    """(B, H, N, D_v): the values under given weights, after dropout, in the query's dtype."""
    if call.dropout_p > 0.0:
        soft = torch.nn.functional.dropout(soft, call.dropout_p)
    value = _compute(call.value)
    value = value.repeat_interleave(call.groups, dim=1)
    return torch.einsum("bhnm,bhmd->bhnd", soft, value).to(call.query.dtype)


def _compute(tensor: Tensor) -> Tensor:
    return tensor.float() if tensor.dtype in (torch.bfloat16, torch.float16) else tensor
