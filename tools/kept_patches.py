"""Draw docs/images/evit.png: which patches of a photograph a trained model keeps under token reorganization.

    python tools/kept_patches.py --weights vit_s14.safetensors

The weights and the photograph are those of tools/pictures.py. About 10 seconds.
"""

import argparse
from pathlib import Path

import numpy as np
import timm
import torch
from pictures import GRID, PATCH, ROOT, photograph
from pictures import plt as pyplot  # drawing without a screen is set up there
from safetensors.torch import load_file
from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import Tensor

from regard.reduction import reorganized, token_map

KEEP_RATES = (0.7, 0.5)
FADED = 0.12  # of a dropped patch's own colour, the rest is white


def survived(weights: Path, pixels: Tensor) -> dict[float, tuple[tuple[int, ...], Tensor]]:
    """By keep rate: the reorganized layers, and how many of them each patch came through, (GRID, GRID)."""
    model = timm.create_model("vit_small_patch14_dinov2", img_size=518, dynamic_img_size=True, num_classes=0)
    model.load_state_dict(load_file(weights))
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in (IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD))
    found = {}
    for keep_rate in KEEP_RATES:
        with reorganized(model, keep_rate) as record:
            found[keep_rate] = record.layers, token_map(model, (pixels - mean) / std)[0]
    return found


def draw(weights: Path, file: Path) -> None:
    pixels = photograph()
    shown = pixels[0].permute(1, 2, 0)
    found = survived(weights, pixels)
    figure, axes = pyplot.subplots(len(found), 4, figsize=(10.4, 2.75 * len(found)), layout="constrained")
    for row, (keep_rate, (layers, counts)) in zip(axes, found.items(), strict=True):
        row[0].imshow(np.asarray(shown))
        row[0].set_ylabel(f"keep_rate={keep_rate:g}")
        row[0].set_title("photograph", fontsize=10)
        for number, (axis, layer) in enumerate(zip(row[1:], layers, strict=True), start=1):
            kept = counts >= number
            there = kept.repeat_interleave(PATCH, 0).repeat_interleave(PATCH, 1)[..., None]
            axis.imshow(np.asarray(shown.where(there, 1 - FADED * (1 - shown))))
            axis.set_title(f"after layer {layer}: {int(kept.sum())} of {GRID * GRID}", fontsize=10)
        for axis in row:
            axis.set_xticks([])
            axis.set_yticks([])
    file.parent.mkdir(parents=True, exist_ok=True)
    part = file.with_name(file.name + ".part")
    figure.savefig(part, format="png", dpi=64)
    part.replace(file)


def main() -> None:
    parser = argparse.ArgumentParser(description="Draw docs/images/evit.png.")
    parser.add_argument("--weights", type=Path, required=True, help="vit_small_patch14_dinov2 weights (safetensors)")
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "images" / "evit.png")
    options = parser.parse_args()
    draw(options.weights, options.out)
    print(f"wrote {options.out}")


if __name__ == "__main__":
    main()
