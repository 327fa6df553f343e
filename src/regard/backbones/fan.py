"""FAN with token-aware average pooling (arXiv 2303.11126), and FAN without (arXiv 2204.12451).

A vision transformer without class token: attention between tokens, then, in the place of the MLP, a gate for each
channel from all tokens (channel processing); two class-attention blocks as in CaiT read the class token's features. The
stem is XCiT's convolutions of stride 16, or in the hybrids two stages of ConvNeXt. Checkpoints of the official
implementations (guoyongcs/TAPADL, and NVlabs/FAN, on which it builds) load through `checkpoint_filter_fn`.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from timm.layers import trunc_normal_
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from timm.models._features import feature_take_indices
from timm.models.xcit import ClassAttentionBlock, ConvPatchEmbed
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from regard.backbones._fan_parts import (
    MLP_RATIO,
    STRIDE,
    Block,
    ChannelProcessing,
    FourierPositions,
    Grid,
    HybridEmbed,
    init_weights,
    make_norm,
)
from regard.backbones._published import joined, published_cfg, renamed, unwrapped
from regard.mixers import DenseAttention, TokenAwarePooling

__all__ = ["FAN", "Architecture", "checkpoint_filter_fn", "default_cfgs"]


@dataclass(frozen=True)
class Architecture:
    """Sizes of a model.

    Args:
        embed_dim: channels C of the tokens.
        depth: blocks before the class-attention blocks.
        num_heads: heads of the attention, and groups of channels that share a temperature.
        stem_depths: None: four convolutions of stride 2; else the depths of the two ConvNeXt stages (128 and 256
            channels, strides 4 and 8) before a convolution of stride 2.
        head_init_scale: factor of the classifier's first weights.
    """

    embed_dim: int
    depth: int
    num_heads: int
    stem_depths: tuple[int, int] | None = None
    head_init_scale: float = 1.0


class FAN(nn.Module):
    """FAN, with or without token-aware average pooling, for pictures of any size.

    Args:
        architecture: depth and widths.
        in_chans: channels of the pictures.
        num_classes: outputs of the classifier; 0: none.
        global_pool: "token": the class token's features are classified; "avg": the mean of the others; "": all.
        num_scales: K of the pooling; 1: none.
        attn_layer: makes the attention between tokens from (dim, num_heads, qkv_bias, attn_drop, proj_drop, device,
            dtype): a mechanism's attn_layer().
        drop_rate: dropout before the classifier.
        pos_drop_rate, proj_drop_rate, attn_drop_rate: dropout of the embedded tokens, in the MLPs and after the
            attention, and of the attention weights and channel gates. (The official drop_rate sets the first two.)
        drop_path_rate: of every block alike; the authors trained the base hybrid with 0.35.

    Raises:
        ValueError: global_pool is unknown.
    """

    def __init__(
        self,
        architecture: Architecture,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "token",
        *,
        num_scales: int = 1,
        attn_layer: Callable[..., nn.Module] = DenseAttention,
        drop_rate: float = 0.0,
        pos_drop_rate: float = 0.0,
        proj_drop_rate: float = 0.0,
        attn_drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        drops: dict[str, Any] = {"attn_drop": attn_drop_rate, "proj_drop": proj_drop_rate}
        read: dict[str, Any] = {"mlp_ratio": MLP_RATIO, "qkv_bias": True, "norm_layer": make_norm, "tokens_norm": True}
        dim, heads = architecture.embed_dim, architecture.num_heads
        self.architecture = architecture
        self.in_chans = in_chans
        self.embed_dim = self.num_features = self.head_hidden_size = dim
        self.num_prefix_tokens = 1  # in what forward_features returns
        self.global_pool = _checked_pool(global_pool)
        self.grad_checkpointing = False
        if architecture.stem_depths is None:
            self.patch_embed: nn.Module = ConvPatchEmbed(STRIDE, STRIDE, in_chans, dim, **factory)
        else:
            self.patch_embed = HybridEmbed(in_chans, dim, architecture.stem_depths, **factory)
        self.pos_embed = FourierPositions(dim, **factory)
        self.pos_drop = nn.Dropout(pos_drop_rate)
        self.blocks = nn.ModuleList(
            Block(
                TokenAwarePooling(dim, num_scales, **factory),
                attn_layer(dim, num_heads=heads, qkv_bias=True, **drops, **factory),  # type: ignore[arg-type]
                ChannelProcessing(dim, heads, attn_drop_rate, proj_drop_rate, **factory),
                drop_path_rate,
                **factory,
            )
            for _ in range(architecture.depth)
        )
        self.feature_info = [
            {"num_chs": dim, "reduction": STRIDE, "module": f"blocks.{i}"} for i in range(architecture.depth)
        ]
        self.cls_token: nn.Parameter | None = nn.Parameter(torch.zeros(1, 1, dim, **factory))
        self.cls_attn_blocks = nn.ModuleList(
            ClassAttentionBlock(dim, heads, **read, **drops, **factory) for _ in range(2)
        )
        self.norm: nn.Module = make_norm(dim, **factory)
        self.head_drop = nn.Dropout(drop_rate)
        self.head: nn.Module = nn.Identity()
        trunc_normal_(self.cls_token, std=0.02)
        self.apply(init_weights)
        self.reset_classifier(num_classes)

    def no_weight_decay(self) -> set[str]:
        return {"cls_token", *(name for name, _ in self.named_parameters() if name.endswith(".temperature"))}

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Layers for timm's layer-wise decay."""
        return {
            "stem": r"^cls_token|^pos_embed|^patch_embed",
            "blocks": r"^blocks\.(\d+)",
            "cls_attn_blocks": [(r"^cls_attn_blocks\.(\d+)", None), (r"^norm", (99999,))],
        }

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        self.grad_checkpointing = enable

    def get_classifier(self) -> nn.Module:
        return self.head

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        if global_pool is not None:
            self.global_pool = _checked_pool(global_pool)
        self.num_classes = num_classes
        self.head = nn.Identity()
        if num_classes:
            like = next(self.parameters())
            self.head = nn.Linear(self.num_features, num_classes, device=like.device, dtype=like.dtype)
            self.head.apply(init_weights)
            with torch.no_grad():
                self.head.weight.mul_(self.architecture.head_init_scale)
        self.head.train(self.training)

    def _embed(self, x: Tensor) -> tuple[Tensor, Grid]:
        """(B, C, H, W) -> (B, N, D) with positions, and the grid."""
        x, grid = self.patch_embed(x)
        return self.pos_drop(x + self.pos_embed(grid)), grid

    def _run(self, block: nn.Module, *args: Any) -> Tensor:
        if self.grad_checkpointing and torch.is_grad_enabled():
            return checkpoint(block, *args, use_reentrant=False)
        return block(*args)

    def _classify(self, x: Tensor) -> Tensor:
        """(B, N, D) -> (B, 1 + N, D): the class token before the others, normed."""
        if self.cls_token is not None:
            x = torch.cat([self.cls_token.expand(x.shape[0], -1, -1), x], dim=1)
        for block in self.cls_attn_blocks:
            x = self._run(block, x)
        return self.norm(x)

    def forward_features(self, x: Tensor) -> Tensor:
        """(B, channels, H, W) -> (B, 1 + N, D), N = ceil(H / 16) * ceil(W / 16)."""
        x, grid = self._embed(x)
        for block in self.blocks:
            x = self._run(block, x, grid)
        return self._classify(x)

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | list[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> list[Tensor] | tuple[Tensor, list[Tensor]]:
        """Outputs of blocks, as timm asks for them.

        Args:
            indices: which blocks; an int n: the last n; None: all.
            norm: apply the last norm to them.
            stop_early: run no block after the last of `indices`.
            output_fmt: "NCHW" or "NLC".
            intermediates_only: do not return forward_features' output beside them.

        Raises:
            ValueError: output_fmt is neither.
        """
        if output_fmt not in ("NCHW", "NLC"):
            raise ValueError(f"output_fmt: expected 'NCHW' or 'NLC', got {output_fmt!r}")
        taken, last = feature_take_indices(len(self.blocks), indices)
        found = []
        x, grid = self._embed(x)
        for i, block in enumerate(self.blocks[: last + 1] if stop_early else self.blocks):
            x = self._run(block, x, grid)
            if i in taken:
                feature = self.norm(x) if norm else x
                if output_fmt == "NCHW":
                    feature = feature.transpose(1, 2).unflatten(2, grid).contiguous()
                found.append(feature)
        return found if intermediates_only else (self._classify(x), found)

    def prune_intermediate_layers(
        self, indices: int | list[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Drop the blocks after the last of `indices`; with prune_head the class attention and the classifier too."""
        taken, last = feature_take_indices(len(self.blocks), indices)
        self.blocks = self.blocks[: last + 1]
        if prune_norm:
            self.norm = nn.Identity()
        if prune_head:
            self.cls_attn_blocks = nn.ModuleList()
            self.cls_token = None
            self.num_prefix_tokens = 0
            self.reset_classifier(0, "")
        return taken

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Features of `forward_features` -> (B, num_classes); without pooling (B, 1 + N, num_classes)."""
        if self.global_pool:
            x = x[:, 0] if self.global_pool == "token" else x[:, self.num_prefix_tokens :].mean(dim=1)
        x = self.head_drop(x)
        return x if pre_logits else self.head(x)

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(x))


def _checked_pool(global_pool: str) -> str:
    if global_pool not in ("token", "avg", ""):
        raise ValueError(f"global_pool: expected 'token', 'avg' or '', got {global_pool!r}")
    return global_pool


_cfg = partial(published_cfg, "patch_embed.proj.0.0", crop_pct=1.0)
_hybrid_cfg = partial(published_cfg, "patch_embed.backbone.stem.0", crop_pct=1.0)

# The weights are not fetched by name: pass the file through checkpoint_filter_fn, or timm's pretrained_cfg_overlay.
default_cfgs = generate_default_cfgs(
    {
        f"{prefix}fan_{kind}{size}": make(license="mit" if prefix else "")
        for prefix in ("tap_", "")
        for kind, make in (("", _cfg), ("hybrid_", _hybrid_cfg))
        for size in ("tiny", "small", "base", "large")
    }
)


def checkpoint_filter_fn(state_dict: dict[str, Any], model: nn.Module) -> dict[str, Tensor]:
    """Read a checkpoint of the official training scripts, or a bare state_dict, into our names.

    Args:
        state_dict: the file's content; the weights may stand under "state_dict", "state_dict_ema" or "model" (the first
            of these is read, as the authors' evaluation does), and names may carry the "module." of
            DistributedDataParallel. A state_dict of ours stays as it is.
        model: the model to load into; without pooling, the predictors' weights are left out.
    """
    weights = unwrapped(state_dict, ("state_dict", "state_dict_ema", "model"))
    weights = renamed(weights, ((r"\.dilation_predictor\.proj\.", ".tap.predictor."),))
    weights = joined(weights, (".attn.q.", ".attn.kv."), ".attn.qkv.", within="blocks.")
    if isinstance(model, FAN) and all(block.tap.num_scales == 1 for block in model.blocks):  # type: ignore[union-attr]
        weights = {name: weight for name, weight in weights.items() if ".tap." not in name}
    return weights


_SIZES = {
    "tiny": Architecture(192, 12, 4),
    "small": Architecture(384, 12, 8),
    "base": Architecture(448, 18, 8),
    "large": Architecture(480, 24, 10),
    "hybrid_tiny": Architecture(192, 8, 8, (3, 3)),
    "hybrid_small": Architecture(384, 10, 8, (3, 3)),
    "hybrid_base": Architecture(448, 16, 8, (3, 3)),
    "hybrid_large": Architecture(480, 22, 10, (3, 5), head_init_scale=0.001),
}


def _create(variant: str, pretrained: bool, options: dict[str, Any]) -> FAN:
    prefix, _, size = variant.partition("fan_")
    return build_model_with_cfg(
        FAN,
        variant,
        pretrained,
        pretrained_filter_fn=checkpoint_filter_fn,
        feature_cfg={"out_indices": options.pop("out_indices", 3), "feature_cls": "getter"},
        **{"architecture": _SIZES[size], "num_scales": 4 if prefix else 1, **options},
    )


@register_model
def tap_fan_tiny(pretrained: bool = False, **options: Any) -> FAN:
    """TAP-FAN-T-ViT (`tap_fan_tiny_12_p16_224`), 7,404,688 parameters."""
    return _create("tap_fan_tiny", pretrained, options)


@register_model
def tap_fan_small(pretrained: bool = False, **options: Any) -> FAN:
    """TAP-FAN-S-ViT (`tap_fan_small_12_p16_224`), 28,513,048 parameters."""
    return _create("tap_fan_small", pretrained, options)


@register_model
def tap_fan_base(pretrained: bool = False, **options: Any) -> FAN:
    """TAP-FAN-B-ViT (`tap_fan_base_18_p16_224`), 54,643,360 parameters."""
    return _create("tap_fan_base", pretrained, options)


@register_model
def tap_fan_large(pretrained: bool = False, **options: Any) -> FAN:
    """TAP-FAN-L-ViT (`tap_fan_large_24_p16_224`), 80,992,468 parameters."""
    return _create("tap_fan_large", pretrained, options)


@register_model
def tap_fan_hybrid_tiny(pretrained: bool = False, **options: Any) -> FAN:
    """TAP-FAN-T-Hybrid (`tap_fan_tiny_8_p4_hybrid`), 7,523,752 parameters."""
    return _create("tap_fan_hybrid_tiny", pretrained, options)


@register_model
def tap_fan_hybrid_small(pretrained: bool = False, **options: Any) -> FAN:
    """TAP-FAN-S-Hybrid (`tap_fan_small_12_p4_hybrid`), 26,257,704 parameters."""
    return _create("tap_fan_hybrid_small", pretrained, options)


@register_model
def tap_fan_hybrid_base(pretrained: bool = False, **options: Any) -> FAN:
    """TAP-FAN-B-Hybrid (`tap_fan_base_16_p4_hybrid`), 50,735,528 parameters."""
    return _create("tap_fan_hybrid_base", pretrained, options)


@register_model
def tap_fan_hybrid_large(pretrained: bool = False, **options: Any) -> FAN:
    """TAP-FAN-L-Hybrid (`tap_fan_large_16_p4_hybrid`), 77,238,644 parameters."""
    return _create("tap_fan_hybrid_large", pretrained, options)


@register_model
def fan_tiny(pretrained: bool = False, **options: Any) -> FAN:
    """FAN-T-ViT (`fan_tiny_12_p16_224`), 7,319,920 parameters."""
    return _create("fan_tiny", pretrained, options)


@register_model
def fan_small(pretrained: bool = False, **options: Any) -> FAN:
    """FAN-S-ViT (`fan_small_12_p16_224`), 28,345,336 parameters."""
    return _create("fan_small", pretrained, options)


@register_model
def fan_base(pretrained: bool = False, **options: Any) -> FAN:
    """FAN-B-ViT (`fan_base_18_p16_224`), 54,350,320 parameters."""
    return _create("fan_base", pretrained, options)


@register_model
def fan_large(pretrained: bool = False, **options: Any) -> FAN:
    """FAN-L-ViT (`fan_large_24_p16_224`), 80,574,100 parameters."""
    return _create("fan_large", pretrained, options)


@register_model
def fan_hybrid_tiny(pretrained: bool = False, **options: Any) -> FAN:
    """FAN-T-Hybrid (`fan_tiny_8_p4_hybrid`), 7,467,240 parameters."""
    return _create("fan_hybrid_tiny", pretrained, options)


@register_model
def fan_hybrid_small(pretrained: bool = False, **options: Any) -> FAN:
    """FAN-S-Hybrid (`fan_small_12_p4_hybrid`), 26,117,944 parameters."""
    return _create("fan_hybrid_small", pretrained, options)


@register_model
def fan_hybrid_base(pretrained: bool = False, **options: Any) -> FAN:
    """FAN-B-Hybrid (`fan_base_16_p4_hybrid`), 50,475,048 parameters."""
    return _create("fan_hybrid_base", pretrained, options)


@register_model
def fan_hybrid_large(pretrained: bool = False, **options: Any) -> FAN:
    """FAN-L-Hybrid (`fan_large_16_p4_hybrid`), 76,855,140 parameters."""
    return _create("fan_hybrid_large", pretrained, options)
