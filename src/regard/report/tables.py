"""The tables, as cells that the terminal and the page draw alike."""

from collections.abc import Sequence
from dataclasses import dataclass, field

from rich import box
from rich.console import Group
from rich.table import Table as RichTable
from rich.text import Text

from regard.markdown import markdown_table
from regard.report import wording
from regard.report.labels import labelled, narrow
from regard.report.summary import DIRECTIONS, Summary, baseline_of, largest_size, summarise
from regard.results import Comparison

__all__ = ["Cell", "Column", "Table", "markdown", "operator_table", "rich_table", "summary_table", "terminal_table"]


_NAME_WIDTH = 15
_SHORT = {"Forward + backward": "fwd + bwd", "Peak memory": "memory"}


@dataclass(frozen=True)
class Cell:
    """One cell: its text, a smaller second line, and `win`, `loss` or no tone."""

    text: str
    note: str = ""
    tone: str = ""


@dataclass(frozen=True)
class Column:
    """A column's heading, what it says, and the group it stands under."""

    heading: str
    note: str = ""
    group: str = ""


@dataclass(frozen=True)
class Table:
    """Columns and rows of cells; the first cell of a row names the mechanism."""

    columns: list[Column]
    rows: list[list[Cell]] = field(default_factory=list)

    def groups(self) -> list[tuple[str, int]]:
        """(group, how many columns it spans), in order."""
        found: list[tuple[str, int]] = []
        for column in self.columns:
            if found and found[-1][0] == column.group:
                found[-1] = (column.group, found[-1][1] + 1)
            else:
                found.append((column.group, 1))
        return found


def summary_table(comparison: Comparison) -> Table:
    """One row a mechanism: accuracy, the trained model, and the operator at the largest size measured."""
    baseline = baseline_of(comparison)
    summaries = summarise(comparison)
    images = max((run.tokens for run in comparison.runs), default=0)
    model = f"Trained model, {images:,} tokens" if images else "Trained model"
    columns = [
        Column("mechanism"),
        Column("test, %", "mean ± std", "Accuracy"),
        Column(f"against {baseline}", "points ± 95 %", "Accuracy"),
        Column("train", "images/s", model),
        Column("test", "images/s", model),
        Column("forward", "MFLOPs", model),
        Column("weights", "", model),
    ]
    tokens = largest_size(comparison.costs)
    if tokens:
        operator = f"Operator, {tokens:,} tokens"
        columns += [
            Column("forward", f"against {baseline}", operator),
            Column("fwd + bwd", f"against {baseline}", operator),
            Column("memory", "peak, fwd + bwd", operator),
        ]
    return Table(columns, [_summary_row(one, baseline, tokens) for one in summaries])


def _summary_row(one: Summary, baseline: str, tokens: int) -> list[Cell]:
    is_baseline = one.mechanism == baseline
    verdict = wording.verdict(one.difference)
    row = [
        Cell(one.mechanism, _unfinished(one)),
        Cell(wording.accuracy(one)),
        Cell("baseline") if is_baseline else Cell(wording.difference(one.difference), verdict, _tone(verdict)),
        Cell(wording.number(one.train_images_per_second)),
        Cell(wording.number(one.test_images_per_second)),
        Cell(wording.number(None if one.forward_flops is None else one.forward_flops / 1e6)),
        Cell(wording.count(one.parameters)),
    ]
    if tokens:
        for direction in DIRECTIONS:
            speed = "baseline" if is_baseline else wording.ratio(one.speed.get((direction, tokens)))
            row.append(Cell(speed, tone=_tone(speed)))
        row.append(Cell(wording.megabytes(one.peak_memory)))
    return row


