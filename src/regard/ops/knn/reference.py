"""The specification of k-NN attention, in any dtype, differentiable by autograd. All else is checked against it."""

from collections.abc import Callable

import torch
from torch import Tensor

from regard.ops._arguments import full_precision
from regard.ops._selection import kept_by_stable_sort, raised, softmax_of_kept
from regard.ops.knn.call import KNNCall
from regard.ops.knn.tail import orders_of_rows, with_sampled_tail

__all__ = ["knn_attention_reference", "logits", "mix", "ranking", "row_weights", "weights"]


def logits(call: KNNCall, first: int = 0) -> Tensor:
    """(B, H, N, M) scaled logits after bias and masks; hidden keys are -inf. Half types are raised to float32.

    Args:
        first: what the call's first query counts as where is_causal asks.
    """
    query, key = raised(call.query), raised(call.key)
    key = key.repeat_interleave(call.groups, dim=1)
    scores = torch.einsum("bhnd,bhmd->bhnm", query * call.scale, key)
    if call.attn_mask is not None:
        if call.attn_mask.dtype == torch.bool:
            scores = scores.masked_fill(~call.attn_mask, float("-inf"))
        else:
            scores = scores + call.attn_mask.to(scores.dtype)
    if call.is_causal:
        causal = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril(first)
        scores = scores.masked_fill(~causal, float("-inf"))
    return scores


def ranking(call: KNNCall, scores: Tensor) -> Tensor:
    """(B, H, N, M) what the keys of a row are chosen by, the largest first; from the logits, without gradient.

    The logits themselves, or for Euclidean distance the logits less scale |k|^2 / 2: -scale |q - k|^2 / 2, up to a
    constant of each row, under the same bias and masks.
    """
    scores = scores.detach()
    if call.metric == "dot":
        return scores
    lengths = 0.5 * call.scale * raised(call.key.detach()).square().sum(dim=-1)
    return scores - lengths.repeat_interleave(call.groups, dim=1).unsqueeze(2)


def weights(call: KNNCall, select: Callable[[Tensor, int], Tensor] = kept_by_stable_sort) -> Tensor:
    """(B, H, N, M) attention weights: softmax over the keys that count, zero elsewhere; all zero where none does."""
    return row_weights(call, logits(call), 0, select)


def row_weights(call: KNNCall, scores: Tensor, first: int, select: Callable[[Tensor, int], Tensor]) -> Tensor:
    """The same, given the logits of queries from `first` on.

    The kept keys count, and of the others those that stand for a sampled tail.
    """
    kept = select(ranking(call, scores), call.topk)
    if call.num_samples and call.seed is not None:
        queries, keys = scores.shape[2:]
        everywhere = call.attn_mask is None and not call.is_causal and isinstance(keys, int)
        enough = call.topk + call.num_samples if everywhere else None  # for of these at most topk are kept
        order = orders_of_rows(call.seed, scores.shape[1], first, first + queries, keys, enough)
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
