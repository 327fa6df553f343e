"""A fidelity study as tables and figures."""

import ast
import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator
from PIL import Image

from regard.markdown import markdown_table
from regard.report.picture import raster
from regard.report.style import INK, MUTED, PAPER, Look, new_figure, quiet
from regard.results import Fidelity, FidelityPoint, FidelityStudy, PictureFidelity, Spread

__all__ = ["fidelity_over_share", "fidelity_table", "head_losses", "layer_table", "patch_losses", "write_png"]

_HEAD = (
    "mechanism",
    "keys seen one by one",
    "cosine",
    "centred cosine",
    "relative L2",
    "worst 1 %",
    "worst 1 %, centred",
    "prefix tokens",
)


def fidelity_table(study: FidelityStudy, size: int) -> str:
    """Markdown: a row for each mechanism, in the order asked; the mean over photographs, then the worst one of them."""
    rows = []
    for mechanism in study.settings["mechanisms"]:
        points = _points(study, mechanism, size)
        if not points:
            continue
        found = Fidelity.of([point.fidelity for point in points])
        share = _share(points)
        prefix = found.prefix_cosine
        rows.append(
            [
                f"`{mechanism}`",
                "" if share is None else f"{100 * share:.1f} %",
                _least(found.cosine),
                _least(found.centred_cosine),
                f"{found.relative_l2.mean:.3f} ({found.relative_l2.high:.3f})",
                _least(found.worst_cosine, 3),
                _least(found.worst_centred_cosine, 3),
                "" if prefix is None else _least(prefix),
            ]
        )
    return markdown_table(_HEAD, rows)


def layer_table(study: FidelityStudy, mechanisms: Sequence[str], size: int) -> str:
    """Markdown: a row for each layer: the centred cosine of the operator's output, mean over heads and photographs."""
    columns = {one: heads for one in mechanisms if (heads := _heads(study, one, size)) is not None}
    if not columns:
        return ""
    depth = len(next(iter(columns.values())))
    rows = []
    for layer in range(depth):
        cells = [f"{statistics.fmean(heads[layer]):.4f} ({min(heads[layer]):.4f})" for heads in columns.values()]
        rows.append([str(layer), *cells])
    return markdown_table(["layer", *(f"`{one}`" for one in columns)], rows)


def fidelity_over_share(study: FidelityStudy, size: int, *, goals: tuple[float, float] | None = None) -> Figure | None:
    """Two panels, raw and centred cosine over the share of keys that a query sees one by one; None without points.

    Args:
        goals: a line at the raw and one at the centred cosine that is wanted.
    """
    families = _families(study, size)
    if not families:
        return None
    figure, panels = new_figure(9.6, 4.4, ncols=2, sharex=True)
    zero = min((mark.share for marks in families.values() for mark in marks if mark.share), default=0.01) / 1.7
    for i, (axes, name) in enumerate(zip(panels, ("cosine", "centred cosine"), strict=True)):
        quiet(axes, f"{name.capitalize()} to dense attention, {size} px", "share of the keys seen one by one", name)
        for (family, look), marks in zip(_FAMILIES.items(), (families.get(f, []) for f in _FAMILIES), strict=True):
            if marks:
                _draw_family(axes, family, look, marks, zero, i)
        if goals is not None:
            axes.axhline(1 - goals[i], color=MUTED, linewidth=0.8, linestyle=(0, (4, 3)))
            axes.annotate(
                f"goal {goals[i]}", (1, 1 - goals[i]), (-2, 3), ("axes fraction", "data"), "offset points", ha="right",
                fontsize=8, color=MUTED,
            )  # fmt: skip
        _cosine_axis(axes)
        _share_axis(axes, zero, [mark.share for marks in families.values() for mark in marks])
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=4, frameon=False)
    return figure


