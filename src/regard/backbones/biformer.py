"""BiFormer, a pyramid whose regions choose the regions they attend to (arXiv 2303.08810).

Four stages of stride 4, 8, 16 and 32; the last attends to everything. Checkpoints of the official implementation
(rayleizhu/BiFormer, its files biformer.py and biformer_stl.py) load through `checkpoint_filter_fn`.
"""

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import DropPath, Mlp, trunc_normal_
from timm.models import generate_default_cfgs, register_model
from torch import Tensor, nn

from regard.backbones._published import renamed, unwrapped
from regard.backbones._pyramid import Grid, Pyramid, Stage, create, default_cfg, drop_path_rates
from regard.mixers import AttentionMixer, BiLevelRoutingAttention, DenseAttention
from regard.mixers.bilevel import BiLevel, conv_on_grid

__all__ = ["Architecture", "BiFormer", "checkpoint_filter_fn", "default_cfgs"]

_HEAD_DIM = 32
_LAST_HEADS = 8  # of the last stage, whatever its width: the official default that nothing sets


@dataclass(frozen=True)
class Architecture:
    """Sizes of the stages.

    Args:
        topks: regions that each region attends to; None: all tokens attend to all.
        overlap: patches overlap, and every block begins with a convolution of its tokens' positions. False: the layout
            of Swin-T, with neither.
    """

    depths: tuple[int, ...]
    embed_dims: tuple[int, ...] = (64, 128, 256, 512)
    topks: tuple[int | None, ...] = (1, 4, 16, None)
    mlp_ratio: float = 3.0
    overlap: bool = True

    def __post_init__(self) -> None:
        for name in ("embed_dims", "topks"):
            if len(getattr(self, name)) != len(self.depths):
                raise ValueError(
                    f"{name}: expected one for each of {len(self.depths)} stages, got {getattr(self, name)}"
                )


_norm = partial(nn.LayerNorm, eps=1e-6)


class PatchConv(nn.Conv2d):
    """A convolution whose patches do not overlap; zeros fill the last ones up."""

    def forward(self, x: Tensor) -> Tensor:
        height, width = (-size % stride for size, stride in zip(x.shape[-2:], self.stride, strict=True))
        return super().forward(F.pad(x, (0, width, 0, height)))


