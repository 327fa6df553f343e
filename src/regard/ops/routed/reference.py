"""The specification of routed attention, differentiable by autograd. All else is checked against it."""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import dropout, pad

from regard.ops._arguments import full_precision
from regard.ops._selection import raised, softmax_of_kept
from regard.ops.routed.call import RoutedCall

__all__ = [
    "KeyBlocks",
    "Listed",
    "attend_blocks",
    "block_rows",
    "extra_for_heads",
    "key_blocks",
    "listed",
    "routed_attention_reference",
    "weights",
]


class KeyBlocks(NamedTuple):
    """Keys and values in blocks, raised.

    Args:
        key: (B, H_kv, blocks, key_block, D). value: (B, H_kv, blocks, key_block, D_v).
        shown: (B, H_kv, blocks, key_block) boolean.
    """

    key: Tensor
    value: Tensor
    shown: Tensor


class Listed(NamedTuple):
    """What R blocks of queries see, beside the extra keys: their lists' keys, one after the other (L = T key_block).

    What is hidden, or beyond the last key, is zero: it does not matter what it holds.

    Args:
        key: (B, H, R, L, D). value: (B, H, R, L, D_v). shown: (B, H, R, L) boolean.
        block: (B, H_kv, groups R T): the key block of each entry; 0 where there is none.
    """

    key: Tensor
    value: Tensor
    shown: Tensor
    block: Tensor


def _by_block(tensor: Tensor, size: int) -> Tensor:
    """(B, H, N, D) -> (B, H, ceil(N / size), size, D), zeros behind the last token."""
    blocks = -(-tensor.shape[2] // size)
    missing = blocks * size - tensor.shape[2]
    if isinstance(missing, torch.SymInt):  # a size that torch.export leaves open: `pad` would ask whether it is 0
        places = torch.arange(blocks * size, device=tensor.device)
        behind = (places >= tensor.shape[2]).unsqueeze(1)
        tensor = tensor.index_select(2, places.clamp(max=tensor.shape[2] - 1))
        tensor = tensor & ~behind if tensor.dtype == torch.bool else tensor.masked_fill(behind, 0)
    elif missing:
        tensor = pad(tensor, (0, 0, 0, missing))
    return tensor.unflatten(2, (blocks, size))


def key_blocks(call: RoutedCall) -> KeyBlocks:
    shown = call.visible
    if shown is None:
        shown = torch.ones(call.key.shape[:-1], dtype=torch.bool, device=call.key.device)
    key, value, shown = (_by_block(t, call.key_block) for t in (raised(call.key), raised(call.value), shown[..., None]))
    return KeyBlocks(key, value, shown.squeeze(-1))


def listed(call: RoutedCall, memory: KeyBlocks, blocks: slice) -> Listed:
    """What these blocks of queries see."""
    lists = call.blocks[:, :, blocks].expand(*call.query.shape[:2], -1, -1)
    batch, heads, rows, count = lists.shape
    index = lists.clamp(min=0).reshape(batch, call.key.shape[1], call.groups * rows * count)

    def gathered(tensor: Tensor) -> Tensor:
        flat = tensor.flatten(3)
        if flat.shape[2] == 0:  # no keys, so nothing is listed
            flat = flat.new_zeros(*flat.shape[:2], 1, flat.shape[3])
        found = flat.gather(2, index.unsqueeze(-1).expand(-1, -1, -1, flat.shape[3]))
        return found.reshape(batch, heads, rows, count * call.key_block, *tensor.shape[4:])

    shown = gathered(memory.shown) & (lists >= 0).unsqueeze(4).expand(-1, -1, -1, -1, call.key_block).flatten(3)
    hidden = ~shown.unsqueeze(-1)
    return Listed(
        gathered(memory.key).masked_fill(hidden, 0.0), gathered(memory.value).masked_fill(hidden, 0.0), shown, index
    )


def block_rows(call: RoutedCall, tensor: Tensor, blocks: slice, rows: slice) -> Tensor:
    """(B, H, 1 or N, D) -> (B, H, R or 1, rows or 1, D): these rows of these blocks of queries."""
    if tensor.shape[2] == 1 != call.query.shape[2]:
        return tensor.unsqueeze(2)
    size = call.query_block
    first, last = (blocks.start or 0) * size, None if blocks.stop is None else blocks.stop * size
    return _by_block(tensor[:, :, first:last], size)[:, :, :, rows]


def weights(call: RoutedCall, seen: Listed, query: Tensor, bias: Tensor | None) -> Tensor:
    """(B, H, R, rows, L + S) attention weights of queries (B, H, R, rows, D), raised; zeros for rows that see nothing.

    Args:
        bias: of the extra keys, as block_rows gives it.
    """
    query = query * call.scale
    logits = (query @ seen.key.mT).masked_fill(~seen.shown.unsqueeze(-2), float("-inf"))
    extra = query @ extra_for_heads(call, call.extra_key).mT
    if bias is not None:
        extra = extra + bias
    logits = torch.cat([logits, extra], dim=-1)
    return softmax_of_kept(logits, logits != float("-inf"))


def attend_blocks(call: RoutedCall, memory: KeyBlocks, blocks: slice, rows: slice) -> Tensor:
    """(B, H, R, rows, D_v): the output for these rows of these blocks of queries."""
    seen = listed(call, memory, blocks)
    bias = None if call.extra_bias is None else block_rows(call, call.extra_bias, blocks, rows)
    soft = weights(call, seen, block_rows(call, raised(call.query), blocks, rows), bias)
    if call.dropout_p > 0.0:
        soft = dropout(soft, call.dropout_p)
    of_listed, of_extra = soft.split([seen.key.shape[-2], call.extra_key.shape[2]], dim=-1)
    return of_listed @ seen.value + of_extra @ extra_for_heads(call, call.extra_value)


def extra_for_heads(call: RoutedCall, extra: Tensor) -> Tensor:
    """(B, H_kv, S, D) -> (B, H, 1, S, D), raised."""
    extra = raised(extra)
    if call.groups != 1:  # repeating no tokens at all once is more than ONNX can reshape
        extra = extra.repeat_interleave(call.groups, dim=1)
    return extra.unsqueeze(2)


@full_precision
def routed_attention_reference(call: RoutedCall) -> Tensor:
    """(B, H, N, D_v) output of a checked call: K and V gathered for every block of queries, then softmax."""
    output = attend_blocks(call, key_blocks(call), slice(None), slice(None)).flatten(2, 3)
    return output[:, :, : call.query.shape[2]].to(call.query.dtype)
