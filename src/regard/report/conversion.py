"""A conversion as a table in the terminal and as one self-contained page."""

import dataclasses
from pathlib import Path

from markupsafe import Markup
from matplotlib.figure import Figure
from rich.console import Group

from regard.report import wording
from regard.report.html import fill, pairs
from regard.report.maps import draw_losses, draw_rows
from regard.report.style import INK, MUTED, Look, label_marks, looks_of, new_figure, page_color, quiet, svg
from regard.report.summary import Ratio
from regard.report.tables import Cell, Column, Table, rich_table
from regard.results import ConversionStudy, ConvertedModel, MeasuredSetting, Spread, Tuning, write_text

__all__ = [
    "CONVERSION_JSON",
    "CONVERSION_PAGE",
    "conversion_headline",
    "conversion_table",
    "conversion_terminal",
    "render_conversion",
    "write_conversion_report",
]

CONVERSION_PAGE, CONVERSION_JSON = "convert.html", "convert.json"


def write_conversion_report(study: ConversionStudy, folder: Path) -> tuple[Path, Path]:
    """Write the page and the JSON into `folder` (made if absent), each whole or not at all.

    Returns:
        The paths of the page and of the JSON.
    """
    folder.mkdir(parents=True, exist_ok=True)
    page, data = folder / CONVERSION_PAGE, folder / CONVERSION_JSON
    write_text(data, study.to_json() + "\n")
    write_text(page, render_conversion(study))
    return page, data


def conversion_headline(study: ConversionStudy) -> list[str]:
    """A sentence for each converted model: what it saves, and what it keeps."""
    said = []
    for one in study.models:
        if one.fidelity is None:
            continue
        speed = wording.ratio(_ratio(one))
        took = "as fast as dense attention within the spread," if speed == "level" else f"{speed} than dense attention"
        said.append(
            f"{one.name}: {took} at {study.settings['tokens']:,} tokens; its features keep a cosine of "
            f"{one.fidelity.cosine.mean:.4f} ({one.fidelity.centred_cosine.mean:.4f} centred)."
        )
    return said


def conversion_table(study: ConversionStudy) -> Table:
    """One row a model: speed, FLOPs and memory of one picture's forward, and fidelity over all pictures."""
    pictures = next((one.fidelity.pictures for one in study.models if one.fidelity is not None), 0)
    fidelity = f"Fidelity to dense, {pictures} photograph{'s' if pictures != 1 else ''}"
    forward = f"Forward of one picture, {study.settings['tokens']:,} tokens"
    columns = [
        Column("mechanism"),
        Column("time", "ms, quartiles", forward),
        Column("speed", "against dense", forward),
        Column("GFLOPs", "", forward),
        Column("memory", "peak", forward),
        Column("cosine", "mean, least", fidelity),
        Column("centred", "mean, least", fidelity),
        Column("worst 1 %", "centred", fidelity),
        Column("rel. L2", "mean, most", fidelity),
    ]
    classes = any(one.fidelity is not None and one.fidelity.top1_agreement is not None for one in study.models)
    if classes:
        columns.append(Column("same top-1", "%", fidelity))
    return Table(columns, [_row(one, classes) for one in study.models])


def _row(one: ConvertedModel, classes: bool) -> list[Cell]:
    left = one.record is not None and len(one.record.left)
    speed = "baseline" if one.fidelity is None else wording.ratio(_ratio(one))
    tone = "win" if speed.endswith("faster") else "loss" if speed.endswith("slower") else ""
    row = [
        Cell(one.name, f"{left} of {len(one.record.rows)} modules left" if left and one.record else ""),
        Cell(
            wording.number(1e3 * one.seconds),
            f"{wording.number(1e3 * one.seconds_low)}–{wording.number(1e3 * one.seconds_high)}",
        ),
        Cell(speed, tone=tone),
        Cell(wording.number(one.flops / 1e9)),
        Cell(wording.megabytes(one.peak_memory)),
    ]
    found = one.fidelity
    if found is None:
        return row + [Cell(wording.MISSING)] * (5 if classes else 4)
    row += [
        _spread(found.cosine),
        _spread(found.centred_cosine),
        Cell(f"{found.worst_centred_cosine.mean:.3f}"),
        Cell(f"{found.relative_l2.mean:.3f}", f"{found.relative_l2.high:.3f}"),
    ]
    if classes:
        agreement = found.top1_agreement
        row.append(Cell(wording.MISSING if agreement is None else f"{100 * agreement:.0f}"))
    return row


