"""k-NN attention with a sampled tail in PyTorch: blocks of queries, so that no N x M matrix is ever held."""

import dataclasses
from collections.abc import Iterator

import torch
from torch import Tensor

from regard.ops._arguments import full_precision
from regard.ops._selection import kept_by_threshold, raised, softmax_of_kept
from regard.ops.knn.call import KNNCall
from regard.ops.knn.reference import logits, mix
from regard.ops.knn.tail import orders_of_rows, with_sampled_tail

__all__ = ["attend", "gradients", "gradients_under"]

# Elements of one block's logits: a few MB, whatever the number of queries.
_BLOCK = 1 << 21


def gradients_under(
    soft: Tensor, call: KNNCall, grad_output: Tensor, mask_gradient: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Gradients of query, key, value and float mask under these weights (B, H, N, M), in the weights' dtype."""
    query, grad_output = call.query.to(soft.dtype), grad_output.to(soft.dtype)
    key, value = (t.to(soft.dtype).repeat_interleave(call.groups, dim=1) for t in (call.key, call.value))
    grad_soft = torch.einsum("bhnd,bhmd->bhnm", grad_output, value)
    grad_logits = soft * (grad_soft - (soft * grad_soft).sum(dim=-1, keepdim=True))
    grad_query = torch.einsum("bhnm,bhmd->bhnd", grad_logits, key) * call.scale
    grad_key = torch.einsum("bhnm,bhnd->bhmd", grad_logits, query) * call.scale
    grad_value = torch.einsum("bhnm,bhnd->bhmd", soft, grad_output)
    grad_key, grad_value = (t.unflatten(1, (-1, call.groups)).sum(dim=2) for t in (grad_key, grad_value))
    grad_mask = grad_logits.sum_to_size(call.attn_mask.shape) if mask_gradient and call.attn_mask is not None else None
    return grad_query, grad_key, grad_value, grad_mask


def _blocks(call: KNNCall) -> Iterator[slice]:
    per_query = call.query.shape[0] * call.query.shape[1] * call.key.shape[2]
    rows = max(1, _BLOCK // max(1, per_query))
    for start in range(0, call.query.shape[2], rows):
        yield slice(start, min(start + rows, call.query.shape[2]))


def _part(call: KNNCall, rows: slice) -> KNNCall:
    """The call of these queries alone; that the others come before them it does not know."""
    mask = call.attn_mask
    if mask is not None and mask.shape[2] > 1:
        mask = mask[:, :, rows]
    return dataclasses.replace(call, query=call.query[:, :, rows], attn_mask=mask, is_causal=False)


def _soft(call: KNNCall, part: KNNCall, rows: slice) -> Tensor:
    """(B, H, R, M) weights."""
    scores = logits(part)
    index = torch.arange(rows.start, rows.stop, device=scores.device)
    if call.is_causal:
        later = torch.arange(scores.shape[-1], device=scores.device) > index[:, None]
        scores = scores.masked_fill(later, float("-inf"))
    order = orders_of_rows(call.seed, scores.shape[1], index, scores.shape[-1])  # type: ignore[arg-type]
    if call.attn_mask is None and not call.is_causal:  # the k kept ones among these leave enough
        order = order[..., : call.topk + call.num_samples]
    return softmax_of_kept(*with_sampled_tail(scores, kept_by_threshold(scores, call.topk), call.num_samples, order))


@full_precision
def attend(call: KNNCall) -> Tensor:
    """(B, H, N, D_v) output of a call with a sampled tail."""
    output = call.query.new_empty((*call.query.shape[:-1], call.value.shape[-1]))
    for rows in _blocks(call):
        part = _part(call, rows)
        output[:, :, rows] = mix(part, _soft(call, part, rows))
    return output


@full_precision
def gradients(call: KNNCall, grad_output: Tensor, mask_gradient: bool) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Gradients of query, key, value and float mask; the same sample is drawn again."""
    grad_query = raised(torch.empty_like(call.query))
    grad_key, grad_value = (raised(torch.zeros_like(t)) for t in (call.key, call.value))
    grad_mask = torch.zeros_like(call.attn_mask) if mask_gradient and call.attn_mask is not None else None
    for rows in _blocks(call):
        part = _part(call, rows)
        found = gradients_under(_soft(call, part, rows), part, grad_output[:, :, rows], mask_gradient)
        grad_query[:, :, rows] = found[0]
        grad_key += found[1]
        grad_value += found[2]
        if grad_mask is not None:
            (grad_mask[:, :, rows] if grad_mask.shape[2] > 1 else grad_mask).add_(found[3])  # type: ignore[arg-type]
    return grad_query, grad_key, grad_value, grad_mask
