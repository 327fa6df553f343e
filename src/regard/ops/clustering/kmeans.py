"""k-means with a fixed number of iterations from a deterministic start: the clusters of multipole attention."""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from regard.ops._arguments import autocast_off
from regard.ops._counts import check_count
from regard.ops._dispatch import Operator
from regard.ops._selection import raised
from regard.ops.clustering.backends import BACKENDS, Grouping, has_kernels
from regard.ops.clustering.sums import cluster_sums

__all__ = [
    "KMeansClusters",
    "assign_at_once",
    "kmeans_clusters",
    "kmeans_operator",
    "lloyd",
    "spread_over_grid",
    "start_tokens",
]

# Elements of one block of distances: a few MB, whatever the number of tokens.
_BLOCK = 1 << 20


class KMeansClusters(NamedTuple):
    """Args:
    assignment: (..., N) int64, each token's cluster.
    centroids: (..., M, C), the clusters' means before the last assignment; an empty cluster keeps its last one.
    """

    assignment: Tensor
    centroids: Tensor


def kmeans_clusters(
    x: Tensor,
    num_clusters: int,
    *,
    iterations: int = 2,
    grid_size: Sequence[int] | None = None,
    mask: Tensor | None = None,
) -> KMeansClusters:
    """Group tokens around their means (Lloyd's iterations), deterministically and without gradient.

    The start is one token for each cluster, spread evenly over the image or, without `grid_size`, over the sequence:
    neighbours in an image are neighbours in feature space, too. All tokens are assigned to the nearest of them (ties:
    lowest cluster); each iteration then moves the centroids to their clusters' means and assigns again. A cluster that
    lost its tokens stays where it was, and may gain some again. With as many clusters as tokens each token is its own.

    Args:
        x: (..., N, C) tokens. Half types are computed in float32.
        num_clusters: M, from 1 to N.
        iterations: how often the centroids move, 0 or more.
        grid_size: the grid of the N tokens, of any rank; spreads the start over it.
        mask: (..., N) boolean, broadcastable: tokens that are False neither start nor move a centroid (the start is
            then spread over the sequence of the others); they are assigned, too.

    Returns:
        assignment and centroids; O(N C + M C) memory beside one block of distances.

    Raises:
        TypeError: x is no floating tensor; num_clusters or iterations is no int; mask is not boolean.
        ValueError: num_clusters or iterations out of range, grid_size or mask does not fit.
    """
    call = _bind(x, num_clusters, iterations=iterations, grid_size=grid_size, mask=mask)
    return KMeansClusters(*_OPERATOR.run(call))


def _bind(
    x: Tensor,
    num_clusters: int,
    *,
    iterations: int = 2,
    grid_size: Sequence[int] | None = None,
    mask: Tensor | None = None,
) -> Grouping:
    """Raises as kmeans_clusters says."""
    _check(x, num_clusters, iterations, mask)
    tokens = x.shape[-2]
    if grid_size is not None and math.prod(grid_size) != tokens:
        raise ValueError(f"grid_size: {tuple(grid_size)} has {math.prod(grid_size)} cells, x has {tokens} tokens")
    if mask is not None:
        mask = mask.expand(x.shape[:-1])
    grid = None if grid_size is None else list(grid_size)
    return Grouping(kmeans_operator, (x.detach(), mask, num_clusters, iterations, grid))


_OPERATOR = Operator("kmeans_clusters", _bind, BACKENDS)


def _check(x: Tensor, num_clusters: int, iterations: int, mask: Tensor | None) -> None:
    if not isinstance(x, Tensor) or not x.is_floating_point():
        raise TypeError(f"x: expected a floating tensor, got {x.dtype if isinstance(x, Tensor) else type(x).__name__}")
    if x.dim() < 2 or x.shape[-1] == 0:
        raise ValueError(f"x: expected (..., tokens, channels), got shape {tuple(x.shape)}")
    check_count("num_clusters", num_clusters)
    check_count("iterations", iterations, least=0)
    if (
        isinstance(num_clusters, int) and num_clusters > x.shape[-2]
    ):  # a size that torch.export leaves open is not asked
        raise ValueError(f"num_clusters: {num_clusters} clusters of {x.shape[-2]} tokens; give at most one a token")
    if mask is not None:
        if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
            found = mask.dtype if isinstance(mask, Tensor) else type(mask).__name__
            raise TypeError(f"mask: expected a boolean tensor (True = counts), got {found}")
        full = tuple(x.shape[:-1])
        if mask.dim() > len(full) or any(m not in (1, n) for m, n in zip(mask.shape[::-1], full[::-1], strict=False)):
            raise ValueError(f"mask: shape {tuple(mask.shape)} does not broadcast to (..., N) = {full}")


