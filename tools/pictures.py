"""Draw docs/images/knn.png: who looks at whom in one trained model, under dense and under k-NN attention.

    python tools/pictures.py --weights vit_s14.safetensors

The weights are those of a trained ViT-S/14 (DINOv2's architecture, fine-tuned for saliency); tools/vit_s14.py makes the
file. The photograph is scikit-image's `chelsea` (CC0). About 10 seconds.
"""

import argparse
from pathlib import Path

import matplotlib
import numpy as np
import timm
import torch
from safetensors.torch import load_file
from skimage.data import chelsea
from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import Tensor

from regard.inspection import attention_maps
from regard.mixers import parse_mechanism

matplotlib.use("Agg")
from matplotlib import pyplot as plt  # noqa: E402

ROOT = Path(__file__).resolve().parents[1]
MECHANISMS = ("dense", "knn(topk=0.25)", "knn(topk=0.0625)")
SIZE, PATCH = 448, 14
GRID = SIZE // PATCH
QUERIES = {"eye": (12, 10), "fur": (16, 22), "background": (4, 30)}  # row and column of the token


def photograph() -> Tensor:
    """(1, 3, SIZE, SIZE) in [0, 1]: the photograph's left square, where the face is."""
    pixels = torch.from_numpy(chelsea()[:, 70:370].copy()).permute(2, 0, 1)[None].float() / 255
    return torch.nn.functional.interpolate(pixels, (SIZE, SIZE), mode="bicubic", antialias=True).clamp(0, 1)


def maps(weights: Path, mechanism: str, pixels: Tensor, layer: int) -> Tensor:
    """(H, N, N): the layer's weights when every layer uses the mechanism."""
    model = timm.create_model(
        "vit_small_patch14_dinov2",
        img_size=518,
        dynamic_img_size=True,
        num_classes=0,
        attn_layer=parse_mechanism(mechanism).attn_layer(),
    )
    model.load_state_dict(load_file(weights))
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in (IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD))
    return attention_maps(model, (pixels - mean) / std, layer=layer)[0]


def draw(weights: Path, layer: int, file: Path) -> None:
    pixels = photograph()
    shown = np.asarray(pixels[0].permute(1, 2, 0))
    found = {mechanism: maps(weights, mechanism, pixels, layer).mean(dim=0) for mechanism in MECHANISMS}
    figure, axes = plt.subplots(
        len(QUERIES),
        len(MECHANISMS) + 1,
        figsize=(2.6 * (len(MECHANISMS) + 1), 2.6 * len(QUERIES) + 0.3),
        layout="constrained",
        squeeze=False,
    )
    for row, (name, (y, x)) in zip(axes, QUERIES.items(), strict=True):
        row[0].imshow(shown, extent=(-0.5, GRID - 0.5, GRID - 0.5, -0.5))
        row[0].set_ylabel(f"query: {name}")
        query = 1 + y * GRID + x  # after the class token
        grids = [found[mechanism][query, 1:].reshape(GRID, GRID) for mechanism in MECHANISMS]
        brightest = float(torch.quantile(grids[0], 0.995))  # one scale a row, dense attention's
        for axis, weight in zip(row[1:], grids, strict=True):
            axis.imshow(weight, cmap="magma", vmin=0, vmax=brightest)
        for axis in row:
            axis.plot(x, y, "o", mfc="none", mec="cyan", ms=8, mew=1.8)
            axis.set_xticks([])
            axis.set_yticks([])
    for axis, title in zip(axes[0], ("photograph", *MECHANISMS), strict=True):
        axis.set_title(title, fontsize=10)
    file.parent.mkdir(parents=True, exist_ok=True)
    part = file.with_name(file.name + ".part")
    figure.savefig(part, format="png", dpi=100)
    part.replace(file)


def main() -> None:
    parser = argparse.ArgumentParser(description="Draw docs/images/knn.png.")
    parser.add_argument("--weights", type=Path, required=True, help="vit_small_patch14_dinov2 weights (safetensors)")
    parser.add_argument("--layer", type=int, default=-1, help="whose attention is drawn")
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "images" / "knn.png")
    options = parser.parse_args()
    draw(options.weights, options.layer, options.out)
    print(f"wrote {options.out}")


if __name__ == "__main__":
    main()
