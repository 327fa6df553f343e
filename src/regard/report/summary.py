"""What a comparison says about each mechanism: means, spreads, paired differences and ratios to the baseline."""

import math
import statistics
from dataclasses import dataclass

from regard.results import Comparison, CostPoint, TrainingRun

__all__ = [
    "DIRECTIONS",
    "Difference",
    "Ratio",
    "Summary",
    "baseline_of",
    "largest_size",
    "mechanisms_of",
    "paired_difference",
    "summarise",
    "t_quantile",
]

DIRECTIONS = ("forward", "forward+backward")


@dataclass(frozen=True)
class Difference:
    """Accuracy less the baseline's, paired by seed.

    Args:
        mean: mean over the seeds, as a fraction.
        half_width: half of the 95 % t-interval of that mean; None with fewer than two pairs.
        pairs: seeds that both mechanisms finished.
    """

    mean: float
    half_width: float | None
    pairs: int

    @property
    def shown(self) -> bool:
        """True if the interval leaves zero out."""
        return self.half_width is not None and abs(self.mean) > self.half_width


@dataclass(frozen=True)
class Ratio:
    """The baseline's operator time over this mechanism's: above 1 is faster than the baseline.

    Args:
        value: ratio of the medians.
        low, high: ratios of the facing quartiles, so the truth of a repeat lies mostly between them.
    """

    value: float
    low: float
    high: float

    @property
    def shown(self) -> bool:
        """True if the quartile ranges of the two times do not overlap."""
        return self.low > 1.0 or self.high < 1.0


@dataclass(frozen=True)
class Summary:
    """One mechanism in one line. Values that were not measured are None."""

    mechanism: str
    asked: int  # runs asked for
    runs: tuple[TrainingRun, ...]  # finished ones
    accuracy: float | None
    spread: float | None  # standard deviation over seeds
    difference: Difference | None  # None for the baseline itself
    train_seconds: float | None
    train_images_per_second: float | None
    test_images_per_second: float | None
    parameters: int | None
    forward_flops: int | None
    peak_memory: int | None  # bytes, operator, forward + backward, at the largest size
    speed: dict[tuple[str, int], Ratio]  # by direction and tokens; empty for the baseline
    failure: str = ""


def t_quantile(degrees: int) -> float:
    """The 0.975 quantile of Student's t with `degrees` >= 1 degrees of freedom, by bisection of its closed form."""
    low, high = 0.0, 16.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if _within(middle, degrees) < 0.95 else (low, middle)
    return high


def _within(t: float, degrees: int) -> float:
    """P(|T| < t), the finite series of Abramowitz and Stegun 26.7.3 and 26.7.4."""
    angle = math.atan2(t, math.sqrt(degrees))
    sine, cosine = math.sin(angle), math.cos(angle)
    odd = degrees % 2
    term = total = cosine if odd else 1.0
    for i in range(2 if odd else 1, degrees - 1, 2):
        term *= cosine * cosine * i / (i + 1)
        total += term
    if odd:
        return 2 / math.pi * (angle + (sine * total if degrees > 1 else 0.0))
    return sine * total


def mechanisms_of(comparison: Comparison) -> list[str]:
    """The mechanisms asked for, then any others that were found, in order of appearance."""
    asked = [str(one) for one in comparison.settings.get("mechanisms", ())]
    found = [run.mechanism for run in comparison.runs] + [point.mechanism for point in comparison.costs]
    return list(dict.fromkeys(asked + found))


def baseline_of(comparison: Comparison) -> str:
    """What the others are measured against: dense attention if it took part, else the first mechanism."""
    names = mechanisms_of(comparison)
    return "dense" if "dense" in names else (names[0] if names else "")


def summarise(comparison: Comparison) -> list[Summary]:
    """One Summary a mechanism, in the order asked for."""
    baseline = baseline_of(comparison)
    return [_summary(comparison, name, baseline) for name in mechanisms_of(comparison)]


def _summary(comparison: Comparison, mechanism: str, baseline: str) -> Summary:
    runs = [run for run in comparison.runs if run.mechanism == mechanism and run.finished]
    seeds = comparison.settings.get("seeds", len(runs))
    first = runs[0] if runs else None
    failures = [run.failure for run in comparison.runs if run.mechanism == mechanism and run.failure]
    return Summary(
        mechanism=mechanism,
        asked=len(seeds) if isinstance(seeds, list | tuple) else int(seeds),
        runs=tuple(runs),
        accuracy=statistics.fmean(run.accuracy for run in runs) if runs else None,
        spread=statistics.stdev(run.accuracy for run in runs) if len(runs) > 1 else None,
        difference=None if mechanism == baseline else paired_difference(comparison, mechanism, baseline),
        train_seconds=statistics.median(run.epochs[-1].seconds for run in runs) if runs else None,
        train_images_per_second=statistics.median(run.train_images_per_second for run in runs) if runs else None,
        test_images_per_second=statistics.median(run.test_images_per_second for run in runs) if runs else None,
        parameters=first.parameters if first else None,
        forward_flops=first.forward_flops if first else None,
        peak_memory=_peak_memory(comparison.costs, mechanism),
        speed={} if mechanism == baseline else _speed(comparison.costs, mechanism, baseline),
        failure=failures[0] if failures else "",
    )


def paired_difference(comparison: Comparison, mechanism: str, baseline: str) -> Difference | None:
    """One mechanism's accuracy less another's, seed by seed; None if they share no finished seed."""
    by_seed = {
        name: {run.seed: run.accuracy for run in comparison.runs if run.mechanism == name and run.finished}
        for name in (mechanism, baseline)
    }
    seeds = sorted(set(by_seed[mechanism]) & set(by_seed[baseline]))
    differences = [by_seed[mechanism][seed] - by_seed[baseline][seed] for seed in seeds]
    if not differences:
        return None
    count = len(differences)
    half = t_quantile(count - 1) * statistics.stdev(differences) / math.sqrt(count) if count > 1 else None
    return Difference(statistics.fmean(differences), half, count)


def largest_size(costs: list[CostPoint]) -> int:
    """The most tokens that every direction was measured at (a short budget drops large sizes); 0 without costs."""
    sizes = [{point.tokens for point in costs if point.direction == one} for one in {p.direction for p in costs}]
    return max(set.intersection(*sizes), default=0) if sizes else 0


def _peak_memory(costs: list[CostPoint], mechanism: str) -> int | None:
    size = largest_size(costs)
    found = {p.direction: p.peak_memory for p in costs if p.mechanism == mechanism and p.tokens == size}
    return found.get(DIRECTIONS[-1])


def _speed(costs: list[CostPoint], mechanism: str, baseline: str) -> dict[tuple[str, int], Ratio]:
    reference = {(p.direction, p.tokens): p for p in costs if p.mechanism == baseline}
    found = {}
    for point in costs:
        base = reference.get((point.direction, point.tokens))
        if point.mechanism == mechanism and base is not None:
            found[point.direction, point.tokens] = Ratio(
                base.seconds / point.seconds,
                base.seconds_low / point.seconds_high,
                base.seconds_high / point.seconds_low,
            )
    return found
