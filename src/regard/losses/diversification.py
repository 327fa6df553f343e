"""The attention diversification loss (arXiv 2303.11126): how alike the rows of an attention map are.

With A_i the row of query i, mean over the heads, and s the mean of all rows, both with what does not exceed
threshold / M set to zero, the loss is the mean over i of the cosine of A_i and s. A cosine is linear in the normed row,

    mean_i cos(A_i, s) = (mean_i A_i / |A_i|) . s / |s|,

so two sums over the rows, of M numbers each, are all that has to be kept: any block of rows adds to them and is
forgotten, and its backward needs no other rows either.
"""

import numbers
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from regard.ops._arguments import autocast_off, canonical_mask, check_scale, check_tensors, fold
from regard.ops._counts import check_count
from regard.ops._selection import raised, softmax_of_kept

__all__ = ["attention_diversification", "attention_diversification_of"]

_EPS = 1e-8  # the least length that divides, as in torch.nn.functional.cosine_similarity
_HIDDEN = float("-inf")

# Logits (B, H, n, M) of n queries -> which keys each of them keeps, boolean; None: all that are not hidden.
Keep = Callable[[Tensor], Tensor | None]


def attention_diversification(weights: Tensor, threshold: float = 2.0) -> Tensor:
    """The loss of explicit attention maps.

    Args:
        weights: (B, H, N, M), rows non-negative. Half types are raised to float32.
        threshold: tau; weights of at most tau / M count as zero. The heads' mean is compared, not a single head.

    Returns:
        A scalar in [0, 1]: the mean over pictures and queries. 1 where all rows point one way, 0 where no weight or no
        column exceeds the threshold.

    Raises:
        TypeError: weights is no floating tensor, threshold no number.
        ValueError: weights has other than four dimensions, threshold is negative.
    """
    if not isinstance(weights, Tensor) or not weights.is_floating_point():
        found = weights.dtype if isinstance(weights, Tensor) else type(weights).__name__
        raise TypeError(f"weights: expected a floating tensor (batch, heads, queries, keys), got {found}")
    if weights.dim() != 4:
        raise ValueError(f"weights: expected (batch, heads, queries, keys), got shape {tuple(weights.shape)}")
    check_threshold(threshold)
    queries, keys = weights.shape[-2:]
    floor = threshold / max(keys, 1)
    return _cosine(*_columns(raised(weights).mean(dim=1), floor), queries, floor)


def attention_diversification_of(
    query: Tensor,
    key: Tensor,
    *,
    threshold: float = 2.0,
    attn_mask: Tensor | None = None,
    is_causal: bool = False,
    scale: float | None = None,
    keep: Keep | None = None,
    block_size: int = 128,
) -> Tensor:
    """The loss of the maps that queries and keys make, without the maps.

    Rows are formed `block_size` queries at a time, in float32 for half types, and formed again in the backward; between
    blocks 2 B M numbers are kept. Value and gradients are those of `attention_diversification`.

    Args:
        query: (..., H, N, D).
        key: (..., H, M, D).
        threshold: as in attention_diversification.
        attn_mask: boolean (True = attend) or floating (added to the logits), broadcastable to (..., H, N, M).
        is_causal: query i sees keys 0 ... i only. Combines with attn_mask.
        scale: factor of the logits, 1 / sqrt(D) if None.
        keep: (B, H, n, M) logits of some queries, hidden keys -inf -> which keys each of them keeps, or None for all
            that are not hidden; softmax runs over those. It must judge every row by itself. None: all, always.
        block_size: queries a block.

    Raises:
        TypeError, ValueError: an argument of the wrong type or out of range, or shapes that do not fit.
    """
    check_tensors(query, key, key, True)
    if query.shape[-3] != key.shape[-3]:
        raise ValueError(f"key: {key.shape[-3]} heads, the query has {query.shape[-3]}; use key.repeat_interleave")
    check_scale(scale)
    check_threshold(threshold)
    check_count("block_size", block_size)
    mask = None if attn_mask is None else canonical_mask(attn_mask, query, key)
    query, key = fold(query), fold(key)
    queries, keys = query.shape[2], key.shape[2]
    floor = threshold / max(keys, 1)
    rows = _Rows(query.shape[-1] ** -0.5 if scale is None else scale, is_causal, keep, floor)
    size = (query.shape[0], keys)
    total = torch.zeros(size, dtype=raised(query[:0]).dtype, device=query.device)
    directions = total
    for start in range(0, queries, block_size):
        some = slice(start, start + block_size)
        part = mask[:, :, some] if mask is not None and mask.shape[2] > 1 else mask
        sums = checkpoint(rows, query[:, :, some], key, part, start, use_reentrant=False, preserve_rng_state=False)
        total, directions = total + sums[0], directions + sums[1]
    return _cosine(total, directions, queries, floor)


def check_threshold(threshold: float) -> None:
    """Raise unless `threshold` is a number of at least 0."""
    if isinstance(threshold, bool) or not isinstance(threshold, numbers.Real):
        raise TypeError(f"threshold: expected a number, got {type(threshold).__name__}")
    if not threshold >= 0.0:  # NaN lands here too
        raise ValueError(f"threshold: expected at least 0 (in multiples of 1 / keys), got {threshold}")


@dataclass(frozen=True, eq=False)  # torch 2.11's Dynamo hashes it before it has fields
class _Rows:
    """What `n` queries (B, H, n, D), from number `start` on, add to the two sums over all rows."""

    scale: float
    is_causal: bool
    keep: Keep | None
    floor: float

    def __call__(self, query: Tensor, key: Tensor, mask: Tensor | None, start: int) -> tuple[Tensor, Tensor]:
        with autocast_off(query.device.type):
            logits = (raised(query) * self.scale) @ raised(key).transpose(-1, -2)
            if mask is not None:
                boolean = mask.dtype == torch.bool
                logits = logits.masked_fill(~mask, _HIDDEN) if boolean else logits + mask.to(logits.dtype)
            if self.is_causal:
                earlier = torch.ones(logits.shape[-2:], dtype=torch.bool, device=logits.device).tril(start)
                logits = logits.masked_fill(~earlier, _HIDDEN)
            kept = None if self.keep is None else self.keep(logits.detach())
            if kept is None and (mask is not None or self.is_causal):
                kept = logits.detach() != _HIDDEN
            weights = logits.softmax(dim=-1) if kept is None else softmax_of_kept(logits, kept)
            return _columns(weights.mean(dim=1), self.floor)


def _columns(rows: Tensor, floor: float) -> tuple[Tensor, Tensor]:
    """(B, n, M) -> (B, M) each: the sum of the rows, and of the directions of what exceeds the floor in them."""
    kept = rows.where(rows > floor, 0.0)
    length = torch.linalg.vector_norm(kept, dim=-1, keepdim=True).clamp_min(_EPS)
    return rows.sum(dim=1), (kept / length).sum(dim=1)


def _cosine(total: Tensor, directions: Tensor, queries: int, floor: float) -> Tensor:
    """The mean over pictures of the mean over queries of the cosine to the thresholded mean row."""
    count = max(queries, 1)
    mean = total / count
    mean = mean.where(mean > floor, 0.0)
    length = torch.linalg.vector_norm(mean, dim=-1).clamp_min(_EPS)
    similarity = (directions * mean).sum(dim=-1) / (length * count)
    return similarity.sum() / max(similarity.shape[0], 1)
