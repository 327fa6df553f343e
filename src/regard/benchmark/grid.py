"""The grid of `regard bench`: which operator at which size, and how one point of it is measured."""

import dataclasses
import math
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from regard.benchmark.against import Against, AgainstError
from regard.benchmark.entry import Case, Entry, Peer, output_gradient, prepared_call
from regard.benchmark.memory import Job, bytes_of, measure_peaks
from regard.benchmark.on_gpu import OnGPU, input_sets
from regard.benchmark.operators import entries_of
from regard.benchmark.timing import Ratio, Timing, interleave
from regard.benchmark.workload import FORWARD, FORWARD_BACKWARD
from regard.ops import SlowPathWarning, explain
from regard.results import BenchCell, BenchTime

__all__ = [
    "OWN",
    "Grid",
    "Point",
    "expected_seconds",
    "measure_memory",
    "measure_point",
    "points_of",
    "prepare_contender",
]

OWN = "regard"
_HALVES = ("bfloat16", "float16")
_SLOW = 0.25  # of a point's time: whoever takes longer for one run is timed apart, so that the others keep their rounds
_JUDGED_QUERIES = 1024  # of an approximation, at least
_GATE_SECONDS = {True: 4.0, False: 1.0}  # of a point of some thousand tokens, and of smaller ones


@dataclass(frozen=True)
class Point:
    """One operator at one size, in one dtype and direction."""

    entry: Entry
    case: Case
    dtype: str
    direction: str

    @property
    def key(self) -> tuple[str, str, str, str]:
        """As BenchCell.key."""
        return (self.entry.name, self.case.label, self.dtype, self.direction)

    def __str__(self) -> str:
        return f"{self.entry.name}, {self.case.label}, {self.dtype}, {self.direction}"

    def peers(self) -> list[Peer]:
        """The entry's, and the operator itself in float32 beside a half type."""
        own = Peer("float32", lambda case: _in_float32(self.entry.own(case)), growth=1.0)
        return [*self.entry.peers, *([own] if self.dtype in _HALVES else [])]

    def contender(self, name: str) -> Callable[..., Any]:
        """By name: the operator or a peer, as a callable that takes the operator's tensors by name."""
        if name == OWN:
            return self.entry.own(self.case)
        return next(peer for peer in self.peers() if peer.name == name).make(self.case)


def _in_float32(function: Callable[..., Any]) -> Callable[..., Any]:
    def call(**tensors: Tensor) -> Any:
        return function(**_raised(tensors))

    return call


def _raised(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: one.float() if one.is_floating_point() else one for name, one in tensors.items()}


def points_of(
    entries: Sequence[Entry], *, dtypes: Sequence[str], directions: Sequence[str], quick: bool = False
) -> list[Point]:
    """All points of the grid: by operator, dtype, direction, and series in ascending sizes."""
    return [
        Point(entry, case, dtype, direction)
        for entry in entries
        for dtype in dtypes
        for direction in entry.directions
        if direction in directions
        for case in entry.cases
        if case.quick or not quick
    ]


def expected_seconds(points: Sequence[Point], seconds: float) -> float:
    """Roughly how long measuring the points takes: the rounds, as much again for slow peers, gates, processes."""
    gates = [_GATE_SECONDS[point.case.tokens > 2000] for point in points]
    return sum(1.7 * seconds + 1.0 for _ in points) + sum(gates) + 6.0 * len({p.entry.name for p in points})


