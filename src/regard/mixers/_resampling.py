"""Tables with a row for each token of one grid, brought to the grid that is there."""

import math

import torch
from torch import Tensor

__all__ = ["resampled"]


def resampled(table: Tensor, base: tuple[int, int], grid: tuple[int, ...]) -> Tensor:
    """(prod(base), R) -> (prod(grid), R): linear interpolation between cell centres, means where there are fewer cells.

    A grid like the base gives the table itself, to the last bit. Along a sequence (rank 1) the base's cells are taken
    one after the other; the images of a video (rank 3) share one table.
    """
    if len(grid) == 1:
        return _linear(grid[0], math.prod(base), table) @ table
    height, width = grid[-2:]
    rows, columns = _linear(height, base[0], table), _linear(width, base[1], table)
    cells = torch.einsum("hi,wj,ijr->hwr", rows, columns, table.unflatten(0, base)).flatten(0, 1)
    return cells if len(grid) == 2 else cells.expand(grid[0], -1, -1).flatten(0, 1)


def _linear(new: int, old: int, like: Tensor) -> Tensor:
    """(new, old) weights of linear interpolation; rows sum to one: triangles as wide as the coarser cells."""
    step = old / new
    center = (torch.arange(new, device=like.device, dtype=like.dtype) + 0.5) * step
    place = torch.arange(old, device=like.device, dtype=like.dtype) + 0.5
    # The triangle's half width, max(step, 1), without asking which is larger: `new` may be open in a traced graph.
    half = center.new_ones(()) * step
    weights = (1.0 - (place - center.unsqueeze(1)).abs() / half.clamp(min=1.0)).clamp(min=0.0)
    return weights / weights.sum(dim=1, keepdim=True)
