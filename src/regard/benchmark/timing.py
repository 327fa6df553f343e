"""Wall-clock time of several callables side by side: interleaved, so that noise hits all of them alike."""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

__all__ = ["Clocked", "Ratio", "Timing", "interleave"]


@dataclass(frozen=True)
class Timing:
    """What one callable took, in seconds: `samples[i]` belongs to round i, in which every callable ran once."""

    samples: tuple[float, ...]

    @property
    def repeats(self) -> int:
        return len(self.samples)

    @property
    def median(self) -> float:
        return _quantile(self.samples, 0.5)

    @property
    def low(self) -> float:
        """First quartile."""
        return _quantile(self.samples, 0.25)

    @property
    def high(self) -> float:
        """Third quartile."""
        return _quantile(self.samples, 0.75)

    def ratio(self, other: "Timing") -> "Ratio":
        """How many times longer `other` took: the median of the rounds' own ratios, with their quartiles.

        Both must come from one `interleave`: neighbours in time share the machine's mood, so it cancels.
        """
        if other.repeats != self.repeats:
            raise ValueError(f"other: {other.repeats} rounds, this one has {self.repeats}; time them in one interleave")
        ratios = tuple(theirs / mine for mine, theirs in zip(self.samples, other.samples, strict=True))
        return Ratio(_quantile(ratios, 0.5), _quantile(ratios, 0.25), _quantile(ratios, 0.75))


@dataclass(frozen=True)
class Ratio:
    """A ratio of times: median and quartiles over the rounds."""

    median: float
    low: float
    high: float


@runtime_checkable
class Clocked(Protocol):
    """Runs in another process, and knows best how long that took."""

    def clock(self) -> float:
        """Run once; the seconds that it took."""


def interleave(
    callables: Mapping[str, Callable[[], Any]],
    *,
    budget_seconds: float = 2.0,
    min_rounds: int = 5,
    max_rounds: int = 200,
    warm_up: int = 2,
    synchronize: Callable[[], Any] | None = None,
) -> dict[str, Timing]:
    """Time the callables round-robin until the budget is spent. One that has a method `clock` is asked for its seconds
    instead, since it runs elsewhere.

    A round runs every callable once; each round starts one callable further on, so that none always runs after the same
    neighbour. The first `warm_up` rounds are thrown away. The number of rounds is `max_rounds` or what fits into the
    budget (warm-up included), at least one.

    Args:
        budget_seconds: when to stop. `min_rounds` may stretch it up to twice, no further.
        synchronize: waits for the device; called before each clock reading (torch.cuda.synchronize).

    Raises:
        ValueError: no callable, or a count or budget that is not positive.
    """
    if not callables:
        raise ValueError("callables: nothing to time")
    if budget_seconds <= 0 or min_rounds < 1 or max_rounds < min_rounds or warm_up < 0:
        raise ValueError(
            "budget_seconds, min_rounds, max_rounds, warm_up: expected a budget > 0, 1 <= min_rounds <= max_rounds, "
            f"warm_up >= 0; got {budget_seconds}, {min_rounds}, {max_rounds}, {warm_up}"
        )
    names = list(callables)
    samples: dict[str, list[float]] = {name: [] for name in names}
    start = time.perf_counter()
    longest = 0.0
    for turn in range(warm_up + max_rounds):
        began = time.perf_counter()
        done = max(turn - warm_up, 0)
        would_end = began - start + longest
        if done >= 1 and would_end > (1.0 if done >= min_rounds else 2.0) * budget_seconds:
            break
        # A warm-up that eats half of the budget is cut short: slow calls need it least.
        if turn < warm_up and began - start > budget_seconds / 2:
            continue
        for step in range(len(names)):
            name = names[(turn + step) % len(names)]
            seconds = _clock(callables[name], synchronize)
            if turn >= warm_up:
                samples[name].append(seconds)
        if turn >= warm_up:
            longest = max(longest, time.perf_counter() - began)
    return {name: Timing(tuple(found)) for name, found in samples.items()}


def _clock(function: Callable[[], Any], synchronize: Callable[[], Any] | None) -> float:
    if isinstance(function, Clocked):
        return function.clock()
    if synchronize is not None:
        synchronize()
    start = time.perf_counter()
    result = function()
    if synchronize is not None:
        synchronize()
    seconds = time.perf_counter() - start
    del result  # freed outside of the measured time, for all alike
    return seconds


def _quantile(values: tuple[float, ...], fraction: float) -> float:
    """Linear interpolation between the sorted values."""
    ordered = sorted(values)
    place = fraction * (len(ordered) - 1)
    below = int(place)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (place - below) * (ordered[above] - ordered[below])
