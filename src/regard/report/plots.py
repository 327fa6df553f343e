"""The figures of a comparison. Each function gives a matplotlib figure, or None where its data is missing."""

import math
import statistics
from collections.abc import Callable

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, MaxNLocator

from regard.report import wording
from regard.report.style import MUTED, Styles, label_ends, label_marks, looks, new_figure, quiet, token_axes
from regard.report.summary import baseline_of, largest_size, mechanisms_of, summarise
from regard.results import Comparison, CostPoint, EpochRecord, TrainingRun

__all__ = ["accuracy_over_epochs", "accuracy_over_seconds", "cost_accuracy", "operator_memory", "operator_time"]

# The measurement is true to about 1 MB, so the log axis starts there (bytes).
_SMALLEST_MEMORY = 1_000_000


def accuracy_over_epochs(comparison: Comparison) -> Figure | None:
    """Test accuracy after each epoch: the mean over seeds, and each seed as a thin line."""
    return _accuracy(comparison, "Accuracy over epochs", "epoch", lambda record: record.epoch)


def accuracy_over_seconds(comparison: Comparison) -> Figure | None:
    """The same against seconds of training: what an epoch costs is in the picture."""
    return _accuracy(comparison, "Accuracy over training time", "seconds of training", lambda record: record.seconds)


def _accuracy(comparison: Comparison, title: str, name: str, where: Callable[[EpochRecord], float]) -> Figure | None:
    styles = looks(comparison)
    runs = [run for run in comparison.runs if run.epochs]
    if not runs:
        return None
    figure, axes = new_figure()
    quiet(axes, title, name, "test accuracy, %")
    ends = []
    for mechanism, look in styles.items():
        mine = [run for run in runs if run.mechanism == mechanism]
        for run in mine:
            axes.plot(
                [where(record) for record in run.epochs],
                [100 * record.test_accuracy for record in run.epochs],
                color=look.color,
                linewidth=0.8,
                linestyle="solid" if run.finished else "dotted",
                alpha=0.4 if run.finished else 0.9,
            )
        mean = _mean_line([run for run in mine if run.finished], where)
        if mean:
            axes.plot(*zip(*mean, strict=True), color=look.color, linewidth=2.2, linestyle=look.dash)
            axes.plot(*mean[-1], color=look.color, marker=look.marker, markersize=5)
            ends.append((*mean[-1], mechanism, look.color))
        elif mine:
            last = mine[-1].epochs[-1]
            ends.append((where(last), 100 * last.test_accuracy, f"{mechanism} (unfinished)", look.color))
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=name == "epoch"))
    _leave_room(axes, ends)
    figure.canvas.draw()
    label_ends(axes, ends)
    return figure


def _mean_line(runs: list[TrainingRun], where: Callable[[EpochRecord], float]) -> list[tuple[float, float]]:
    epochs = zip(*(run.epochs for run in runs), strict=False) if runs else ()
    return [
        (statistics.fmean(where(record) for record in one), 100 * statistics.fmean(r.test_accuracy for r in one))
        for one in epochs
    ]


def _leave_room(axes: Axes, ends: list[tuple[float, float, str, str]]) -> None:
    """Widen the x axis so that the labels at the lines' ends stand inside the figure."""
    longest = max((len(text) for _, _, text, _ in ends), default=0)
    low, high = axes.get_xlim()
    ticks = [tick for tick in axes.get_xticks() if low <= tick <= high]
    share = min(0.018 * longest, 0.45)
    axes.set_xlim(low, high + (high - low) * share / (1 - share))
    axes.xaxis.set_major_locator(FixedLocator(ticks))


def cost_accuracy(comparison: Comparison, *, operator: bool = False) -> Figure | None:
    """The cost-accuracy plane: up and to the left is better.

    Args:
        operator: False: cost is the trained model's time per test image. True: cost is the operator's forward +
            backward time at the largest size measured, beside the same accuracies.
    """
    summaries = [one for one in summarise(comparison) if one.accuracy is not None]
    costs = _operator_cost(comparison) if operator else None
    tokens = largest_size(comparison.costs)
    styles = looks(comparison)
    marks = []
    for one in summaries:
        if costs is None:
            speeds = [run.test_images_per_second for run in one.runs if run.test_images_per_second > 0]
            found = [1e3 / speed for speed in speeds]
        else:
            found = [1e3 * seconds for seconds in costs.get(one.mechanism, ())]
        if found:
            middle = statistics.median(found)
            marks.append((one, middle, middle - min(found), max(found) - middle))
    if not marks:
        return None
    figure, axes = new_figure()
    x = f"operator at {tokens:,} tokens, forward + backward, ms" if operator else "milliseconds per test image"
    title = (
        f"Accuracy and the operator's cost at {tokens:,} tokens"
        if operator
        else "Accuracy and the trained model's cost"
    )
    quiet(axes, title, x, "test accuracy, %")
    ends = []
    for one, middle, low, high in marks:
        look = styles[one.mechanism]
        y = 100 * (one.accuracy or 0.0)
        axes.errorbar(
            [middle],
            [y],
            xerr=[[low], [high]],
            yerr=None if one.spread is None else [[100 * one.spread]],
            fmt=look.marker,
            color=look.color,
            markersize=8,
            elinewidth=1.2,
            capsize=0,
        )
        ends.append((middle, y, one.mechanism, look.color))
    _pad(axes)
    axes.annotate("better", (0.015, 0.985), xycoords="axes fraction", va="top", color=MUTED, fontsize=9, style="italic")
    figure.canvas.draw()
    label_marks(axes, ends)
    return figure


