"""TransNeXt's attentions (arXiv 2311.17132): cosines with a temperature that grows with the number of keys, a learned
query beside each token's own, and position biases from coordinates; optionally a mixture of heads (arXiv 2410.11842).

Everything that depends on the image's size is computed from the grid at hand, in float32 or, in double models, float64.
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from regard.backbones._pyramid import Grid
from regard.mixers.moh import HeadRouter

__all__ = ["AggregatedAttention", "CosineAttention", "PositionBias"]

_TEMPERATURE = 1 / 0.24  # at the start, after the softplus
_BIAS_HIDDEN = 512
_EXTENT = 8.0  # coordinates of the grid seen in training span -8 ... 8


class PositionBias(nn.Module):
    """A bias for each head, query and pooled key, an MLP of their offset on the grid.

    Offsets are divided by the extent of the grid seen in training and bent by a logarithm, so that larger grids
    extrapolate little. Each distinct offset is computed once.

    Args:
        num_heads: heads H.
        trained_grid: the grid in training, (height, width).
    """

    def __init__(self, num_heads: int, trained_grid: Grid, **factory: Any) -> None:
        super().__init__()
        self.trained_grid = trained_grid
        self.fc1 = nn.Linear(2, _BIAS_HIDDEN, **factory)
        self.fc2 = nn.Linear(_BIAS_HIDDEN, num_heads, **factory)

    def forward(self, grid: Grid, pooled: Grid) -> Tensor:
        """(H, N, P) for the N cells of a grid and the P cells to which it is pooled."""
        axes = [_offsets(*sizes, self.fc1.weight) for sizes in zip(grid, pooled, self.trained_grid, strict=True)]
        (rows, row), (columns, column) = axes
        table = torch.stack(torch.meshgrid(rows, columns, indexing="ij"), dim=-1).to(self.fc1.weight.dtype)
        table = self.fc2(F.relu(self.fc1(table))).permute(2, 0, 1)
        return table[:, row[:, None, :, None], column[None, :, None, :]].flatten(3).flatten(1, 2)


def _offsets(length: int, bins: int, trained: int, like: Tensor) -> tuple[Tensor, Tensor]:
    """Along one axis: the distinct offsets of a query from the centre of a pooled key, and which one each pair has.

    Args:
        length: queries. bins: pooled keys, cells of adaptive average pooling. trained: queries in training.
        like: has the dtype and the device.

    Returns:
        (U,) bent offsets, and (length, bins) indices into them.
    """
    device = like.device
    bin_ = torch.arange(bins, device=device)
    first, last = bin_ * length // bins, ((bin_ + 1) * length + bins - 1) // bins - 1
    # In halves of a cell, as centres may lie between two cells.
    offset = 2 * torch.arange(length, device=device)[:, None] - (first + last)
    step = 2 if length % bins == 0 else 1  # then all centres lie alike
    lowest = -((bins - 1) * length // bins + length - 1)
    highest = 2 * (length - 1) - ((length + bins - 1) // bins - 1)
    distinct = torch.arange(lowest, highest + 1, step, device=device).to(_wide(like.dtype)) / 2
    distinct = distinct / max(trained - 1, 1) * _EXTENT
    bent = distinct.sign() * torch.log2(distinct.abs() + 1.0) / math.log2(_EXTENT)
    return bent, (offset - lowest) // step


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


class _Cosine(nn.Module):
    """What both attentions share: scaled queries, gates of heads, the projection."""

    def __init__(
        self,
        dim: int,
        num_heads: int,
        trained_grid: Grid,
        heads: tuple[int, int] | None,
        attn_drop: float,
        proj_drop: float,
        **factory: Any,
    ) -> None:
        super().__init__()
        if dim % num_heads:
            raise ValueError(f"num_heads: dim {dim} is no multiple of {num_heads} heads")
        self.dim, self.num_heads, self.head_dim = dim, num_heads, dim // num_heads
        self.temperature = nn.Parameter(torch.full((num_heads, 1, 1), math.log(math.expm1(_TEMPERATURE)), **factory))
        self.query_embedding = nn.Parameter(torch.empty(num_heads, 1, self.head_dim, **factory))
        nn.init.trunc_normal_(self.query_embedding, std=0.02)
        self.position_bias = PositionBias(num_heads, trained_grid, **factory)
        self.attn_drop = nn.Dropout(attn_drop)
        self.proj = nn.Linear(dim, dim, **factory)
        self.proj_drop = nn.Dropout(proj_drop)
        self.router = HeadRouter(dim, num_heads, *heads, **factory) if heads is not None else None

    def _split(self, x: Tensor, parts: int) -> tuple[Tensor, ...]:
        """(B, N, parts * C) -> `parts` tensors (B, H, N, D)."""
        return x.unflatten(-1, (parts, self.num_heads, self.head_dim)).permute(2, 0, 3, 1, 4).unbind(0)

    def _scaled(self, query: Tensor, log_length: Tensor | float) -> Tensor:
        """Unit queries (B, H, N, D), as they enter the product with unit keys; log_length: of the number of keys."""
        return (query + self.query_embedding) * F.softplus(self.temperature) * log_length

    def _joined(self, x: Tensor, mixed: Tensor) -> Tensor:
        """The heads' answers (B, H, N, D) to the tokens x, gated where there is a router, as (B, N, C)."""
        if self.router is not None:
            mixed = mixed * self.router(x).gates[..., None].to(mixed.dtype)
        return self.proj_drop(self.proj(mixed.transpose(1, 2).flatten(2)))


