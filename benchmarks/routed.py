"""Routed attention beside the gather formulation of bi-level routing (BiFormer, arXiv 2303.08810).

    python benchmarks/routed.py

Takes about three minutes on two cores; `--quick` less. A gate comes first: output and gradients must be as close to
float64 as PyTorch's own operations are; no ratio is shown while it is red. Sizes are the attention of BiFormer-S's
stages, 7 x 7 regions. Both sides get tokens in the order of the regions and the same routes: what is timed is attention
from queries, keys and values to its output, and back.

The gather formulation comes in two forms, the same equations: "gather" as published, torch.gather over K and V expanded
for every region, whose backward adds into the expanded size; "index", one index_select each, kinder to memory. The goal
is against the published form.
"""

import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import tyro
from rich.console import Console
from rich.table import Table
from torch import Tensor

from regard.benchmark import Job, environment, error_budget, interleave, measure_ceilings, measure_peaks
from regard.ops import routed_attention
from regard.results import write_text

REGIONS = 7
GOAL = 5.0


@dataclass(frozen=True)
class Settings:
    """Measure the operator's goals."""

    threads: int = 2
    seconds: float = 12.0
    """Time of each row's interleaved rounds."""
    batch: int = 1
    quick: bool = False
    """A fifth of the time a row."""
    json: Path | None = None
    """Write the figures there."""


@dataclass(frozen=True)
class Size:
    """A stage: `side` is a region's side in tokens."""

    name: str
    side: int
    channels: int
    topk: int
    batch: int = 1

    @property
    def heads(self) -> int:
        return self.channels // 32

    @property
    def region(self) -> int:
        return self.side**2

    @property
    def flops(self) -> int:
        """Of the forward: logits and weighted values."""
        return 4 * self.batch * REGIONS**2 * self.region**2 * self.topk * self.channels

    def inputs(self, dtype: torch.dtype = torch.float32) -> tuple[list[Tensor], Tensor]:
        """Query, key and value (B, regions, region's tokens, C), and the routes (B, regions, topk)."""
        generator = torch.Generator().manual_seed(0)
        shape = (self.batch, REGIONS**2, self.region, self.channels)
        tensors = [torch.randn(shape, generator=generator).to(dtype) for _ in range(3)]
        affinity = torch.rand(self.batch, REGIONS**2, REGIONS**2, generator=generator)
        return tensors, affinity.topk(self.topk, dim=-1).indices


# BiFormer-S: head dim 32, topk 1, 4, 16, all (the last stage is dense). At 1024 pixels maps of 256, 128 and 64 tokens a
# side are padded to whole regions.
SIZES = (
    (Size("stage 1, 224 px", 8, 64, 1), GOAL),
    (Size("stage 2, 224 px", 4, 128, 4), GOAL),
    (Size("stage 3, 224 px", 2, 256, 16), None),
    (Size("stage 1, 1024 px", 37, 64, 1), GOAL),
    (Size("stage 2, 1024 px", 19, 128, 4), GOAL),
    (Size("stage 3, 1024 px", 10, 256, 16), None),
)


def attend_gathered(tensors: list[Tensor], gathered: Callable[[Tensor], Tensor], size: Size) -> Tensor:
    def by_head(t: Tensor) -> Tensor:
        return t.unflatten(-1, (size.heads, -1)).transpose(2, 3)

    query, key, value = tensors
    logits = by_head(query * size.channels**-0.5) @ by_head(gathered(key)).mT
    return (logits.softmax(dim=-1) @ by_head(gathered(value))).transpose(2, 3).flatten(3)


def gather(tensors: list[Tensor], routes: Tensor, size: Size) -> Tensor:
    """As published: K and V expanded for every region, then torch.gather."""
    index = routes[..., None, None].expand(-1, -1, -1, size.region, size.channels)

    def gathered(t: Tensor) -> Tensor:
        return t.unsqueeze(1).expand(-1, REGIONS**2, -1, -1, -1).gather(2, index).flatten(2, 3)

    return attend_gathered(tensors, gathered, size)


def index(tensors: list[Tensor], routes: Tensor, size: Size) -> Tensor:
    """The same copies by index_select."""
    flat = (routes + REGIONS**2 * torch.arange(size.batch)[:, None, None]).flatten()

    def gathered(t: Tensor) -> Tensor:
        return t.flatten(0, 1).index_select(0, flat).view(size.batch, REGIONS**2, -1, size.channels)

    return attend_gathered(tensors, gathered, size)


def own(tensors: list[Tensor], routes: Tensor, size: Size) -> Tensor:
    query, key, value = (t.flatten(1, 2).unflatten(-1, (size.heads, -1)).transpose(1, 2) for t in tensors)
    output = routed_attention(
        query,
        key,
        value,
        blocks=routes.unsqueeze(1),
        query_block=size.region,
        key_block=size.region,
        scale=size.channels**-0.5,
    )
    return output.transpose(1, 2).flatten(2).unflatten(1, (REGIONS**2, size.region))


FORMULATIONS: dict[str, Callable[[list[Tensor], Tensor, Size], Tensor]] = {"own": own, "gather": gather, "index": index}


def forward_backward(formulation: str, size: Size, dtype: torch.dtype = torch.float32) -> Callable[[], list[Tensor]]:
    """Output and gradients of query, key and value."""
    tensors, routes = size.inputs(dtype)
    leaves = [t.requires_grad_() for t in tensors]
    grad_output = torch.randn(leaves[0].shape, generator=torch.Generator().manual_seed(1)).to(dtype)

    def run() -> list[Tensor]:
        output = FORMULATIONS[formulation](leaves, routes, size)
        return [output.detach(), *torch.autograd.grad(output, leaves, grad_output)]

    return run


