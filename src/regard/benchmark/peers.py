"""Other ways to compute what regard's operators compute, written from their equations: what to measure them against."""

import torch
from torch import Tensor

from regard.ops._counts import share_of
from regard.ops.knn.api import check_topk

__all__ = ["published_knn_attention"]


def published_knn_attention(
    query: Tensor, key: Tensor, value: Tensor, topk: int | float, scale: float | None = None
) -> Tensor:
    """k-NN attention the way KVT (arXiv 2106.00515) computes it, from its equations.

    All logits; the indices of each row's `topk` largest; a float32 mask of zeros, one scattered at those indices;
    logits where the mask is positive, else -inf; softmax; product with the values. Several N x M buffers, and ties go
    anywhere.

    Args:
        query: (B, H, N, D). key: (B, H, M, D). value: (B, H, M, D_v).
        topk, scale: as in regard.knn_attention.

    Returns:
        (B, H, N, D_v).
    """
    check_topk(topk)
    logits = query @ key.transpose(-2, -1) * (query.shape[-1] ** -0.5 if scale is None else scale)
    largest = logits.topk(share_of(topk, key.shape[-2]), dim=-1).indices
    mask = torch.zeros_like(logits, dtype=torch.float32).scatter_(-1, largest, 1.0)
    hidden = torch.full_like(logits, float("-inf"))
    return torch.where(mask > 0, logits, hidden).softmax(dim=-1) @ value
