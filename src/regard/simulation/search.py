"""Which window, stride and tile near the asked ones come nearest to the FLOP-wise bound."""

import itertools
import math
from collections.abc import Collection, Iterator
from dataclasses import dataclass, replace

from regard.simulation.bound import Simulation, axis_visits, simulate
from regard.simulation.pattern import NeighborhoodPattern, PatternError, Tiling

__all__ = ["VARIED", "Candidate", "search"]

VARIED = ("window", "stride", "tile")
_MOST_VALUES = 48  # of a window or a stride along one axis; more are thinned out
_ALIKE = 1e-9  # logarithms of efficiency closer than this are the same


@dataclass(frozen=True)
class Candidate:
    """A pattern and its tiles.

    Args:
        change: how far windows and strides are from those asked for: doublings and halvings, summed over axes.
            Tiles change nothing that is computed, so they count nothing.
    """

    pattern: NeighborhoodPattern
    tiling: Tiling
    simulation: Simulation
    change: float


@dataclass(frozen=True)
class _Choice:
    """Windows and strides of the axes so far."""

    loss: float  # -log2 of the efficiency, at least 0
    change: float
    windows: tuple[int, ...] = ()
    strides: tuple[int, ...] = ()


def search(
    pattern: NeighborhoodPattern,
    tiling: Tiling,
    *,
    near: float = 0.25,
    vary: Collection[str] = VARIED,
    step: float = 0.05,
    attention_share: float = 1.0,
) -> list[Candidate]:
    """Patterns that come ever nearer to their FLOP-wise bound, the one asked for first, the nearest last.

    No other pattern that was looked at comes as near with less change. Looked at are windows within `near` of the asked
    one and every stride up to the window (of long ones the powers of two and multiples of tiles), in every shape of
    tiles that holds as many tokens as the asked one; but none that is slower: not tiles that slow down the pattern
    asked for, nor a window and stride that slow down their axis in the same tiles.

    Args:
        near: how far a window may be from the asked one, as a fraction of it.
        vary: which of "window", "stride" and "tile" may change.
        step: by how much a pattern must be more efficient than the one before it to be told, the last one excepted.
        attention_share: as in `simulate`.

    Raises:
        PatternError: as in `simulate`, and for `near` or `step` below 0 or an unknown name in `vary`.
    """
    if not 0.0 <= near < math.inf:
        raise PatternError("near", f"expected a fraction of the window, at least 0, got {near!r}")
    if not 0.0 <= step < math.inf:
        raise PatternError("step", f"expected a fraction of the efficiency, at least 0, got {step!r}")
    if unknown := sorted(set(vary) - set(VARIED)):
        raise PatternError("vary", f"expected some of {', '.join(VARIED)}, got {unknown[0]!r}")
    asked = Candidate(pattern, tiling, simulate(pattern, tiling, attention_share=attention_share), 0.0)
    found: list[tuple[_Choice, float, Tiling]] = []
    for tiles in _tilings(pattern, tiling) if "tile" in vary else [tiling]:
        if simulate(pattern, tiles).speedup < asked.simulation.speedup:
            continue
        moved = _distance(tiling.query + tiling.key, tiles.query + tiles.key)
        choices = [_Choice(0.0, 0.0)]
        for axis in range(len(pattern.grid_size)):
            options = _axis_choices(pattern, tiles, axis, near, vary)
            choices = _front(
                _Choice(
                    left.loss + right.loss,
                    left.change + right.change,
                    left.windows + right.windows,
                    left.strides + right.strides,
                )
                for left, right in itertools.product(choices, options)
            )
        found += [(one, moved, tiles) for one in choices]
    # Of equals the tiles nearest to those asked for.
    found.sort(key=lambda one: (round(one[0].change, 9), round(one[0].loss, 9), one[1]))
    least, told = -math.log2(min(asked.simulation.efficiency, 1.0)), [asked]
    front: list[tuple[_Choice, Tiling]] = []
    for choice, _, tiles in found:
        if choice.loss < (front[-1][0].loss if front else least) - _ALIKE:
            front.append((choice, tiles))
    for choice, tiles in front:
        if choice.loss < least - math.log2(1.0 + step) or choice is front[-1][0]:
            least = choice.loss
            changed = replace(pattern, kernel_size=choice.windows, stride=choice.strides)
            simulation = simulate(changed, tiles, attention_share=attention_share)
            told.append(Candidate(changed, tiles, simulation, choice.change))
    return told


