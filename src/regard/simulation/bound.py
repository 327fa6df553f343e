"""The bound: how many key tiles a query tile must visit, over how many there are."""

import math
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache

from regard.simulation.pattern import NeighborhoodPattern, PatternError, Tiling
from regard.simulation.windows import group_lengths, window_bounds

__all__ = ["AxisVisits", "Simulation", "axis_visits", "simulate"]


@dataclass(frozen=True)
class Simulation:
    """The most that a pattern can gain over dense attention in the same tiles.

    Args:
        key_tiles: of the whole grid: what a query tile of dense attention visits.
        visited_most: key tiles that the busiest query tile visits.
        visited_mean: mean over query tiles.
        speedup: key_tiles / visited_most: the bound where every processor has one query tile, so the busiest decides.
        mean_speedup: key_tiles / visited_mean: the bound where each works through many of them.
        flop_speedup: all pairs of query and key over those that attend: the bound if no tile held a hidden key.
        end_to_end: what `speedup` makes of a whole model, given attention's share of its time.
    """

    key_tiles: int
    visited_most: int
    visited_mean: float
    speedup: float
    mean_speedup: float
    flop_speedup: float
    end_to_end: float

    @property
    def efficiency(self) -> float:
        """How much of the FLOP-wise bound the tiles reach; above 1 only where dense attention's last tile is padded."""
        return self.speedup / self.flop_speedup


@dataclass(frozen=True)
class AxisVisits:
    """One axis: key tiles in all, the most and the mean that a query tile visits, and all pairs over those attended."""

    tiles: int
    most: int
    mean: Fraction
    flop_speedup: Fraction

    @property
    def efficiency(self) -> Fraction:
        return Fraction(self.tiles, self.most) / self.flop_speedup


def simulate(pattern: NeighborhoodPattern, tiling: Tiling, *, attention_share: float = 1.0) -> Simulation:
    """Bound the speed-up of a neighborhood pattern over dense attention in the same tiles.

    A query tile visits the key tiles between the first key that its first row sees and the last that its last row sees.
    Axes are independent, so counts multiply. The rule is that of generalized neighborhood attention (arXiv
    2504.16922), whose published column it reproduces. Dilation makes interleaved groups, each with tiles of its own.

    Args:
        attention_share: of a dense model's time that its attention takes, in (0, 1].

    Raises:
        PatternError: the tiles have another number of axes than the grid, or the share is out of range.
    """
    tiling.check(len(pattern.grid_size))
    if not 0.0 < attention_share <= 1.0:
        raise PatternError("attention_share", f"expected a share in (0, 1], got {attention_share!r}")
    axes = [
        axis_visits(*axis, query, key, tiling.dynamic)
        for axis, query, key in zip(pattern.axes, tiling.query, tiling.key, strict=True)
    ]
    tiles, most = math.prod(one.tiles for one in axes), math.prod(one.most for one in axes)
    mean = math.prod((one.mean for one in axes), start=Fraction(1))
    speedup = tiles / most
    return Simulation(
        key_tiles=tiles,
        visited_most=most,
        visited_mean=float(mean),
        speedup=speedup,
        mean_speedup=float(tiles / mean),
        flop_speedup=float(math.prod((one.flop_speedup for one in axes), start=Fraction(1))),
        end_to_end=1.0 / (1.0 - attention_share + attention_share / speedup),
    )


@lru_cache(maxsize=1 << 16)
def axis_visits(
    length: int, window: int, stride: int, dilation: int, is_causal: bool, query: int, key: int, dynamic: bool
) -> AxisVisits:
    """Count along one axis, with `query` and `key` tokens a tile."""
    most = total = query_tiles = 0
    for tokens, groups in group_lengths(length, dilation):
        for row in range(0, tokens, query):
            # Neither end of a window moves back from one query to the next: the outer rows span the tile.
            low, _ = window_bounds(row, tokens, window, stride, is_causal)
            _, high = window_bounds(min(row + query, tokens) - 1, tokens, window, stride, is_causal)
            visited = -(-(high - low) // key) if dynamic else -(-high // key) - low // key
            most = max(most, visited)
            total += groups * visited
            query_tiles += groups
    pairs = _attended(length, window, stride, dilation, is_causal)
    return AxisVisits(-(-length // key), most, Fraction(total, query_tiles), Fraction(length * length, pairs))


@lru_cache(maxsize=1 << 12)
def _attended(length: int, window: int, stride: int, dilation: int, is_causal: bool) -> int:
    """Pairs of query and key that attend."""
    if not is_causal:
        return length * window
    pairs = 0
    for tokens, groups in group_lengths(length, dilation):
        for index in range(tokens):
            start, end = window_bounds(index, tokens, window, stride, is_causal)
            pairs += groups * (end - start)
    return pairs
