"""Draw the pictures of docs/fidelity.md: docs/images/fidelity_*.png.

    python tools/fidelity_pictures.py --weights vit_s14.safetensors --study regard-fidelity/fidelity.json

`--study` is what benchmarks/fidelity.py wrote; two pictures are drawn from it. The third shows where in a photograph
the fidelity is lost, on scikit-image's `chelsea` (CC0), and runs the model: a minute or two.
"""

import argparse
from pathlib import Path

import numpy as np
import timm
import torch
from safetensors.torch import load_file
from skimage.data import chelsea
from timm.data import resolve_model_data_config
from torch import Tensor, nn

from regard.conversion import features_of, patch_cosines
from regard.mixers import parse_mechanism
from regard.report.fidelity import fidelity_over_share, head_losses, patch_losses, write_png
from regard.results import FidelityStudy

ROOT = Path(__file__).resolve().parents[1]
GOALS = (0.998, 0.985)
SIZE, PATCH = 896, 14
MECHANISMS = (
    "knn(topk=0.125)",
    "multipole(num_clusters=128, near=0, far='centroid')",
    "multipole(num_clusters=256, near=24, far='centroid')",
)


def build(weights: Path, mechanism: str | None) -> nn.Module:
    options = {}
    if mechanism is not None:
        options["attn_layer"] = parse_mechanism(mechanism).attn_layer(num_prefix_tokens=1)
    model = timm.create_model("vit_small_patch14_dinov2", num_classes=0, dynamic_img_size=True, **options).eval()
    model.load_state_dict(load_file(weights))
    return model


def photograph() -> Tensor:
    """(1, 3, SIZE, SIZE) in [0, 1]: the photograph's middle square."""
    pixels = torch.from_numpy(chelsea().copy()).permute(2, 0, 1)[None].float() / 255
    height, width = pixels.shape[2:]
    pixels = pixels[..., (width - height) // 2 : (width + height) // 2]
    return torch.nn.functional.interpolate(pixels, (SIZE, SIZE), mode="bicubic", antialias=True).clamp(0, 1)


def losses(weights: Path, pixels: Tensor) -> dict[str, Tensor]:
    """(rows, columns) of 1 - centred cosine of every patch, by mechanism."""
    dense = build(weights, None)
    config = resolve_model_data_config(dense)
    mean, std = (torch.tensor(config[name]).view(1, 3, 1, 1) for name in ("mean", "std"))
    image = (pixels - mean) / std
    wanted, found = features_of(dense, image), {}
    for mechanism in MECHANISMS:
        other = features_of(build(weights, mechanism), image)
        cosines = patch_cosines(wanted.tokens, other.tokens, num_prefix_tokens=wanted.num_prefix_tokens, centred=True)
        found[str(parse_mechanism(mechanism))] = (1 - cosines).reshape(SIZE // PATCH, SIZE // PATCH)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description="Draw docs/images/fidelity_*.png.")
    parser.add_argument("--weights", type=Path, required=True, help="vit_small_patch14_dinov2 weights (safetensors)")
    parser.add_argument("--study", type=Path, required=True, help="fidelity.json of benchmarks/fidelity.py")
    parser.add_argument("--size", type=int, default=SIZE, help="of the study's sizes, the one that is drawn")
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "images")
    options = parser.parse_args()
    study = FidelityStudy.from_json(options.study.read_text(encoding="utf-8"))
    pixels = photograph()
    figures = {
        "share": fidelity_over_share(study, options.size, goals=GOALS),
        "heads": head_losses(study, study.settings["layers"], options.size),
        "patches": patch_losses(np.asarray(pixels[0].permute(1, 2, 0)), losses(options.weights, pixels)),
    }
    for name, figure in figures.items():
        if figure is not None:
            path = options.out / f"fidelity_{name}.png"
            write_png(figure, path)
            print(f"wrote {path}")


if __name__ == "__main__":
    main()
