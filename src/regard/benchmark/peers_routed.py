"""Peers of routed attention: gather formulations of bi-level routing, and compiled FlexAttention."""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from regard.benchmark.entry import Case, Peer
from regard.benchmark.peers_local import compiled_flex, flex_refusal

__all__ = ["FLEX_ROUTED", "GATHER", "PUBLISHED_GATHER", "gathered_routed_attention", "published_routed_attention"]


def gathered_routed_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    blocks: Tensor,
    query_block: int,
    key_block: int,
    scale: float | None = None,
) -> Tensor:
    """Attention of query blocks to listed key blocks the way bi-level routing (arXiv 2303.08810) is computed.

    The keys and values of the listed blocks are gathered for each block of queries, T copies of K and V in all; then
    follow dense products within the blocks.

    Args:
        query: (B, H, N, D), N a multiple of query_block. key: (B, H, M, D), M a multiple of key_block.
        value: (B, H, M, D_v).
        blocks: (B or 1, H or 1, N / query_block, T): key blocks of each query block; -1 is none.

    Returns:
        (B, H, N, D_v); zeros for queries that see nothing.

    Raises:
        ValueError: the blocks do not divide the tokens.
    """
    if query.shape[2] % query_block or key.shape[2] % key_block:
        raise ValueError(
            f"query_block, key_block: {query_block} and {key_block} do not divide {query.shape[2]} queries and "
            f"{key.shape[2]} keys"
        )
    batch, heads, tokens, dim = query.shape
    rows = query.unflatten(2, (tokens // query_block, query_block))
    index = blocks.expand(batch, heads, *blocks.shape[2:])
    keys, values = (_gathered(one, index.clamp(min=0), key_block) for one in (key, value))
    logits = rows @ keys.mT * (dim**-0.5 if scale is None else scale)
    hidden = (index < 0).repeat_interleave(key_block, dim=-1).unsqueeze(-2)
    if bool(hidden.any()):
        logits = logits.masked_fill(hidden, float("-inf"))
        weights = logits.softmax(dim=-1).masked_fill(hidden.all(dim=-1, keepdim=True), 0.0)
    else:
        weights = logits.softmax(dim=-1)
    return (weights @ values).flatten(2, 3)


def _gathered(x: Tensor, index: Tensor, block: int) -> Tensor:
    """(B, H, M, D) -> (B, H, query blocks, T * block, D)."""
    batch, heads, tokens, dim = x.shape
    parts = x.reshape(batch, heads, tokens // block, block * dim)
    lists, length = index.shape[2:]
    places = index.flatten(2).unsqueeze(-1).expand(-1, -1, -1, block * dim)
    return parts.gather(2, places).reshape(batch, heads, lists, length * block, dim)


def _flex_mask(blocks: Tensor, query_block: int, key_block: int, keys: int) -> Callable[..., Tensor]:
    listed = torch.zeros(*blocks.shape[:3], -(-keys // key_block) + 1, dtype=torch.bool, device=blocks.device)
    listed.scatter_(3, blocks.long() + 1, True)  # the first column takes the -1
    listed = listed[..., 1:].contiguous()
    images, heads = listed.shape[:2]

    def mask(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        row, column = query // query_block, key // key_block
        return listed[batch if images > 1 else batch * 0, head if heads > 1 else head * 0, row, column]

    return mask


def published_routed_attention(
    query: Tensor, key: Tensor, value: Tensor, blocks: Tensor, query_block: int, key_block: int
) -> Tensor:
    """The same the way bi-level routing is published: of channels-last regions, for all heads at once.

    K and V are expanded for every block of queries, and gathered from there; so their gradients have the expanded size
    before they are added up. The heads are parted afterwards.

    Args:
        blocks: (B or 1, 1, N / query_block, T), none missing.

    Raises:
        ValueError: lists of each head, or a block that is missing.
    """
    if blocks.shape[1] != 1 or bool((blocks < 0).any()):
        raise ValueError("blocks: the published formulation has one whole list of blocks for all heads")
    batch, heads, tokens, dim = query.shape
    regions = tokens // query_block
    index = blocks.expand(batch, -1, -1, -1)[:, 0, :, :, None, None]

    def of_regions(x: Tensor, block: int) -> Tensor:  # (B, regions, tokens of one, channels)
        return x.transpose(1, 2).flatten(2).unflatten(1, (-1, block))

    def gathered(x: Tensor) -> Tensor:  # (B, regions, H, T * key_block, channels of a head)
        x = of_regions(x, key_block)
        places = index.expand(-1, -1, -1, *x.shape[2:])
        x = x.unsqueeze(1).expand(-1, regions, -1, -1, -1).gather(2, places).flatten(2, 3)
        return x.unflatten(-1, (heads, -1)).transpose(2, 3)

    rows = of_regions(query * dim**-0.5, query_block).unflatten(-1, (heads, -1)).transpose(2, 3)
    output = (rows @ gathered(key).mT).softmax(dim=-1) @ gathered(value)
    return output.transpose(2, 3).flatten(1, 2).transpose(1, 2)


def _make(formulation: Callable[..., Tensor], case: Case) -> Callable[..., Tensor]:
    query_block, key_block = case.options["query_block"], case.options["key_block"]

    def attend(query: Tensor, key: Tensor, value: Tensor, blocks: Tensor) -> Tensor:
        return formulation(query, key, value, blocks, query_block, key_block)

    return attend


def _make_flex(case: Case) -> Callable[..., Tensor]:
    """The mask of blocks is made once: that it changes with every image is left out of FlexAttention's time."""
    query_block, key_block = case.options["query_block"], case.options["key_block"]
    compiled: list[Callable[..., Tensor]] = []

    def attend(query: Tensor, key: Tensor, value: Tensor, blocks: Tensor) -> Tensor:
        if not compiled:
            mask = _flex_mask(blocks, query_block, key_block, key.shape[2])
            compiled.append(compiled_flex(mask, (query, key, value), heads=True))
        return compiled[0](query, key, value)

    return attend


# Blocks grow with the picture, too.
PUBLISHED_GATHER = Peer("published", partial(_make, published_routed_attention), growth=1.5)
GATHER = Peer("gather", partial(_make, gathered_routed_attention), growth=1.5)
FLEX_ROUTED = Peer("flex", _make_flex, flex_refusal, compiles=True, growth=1.5)
