"""ClusTR, a pyramid whose attention sees clusters of tokens (arXiv 2208.13138).

Four stages of stride 4, 8, 16 and 32. The official implementation (YtongXie/ClusTR) publishes no weights; its
state_dict loads through `checkpoint_filter_fn`.
"""

from dataclasses import dataclass
from typing import Any

import torch
from timm.models import generate_default_cfgs, register_model
from torch import Tensor, nn

from regard.backbones._overlap import OverlapPyramid, normed_stages
from regard.backbones._published import joined, renamed, unwrapped
from regard.backbones._pyramid import Grid, create, default_cfg
from regard.mixers import ClusteredAttention

__all__ = ["Architecture", "ClusTR", "checkpoint_filter_fn", "default_cfgs"]


@dataclass(frozen=True)
class Architecture:
    """Sizes of the stages. `reductions`: a stage of N tokens makes N / reduction^2 clusters, and 4 times as many."""

    depths: tuple[int, ...]
    embed_dims: tuple[int, ...] = (64, 128, 256, 512)
    num_heads: tuple[int, ...] = (1, 2, 4, 8)
    mlp_ratios: tuple[float, ...] = (8, 8, 4, 4)
    reductions: tuple[int, ...] = (8, 4, 2, 1)

    def __post_init__(self) -> None:
        for name in ("embed_dims", "num_heads", "mlp_ratios", "reductions"):
            if len(getattr(self, name)) != len(self.depths):
                raise ValueError(
                    f"{name}: expected one for each of {len(self.depths)} stages, got {getattr(self, name)}"
                )


class Mlp(nn.Module):
    """Two linear layers; between them a depthwise 3 x 3 convolution on the grid is added before the activation."""

    def __init__(self, dim: int, hidden: int, drop: float, **factory: Any) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden, **factory)
        self.dwconv = nn.Conv2d(hidden, hidden, 3, padding=1, groups=hidden, **factory)
        self.act = nn.GELU()
        self.fc2 = nn.Linear(hidden, dim, **factory)
        self.drop = nn.Dropout(drop)

    def forward(self, x: Tensor, grid: Grid) -> Tensor:
        x = self.fc1(x)
        near = self.dwconv(x.transpose(1, 2).unflatten(2, grid))
        x = self.drop(self.act(x + near.flatten(2).transpose(1, 2)))
        return self.drop(self.fc2(x))


class ClusTR(OverlapPyramid):
    """ClusTR for images of any size.

    Args:
        architecture: depths and widths.
        in_chans, num_classes, global_pool, drop_rate: as in Pyramid. Each stage ends in a norm of its own.
        proj_drop_rate: dropout in the MLPs and after the attention.
        attn_drop_rate: dropout of the attention weights.
        drop_path_rate: of the last block, rising from 0 at the first. The authors trained with 0.1, b3 with 0.3.

    Raises:
        ValueError: global_pool is neither "avg" nor "".
    """

    def __init__(
        self,
        architecture: Architecture,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        *,
        drop_rate: float = 0.0,
        proj_drop_rate: float = 0.0,
        attn_drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        drops: dict[str, float] = {"attn_drop": attn_drop_rate, "proj_drop": proj_drop_rate}
        sizes = architecture

        def parts(i: int) -> tuple[nn.Module, nn.Module]:
            dim, options = sizes.embed_dims[i], {"reduction": sizes.reductions[i], "qkv_bias": True, **drops, **factory}
            attn = ClusteredAttention(dim, sizes.num_heads[i], **options)
            return attn, Mlp(dim, int(dim * sizes.mlp_ratios[i]), proj_drop_rate, **factory)

        stages = normed_stages(in_chans, sizes.embed_dims, sizes.depths, drop_path_rate, parts, **factory)
        super().__init__(stages, architecture.embed_dims, nn.Identity(), in_chans, num_classes, global_pool, drop_rate)
        self.architecture = architecture


# No addresses: the authors publish no weights.
default_cfgs = generate_default_cfgs(
    {name: default_cfg("stages.0.patch_embed.proj") for name in ("clustr_b1", "clustr_b2", "clustr_b3")}
)

# Official names -> ours. Stages are counted from 1 there.
_RENAMED = (
    (r"^patch_embed(\d+)\.", lambda found: f"stages.{int(found[1]) - 1}.patch_embed."),
    (r"^block(\d+)\.(\d+)\.", lambda found: f"stages.{int(found[1]) - 1}.blocks.{found[2]}."),
    (r"^norm(\d+)\.", lambda found: f"stages.{int(found[1]) - 1}.norm."),
    (r"\.mlp\.dwconv\.dwconv\.", lambda _: ".mlp.dwconv."),
    (r"\.attn\.weight_layer\.", lambda _: ".attn.score."),
    (r"\.attn\.kv1\.", lambda _: ".attn.kv_coarse."),
    (r"\.attn\.kv2\.", lambda _: ".attn.kv."),
)


def checkpoint_filter_fn(state_dict: dict[str, Any], model: nn.Module) -> dict[str, Tensor]:
    """Read a checkpoint of the official training script, or a bare state_dict, into our names.

    Args:
        state_dict: the file's content; the weights may stand under "model" or "state_dict", and names may carry the
            "module." of DistributedDataParallel. A state_dict of ours stays as it is.
        model: the model to load into.
    """
    weights = renamed(unwrapped(state_dict, ("model", "state_dict")), _RENAMED)
    # The query's projection and the fine scale's of keys and values are one layer here.
    return joined(weights, (".attn.q.", ".attn.kv."), ".attn.qkv.")


def _create(variant: str, pretrained: bool, options: dict[str, Any]) -> ClusTR:
    return create(ClusTR, variant, pretrained, checkpoint_filter_fn, options)


@register_model
def clustr_b1(pretrained: bool = False, **options: Any) -> ClusTR:
    """ClusTR-Tiny, 11,682,417 parameters."""
    return _create("clustr_b1", pretrained, {"architecture": Architecture((1, 2, 6, 1)), **options})


@register_model
def clustr_b2(pretrained: bool = False, **options: Any) -> ClusTR:
    """ClusTR-Small, 22,690,941 parameters."""
    return _create("clustr_b2", pretrained, {"architecture": Architecture((3, 5, 13, 2)), **options})


@register_model
def clustr_b3(pretrained: bool = False, **options: Any) -> ClusTR:
    """ClusTR-Base, 40,246,210 parameters."""
    wider = Architecture((3, 5, 18, 3), embed_dims=(64, 128, 320, 512), num_heads=(1, 2, 5, 8))
    return _create("clustr_b3", pretrained, {"architecture": wider, **options})