@functools.lru_cache(maxsize=256)
def spread_over_grid(grid_size: tuple[int, ...], count: int) -> tuple[int, ...]:
    """`count` cells of a grid, spread evenly over it: flat indices.

    The grid is halved along its longest side, and the count shared in proportion, until one cell of each part is asked
    for: the middle one.
    """
    if len(grid_size) == 1:
        return tuple((2 * i + 1) * grid_size[0] // (2 * count) for i in range(count))
    found: list[int] = []

    def divide(low: tuple[int, ...], high: tuple[int, ...], share: int) -> None:
        if share == 1:
            flat = 0
            for first, last, size in zip(low, high, grid_size, strict=True):
                flat = flat * size + (first + last) // 2
            found.append(flat)
            return
        sides = [last - first for first, last in zip(low, high, strict=True)]
        axis = max(range(len(sides)), key=lambda i: sides[i])
        middle = (low[axis] + high[axis]) // 2
        cells = math.prod(sides)
        left = cells // sides[axis] * (middle - low[axis])
        # No part gets more than its cells, or nothing.
        mine = min(max(round(share * left / cells), share - (cells - left), 1), left, share - 1)
        divide(low, (*high[:axis], middle, *high[axis + 1 :]), mine)
        divide((*low[:axis], middle, *low[axis + 1 :]), high, share - mine)

    divide((0,) * len(grid_size), tuple(grid_size), count)
    return tuple(found)


def start_tokens(x: Tensor, mask: Tensor | None, num_clusters: int, grid_size: list[int] | None) -> Tensor:
    """(B, M) indices of the tokens from which the centroids start."""
    batch, tokens, _ = x.shape
    if mask is None and grid_size is not None:
        spread = spread_over_grid(tuple(grid_size), num_clusters)
        return torch.tensor(spread, device=x.device).expand(batch, num_clusters)
    middles = 2 * torch.arange(num_clusters, device=x.device) + 1
    if mask is None:
        return (middles * tokens // (2 * num_clusters)).expand(batch, num_clusters)
    order = torch.argsort(mask, dim=-1, descending=True, stable=True)
    return order.gather(1, middles * mask.sum(dim=-1, keepdim=True) // (2 * num_clusters))


def assign_at_once(x: Tensor, centroids: Tensor) -> Tensor:
    """(B, N) nearest centroids: argmin of |c|^2 - 2 x c."""
    squares = centroids.square().sum(dim=-1).unsqueeze(1)
    return torch.baddbmm(squares, x, centroids.mT, alpha=-2).argmin(dim=-1)


def _assign(x: Tensor, centroids: Tensor) -> Tensor:
    """The same in blocks of tokens."""
    rows = max(1, _BLOCK // max(1, x.shape[0] * centroids.shape[1]))
    return torch.cat([assign_at_once(part, centroids) for part in x.split(rows, dim=1)], dim=1)


def _shown(x: Tensor, mask: Tensor | None) -> Tensor:
    return x if mask is None else x.masked_fill(~mask.unsqueeze(-1), 0.0)


def _move(x: Tensor, mask: Tensor | None, assignment: Tensor, centroids: Tensor) -> Tensor:
    """The means of the clusters; where one has no tokens, its centroid as it was."""
    counted = torch.ones_like(x[..., :1]) if mask is None else mask.unsqueeze(-1).to(x.dtype)
    counts = cluster_sums(counted, assignment, centroids.shape[1])
    sums = cluster_sums(_shown(x, mask), assignment, centroids.shape[1])
    return torch.where(counts > 0, sums / counts.clamp(min=1), centroids)


# The iterations alone, from given centroids: what the C++ kernel computes.
torch.library.define(
    "regard::kmeans_lloyd",
    "(Tensor x, Tensor? mask, Tensor start, int iterations) -> (Tensor assignment, Tensor centroids)",
)
# The assignment alone, distances computed around the origin: the last step of density peak clustering.
torch.library.define("regard::kmeans_nearest", "(Tensor x, Tensor centroids) -> Tensor")
torch.library.define(
    "regard::kmeans",
    "(Tensor x, Tensor? mask, SymInt num_clusters, int iterations, SymInt[]? grid_size)"
    " -> (Tensor assignment, Tensor centroids)",
)
kmeans_operator = torch.ops.regard.kmeans


def _kmeans(
    x: Tensor, mask: Tensor | None, num_clusters: int, iterations: int, grid_size: list[int] | None
) -> tuple[Tensor, Tensor]:
    lead = x.shape[:-2]
    x = x.reshape(-1, *x.shape[-2:])
    mask = None if mask is None else mask.reshape(-1, x.shape[1])
    found = _folded_kmeans(x, mask, num_clusters, iterations, grid_size)
    return found[0].reshape(*lead, x.shape[1]), found[1].reshape(*lead, num_clusters, x.shape[2])


def _folded_kmeans(
    x: Tensor, mask: Tensor | None, num_clusters: int, iterations: int, grid_size: list[int] | None
) -> tuple[Tensor, Tensor]:
    if num_clusters == x.shape[1]:
        own = torch.arange(num_clusters, device=x.device).repeat(x.shape[0], 1)
        return own, x.to(torch.promote_types(x.dtype, torch.float32), copy=True)
    with autocast_off(x.device.type):
        start = start_tokens(x, mask, num_clusters, grid_size).unsqueeze(-1).expand(-1, -1, x.shape[-1])
        if has_kernels(x):
            return torch.ops.regard.kmeans_lloyd(x, mask, x.gather(1, start).float().contiguous(), iterations)
        return lloyd(x, mask, start, iterations)


def lloyd(
    x: Tensor,
    mask: Tensor | None,
    start: Tensor,
    iterations: int,
    assign: Callable[[Tensor, Tensor], Tensor] = _assign,
) -> tuple[Tensor, Tensor]:
    """Assignment and centroids.

    Args:
        x: (B, N, C). mask: (B, N), or None.
        start: (B, M, C) the tokens from which the centroids start.
        assign: gives the nearest centroids.
    """
    x = raised(x)
    # Distances do not change with the origin; near the mean they lose fewest digits.
    seen = x.shape[1] if mask is None else mask.sum(dim=1).clamp(min=1)[:, None, None]
    origin = _shown(x, mask).sum(dim=1, keepdim=True) / seen
    x = x - origin
    centroids = x.gather(1, start)
    assignment = assign(x, centroids)
    for _ in range(iterations):
        centroids = _move(x, mask, assignment, centroids)
        assignment = assign(x, centroids)
    return assignment, centroids + origin


@torch.library.register_fake("regard::kmeans")
def _fake(
    x: Tensor, mask: Tensor | None, num_clusters: int, iterations: int, grid_size: list[int] | None
) -> tuple[Tensor, Tensor]:
    compute = torch.promote_types(x.dtype, torch.float32)
    assignment = x.new_empty(x.shape[:-1], dtype=torch.int64)
    return assignment, x.new_empty((*x.shape[:-2], num_clusters, x.shape[-1]), dtype=compute)


torch.library.impl("regard::kmeans", "CompositeExplicitAutograd", _kmeans)


@torch.library.register_vmap("regard::kmeans")
def _vmap(
    info: Any, in_dims: tuple[Any, ...], x: Tensor, mask: Tensor | None, *options: Any
) -> tuple[tuple[Tensor, Tensor], tuple[int, int]]:
    """The mapped dimension is one more of the leading ones."""

    def mapped(tensor: Tensor, place: int | None) -> Tensor:
        return tensor.expand(info.batch_size, *tensor.shape) if place is None else tensor.movedim(place, 0)

    mask = None if mask is None else mapped(mask, in_dims[1])
    return kmeans_operator(mapped(x, in_dims[0]), mask, *options), (0, 0)


@register_flop_formula(kmeans_operator)
def kmeans_flops(
    x: tuple[int, ...], mask: object, num_clusters: int, iterations: int, *rest: object, **kwargs: object
) -> int:
    """The distances' products, once for each assignment: 2 N M C."""
    return 2 * math.prod(x) * num_clusters * (iterations + 1)
