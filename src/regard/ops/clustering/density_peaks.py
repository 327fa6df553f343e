"""Density peak clustering in blocks of distances that stay in the cache: never an N x N matrix."""

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple, overload

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from regard.ops._arguments import DTYPES, autocast_off
from regard.ops._counts import check_count
from regard.ops._dispatch import Operator
from regard.ops.clustering.backends import BACKENDS, Grouping, has_kernels
from regard.ops.clustering.reference import largest_count

__all__ = ["Clusters", "check_tokens", "density_peak_clusters"]

_TILE = 5 << 20  # bytes of distances at a time; measured, together with the groups below, on 3,136 tokens
_TILE_ACCELERATOR = 256 << 20  # where launching costs more than memory
_CENTRED_ON = 8  # or a few more: tokens whose median the distances are computed around


class Clusters(NamedTuple):
    """A grouping of tokens.

    Args:
        assignment: (B, N) int64: which cluster each token is in, 0 <= assignment < M.
        centers: (B, M) int64: the token at the centre of each cluster.
    """

    assignment: Tensor
    centers: Tensor


@overload
def density_peak_clusters(
    x: Tensor, num_clusters: int, *, neighbors: int = 5, mask: Tensor | None = None
) -> Clusters: ...


@overload
def density_peak_clusters(
    x: Tensor, num_clusters: Sequence[int], *, neighbors: int = 5, mask: Tensor | None = None
) -> tuple[Clusters, ...]: ...


def density_peak_clusters(
    x: Tensor, num_clusters: int | Sequence[int], *, neighbors: int = 5, mask: Tensor | None = None
) -> Clusters | tuple[Clusters, ...]:
    """Group tokens around density peaks, as ClusTR does (arXiv 2208.13138; density peaks: Rodriguez and Laio, 2014).

    A token is the denser the nearer its nearest `neighbors` tokens are (itself among them). Centres are tokens that are
    dense and far from every denser one; all others join the nearest centre. `density_peaks_reference` defines it,
    ties and tokens that are not finite included: they are nobody's neighbour, are centres only where too few others
    are, and join the first cluster. Tokens exactly alike but for rounding may fall to either side of a tie.

    Nothing is random, no image sees another, and the grouping has no gradient. Memory beyond input and output is
    B N (C + neighbors) entries and one tile of distances. Half types are computed in float32.

    Args:
        x: (B, N, C).
        num_clusters: M, or several of them: their centres are found in one pass, and the centres of a smaller count are
            the first of a larger one's.
        neighbors: how many nearest tokens make the density, the token itself among them; at most all.
        mask: (B, N) boolean, True = takes part. Tokens that do not are treated as those that are not finite.

    Returns:
        Clusters, or a tuple of them if num_clusters is a sequence. Clusters are numbered in descending order of their
        centres' density times distance; each holds its own centre, so none is empty.

    Raises:
        TypeError: x is no floating tensor, or num_clusters, neighbors or mask is of another type.
        ValueError: x is not (B, N, C), C is 0, num_clusters is not within 1 ... N, neighbors is below 1, or the mask's
            shape is another.
    """
    call = _bind(x, num_clusters, neighbors=neighbors, mask=mask)
    counts = call.arguments[1]
    assignments, centers = _OPERATOR.run(call)
    found = tuple(Clusters(one, centers[:, :count]) for one, count in zip(assignments.unbind(0), counts, strict=True))
    return found if isinstance(num_clusters, Sequence) else found[0]


def _bind(x: Tensor, num_clusters: int | Sequence[int], *, neighbors: int = 5, mask: Tensor | None = None) -> Grouping:
    """Raises as density_peak_clusters says."""
    check_tokens(x)
    counts = list(num_clusters) if isinstance(num_clusters, Sequence) else [num_clusters]
    if not counts:
        raise ValueError("num_clusters: expected at least one count, got an empty sequence")
    for count in counts:
        check_count("num_clusters", count)
        if isinstance(count, int) and count > x.shape[1]:  # a size that torch.export leaves open is not asked
            raise ValueError(f"num_clusters: {count} clusters of {x.shape[1]} tokens; give at most as many as tokens")
    check_count("neighbors", neighbors)
    if mask is not None:
        _check_mask(mask, x)
    return Grouping(torch.ops.regard.density_peak_clusters, (x.detach(), counts, neighbors, mask))


