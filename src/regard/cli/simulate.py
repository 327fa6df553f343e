"""`regard simulate`: the bound that tiles put on a neighborhood pattern, and the patterns that come nearest to it."""

import dataclasses
import json
import sys
from dataclasses import dataclass
from typing import Annotated, Any

import tyro

from regard.studies.settings import SettingsError

__all__ = ["Simulate"]

# What kernels of generalized neighborhood attention take: (query tile, key tile) by the grid's rank.
_TILES = {1: ("128", "128"), 2: ("16x8", "16x8"), 3: ("4x8x8", "2x8x8")}


@dataclass(frozen=True)
class Simulate:
    """Bound the speed-up of neighborhood attention over dense attention: tiles that exist over tiles that are visited.

    Nothing is measured. Sizes are written as 30x48x80; one number stands for all axes.

    Args:
        grid: Tokens along 1 to 3 axes, such as 30x48x80.
        kernel_size: Window along each axis.
        stride: Queries in a row that share a window.
        dilation: Step between the keys of a window.
        causal: Axes along which a query sees nothing behind itself: 'all', or their numbers, such as 0 or 0,1.
        query_tile: Queries that a kernel takes at a time; 128, 16x8 or 4x8x8 if not given.
        key_tile: Keys that it takes at a time; 128, 16x8 or 2x8x8 if not given.
        dynamic: Key tiles begin where the windows begin, not at multiples of the tile.
        share: Attention's share of the dense model's time, for the end-to-end bound.
        search: Also look for windows, strides and tiles nearby that come nearer to the FLOP-wise bound.
        vary: What the search may change: window, stride or tile; all three if not given.
        near: How far a window may be from the asked one, as a fraction of it.
        json: Print JSON instead of a table.
    """

    grid: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="GRID")]
    kernel_size: str
    stride: str = "1"
    dilation: str = "1"
    causal: str = ""
    query_tile: str | None = None
    key_tile: str | None = None
    dynamic: bool = False
    share: float = 1.0
    search: bool = False
    vary: Annotated[tuple[str, ...], tyro.conf.UseAppendAction] = ()
    near: float = 0.25
    json: bool = False

    def __call__(self) -> int:
        from regard.simulation import VARIED, Candidate, PatternError, search, simulate

        try:
            pattern, tiling = self._asked()
            if self.search:
                asked: dict[str, Any] = {"near": self.near, "vary": self.vary or VARIED, "attention_share": self.share}
                found = search(pattern, tiling, **asked)
            else:
                simulation = simulate(pattern, tiling, attention_share=self.share)
                found = [Candidate(pattern, tiling, simulation, 0.0)]
        except PatternError as error:
            option = {"grid_size": "grid", "is_causal": "causal", "attention_share": "share"}
            raise SettingsError(option.get(error.argument, error.argument), error.problem) from None
        if self.json:
            print(json.dumps([_plain(one) for one in found], indent=1))
        else:
            _print(found, self.share)
        return 0

    def _asked(self) -> tuple[Any, Any]:
        """The pattern and the tiles."""
        from regard.simulation import NeighborhoodPattern, Tiling

        grid = _sizes("grid", self.grid)
        rank = len(grid)
        tiles = _TILES.get(rank, ("1", "1"))
        pattern = NeighborhoodPattern(
            grid,
            _sizes("kernel_size", self.kernel_size, rank),
            _sizes("stride", self.stride, rank),
            _sizes("dilation", self.dilation, rank),
            _flags(self.causal, rank),
        )
        query, key = self.query_tile or tiles[0], self.key_tile or tiles[1]
        return pattern, Tiling(_sizes("query_tile", query, rank), _sizes("key_tile", key, rank), self.dynamic)


def _sizes(option: str, text: str, rank: int | None = None) -> tuple[int, ...]:
    """`30x48x80` as numbers; one number for all axes where the rank is known."""
    try:
        sizes = tuple(int(one) for one in text.lower().replace(",", "x").split("x"))
    except ValueError:
        raise SettingsError(option, f"expected whole numbers such as 30x48x80, got {text!r}") from None
    return sizes * rank if rank is not None and len(sizes) == 1 else sizes


def _flags(text: str, rank: int) -> tuple[bool, ...]:
    if text == "all":
        return (True,) * rank
    try:
        axes = {int(one) for one in text.split(",") if one}
    except ValueError:
        axes = {rank}
    if any(not 0 <= axis < rank for axis in axes):
        raise SettingsError("causal", f"expected 'all' or numbers of axes from 0 to {rank - 1}, got {text!r}")
    return tuple(axis in axes for axis in range(rank))


def _plain(one: Any) -> dict[str, Any]:
    fields = dataclasses.asdict(one)
    fields["simulation"]["efficiency"] = one.simulation.efficiency
    return fields


def _print(found: list[Any], share: float) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    asked = found[0]
    console = Console(file=sys.stdout, highlight=False, markup=False)
    console.print(_described(asked), soft_wrap=True)
    table = Table(box=box.SIMPLE_HEAD, padding=0)
    headings = ["window", "stride", "query\ntile", "key\ntile", "bound", "mean", "FLOPs", "reached"]
    headings += ["model"] if share < 1.0 else []
    for i, heading in enumerate(headings):
        table.add_column(heading, justify="left" if i < 4 else "right", no_wrap=True)
    for one in found:
        result = one.simulation
        values = (one.pattern.kernel_size, one.pattern.stride, one.tiling.query, one.tiling.key)
        before = (asked.pattern.kernel_size, asked.pattern.stride, asked.tiling.query, asked.tiling.key)
        cells = [Text(_times(new), style="bold" * (new != old)) for new, old in zip(values, before, strict=True)]
        speeds = [f"{speed:.2f}x" for speed in (result.speedup, result.mean_speedup, result.flop_speedup)]
        model = [f"{result.end_to_end:.2f}x"] if share < 1.0 else []
        table.add_row(*cells, *speeds, f"{100 * result.efficiency:.0f} %", *model)
    console.print(table)
    notes = [
        "bound: key tiles that exist over those that the busiest query tile visits",
        "mean: the same, over the mean of all query tiles",
        "FLOPs: pairs of query and key over those that attend",
        "reached: bound over FLOPs",
    ]
    if share < 1.0:
        notes.append(f"model: the bound end to end, attention taking {100 * share:g} % of the time")
    if len(found) > 1:
        notes.append("Each line comes nearer to its bound than all that change window and stride less.")
    console.print("\n".join(notes))


def _described(one: Any) -> str:
    pattern, result = one.pattern, one.simulation
    parts = [f"{_times(pattern.grid_size)} tokens, window {_times(pattern.kernel_size)}"]
    if any(step > 1 for step in pattern.dilation):
        parts.append(f"dilation {_times(pattern.dilation)}")
    if any(pattern.is_causal):
        parts.append(f"causal along {', '.join(str(i) for i, flag in enumerate(pattern.is_causal) if flag)}")
    kind = "dynamic" if one.tiling.dynamic else "static"
    return (
        f"{', '.join(parts)}: of {result.key_tiles:,} {kind} key tiles a query tile visits {result.visited_most:,} "
        f"at most, {result.visited_mean:,.1f} on average"
    )


def _times(sizes: tuple[int, ...]) -> str:
    return "x".join(map(str, sizes))
