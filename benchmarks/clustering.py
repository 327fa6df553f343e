"""Density peak clustering beside the published formulation: the table of docs/notes/clustered.md.

    python benchmarks/clustering.py

Takes about two minutes on two cores; `--quick` less. A gate comes first: while it is red no ratio is shown. Tokens are
standard normal, as the norm before each attention leaves them in a fresh model.
"""

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import tyro
from rich.console import Console
from rich.table import Table
from torch import Tensor

from regard.benchmark import Job, environment, interleave, measure_peaks
from regard.ops import density_peak_clusters
from regard.ops.clustering import density_peaks_reference
from regard.results import write_text


@dataclass(frozen=True)
class Settings:
    """Measure the operator's goals."""

    threads: int = 2
    seconds: float = 12.0
    """Time of each row's interleaved rounds."""
    quick: bool = False
    """A fifth of the time a row."""
    json: Path | None = None
    """Write the figures there."""


@dataclass(frozen=True)
class Size:
    batch: int
    tokens: int
    channels: int
    counts: tuple[int, int]

    def normal(self, dtype: torch.dtype = torch.float32) -> Tensor:
        generator = torch.Generator().manual_seed(0)
        return torch.randn(self.batch, self.tokens, self.channels, generator=generator).to(dtype)

    def __str__(self) -> str:
        return f"B {self.batch}, N {self.tokens}, C {self.channels}, M {self.counts[0]} and {self.counts[1]}"


# The stages of clustr_b2 at 224 pixels, and larger pictures. The goal is for the first.
ROWS = (
    (Size(4, 3136, 64, (49, 196)), 5.0),
    (Size(4, 784, 128, (49, 196)), None),
    (Size(4, 196, 256, (49, 196)), None),
    (Size(1, 4096, 384, (256, 1024)), None),
)
LARGE = Size(1, 16384, 64, (256, 1024))


def published(x: Tensor, counts: Sequence[int], neighbors: int = 5) -> list[Tensor]:
    """The formulation of ClusTR (arXiv 2208.13138) as its equations read, over all N x N distances; no noise."""
    batch, tokens, channels = x.shape
    distance = torch.cdist(x, x) / channels**0.5
    nearest = distance.topk(neighbors, dim=-1, largest=False).values
    density = nearest.square().mean(dim=-1).neg().exp()
    denser = (density[:, None, :] > density[:, :, None]).to(x.dtype)
    largest = distance.flatten(1).amax(dim=-1)[:, None, None]
    delta = (distance * denser + largest * (1 - denser)).amin(dim=-1)
    assignments = []
    for count in counts:
        centers = (density * delta).topk(count, dim=-1).indices
        to_center = distance.gather(1, centers[..., None].expand(-1, -1, tokens))
        own = torch.arange(count, device=x.device).expand(batch, -1)
        assignments.append(to_center.argmin(dim=1).scatter(1, centers, own))
    return assignments


def own(x: Tensor, counts: Sequence[int]) -> list[Tensor]:
    return [one.assignment for one in density_peak_clusters(x, counts)]


FORMULATIONS: dict[str, Callable[[Tensor, Sequence[int]], list[Tensor]]] = {"own": own, "published": published}


def prepare(formulation: str, size: dict[str, Any]) -> Callable[[], tuple[Tensor, ...]]:
    """What a process that measures memory runs."""
    what = Size(**{**size, "counts": tuple(size["counts"])})
    x = what.normal()
    return lambda: tuple(FORMULATIONS[formulation](x, what.counts))


def gate() -> list[str]:
    """What is wrong; nothing if all is right. Exact: the same grouping or none."""
    problems = []
    for size, _ in ROWS:  # one image each in float64, where no choice between distances is a matter of rounding
        x = size.normal(torch.float64)[:1]
        if not all(map(torch.equal, own(x, size.counts), published(x, size.counts))):
            problems.append(f"{size}: another grouping than the published formulation in float64")
    for levels in (2, 3, 5):  # whole numbers: distances are exact in float32, and ties abound
        x = torch.randint(levels, (1, 784, 8), generator=torch.Generator().manual_seed(levels)).float()
        expected, _ = density_peaks_reference(x.double(), (49, 196))
        if not all(map(torch.equal, own(x, (49, 196)), expected)):
            problems.append(f"{levels} levels: another grouping than the reference")
    return problems


def main(settings: Settings) -> None:
    torch.set_num_threads(settings.threads)
    console, start = Console(), time.perf_counter()
    if problems := gate():
        console.print("\n".join(["GATE RED", *problems]))
        raise SystemExit(1)
    console.print("gate green: the published grouping in float64, the reference's with ties in float32")
    seconds = settings.seconds / 5 if settings.quick else settings.seconds
    table = Table("what", "goal", "published / own", "own", "published", "rounds", "")
    findings: list[dict[str, Any]] = []
    try:
        for size, goal in ROWS:
            x = size.normal()
            calls = {name: (lambda f=f, x=x, c=size.counts: f(x, c)) for name, f in FORMULATIONS.items()}
            times = interleave(calls, budget_seconds=seconds, max_rounds=200)
            ratio, milliseconds = times["own"].ratio(times["published"]), {}
            for name, timing in times.items():
                milliseconds[name] = [1e3 * t for t in (timing.median, timing.low, timing.high)]
            found = {"size": str(size), "ratio": [ratio.median, ratio.low, ratio.high], "milliseconds": milliseconds}
            findings.append({**found, "goal": goal, "rounds": times["own"].repeats})
            verdict = "" if goal is None else ("met" if ratio.median >= goal else "NOT MET")
            texts = ["{:.1f} ({:.1f}-{:.1f}) ms".format(*milliseconds[name]) for name in FORMULATIONS]
            spread = f"{ratio.median:.2f}x ({ratio.low:.2f}-{ratio.high:.2f})"
            table.add_row(str(size), f"{goal}x" if goal else "", spread, *texts, str(times["own"].repeats), verdict)
        jobs = []
        measured = [(name, ROWS[0][0]) for name in FORMULATIONS] + [("own", LARGE)]
        for name, size in measured:
            tiny = Size(1, 64, size.channels, (2, 8))
            arguments, warm_up = ({"formulation": name, "size": asdict(one)} for one in (size, tiny))
            jobs.append(Job("clustering:prepare", arguments=arguments, warm_up=warm_up))
        for (name, size), peak in zip(measured, measure_peaks(jobs), strict=True):
            figure = peak.problem if peak.bytes is None else f"{peak.bytes / 1e6:.1f} MB"
            matrix = 4 * size.batch * size.tokens**2 / 1e6
            findings.append({"size": str(size), "peak": peak.bytes, "formulation": name})
            table.add_row(f"peak memory, {name}, {size}", "", figure, "", "", "", f"N x N: {matrix:.0f} MB")
    except KeyboardInterrupt:
        console.print("Interrupted: what follows is what was measured.")
    place = environment()
    console.print(table)
    console.print(
        f"{place.machine}, {place.threads} threads of {place.cores} cores, torch {place.torch}, regard {place.regard} "
        f"at {place.commit or 'no commit'}, {place.date}; medians and quartiles; "
        f"{time.perf_counter() - start:.0f} s in all"
    )
    if settings.json:
        write_text(settings.json, json.dumps({"environment": asdict(place), "findings": findings}, indent=1))


if __name__ == "__main__":
    main(tyro.cli(Settings))
