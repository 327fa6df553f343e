"""All that one `regard bench` found."""

import dataclasses
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Self

from regard.results._json import fields_of, to_json
from regard.results.environment import Environment

__all__ = ["BenchCell", "BenchStudy", "BenchTime", "Ceiling", "Growth", "growth_of"]

_SPAN = 5


@dataclass
class BenchTime:
    """What one contender took at one size. Times are medians of interleaved rounds with their quartiles.

    Args:
        name: `regard` for the operator itself, else the peer.
        slower, slower_low, slower_high: how many times longer it took than the operator: median and quartiles of the
            rounds' own ratios. 1 for the operator itself.
        peak_memory: bytes beyond inputs, outputs and gradients, in a process of its own; None if not measured.
        skipped: why there is no time; then all figures are NaN.
    """

    name: str
    seconds: float = math.nan
    seconds_low: float = math.nan
    seconds_high: float = math.nan
    repeats: int = 0
    slower: float = math.nan
    slower_low: float = math.nan
    slower_high: float = math.nan
    peak_memory: int | None = None
    skipped: str = ""


@dataclass
class BenchCell:
    """One operator at one size, in one dtype and direction.

    Args:
        label: of the size; series: what it has in common with the sizes that growth is told over.
        direction: "forward" or "forward+backward".
        gate: what the correctness gate said.
        passed: whether it is green; without it nothing was timed.
        backend: of the operator, that takes the call; empty if it does not tell.
        flops: useful operations of one run of the operator. bytes: of its inputs, outputs and gradients, each once.
        cosine: mean cosine of the outputs to those of dense attention; NaN for what does not stand in for it.
        times: the operator's first, then the peers'.
    """

    operator: str
    label: str
    series: str
    tokens: int
    batch: int
    heads: int
    head_dim: int
    dtype: str
    direction: str
    gate: str
    passed: bool
    backend: str = ""
    flops: float = math.nan
    bytes: int = 0
    cosine: float = math.nan
    times: list[BenchTime] = field(default_factory=list)

    @property
    def key(self) -> tuple[str, str, str, str]:
        """What no two cells share."""
        return (self.operator, self.label, self.dtype, self.direction)

    @property
    def own(self) -> BenchTime | None:
        """The operator's own time; None where the gate is red."""
        return self.times[0] if self.times else None

    @classmethod
    def from_dict(cls, fields: dict[str, Any]) -> Self:
        """The cell that `dataclasses.asdict` turned into `fields`. Raises ValueError if it is not one."""
        known = fields_of(cls, fields)
        known["times"] = [BenchTime(**fields_of(BenchTime, one)) for one in known.get("times", [])]
        return cls(**known)


@dataclass
class Ceiling:
    """The best rates that the machine reached in the same run: matrix product in FLOP/s, copy in bytes/s."""

    dtype: str
    flops_per_second: float
    bytes_per_second: float


@dataclass
class Growth:
    """Time over tokens as a power law, fitted to a series' large sizes: seconds ~ tokens ** exponent."""

    operator: str
    series: str
    dtype: str
    direction: str
    name: str
    exponent: float
    tokens_low: int
    tokens_high: int


@dataclass
class BenchStudy:
    """All that one `regard bench` found.

    Args:
        settings: what was asked.
        environment: where it ran.
        ceilings: one a dtype.
        growth: derived from `cells`.
        interrupted: the user stopped it before all was done.
        notes: what a reader must know beside the figures, one sentence each.
        command: the command that reproduces it.
    """

    settings: dict[str, Any]
    environment: Environment
    ceilings: list[Ceiling] = field(default_factory=list)
    cells: list[BenchCell] = field(default_factory=list)
    growth: list[Growth] = field(default_factory=list)
    interrupted: bool = False
    notes: list[str] = field(default_factory=list)
    command: str = ""

    def ceiling(self, dtype: str) -> Ceiling | None:
        """Of a dtype; None if it was not measured."""
        return next((one for one in self.ceilings if one.dtype == dtype), None)

    def to_json(self) -> str:
        return to_json(dataclasses.asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Self:
        """Read what `to_json` wrote. Raises ValueError if the text is no JSON or no such study."""
        known = fields_of(cls, json.loads(text))
        known["environment"] = Environment(**fields_of(Environment, known["environment"]))
        known["cells"] = [BenchCell.from_dict(one) for one in known.get("cells", [])]
        for name, kind in (("ceilings", Ceiling), ("growth", Growth)):
            known[name] = [kind(**fields_of(kind, one)) for one in known.get(name, [])]
        return cls(**known)


def growth_of(cells: Sequence[BenchCell]) -> list[Growth]:
    """The exponent of each contender in each series that has two sizes or more; least squares on log-log axes.

    Of the largest size and those down to a fifth of it (else the next one): fixed costs flatter small sizes.
    """
    lines: dict[tuple[Any, ...], list[tuple[int, float]]] = {}
    for cell in cells:
        for one in cell.times:
            if not one.skipped:
                shape = (cell.batch, cell.heads, cell.head_dim)
                key = (cell.operator, cell.series, cell.dtype, cell.direction, one.name, shape)
                lines.setdefault(key, []).append((cell.tokens, one.seconds))
    found = []
    for (operator, series, dtype, direction, name, _), points in lines.items():
        sizes = sorted({tokens for tokens, _ in points})
        if len(sizes) > 1:
            least = min(sizes[-2], sizes[-1] / _SPAN)
            points = [point for point in points if point[0] >= least]
            ends = min(points)[0], max(points)[0]
            found.append(Growth(operator, series, dtype, direction, name, _slope(points), *ends))
    return found


def _slope(points: Sequence[tuple[int, float]]) -> float:
    xs, ys = ([math.log(point[i]) for point in points] for i in range(2))
    x, y = sum(xs) / len(xs), sum(ys) / len(ys)
    return sum((a - x) * (b - y) for a, b in zip(xs, ys, strict=True)) / sum((a - x) ** 2 for a in xs)
