"""Queries, keys and values of a trained ViT-S/14 on a photograph: random ones cluster as no real ones do."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import timm
import torch
from PIL import Image
from safetensors.torch import load_file
from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

from regard.conversion import AttentionCall, record_attention
from regard.studies.photographs import open_photograph

__all__ = ["MODEL", "PATCH", "recorded_calls"]

MODEL = "vit_small_patch14_dinov2"
PATCH = 14


def recorded_calls(weights: Path, photo: Path, size: int, layers: Sequence[int]) -> list[AttentionCall]:
    """The chosen layers' calls on a photograph, contiguous as a model of its own would hand them over.

    Args:
        weights: of the model without its head (safetensors); tools/vit_s14.py makes them.
        size: side of the square that the photograph's middle is scaled to, in pixels.

    Raises:
        SettingsError: the photograph cannot be read.
        OSError, RuntimeError, SafetensorError: the weights cannot be read, or are another model's.
    """
    model = timm.create_model(MODEL, img_size=518, dynamic_img_size=True, num_classes=0)
    model.load_state_dict(load_file(weights))
    picture = open_photograph(photo, setting="photo")
    side = min(picture.size)
    left, top = (picture.width - side) // 2, (picture.height - side) // 2
    picture = picture.crop((left, top, left + side, top + side)).resize((size, size), Image.Resampling.BICUBIC)
    pixels = torch.from_numpy(np.asarray(picture).copy()).permute(2, 0, 1).float() / 255
    mean, deviation = (torch.tensor(v).view(3, 1, 1) for v in (IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD))
    calls = record_attention(model, ((pixels - mean) / deviation)[None])
    return [calls[layer] for layer in layers]
