"""What pyramids of stages have in common: patch embedding, stages that end in a norm, and timm's model interface."""

import math
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers import DropPath, trunc_normal_
from timm.models._features import feature_take_indices
from timm.models._manipulate import MATCH_PREV_GROUP
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

__all__ = ["Block", "Grid", "PatchEmbed", "Pyramid", "Stage", "norm", "pyramid_cfg"]

Grid = tuple[int, int]

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

    def __init__(self, attn: nn.Module, mlp: nn.Module, drop_path: float, **factory: Any) -> None:
        super().__init__()
        self.norm1 = norm(attn.dim, **factory)
        self.attn = attn
        self.norm2 = norm(attn.dim, **factory)
        self.mlp = mlp
        self.drop_path = DropPath(drop_path) if drop_path > 0.0 else nn.Identity()

    def forward(self, x: Tensor, grid: Grid) -> Tensor:
        x = x + self.drop_path(self.attn(self.norm1(x), grid_size=grid))
        return x + self.drop_path(self.mlp(self.norm2(x), grid))


class Stage(nn.Module):
    """Patch embedding, blocks, norm: (B, C, H, W) -> (B, D, H', W')."""

    def __init__(self, patch_embed: PatchEmbed, blocks: Sequence[Block], norm: nn.LayerNorm) -> None:
        super().__init__()
        self.grad_checkpointing = False
        self.patch_embed = patch_embed
        self.blocks = nn.ModuleList(blocks)
        self.norm = norm

    def forward(self, x: Tensor) -> Tensor:
        x, grid = self.patch_embed(x)
        for block in self.blocks:
            if self.grad_checkpointing and torch.is_grad_enabled():
                x = checkpoint(block, x, grid, use_reentrant=False)
            else:
                x = block(x, grid)
        return self.norm(x).transpose(1, 2).unflatten(2, grid).contiguous()


class Pyramid(nn.Module):
    """Stages of stride 4, 8, 16 ..., and a classifier: what timm expects of such a model, for images of any size.

    Args:
        stages: the first reduces the image by 4, every other by 2.
        in_chans: channels of the images.
        num_classes: outputs of the classifier; 0: none.
        global_pool: "avg", or "" to classify every place of the grid's features.
        drop_rate: dropout before the classifier.

    Raises:
        ValueError: global_pool is neither "avg" nor "".
    """

    def __init__(
        self,
        stages: Sequence[Stage],
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        drop_rate: float = 0.0,
    ) -> None:
        super().__init__()
        self.in_chans = in_chans
        self.global_pool = _checked_pool(global_pool)
        self.feature_info = [
            {"num_chs": stage.norm.normalized_shape[0], "reduction": 4 * 2**i, "module": f"stages.{i}"}
            for i, stage in enumerate(stages)
        ]
        self.stages = nn.Sequential(*stages)
        self.num_features = self.head_hidden_size = self.feature_info[-1]["num_chs"]
        self.head_drop = nn.Dropout(drop_rate)
        self.head: nn.Module = nn.Identity()
        self.apply(_init_weights)
        self.reset_classifier(num_classes)

    def no_weight_decay(self) -> set[str]:
        return set()

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Layers for timm's layer-wise decay: the blocks, with a stage's embedding in its first and its norm in its
        last; the first embedding is the stem. Coarse: the stages."""
        if coarse:
            return {"stem": r"^stages\.0\.patch_embed", "blocks": r"^stages\.(\d+)"}
        blocks: list[tuple[str, tuple[int, ...] | None]] = [
            (r"^stages\.(\d+)\.blocks\.(\d+)", None),
            (r"^stages\.(\d+)\.patch_embed", (0,)),
            (r"^stages\.(\d+)\.norm", MATCH_PREV_GROUP),
        ]
        return {"stem": r"^stages\.0\.patch_embed", "blocks": blocks}

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        for stage in self.stages:
            if isinstance(stage, Stage):
                stage.grad_checkpointing = enable

    def get_classifier(self) -> nn.Module:
        return self.head

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        if global_pool is not None:
            self.global_pool = _checked_pool(global_pool)
        self.num_classes = num_classes
        like = next(self.parameters())
        head = nn.Linear(self.num_features, num_classes, device=like.device, dtype=like.dtype) if num_classes else None
        self.head = nn.Identity() if head is None else head.apply(_init_weights)
        self.head.train(self.training)

    def forward_features(self, x: Tensor) -> Tensor:
        """(B, channels, H, W) -> (B, num_features, H / 32, W / 32) with four stages, sizes rounded up."""
        return self.stages(x)

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | list[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> list[Tensor] | tuple[Tensor, list[Tensor]]:
        """Outputs of stages, as timm asks for them.

        Args:
            indices: which stages; an int n: the last n; None: all.
            norm: has no effect, each stage ends in its norm.
            stop_early: run no stage after the last of `indices`.
            intermediates_only: do not return the last stage's output beside them.

        Raises:
            ValueError: output_fmt is not "NCHW".
        """
        if output_fmt != "NCHW":
            raise ValueError(f"output_fmt: expected 'NCHW', got {output_fmt!r}")
        taken, last = feature_take_indices(len(self.stages), indices)
        found = []
        for i, stage in enumerate(self.stages[: last + 1] if stop_early else self.stages):
            x = stage(x)
            if i in taken:
                found.append(x)
        return found if intermediates_only else (x, found)

    def prune_intermediate_layers(
        self, indices: int | list[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Drop the stages after the last of `indices`, and the classifier, which then fits no more."""
        taken, last = feature_take_indices(len(self.stages), indices)
        pruned = last < len(self.stages) - 1
        self.stages = self.stages[: last + 1]
        if pruned:
            self.num_features = self.head_hidden_size = self.feature_info[last]["num_chs"]
        if pruned or prune_head:
            self.reset_classifier(0, "")
        return taken

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Features of `forward_features` -> (B, num_classes); without pooling (B, H', W', num_classes)."""
        x = x.mean(dim=(-2, -1)) if self.global_pool else x.permute(0, 2, 3, 1)
        x = self.head_drop(x)
        return x if pre_logits else self.head(x)

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(x))


def _checked_pool(global_pool: str) -> str:
    if global_pool not in ("avg", ""):
        raise ValueError(f"global_pool: expected 'avg' or '', got {global_pool!r}")
    return global_pool


def _init_weights(module: nn.Module) -> None:
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


def pyramid_cfg(**changes: Any) -> dict[str, Any]:
    """A model's default_cfg: no weights to download, ImageNet's classes and normalisation."""
    return {
        "url": "",
        "num_classes": 1000,
        "input_size": (3, 224, 224),
        "pool_size": (7, 7),
        "crop_pct": 0.875,
        "interpolation": "bicubic",
        "fixed_input_size": False,
        "mean": IMAGENET_DEFAULT_MEAN,
        "std": IMAGENET_DEFAULT_STD,
        "first_conv": "stages.0.patch_embed.proj",
        "classifier": "head",
        **changes,
    }