def layers_table(study: ConversionStudy) -> Table | None:
    """One row a module: its attention alone, under each mechanism; None if that was not asked."""
    judged = [one for one in study.models if one.layers]
    if not judged:
        return None
    modules = dict.fromkeys(name for one in judged for name in one.layers or ())
    table = Table([Column("module"), *(Column(one.name) for one in judged)])
    for name in modules:
        values = [(one.layers or {}).get(name) for one in judged]
        table.rows.append([Cell(name), *(Cell(wording.MISSING if v is None else f"{v:.4f}") for v in values)])
    return table


def tuning_table(tuning: Tuning) -> Table:
    """One row a module: what it got, and what that alone loses."""
    losses = {next(iter(one.setting.items())): 1 - one.value(tuning.measure) for one in tuning.alone}
    table = Table([Column("module"), Column("mechanism"), Column("alone loses", f"1 - {tuning.measure}")])
    for name in tuning.modules:
        chosen = tuning.best.setting.get(name)
        lost = f"{losses[name, chosen]:.2g}" if chosen else wording.MISSING
        table.rows.append([Cell(name), Cell(chosen or tuning.left.get(name, "dense")), Cell(lost)])
    return table


def conversion_terminal(study: ConversionStudy) -> Group:
    """The tables, for the terminal: at most 80 columns wide with short names."""
    table = conversion_table(study)
    parts = []
    for group in dict.fromkeys(column.group for column in table.columns if column.group):
        places = [i for i, column in enumerate(table.columns) if column.group in ("", group)]
        columns = [dataclasses.replace(table.columns[i], group="") for i in places]
        parts.append(rich_table(Table(columns, [[row[i] for i in places] for row in table.rows]), title=group))
    layers = layers_table(study)
    if layers is not None:
        parts.append(rich_table(layers, title="Each layer's attention alone, centred cosine"))
    return Group(*parts)


def render_conversion(study: ConversionStudy) -> str:
    """The whole page as HTML text; it asks nothing of the network."""
    styles = looks_of([one.name for one in study.models], study.models[0].name)
    drawn = [photo for photo in study.photos if photo.losses]
    losses = draw_losses(drawn, list(drawn[0].losses), styles) if drawn else None
    rows = [
        {one.mechanism: dataclasses.replace(one, pixels=photo.pixels) for one in photo.maps}
        for photo in study.photos
        if photo.maps
    ]
    maps = draw_rows(rows, list(rows[0]), styles) if rows else None
    tuning = study.tuning
    return fill(
        "convert.html.j2",
        study.environment,
        study=study,
        headline=conversion_headline(study),
        summary=conversion_table(study),
        colors={name: page_color(look) for name, look in styles.items()},
        maps=None if maps is None else _markup(maps, "maps"),
        columns=1 + len(study.models),
        losses=None if losses is None else _markup(losses, "losses"),
        layers=layers_table(study),
        tuning=None if tuning is None else tuning_table(tuning),
        curve=None if tuning is None else _markup(trade_off(tuning), "curve"),
        records=[(one.name, one.record) for one in study.models if one.record is not None],
        settings=pairs(study.settings),
        environment=pairs(dataclasses.asdict(study.environment)),
    )


def trade_off(tuning: Tuning) -> Figure:
    """Every setting of the whole model that was measured: FLOPs against the figure that had to hold."""
    figure, axes = new_figure()
    look = Look("#0072b2", "o", "solid")

    def place(one: MeasuredSetting) -> tuple[float, float]:
        return 100 * one.flops / tuning.dense.flops, one.value(tuning.measure)

    held = [place(one) for one in tuning.curve]
    undone = [place(one) for one in tuning.steps if not tuning.holds(one)]
    axes.plot(*zip(*held, strict=True), color=look.color, marker=look.marker, markersize=4, linewidth=1.2)
    if undone:
        axes.plot(*zip(*undone, strict=True), color=MUTED, marker="x", markersize=4, linestyle="none")
    axes.axhline(tuning.target, color=MUTED, linewidth=0.8, linestyle=(0, (4, 3)))
    label_marks(axes, [(*place(tuning.best), "chosen", INK)])
    quiet(
        axes, "What each setting saves and loses", "FLOPs of the forward, % of dense", tuning.measure.replace("_", " ")
    )
    return figure


def _markup(figure: Figure, name: str) -> Markup:
    """The markup is matplotlib's own; texts from outside went through its escaping."""
    return Markup(svg(figure, name))


def _ratio(one: ConvertedModel) -> Ratio:
    return Ratio(one.speed, one.speed_low, one.speed_high)


def _spread(found: Spread) -> Cell:
    return Cell(f"{found.mean:.4f}", f"{found.low:.4f}")
