"""The parts of FAN (arXiv 2204.12451): stem, positions, channel processing, block."""

import math
from collections import OrderedDict
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import DropPath, LayerNorm2d, trunc_normal_
from timm.models.convnext import ConvNeXtStage
from timm.models.xcit import LPI
from torch import Tensor, nn

from regard.mixers import AttentionMixer, TokenAwarePooling

__all__ = [
    "MLP_RATIO",
    "STRIDE",
    "Block",
    "ChannelProcessing",
    "FourierPositions",
    "Grid",
    "HybridEmbed",
    "init_weights",
    "make_norm",
]

Grid = tuple[int, int]

STRIDE = 16
MLP_RATIO = 4
make_norm = partial(nn.LayerNorm, eps=1e-6)


class FourierPositions(nn.Module):
    """A projection of sines and cosines of the rows' and the columns' numbers: the grid (H, W) -> (1, H W, D).

    As timm's PositionalEncodingFourier, but in float64 where the model is: that one rounds to float32.
    """

    def __init__(self, dim: int, frequencies: int = 16, **factory: Any) -> None:
        super().__init__()
        self.frequencies = frequencies
        self.token_projection = nn.Conv2d(4 * frequencies, dim, 1, **factory)

    def forward(self, grid: Grid) -> Tensor:
        like = self.token_projection.weight
        dtype = torch.promote_types(like.dtype, torch.float32)
        wavelength = 10_000 ** (torch.arange(self.frequencies, device=like.device, dtype=dtype) / self.frequencies)
        waves = []
        for cells in grid:
            number = torch.arange(1, cells + 1, device=like.device).to(dtype)
            phase = (number / (cells + 1e-6) * (2 * math.pi))[:, None] / wavelength
            waves.append(torch.stack([phase.sin(), phase.cos()], dim=-1).flatten(1))
        rows, columns = waves
        rows, columns = rows[:, None].expand(-1, grid[1], -1), columns[None].expand(grid[0], -1, -1)
        place = torch.cat([rows, columns], dim=-1).to(like.dtype)
        return F.linear(place.flatten(0, 1), like[:, :, 0, 0], self.token_projection.bias)[None]


class UnbiasedNorm2d(LayerNorm2d):
    """LayerNorm over the channels of (B, C, H, W) that divides by the deviation with C - 1 in its denominator.

    The official code does so wherever channels lie innermost in memory, which is everywhere behind its stem; weights
    trained by it expect it, here in every layout.
    """

    def forward(self, x: Tensor) -> Tensor:
        ratio = 1 - 1 / x.shape[1]
        weight = self.weight * math.sqrt(ratio)
        x = F.layer_norm(x.permute(0, 2, 3, 1), self.normalized_shape, weight, self.bias, self.eps * ratio)
        return x.permute(0, 3, 1, 2)


class HybridEmbed(nn.Module):
    """Two ConvNeXt stages and a convolution: (B, C, H, W) -> tokens (B, H' W', D) and the grid (H', W') of stride 16.

    Sizes that 16 does not divide are filled up with zeros at the right and at the bottom.
    """

    def __init__(self, in_chans: int, dim: int, depths: tuple[int, int], **factory: Any) -> None:
        super().__init__()
        first, second = 128, 256
        options: dict[str, Any] = {"ls_init_value": 1e-6, "conv_mlp": True, "norm_layer": UnbiasedNorm2d, **factory}
        stem = nn.Sequential(nn.Conv2d(in_chans, first, 4, stride=4, **factory), LayerNorm2d(first, **factory))
        stages = nn.Sequential(
            ConvNeXtStage(first, first, stride=1, depth=depths[0], **options),
            ConvNeXtStage(first, second, stride=2, depth=depths[1], **options),
        )
        self.backbone = nn.Sequential(OrderedDict(stem=stem, stages=stages))
        for module in self.backbone.modules():
            if isinstance(module, nn.Conv2d):
                trunc_normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)  # type: ignore[arg-type]
        self.proj = nn.Conv2d(second, dim, 2, stride=2, **factory)

    def forward(self, x: Tensor) -> tuple[Tensor, Grid]:
        height, width = x.shape[-2:]
        x = F.pad(x, (0, -width % STRIDE, 0, -height % STRIDE))
        x = self.proj(self.backbone(x))
        return x.flatten(2).transpose(1, 2), (x.shape[-2], x.shape[-1])


