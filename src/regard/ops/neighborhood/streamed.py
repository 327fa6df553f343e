"""The PyTorch path: the windows of a block of queries are gathered at a time; forward and backward written out."""

from collections.abc import Iterator

import torch
from torch import Tensor

from regard.ops._arguments import full_precision
from regard.ops._selection import raised
from regard.ops.clustering.sums import cluster_sums
from regard.ops.neighborhood.call import NeighborhoodCall
from regard.ops.neighborhood.reference import Near, all_logits, gathered, keys_and_values, row_logits, soft

__all__ = ["attend", "gradients"]

# Elements of one block's gathered keys: a few MB, whatever the number of queries.
_BLOCK = 1 << 20


def _blocks(call: NeighborhoodCall) -> Iterator[tuple[slice, bool]]:
    """Slices of the queries, and whether they are prefix queries."""
    batch, heads, tokens, dim = call.key.shape
    prefix, widest = call.num_prefix_tokens, max(dim, call.value.shape[-1], call.groups)
    for first, last, keys in ((0, prefix, tokens), (prefix, tokens, call.pattern.keys + prefix)):
        rows = max(1, _BLOCK // max(1, batch * heads * keys * widest))
        for start in range(first, last, rows):
            yield slice(start, min(start + rows, last)), last == prefix


def _near(call: NeighborhoodCall, key: Tensor, value: Tensor, rows: slice) -> Near:
    cells = torch.arange(rows.start, rows.stop, device=key.device) - call.num_prefix_tokens
    return gathered(call, key, value, cells)


@full_precision
def attend(call: NeighborhoodCall) -> Tensor:
    """(B, H, N, D_v) output of a call."""
    prefix, (key, value) = call.num_prefix_tokens, keys_and_values(call)
    query = call.grouped(raised(call.query))
    output = call.query.new_empty((*call.query.shape[:-1], value.shape[-1]))
    for rows, is_prefix in _blocks(call):
        q = query[:, :, :, rows]
        if is_prefix:
            mixed = soft(all_logits(call, key, q)) @ value.unsqueeze(2)
        else:
            near = _near(call, key, value, rows)
            weights = soft(row_logits(call, key, near, q))
            mixed = torch.einsum("bhgrk,bhrkd->bhgrd", weights[..., prefix:], near.value)
            mixed += weights[..., :prefix] @ value[:, :, None, :prefix]
        output[:, :, rows] = mixed.flatten(1, 2)
    return output


@full_precision
def gradients(
    call: NeighborhoodCall, grad_output: Tensor, bias_gradient: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Gradients of query, key, value and, if it is wanted, of the bias."""
    key, value = keys_and_values(call)
    query, grad_output = call.grouped(raised(call.query)), call.grouped(raised(grad_output))
    grad_query = torch.empty_like(raised(call.query))
    grad_key, grad_value = torch.zeros_like(key), torch.zeros_like(value)
    bias = call.attn_bias if bias_gradient else None
    grad_bias = None if bias is None else torch.zeros_like(bias)
    for rows, is_prefix in _blocks(call):
        q, grad = query[:, :, :, rows], grad_output[:, :, :, rows]
        if is_prefix:
            _add_dense(call, (key, value), (q, grad), (grad_query[:, :, rows], grad_key, grad_value))
            continue
        near = _near(call, key, value, rows)
        grad_q, grad_logits = _add_near(call, (key, value), near, (q, grad), (grad_key, grad_value))
        grad_query[:, :, rows] = grad_q
        if grad_bias is not None:
            index = near.windows.offset.flatten().expand(grad_bias.shape[0], -1)
            of_places = grad_logits.sum(dim=0).flatten(0, 1).flatten(1).unsqueeze(-1).to(grad_bias.dtype)
            grad_bias += cluster_sums(of_places, index, grad_bias.shape[1]).squeeze(-1)
    return grad_query, grad_key, grad_value, grad_bias


Pair = tuple[Tensor, Tensor]


def _of_logits(weights: Tensor, grad_weights: Tensor) -> Tensor:
    return weights * (grad_weights - (weights * grad_weights).sum(dim=-1, keepdim=True))


def _add_dense(call: NeighborhoodCall, keys: Pair, rows: Pair, grads: tuple[Tensor, Tensor, Tensor]) -> None:
    """Prefix queries: their gradients, and what they add to those of keys and values."""
    (key, value), (query, grad_output), (grad_query, grad_key, grad_value) = keys, rows, grads
    weights = soft(all_logits(call, key, query))
    grad_logits = _of_logits(weights, grad_output @ value.unsqueeze(2).mT)
    grad_query.copy_((call.scale * (grad_logits @ key.unsqueeze(2))).flatten(1, 2))
    grad_value += (weights.mT @ grad_output).sum(dim=2)
    grad_key += call.scale * (grad_logits.mT @ query).sum(dim=2)


def _add_near(call: NeighborhoodCall, keys: Pair, near: Near, rows: Pair, grads: Pair) -> tuple[Tensor, Tensor]:
    """Other queries: their gradients, and those of their windows' logits; adds to keys' and values'."""
    (key, value), (query, grad_output), (grad_key, grad_value) = keys, rows, grads
    prefix = call.num_prefix_tokens
    weights = soft(row_logits(call, key, near, query))
    grad_weights = torch.cat(
        [
            grad_output @ value[:, :, None, :prefix].mT,
            torch.einsum("bhgrd,bhrkd->bhgrk", grad_output, near.value),
        ],
        dim=-1,
    )
    grad_logits = _of_logits(weights, grad_weights)
    grad_query = torch.einsum("bhgrk,bhrkd->bhgrd", grad_logits[..., prefix:], near.key)
    grad_query += grad_logits[..., :prefix] @ key[:, :, None, :prefix]
    for total, factors, tokens, scale in (
        (grad_value, weights, grad_output, 1.0),
        (grad_key, grad_logits, query, call.scale),
    ):
        total[:, :, :prefix] += scale * (factors[..., :prefix].mT @ tokens).sum(dim=2)
        to_places = scale * torch.einsum("bhgrk,bhgrd->bhrkd", factors[..., prefix:], tokens)
        nothing = (near.windows.absent | near.windows.zero).unsqueeze(-1)
        to_places = to_places.masked_fill(nothing, 0.0).flatten(0, 1).flatten(1, 2)
        index = near.windows.key.flatten().expand(to_places.shape[0], -1)
        cells = total.shape[2] - prefix
        total[:, :, prefix:] += cluster_sums(to_places, index, cells).unflatten(0, total.shape[:2])
    return (call.scale * grad_query).flatten(1, 2), grad_logits[..., prefix:]
