"""Attention maps in one number a head."""

import math

import torch
from torch import Tensor

__all__ = ["entropy", "mean_attention_distance"]


def entropy(maps: Tensor) -> Tensor:
    """How widely a head spreads its weights: the mean over queries of each row's entropy.

    Args:
        maps: (..., N, M) attention weights, rows summing to one.

    Returns:
        (...) in nats: 0 for one key alone, log k for k keys alike.

    Raises:
        ValueError: maps has fewer than two dimensions.
    """
    if maps.dim() < 2:
        raise ValueError(f"maps: expected (..., queries, keys), got shape {tuple(maps.shape)}")
    return torch.special.entr(maps).sum(dim=-1).mean(dim=-1)


def mean_attention_distance(maps: Tensor, grid_size: tuple[int, ...]) -> Tensor:
    """How far a head looks: the mean distance between query and key, weighted by attention.

    Tokens before the grid (class, registers) have no place: neither their rows nor the weight that goes to them counts.

    Args:
        maps: (..., N, N) attention weights.
        grid_size: the grid of the last prod(grid_size) tokens, such as (height, width).

    Returns:
        (...) in tokens; NaN where no weight stays on the grid.

    Raises:
        ValueError: maps is not square in its last two dimensions, or has fewer tokens than the grid.
    """
    if maps.dim() < 2 or maps.shape[-1] != maps.shape[-2]:
        raise ValueError(f"maps: expected (..., N, N), got shape {tuple(maps.shape)}")
    prefix = maps.shape[-1] - math.prod(grid_size)
    if prefix < 0 or any(size < 1 for size in grid_size):
        raise ValueError(f"grid_size: {tuple(grid_size)} is no grid within the {maps.shape[-1]} tokens of maps")
    axes = [torch.arange(size, device=maps.device, dtype=maps.dtype) for size in grid_size]
    places = torch.cartesian_prod(*axes).reshape(-1, len(axes))
    on_grid = maps[..., prefix:, prefix:]
    distances = (places[:, None] - places[None]).square().sum(dim=-1).sqrt()
    return (on_grid * distances).sum(dim=(-1, -2)) / on_grid.sum(dim=(-1, -2))
