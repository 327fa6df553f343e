"""What `regard bench` found, as tables and one figure."""

import io
import math
from collections.abc import Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from rich import box
from rich.console import Group
from rich.table import Table
from rich.text import Text

from regard.markdown import markdown_table
from regard.report import wording
from regard.report.fidelity import write_png
from regard.report.style import PAPER, Styles, looks_of, new_figure, quiet, token_axes
from regard.results import BenchCell, BenchStudy, BenchTime, Ceiling, Growth, write_text

__all__ = ["BENCH_FIGURE", "bench_figure", "bench_markdown", "bench_tables", "write_bench_report"]

BENCH_FIGURE = "bench.svg"
_BASELINE = "sdpa"  # grey
_ROUNDS = 3  # from which on quartiles are told
_SHORT = {"forward": "fwd", "forward+backward": "fwd + bwd"}


def bench_tables(study: BenchStudy) -> Group:
    """A table an operator for the terminal; below them growth, what was left out, and where it was measured."""
    parts: list[Table | Text] = []
    for operator in _operators(study):
        cells = [cell for cell in study.cells if cell.operator == operator]
        heads, rows = _rows(cells, study)
        table = Table(title=operator, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, padding=0)
        for i, head in enumerate(heads):
            table.add_column(head, justify="left" if i == 0 else "right", overflow="fold", vertical="top")
        for row in rows:
            table.add_row(*(_styled(lines) for lines in row))
        parts.append(table)
        parts += [Text(f"  {line}") for line in (*_growth_lines(study.growth, operator), *_skipped_lines(cells))]
        parts.append(Text(""))
    return Group(*parts, *(Text(line) for line in about(study)))


def bench_markdown(study: BenchStudy) -> str:
    """The same as a Markdown page."""
    lines = ["# Operators: measured", "", f"Made by `{study.command}`.", ""]
    for operator in _operators(study):
        cells = [cell for cell in study.cells if cell.operator == operator]
        heads, rows = _rows(cells, study)
        table = markdown_table(
            [one.replace("\n", " ") for one in heads], [[", ".join(cell) for cell in row] for row in rows]
        )
        lines += [f"## {operator}", "", table.rstrip()]
        lines += ["", *(f"- {line}" for line in (*_growth_lines(study.growth, operator), *_skipped_lines(cells))), ""]
    return "\n".join([*lines, *(f"- {line}" for line in about(study))]).strip() + "\n"


def about(study: BenchStudy) -> list[str]:
    """Where and how it was measured, and what a reader must know."""
    place = study.environment
    lines = [
        f"{place.machine}, {place.threads} threads of {place.cores} cores, {place.instruction_set}, {place.device}, "
        f"torch {place.torch}, regard {place.regard} at {place.commit or 'no commit'}, {place.date}"
    ]
    for one in study.ceilings:
        lines.append(
            f"{one.dtype}, best of the same run: matrix product {one.flops_per_second / 1e9:.0f} GFLOP/s, "
            f"copy {one.bytes_per_second / 1e9:.1f} GB/s"
        )
    if any(not math.isnan(cell.cosine) for cell in study.cells):
        lines.append("cosine: of the outputs to dense attention's, mean over queries and heads")
    red = sum(not cell.passed for cell in study.cells)
    lines.append(f"correctness gate: {red} red of {len(study.cells)}; medians and quartiles of interleaved rounds")
    lines.append(
        "of the ceiling: useful operations over the matrix product's; bytes in and out, once each, over the copy's"
    )
    if any(one.peak_memory is not None for cell in study.cells for one in cell.times):
        lines.append("MB: peak memory beyond inputs, outputs and gradients, in a process of its own")
    return [*lines, *study.notes, *(["Stopped before the end: the same command resumes."] if study.interrupted else [])]


def _operators(study: BenchStudy) -> list[str]:
    return list(dict.fromkeys(cell.operator for cell in study.cells))


def _rows(cells: Sequence[BenchCell], study: BenchStudy) -> tuple[list[str], list[list[list[str]]]]:
    """Headings, and of each cell the lines of every column."""
    peers = list(dict.fromkeys(one.name for cell in cells for one in cell.times[1:]))
    measured = [peer for peer in peers if any(one.name == peer and not one.skipped for c in cells for one in c.times)]
    heads = [
        "size",
        "regard\nms",
        "useful\nGFLOP/s",
        "of the\nceiling",
        *(f"{peer.replace(' ', chr(10))}\ntakes" for peer in measured),
    ]
    rows = []
    for cell in cells:
        size = f"N {cell.tokens:,}" + (f", B {cell.batch}" if cell.batch > 1 else "")
        run = f"{_SHORT.get(cell.direction, cell.direction)}, {cell.dtype}"
        row = [[size, *filter(None, [cell.series]), run]]
        row[0] += ["PyTorch path"] if cell.backend == "pytorch" else []
        row[0] += [] if math.isnan(cell.cosine) else [f"cosine {cell.cosine:.4f}"]
        own = cell.own
        if own is None:
            rows.append([*row, ["gate RED"], *([[wording.MISSING]] * (2 + len(measured)))])
            continue
        spread = [f"{_ms(own.seconds_low)}-{_ms(own.seconds_high)}"] if own.repeats >= _ROUNDS else []
        row.append([_ms(own.seconds), *spread, *_memory(own)])
        row.append([wording.number(cell.flops / own.seconds / 1e9)])
        row.append(_shares(cell, own, study.ceiling(cell.dtype)))
        times = {one.name: one for one in cell.times}
        row += [_peer(times.get(peer)) for peer in measured]
        rows.append(row)
    return heads, rows


