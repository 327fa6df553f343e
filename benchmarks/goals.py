"""Judge what `regard bench` found by what this project set out to reach.

    regard bench --dtype float32 --dtype bfloat16 --patience 30 --weights vit_s14.safetensors
    python benchmarks/goals.py regard-bench/bench.json --markdown docs/benchmarks.md

Exits with 1 if a goal is not met. Goals of multipole attention are for the queries and keys of a trained model: the
head of benchmarks/conversion.py tells where such weights come from.
"""

import sys
from dataclasses import dataclass
from pathlib import Path

import tyro
from rich.console import Console
from rich.table import Table

from regard.markdown import markdown_table
from regard.report.bench import bench_markdown
from regard.results import BenchCell, BenchStudy, write_text

HEADS = ["what", "goal", "found", ""]


@dataclass(frozen=True)
class Goal:
    """At least this many times faster than a peer at one size."""

    operator: str
    label: str
    direction: str
    peer: str
    ratio: float
    dtype: str = "float32"
    cosine: float = 0.0  # to dense attention, at least


@dataclass(frozen=True)
class Bound:
    """At most so much peak memory in bytes or as a share of a peer's, or so large a growth exponent."""

    operator: str
    label: str  # of a size; of a series for growth
    direction: str
    bytes: float | None = None
    exponent: float | None = None
    peer: str = ""
    share: float = 1.0
    dtype: str = "float32"


FORWARD, BOTH = "forward", "forward+backward"

GOALS = (
    Goal("knn", "N 4,096, k = N/16", FORWARD, "sdpa", 1.6),
    Goal("knn", "N 4,096, k = N/2", FORWARD, "sdpa", 1.0),
    Goal("knn", "N 1,024, k = N/2", FORWARD, "sdpa", 1.0),
    Goal("knn", "N 196, B 8, k = N/2", FORWARD, "sdpa", 1 / 1.2),
    Goal("knn", "N 4,096, k = N/16", FORWARD, "published", 8.0),
    Goal("knn", "N 4,096, k = N/2", FORWARD, "published", 8.0),
    Goal("knn", "N 1,024, k = N/2", FORWARD, "published", 8.0),
    Goal("knn", "N 196, B 8, k = N/2", FORWARD, "published", 3.0),
    Goal("knn", "N 4,096, k = N/16", BOTH, "sdpa", 2.0),
    Goal("knn", "N 4,096, k = N/16", FORWARD, "float32", 1.0, "bfloat16"),
    Goal("knn", "N 4,096, k = N/2", FORWARD, "float32", 1.0, "bfloat16"),
    Goal("knn", "N 1,024, k = N/2", FORWARD, "float32", 1.0, "bfloat16"),
    Goal("knn", "N 196, B 8, k = N/2", FORWARD, "float32", 1.0, "bfloat16"),
    Goal("knn", "N 4,096, k = N/16", BOTH, "float32", 1.0, "bfloat16"),
    Goal("multipole", "N 4,097, 12 near", FORWARD, "sdpa", 4.0, cosine=0.995),
    Goal("multipole", "N 16,385, 12 near", FORWARD, "sdpa", 10.0, cosine=0.995),
    Goal("neighborhood", "N 3,136, window 7x7", FORWARD, "sdpa", 15.0),
    Goal("neighborhood", "N 3,136, window 7x7", FORWARD, "flex", 10.0),
    Goal("neighborhood", "N 3,136, window 7x7", BOTH, "sdpa", 12.0),
    Goal("routed", "N 3,136, stage 1, top 1", BOTH, "published", 5.0),
    Goal("routed", "N 784, stage 2, top 4", BOTH, "published", 5.0),
    Goal("routed", "N 67,081, stage 1, top 1", BOTH, "published", 5.0),
    Goal("routed", "N 17,689, stage 2, top 4", BOTH, "published", 5.0),
    Goal("density_peaks", "N 3,136, B 4, C 64, M 49 and 196", FORWARD, "published", 9.0),
)
BOUNDS = (
    Bound("knn", "N 4,096, k = N/16", BOTH, bytes=32e6),
    Bound("multipole", "12 near", FORWARD, exponent=1.4),
    Bound("routed", "N 3,136, stage 1, top 1", BOTH, peer="published", share=1.0),
    Bound("routed", "N 784, stage 2, top 4", BOTH, peer="published", share=1 / 4),
    Bound("routed", "N 67,081, stage 1, top 1", BOTH, peer="published", share=1.0),
    Bound("routed", "N 17,689, stage 2, top 4", BOTH, peer="published", share=1 / 4),
)


