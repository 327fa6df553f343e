"""The one self-contained HTML page of a comparison, and the JSON beside it."""

import dataclasses
from pathlib import Path

from markupsafe import Markup
from matplotlib.figure import Figure

from regard.report import maps, plots, tables, wording
from regard.report.findings import crossings, findings, headline
from regard.report.html import fill, pairs
from regard.report.labels import labelled
from regard.report.style import looks, page_color, svg
from regard.report.summary import DIRECTIONS, baseline_of, mechanisms_of, summarise
from regard.results import Comparison, write_text

__all__ = ["JSON_NAME", "PAGE_NAME", "render_page", "write_report"]

PAGE_NAME, JSON_NAME = "compare.html", "compare.json"


def write_report(comparison: Comparison, folder: Path) -> tuple[Path, Path]:
    """Write the page and the JSON into `folder` (made if absent), each whole or not at all.

    Returns:
        The paths of the page and of the JSON.
    """
    folder.mkdir(parents=True, exist_ok=True)
    page, data = folder / PAGE_NAME, folder / JSON_NAME
    write_text(data, comparison.to_json() + "\n")
    write_text(page, render_page(comparison))
    return page, data


def render_page(comparison: Comparison) -> str:
    """The whole page as HTML text; it asks nothing of the network."""
    comparison = labelled(comparison)
    return fill(
        "compare.html.j2",
        comparison.environment,
        comparison=comparison,
        headline=headline(comparison),
        findings=findings(comparison),
        baseline=baseline_of(comparison),
        summary=tables.summary_table(comparison),
        operator_times=tables.operator_table(comparison),
        colors={name: page_color(look) for name, look in looks(comparison).items()},
        mechanisms=mechanisms_of(comparison),
        figures=_figures(comparison),
        progress=_progress(comparison),
        settings=pairs(comparison.settings),
        recipe=pairs(comparison.runs[0].recipe) if comparison.runs else [],
        environment=pairs(dataclasses.asdict(comparison.environment)),
        seconds=[(part, wording.number(seconds)) for part, seconds in comparison.seconds.items()],
        interval=_interval(comparison),
        crossings=crossings(comparison),
        operator=comparison.costs[0] if comparison.costs else None,
    )


def _figures(comparison: Comparison) -> dict[str, Markup]:
    drawn: dict[str, Figure | None] = {
        "epochs": plots.accuracy_over_epochs(comparison),
        "seconds": plots.accuracy_over_seconds(comparison),
        "plane-model": plots.cost_accuracy(comparison),
        "plane-operator": plots.cost_accuracy(comparison, operator=True),
        "maps": maps.attention_maps(comparison),
    }
    for direction in DIRECTIONS:
        drawn["time-" + direction.split("+")[-1]] = plots.operator_time(comparison, direction)
        drawn["memory-" + direction.split("+")[-1]] = plots.operator_memory(comparison, direction)
    # The markup is matplotlib's own; texts from outside went through its escaping.
    return {name: Markup(svg(figure, name)) for name, figure in drawn.items() if figure is not None}


def _progress(comparison: Comparison) -> list[str]:
    """What is missing, one sentence each; empty if all is done."""
    said = []
    for one in summarise(comparison):
        missing = one.asked - len(one.runs)
        if one.failure:
            said.append(f"{one.mechanism}: a run failed: {one.failure}")
        elif missing:
            said.append(f"{one.mechanism}: {len(one.runs)} of {one.asked} runs finished.")
    if not comparison.costs:
        said.append("The operators' cost was not measured.")
    return said


def _interval(comparison: Comparison) -> str:
    pairs = sorted(
        {one.difference.pairs for one in summarise(comparison) if one.difference and one.difference.pairs > 1}
    )
    return " or ".join(str(count - 1) for count in pairs)
