"""The PyTorch path: some blocks of queries at a time, so that neither all copies of K and V nor all weights are ever
held; forward and backward written out.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from regard.ops._arguments import full_precision
from regard.ops._selection import raised
from regard.ops.clustering.sums import cluster_sums
from regard.ops.routed.call import RoutedCall, check_range
from regard.ops.routed.reference import (
    Listed,
    attend_blocks,
    block_rows,
    extra_for_heads,
    key_blocks,
    listed,
    weights,
)

__all__ = ["attend", "gradients"]

# Elements of what is gathered and weighed at once: a few MB, whatever the number of queries.
_BLOCK = 1 << 21


def _pieces(call: RoutedCall) -> Iterator[tuple[slice, slice, slice]]:
    """Blocks of queries, rows of each of them, and the queries that these are."""
    queries, size = call.query.shape[2], call.query_block
    keys = call.blocks.shape[3] * call.key_block
    heads = call.query.shape[0] * call.query.shape[1]
    per_row = heads * (keys + call.extra_key.shape[2])
    gathered = heads * keys * (call.key.shape[3] + call.value.shape[3])
    blocks = max(1, _BLOCK // max(1, per_row * size + gathered))
    rows = size if blocks > 1 else min(size, max(1, _BLOCK // max(1, per_row)))
    for block in range(0, call.blocks.shape[2], blocks):
        for row in range(0, size, rows):
            begin = block * size + row
            if begin < queries:
                end = min(queries, begin + blocks * rows, (block + blocks) * size)
                yield slice(block, block + blocks), slice(row, row + rows), slice(begin, end)


@full_precision
def attend(call: RoutedCall) -> Tensor:
    """(B, H, N, D_v) output of a checked call."""
    if call.blocks.device.type == "cpu":  # elsewhere it would have to wait, and torch checks what it gathers
        check_range(call.blocks, call.key.shape[2], call.key_block)
    memory = key_blocks(call)
    output = call.query.new_empty((*call.query.shape[:-1], call.value.shape[-1]))
    for blocks, rows, queries in _pieces(call):
        found = attend_blocks(call, memory, blocks, rows).flatten(2, 3)
        output[:, :, queries] = found[:, :, : queries.stop - queries.start]
    return output


@full_precision
def gradients(call: RoutedCall, grad_output: Tensor) -> tuple[Tensor, ...]:
    """Gradients of query, key, value, extra_key, extra_value and extra_bias (empty if there is none)."""
    memory = key_blocks(call)
    query, grad_output = raised(call.query), raised(grad_output)
    extra_key, extra_value = (extra_for_heads(call, t) for t in (call.extra_key, call.extra_value))
    grad_query = torch.empty_like(query)
    grad_keys, grad_values = torch.zeros_like(memory.key), torch.zeros_like(memory.value)
    grad_extra = [torch.zeros_like(raised(t)) for t in (call.extra_key, call.extra_value)]
    bias = call.extra_bias
    grad_bias = query.new_zeros(0) if bias is None else torch.zeros_like(bias, memory_format=torch.contiguous_format)
    for blocks, rows, queries in _pieces(call):
        seen = listed(call, memory, blocks)
        q, grad = (block_rows(call, t, blocks, rows) for t in (query, grad_output))
        soft = weights(call, seen, q, None if bias is None else block_rows(call, bias, blocks, rows))
        count = seen.key.shape[-2]
        grad_soft = torch.cat([grad @ seen.value.mT, grad @ extra_value.mT], dim=-1)
        grad_logits = soft * (grad_soft - (soft * grad_soft).sum(dim=-1, keepdim=True))
        of_listed, of_extra = grad_logits[..., :count], grad_logits[..., count:]
        found = call.scale * (of_listed @ seen.key + of_extra @ extra_key)
        grad_query[:, :, queries] = found.flatten(2, 3)[:, :, : queries.stop - queries.start]
        _add_to_blocks(call, seen, call.scale * (of_listed.mT @ q), grad_keys)
        _add_to_blocks(call, seen, soft[..., :count].mT @ grad, grad_values)
        grad_extra[0] += _for_key_heads(call, call.scale * (of_extra.mT @ q))
        grad_extra[1] += _for_key_heads(call, soft[..., count:].mT @ grad)
        if bias is None:
            continue
        if bias.shape[2] == call.query.shape[2]:
            grad_bias[:, :, queries] = of_extra.flatten(2, 3)[:, :, : queries.stop - queries.start]
        else:
            grad_bias += of_extra.sum(dim=(2, 3)).unsqueeze(2)
    tokens = call.key.shape[2]
    grad_key, grad_value = (t.flatten(2, 3)[:, :, :tokens] for t in (grad_keys, grad_values))
    return grad_query, grad_key, grad_value, grad_extra[0], grad_extra[1], grad_bias


def _add_to_blocks(call: RoutedCall, seen: Listed, rows: Tensor, sums: Tensor) -> None:
    """Add gradients of listed keys (B, H, R, L, D) to those of their key blocks (B, H_kv, blocks, key_block, D)."""
    if sums.shape[2] == 0:
        return
    index = seen.block.flatten(0, 1)
    # What is not shown is listed as block 0, which it must not spoil.
    rows = rows.masked_fill(~seen.shown.unsqueeze(-1), 0.0).reshape(*index.shape, sums.shape[3] * sums.shape[4])
    sums += cluster_sums(rows, index, sums.shape[2]).reshape(sums.shape)


def _for_key_heads(call: RoutedCall, grads: Tensor) -> Tensor:
    """(B, H, R, S, D) -> (B, H_kv, S, D)."""
    return grads.sum(dim=2).unflatten(1, (-1, call.groups)).sum(dim=2)