def head_losses(study: FidelityStudy, mechanisms: Sequence[str], size: int) -> Figure | None:
    """What each layer and head loses: 1 - centred cosine of the operator's output, mean over photographs, one scale."""
    found = {one: heads for one in mechanisms if (heads := _heads(study, one, size)) is not None}
    if not found:
        return None
    losses = {one: [[1 - head for head in layer] for layer in heads] for one, heads in found.items()}
    every = [max(loss, 1e-6) for layers in losses.values() for layer in layers for loss in layer]
    norm = LogNorm(max(min(every), 1e-4), max(max(every), 1e-3))
    figure, panels = new_figure(0.8 + 2.9 * len(losses), 4.9, ncols=len(losses), sharey=True, squeeze=False)
    for axes, (mechanism, layers) in zip(panels[0], losses.items(), strict=True):
        shown = axes.imshow(
            [[max(loss, norm.vmin or 1e-4) for loss in layer] for layer in layers], "magma_r", norm, aspect="auto"
        )
        for row, layer in enumerate(layers):
            for column, loss in enumerate(layer):
                dark = norm(max(loss, norm.vmin or 1e-4)) > 0.4
                axes.text(
                    column,
                    row,
                    _thousandths(loss),
                    ha="center",
                    va="center",
                    fontsize=7.5,
                    color=PAPER if dark else INK,
                )
        axes.set_title(_label(mechanism), fontsize=9.5, fontweight="bold", loc="left", pad=8)
        axes.set_xlabel("head")
        axes.set_xticks(range(len(layers[0])))
        axes.set_yticks(range(len(layers)))
        axes.tick_params(length=0)
        axes.spines[:].set_visible(False)
    panels[0][0].set_ylabel("layer")
    bar = figure.colorbar(shown, ax=list(panels[0]), fraction=0.03, pad=0.02)
    bar.set_label("1 - centred cosine (in the cells: thousandths)")
    bar.outline.set_visible(False)
    return figure