@dataclass(frozen=True)
class Settings:
    """Judge what `regard bench` found."""

    found: tyro.conf.Positional[Path] = Path("regard-bench/bench.json")
    """The JSON that it wrote."""
    markdown: Path | None = None
    """Write goals and figures there."""


def judge(study: BenchStudy) -> list[tuple[str, str, str, bool | None]]:
    """(what, goal, found, met) of each goal; met is None where nothing was measured."""
    cells = {cell.key: cell for cell in study.cells}
    verdicts: list[tuple[str, str, str, bool | None]] = []
    for goal in GOALS:
        cell = cells.get((goal.operator, goal.label, goal.dtype, goal.direction))
        what = f"{goal.operator}, {goal.label}, {goal.direction}, {goal.dtype} against {goal.peer}"
        asked = f"{goal.ratio:.2f}x" + (f", cosine {goal.cosine}" if goal.cosine else "")
        verdicts.append((what, asked, *_ratio(cell, goal)))
    for bound in BOUNDS:
        what = f"{bound.operator}, {bound.label}, {bound.direction}, {bound.dtype}"
        peaks = _peaks(cells.get((bound.operator, bound.label, bound.dtype, bound.direction)))
        own = peaks.get("regard")
        if bound.bytes is not None:
            told, met = ("", None) if own is None else (f"{own / 1e6:.1f} MB", own <= bound.bytes)
            verdicts.append((f"peak memory, {what}", f"{bound.bytes / 1e6:.0f} MB", told, met))
        if bound.peer:
            theirs = peaks.get(bound.peer)
            told, met = "", None
            if own is not None and theirs:
                told, met = f"{own / 1e6:.1f} of {theirs / 1e6:.1f} MB", own <= bound.share * theirs
            verdicts.append((f"peak memory, {what}", f"{bound.share:.2f} of {bound.peer}'s", told, met))
        if bound.exponent is not None:
            mine = (bound.operator, bound.label, bound.dtype, bound.direction, "regard")
            grown = [
                one for one in study.growth if (one.operator, one.series, one.dtype, one.direction, one.name) == mine
            ]
            told, met = (f"{grown[0].exponent:.2f}", grown[0].exponent <= bound.exponent) if grown else ("", None)
            verdicts.append((f"growth over N, {what}", f"{bound.exponent}", told, met))
    return verdicts


def _peaks(cell: BenchCell | None) -> dict[str, int]:
    """Bytes, by contender, where they were measured."""
    return {} if cell is None else {one.name: one.peak_memory for one in cell.times if one.peak_memory is not None}


def _ratio(cell: BenchCell | None, goal: Goal) -> tuple[str, bool | None]:
    if cell is not None and not cell.passed:
        return "gate RED", False
    found = None if cell is None else next((one for one in cell.times if one.name == goal.peer), None)
    if cell is None or found is None or found.skipped:
        return "" if found is None else found.skipped, None
    told = f"{found.slower:.2f}x ({found.slower_low:.2f}-{found.slower_high:.2f})"
    if goal.peer == "float32":  # not slower: no slower than the spread shows
        return told, found.slower_high >= goal.ratio
    if not goal.cosine:
        return told, found.slower >= goal.ratio
    return f"{told}, cosine {cell.cosine:.4f}", found.slower >= goal.ratio and cell.cosine >= goal.cosine


def main(settings: Settings) -> int:
    study = BenchStudy.from_json(settings.found.read_text(encoding="utf-8"))
    verdicts = judge(study)
    words = {True: "met", False: "NOT MET", None: "not measured"}
    rows = [[what, goal, found, words[met]] for what, goal, found, met in verdicts]
    table = Table(*HEADS)
    for row in rows:
        table.add_row(*row)
    Console().print(table)
    if settings.markdown is not None:
        goals = f"## Goals\n\nJudged by `python benchmarks/goals.py`.\n\n{markdown_table(HEADS, rows).rstrip()}\n\n## "
        write_text(settings.markdown, bench_markdown(study).replace("## ", goals, 1))
    return 1 if any(met is False for *_, met in verdicts) else 0


if __name__ == "__main__":
    sys.exit(main(tyro.cli(Settings)))
