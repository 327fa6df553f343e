"""What each mechanism's operator costs beside dense attention's: time, FLOPs and peak memory over the number of
tokens."""

import dataclasses
import math
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

from regard.benchmark.memory import Job, Peak, measure_peaks
from regard.benchmark.timing import Timing, interleave
from regard.benchmark.workload import DIRECTIONS, Shape, attend_of, attention
from regard.conversion.flops import counting_flops
from regard.ops import explain
from regard.results import CostPoint, Crossover
from regard.specs import Mechanism

__all__ = ["crossover", "measure_costs", "peak_memories"]

Progress = Callable[[int, int, str], None]
_MEMORY_SHARE = 0.35  # of the budget, at most: starting a measuring process takes seconds
_WARM_UP_TOKENS = 16
_LEAST_ROUNDS = 3


def measure_costs(
    mechanisms: Sequence[Mechanism],
    *,
    tokens: Sequence[int] = (196, 784, 1600, 3136),
    batch: int = 1,
    heads: int = 6,
    head_dim: int = 64,
    dtype: str = "float32",
    device: str = "cpu",
    budget_seconds: float = 60.0,
    on_progress: Progress | None = None,
) -> list[CostPoint]:
    """Measure the mechanisms' operators forward and forward + backward, all interleaved at each size.

    Sizes are taken in ascending order. One whose three rounds would not fit into what is left of the budget, judged by
    the size before it and growth with the square, is left out together with all larger ones. The peak memory (see
    regard.benchmark.memory) is None where the time did not suffice or the mechanism is not known by its text form.

    Args:
        mechanisms: values; dense attention has no special place but is needed by `crossover`.
        tokens: sizes; the grid is square where it can be.
        budget_seconds: for everything, processes that measure memory included.
        on_progress: called with (steps done, steps in all, what comes next).

    Returns:
        One point a mechanism, size and direction that was measured, by size, direction, mechanism.

    Raises:
        ValueError: no mechanisms, the same one twice, no sizes, or a size that is no positive int.
    """
    if len({str(one) for one in mechanisms}) != len(mechanisms) or not mechanisms:
        raise ValueError(f"mechanisms: expected different ones, at least one, got {[str(one) for one in mechanisms]}")
    if not tokens:
        raise ValueError("tokens: expected at least one size")
    if not budget_seconds > 0:
        raise ValueError(f"budget_seconds: expected a positive number, got {budget_seconds}")
    start = time.perf_counter()
    shapes = [Shape(size, batch, heads, head_dim, dtype, device) for size in sorted(set(tokens))]
    tell = on_progress or (lambda done, total, what: None)
    total = len(shapes) * len(DIRECTIONS) + 1
    ends = start + (1 - _MEMORY_SHARE) * budget_seconds
    points: list[CostPoint] = []
    spent: dict[str, tuple[int, float]] = {}  # direction -> tokens and seconds of the last round
    for place, shape in enumerate(shapes):
        for turn, direction in enumerate(DIRECTIONS):
            done = place * len(DIRECTIONS) + turn
            left = ends - time.perf_counter()
            before = spent.get(direction)
            expected = before[1] * (shape.tokens / before[0]) ** 2 if before else 0.0
            if left <= 0 or _LEAST_ROUNDS * expected > left:
                tell(done, total, f"{shape.tokens} tokens and more, {direction}: left out, the time does not suffice")
                spent[direction] = (shape.tokens, math.inf)
                continue
            tell(done, total, f"{shape.tokens} tokens, {direction}")
            # Large sizes need most of the time: a share that grows with what is still to come.
            share = min(left, max(left / (total - 1 - done), 4 * expected))
            timings, flops = _time(mechanisms, shape, direction, share)
            spent[direction] = (shape.tokens, sum(timing.median for timing in timings.values()))
            for one in mechanisms:
                points.append(_point(one, shape, direction, timings[str(one)], flops[str(one)]))
    tell(total - 1, total, "peak memory, in processes of its own")
    remaining = budget_seconds - (time.perf_counter() - start)
    if points and remaining > 1:
        peaks = peak_memories(points, device, timeout_seconds=remaining)
        points = [dataclasses.replace(one, peak_memory=peak.bytes) for one, peak in zip(points, peaks, strict=True)]
    tell(total, total, "costs measured")
    return points