class GridMlp(nn.Module):
    """Two linear layers; between them what two depthwise convolutions make of the grid is added."""

    def __init__(self, dim: int, hidden: int, drop: float, **factory: Any) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden, **factory)
        self.dwconv = LPI(hidden, **factory)
        self.gamma = nn.Parameter(torch.ones(hidden, **factory))
        self.fc2 = nn.Linear(hidden, dim, **factory)
        self.drop = nn.Dropout(drop)

    def forward(self, x: Tensor, grid: Grid) -> Tensor:
        x = self.fc1(x)
        x = self.drop(self.gamma * self.dwconv(x, *grid)) + x
        return self.drop(self.fc2(x))


class ChannelProcessing(nn.Module):
    """An MLP whose channels are gated, each by how its softmax over the tokens agrees with the mean of its head's."""

    def __init__(self, dim: int, num_heads: int, gate_drop: float, proj_drop: float, **factory: Any) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.q = nn.Linear(dim, dim, **factory)
        self.temperature = nn.Parameter(torch.ones(num_heads, 1, 1, **factory))
        self.gate_drop = nn.Dropout(gate_drop)
        self.mlp_v = GridMlp(dim, MLP_RATIO * dim, proj_drop, **factory)
        self.norm_v = nn.LayerNorm(dim, **factory)  # eps 1e-5, other than the blocks' norms

    def forward(self, x: Tensor, grid: Grid) -> Tensor:
        query = self.q(x).unflatten(2, (self.num_heads, -1)).softmax(dim=1)
        key = x.unflatten(2, (self.num_heads, -1)).softmax(dim=1).mean(dim=-1)
        agreement = torch.einsum("bnhd,bnh->bhd", query, key)
        gate = self.gate_drop(self.temperature[..., 0] * agreement.sigmoid())
        return self.norm_v(self.mlp_v(x, grid)) * gate.flatten(1)[:, None]


class Block(nn.Module):
    """x + attention of the pooled tokens, then x + channel processing, each under its LayerScale."""

    def __init__(
        self, tap: TokenAwarePooling, attn: AttentionMixer, mlp: ChannelProcessing, drop_path: float, **factory: Any
    ) -> None:
        super().__init__()
        self.tap = tap
        self.norm1 = make_norm(attn.dim, **factory)
        self.attn = attn
        self.gamma1 = nn.Parameter(torch.ones(attn.dim, **factory))
        self.norm2 = make_norm(attn.dim, **factory)
        self.mlp = mlp
        self.gamma2 = nn.Parameter(torch.ones(attn.dim, **factory))
        self.drop_path = DropPath(drop_path) if drop_path > 0.0 else nn.Identity()

    def forward(self, x: Tensor, grid: Grid) -> Tensor:
        mixed = self.attn(self.norm1(self.tap(x, grid_size=grid)), grid_size=grid)
        x = x + self.drop_path(self.gamma1 * mixed)
        return x + self.drop_path(self.gamma2 * self.mlp(self.norm2(x), grid))


def init_weights(module: nn.Module) -> None:
    """As published: linear layers normal with deviation 0.02, biases 0; the depthwise convolutions of the MLPs by their
    fan-out. Other convolutions stay as torch makes them, those of the ConvNeXt stages have deviation 0.02."""
    if isinstance(module, nn.Linear):
        trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
    elif isinstance(module, LPI):
        for conv in (module.conv1, module.conv2):
            nn.init.normal_(conv.weight, std=math.sqrt(2.0 / math.prod(conv.kernel_size)))
            nn.init.zeros_(conv.bias)  # type: ignore[arg-type]
