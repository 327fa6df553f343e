"""The small vision transformer of the comparison, and timm's own by name."""

import math
from typing import Any

import timm
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from regard.data import ImageData
from regard.mixers import AttentionMixer
from regard.specs import Mechanism

__all__ = ["build_model"]

_GRID = 9  # the least number of tokens a side: 81 on the embedded images, so that a run takes seconds
_SMALL: dict[str, dict[str, Any]] = {
    "vit": {"embed_dim": 64, "depth": 2, "num_heads": 2, "mlp_ratio": 2.0},
}


class ConvStem(nn.Module):
    """Two convolutions in place of the patch embedding (after arXiv 2106.14881): (B, C, S, S) -> (B, N, D)."""

    def __init__(self, img_size: int, patch_size: int, in_chans: int, embed_dim: int, **_: Any) -> None:
        super().__init__()
        width = embed_dim // 2
        side = (img_size + 2 * (patch_size // 2) - patch_size - 1) // patch_size + 1
        self.patch_size = (patch_size, patch_size)
        self.grid_size = (side, side)
        self.num_patches = side * side
        self.proj = nn.Sequential(
            nn.Conv2d(in_chans, width, patch_size + 1, stride=patch_size, padding=patch_size // 2, bias=False),
            nn.BatchNorm2d(width),
            nn.GELU(),
            nn.Conv2d(width, embed_dim, 3, padding=1, bias=False),
            nn.BatchNorm2d(embed_dim),
            nn.GELU(),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(x).flatten(2).transpose(1, 2)


def build_model(model: str, mechanism: Mechanism, data: ImageData) -> nn.Module:
    """A model with the mechanism in every block and its modifiers applied, for the images and classes of `data`.

    Args:
        model: `vit` (64 channels, 2 blocks, 2 heads, convolutional stem, about 9 x 9 tokens, no class token,
            average pool), or a vision transformer of timm that takes `attn_layer`.

    Raises:
        ValueError: the name is unknown, or the model cannot be built with this mechanism or image size.
    """
    size = data.image_size[0]
    common: dict[str, Any] = {
        "img_size": size,
        "in_chans": data.channels,
        "num_classes": len(data.class_names),
        "attn_layer": mechanism.attn_layer(),
    }
    if model in _SMALL:
        patch = max(1, math.floor(size / _GRID))
        small = VisionTransformer(
            patch_size=patch, class_token=False, global_pool="avg", embed_layer=ConvStem, **common, **_SMALL[model]
        )
        mechanism.apply(small)
        return small
    if not timm.is_model(model):
        raise ValueError(
            f"model: unknown name {model!r}; allowed are {', '.join(_SMALL)}, or a vision transformer of timm"
        )
    try:
        made: nn.Module = timm.create_model(model, pretrained=False, **common)
    except (TypeError, AssertionError, RuntimeError, ValueError) as error:
        raise ValueError(
            f"model: timm's {model!r} cannot be built with {mechanism} at {size} pixels: {error}"
        ) from error
    for module in made.modules():
        if isinstance(module, AttentionMixer):  # timm does not tell them of its class and register tokens
            module.num_prefix_tokens = getattr(made, "num_prefix_tokens", 0)
    mechanism.apply(made)
    return made
