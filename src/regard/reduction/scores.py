"""How much a layer attends to each token: what decides which tokens stay. No N x N matrix is kept."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

__all__ = ["SCORES", "class_scores", "mean_scores", "unreadable"]

# Queries whose softmax rows `mean_scores` holds at a time.
_ROWS = 256


def unreadable(attn: nn.Module) -> str | None:
    """Why the queries and keys of an attention module cannot be read off its parameters; None if they can."""
    kind, num_heads, head_dim = type(attn).__name__, getattr(attn, "num_heads", None), getattr(attn, "head_dim", None)
    if num_heads is None or head_dim is None or not hasattr(attn, "scale"):
        return f"{kind} has no num_heads, head_dim and scale as timm's Attention has"
    qkv = getattr(attn, "qkv", None)
    parts = [qkv] if qkv is not None else [getattr(attn, name, None) for name in ("q_proj", "k_proj")]
    for part in parts:
        if type(part) is not nn.Linear:
            return f"the projections of {kind} are no plain torch.nn.Linear (named qkv, or q_proj and k_proj)"
    rows = num_heads * head_dim * (3 if qkv is not None else 1)
    if any(part.out_features != rows for part in parts):  # type: ignore[union-attr]
        return f"the projections of {kind} are not those of {num_heads} heads of {head_dim} channels for every part"
    return None


def _projection(attn: Any, part: int) -> tuple[Tensor, Tensor | None]:
    """Weight (H * D, C) and bias of the queries (0) or keys (1)."""
    qkv = getattr(attn, "qkv", None)
    if qkv is None:
        linear = attn.k_proj if part else attn.q_proj
        return linear.weight, linear.bias
    bias = None if qkv.bias is None else qkv.bias.chunk(3)[part]
    if bias is None:  # EVA holds its biases apart
        bias = getattr(attn, "k_bias" if part else "q_bias", None)
    return qkv.weight.chunk(3)[part], bias


def _query(attn: Any, x: Tensor) -> Tensor:
    """(B, N, C) -> (B, H, N, D): queries times the scale."""
    query = F.linear(x, *_projection(attn, 0)).unflatten(-1, (attn.num_heads, -1)).transpose(1, 2)
    return _normed(attn, "q_norm", query) * attn.scale


def _key(attn: Any, x: Tensor) -> Tensor:
    """(B, N, C) -> (B, H, N, D)."""
    key = F.linear(x, *_projection(attn, 1)).unflatten(-1, (attn.num_heads, -1)).transpose(1, 2)
    return _normed(attn, "k_norm", key)


def _normed(attn: Any, name: str, heads: Tensor) -> Tensor:
    norm = getattr(attn, name, None)
    return heads if norm is None else norm(heads)


def _softmax(logits: Tensor) -> Tensor:
    return logits.softmax(dim=-1, dtype=torch.promote_types(logits.dtype, torch.float32))


def class_scores(attn: Any, x: Tensor) -> Tensor:
    """The first token's softmax row, averaged over the heads: how much the class token attends to each token.

    O(N C H): the query is taken through the key's weights once, and then meets the tokens themselves. The key's bias
    adds the same to the whole row, which softmax ignores. Where keys are normed they have to be computed: O(N C^2).

    Args:
        attn: the attention module. x: (B, N, C), its input.

    Returns:
        (B, N), at least float32; each row sums to one.
    """
    query = _query(attn, x[:, :1])
    if isinstance(getattr(attn, "k_norm", None), nn.Identity | None):
        weight = _projection(attn, 1)[0].unflatten(0, (attn.num_heads, -1))
        logits = torch.einsum("bhd,hdc->bhc", query.squeeze(2), weight) @ x.transpose(1, 2)
    else:
        logits = (query @ _key(attn, x).transpose(-2, -1)).squeeze(2)
    return _softmax(logits).mean(dim=1)


def mean_scores(attn: Any, x: Tensor) -> Tensor:
    """The softmax rows of all tokens, averaged over tokens and heads: how much each token is attended to.

    O(N^2 C) time; the memory of some rows at a time, in training too, where the rows are computed again.

    Args:
        attn: the attention module. x: (B, N, C), its input.

    Returns:
        (B, N), at least float32; each row sums to one.
    """
    query, key = _query(attn, x), _key(attn, x)
    if x.shape[1] <= _ROWS:
        return _column_sums(query, key) / x.shape[1]
    again = torch.is_grad_enabled() and query.requires_grad
    sums = [
        checkpoint(_column_sums, rows, key, use_reentrant=False) if again else _column_sums(rows, key)
        for rows in query.split(_ROWS, dim=2)
    ]
    return torch.stack(sums).sum(dim=0) / x.shape[1]


def _column_sums(query: Tensor, key: Tensor) -> Tensor:
    return _softmax(query @ key.transpose(-2, -1)).mean(dim=1).sum(dim=1)


SCORES: dict[str, Callable[[Any, Tensor], Tensor]] = {"class": class_scores, "mean": mean_scores}
