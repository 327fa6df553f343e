"""The one picture of a comparison: who looks at whom, what accuracy it keeps, what the operator costs."""

import io
from pathlib import Path

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image

from regard.report import maps, plots
from regard.report.labels import labelled
from regard.report.style import PAPER
from regard.results import Comparison

__all__ = ["raster", "summary_picture", "write_picture"]


def summary_picture(comparison: Comparison, *, width: int = 1200) -> Image.Image:
    """Left: attention maps of four test images. Right: accuracy against cost, and the operator's time over tokens.

    Args:
        width: of the picture, in pixels.

    Raises:
        ValueError: the comparison holds no finished runs, no maps or no operator costs.
    """
    comparison = labelled(comparison)
    left = maps.attention_maps(comparison, most=4)
    right = [plots.cost_accuracy(comparison), plots.operator_time(comparison, "forward+backward")]
    if left is None or any(figure is None for figure in right):
        raise ValueError("comparison: the picture needs finished runs, attention maps and operator costs")
    figures = [figure for figure in right if figure is not None]
    dpi = 2 * width / (left.get_figwidth() + max(figure.get_figwidth() for figure in figures))
    margin = width // 25
    dpi *= 1 - 1.5 * margin / (2 * width)
    column, panels = raster(left, dpi), [raster(figure, dpi) for figure in figures]
    height = max(column.height, sum(panel.height for panel in panels))
    canvas = Image.new("RGB", (2 * width, height), PAPER)
    canvas.paste(column, (margin // 2, (height - column.height) // 2))
    gap = (height - sum(panel.height for panel in panels)) // (len(panels) + 1)
    y = gap
    for panel in panels:
        canvas.paste(panel, (column.width + margin, y))
        y += panel.height + gap
    return canvas.resize((width, round(height / 2)), Image.Resampling.LANCZOS)


def write_picture(comparison: Comparison, path: Path, *, width: int = 1200) -> None:
    """Write `summary_picture` as a PNG, whole or not at all."""
    picture = summary_picture(comparison, width=width)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".part")
    picture.save(temporary, format="PNG", optimize=True)
    temporary.replace(path)


def raster(figure: Figure, dpi: float) -> Image.Image:
    """The figure in pixels, on the page's colour."""
    out = io.BytesIO()
    FigureCanvasAgg(figure).print_figure(out, format="png", dpi=dpi, facecolor=PAPER)
    return Image.open(out).convert("RGB")
