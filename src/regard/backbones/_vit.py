"""The plain vision transformer of several families: timm's, with fixed sinusoidal positions and regard's mixers."""

from collections.abc import Mapping
from typing import Any

import torch
from timm.layers import resample_abs_pos_embed, trunc_normal_
from timm.models import VisionTransformer
from torch import Tensor, nn

from regard.backbones._attention import AttnLayer, attn_layers, modify
from regard.mixers import AttentionMixer, DenseAttention

__all__ = ["SinusoidalViT", "unwrapped", "with_positions_of"]


class SinusoidalViT(VisionTransformer):
    """timm's VisionTransformer whose positions are a table of sines: not trained, resampled for other grids.

    Args:
        attn_layer: the mechanism of the blocks, such as `regard.KNN(0.5)` or a mixer's class.
        dynamic_img_size: take images of any size; False: only those of img_size.
        options: as in timm; without `qkv_bias` and with torch's norm by default.

    Raises:
        TypeError: attn_layer is neither a mechanism nor a mixer's class.
    """

    def __init__(
        self,
        *,
        attn_layer: AttnLayer = DenseAttention,
        dynamic_img_size: bool = True,
        qkv_bias: bool = False,
        norm_layer: Any = nn.LayerNorm,
        **options: Any,
    ) -> None:
        (layer,) = attn_layers(attn_layer)
        super().__init__(
            attn_layer=layer,
            dynamic_img_size=dynamic_img_size,
            qkv_bias=qkv_bias,
            norm_layer=norm_layer,
            **options,
        )
        for module in self.blocks.modules():
            if isinstance(module, AttentionMixer):  # timm does not tell them of its class token
                module.num_prefix_tokens = self.num_prefix_tokens
        modify(self, attn_layer)

    def init_weights(self, mode: str = "", needs_reset: bool = True) -> None:
        super().init_weights(mode, needs_reset=needs_reset)
        if self.cls_token is not None:
            trunc_normal_(self.cls_token, std=0.02)
        if self.pos_embed is not None:
            self.pos_embed.requires_grad_(False)
            self.pos_embed.copy_(_sinusoid(*self.pos_embed.shape[1:]))


def _sinusoid(positions: int, dim: int) -> Tensor:
    """(positions, dim): sines in the even channels and cosines in the odd ones, of the position along the sequence."""
    channels = torch.arange(dim, device="cpu")
    wavelengths = 10000.0 ** (2 * (channels // 2).double() / dim)
    angles = torch.arange(positions, device="cpu")[:, None] / wavelengths
    return torch.where(channels % 2 == 0, angles.sin(), angles.cos())


def unwrapped(checkpoint: Mapping[str, Any]) -> dict[str, Tensor]:
    """The weights of a training script's checkpoint, averaged ones first, without DistributedDataParallel's prefix."""
    weights: Mapping[str, Any] = checkpoint
    for key in ("state_dict_ema", "state_dict", "model"):
        if key in checkpoint:
            weights = checkpoint[key]
            break
    return {name.removeprefix("module."): weight for name, weight in weights.items()}


def with_positions_of(weights: dict[str, Tensor], model: VisionTransformer) -> dict[str, Tensor]:
    """The weights with their position embedding resampled for the model's grid."""
    table = weights.get("pos_embed")
    if table is None or model.pos_embed is None or table.shape == model.pos_embed.shape:
        return weights
    prefix = 0 if model.no_embed_class else model.num_prefix_tokens
    grid = model.patch_embed.grid_size
    return {**weights, "pos_embed": resample_abs_pos_embed(table, new_size=grid, num_prefix_tokens=prefix)}