def _patch_embed(in_chans: int, dim: int, first: bool, overlap: bool, **factory: Any) -> nn.Sequential:
    """(B, C, H, W) -> (B, D, H', W'): stride 4 at first, then 2."""
    if not overlap:
        if first:
            return nn.Sequential(PatchConv(in_chans, dim, 4, stride=4, **factory), nn.BatchNorm2d(dim, **factory))
        return nn.Sequential(nn.BatchNorm2d(in_chans, **factory), PatchConv(in_chans, dim, 2, stride=2, **factory))
    layers: list[nn.Module] = []
    for before, after in [(in_chans, dim // 2), (dim // 2, dim)] if first else [(in_chans, dim)]:
        layers += [nn.GELU()] if layers else []
        layers += [nn.Conv2d(before, after, 3, stride=2, padding=1, **factory), nn.BatchNorm2d(after, **factory)]
    return nn.Sequential(*layers)


class FullAttention(DenseAttention):
    """Dense attention with LCE of its input, as the official last stage has it (elsewhere LCE is of the values)."""

    needs_grid = True

    def __init__(self, dim: int, num_heads: int, lce: int, **options: Any) -> None:
        super().__init__(dim, num_heads, **options)
        like: dict[str, Any] = {"device": self.qkv.weight.device, "dtype": self.qkv.weight.dtype}
        self.lepe = nn.Conv2d(dim, dim, lce, padding=lce // 2, groups=dim, **like)

    def mix(self, x: Tensor, attn_mask: Tensor | None, is_causal: bool, grid_size: tuple[int, ...] | None) -> Tensor:
        mixed = super().mix(x, attn_mask, is_causal, grid_size)
        around = conv_on_grid(self.lepe, x, grid_size or ())
        return mixed + around.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)


class Block(nn.Module):
    """A convolution of positions where there is one, attention, MLP; each is added to its input."""

    def __init__(
        self,
        attn: AttentionMixer,
        architecture: Architecture,
        proj_drop: float,
        drop_path: float,
        **factory: Any,
    ) -> None:
        super().__init__()
        dim = attn.dim
        self.pos_embed = nn.Conv2d(dim, dim, 3, padding=1, groups=dim, **factory) if architecture.overlap else None
        self.norm1 = _norm(dim, **factory)
        self.attn = attn
        self.norm2 = _norm(dim, **factory)
        self.mlp = Mlp(dim, int(dim * architecture.mlp_ratio), drop=proj_drop, **factory)
        self.drop_path = DropPath(drop_path) if drop_path > 0.0 else nn.Identity()

    def forward(self, x: Tensor, grid: Grid) -> Tensor:
        if self.pos_embed is not None:
            x = x + conv_on_grid(self.pos_embed, x, grid)
        x = x + self.drop_path(self.attn(self.norm1(x), grid_size=grid))
        return x + self.drop_path(self.mlp(self.norm2(x)))


class BiFormerStage(Stage):
    """Convolutions to a coarser grid, then blocks: (B, C, H, W) -> (B, D, H', W')."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch_embed(x)
        grid = (x.shape[-2], x.shape[-1])
        return self.to_map(self.through_blocks(x.flatten(2).transpose(1, 2).contiguous(), grid), grid)


class BiFormer(Pyramid):
    """BiFormer for images of any size.

    The routed stages scale their logits by dim^-0.5, not head_dim^-0.5, as in the official code, whose weights are
    trained so.

    Args:
        architecture: depths and widths.
        in_chans, num_classes, global_pool, drop_rate: as in Pyramid.
        num_regions: regions along each axis, or along both. The authors classify with 7, segment (at 512 pixels) with
            8 and detect with 16.
        mask_padding: hide the padding where regions do not divide a grid. The authors' detectors and segmenters do
            not: False is their way.
        proj_drop_rate: dropout in the MLPs and after the attention.
        attn_drop_rate: dropout of the attention weights.
        drop_path_rate: of the last block, rising from 0 at the first. The authors trained the small model with 0.15.

    Raises:
        ValueError, TypeError: global_pool is neither "avg" nor "", or num_regions is no number of regions.
    """

    def __init__(
        self,
        architecture: Architecture,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        *,
        num_regions: int | tuple[int, int] = 7,
        mask_padding: bool = True,
        drop_rate: float = 0.0,
        proj_drop_rate: float = 0.0,
        attn_drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        shared: dict[str, Any] = {"attn_drop": attn_drop_rate, "proj_drop": proj_drop_rate, **factory}
        routing: dict[str, Any] = {"num_regions": num_regions, "mask_padding": mask_padding, "qkv_bias": True}
        rates = drop_path_rates(drop_path_rate, architecture.depths)
        stages, channels = [], in_chans
        sizes = zip(architecture.depths, architecture.embed_dims, architecture.topks, strict=True)
        for i, (depth, dim, topk) in enumerate(sizes):
            blocks = []
            for _ in range(depth):
                attn: AttentionMixer
                if topk is None:
                    attn = FullAttention(dim, _LAST_HEADS, BiLevel.lce, **shared)
                else:
                    attn = BiLevelRoutingAttention(
                        dim, dim // _HEAD_DIM, topk=topk, scale=dim**-0.5, **routing, **shared
                    )
                blocks.append(Block(attn, architecture, proj_drop_rate, next(rates), **factory))
            stages.append(BiFormerStage(_patch_embed(channels, dim, i == 0, architecture.overlap, **factory), blocks))
            channels = dim
        norm = nn.BatchNorm2d(channels, **factory)
        super().__init__(stages, architecture.embed_dims, norm, in_chans, num_classes, global_pool, drop_rate)
        self.architecture = architecture

    @staticmethod
    def initialize(module: nn.Module) -> None:
        """As published: linear layers normal with deviation 0.02, their biases 0; the rest as torch has it."""
        if isinstance(module, nn.Linear):
            trunc_normal_(module.weight, std=0.02)
            if module.bias is not None:
                nn.init.zeros_(module.bias)


_NAMES = ("biformer_tiny", "biformer_small", "biformer_base", "biformer_stl")
# No addresses: the authors' links all end in "content", which is what timm would name every file in its cache.
default_cfgs = generate_default_cfgs({name: default_cfg("stages.0.patch_embed.0") for name in _NAMES})

# Official names -> ours. The blocks of the Swin layout already stand under "blocks".
_RENAMED = (
    (r"^downsample_layers\.(\d+)\.", r"stages.\1.patch_embed."),
    (r"^stages\.(\d+)\.(\d+)\.", r"stages.\1.blocks.\2."),
    (r"\.attn\.qkv\.qkv\.", ".attn.qkv."),
    (r"\.attn\.wo\.", ".attn.proj."),
    (r"\.mlp\.0\.", ".mlp.fc1."),
    (r"\.mlp\.[23]\.", ".mlp.fc2."),
)


def checkpoint_filter_fn(state_dict: dict[str, Any], model: nn.Module) -> dict[str, Tensor]:
    """Read a checkpoint of the official training script, or a bare state_dict, into our names.

    Args:
        state_dict: the file's content; the weights may stand under "model" or "state_dict", and names may carry the
            "module." of DistributedDataParallel. A state_dict of ours stays as it is.
        model: the model to load into.
    """
    return renamed(unwrapped(state_dict, ("model", "state_dict")), _RENAMED)


def _create(variant: str, pretrained: bool, options: dict[str, Any]) -> BiFormer:
    return create(BiFormer, variant, pretrained, checkpoint_filter_fn, options)


@register_model
def biformer_tiny(pretrained: bool = False, **options: Any) -> BiFormer:
    """BiFormer-T, 13,142,760 parameters."""
    return _create("biformer_tiny", pretrained, {"architecture": Architecture((2, 2, 8, 2)), **options})


@register_model
def biformer_small(pretrained: bool = False, **options: Any) -> BiFormer:
    """BiFormer-S, 25,536,232 parameters."""
    return _create("biformer_small", pretrained, {"architecture": Architecture((4, 4, 18, 4)), **options})


@register_model
def biformer_base(pretrained: bool = False, **options: Any) -> BiFormer:
    """BiFormer-B, 56,804,968 parameters."""
    wider = Architecture((4, 4, 18, 4), embed_dims=(96, 192, 384, 768))
    return _create("biformer_base", pretrained, {"architecture": wider, **options})


@register_model
def biformer_stl(pretrained: bool = False, **options: Any) -> BiFormer:
    """BiFormer-STL, in the layout of Swin-T, 28,372,552 parameters."""
    swin = Architecture((2, 2, 6, 2), embed_dims=(96, 192, 384, 768), mlp_ratio=4.0, overlap=False)
    return _create("biformer_stl", pretrained, {"architecture": swin, **options})
