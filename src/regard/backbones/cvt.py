"""CvT, a pyramid of convolutions and attention (arXiv 2103.15808).

Three stages of stride 4, 8 and 16; the last has a class token and nothing has a position embedding. Queries, keys and
values are projected from depthwise convolutions of the tokens, those of the keys and values with stride 2, so that each
query sees a quarter as many keys. Checkpoints of the official implementation (microsoft/CvT) load through
`checkpoint_filter_fn`.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from timm.layers import DropPath, Mlp, trunc_normal_
from timm.layers.activations import QuickGELU
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from timm.models._features import feature_take_indices
from torch import Tensor, nn

from regard.backbones._attention import AttnLayer, attn_layers, modify
from regard.backbones._published import joined, renamed, unwrapped
from regard.backbones._pyramid import Grid, Pyramid, Stage, default_cfg
from regard.mixers import AttentionMixer, DenseAttention

__all__ = ["CVT_13", "CVT_21", "CVT_W24", "Architecture", "CvT", "checkpoint_filter_fn", "create_cvt", "default_cfgs"]


@dataclass(frozen=True)
class Architecture:
    """Sizes of the stages."""

    depths: tuple[int, ...]
    embed_dims: tuple[int, ...] = (64, 192, 384)
    num_heads: tuple[int, ...] = (1, 3, 6)

    def __post_init__(self) -> None:
        for name in ("embed_dims", "num_heads"):
            if len(getattr(self, name)) != len(self.depths):
                raise ValueError(
                    f"{name}: expected one for each of {len(self.depths)} stages, got {getattr(self, name)}"
                )


CVT_13 = Architecture((1, 2, 10))
CVT_21 = Architecture((1, 4, 16))
CVT_W24 = Architecture((2, 2, 20), embed_dims=(192, 768, 1024), num_heads=(3, 12, 16))


class ConvEmbed(nn.Module):
    """A convolution whose patches overlap, and a norm: (B, C, H, W) -> (B, H' W', D) and the grid (H', W')."""

    def __init__(self, in_chans: int, dim: int, first: bool, **factory: Any) -> None:
        super().__init__()
        kernel, stride, padding = (7, 4, 2) if first else (3, 2, 1)
        self.proj = nn.Conv2d(in_chans, dim, kernel, stride=stride, padding=padding, **factory)
        self.norm = nn.LayerNorm(dim, **factory)

    def forward(self, x: Tensor) -> tuple[Tensor, Grid]:
        x = self.proj(x)
        return self.norm(x.flatten(2).transpose(1, 2)), (x.shape[-2], x.shape[-1])


class DepthwiseConv(nn.Module):
    """A depthwise 3 x 3 convolution and a batch norm."""

    def __init__(self, dim: int, stride: int, **factory: Any) -> None:
        super().__init__()
        self.conv = nn.Conv2d(dim, dim, 3, stride=stride, padding=1, groups=dim, bias=False, **factory)
        self.bn = nn.BatchNorm2d(dim, **factory)

    def forward(self, x: Tensor) -> Tensor:
        return self.bn(self.conv(x))


class ConvSources(nn.Module):
    """What queries, keys and values are projected from, see `AttentionMixer.project_from`. Prefix tokens stay."""

    def __init__(self, dim: int, num_prefix_tokens: int, **factory: Any) -> None:
        super().__init__()
        self.num_prefix_tokens = num_prefix_tokens
        self.query = DepthwiseConv(dim, stride=1, **factory)
        self.key = DepthwiseConv(dim, stride=2, **factory)
        self.value = DepthwiseConv(dim, stride=2, **factory)

    def forward(self, x: Tensor, grid: Grid) -> tuple[Tensor, Tensor, Tensor, Grid]:
        prefix, cells = x[:, : self.num_prefix_tokens], x[:, self.num_prefix_tokens :]
        cells = cells.transpose(1, 2).unflatten(2, grid)
        maps = self.query(cells), self.key(cells), self.value(cells)
        query, key, value = (torch.cat([prefix, part.flatten(2).transpose(1, 2)], dim=1) for part in maps)
        return query, key, value, (maps[1].shape[-2], maps[1].shape[-1])


class Block(nn.Module):
    """Attention and MLP, each normed before and added to its input."""

    def __init__(self, attn: AttentionMixer, proj_drop: float, drop_path: float, **factory: Any) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(attn.dim, **factory)
        self.attn = attn
        self.norm2 = nn.LayerNorm(attn.dim, **factory)
        self.mlp = Mlp(attn.dim, 4 * attn.dim, act_layer=QuickGELU, drop=proj_drop, **factory)
        self.drop_path = DropPath(drop_path) if drop_path > 0.0 else nn.Identity()

    def forward(self, x: Tensor, grid: Grid) -> Tensor:
        x = x + self.drop_path(self.attn(self.norm1(x), grid_size=grid))
        return x + self.drop_path(self.mlp(self.norm2(x)))


class TokenStage(Stage):
    """Embedding, class token where there is one, blocks: (B, C, H, W) -> (B, P + H' W', D) and the grid (H', W')."""

    def __init__(self, patch_embed: ConvEmbed, cls_token: nn.Parameter | None, blocks: Sequence[Block]) -> None:
        super().__init__(patch_embed, blocks)
        self.cls_token = cls_token

    def forward(self, x: Tensor) -> tuple[Tensor, Grid]:
        x, grid = self.patch_embed(x)
        if self.cls_token is not None:
            x = torch.cat([self.cls_token.expand(x.shape[0], -1, -1), x], dim=1)
        return self.through_blocks(x, grid), grid


class CvT(Pyramid):
    """CvT for images of any size.

    The logits are scaled by dim^-0.5, not head_dim^-0.5, as in the official code, whose weights are trained so.

    Args:
        architecture: depths and widths.
        in_chans, num_classes, drop_rate: as in Pyramid.
        global_pool: "token" (the class token), "avg" (mean of the others), or "" to classify every token.
        attn_layer: the mechanism of the blocks, such as `regard.KNN(0.5)` or a mixer's class; one for all stages or one
            for each. It attends between given queries, keys and values; the keys are fewer than the queries.
        proj_drop_rate: dropout in the MLPs and after the attention.
        attn_drop_rate: dropout of the attention weights.
        drop_path_rate: of the last block, rising from 0 at the first block of the last stage; none in the others. The
            authors trained with 0.1, W24 with 0.3.

    Raises:
        ValueError: global_pool is none of the three, or the mechanism makes its keys from the tokens themselves.
        TypeError: attn_layer is neither a mechanism nor a mixer's class.
    """

    pools: tuple[str, ...] = ("token", "avg", "")

    def __init__(
        self,
        architecture: Architecture = CVT_13,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "token",
        *,
        attn_layer: AttnLayer | Sequence[AttnLayer] = DenseAttention,
        drop_rate: float = 0.0,
        proj_drop_rate: float = 0.0,
        attn_drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        last = len(architecture.depths) - 1
        layers = attn_layers(attn_layer, last + 1)
        stages, channels = [], in_chans
        sizes = zip(architecture.depths, architecture.embed_dims, architecture.num_heads, layers, strict=True)
        for i, (depth, dim, heads, layer) in enumerate(sizes):
            prefix = 1 if i == last else 0
            rates = torch.linspace(0.0, drop_path_rate if i == last else 0.0, depth, device="cpu").tolist()
            blocks = []
            for rate in rates:
                drops: dict[str, Any] = {"attn_drop": attn_drop_rate, "proj_drop": proj_drop_rate}
                attn = layer(dim, heads, qkv_bias=True, num_prefix_tokens=prefix, scale=dim**-0.5, **drops, **factory)
                attn.project_from(ConvSources(dim, prefix, **factory))
                blocks.append(Block(attn, proj_drop_rate, rate, **factory))
            cls_token = nn.Parameter(torch.zeros(1, 1, dim, **factory)) if prefix else None
            stages.append(TokenStage(ConvEmbed(channels, dim, i == 0, **factory), cls_token, blocks))
            channels = dim
        norm = nn.LayerNorm(channels, **factory)
        super().__init__(stages, architecture.embed_dims, norm, in_chans, num_classes, global_pool, drop_rate)
        self.architecture = architecture
        self.num_prefix_tokens = 1
        modify(self, attn_layer)

    @staticmethod
    def initialize(module: nn.Module) -> None:
        """As published: linear layers and the class token normal with deviation 0.02, biases 0, the rest torch's."""
        if isinstance(module, nn.Linear):
            trunc_normal_(module.weight, std=0.02)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, TokenStage) and module.cls_token is not None:
            trunc_normal_(module.cls_token, std=0.02)

    def no_weight_decay(self) -> set[str]:
        return {name for name, _ in self.named_parameters() if name.endswith("cls_token")}

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """As in Pyramid; the class token counts to the first block of its stage."""
        groups = super().group_matcher(coarse)
        if not coarse:
            groups["blocks"].append((r"^stages\.(\d+)\.cls_token", (0,)))
        return groups

    def forward_features(self, x: Tensor) -> Tensor:
        """(B, channels, H, W) -> (B, 1 + H / 16 * W / 16, 384): the class token, then the grid's; normed."""
        for i, stage in enumerate(self.stages):
            x, grid = stage(x)
            if i + 1 < len(self.stages):
                x = Stage.to_map(x, grid)
        return self.norm(x)

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | list[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> list[Tensor] | tuple[Tensor, list[Tensor]]:
        """As in Pyramid: outputs of stages on their grids, without the class token; beside them, the tokens that
        `forward_features` returns."""
        if output_fmt != "NCHW":
            raise ValueError(f"output_fmt: expected 'NCHW', got {output_fmt!r}")
        taken, last = feature_take_indices(len(self.stages), indices)
        found, final = [], len(self.stages) - 1
        for i, stage in enumerate(self.stages[: last + 1] if stop_early else self.stages):
            tokens, grid = stage(x)
            if i == final:
                normed = self.norm(tokens)
            prefix = self.num_prefix_tokens if i == final else 0
            x = Stage.to_map((normed if norm and i == final else tokens)[:, prefix:], grid)
            if i in taken:
                found.append(x)
        if intermediates_only:
            return found
        return (normed if i == final else tokens), found

    def prune_intermediate_layers(
        self, indices: int | list[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Drop the stages after the last of `indices`, and with them the class token, the norm and the classifier."""
        stages = len(self.stages)
        taken = super().prune_intermediate_layers(indices, prune_norm, prune_head)
        if len(self.stages) < stages:
            self.num_prefix_tokens, self.pools = 0, Pyramid.pools
        return taken

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Features of `forward_features` -> (B, num_classes); without pooling (B, tokens, num_classes)."""
        if self.global_pool == "token":
            x = x[:, 0]
        elif self.global_pool == "avg":
            x = x[:, self.num_prefix_tokens :].mean(dim=1)
        x = self.head_drop(x)
        return x if pre_logits else self.head(x)


def cfg(**changes: Any) -> dict[str, Any]:
    """Without an address: the authors' weights lie behind a page."""
    return default_cfg("stages.0.patch_embed.proj", **{"pool_size": (14, 14), **changes})


_LARGE: dict[str, Any] = {"input_size": (3, 384, 384), "pool_size": (24, 24), "crop_pct": 1.0, "crop_mode": "squash"}

default_cfgs = generate_default_cfgs({"cvt_13": cfg(), "cvt_21": cfg(), "cvt_w24": cfg(**_LARGE)})

# Official names -> ours.
_RENAMED = (
    (r"^stage(\d+)\.", r"stages.\1."),
    (r"\.attn\.conv_proj_q\.", ".attn.sources.query."),
    (r"\.attn\.conv_proj_k\.", ".attn.sources.key."),
    (r"\.attn\.conv_proj_v\.", ".attn.sources.value."),
)


def checkpoint_filter_fn(state_dict: dict[str, Any], model: nn.Module) -> dict[str, Tensor]:
    """Read a checkpoint of the official training script, or a bare state_dict, into our names.

    Args:
        state_dict: the file's content; the weights may stand under "state_dict_ema" (taken first), "state_dict" or
            "model", and names may carry the "module." of DistributedDataParallel. A state_dict of ours stays as it is.
        model: the model to load into.
    """
    weights = renamed(unwrapped(state_dict), _RENAMED)
    # The three projections are one layer here.
    return joined(weights, (".attn.proj_q.", ".attn.proj_k.", ".attn.proj_v."), ".attn.qkv.")


def create_cvt(variant: str, pretrained: bool, options: dict[str, Any]) -> CvT:
    """Build a variant through timm, whose registry knows its default_cfg."""
    return build_model_with_cfg(
        CvT,
        variant,
        pretrained,
        pretrained_filter_fn=checkpoint_filter_fn,
        feature_cfg={"out_indices": options.pop("out_indices", (0, 1, 2)), "feature_cls": "getter"},
        **options,
    )


@register_model
def cvt_13(pretrained: bool = False, **options: Any) -> CvT:
    """CvT-13, 19,997,480 parameters."""
    return create_cvt("cvt_13", pretrained, {"architecture": CVT_13, **options})


@register_model
def cvt_21(pretrained: bool = False, **options: Any) -> CvT:
    """CvT-21, 31,622,696 parameters."""
    return create_cvt("cvt_21", pretrained, {"architecture": CVT_21, **options})


@register_model
def cvt_w24(pretrained: bool = False, **options: Any) -> CvT:
    """CvT-W24, 277,196,392 parameters, for images of 384 pixels."""
    return create_cvt("cvt_w24", pretrained, {"architecture": CVT_W24, **options})