class CosineAttention(_Cosine):
    """Every token sees every token of the grid, through scaled cosines and position biases (TransNeXt's last stage).

    Args:
        dim: channels C. num_heads: heads H.
        trained_grid: the grid in training, to which position biases refer.
        heads: (shared, routed) of a mixture of heads; None: all heads answer, without gates.
        attn_drop, proj_drop: dropout of the weights and of the output.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        trained_grid: Grid,
        heads: tuple[int, int] | None = None,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
        **factory: Any,
    ) -> None:
        super().__init__(dim, num_heads, trained_grid, heads, attn_drop, proj_drop, **factory)
        self.qkv = nn.Linear(dim, 3 * dim, **factory)

    def forward(self, x: Tensor, grid_size: Grid) -> Tensor:
        """(B, N, C) of a grid of N cells -> (B, N, C)."""
        query, key, value = self._split(self.qkv(x), 3)
        query = self._scaled(F.normalize(query, dim=-1), math.log(x.shape[1]))
        mixed = F.scaled_dot_product_attention(
            query,
            F.normalize(key, dim=-1),
            value,
            attn_mask=self.position_bias(grid_size, grid_size)[None].to(query.dtype),
            dropout_p=self.attn_drop.p if self.training else 0.0,
            scale=1.0,
        )
        return self._joined(x, mixed)


class AggregatedAttention(_Cosine):
    """Every token sees the window around it, cell by cell, and the whole grid, pooled, in one softmax (TransNeXt).

    Windows are cut off at the border, and the temperature grows with the logarithm of the number of keys that are left.
    To the window's weights a learned function of the query is added after the softmax, so that weights need not sum to
    one. The pooled keys are activated, averaged and normed projections of the tokens.

    Args:
        reduction: r: the grid is pooled to a grid r times smaller, at least one cell.
        window_size: odd.
        The rest is as in CosineAttention.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        trained_grid: Grid,
        heads: tuple[int, int] | None = None,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
        *,
        reduction: int,
        window_size: int = 3,
        **factory: Any,
    ) -> None:
        super().__init__(dim, num_heads, trained_grid, heads, attn_drop, proj_drop, **factory)
        if window_size < 1 or window_size % 2 == 0:
            raise ValueError(f"window_size: expected an odd number, got {window_size}")
        self.reduction = reduction
        self.window_size = window_size
        cells = window_size**2
        self.q = nn.Linear(dim, dim, **factory)
        self.kv = nn.Linear(dim, 2 * dim, **factory)
        self.pool_proj = nn.Conv2d(dim, dim, 1, **factory)
        self.pool_norm = nn.LayerNorm(dim, **factory)  # eps 1e-5
        self.local_bias = nn.Parameter(torch.empty(num_heads, cells, **factory))
        self.local_tokens = nn.Parameter(torch.empty(num_heads, self.head_dim, cells, **factory))
        self.local_tokens_bias = nn.Parameter(torch.zeros(num_heads, 1, cells, **factory))
        nn.init.trunc_normal_(self.local_bias, std=0.0004)
        nn.init.trunc_normal_(self.local_tokens, std=0.02)

    def forward(self, x: Tensor, grid_size: Grid) -> Tensor:
        """(B, N, C) of a grid of N cells -> (B, N, C)."""
        height, width = (max(1, size // self.reduction) for size in grid_size)
        pooled_size = (height, width)
        pooled_key, pooled_value = self._split(self.kv(self._pooled(x, grid_size, pooled_size)), 2)
        (query,), (key, value) = self._split(self.q(x), 1), self._split(self.kv(x), 2)
        query = F.normalize(query, dim=-1)
        inside = _inside(grid_size, self.window_size, x.device)
        length = inside.sum(-1, keepdim=True) + height * width
        scaled = self._scaled(query, length.to(_wide(x.dtype)).log().to(query.dtype))

        near = torch.stack(
            [(scaled * cell).sum(-1) for cell in self._window(F.normalize(key, dim=-1), grid_size)], dim=-1
        )
        near = (near + self.local_bias[:, None]).masked_fill(~inside, float("-inf"))
        far = scaled @ F.normalize(pooled_key, dim=-1).mT + self.position_bias(grid_size, pooled_size)
        weights = self.attn_drop(torch.cat([near, far], dim=-1).softmax(dim=-1))
        near, far = weights.split([near.shape[-1], far.shape[-1]], dim=-1)
        near = near + query @ self.local_tokens + self.local_tokens_bias

        mixed = far @ pooled_value
        for weight, cell in zip(near.unbind(-1), self._window(value, grid_size), strict=True):
            mixed = mixed + weight[..., None] * cell
        return self._joined(x, mixed)

    def _pooled(self, x: Tensor, grid: Grid, pooled: Grid) -> Tensor:
        """(B, N, C) -> (B, P, C)."""
        x = F.gelu(self.pool_proj(x.transpose(1, 2).unflatten(2, grid)))
        return self.pool_norm(F.adaptive_avg_pool2d(x, pooled).flatten(2).transpose(1, 2))

    def _window(self, x: Tensor, grid: Grid) -> list[Tensor]:
        """(B, H, N, D) -> for each cell of the window, row by row, what lies there: (B, H, N, D), zero outside."""
        (height, width), radius = grid, self.window_size // 2
        x = F.pad(x.unflatten(2, grid), (0, 0, radius, radius, radius, radius))
        return [
            x[:, :, row : row + height, column : column + width].flatten(2, 3)
            for row in range(self.window_size)
            for column in range(self.window_size)
        ]


def _inside(grid: Grid, window_size: int, device: torch.device) -> Tensor:
    """(N, window_size^2): which cells of each token's window lie on the grid."""
    steps = torch.arange(window_size, device=device) - window_size // 2
    places = [torch.arange(size, device=device)[:, None] + steps for size in grid]
    rows, columns = ((place >= 0) & (place < size) for place, size in zip(places, grid, strict=True))
    return (rows[:, None, :, None] & columns[None, :, None, :]).flatten(2).flatten(0, 1)