_OPERATOR = Operator("density_peak_clusters", _bind, BACKENDS)


def check_tokens(x: Tensor) -> None:
    """Raise unless x is a floating tensor (B, N, C)."""
    if not isinstance(x, Tensor):
        raise TypeError(f"x: expected a tensor, got {type(x).__name__}")
    if x.dtype not in DTYPES:
        raise TypeError(f"x: expected float32, bfloat16, float16 or float64, got {x.dtype}")
    if x.dim() != 3 or x.shape[-1] == 0:
        raise ValueError(f"x: expected (batch, tokens, channels), got shape {tuple(x.shape)}")


def _check_mask(mask: Tensor, x: Tensor) -> None:
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
        found = mask.dtype if isinstance(mask, Tensor) else type(mask).__name__
        raise TypeError(f"mask: expected a boolean tensor (True = takes part), got {found}")
    if mask.shape != x.shape[:2]:
        raise ValueError(f"mask: expected shape {tuple(x.shape[:2])}, as x has tokens, got {tuple(mask.shape)}")
    if mask.device != x.device:
        raise ValueError(f"mask: on {mask.device}, x on {x.device}; move one of them")


# One node in a compiled graph: the loops below depend on sizes, and how much is left for the second pass on the data.
torch.library.define(
    "regard::density_peak_clusters",
    "(Tensor x, SymInt[] num_clusters, SymInt neighbors, Tensor? mask) -> (Tensor assignments, Tensor centers)",
)