def _axis_choices(
    pattern: NeighborhoodPattern, tiles: Tiling, axis: int, near: float, vary: Collection[str]
) -> list[_Choice]:
    """The windows and strides of one axis that are worth a look, in these tiles."""
    length, window, stride, dilation, causal = pattern.axes[axis]
    query, key = tiles.query[axis], tiles.key[axis]
    windows = _windows(window, near, length // dilation, query, key) if "window" in vary else [window]
    slowest = axis_visits(*pattern.axes[axis], query, key, tiles.dynamic).most
    choices = []
    for wide in windows:
        strides = _strides(stride, wide, query) if "stride" in vary else [min(stride, wide)]
        for step in strides:
            visits = axis_visits(length, wide, step, dilation, causal, query, key, tiles.dynamic)
            if visits.most > slowest:
                continue
            loss = max(0.0, -math.log2(visits.efficiency))
            choices.append(_Choice(loss, _distance((window, stride), (wide, step)), (wide,), (step,)))
    return _front(choices)


def _front(choices: Iterator[_Choice] | list[_Choice]) -> list[_Choice]:
    """Those for which no other is both nearer to the bound and nearer to what was asked."""
    kept: list[_Choice] = []
    for one in sorted(choices, key=lambda one: (one.change, one.loss, one.windows, one.strides)):
        if not kept or one.loss < kept[-1].loss - _ALIKE:
            kept.append(one)
    return kept


def _windows(window: int, near: float, longest: int, query: int, key: int) -> list[int]:
    low, high = max(1, math.ceil(window * (1 - near))), min(longest, math.floor(window * (1 + near)))
    values = range(low, high + 1)
    if len(values) > _MOST_VALUES:
        # Those that fill whole key tiles, for a stride of the query tile and for a stride of 1.
        fitting = {tiles * key - shift for tiles in range(1, high // key + 2) for shift in (0, query - 1)}
        values = sorted(fitting & set(values))[:: max(1, len(fitting) // _MOST_VALUES)]  # type: ignore[assignment]
    return sorted({*values, window})


def _strides(stride: int, window: int, query: int) -> list[int]:
    if window <= _MOST_VALUES:
        return list(range(1, window + 1))
    powers = {1 << power for power in range(window.bit_length())}
    multiples = set(range(query, window + 1, max(query, window // _MOST_VALUES)))
    return sorted(one for one in {*powers, *multiples, stride, window} if one <= window)


def _tilings(pattern: NeighborhoodPattern, tiling: Tiling) -> Iterator[Tiling]:
    rank = len(pattern.grid_size)
    shapes = [
        [one for one in _factors(math.prod(asked), rank) if _fits(one, pattern) or one == asked]
        for asked in (tiling.query, tiling.key)
    ]
    for query, key in itertools.product(*shapes):
        yield Tiling(query, key, tiling.dynamic)


def _factors(product: int, rank: int) -> Iterator[tuple[int, ...]]:
    """All ordered ways to write a product with `rank` factors."""
    if rank == 1:
        yield (product,)
        return
    for first in (one for one in range(1, product + 1) if product % one == 0):
        for rest in _factors(product // first, rank - 1):
            yield (first, *rest)


def _fits(tile: tuple[int, ...], pattern: NeighborhoodPattern) -> bool:
    return all(one <= length for one, length in zip(tile, pattern.grid_size, strict=True))


def _distance(asked: tuple[int, ...], found: tuple[int, ...]) -> float:
    """Doublings and halvings from one to the other, summed."""
    return sum(abs(math.log2(theirs / mine)) for mine, theirs in zip(asked, found, strict=True))
