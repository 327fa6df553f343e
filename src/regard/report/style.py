"""One look for all figures: a colour, marker and dash per mechanism, quiet axes, SVG that follows the page's theme."""

import io
import itertools
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, NullLocator
from matplotlib.transforms import Bbox

from regard.report.summary import baseline_of, mechanisms_of
from regard.results import Comparison

__all__ = [
    "GRID",
    "INK",
    "MUTED",
    "PAPER",
    "Look",
    "Styles",
    "label_ends",
    "label_marks",
    "looks",
    "looks_of",
    "new_figure",
    "page_color",
    "quiet",
    "svg",
    "token_axes",
]

# These exact colours are replaced by the page's CSS variables, so figures follow its light and dark theme.
INK, MUTED, GRID, PAPER = "#1b1f24", "#5d6670", "#d9dde2", "#fefefd"
_VARIABLES = {INK: "var(--ink)", MUTED: "var(--muted)", GRID: "var(--line)", PAPER: "var(--paper)"}
# Of the palette only the blue is too dark for a dark page.
_VARIABLES["#0072b2"] = "var(--blue)"

_BASELINE = "#7b838d"
# Okabe and Ito's colours, which all common kinds of colour vision tell apart; yellow is left out, too pale on white.
_PALETTE = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")
_MARKERS = ("o", "s", "^", "D", "v", "P", "X")
_DASHES: tuple[Any, ...] = ("solid", (0, (5, 1.5)), (0, (1.5, 1.2)))

_RC: dict[Any, Any] = {
    "font.family": "DejaVu Sans",
    "font.size": 9.5,
    "svg.fonttype": "none",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": MUTED,
    "axes.linewidth": 0.7,
    "axes.labelcolor": MUTED,
    "axes.titlecolor": INK,
    "axes.titlesize": 10.5,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.facecolor": "none",
    "axes.axisbelow": True,
    "text.color": INK,
    # Class names are texts from outside: a dollar sign in them is no formula.
    "text.parse_math": False,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.major.width": 0.7,
    "ytick.major.width": 0.7,
    "grid.color": GRID,
    "grid.linewidth": 0.6,
    "figure.facecolor": "none",
    "savefig.facecolor": "none",
}


@dataclass(frozen=True)
class Look:
    """How one mechanism is drawn, everywhere."""

    color: str
    marker: str
    dash: Any


Styles = dict[str, Look]


def looks(comparison: Comparison) -> Styles:
    """A look per mechanism: grey for the baseline, then the palette; dashes change when the colours run out."""
    return looks_of(mechanisms_of(comparison), baseline_of(comparison))


def looks_of(names: Iterable[str], baseline: str) -> Styles:
    """The same for mechanisms by name."""
    others = [name for name in names if name != baseline]
    found = {baseline: Look(_BASELINE, _MARKERS[0], _DASHES[0])}
    for i, name in enumerate(others):
        dash = _DASHES[i // len(_PALETTE) % len(_DASHES)]
        found[name] = Look(_PALETTE[i % len(_PALETTE)], _MARKERS[1 + i % (len(_MARKERS) - 1)], dash)
    return found


def new_figure(width: float = 5.4, height: float = 3.7, **grid: Any) -> tuple[Figure, Any]:
    """A figure with axes in the project's look; sizes in inches. Further arguments go to Figure.subplots."""
    with rc_context(_RC):
        figure = Figure(figsize=(width, height), layout="constrained")
        return figure, figure.subplots(**grid)


def quiet(axes: Axes, title: str, x: str, y: str) -> None:
    """Title, axis names and a faint horizontal grid."""
    axes.set_title(title, pad=12, loc="left", fontweight="bold", fontsize=10.5, x=0.0)
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.grid(True, axis="y")
    axes.minorticks_off()


def page_color(look: Look) -> str:
    """A look's colour as CSS in the page's theme."""
    return _VARIABLES.get(look.color, look.color)


def label_ends(axes: Axes, ends: list[tuple[float, float, str, str]], gap: float = 12.0) -> None:
    """Write the text of each (x, y, text, colour) right of all, at its height, neighbours `gap` points apart."""
    if not ends:
        return
    right = max(x for x, _, _, _ in ends)
    figure = axes.get_figure()
    to_points = 72.0 / figure.dpi if figure is not None else 1.0
    heights = [axes.transData.transform((x, y))[1] * to_points for x, y, _, _ in ends]
    order = sorted(range(len(ends)), key=lambda i: heights[i])
    placed = dict(zip(order, _spread([heights[i] for i in order], gap), strict=True))
    for i, (_, y, text, color) in enumerate(ends):
        axes.annotate(
            text,
            (right, y),
            xytext=(7, placed[i] - heights[i]),
            textcoords="offset points",
            color=color,
            va="center",
            fontsize=9,
            annotation_clip=False,
        )


def token_axes(axes: Axes, sizes: Sequence[int], ends: list[tuple[float, float, str, str]]) -> None:
    """Log-log axes over ascending numbers of tokens, with the lines' names at their ends.

    Args:
        ends: (tokens, height, name, colour) of each line's last point. Names of lines that reach the largest size
            stand beside the axes (see `label_ends`), the others beside their points.
    """
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlim(sizes[0] / 1.12, sizes[-1] * 1.12 * 1.042 ** max((len(text) for _, _, text, _ in ends), default=0))
    axes.xaxis.set_major_locator(FixedLocator(list(sizes)))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda tokens, _: f"{tokens:,.0f}"))
    low, high = axes.get_ylim()
    axes.yaxis.set_major_locator(
        LogLocator(subs=(1.0,) if high / low > 500 else (1.0, 3.0) if high / low > 30 else (1.0, 2.0, 5.0))
    )
    axes.yaxis.set_major_formatter(FuncFormatter(lambda found, _: f"{found:,.0f}" if found >= 1 else f"{found:.4g}"))
    axes.yaxis.set_minor_locator(NullLocator())
    figure = axes.get_figure(root=True)
    if figure is not None:
        figure.canvas.draw()
    label_ends(axes, [one for one in ends if one[0] == sizes[-1]])
    label_marks(axes, [one for one in ends if one[0] < sizes[-1]])