def forward(formulation: str, size: Size, dtype: torch.dtype = torch.float32) -> Callable[[], Tensor]:
    tensors, routes = size.inputs(dtype)
    return lambda: FORMULATIONS[formulation](tensors, routes, size)


def prepare(formulation: str, size: dict[str, Any]) -> Callable[[], tuple[Tensor, ...]]:
    """What a process that measures memory runs."""
    run = forward_backward(formulation, Size(**size))
    return lambda: tuple(run())


def gate() -> list[str]:
    """What is wrong; nothing if all is right."""
    problems = []
    for size, _ in SIZES[:3]:
        exact = forward_backward("index", size, torch.float64)()
        for dtype in (torch.float32, torch.bfloat16):
            eager = [forward_backward(name, size, dtype)() for name in ("gather", "index")]
            found = forward_backward("own", size, dtype)()
            for what, mine, true, *peers in zip(
                ("output", "grad_query", "grad_key", "grad_value"), found, exact, *eager, strict=True
            ):
                error, budget = (mine.double() - true).abs().max().item(), error_budget(true, *peers)
                if not error <= budget:
                    problems.append(f"{size.name}, {dtype}: {what} errs by {error:.3g}, above its budget {budget:.3g}")
    return problems


def spread(values: tuple[float, float, float], unit: str) -> str:
    return "{:.3g} ({:.3g}-{:.3g}) {}".format(*values, unit)


def main(settings: Settings) -> None:
    torch.set_num_threads(settings.threads)
    console, start = Console(), time.perf_counter()
    if problems := gate():
        console.print("\n".join(["GATE RED", *problems]))
        raise SystemExit(1)
    console.print("gate green: output and gradients within the error budget in float32 and bfloat16")
    seconds = settings.seconds / 5 if settings.quick else settings.seconds
    ceiling = measure_ceilings().matmul_flops_per_second
    sizes = [(Size(**{**asdict(size), "batch": settings.batch}), goal) for size, goal in SIZES]
    table = Table(
        "what", "goal", "gather / own", "index / own", "own", "of ceiling", "bfloat16 / float32", "rounds", ""
    )
    findings: list[dict[str, Any]] = []
    try:
        for size, goal in sizes:
            for direction, made, factor in (("forward", forward, 1.0), ("forward + backward", forward_backward, 3.5)):
                calls = {name: made(name, size) for name in FORMULATIONS}
                calls["bfloat16"] = made("own", size, torch.bfloat16)
                times = interleave(calls, budget_seconds=seconds, max_rounds=200)
                mine = times["own"]
                ratios = {name: mine.ratio(times[name]) for name in ("gather", "index", "bfloat16")}
                rate = factor * size.flops / mine.median
                figures = {name: (1e3 * t.median, 1e3 * t.low, 1e3 * t.high) for name, t in times.items()}
                told = {name: (r.median, r.low, r.high) for name, r in ratios.items()}
                goal_here = goal if factor > 1 else None
                findings.append(
                    {
                        "size": asdict(size),
                        "direction": direction,
                        "milliseconds": figures,
                        "ratios": told,
                        "rate": rate,
                    }
                )
                table.add_row(
                    f"{size.name}, {direction}",
                    f"{goal_here:g}x" if goal_here else "",
                    spread(told["gather"], "x"),
                    spread(told["index"], "x"),
                    spread(figures["own"], "ms"),
                    f"{100 * rate / ceiling:.0f} %",
                    f"{told['bfloat16'][0]:.2f}",
                    str(mine.repeats),
                    "" if goal_here is None else "met" if told["gather"][0] >= goal_here else "NOT MET",
                )
        measure_memory([size for size, goal in sizes if goal], table, findings)
    except KeyboardInterrupt:
        console.print("Interrupted: what follows is what was measured.")
    place = environment()
    console.print(table)
    console.print(
        f"ceiling: a matrix product, {ceiling / 1e9:.0f} GFLOP/s; {place.machine}, {place.threads} threads of "
        f"{place.cores} cores, torch {place.torch}, regard {place.regard} at {place.commit or 'no commit'}, "
        f"{place.date}; medians and quartiles; {time.perf_counter() - start:.0f} s in all"
    )
    if settings.json:
        write_text(settings.json, json.dumps({"environment": asdict(place), "findings": findings}, indent=1))


def measure_memory(sizes: list[Size], table: Table, findings: list[dict[str, Any]]) -> None:
    """Peak memory of forward and backward; the goal is 1 / topk of the gather formulation's."""
    measured = [(name, size) for size in sizes for name in FORMULATIONS]
    jobs = []
    for name, size in measured:
        tiny = Size("warm-up", 2, size.channels, size.topk)
        arguments, warm_up = ({"formulation": name, "size": asdict(one)} for one in (size, tiny))
        jobs.append(Job("routed:prepare", arguments=arguments, warm_up=warm_up))
    peaks = dict(zip(((name, size.name) for name, size in measured), measure_peaks(jobs), strict=True))
    for size in sizes:
        found = {name: peaks[name, size.name] for name in FORMULATIONS}
        told = {
            name: peak.problem if peak.bytes is None else f"{peak.bytes / 1e6:.1f} MB" for name, peak in found.items()
        }
        mine, theirs = found["own"].bytes, found["gather"].bytes
        verdict = "" if mine is None or theirs is None else "met" if mine * size.topk <= theirs else "NOT MET"
        findings.append({"size": asdict(size), "peak": {name: peak.bytes for name, peak in found.items()}})
        table.add_row(
            f"{size.name}, peak memory",
            f"1/{size.topk}",
            told["gather"],
            told["index"],
            told["own"],
            "",
            "",
            "",
            verdict,
        )


if __name__ == "__main__":
    main(tyro.cli(Settings))