@torch.library.register_fake("regard::density_peak_clusters")
def _fake(x: Tensor, num_clusters: list[int], neighbors: int, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    batch, tokens, _ = x.shape
    return (
        x.new_empty((len(num_clusters), batch, tokens), dtype=torch.int64),
        x.new_empty((batch, largest_count(num_clusters)), dtype=torch.int64),
    )


@register_flop_formula(torch.ops.regard.density_peak_clusters)
def _flops(x: tuple[int, ...], num_clusters: list[int], *rest: object, **kwargs: object) -> int:
    """Every pairwise distance once, and those to the centres; the few repeated for the nearest denser are left out."""
    batch, tokens, channels = x
    return 2 * batch * tokens * (tokens + max(num_clusters)) * channels


def _streamed(x: Tensor, num_clusters: list[int], neighbors: int, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    batch, tokens, channels = x.shape
    assignments, centers = _fake(x, num_clusters, neighbors, mask)
    # A few samples at a time, so that the copies of them stay in the cache, too; kernels spread them over threads.
    step = batch if has_kernels(x) else max(1, _room(x) // (tokens * (tokens + 4 * channels)))
    with torch.no_grad(), autocast_off(x.device.type):
        for start in range(0, batch, max(1, step)):
            part = slice(start, start + step)
            space = _Space(x[part], None if mask is None else mask[part], min(neighbors, tokens))
            centers[part] = _centers(space)[:, : max(num_clusters)]
            _assign(space, centers[part], num_clusters, assignments[:, part])
    return assignments, centers


torch.library.impl("regard::density_peak_clusters", "CompositeExplicitAutograd", _streamed)


def _room(x: Tensor) -> int:
    """How many numbers of the dtype that is computed in make a tile."""
    return (_TILE if x.device.type == "cpu" else _TILE_ACCELERATOR) // (8 if x.dtype == torch.float64 else 4)


class _Space:
    """Tokens laid out so that one matrix product gives squared distances, less those of the row's token to the origin.

    |x_i - x_j|^2 - |x_i|^2 = [-2 x_i, 1] . [x_j, |x_j|^2]: one channel more, and no pass over the distances to add
    anything. Tokens that take no part lie infinitely far from all, and so does what pads the columns to whole groups.
    """

    def __init__(self, x: Tensor, mask: Tensor | None, neighbors: int) -> None:
        x = x if x.dtype == torch.float64 else x.float()
        batch, tokens, channels = x.shape
        self.part = torch.linalg.vector_norm(x, dim=-1).square().isfinite()
        if mask is not None:
            self.part = self.part & mask
        if not bool(self.part.all()):
            x = x.masked_fill(~self.part[..., None], 0.0)
        # Distances do not change when all tokens are moved, rounding does: it grows with the distance to the origin. A
        # median is one of the data's own numbers, so equal tokens and small whole numbers stay exact.
        some = x[:, :: max(1, tokens // _CENTRED_ON)].sort(dim=1).values  # torch.median is not deterministic on CUDA
        x = x - some[:, some.shape[1] // 2, None]
        self.norms = x.square().sum(-1)
        # The nearest lie in the groups with the nearest members; this many make both sorts as short as can be.
        self.neighbors = neighbors
        self.groups = max(neighbors, min(tokens, math.isqrt(neighbors * tokens)))
        self.group_size = -(-tokens // self.groups)
        self.rows = x.new_ones(batch, tokens, channels + 1)
        torch.mul(x, -2.0, out=self.rows[..., :channels])
        self.padded = x.new_zeros(batch, self.groups * self.group_size, channels + 1)
        self.columns = self.padded[:, :tokens]
        self.columns[..., :channels] = x
        self.columns[..., channels] = self.norms.masked_fill(~self.part, math.inf)
        self.padded[:, tokens:, channels] = math.inf
        self.tokens = self.columns[..., :channels]
        self.kernels = has_kernels(x)
        self._room = _room(x)
        self._buffer = x.new_empty(0)

    def blocks(self, rows: int, columns: int) -> Iterator[tuple[slice, slice]]:
        """(samples, rows) of tiles: some rows of one sample, or all rows of several."""
        batch, room = self.rows.shape[0], max(1, self._room // max(columns, 1))
        samples = max(1, room // max(rows, 1))
        # Blocks of even height: a narrow last one would run at a fraction of the speed.
        height = -(-rows // -(-rows // min(room, rows))) if rows else 1
        for sample in range(0, batch, samples):
            for row in range(0, rows, height):
                yield slice(sample, min(sample + samples, batch)), slice(row, min(row + height, rows))

    def product(self, rows: Tensor, columns: Tensor) -> Tensor:
        """rows @ columns, in the one tile that every product uses: fresh memory costs more than filling it."""
        shape = (*rows.shape[:2], columns.shape[2])
        if self._buffer.numel() < math.prod(shape):
            self._buffer = rows.new_empty(math.prod(shape))
        return torch.bmm(rows, columns, out=self._buffer[: math.prod(shape)].view(shape))


def _centers(space: _Space) -> Tensor:
    """(B, N) all tokens in the order in which they become centres."""
    squares, nearest = _neighbors(space)
    channels = space.rows.shape[-1] - 1
    counted = squares.isfinite()
    mean = squares.masked_fill(~counted, 0.0).double().sum(-1) / counted.sum(-1) / channels
    mean = mean.masked_fill(~space.part, math.inf)
    delta = _nearest_denser(space, mean, squares, nearest)
    score = (delta.double().log() / 2 - mean).clamp(min=torch.finfo(torch.float64).min)
    return score.masked_fill(~space.part, -math.inf).sort(dim=-1, descending=True, stable=True).indices


# Each pairwise product once, in the C++ kernel. `part`: the tokens that are others' neighbours.
torch.library.define(
    "regard::nearest_tokens", "(Tensor x, Tensor part, int neighbors) -> (Tensor squares, Tensor nearest)"
)
_MOST_NEIGHBORS = 64  # of the kernel: it keeps sorted lists


def _neighbors(space: _Space) -> tuple[Tensor, Tensor]:
    """The smallest squared distances of each token, itself among them, and to whom: (B, N, neighbors) each.

    In no particular order; infinite where a token has fewer neighbours.
    """
    if space.kernels and 2 <= space.neighbors <= _MOST_NEIGHBORS:
        return torch.ops.regard.nearest_tokens(space.tokens, space.part, space.neighbors)
    batch, tokens, _ = space.rows.shape
    count, groups, size = space.neighbors, space.groups, space.group_size
    squares = space.norms.new_empty(batch, tokens, count)
    nearest = torch.empty(batch, tokens, count, dtype=torch.int64, device=squares.device)
    for samples, rows in space.blocks(tokens, size * groups):
        tile = space.product(space.rows[samples, rows], space.padded[samples].mT)
        norms = space.norms[samples, rows]
        torch.diagonal(tile, rows.start, 1, 2).copy_(-norms)  # to itself it is 0, whatever the rounding says
        grouped = tile.unflatten(-1, (size, groups))
        group = grouped.amin(2).topk(count, dim=-1, largest=False, sorted=False).indices
        members = grouped.gather(3, group[:, :, None].expand(-1, -1, size, -1)).flatten(2)
        smallest = members.topk(count, dim=-1, largest=False, sorted=False)
        squares[samples, rows] = (smallest.values + norms[..., None]).clamp_min_(0.0)
        nearest[samples, rows] = smallest.indices // count * groups + group.gather(2, smallest.indices % count)
    return squares, nearest


def _nearest_denser(space: _Space, mean: Tensor, squares: Tensor, nearest: Tensor) -> Tensor:
    """(B, N) squared distance to the nearest denser token; infinite for the densest.

    (Published: the densest token takes the largest distance of all. It is the first centre either way.)

    For most tokens one of the neighbours is denser, and then the nearest such one is the answer. The rest are ranked,
    and see only the columns of denser tokens.
    """
    tokens = mean.shape[1]
    order = mean.sort(dim=-1, stable=True).indices  # the densest first, of equals the lower index
    rank = torch.empty_like(order).scatter_(1, order, torch.arange(tokens, device=order.device).expand_as(order))
    others = rank.gather(1, nearest.clamp(max=tokens - 1).flatten(1)).view_as(nearest)
    delta = squares.masked_fill(others >= rank[..., None], math.inf).amin(-1)
    unknown = delta.isinf() & space.part & (rank > 0)
    place = torch.where(unknown, rank, tokens)  # what is known already goes to the end
    place, index = place.sort(dim=-1)
    rows_left = int(unknown.sum(-1).max())
    if rows_left == 0:
        return delta
    place, index = place[:, :rows_left], index[:, :rows_left]
    left = space.rows.gather(1, index[..., None].expand(-1, -1, space.rows.shape[-1]))
    right = space.columns.gather(1, order[..., None].expand_as(space.columns))
    found = torch.empty_like(place, dtype=delta.dtype)
    for samples, rows in space.blocks(rows_left, tokens):
        ranks = place[samples, rows]
        ranked = ranks[ranks < tokens]
        if ranked.numel() == 0:
            found[samples, rows] = math.inf
            continue
        first, last = int(ranked.min()), int(ranked.max())
        tile = space.product(left[samples, rows], right[samples, :last].mT)
        columns = torch.arange(first, last, device=tile.device)
        tile[..., first:].masked_fill_(columns >= ranks[..., None], math.inf)
        found[samples, rows] = tile.amin(-1).masked_fill_(ranks == tokens, math.inf)
    found = (found + space.norms.gather(1, index)).clamp_min_(0.0)
    return delta.scatter_reduce(1, index, found, "amin")


def _assign(space: _Space, centers: Tensor, num_clusters: list[int], assignments: Tensor) -> None:
    """Write the nearest of the first M centres, for each count M, into (counts, B, N)."""
    _join_nearest(space, centers, num_clusters, assignments)
    for assignment, count in zip(assignments, num_clusters, strict=True):
        assignment.masked_fill_(~space.part, 0)
        own = torch.arange(count, device=centers.device).expand(centers.shape[0], -1)
        assignment.scatter_(1, centers[:, :count], own)


def _join_nearest(space: _Space, centers: Tensor, num_clusters: list[int], assignments: Tensor) -> None:
    tokens = space.part.shape[1]
    if space.kernels:
        channels = space.tokens.shape[-1]
        for assignment, count in zip(assignments, num_clusters, strict=True):
            chosen = space.tokens.gather(1, centers[:, :count, None].expand(-1, -1, channels))
            assignment.copy_(torch.ops.regard.kmeans_nearest(space.tokens, chosen))
        return
    columns = space.columns.gather(1, centers[..., None].expand(-1, -1, space.columns.shape[-1])).mT
    for samples, rows in space.blocks(tokens, centers.shape[1]):
        tile = space.product(space.rows[samples, rows], columns[samples])
        for assignment, count in zip(assignments, num_clusters, strict=True):
            assignment[samples, rows] = tile[..., :count].argmin(-1)