@dataclass
class Grid:
    """How points are measured, and what is remembered from one to the next.

    Args:
        seconds: of each point's interleaved rounds.
        patience: a peer whose one run would take longer, judged by its last size and its growth with the tokens, is
            left out, and so is the gradient of one whose forward took more than a third of it.
        inputs: of an operator's name and a case: recorded tensors instead of random ones, or None.
        against: another checkout, beside which every point is measured, too.
    """

    seconds: float = 2.0
    patience: float = 5.0
    device: str = "cpu"
    inputs: Callable[[str, Case], dict[str, Tensor] | None] = lambda name, case: None
    against: Against | None = None
    _runs: dict[tuple[str, ...], tuple[int, float]] = field(default_factory=dict)

    def tensors(self, point: Point) -> dict[str, Tensor]:
        recorded = self.inputs(point.entry.name, point.case)
        if recorded is None:
            return point.entry.inputs(point.case, point.dtype, self.device)
        kind = getattr(torch, point.dtype)
        return {n: one.to(self.device, kind if one.is_floating_point() else None) for n, one in recorded.items()}

    def gate(self, point: Point, tensors: dict[str, Tensor]) -> Any:
        """What the direction computes is judged: gradients that are off budget say nothing of the forward's speed."""
        with warnings.catch_warnings():  # float64 is the measure, and slow: no news
            warnings.filterwarnings("ignore", ".*torch.float64 is not among", SlowPathWarning)
            return point.entry.gate(point.case, tensors, point.direction != FORWARD)

    def too_slow(self, point: Point, peer: Peer) -> str:
        """Why a peer is left out for its time; empty if it is not."""
        before = self._runs.get(self._line(point, peer.name))
        if before is None:
            return ""
        tokens, seconds = before
        expected = seconds * (point.case.tokens / tokens) ** peer.growth
        if expected <= self.patience:
            return ""
        return f"about {expected:.0f} s a run; --patience {math.ceil(1.1 * expected)} takes it"

    def remember(self, point: Point, name: str, seconds: float) -> None:
        self._runs[self._line(point, name)] = (point.case.tokens, seconds)
        backward = dataclasses.replace(point, direction=FORWARD_BACKWARD)
        self._runs.setdefault(self._line(backward, name), (point.case.tokens, 3 * seconds))

    @staticmethod
    def _line(point: Point, name: str) -> tuple[str, ...]:
        case = point.case
        return (point.entry.name, case.series, f"{case.batch} {case.heads} {case.head_dim}", point.direction, name)


def measure_point(point: Point, grid: Grid) -> BenchCell:
    """Gate first; then, if it is green, time the operator and its peers in interleaved rounds."""
    tensors = grid.tensors(point)
    gate = grid.gate(point, tensors)
    case = point.case
    cell = BenchCell(
        operator=point.entry.name,
        label=case.label,
        series=case.series,
        tokens=case.tokens,
        batch=case.batch,
        heads=case.heads,
        head_dim=case.head_dim,
        dtype=point.dtype,
        direction=point.direction,
        gate=str(gate),
        passed=bool(gate.passed),
        backend=_backend(point, tensors),
    )
    if not cell.passed:
        return cell
    cell.flops, results = point.entry.counted(case, point.direction, _ready(point, OWN, [tensors]))
    cell.bytes = bytes_of([*tensors.values(), *results]) + (0 if point.direction == FORWARD else bytes_of(results[:1]))
    if point.entry.approximates:
        cell.cosine = _cosine_to_dense(results[0], tensors)
    del results
    sets = input_sets(tensors, grid.device) if _on_gpu(grid.device) else [tensors]
    calls: dict[str, Callable[[], Any]] = {OWN: _ready(point, OWN, sets)}
    skipped: dict[str, str] = {}
    slow: dict[str, float] = {}
    for peer in point.peers():
        reason = peer.refuses(case, point.dtype, point.direction) or grid.too_slow(point, peer)
        if reason:
            skipped[peer.name] = reason
            continue
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of others' code: their users' business
                call = _ready(point, peer.name, sets)
                seconds = _once(call, grid.device)
        except Exception as error:  # of whatever a peer is made of: its own figure is missing, no other
            skipped[peer.name] = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
            continue
        calls[peer.name] = call
        if seconds > _SLOW * grid.seconds and not peer.compiles:
            slow[peer.name] = seconds
    found = time_contenders(calls, grid.seconds, grid.device, known=slow)
    for name in calls:
        cell.times.append(_bench_time(name, *found[name]))
        grid.remember(point, name, found[name][0].median)
    cell.times += [BenchTime(name, skipped=reason) for name, reason in skipped.items()]
    if grid.against is not None:
        cell.times.append(_measure_against(point, grid, grid.against, tensors))
    return cell


