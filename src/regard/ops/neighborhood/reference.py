"""The specification of neighborhood attention, differentiable by autograd. All else is checked against it."""

from typing import NamedTuple

import torch
from torch import Tensor

from regard.ops._arguments import full_precision
from regard.ops._selection import raised, softmax_of_kept
from regard.ops.neighborhood.call import NeighborhoodCall
from regard.ops.neighborhood.windows import Windows, windows_of

__all__ = [
    "Near",
    "all_logits",
    "gathered",
    "keys_and_values",
    "neighborhood_attention_reference",
    "row_logits",
    "soft",
]


class Near(NamedTuple):
    """The keys and values that some queries see: (B, H_kv, R, K, D) and (B, H_kv, R, K, D_v), and where they stand."""

    windows: Windows
    key: Tensor
    value: Tensor


def keys_and_values(call: NeighborhoodCall) -> tuple[Tensor, Tensor]:
    """Raised; hidden ones are zero, so that it does not matter what they hold."""
    key, value = raised(call.key), raised(call.value)
    if call.visible is None:
        return key, value
    hidden = ~call.visible[:, None, :, None]
    return key.masked_fill(hidden, 0.0), value.masked_fill(hidden, 0.0)


def gathered(call: NeighborhoodCall, key: Tensor, value: Tensor, cells: Tensor) -> Near:
    """The windows of the queries at `cells`; places that do not count, or count as zeros, hold zeros."""
    windows = windows_of(call.pattern, cells)
    nothing = (windows.absent | windows.zero).unsqueeze(-1)
    index = windows.key + call.num_prefix_tokens
    return Near(windows, *(t[:, :, index].masked_fill(nothing, 0.0) for t in (key, value)))


def all_logits(call: NeighborhoodCall, key: Tensor, query: Tensor) -> Tensor:
    """(B, H_kv, G, R, N) logits of queries (B, H_kv, G, R, D) with all these keys (B, H_kv, N, D)."""
    logits = (query * call.scale) @ key.unsqueeze(2).mT
    if call.visible is not None:
        logits = logits.masked_fill(~call.visible[:, None, None, None, : key.shape[2]], float("-inf"))
    return logits


def row_logits(call: NeighborhoodCall, key: Tensor, near: Near, query: Tensor) -> Tensor:
    """(B, H_kv, G, R, P + K) logits with the prefix keys and the keys of the window."""
    windows = near.windows
    logits = torch.einsum("bhgrd,bhrkd->bhgrk", query * call.scale, near.key)
    if call.attn_bias is not None:
        logits = logits + call.attn_bias[:, windows.offset].to(logits.dtype).unflatten(0, (key.shape[1], call.groups))
    absent = windows.absent
    if call.visible is not None:
        hidden = ~call.visible[:, windows.key + call.num_prefix_tokens] & ~windows.zero
        absent = (absent | hidden)[:, None, None]
    logits = logits.masked_fill(absent, float("-inf"))
    if call.num_prefix_tokens == 0:
        return logits
    return torch.cat([all_logits(call, key[:, :, : call.num_prefix_tokens], query), logits], dim=-1)


def soft(logits: Tensor) -> Tensor:
    """Weights; a row that sees nothing has none."""
    return softmax_of_kept(logits, logits != float("-inf"))


@full_precision
def neighborhood_attention_reference(call: NeighborhoodCall) -> Tensor:
    """(B, H, N, D_v) output of a checked call."""
    prefix, (key, value) = call.num_prefix_tokens, keys_and_values(call)
    query = call.grouped(raised(call.query))
    dense = _dropped(call, soft(all_logits(call, key, query[:, :, :, :prefix]))) @ value.unsqueeze(2)
    cells = torch.arange(call.query.shape[2] - prefix, device=key.device)
    near = gathered(call, key, value, cells)
    weights = _dropped(call, soft(row_logits(call, key, near, query[:, :, :, prefix:])))
    mixed = torch.einsum("bhgrk,bhrkd->bhgrd", weights[..., prefix:], near.value)
    mixed = mixed + weights[..., :prefix] @ value[:, :, None, :prefix]
    return torch.cat([dense, mixed], dim=3).flatten(1, 2).to(call.query.dtype)


def _dropped(call: NeighborhoodCall, weights: Tensor) -> Tensor:
    return torch.nn.functional.dropout(weights, call.dropout_p) if call.dropout_p > 0.0 else weights