def label_marks(axes: Axes, marks: list[tuple[float, float, str, str]]) -> None:
    """Write the text of each (x, y, text, colour) beside its mark, at the first corner where it touches nothing."""
    figure = axes.get_figure(root=True)
    if figure is None:
        return
    points = [axes.transData.transform((x, y)) for x, y, _, _ in marks]
    taken = [Bbox.from_bounds(x - 6, y - 6, 12, 12) for x, y in points]
    corners: list[tuple[int, int, Literal["left", "right"]]]
    corners = [(9, 8, "left"), (9, -8, "left"), (-9, 8, "right"), (-9, -8, "right"), (9, 22, "left"), (9, -22, "left")]
    for (x, y, text, color), own in zip(marks, list(taken), strict=True):
        label = axes.annotate(
            text, (x, y), xytext=(9, 8), textcoords="offset points", color=color, fontsize=9, va="center"
        )
        others = [box for box in taken if box is not own]
        for right, up, side in corners:
            label.set_position((right, up))
            label.set_horizontalalignment(side)
            box = label.get_window_extent()
            if not any(box.overlaps(other) for other in others) and axes.bbox.x0 < box.x0 and box.x1 < figure.bbox.x1:
                break
        taken.append(label.get_window_extent())


def _spread(heights: list[float], gap: float) -> list[float]:
    """Ascending heights moved as little as needed so that neighbours stand `gap` apart (groups keep their middle)."""
    groups: list[list[float]] = []
    for height in heights:
        groups.append([height])
        while len(groups) > 1 and _top(groups[-2], gap) + gap > _bottom(groups[-1], gap):
            last = groups.pop()
            groups[-1] += last
    return list(itertools.chain.from_iterable([_bottom(g, gap) + i * gap for i in range(len(g))] for g in groups))


def _bottom(group: list[float], gap: float) -> float:
    return sum(group) / len(group) - gap * (len(group) - 1) / 2


def _top(group: list[float], gap: float) -> float:
    return _bottom(group, gap) + gap * (len(group) - 1)


def svg(figure: Figure, name: str) -> str:
    """The figure as an <svg> element for a page: themed colours, the page's font, ids made unique by `name`."""
    out = io.StringIO()
    with rc_context({**_RC, "svg.hashsalt": name}):
        FigureCanvasSVG(figure).print_svg(out, metadata={"Date": None, "Creator": None, "Type": None, "Format": None})
    text = out.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>\s*", "", text, flags=re.DOTALL)
    text = _unique_ids(text, name)
    text = re.sub(r"font-family: [^;\"]*", "font-family: var(--font)", text)
    for color, variable in _VARIABLES.items():
        text = text.replace(color, variable)
    # A viewBox alone: the page sets the width.
    tag, end, rest = text.partition(">")
    return re.sub(r'\s(?:height|width)="[^"]*"', "", tag) + end + rest


def _unique_ids(text: str, name: str) -> str:
    """Keep the ids that something refers to, once each, with `name` in front: several figures share one page."""
    referred = set(re.findall(r'(?:href="#|url\(#)([^")]+)', text))
    seen: set[str] = set()

    def kept(match: re.Match[str]) -> str:
        found = match.group(1)
        if found not in referred or found in seen:
            return ""
        seen.add(found)
        return f' id="{name}-{found}"'

    text = re.sub(r'\sid="([^"]*)"', kept, text)
    return re.sub(r'(href="#|url\(#)', rf"\g<1>{name}-", text)
