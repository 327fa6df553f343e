"""Attention maps: the same query in the same image, under each mechanism."""

from collections.abc import Iterable, Sequence

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import FuncFormatter, NullFormatter

from regard.report.labels import narrow
from regard.report.style import MUTED, Styles, looks, new_figure
from regard.report.summary import mechanisms_of
from regard.results import AttentionMap, Comparison, ConvertedPhoto

__all__ = ["attention_maps", "draw_losses", "draw_map", "draw_query", "draw_rows", "map_rows"]

_QUERY = "#ffffff"
_HEAD_WIDTH = 15
_BRIGHTEST = 1 / 200  # of a row's weights are drawn as bright as can be
_LEAST_LOSS = 1e-3  # losses below are drawn like this one


def map_rows(comparison: Comparison) -> list[dict[str, AttentionMap]]:
    """One row an image and query: the maps by mechanism."""
    rows: dict[tuple[int, tuple[int, int]], dict[str, AttentionMap]] = {}
    for one in comparison.maps:
        rows.setdefault((one.image_index, one.query), {})[one.mechanism] = one
    return list(rows.values())


def attention_maps(comparison: Comparison, most: int = 4) -> Figure | None:
    """Rows: images. Columns: the image with its query, then one map a mechanism, on one colour scale a row."""
    rows = map_rows(comparison)[:most]
    if not rows:
        return None
    columns = [name for name in mechanisms_of(comparison) if any(name in row for row in rows)]
    return draw_rows(rows, columns, looks(comparison))


def draw_rows(rows: Sequence[dict[str, AttentionMap]], columns: Sequence[str], styles: Styles) -> Figure:
    """The rows' maps in the order of the columns, which name the mechanisms."""
    width = 1.55 * (1 + len(columns)) + 0.2
    figure, grid = new_figure(width, 1.86 * len(rows) + 0.3, nrows=len(rows), ncols=1 + len(columns), squeeze=False)
    for i, row in enumerate(rows):
        peak = _peak(row.values())
        draw_query(grid[i][0], next(iter(row.values())))
        for j, name in enumerate(columns):
            axes = grid[i][j + 1]
            axes.axis("off")
            if name in row:
                draw_map(axes, row[name], peak)
            if i == 0:
                _head(axes, name, styles)
    return figure


def _head(axes: Axes, name: str, styles: Styles) -> None:
    axes.set_title(narrow(name, _HEAD_WIDTH), color=styles[name].color, fontsize=9.5, loc="center")


def _peak(maps: Iterable[AttentionMap]) -> float:
    """The brightest colour's weight: one that few tokens exceed, or among thousands all but a few would look black."""
    weights = np.concatenate([np.ravel(one.weights) for one in maps])
    return float(np.quantile(weights, 1 - _BRIGHTEST)) or float(weights.max())


def draw_losses(photos: Sequence[ConvertedPhoto], columns: Sequence[str], styles: Styles) -> Figure:
    """Rows: photographs. Columns: the photograph, then 1 - centred cosine of every patch under each mechanism, all on
    one logarithmic scale, the same on every page."""
    width = 1.55 * (1 + len(columns)) + 0.9
    figure, grid = new_figure(width, 1.86 * len(photos) + 0.3, nrows=len(photos), ncols=1 + len(columns), squeeze=False)
    shades = ScalarMappable(LogNorm(_LEAST_LOSS, 1.0, clip=True), "magma_r")
    for i, photo in enumerate(photos):
        grid[i][0].imshow(np.asarray(photo.pixels, dtype=np.uint8), interpolation="none")
        grid[i][0].set_xlabel(_short(photo.name), fontsize=9)
        for axes, name in zip(grid[i][1:], columns, strict=True):
            losses = np.asarray(photo.losses[name], dtype=float)
            axes.imshow(shades.to_rgba(np.maximum(losses, _LEAST_LOSS), bytes=True)[..., :3], interpolation="none")
            worst = 1 - np.quantile(losses, 0.99)
            axes.set_xlabel(f"mean {1 - losses.mean():.4f}, worst 1 % {worst:.3f}", fontsize=8, color=MUTED)
            if i == 0:
                _head(axes, name, styles)
    for axes in grid.flat:
        _bare(axes)
    bar = figure.colorbar(shades, ax=list(grid[:, -1]), fraction=0.06, pad=0.03)
    bar.ax.yaxis.set_major_formatter(FuncFormatter(lambda loss, _: f"{loss:g}"))
    bar.ax.yaxis.set_minor_formatter(NullFormatter())
    bar.outline.set_visible(False)
    return figure


def draw_query(axes: Axes, one: AttentionMap) -> None:
    """The image with its query token framed, and its label below."""
    pixels = np.asarray(one.pixels, dtype=np.uint8)
    if pixels.shape[-1] == 1:
        pixels = pixels.repeat(3, axis=-1)
    axes.imshow(pixels, interpolation="none", extent=_extent(one))
    _frame_query(axes, one)
    _bare(axes)
    axes.set_xlabel(_short(one.label), fontsize=9)


def draw_map(axes: Axes, one: AttentionMap, peak: float) -> None:
    """The weights over the grid; below: on how many tokens half the weight lies, and the model's answer if wrong."""
    weights = np.asarray(one.weights, dtype=float)
    shades = (255 * colormaps["magma"](np.clip(weights / peak if peak > 0 else weights, 0, 1))[..., :3]).astype(
        np.uint8
    )
    axes.axis("on")
    axes.imshow(shades, interpolation="none", extent=_extent(one))
    _frame_query(axes, one)
    _bare(axes)
    wrong = "" if one.prediction == one.label else f"\nsays {_short(one.prediction)}"
    axes.set_xlabel(f"half on {_half(weights)} of {weights.size}{wrong}", fontsize=8.5, color=MUTED)


def _short(name: str) -> str:
    return name if len(name) <= 20 else name[:19] + "…"


def _half(weights: np.ndarray) -> int:
    """How few tokens hold half of the weight."""
    ordered = np.sort(weights.ravel())[::-1]
    return int(np.searchsorted(np.cumsum(ordered), 0.5 * ordered.sum()) + 1)


def _extent(one: AttentionMap) -> tuple[float, float, float, float]:
    return (0.0, float(len(one.weights[0])), float(len(one.weights)), 0.0)


def _frame_query(axes: Axes, one: AttentionMap) -> None:
    row, column = one.query
    for color, width in (("#000000", 2.6), (_QUERY, 1.3)):
        axes.add_patch(Rectangle((column, row), 1, 1, fill=False, edgecolor=color, linewidth=width))


def _bare(axes: Axes) -> None:
    axes.set_xticks([])
    axes.set_yticks([])
    for spine in axes.spines.values():
        spine.set_visible(False)
