"""k-NN attention beside dense attention and the published formulation: the table of docs/benchmarks.md.

    python benchmarks/knn.py --markdown docs/benchmarks.md

Takes a few minutes on two cores; `--quick` less. Each row is gated first: while its correctness
gate is red it shows no ratio. Queries, keys and values are standard normal. A trained model differs: measure your
own model too before you rely on a ratio.
"""

import json
import shlex
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
import tyro
from rich.console import Console
from rich.table import Table
from torch import Tensor

from regard.benchmark import check_knn, environment, interleave, measure_ceilings, published_knn_attention
from regard.benchmark.costs import peak_memories
from regard.benchmark.workload import FORWARD, FORWARD_BACKWARD, Shape, attention
from regard.ops import knn_attention
from regard.results import CostPoint, write_text


@dataclass(frozen=True)
class Settings:
    """Measure the operator's goals. Random normal queries and keys: real ones matter, see this script's docstring."""

    threads: int = 2
    seconds: float = 8.0
    """Time of each row's interleaved rounds."""
    quick: bool = False
    """A fifth of the time a row."""
    json: Path | None = None
    """Write the figures there."""
    markdown: Path | None = None
    """Write the table for the docs there."""


@dataclass(frozen=True)
class Row:
    """One comparison: how many times longer the peer takes than k-NN attention."""

    shape: Shape
    topk: float
    direction: str
    peer: str  # "sdpa", "published" or "float32"
    goal: float  # smallest ratio that meets it


@dataclass(frozen=True)
class Finding:
    what: str
    against: str
    goal: str
    found: str
    verdict: str
    ceiling: str = ""  # useful operations per second, as a share of the measured matrix-product rate


def rows() -> list[Row]:
    small, middle, large = Shape(196, batch=8), Shape(1024), Shape(4096)
    sixteenth, half = 1 / 16, 0.5
    return [
        Row(large, sixteenth, FORWARD, "sdpa", 1.6),
        Row(large, half, FORWARD, "sdpa", 1.0),
        Row(middle, half, FORWARD, "sdpa", 1.0),
        Row(small, half, FORWARD, "sdpa", 1 / 1.2),
        Row(large, sixteenth, FORWARD, "published", 8.0),
        Row(large, half, FORWARD, "published", 8.0),
        Row(middle, half, FORWARD, "published", 8.0),
        Row(small, half, FORWARD, "published", 3.0),
        Row(large, sixteenth, FORWARD_BACKWARD, "sdpa", 2.0),
        Row(Shape(4096, dtype="bfloat16"), sixteenth, FORWARD, "float32", 1.0),
        Row(Shape(4096, dtype="bfloat16"), half, FORWARD, "float32", 1.0),
        Row(Shape(1024, dtype="bfloat16"), half, FORWARD, "float32", 1.0),
        Row(Shape(196, batch=8, dtype="bfloat16"), half, FORWARD, "float32", 1.0),
        Row(Shape(4096, dtype="bfloat16"), sixteenth, FORWARD_BACKWARD, "float32", 1.0),
    ]


def useful_operations(row: Row) -> float:
    """All logits and the kept values; backward: the logits again and four products over the kept."""
    shape = row.shape
    pairs = shape.batch * shape.heads * shape.tokens**2 * shape.head_dim
    forward = 2 * pairs * (1 + row.topk)
    return forward if row.direction == FORWARD else forward + 2 * pairs * (1 + 4 * row.topk)


def measure(row: Row, seconds: float, flops_per_second: float) -> tuple[Finding, str]:
    """The row's finding, and what the gate said."""
    inputs = row.shape.normal(4)
    backward = row.direction == FORWARD_BACKWARD
    gate = check_knn(*inputs[:3], topk=row.topk, backward=backward, units=1)

    def own(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return knn_attention(query, key, value, topk=row.topk)

    peers: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
        "sdpa": F.scaled_dot_product_attention,
        "published": lambda query, key, value: published_knn_attention(query, key, value, row.topk),
        "float32": own,
    }
    shape = row.shape
    what = f"{row.direction}, batch {shape.batch}, N {shape.tokens}, k = {row.topk:g} N, {shape.dtype}"
    goal = f"{row.goal:.2f}x"
    if not gate.passed:
        return Finding(what, row.peer, goal, "-", "GATE RED"), str(gate)
    theirs = [tensor.float() for tensor in inputs] if row.peer == "float32" else inputs
    calls = {
        "own": attention(own, inputs, row.direction),
        "peer": attention(peers[row.peer], theirs, row.direction),
    }
    timings = interleave(calls, budget_seconds=seconds, min_rounds=5, max_rounds=300)
    ratio = timings["own"].ratio(timings["peer"])
    found = (
        f"{ratio.median:.2f}x ({ratio.low:.2f}-{ratio.high:.2f}); {1e3 * timings['own'].median:.1f} ms "
        f"against {1e3 * timings['peer'].median:.1f} ms, {timings['own'].repeats} rounds"
    )
    share = useful_operations(row) / timings["own"].median / flops_per_second
    return Finding(what, row.peer, goal, found, "met" if ratio.median >= row.goal else "not met", f"{share:.0%}"), str(
        gate
    )