def _cosine_to_dense(output: Tensor, tensors: dict[str, Tensor]) -> float:
    """Mean cosine of the outputs to those of dense attention, over queries that lie evenly among all."""
    query, key, value = (tensors[name] for name in ("query", "key", "value"))
    step = max(1, query.shape[2] // _JUDGED_QUERIES)
    dense = torch.nn.functional.scaled_dot_product_attention(query[:, :, ::step], key, value)
    mine = output.detach()[:, :, ::step]
    return torch.nn.functional.cosine_similarity(mine.double(), dense.double(), dim=-1).mean().item()


def _backend(point: Point, tensors: dict[str, Tensor]) -> str:
    try:
        return explain(point.entry.operator, **tensors, **point.case.options).backend
    except (TypeError, ValueError):  # an operator of one backend need not answer
        return ""


def _bench_time(name: str, timing: Timing, slower: Ratio) -> BenchTime:
    return BenchTime(
        name,
        seconds=timing.median,
        seconds_low=timing.low,
        seconds_high=timing.high,
        repeats=timing.repeats,
        slower=slower.median,
        slower_low=slower.low,
        slower_high=slower.high,
    )


def _measure_against(point: Point, grid: Grid, against: Against, tensors: dict[str, Tensor]) -> BenchTime:
    given = dict(tensors)
    if point.direction != FORWARD:
        given["grad_output"] = output_gradient(tensors)
    try:
        found = against.measure(point.entry.operator, dict(point.case.options), given, point.direction, grid.seconds)
    except AgainstError as error:
        return BenchTime(against.name, skipped=str(error))
    return _bench_time(against.name, *found)


def _ready(point: Point, name: str, sets: Sequence[dict[str, Tensor]]) -> Callable[[], Any]:
    """What is timed: a call on the inputs, or, given several sets, a GPU's that takes them in turn."""
    function = point.contender(name)
    if name == "float32":  # its inputs are in float32 already: a cast would be part of the time
        function, sets = point.entry.own(point.case), [_raised(one) for one in sets]
    calls = [prepared_call(function, one, point.direction) for one in sets]
    return calls[0] if len(calls) == 1 else OnGPU(calls)


def time_contenders(
    calls: Mapping[str, Callable[[], Any]],
    seconds: float,
    device: str = "cpu",
    known: Mapping[str, float] = MappingProxyType({}),
) -> dict[str, tuple[Timing, Ratio]]:
    """Time the operator, which is `calls[OWN]`, and its peers, slow peers in rounds of their own.

    Args:
        calls: each has run once already, so it is compiled and its threads are awake.
        known: seconds of a run, of those that are known to be slow.

    Returns:
        Of each name its timing, and how many times longer it took than the operator in the same rounds.
    """
    once = {name: known[name] if name in known else _once(call, device) for name, call in calls.items()}
    slow = [name for name in calls if name != OWN and once[name] > _SLOW * seconds]
    groups = [[name for name in calls if name not in slow], *([[OWN, *slow]] if slow else [])]
    found: dict[str, tuple[Timing, Ratio]] = {}
    for group in groups:
        timings = interleave(
            {name: calls[name] for name in group},
            budget_seconds=seconds,
            min_rounds=3,
            max_rounds=300,
            warm_up=1 if once[OWN] < _SLOW * seconds else 0,
            synchronize=_waiting(device),
        )
        for name in group:
            found.setdefault(name, (timings[name], timings[OWN].ratio(timings[name])))
    return found


def _once(call: Callable[[], Any], device: str) -> float:
    """Seconds of one run."""
    wait = _waiting(device)
    begun = time.perf_counter()
    call()
    if wait is not None:
        wait()
    return time.perf_counter() - begun


def _on_gpu(device: str) -> bool:
    return torch.device(device).type == "cuda"


def _waiting(device: str) -> Callable[[], Any] | None:
    return torch.cuda.synchronize if _on_gpu(device) else None


def measure_memory(cells: Sequence[BenchCell], points: Sequence[Point], device: str, timeout_seconds: float) -> None:
    """Write the peak memory of everything that was timed into the cells, each in a process of its own."""
    of_point = {point.key: point for point in points}
    places, jobs = [], []
    for cell in cells:
        point = of_point[cell.key]
        compiled = {peer.name for peer in point.peers() if peer.compiles}
        for one in cell.times:
            if one.skipped or one.name in compiled or math.isnan(one.seconds):
                continue
            arguments = {
                "operator": cell.operator,
                "label": cell.label,
                "dtype": cell.dtype,
                "direction": cell.direction,
                "contender": one.name,
                "device": device,
            }
            places.append(one)
            jobs.append(
                Job(
                    "regard.benchmark.grid:prepare_contender", {**arguments, "tiny": False}, {**arguments, "tiny": True}
                )
            )
    for place, peak in zip(places, measure_peaks(jobs, device=device, timeout_seconds=timeout_seconds), strict=True):
        place.peak_memory = peak.bytes


def prepare_contender(
    *, operator: str, label: str, dtype: str, direction: str, contender: str, device: str, tiny: bool
) -> Callable[[], tuple[Tensor, ...]]:
    """What a measuring process runs, from plain values; `tiny` takes the operator's smallest size instead."""
    (entry,) = entries_of([operator])
    cases = [case for case in entry.cases if tiny or case.label == label]
    case = min(cases, key=lambda case: case.tokens * case.batch)
    point = Point(entry, case, dtype, direction)
    return _ready(point, contender, [entry.inputs(case, dtype, device)])
