"""Builds, checks and times every Triton kernel on this machine's GPU, in one call of under ten minutes.

    python benchmarks/gpu.py --json gpu.json --markdown docs/gpu_measured.md

First correctness, of every operator and dtype by its gate against float64, smallest sizes first; two runs must agree
bit for bit. Then time, beside SDPA (flash), compiled FlexAttention and natten where it is installed, at the sizes of
the goals; no ratio is told of an operator whose gate is red. `--tune` times every configuration that an operator offers
instead, to put the best one first.

Each operator runs in a process of its own, since one illegal memory access spoils all that follow in a process; what
fails is told, and the rest goes on. Exits with 0 if all gates are green and no goal was missed, with 1 if not, with 2
if there is no GPU.

A further operator is a line in ROOMS.
"""

import gc
import importlib
import json
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Literal

import torch
import tyro

import regard
from regard.benchmark import environment, error_budget, interleave
from regard.benchmark.entry import Case, Entry, prepared_call
from regard.benchmark.gate import largest_error
from regard.benchmark.on_gpu import OnGPU, input_sets
from regard.benchmark.operators import entries_of
from regard.benchmark.workload import FORWARD, FORWARD_BACKWARD
from regard.markdown import markdown_table
from regard.ops import _triton, knn_attention, only_backend
from regard.results import write_text

DEVICE, BACKEND = "cuda", "triton"
DTYPES = ("bfloat16", "float16", "float32")
BOTH = (FORWARD, FORWARD_BACKWARD)


@dataclass(frozen=True)
class Goal:
    """How many times as long as the operator a peer must take, at the least."""

    peer: str
    ratio: float


@dataclass(frozen=True)
class Timed:
    """A size that is timed in bfloat16, and the forward's goals there."""

    case: Case
    goals: tuple[Goal, ...] = ()
    directions: tuple[str, ...] = BOTH


@dataclass(frozen=True)
class Room:
    """An operator on the GPU: its entry in regard.benchmark.operators, the sizes that are checked and timed."""

    name: str
    checked: tuple[Case, ...]
    timed: tuple[Timed, ...]
    configurations: Callable[[torch.dtype, int], list[_triton.Config]] | None = None
    further: Callable[[str], tuple[str, bool]] | None = None  # a check of its own: of a dtype, what it found


def _knn(tokens: int, topk: float, batch: int = 8, heads: int = 6, head_dim: int = 64) -> Case:
    return Case(tokens, batch, heads, head_dim, f"k = {topk:g} N", {"topk": topk})


def _neighborhood(side: int, kernel: int, batch: int = 8, heads: int = 6, head_dim: int = 64) -> Case:
    options = {"grid_size": [side, side], "kernel_size": [kernel, kernel]}
    return Case(side * side, batch, heads, head_dim, f"window {kernel}x{kernel}", options)


def _multipole(side: int, batch: int = 8, heads: int = 6, head_dim: int = 64) -> Case:
    options = {"num_clusters": None, "near": 0.1, "num_prefix_tokens": 1, "grid_size": [side, side]}
    return Case(side * side + 1, batch, heads, head_dim, "near 0.1", options)


def _routed(side: int, region: int, batch: int = 8, heads: int = 4, head_dim: int = 32) -> Case:
    options = {"query_block": region, "key_block": region}
    return Case(side * region, batch, heads, head_dim, f"regions of {region}, top 4", options)


def _configurations(operator: str) -> Callable[[torch.dtype, int], list[_triton.Config]]:
    """Imported when asked for: a machine without Triton learns that it has no GPU."""

    def configurations(dtype: torch.dtype, dim: int) -> list[_triton.Config]:
        launchers = importlib.import_module(f"regard.ops.{operator}.triton")
        found: list[_triton.Config] = launchers.configurations(dtype, dim)
        return found

    return configurations


