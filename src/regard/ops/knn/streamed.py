"""What no kernel knows, in PyTorch: blocks of queries at a time, so that no N x M matrix is ever held."""

import dataclasses
from collections.abc import Iterator

import torch
from torch import Tensor

from regard.ops._arguments import full_precision, heads_last
from regard.ops._selection import kept_by_threshold, raised
from regard.ops.knn.call import KNNCall
from regard.ops.knn.eager import gradients_under
from regard.ops.knn.reference import logits, mix, row_weights

__all__ = ["attend", "gradients"]

# Elements of one block's logits: a few MB, whatever the number of queries.
_BLOCK = 1 << 21


def _blocks(call: KNNCall) -> Iterator[slice]:
    per_query = call.query.shape[0] * call.query.shape[1] * call.key.shape[2]
    rows = max(1, _BLOCK // max(1, per_query))
    for start in range(0, call.query.shape[2], rows):
        yield slice(start, min(start + rows, call.query.shape[2]))


def _part(call: KNNCall, rows: slice) -> KNNCall:
    """The call of these queries alone."""
    mask = call.attn_mask
    if mask is not None and mask.shape[2] > 1:
        mask = mask[:, :, rows]
    return dataclasses.replace(call, query=call.query[:, :, rows], attn_mask=mask)


def _soft(part: KNNCall, rows: slice) -> Tensor:
    """(B, H, R, M) weights of a part."""
    return row_weights(part, logits(part, rows.start), rows.start, kept_by_threshold)


@full_precision
def attend(call: KNNCall) -> Tensor:
    """(B, H, N, D_v) output of a checked call."""
    output = heads_last(call.query, (*call.query.shape[:-1], call.value.shape[-1]))
    for rows in _blocks(call):
        part = _part(call, rows)
        output[:, :, rows] = mix(part, _soft(part, rows))
    return output


@full_precision
def gradients(call: KNNCall, grad_output: Tensor, mask_gradient: bool) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Gradients of query, key, value and float mask; the same sample is drawn again."""
    grad_query = raised(torch.empty_like(call.query))
    grad_key, grad_value = (raised(torch.zeros_like(t)) for t in (call.key, call.value))
    grad_mask = torch.zeros_like(call.attn_mask) if mask_gradient and call.attn_mask is not None else None
    for rows in _blocks(call):
        part = _part(call, rows)
        found = gradients_under(_soft(part, rows), part, grad_output[:, :, rows], mask_gradient)
        grad_query[:, :, rows] = found[0]
        grad_key += found[1]
        grad_value += found[2]
        if grad_mask is not None:
            (grad_mask[:, :, rows] if grad_mask.shape[2] > 1 else grad_mask).add_(found[3])  # type: ignore[arg-type]
    return grad_query, grad_key, grad_value, grad_mask