def measure_memory() -> Finding:
    size = (4096, 1, 6, 64, "float32", FORWARD_BACKWARD, "cpu", 0.0, 0.0, 0.0, 0, 0)
    mine, dense = peak_memories([CostPoint("knn(topk=0.0625)", *size), CostPoint("dense", *size)])
    what, goal = "memory, forward+backward, batch 1, N 4096, k = 0.0625 N, float32", "32 MB"
    if mine.bytes is None:
        return Finding(what, "logits, 403 MB", goal, mine.problem, "not measured")
    beside = "not measured" if dense.bytes is None else f"{dense.bytes / 1e6:.1f} MB"
    found = f"{mine.bytes / 1e6:.1f} MB (SDPA {beside})"
    return Finding(what, "logits, 403 MB", goal, found, "met" if mine.bytes <= 32e6 else "not met")


def markdown(findings: list[Finding], about: list[str], command: str) -> str:
    head = ["What", "Against", "Goal", "Found (median, quartiles)", "", "Of the matrix-product rate"]
    cells = [head, ["---"] * len(head)]
    cells += [[f.what, f.against, f.goal, f.found, f.verdict, f.ceiling] for f in findings]
    table = "\n".join(f"| {' | '.join(line)} |" for line in cells)
    notes = "\n".join(f"- {line}" for line in about)
    return f"# k-NN attention: measured\n\nMade by `{command}`.\n\n{table}\n\n{notes}\n"


def main(settings: Settings) -> None:
    torch.set_num_threads(settings.threads)
    console = Console()
    start = time.perf_counter()
    seconds = settings.seconds / 5 if settings.quick else settings.seconds
    ceilings = measure_ceilings()
    findings, gates = [], []
    try:
        for row in rows():
            finding, gate = measure(row, seconds, ceilings.matmul_flops_per_second)
            findings.append(finding)
            gates.append(gate)
            console.print(
                f"{finding.what} against {finding.against}: {finding.found} ({finding.verdict})\n  gate: {gate}"
            )
        findings.append(measure_memory())
    except KeyboardInterrupt:
        console.print("Interrupted: what follows is what was measured.")
    place = environment()
    about = [
        f"{place.machine}, {place.threads} threads of {place.cores} cores, {place.instruction_set}, "
        f"torch {place.torch}, regard {place.regard} at {place.commit or 'no commit'}, {place.date}",
        f"float32 ceilings of the same run: matrix product {ceilings.matmul_flops_per_second / 1e9:.0f} GFLOP/s, "
        f"copy {ceilings.copy_bytes_per_second / 1e9:.1f} GB/s",
        "6 heads of 64; standard normal inputs; rounds interleaved; ratios above 1: k-NN attention is faster",
        "the last column counts all logits and the values of the kept keys, against torch's own float32 product, which "
        "may use less of the machine than the kernel does",
        "a row of few rounds has little or no spread",
        f"correctness gate: {sum('RED' in gate for gate in gates)} red of {len(gates)}",
        f"{time.perf_counter() - start:.0f} s in all",
    ]
    table = Table("what", "against", "goal", "found", "", "of matmul rate", title="k-NN attention")
    for one in findings:
        table.add_row(one.what, one.against, one.goal, one.found, one.verdict, one.ceiling)
    console.print(table)
    console.print("\n".join(about))
    if settings.json:
        report = {"environment": asdict(place), "ceilings": asdict(ceilings), "gates": gates}
        write_text(settings.json, json.dumps({**report, "findings": [asdict(one) for one in findings]}, indent=1))
    if settings.markdown:
        command = shlex.join(["python", "benchmarks/knn.py", *sys.argv[1:]])
        write_text(settings.markdown, markdown(findings, about, command))
    if any("RED" in gate for gate in gates):
        raise SystemExit(1)


if __name__ == "__main__":
    main(tyro.cli(Settings))