def _masks_of_knn(dtype: str) -> tuple[str, bool]:
    """Causal, with a trained bias of every shape, on grouped heads: by the PyTorch path in float64 and in the dtype."""
    generator = torch.Generator().manual_seed(0)
    told, passed = [], True

    def gradients(kind: torch.dtype, bias: torch.Tensor, backend: str) -> list[torch.Tensor]:
        leaves = [one.to(DEVICE, kind).requires_grad_() for one in tensors]
        bias = bias.to(DEVICE, torch.promote_types(kind, torch.float32)).requires_grad_()
        with only_backend(backend):
            output = knn_attention(*leaves, topk=20, attn_mask=bias, is_causal=True, enable_gqa=True)
        return [output.detach(), *torch.autograd.grad(output.sum(), [*leaves, bias])]

    for size in ((2, 4, 150, 150), (1, 4, 150, 150), (1, 1, 1, 150), (1, 4, 150, 1), (1, 1, 1, 1)):
        # Multiples of 1/4: the logits are exact in every dtype, and full of ties, so that all select the same keys.
        tensors = [torch.randint(-4, 5, (2, h, 150, 64), generator=generator) / 4 for h in (4, 2, 2)]
        bias = torch.randint(-8, 9, size, generator=generator) / 8
        exact = gradients(torch.float64, bias, "pytorch")
        eager = gradients(getattr(torch, dtype), bias, "pytorch")
        own = gradients(getattr(torch, dtype), bias, BACKEND)
        # The scale of rounding: a term counts twice, as its weight is rounded, and half the root of their number is the
        # probable growth in a sum. In half types the result's own rounding is larger than that of its terms.
        growth = 2.0 + 0.5 * 150**0.5
        scales = [(growth if dtype == "float32" else 2.0) * one for one in exact[:4]]
        # A bias that many logits share has a small gradient, a sum of large ones.
        alone = gradients(torch.float64, bias.expand(2, 4, 150, 150), "pytorch")[4]
        scales.append(growth * alone.abs().sum_to_size(size))
        strain = max(
            largest_error(mine, true) / error_budget(true, one, terms=terms)
            for mine, true, one, terms in zip(own, exact, eager, scales, strict=True)
        )
        passed &= strain <= 1.0
        told.append(f"bias {size}: {strain:.2f} of the budget")
    return "; ".join(told), passed


# k-NN at most 3x flash: exact selection needs a third product. The published formulation's N x M buffers do not fit at
# 65,536, where the operator must still run.
ROOMS = (
    Room(
        "knn",
        (_knn(50, 0.2, 2, 2, 16), _knn(197, 0.5, 2, 3, 80), _knn(1024, 1 / 16, 2, 2), _knn(1500, 0.3, 1, 2, 256)),
        (
            Timed(_knn(1024, 1 / 16)),
            Timed(_knn(4096, 1 / 16), (Goal("sdpa", 1 / 3), Goal("published", 8.0))),
            Timed(_knn(4096, 0.5), (Goal("sdpa", 1 / 3), Goal("published", 8.0))),
            Timed(_knn(16384, 1 / 16), (Goal("sdpa", 1 / 3),)),
            Timed(_knn(65536, 1 / 16, batch=1), directions=(FORWARD,)),
        ),
        _configurations("knn"),
        _masks_of_knn,
    ),
    Room(
        "neighborhood",
        (_neighborhood(7, 3, 2, 2, 16), _neighborhood(29, 7, 2, 2, 40), _neighborhood(64, 13, 1, 2)),
        (
            Timed(_neighborhood(64, 7), (Goal("sdpa", 1.0), Goal("flex", 1.0))),
            Timed(_neighborhood(64, 13), (Goal("sdpa", 1.0), Goal("flex", 1.0))),
            Timed(_neighborhood(128, 7), (Goal("sdpa", 5.0), Goal("flex", 1.0))),
            Timed(_neighborhood(128, 13), (Goal("sdpa", 5.0), Goal("flex", 1.0))),
        ),
        _configurations("neighborhood"),
    ),
    Room(
        "multipole",
        (_multipole(8, 2, 2, 16), _multipole(20, 2, 2), _multipole(64, 1, 2)),
        (
            Timed(_multipole(32)),
            Timed(_multipole(64), (Goal("sdpa", 1.0),)),
            Timed(_multipole(128), (Goal("sdpa", 5.0),)),
        ),
    ),
    Room(
        "routed",
        (_routed(9, 16, 2, 4), _routed(49, 64, 2, 4)),
        (Timed(_routed(49, 64)), Timed(_routed(256, 64))),
    ),
)


@dataclass(frozen=True)
class Settings:
    """Check and time the Triton kernels on the GPU."""

    only: tuple[str, ...] = ()
    """These operators alone."""
    seconds: float = 540.0
    """What is not reached in this time is left out, and told."""
    json: Path | None = None
    """Write the figures there."""
    markdown: Path | None = None
    """Write the tables there."""
    tune: bool = False
    """Time every configuration, in bfloat16 and float32, instead."""
    stage: tyro.conf.Suppress[Literal["", "check", "time", "tune"]] = ""
    """Of a child: what it does, with `only` one operator."""
    out: tyro.conf.Suppress[Path | None] = None


@dataclass
class Findings:
    """What one operator's process found. Rows are texts by column."""

    checks: list[dict[str, str]] = field(default_factory=list)
    times: list[dict[str, str]] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    red: list[str] = field(default_factory=list)  # dtypes whose gate is not green
    missed: int = 0