def peak_memories(points: Sequence[CostPoint], device: str = "cpu", timeout_seconds: float = 300.0) -> list[Peak]:
    """The peak memory of each point's mechanism, size and direction, in a fresh process each."""
    jobs = []
    for one in points:
        shape = Shape(one.tokens, one.batch, one.heads, one.head_dim, one.dtype, device)
        common = {"mechanism": one.mechanism, "direction": one.direction}
        tiny = dataclasses.replace(shape, tokens=min(_WARM_UP_TOKENS, one.tokens), batch=1)
        jobs.append(
            Job(
                "regard.benchmark.workload:prepare_attention",
                arguments={**common, "shape": dataclasses.asdict(shape)},
                warm_up={**common, "shape": dataclasses.asdict(tiny)},
            )
        )
    return measure_peaks(jobs, device=device, timeout_seconds=timeout_seconds)


def crossover(points: Sequence[CostPoint]) -> list[Crossover]:
    """From how many tokens on each mechanism is faster than dense attention, by mechanism and direction.

    Between two measured sizes the ratio of times is taken as a straight line on log-log axes. The size found is the
    smallest from which the mechanism stays faster up to the largest measured; `tokens` is None where it is slower
    there. Without dense attention among the points, or a common size, a mechanism has no entry.
    """
    dense = {(one.direction, one.tokens): one.seconds for one in points if one.mechanism == "dense"}
    found = []
    keys = dict.fromkeys((one.mechanism, one.direction) for one in points if one.mechanism != "dense")
    for mechanism, direction in keys:
        ratios = sorted(
            (one.tokens, math.log(one.seconds / dense[direction, one.tokens]))
            for one in points
            if (one.mechanism, one.direction) == (mechanism, direction) and (direction, one.tokens) in dense
        )
        if ratios:
            found.append(_crossover(mechanism, direction, ratios))
    return found


def _crossover(mechanism: str, direction: str, ratios: list[tuple[int, float]]) -> Crossover:
    """`ratios`: tokens and the logarithm of own time over dense time, ascending."""
    slower = [place for place, (_, ratio) in enumerate(ratios) if ratio >= 0]
    if not slower:
        return Crossover(mechanism, direction, float(ratios[0][0]), always=True)
    if slower[-1] == len(ratios) - 1:
        return Crossover(mechanism, direction, None)
    (before, above), (after, below) = ratios[slower[-1]], ratios[slower[-1] + 1]
    part = above / (above - below)
    return Crossover(mechanism, direction, math.exp(math.log(before) + part * math.log(after / before)))


def _time(
    mechanisms: Sequence[Mechanism], shape: Shape, direction: str, budget_seconds: float
) -> tuple[dict[str, Timing], dict[str, int]]:
    inputs = shape.normal(4)
    calls = {str(one): attention(attend_of(one, shape), inputs, direction) for one in mechanisms}
    flops = {}
    for name, call in calls.items():
        with counting_flops() as counter:
            call()
        flops[name] = counter.get_total_flops()
    wait = torch.cuda.synchronize if inputs[0].device.type == "cuda" else None
    timings = interleave(
        calls, budget_seconds=budget_seconds, min_rounds=_LEAST_ROUNDS, max_rounds=100, synchronize=wait
    )
    return timings, flops


def _point(mechanism: Mechanism, shape: Shape, direction: str, timing: Timing, flops: int) -> CostPoint:
    return CostPoint(
        mechanism=str(mechanism),
        tokens=shape.tokens,
        batch=shape.batch,
        heads=shape.heads,
        head_dim=shape.head_dim,
        dtype=shape.dtype,
        direction=direction,
        backend=_backend(mechanism, shape),
        seconds=timing.median,
        seconds_low=timing.low,
        seconds_high=timing.high,
        repeats=timing.repeats,
        flops=flops,
    )


def _backend(mechanism: Mechanism, shape: Shape) -> str:
    """Which backend of the mechanism's operator runs: `sdpa` for dense, `pytorch` where there is no operator."""
    if mechanism.name == "dense":
        return "sdpa"
    options: dict[str, Any] = {}
    if dataclasses.is_dataclass(mechanism):
        options = {one.name: getattr(mechanism, one.name) for one in dataclasses.fields(mechanism)}
    size = (1, shape.heads, shape.tokens, shape.head_dim)
    sample = torch.empty(size, device=shape.device, dtype=shape.torch_dtype)  # nothing is computed with it
    try:
        return explain(f"{mechanism.name}_attention", sample, sample, sample, **options).backend
    except (TypeError, ValueError):
        return "pytorch"
