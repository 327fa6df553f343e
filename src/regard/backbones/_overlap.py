"""Pyramids like PVTv2's: patches that overlap, blocks whose MLP knows the grid, and a norm after each stage."""

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from timm.layers import DropPath, trunc_normal_
from torch import Tensor, nn

from regard.backbones._pyramid import Grid, Pyramid, Stage, drop_path_rates

__all__ = ["OverlapPyramid", "normed_stages"]

norm = partial(nn.LayerNorm, eps=1e-6)


class PatchEmbed(nn.Module):
    """A convolution whose patches overlap, and a norm: (B, C, H, W) -> (B, H' W', D) and the grid (H', W')."""

    def __init__(self, in_chans: int, dim: int, kernel_size: int, stride: int, **factory: Any) -> None:
        super().__init__()
        self.proj = nn.Conv2d(in_chans, dim, kernel_size, stride=stride, padding=kernel_size // 2, **factory)
        self.norm = nn.LayerNorm(dim, **factory)  # eps 1e-5, other than `norm`

    def forward(self, x: Tensor) -> tuple[Tensor, Grid]:
        x = self.proj(x)
        return self.norm(x.flatten(2).transpose(1, 2)), (x.shape[-2], x.shape[-1])


class Block(nn.Module):
    """Attention and MLP, each normed before and added to its input; both are told the grid.

    Args:
        attn: called with (x, grid_size=...); has `dim`.
        mlp: called with (x, grid).
        drop_path: probability that an image skips one of them in training.
    """

    def __init__(self, attn: Any, mlp: nn.Module, drop_path: float, **factory: Any) -> None:
        super().__init__()
        self.norm1 = norm(attn.dim, **factory)
        self.attn = attn
        self.norm2 = norm(attn.dim, **factory)
        self.mlp = mlp
        self.drop_path = DropPath(drop_path) if drop_path > 0.0 else nn.Identity()

    def forward(self, x: Tensor, grid: Grid) -> Tensor:
        x = x + self.drop_path(self.attn(self.norm1(x), grid_size=grid))
        return x + self.drop_path(self.mlp(self.norm2(x), grid))


class NormedStage(Stage):
    """Patch embedding, blocks, norm: (B, C, H, W) -> (B, D, H', W')."""

    def __init__(self, patch_embed: PatchEmbed, blocks: Sequence[Block], norm: nn.LayerNorm) -> None:
        super().__init__(patch_embed, blocks)
        self.norm = norm

    def forward(self, x: Tensor) -> Tensor:
        x, grid = self.patch_embed(x)
        return self.to_map(self.norm(self.through_blocks(x, grid)), grid)


def normed_stages(
    in_chans: int,
    embed_dims: Sequence[int],
    depths: Sequence[int],
    drop_path_rate: float,
    parts: Callable[[int], tuple[Any, nn.Module]],
    **factory: Any,
) -> list[NormedStage]:
    """Stages of stride 4, 8, 16 ...

    Args:
        parts: makes attention and MLP of a block, from its stage's number.
    """
    rates = drop_path_rates(drop_path_rate, depths)
    stages, channels = [], in_chans
    for i, (dim, depth) in enumerate(zip(embed_dims, depths, strict=True)):
        kernel, stride = (7, 4) if i == 0 else (3, 2)
        blocks = [Block(*parts(i), next(rates), **factory) for _ in range(depth)]
        embed = PatchEmbed(channels, dim, kernel, stride, **factory)
        stages.append(NormedStage(embed, blocks, norm(dim, **factory)))
        channels = dim
    return stages


class OverlapPyramid(Pyramid):
    """A pyramid of such stages, with the first weights that their authors give them."""

    @staticmethod
    def initialize(module: nn.Module) -> None:
        """As published: linear layers normal with deviation 0.02, convolutions by their fan-out, biases 0."""
        if isinstance(module, nn.Linear):
            trunc_normal_(module.weight, std=0.02)
        elif isinstance(module, nn.Conv2d):
            fan_out = math.prod(module.kernel_size) * module.out_channels // module.groups
            nn.init.normal_(module.weight, std=math.sqrt(2.0 / fan_out))
        else:
            return
        if module.bias is not None:
            nn.init.zeros_(module.bias)