def operator_table(comparison: Comparison, sizes: Sequence[int] | None = None) -> Table:
    """Operator time in ms at each size (or those in `sizes`), the ratio to the baseline below, and the peak memory."""
    baseline = baseline_of(comparison)
    measured = sorted({point.tokens for point in comparison.costs if sizes is None or point.tokens in sizes})
    directions = [one for one in DIRECTIONS if any(point.direction == one for point in comparison.costs)]
    cells = [(direction, tokens) for direction in directions for tokens in measured]
    columns = [Column("mechanism")]
    columns += [
        Column(f"{tokens:,} tokens", "ms", direction.replace("+", " + ").capitalize()) for direction, tokens in cells
    ]
    has_memory = any(point.peak_memory is not None for point in comparison.costs)
    if has_memory:
        columns.append(Column("fwd + bwd", f"at {largest_size(comparison.costs):,}", "Peak memory"))
    times = {(point.mechanism, point.direction, point.tokens): point.seconds for point in comparison.costs}
    table = Table(columns)
    for one in summarise(comparison):
        row = [Cell(one.mechanism)]
        for cell in cells:
            seconds = times.get((one.mechanism, *cell))
            ratio = "" if one.mechanism == baseline or cell not in one.speed else wording.ratio(one.speed[cell])
            row.append(Cell(wording.number(None if seconds is None else 1e3 * seconds), ratio, _tone(ratio)))
        if has_memory:
            row.append(Cell(wording.megabytes(one.peak_memory)))
        table.rows.append(row)
    return table


def terminal_table(comparison: Comparison) -> Group:
    """Both tables, at most 80 columns wide with the default mechanisms. Wins are green, losses red."""
    comparison = labelled(comparison)
    summary = summary_table(comparison)
    model_columns = sum(not column.group.startswith("Operator") for column in summary.columns)
    parts = [rich_table(Table(summary.columns[:model_columns], [row[:model_columns] for row in summary.rows]))]
    if comparison.costs:
        sizes = (min(point.tokens for point in comparison.costs), largest_size(comparison.costs))
        parts.append(rich_table(operator_table(comparison, sizes=sizes), title="The operator alone"))
    return Group(*parts)


def markdown(table: Table) -> str:
    """The table in Markdown; a cell's second line follows in brackets, and columns lose their groups."""

    def text(first: str, note: str) -> str:
        return f"{first} ({note})" if note else first

    heading = [text(column.heading, column.note) for column in table.columns]
    return markdown_table(heading, [[text(cell.text, cell.note) for cell in row] for row in table.rows])


def rich_table(table: Table, title: str | None = None) -> RichTable:
    """A table for the terminal."""
    drawn = RichTable(title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, padding=0)
    for i, column in enumerate(table.columns):
        group = (
            ""
            if not column.group or column.group.startswith(("Accuracy", "Trained"))
            else f"{_SHORT.get(column.group, column.group.lower())}\n"
        )
        heading = Text.assemble(
            (f"{group}{column.heading}", "bold"), (f"\n{column.note}" if column.note else "", "dim")
        )
        drawn.add_column(heading, justify="left" if i == 0 else "right", no_wrap=True, vertical="top")
    styles = {"win": "green", "loss": "red"}
    for row in table.rows:
        texts = []
        for i, cell in enumerate(row):
            style, text = styles.get(cell.tone, ""), cell.text if i else narrow(cell.text, _NAME_WIDTH)
            texts.append(Text(f"{text}\n{_halved(cell.note)}" if cell.note else text, style=style))
        drawn.add_row(*texts)
    return drawn


def _halved(note: str) -> str:
    """A note of three words or more on two lines: the terminal is narrow."""
    words = note.split()
    return note if len(words) < 3 else f"{' '.join(words[:2])}\n{' '.join(words[2:])}"


def _unfinished(one: Summary) -> str:
    if one.failure:
        return "failed"
    return f"{len(one.runs)} of {one.asked} runs" if len(one.runs) < one.asked else ""


def _tone(text: str) -> str:
    if text.endswith("faster") or text == "more accurate":
        return "win"
    return "loss" if text.endswith("slower") or text == "less accurate" else ""
