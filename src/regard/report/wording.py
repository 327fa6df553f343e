"""Numbers and verdicts as text, the same in the terminal, the page and the picture."""

from regard.report.summary import Difference, Ratio, Summary

__all__ = ["accuracy", "count", "difference", "megabytes", "number", "ratio", "verdict"]

MISSING = "–"


def number(value: float | None) -> str:
    """Three significant digits and no exponent: 0.0123, 1.23, 12.3, 1,230."""
    if value is None:
        return MISSING
    if value == 0:
        return "0"
    size = abs(value)
    digits = 0 if size >= 100 else 1 if size >= 10 else 2 if size >= 1 else 3
    rounded = float(f"{value:.3g}")
    return f"{rounded:,.{digits}f}"


def count(value: int | None) -> str:
    """1,234 or 12.3 M or 4.56 G."""
    if value is None:
        return MISSING
    for unit, size in (("G", 10**9), ("M", 10**6)):
        if value >= size:
            return f"{value / size:.3g} {unit}"
    return f"{value:,}"


def megabytes(value: int | None) -> str:
    """Bytes in MB of 10^6 bytes; the measurement does not tell less than one from nothing."""
    if value is None:
        return MISSING
    if value < 1e6:
        return "< 1 MB"
    return f"{value / 1e6:,.1f} MB" if value < 10e6 else f"{value / 1e6:,.0f} MB"


def accuracy(summary: Summary) -> str:
    """Per cent, mean ± standard deviation over the seeds."""
    if summary.accuracy is None:
        return MISSING
    spread = "" if summary.spread is None else f" ± {100 * summary.spread:.1f}"
    return f"{100 * summary.accuracy:.1f}{spread}"


def difference(found: Difference | None) -> str:
    """Points of accuracy, mean ± half of the 95 % interval."""
    if found is None:
        return MISSING
    half = "" if found.half_width is None else f" ± {100 * found.half_width:.1f}"
    return f"{100 * found.mean:+.1f}{half}".replace("-", "−")


def verdict(found: Difference | None) -> str:
    """What the difference shows."""
    if found is None:
        return MISSING
    if found.half_width is None:
        return "one seed, cannot tell"
    if not found.shown:
        return "no difference shown"
    return "more accurate" if found.mean > 0 else "less accurate"


def ratio(found: Ratio | None) -> str:
    """`1.6x faster`, `1.3x slower`, or `level` where the quartile ranges overlap."""
    if found is None:
        return MISSING
    if not found.shown:
        return "level"
    return f"{number(found.value)}x faster" if found.value > 1 else f"{number(1 / found.value)}x slower"