def check(room: Room, entry: Entry, found: Findings, left: Callable[[], float]) -> None:
    judged: list[tuple[str, Callable[[str], tuple[str, bool]]]] = [
        (_size(case), partial(_judge, entry, case)) for case in room.checked
    ]
    if room.further is not None:
        judged.append(((room.further.__doc__ or "").splitlines()[0].partition(":")[0], room.further))
    for size, judge in judged:
        for dtype in DTYPES:
            row = {"operator": room.name, "size": size, "dtype": dtype}
            if left() < 0:
                found.checks.append({**row, "verdict": "left out: no time"})
                continue
            try:
                verdict, passed = judge(dtype)
            except Exception as error:  # whatever a kernel does: tell it, go on
                verdict, passed = f"RED: {_told(error)}", False
                traceback.print_exc()
            found.checks.append({**row, "verdict": verdict})
            if not passed and dtype not in found.red:
                found.red.append(dtype)
            _release()


def _judge(entry: Entry, case: Case, dtype: str) -> tuple[str, bool]:
    tensors = entry.inputs(case, dtype, DEVICE)
    chosen = regard.explain(entry.operator, **tensors, **case.options)
    if chosen.backend != BACKEND:
        return f"RED: {'; '.join(str(chosen).splitlines())}", False
    gate = entry.gate(case, tensors, True)
    runs = [prepared_call(entry.own(case), tensors, FORWARD_BACKWARD)() for _ in range(2)]
    same = all(torch.equal(a, b) for a, b in zip(*runs, strict=True))
    return f"{gate}; two runs {'agree bit for bit' if same else 'DIFFER'}", gate.passed and same


def measure(room: Room, entry: Entry, found: Findings, left: Callable[[], float]) -> None:
    for timed in room.timed:
        for direction in timed.directions:
            row = {"operator": room.name, "size": _size(timed.case), "direction": direction}
            if left() < 15:
                found.times.append({**row, "own": "left out: no time"})
                continue
            try:
                found.times += _time(entry, timed, direction, row, found)
            except Exception as error:
                found.problems.append(f"{room.name}, {_size(timed.case)}, {direction}: {_told(error)}")
                traceback.print_exc()
            _release()


def _time(entry: Entry, timed: Timed, direction: str, row: dict[str, str], found: Findings) -> list[dict[str, str]]:
    case, dtype = timed.case, "bfloat16"
    sets = input_sets(entry.inputs(case, dtype, DEVICE))
    calls = {"own": OnGPU([prepared_call(entry.own(case), one, direction) for one in sets])}
    beside: dict[str, str] = {}
    for peer in entry.peers:
        beside[peer.name] = peer.refuses(case, dtype, direction)
        if beside[peer.name]:
            continue
        try:
            function = peer.make(case)
            calls[peer.name] = OnGPU([prepared_call(function, one, direction) for one in sets])
        except Exception as error:  # out of memory is a finding
            beside[peer.name] = _told(error)
            _release()
    times = interleave(calls, budget_seconds=6.0, max_rounds=100)
    mine = times["own"]
    told = f"{1e3 * mine.median:.3f} ms ({1e3 * mine.low:.3f}-{1e3 * mine.high:.3f}){_graph(calls['own'])}"
    rows = []
    for peer, refused in beside.items():
        goal = next((one.ratio for one in timed.goals if one.peer == peer and direction == FORWARD), None)
        line = {**row, "own": told, "against": peer, "ratio": refused, "goal": "" if goal is None else f"{goal:.2f}x"}
        if not refused:
            ratio = mine.ratio(times[peer])
            theirs = f"{1e3 * times[peer].median:.3f} ms{_graph(calls[peer])}"
            line["ratio"] = f"{ratio.median:.2f}x ({ratio.low:.2f}-{ratio.high:.2f}), {theirs}"
            if goal is not None:
                met = ratio.median >= goal
                line["goal"] += ": met" if met else ": NOT MET"
                found.missed += not met
        rows.append(line)
    return rows or [{**row, "own": told}]


def tune(room: Room, entry: Entry, found: Findings, left: Callable[[], float]) -> None:
    if room.configurations is None:
        found.problems.append(f"{room.name}: offers no configurations")
        return
    for dtype in ("bfloat16", "float32"):
        for case in {timed.case.head_dim: timed.case for timed in room.timed[:2]}.values():
            for config in room.configurations(getattr(torch, dtype), case.head_dim):
                row = {"operator": room.name, "size": f"{_size(case)}, {dtype}", "direction": str(config.options())}
                if left() < 10:
                    found.times.append({**row, "own": "left out: no time"})
                    continue
                try:
                    with _triton.only_config(config):
                        tensors = entry.inputs(case, dtype, DEVICE)
                        calls = {way: OnGPU([prepared_call(entry.own(case), tensors, way)]) for way in BOTH}
                        times = interleave(calls, budget_seconds=1.0, max_rounds=50)
                    told = ", ".join(f"{way} {1e3 * times[way].median:.3f} ms" for way in BOTH)
                except Exception as error:
                    told = _told(error)
                found.times.append({**row, "own": told})
                _release()


