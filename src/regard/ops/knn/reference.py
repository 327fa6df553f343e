"""The specification of k-NN attention, in any dtype, differentiable by autograd. All else is checked against it."""

from collections.abc import Callable

import torch
from torch import Tensor

from regard.ops._arguments import full_precision
from regard.ops._selection import kept_by_stable_sort, raised, softmax_of_kept
from regard.ops.knn.call import KNNCall
from regard.ops.knn.tail import orders_of_rows, with_sampled_tail

__all__ = ["knn_attention_reference", "logits", "mix", "weights"]


def logits(call: KNNCall) -> Tensor:
    """(B, H, N, M) scaled logits after bias and masks; hidden keys are -inf. Half types are raised to float32."""
    query, key = raised(call.query), raised(call.key)
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


def weights(call: KNNCall, select: Callable[[Tensor, int], Tensor] = kept_by_stable_sort) -> Tensor:
    """(B, H, N, M) attention weights: softmax over the kept keys, zero elsewhere; rows that keep none are all zero."""
    scores = logits(call)
    kept = select(scores.detach(), call.topk)
    if call.num_samples:
        rows = torch.arange(scores.shape[2], device=scores.device)
        order = orders_of_rows(call.seed, scores.shape[1], rows, scores.shape[3])  # type: ignore[arg-type]
        scores, kept = with_sampled_tail(scores, kept, call.num_samples, order)
    return softmax_of_kept(scores, kept)


@full_precision
def knn_attention_reference(call: KNNCall, select: Callable[[Tensor, int], Tensor] = kept_by_stable_sort) -> Tensor:
    """(B, H, N, D_v) output of a checked call; `select` answers which keys a row keeps."""
    return mix(call, weights(call, select))


def mix(call: KNNCall, soft: Tensor) -> Tensor:
    """(B, H, N, D_v): the values under given weights, after dropout, in the query's dtype."""
    if call.dropout_p > 0.0:
        soft = torch.nn.functional.dropout(soft, call.dropout_p)
    value = raised(call.value)
    value = value.repeat_interleave(call.groups, dim=1)
    return torch.einsum("bhnm,bhmd->bhnd", soft, value).to(call.query.dtype)