def _shares(cell: BenchCell, own: BenchTime, ceiling: Ceiling | None) -> list[str]:
    if ceiling is None:
        return [wording.MISSING]
    product = cell.flops / own.seconds / ceiling.flops_per_second
    copy = cell.bytes / own.seconds / ceiling.bytes_per_second
    return [f"{100 * product:.0f} %", f"copy {100 * copy:.0f} %"]


def _peer(one: BenchTime | None) -> list[str]:
    if one is None or one.skipped:
        return [wording.MISSING]
    lines = [f"{wording.number(one.slower)}x"]
    if one.repeats >= _ROUNDS:
        lines.append(f"{wording.number(one.slower_low)}-{wording.number(one.slower_high)}")
    return [*lines, *_memory(one)]


def _memory(one: BenchTime) -> list[str]:
    return [] if one.peak_memory is None else [wording.megabytes(one.peak_memory)]


def _styled(lines: Sequence[str]) -> Text:
    """The first line as it is, red where a gate is; the others dim."""
    first = Text(lines[0], style="red" if "RED" in lines[0] else "")
    return Text("\n").join([first, *(Text(line, style="dim") for line in lines[1:])])


def _ms(seconds: float) -> str:
    return wording.number(1e3 * seconds)


def _growth_lines(growth: Sequence[Growth], operator: str) -> list[str]:
    mine = [one for one in growth if one.operator == operator]
    lines = []
    for key in dict.fromkeys((one.series, one.direction, one.dtype) for one in mine):
        found = [one for one in mine if (one.series, one.direction, one.dtype) == key]
        told = ", ".join(f"{one.name} N^{one.exponent:.2f}" for one in found if one.tokens_high == found[0].tokens_high)
        span = f"{found[0].tokens_low:,} to {found[0].tokens_high:,}"
        lines.append(f"growth, {key[0]}, {_SHORT.get(key[1], key[1])}, {key[2]}, N {span}: {told}")
    return lines


def _skipped_lines(cells: Sequence[BenchCell]) -> list[str]:
    """Who was left out, and why: the same reason once."""
    found: dict[tuple[str, str], list[str]] = {}
    for cell in cells:
        for one in cell.times:
            if one.skipped:
                where = f"{cell.label} {_SHORT.get(cell.direction, cell.direction)}"
                found.setdefault((one.name, one.skipped), []).append(where)
    return [
        f"{name} left out: {reason} ({wheres[0] if len(wheres) == 1 else f'{len(wheres)} sizes'})"
        for (name, reason), wheres in found.items()
    ]


def bench_figure(study: BenchStudy) -> Figure | None:
    """Time over tokens, log-log with quartile bars: a panel for each series and direction; None without two sizes."""
    lines: dict[tuple[object, ...], list[BenchCell]] = {}
    for cell in study.cells:
        if cell.own is not None:
            shape = (cell.batch, cell.heads, cell.head_dim)
            lines.setdefault((cell.operator, cell.series, cell.dtype, shape, cell.direction), []).append(cell)
    lines = {key: cells for key, cells in lines.items() if len({cell.tokens for cell in cells}) > 1}
    if not lines:
        return None
    rows = list(dict.fromkeys(key[:4] for key in lines))
    directions = list(dict.fromkeys(key[4] for key in lines))
    names = list(dict.fromkeys(one.name for cell in study.cells for one in cell.times if not one.skipped))
    looks = looks_of(names, _BASELINE)
    width, height = 5.2 * len(directions), 3.3 * len(rows)
    figure, panels = new_figure(width, height, nrows=len(rows), ncols=len(directions), squeeze=False)
    for panel_row, key in zip(panels, rows, strict=True):
        operator, series, dtype, _ = key
        for axes, direction in zip(panel_row, directions, strict=True):
            if (*key, direction) not in lines:
                axes.set_axis_off()
                continue
            quiet(axes, f"{operator}, {series}, {direction}, {dtype}", "tokens", "milliseconds")
            _panel(axes, lines[*key, direction], looks)
    return figure


def _panel(axes: Axes, cells: Sequence[BenchCell], looks: Styles) -> None:
    ends = []
    for name, look in looks.items():
        found = sorted(
            (cell.tokens, one) for cell in cells for one in cell.times if one.name == name and not one.skipped
        )
        if not found:
            continue
        xs, ys = [tokens for tokens, _ in found], [1e3 * one.seconds for _, one in found]
        axes.plot(xs, ys, color=look.color, linewidth=2, linestyle=look.dash, marker=look.marker, markersize=5)
        low, high = ([1e3 * getattr(one, f"seconds_{end}") for _, one in found] for end in ("low", "high"))
        axes.vlines(xs, low, high, look.color, lw=4, alpha=0.3)
        ends.append((float(xs[-1]), ys[-1], name, look.color))
    token_axes(axes, sorted({cell.tokens for cell in cells}), ends)


def write_bench_report(study: BenchStudy, folder: Path) -> list[Path]:
    """Write bench.md, and the figure as bench.svg and bench.png if there is one. Returns what was written."""
    folder.mkdir(parents=True, exist_ok=True)
    written = [folder / "bench.md"]
    write_text(written[0], bench_markdown(study))
    figure = bench_figure(study)
    if figure is not None:
        written += [folder / BENCH_FIGURE, folder / "bench.png"]
        out = io.BytesIO()
        figure.savefig(out, format="svg", facecolor=PAPER, metadata={"Date": None})
        write_text(written[1], out.getvalue().decode())
        write_png(figure, written[2])
    return written
