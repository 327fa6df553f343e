"""Queries, keys and values of a trained ViT-S/14 on a photograph: random ones cluster as no real ones do."""

from collections.abc import Sequence
from pathlib import Path

from regard.conversion import AttentionCall, record_attention
from regard.studies.pretrained import build_pretrained, read_picture

__all__ = ["MODEL", "PATCH", "recorded_calls"]

MODEL = "vit_small_patch14_dinov2"
PATCH = 14


def recorded_calls(
    weights: Path, photo: Path, size: int, layers: Sequence[int], *, setting: str = "photo"
) -> list[AttentionCall]:
    """The chosen layers' calls on a photograph, contiguous as a model of its own would hand them over.

    Args:
        weights: of the model (safetensors); tools/vit_s14.py makes them.
        size: side of the square that the photograph's middle is scaled to, in pixels.
        setting: what an error calls the photograph.

    Raises:
        SettingsError: the weights or the photograph cannot be read, or the weights are another model's.
    """
    model = build_pretrained(MODEL, checkpoint=weights, size=size)
    calls = record_attention(model, read_picture(model, photo, size, setting=setting))
    return [calls[layer] for layer in layers]
