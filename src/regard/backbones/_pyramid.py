"""What timm expects of a pyramid: stages of blocks, each on a coarser grid, then a norm and a classifier."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from timm.models import build_model_with_cfg
from timm.models._features import feature_take_indices
from timm.models._manipulate import MATCH_PREV_GROUP
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from regard.backbones._published import published_cfg

__all__ = ["Grid", "Pyramid", "Stage", "checked_pool", "create", "default_cfg", "drop_path_rates"]

Grid = tuple[int, int]


class Stage(nn.Module):
    """An embedding, and blocks (tokens, grid) -> tokens. Subclasses say how: (B, C, H, W) -> (B, D, H', W')."""

    def __init__(self, patch_embed: nn.Module, blocks: Sequence[nn.Module]) -> None:
        super().__init__()
        self.grad_checkpointing = False
        self.patch_embed = patch_embed
        self.blocks = nn.ModuleList(blocks)

    def through_blocks(self, x: Tensor, grid: Grid) -> Tensor:
        """(B, N, D) -> (B, N, D)."""
        for block in self.blocks:
            if self.grad_checkpointing and torch.is_grad_enabled():
                x = checkpoint(block, x, grid, use_reentrant=False)
            else:
                x = block(x, grid)
        return x

    @staticmethod
    def to_map(x: Tensor, grid: Grid) -> Tensor:
        """(B, N, D) -> (B, D, H, W)."""
        return x.transpose(1, 2).unflatten(2, grid).contiguous()


class Pyramid(nn.Module):
    """Stages, norm and classifier for images of any size, with the methods that timm calls.

    Args:
        stages: one after the other.
        widths: D of each stage; stage i has stride 4 * 2^i.
        norm: of the last stage's output.
        in_chans: channels of the images.
        num_classes: outputs of the classifier; 0: none.
        global_pool: "avg", or "" to classify every place of the grid's features.
        drop_rate: dropout before the classifier.

    Raises:
        ValueError: global_pool is neither "avg" nor "".
    """

    # What global_pool may be.
    pools: tuple[str, ...] = ("avg", "")

    def __init__(
        self,
        stages: Sequence[Stage],
        widths: Sequence[int],
        norm: nn.Module,
        in_chans: int,
        num_classes: int,
        global_pool: str,
        drop_rate: float,
    ) -> None:
        super().__init__()
        self.in_chans = in_chans
        self.global_pool = checked_pool(global_pool, self.pools)
        self.feature_info: list[dict[str, Any]] = [
            {"num_chs": width, "reduction": 4 * 2**i, "module": f"stages.{i}"} for i, width in enumerate(widths)
        ]
        self.stages = nn.Sequential(*stages)
        self.norm = norm
        self.num_features = self.head_hidden_size = widths[-1]
        self.head_drop = nn.Dropout(drop_rate)
        self.head: nn.Module = nn.Identity()
        self.apply(self.initialize)
        self.reset_classifier(num_classes)

    @staticmethod
    def initialize(module: nn.Module) -> None:
        """Give one module its first weights, as published; called with every module."""

    def no_weight_decay(self) -> set[str]:
        return set()

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Layers for timm's layer-wise decay: the blocks, with a stage's embedding in its first and norms in the last
        before them; the first embedding is the stem. Coarse: the stages."""
        stem = r"^stages\.0\.patch_embed"
        if coarse:
            return {"stem": stem, "blocks": [(r"^stages\.(\d+)", None), (r"^norm", MATCH_PREV_GROUP)]}
        blocks: list[tuple[str, tuple[int, ...] | None]] = [
            (r"^stages\.(\d+)\.blocks\.(\d+)", None),
            (r"^stages\.(\d+)\.patch_embed", (0,)),
            (r"^stages\.(\d+)\.norm", MATCH_PREV_GROUP),
            (r"^norm", MATCH_PREV_GROUP),
        ]
        return {"stem": stem, "blocks": blocks}

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        for stage in self.stages:
            stage.grad_checkpointing = enable  # type: ignore[assignment]

    def get_classifier(self) -> nn.Module:
        return self.head

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        if global_pool is not None:
            self.global_pool = checked_pool(global_pool, self.pools)
        self.num_classes = num_classes
        like = next(self.parameters())
        head = nn.Linear(self.num_features, num_classes, device=like.device, dtype=like.dtype) if num_classes else None
        self.head = nn.Identity() if head is None else head.apply(self.initialize)
        self.head.train(self.training)

    def forward_features(self, x: Tensor) -> Tensor:
        """(B, channels, H, W) -> (B, D, H / 32, W / 32), sizes rounded up."""
        return self.norm(self.stages(x))

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
            norm: apply the final norm to the last stage's.
            stop_early: run no stage after the last of `indices`.
            intermediates_only: do not return what `forward_features` returns beside them.

        Raises:
            ValueError: output_fmt is not "NCHW".
        """
        if output_fmt != "NCHW":
            raise ValueError(f"output_fmt: expected 'NCHW', got {output_fmt!r}")
        taken, last = feature_take_indices(len(self.stages), indices)
        found, final = [], len(self.stages) - 1
        for i, stage in enumerate(self.stages[: last + 1] if stop_early else self.stages):
            out = x = stage(x)
            if i == final:
                x = self.norm(x)
            if i in taken:
                found.append(x if norm else out)
        return found if intermediates_only else (x, found)

    def prune_intermediate_layers(
        self, indices: int | list[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Drop the stages after the last of `indices`, and the norm and classifier, which then fit no more."""
        taken, last = feature_take_indices(len(self.stages), indices)
        pruned = last < len(self.stages) - 1
        self.stages = self.stages[: last + 1]
        if pruned:
            self.num_features = self.head_hidden_size = self.feature_info[last]["num_chs"]
        if pruned or prune_norm:
            self.norm = nn.Identity()
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


def checked_pool(global_pool: str, pools: Sequence[str] = Pyramid.pools) -> str:
    """`global_pool`, if it is one of `pools`; else ValueError."""
    if global_pool not in pools:
        raise ValueError(f"global_pool: expected {' or '.join(map(repr, pools))}, got {global_pool!r}")
    return global_pool


def default_cfg(first_conv: str, **changes: Any) -> dict[str, Any]:
    """As published_cfg, of a pyramid: its last map has 7 x 7 places."""
    return published_cfg(first_conv, **{"pool_size": (7, 7), "crop_pct": 0.875, **changes})


def drop_path_rates(drop_path_rate: float, depths: Sequence[int]) -> Iterator[float]:
    """A rate for each block of all stages, rising from 0 at the first to `drop_path_rate` at the last."""
    return iter(torch.linspace(0.0, drop_path_rate, sum(depths), device="cpu").tolist())


def create(
    kind: type[Pyramid], variant: str, pretrained: bool, filter_fn: Callable[..., Any], options: dict[str, Any]
) -> Any:
    """Build a variant through timm, whose registry knows its default_cfg; features are maps of all four stages."""
    return build_model_with_cfg(
        kind,
        variant,
        pretrained,
        pretrained_filter_fn=filter_fn,
        feature_cfg={"out_indices": options.pop("out_indices", (0, 1, 2, 3)), "flatten_sequential": True},
        **options,
    )