def _size(case: Case) -> str:
    return f"{case.label}, H {case.heads}, D {case.head_dim}"


def _graph(call: OnGPU) -> str:
    return "" if call.captured else ", launched without a graph"


def _told(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).strip().splitlines()[0][:200] if str(error).strip() else ''}"


def _release() -> None:
    gc.collect()
    try:
        torch.cuda.empty_cache()
    except RuntimeError:  # after an illegal access nothing works any more; the next step tells it
        return


STAGES = {"check": check, "time": measure, "tune": tune}


def child(settings: Settings) -> None:
    """One stage of one operator."""
    start = time.perf_counter()
    (name,) = settings.only
    room = next(one for one in ROOMS if one.name == name)
    found = Findings()
    (entry,) = entries_of([name])
    STAGES[settings.stage](room, entry, found, lambda: settings.seconds - (time.perf_counter() - start))
    if settings.out is not None:
        write_text(settings.out, json.dumps(asdict(found)))


def run(name: str, stage: str, seconds: float) -> Findings:
    """A stage of an operator in a process of its own; what it wrote, or why there is nothing."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "found.json"
        command = [sys.executable, __file__, "--only", name, "--stage", stage, "--seconds", str(seconds)]
        try:
            code = subprocess.run([*command, "--out", str(out)], timeout=seconds + 60, check=False).returncode
        except subprocess.TimeoutExpired:
            return Findings(problems=[f"{name}, {stage}: did not end in {seconds + 60:.0f} s"], red=list(DTYPES))
        if not out.exists():
            return Findings(problems=[f"{name}, {stage}: exited with {code} and told nothing"], red=list(DTYPES))
        return Findings(**json.loads(out.read_text(encoding="utf-8")))


def page(found: dict[str, Findings], seconds: float) -> str:
    place = environment(DEVICE)
    tables = [
        ("Correctness", [row for one in found.values() for row in one.checks]),
        ("Time", [row for one in found.values() for row in one.times]),
    ]
    parts = [
        "# Triton kernels: measured\n",
        f"Made by `python benchmarks/gpu.py` on {place.device}, torch {place.torch}, Triton {_version()}, regard "
        f"{place.regard} at {place.commit or 'no commit'}, {place.date}; {seconds:.0f} s in all. Times are medians and "
        "quartiles of interleaved rounds in bfloat16, graphs replayed between events over rotated inputs; ratios above "
        "1: the operator is faster.\n",
    ]
    for title, rows in tables:
        if rows:
            columns = list(dict.fromkeys(name for row in rows for name in row))
            parts.append(f"## {title}\n")
            parts.append(markdown_table(columns, [[row.get(name, "") for name in columns] for row in rows]))
    problems = [problem for one in found.values() for problem in one.problems]
    return "\n".join([*parts, *(f"- {problem}" for problem in problems)])


def _version() -> str:
    import triton

    version: str = triton.__version__
    return version


def main(settings: Settings) -> int:
    if problem := _triton.available() or ("" if torch.cuda.is_available() else "no GPU is here"):
        print(f"nothing is checked or timed: {problem}")
        return 2
    if settings.stage:
        child(settings)
        return 0
    start = time.perf_counter()
    names = [room.name for room in ROOMS if not settings.only or room.name in settings.only]
    found = {name: Findings() for name in names}
    stages = ["tune"] if settings.tune else ["check", "time"]
    for place, stage in enumerate(stages):
        for left, name in zip(range(len(names), 0, -1), names, strict=True):
            if stage == "time" and "bfloat16" in found[name].red:
                found[name].problems.append(f"{name}: not timed, its gate is red")
                continue
            remaining = settings.seconds - (time.perf_counter() - start)
            share = remaining / left * (0.45 if place + 1 < len(stages) else 1.0)
            if share < 5:
                found[name].problems.append(f"{name}, {stage}: left out, no time")
                continue
            print(f"== {name}: {stage}, up to {share:.0f} s", flush=True)
            new = run(name, stage, share)
            for kind in ("checks", "times", "problems", "red"):
                getattr(found[name], kind).extend(getattr(new, kind))
            found[name].missed += new.missed
            for line in [*new.checks, *new.times, *new.problems]:
                print(line if isinstance(line, str) else " | ".join(line.values()), flush=True)
            if settings.json:  # after every step: a machine may be taken away
                write_text(settings.json, json.dumps({name: asdict(one) for name, one in found.items()}, indent=1))
            if settings.markdown:
                write_text(settings.markdown, page(found, time.perf_counter() - start))
    failed = any(one.red or one.missed or one.problems for one in found.values())
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(tyro.cli(Settings)))
