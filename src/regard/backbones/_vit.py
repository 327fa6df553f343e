"""The plain vision transformer of several families: timm's, with fixed sinusoidal positions and regard's mixers."""

from typing import Any

import torch
from timm.layers import resample_abs_pos_embed, to_2tuple, trunc_normal_
from timm.models import VisionTransformer
from torch import Tensor, nn

from regard.backbones._attention import AttnLayer, attn_layers, modify
from regard.mixers import AttentionMixer, DenseAttention

__all__ = ["ImageTokens", "SinusoidalViT", "with_positions_of"]


class ImageTokens(nn.Module):
    """Base of the tokens at stride 16 that are not plain patches: (B, C, H, W) -> (B, H' W', D).

    It has the interface of timm's PatchEmbed, so that VisionTransformer takes it as its `embed_layer`.

    Args:
        img_size: (height, width) that the position embedding is made for.
        strict_img_size: refuse images of other sizes.
        output_fmt: "NHWC": return (B, H', W', D), from which VisionTransformer reads the grid.

    Raises:
        ValueError: img_size is too small for one token; in forward: an image of another size, if strict.
    """

    patch_size = (16, 16)

    def __init__(
        self, img_size: int | tuple[int, int] = 224, strict_img_size: bool = True, output_fmt: str | None = None
    ) -> None:
        super().__init__()
        self.strict_img_size = strict_img_size
        self.flatten = output_fmt is None
        self.set_input_size(to_2tuple(img_size))

    def embed(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, H' W', D)."""
        raise NotImplementedError

    def dynamic_feat_size(self, img_size: tuple[int, int]) -> tuple[int, int]:
        """The grid of tokens of an image (height, width)."""
        raise NotImplementedError

    def set_input_size(self, img_size: tuple[int, int] | None = None, patch_size: Any = None) -> None:
        """The size of the images to come.

        Raises:
            ValueError: another patch size is asked for, or the image is too small for one token.
        """
        if patch_size is not None and to_2tuple(patch_size) != self.patch_size:
            raise ValueError(f"patch_size: this embedding makes tokens of stride 16, got {patch_size}")
        if img_size is None:
            return
        grid = self.dynamic_feat_size(img_size)
        if min(grid) < 1:
            raise ValueError(f"img_size: {tuple(img_size)} is too small for one token")
        self.img_size = tuple(img_size)
        self.grid_size = grid
        self.num_patches = grid[0] * grid[1]

    def feat_ratio(self, as_scalar: bool = True) -> int | tuple[int, int]:
        return 16 if as_scalar else self.patch_size

    def forward(self, x: Tensor) -> Tensor:
        size = (x.shape[-2], x.shape[-1])
        if self.strict_img_size and size != self.img_size:
            raise ValueError(
                f"x: expected images of {self.img_size}, got {size}; build the model with dynamic_img_size=True"
            )
        x = self.embed(x)
        return x if self.flatten else x.unflatten(1, self.dynamic_feat_size(size))


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

    def set_input_size(self, img_size: tuple[int, int] | None = None, patch_size: Any = None) -> None:
        """Take the position embedding to another grid for good; images of any size are taken without, too."""
        super().set_input_size(img_size, patch_size)
        if self.pos_embed is not None:
            self.pos_embed.requires_grad_(False)  # timm before 1.0.31 makes a trained one


def _sinusoid(positions: int, dim: int) -> Tensor:
    """(positions, dim): sines in the even channels and cosines in the odd ones, of the position along the sequence."""
    channels = torch.arange(dim, device="cpu")
    wavelengths = 10000.0 ** (2 * (channels // 2).double() / dim)
    angles = torch.arange(positions, device="cpu")[:, None] / wavelengths
    return torch.where(channels % 2 == 0, angles.sin(), angles.cos())


def with_positions_of(weights: dict[str, Tensor], model: VisionTransformer) -> dict[str, Tensor]:
    """The weights with their position embedding resampled for the model's grid."""
    table = weights.get("pos_embed")
    if table is None or model.pos_embed is None or table.shape == model.pos_embed.shape:
        return weights
    prefix = 0 if model.no_embed_class else model.num_prefix_tokens
    grid = model.patch_embed.grid_size
    return {**weights, "pos_embed": resample_abs_pos_embed(table, new_size=grid, num_prefix_tokens=prefix)}