def _operator_cost(comparison: Comparison) -> dict[str, tuple[float, float, float]]:
    size = largest_size(comparison.costs)
    return {
        point.mechanism: (point.seconds_low, point.seconds, point.seconds_high)
        for point in comparison.costs
        if point.direction == "forward+backward" and point.tokens == size
    }


def _pad(axes: Axes) -> None:
    """Room around the marks, so that few points do not sit on the frame; no cost below zero."""
    (left, right), (low, high) = axes.get_xlim(), axes.get_ylim()
    width, height = max(right - left, 0.15 * right), max(high - low, 1.0)
    axes.set_xlim(max(0.0, left - 0.3 * width), right + 0.45 * width)
    axes.set_ylim(low - 0.2 * height, high + 0.3 * height)


def operator_time(comparison: Comparison, direction: str) -> Figure | None:
    """Operator time over tokens, log-log, with quartile bars; rings mark where a mechanism overtakes the baseline."""
    points = [point for point in comparison.costs if point.direction == direction]
    if not points:
        return None
    what = direction.replace("+", " + ")
    figure, axes = _over_tokens(
        comparison, points, f"Operator time, {what}", "milliseconds", lambda point: 1e3 * point.seconds, bars=True
    )
    _mark_crossovers(axes, comparison, direction)
    return figure


def operator_memory(comparison: Comparison, direction: str) -> Figure | None:
    """Peak memory of the operator over tokens, log-log."""
    points = [point for point in comparison.costs if point.direction == direction and point.peak_memory is not None]
    if not points:
        return None
    what = direction.replace("+", " + ")
    return _over_tokens(
        comparison,
        points,
        f"Operator's peak memory, {what}",
        "MB beyond inputs, outputs, gradients",
        lambda point: max(point.peak_memory or 0, _SMALLEST_MEMORY) / 1e6,
    )[0]


def _over_tokens(
    comparison: Comparison,
    points: list[CostPoint],
    title: str,
    y: str,
    value: Callable[[CostPoint], float],
    bars: bool = False,
) -> tuple[Figure, Axes]:
    figure, axes = new_figure()
    quiet(axes, title, "tokens", y)
    ends = []
    for mechanism in mechanisms_of(comparison):
        look = looks(comparison)[mechanism]
        mine = sorted((p for p in points if p.mechanism == mechanism), key=lambda p: p.tokens)
        if not mine:
            continue
        xs, ys = [p.tokens for p in mine], [value(p) for p in mine]
        axes.plot(xs, ys, color=look.color, linewidth=2, linestyle=look.dash, marker=look.marker, markersize=5)
        if bars:
            axes.vlines(
                xs,
                [1e3 * p.seconds_low for p in mine],
                [1e3 * p.seconds_high for p in mine],
                look.color,
                lw=4,
                alpha=0.3,
            )
        ends.append((float(xs[-1]), ys[-1], mechanism, look.color))
    token_axes(axes, sorted({point.tokens for point in points}), ends)
    return figure, axes


def _mark_crossovers(axes: Axes, comparison: Comparison, direction: str) -> None:
    baseline = sorted(
        (p.tokens, 1e3 * p.seconds)
        for p in comparison.costs
        if p.mechanism == baseline_of(comparison) and p.direction == direction
    )
    styles: Styles = looks(comparison)
    found = [one for one in comparison.crossovers if one.direction == direction and one.tokens and not one.always]
    for i, one in enumerate(sorted(found, key=lambda one: one.tokens or 0.0)):
        tokens = one.tokens or 0.0
        y = _on_line(baseline, tokens)
        if y is None:
            continue
        color = styles[one.mechanism].color
        axes.plot(
            [tokens], [y], marker="o", markersize=11, markerfacecolor="none", markeredgecolor=color, markeredgewidth=1.6
        )
        axes.annotate(
            f"faster from ≈ {wording.number(tokens)}",
            (tokens, y),
            xytext=(10, -24 - 15 * i),
            textcoords="offset points",
            color=color,
            fontsize=9,
            arrowprops={"arrowstyle": "-", "color": color, "lw": 0.7, "shrinkB": 6},
        )


def _on_line(points: list[tuple[int, float]], tokens: float) -> float | None:
    """Height of the log-log line through `points` at `tokens`."""
    for (left, low), (right, high) in zip(points, points[1:], strict=False):
        if left <= tokens <= right:
            share = 0.0 if left == right else math.log(tokens / left) / math.log(right / left)
            return low * (high / low) ** share
    return None