def patch_losses(pixels: Any, losses: dict[str, Any], *, what: str = "1 - centred cosine") -> Figure:
    """Where in a photograph the fidelity is lost: the photograph, then each mechanism's loss of every patch.

    Args:
        pixels: (height, width, 3), in [0, 1].
        losses: (rows, columns) of each mechanism's losses, by its text form.
        what: what a loss is.
    """
    flat = {one: [max(float(v), 1e-5) for row in grid for v in row] for one, grid in losses.items()}
    ends = sorted(v for values in flat.values() for v in values)
    norm = LogNorm(max(ends[len(ends) // 20], 1e-4), max(ends[-1 - len(ends) // 200], 1e-3), clip=True)
    figure, panels = new_figure(0.7 + 2.7 * (1 + len(losses)), 3.1, ncols=1 + len(losses), squeeze=False)
    panels[0][0].imshow(pixels)
    panels[0][0].set_title("photograph", fontsize=9.5, fontweight="bold", loc="left")
    for axes, (mechanism, grid) in zip(panels[0][1:], losses.items(), strict=True):
        shown = axes.imshow([[max(float(v), 1e-5) for v in row] for row in grid], "magma_r", norm)
        mean = statistics.fmean(flat[mechanism])
        axes.set_title(f"{_label(mechanism)}\nmean {1 - mean:.4f}", fontsize=9.5, fontweight="bold", loc="left")
    for axes in panels[0]:
        axes.set_xticks([])
        axes.set_yticks([])
    bar = figure.colorbar(shown, ax=list(panels[0]), fraction=0.03, pad=0.01)
    bar.set_label(what)
    bar.outline.set_visible(False)
    return figure


def write_png(figure: Figure, path: Path, *, dpi: float = 120.0) -> None:
    """Write a figure as a small PNG (256 colours), whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".part")
    raster(figure, dpi).quantize(256, dither=Image.Dither.NONE).save(temporary, format="PNG", optimize=True)
    temporary.replace(path)


def _points(study: FidelityStudy, mechanism: str, size: int) -> list[FidelityPoint]:
    return [point for point in study.points if point.mechanism == mechanism and point.size == size]


def _share(points: Iterable[FidelityPoint]) -> float | None:
    shares = [point.near_share for point in points if point.near_share is not None]
    return statistics.fmean(shares) if shares else None


def _least(spread: Spread, digits: int = 4) -> str:
    return f"{spread.mean:.{digits}f} ({spread.low:.{digits}f})"


def _heads(study: FidelityStudy, mechanism: str, size: int) -> list[list[float]] | None:
    """[layer][head] centred cosine, mean over the photographs that were judged by layer; None if none was."""
    measured = [point.layers for point in _points(study, mechanism, size) if point.layers is not None]
    if not measured:
        return None

    def mean(heads: tuple[PictureFidelity, ...]) -> float:
        return statistics.fmean(head.centred_cosine for head in heads)

    return [[mean(heads) for heads in zip(*layers, strict=True)] for layers in zip(*measured, strict=True)]


@dataclass(frozen=True)
class _Mark:
    share: float
    cosines: tuple[float, float]  # raw, centred
    label: str


_FAMILIES = {
    "k-NN": Look("#d55e00", "s", "solid"),
    "centroids alone": Look("#7b838d", "o", ""),
    "multipole, centroids": Look("#56b4e9", "^", ""),
    "multipole, Gaussian": Look("#0072b2", "D", ""),
}


def _families(study: FidelityStudy, size: int) -> dict[str, list[_Mark]]:
    found: dict[str, list[_Mark]] = {}
    for mechanism in study.settings["mechanisms"]:
        points = _points(study, mechanism, size)
        share = _share(points)
        family = _family(mechanism)
        if share is None or family is None:
            continue
        all_of = Fidelity.of([point.fidelity for point in points])
        cosines = (all_of.cosine.mean, all_of.centred_cosine.mean)
        if family == "centroids alone":
            share = 0.0  # but for the prefix tokens
        found.setdefault(family, []).append(_Mark(share, cosines, _label(mechanism, short=True)))
    return {family: sorted(marks, key=lambda mark: mark.share) for family, marks in found.items()}


def _options(mechanism: str) -> tuple[str, dict[str, Any]]:
    """`knn(topk=0.5)` -> ("knn", {"topk": 0.5}): text forms are calls with keyword literals."""
    node = ast.parse(mechanism, mode="eval").body
    if isinstance(node, ast.Call):
        return ast.unparse(node.func), {str(k.arg): ast.literal_eval(k.value) for k in node.keywords}
    return mechanism, {}


def _family(mechanism: str) -> str | None:
    name, options = _options(mechanism)
    if name == "knn":
        return "k-NN"
    if name != "multipole":
        return None
    if options.get("near") == 0:
        return "centroids alone"
    return "multipole, Gaussian" if options.get("far") == "gaussian" else "multipole, centroids"


def _label(mechanism: str, *, short: bool = False) -> str:
    """`k-NN, N/4`; `16 of 128 clusters, Gaussian`."""
    name, options = _options(mechanism)
    if name == "knn":
        topk = options["topk"]
        kept = f"N/{round(1 / topk)}" if isinstance(topk, float) and (1 / topk).is_integer() else f"k = {topk}"
        return kept if short else f"k-NN, {kept}"
    if name == "multipole":
        near, clusters = options.get("near"), options.get("num_clusters")
        many = "4√N" if clusters is None else str(clusters)
        if near == 0:
            return many if short else f"{many} centroids alone"
        seen = f"{near} of {many}" if isinstance(near, int) else f"{near:g} of {many}"
        far = "Gaussian" if options.get("far") == "gaussian" else "centroids"
        return seen if short else f"{seen} clusters, {far}"
    return mechanism


def _thousandths(loss: float) -> str:
    """0.45 -> 450, 0.0042 -> 4.2: short enough for a cell, and small ones stay apart."""
    return f"{1000 * loss:.0f}" if loss >= 0.00995 else f"{1000 * loss:.1f}"


def _draw_family(axes: Axes, family: str, look: Look, marks: list[_Mark], zero: float, panel: int) -> None:
    xs = [mark.share or zero for mark in marks]
    ys = [max(1 - mark.cosines[panel], 1e-6) for mark in marks]
    axes.plot(
        xs, ys, color=look.color, marker=look.marker, markersize=5.5, linewidth=1.4, linestyle=look.dash or "none",
        label=family,
    )  # fmt: skip
    if family == "multipole, centroids":
        return  # the same clusters as the Gaussian's, which carry the labels
    for i, (x, y, mark) in enumerate(zip(xs, ys, marks, strict=True)):
        left = family == "multipole, Gaussian" and 2 * i + 1 < len(marks)  # so that neighbours keep apart
        axes.annotate(
            mark.label, (x, y), (-6 if left else 6, -7 if left else 4), textcoords="offset points",
            ha="right" if left else "left", fontsize=7.5, color=look.color,
        )  # fmt: skip


def _cosine_axis(axes: Axes) -> None:
    """A logarithmic axis of 1 - cosine, labelled with the cosine, the best on top."""
    axes.set_yscale("log")
    low, high = axes.get_ylim()
    axes.set_ylim(high * 1.15, low / 1.15)
    ticks = [m * 10.0**e for e in range(-6, 1) for m in (1, 2, 5)]
    axes.yaxis.set_major_locator(FixedLocator([t for t in ticks if low / 1.15 <= t <= min(high * 1.15, 1)]))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(
        FuncFormatter(lambda loss, _: f"{1 - loss:.{max(1, 1 - math.floor(math.log10(loss)))}g}")
    )


def _share_axis(axes: Axes, zero: float, shares: list[float]) -> None:
    """A logarithmic axis of shares with a place for 0 at its left end."""
    axes.set_xscale("log")
    ticks = [
        1 / n for n in (64, 32, 16, 8, 4, 2, 1) if min(s for s in shares if s) / 1.3 <= 1 / n <= 1.01 * max(shares)
    ]
    with_zero = [zero, *ticks] if 0.0 in shares else ticks
    axes.xaxis.set_major_locator(FixedLocator(with_zero))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: "0" if x == zero else f"1/{round(1 / x)}"))
    axes.set_xlim(zero / 1.5, max(shares) * 1.5)
