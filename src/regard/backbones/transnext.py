"""TransNeXt, a pyramid whose tokens see a window and the pooled image at once (arXiv 2311.17132), and its mixture of
heads (MoH, arXiv 2410.11842).

Four stages of stride 4, 8, 16 and 32. Checkpoints of the official implementations (DaiShiResearch/TransNeXt and
SkyworkAI/MoH, both Apache-2.0) load through `checkpoint_filter_fn`.
"""

from dataclasses import dataclass, replace
from typing import Any

import torch
from timm.models import generate_default_cfgs, register_model
from torch import Tensor, nn

from regard.backbones._aggregated import AggregatedAttention, CosineAttention
from regard.backbones._overlap import OverlapPyramid, normed_stages
from regard.backbones._published import renamed, unwrapped
from regard.backbones._pyramid import Grid, create, default_cfg

__all__ = ["Architecture", "TransNeXt", "checkpoint_filter_fn", "default_cfgs"]


@dataclass(frozen=True)
class Architecture:
    """Sizes of the stages.

    Args:
        reductions: a stage pools its grid to one so many times smaller, whose cells are keys beside each token's
            window; 1: no pooling and no window, every token sees all.
        shared, routed: heads of a mixture of heads in each stage; None: no router, all heads answer.

    Raises:
        ValueError: a field has not one entry for each stage, or only one of shared and routed is given.
    """

    depths: tuple[int, ...]
    embed_dims: tuple[int, ...]
    num_heads: tuple[int, ...]
    mlp_ratios: tuple[float, ...] = (8, 8, 4, 4)
    reductions: tuple[int, ...] = (8, 4, 2, 1)
    shared: tuple[int, ...] | None = None
    routed: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        if (self.shared is None) != (self.routed is None):
            raise ValueError("routed: shared and routed go together; give both or none")
        for name in ("embed_dims", "num_heads", "mlp_ratios", "reductions", "shared", "routed"):
            given = getattr(self, name)
            if given is not None and len(given) != len(self.depths):
                raise ValueError(f"{name}: expected one for each of {len(self.depths)} stages, got {given}")


class ConvGLU(nn.Module):
    """An MLP whose values are gated by their activated neighbourhood: a depthwise 3 x 3 convolution on the grid.

    Args:
        hidden: width that an MLP without gates would have; two thirds of it make as many parameters.
    """

    def __init__(self, dim: int, hidden: int, drop: float, **factory: Any) -> None:
        super().__init__()
        hidden = 2 * hidden // 3
        self.fc1 = nn.Linear(dim, 2 * hidden, **factory)
        self.dwconv = nn.Conv2d(hidden, hidden, 3, padding=1, groups=hidden, **factory)
        self.act = nn.GELU()
        self.fc2 = nn.Linear(hidden, dim, **factory)
        self.drop = nn.Dropout(drop)

    def forward(self, x: Tensor, grid: Grid) -> Tensor:
        gate, x = self.fc1(x).chunk(2, dim=-1)
        gate = self.dwconv(gate.transpose(1, 2).unflatten(2, grid)).flatten(2).transpose(1, 2)
        return self.drop(self.fc2(self.drop(self.act(gate) * x)))


class TransNeXt(OverlapPyramid):
    """TransNeXt for images of any size.

    Args:
        architecture: depths and widths, and the heads of a mixture of heads.
        in_chans, num_classes, global_pool, drop_rate: as in Pyramid. Each stage ends in a norm of its own.
        pretrain_size: side in pixels of the images in training, to which position biases refer. It stays what it was
            when the model goes on to larger images.
        proj_drop_rate: dropout in the MLPs and after the attention.
        attn_drop_rate: dropout of the attention weights.
        drop_path_rate: of the last block, rising from 0 at the first. The authors trained micro, tiny, small and base
            with 0.15, 0.25, 0.45 and 0.6, with and without a mixture of heads.

    Raises:
        ValueError: global_pool is neither "avg" nor "", or the numbers of heads do not fit.
    """

    def __init__(
        self,
        architecture: Architecture,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        *,
        pretrain_size: int = 224,
        drop_rate: float = 0.0,
        proj_drop_rate: float = 0.0,
        attn_drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        drops = {"attn_drop": attn_drop_rate, "proj_drop": proj_drop_rate}
        sizes = architecture

        def parts(i: int) -> tuple[nn.Module, nn.Module]:
            trained, dim = (pretrain_size // 2 ** (i + 2),) * 2, sizes.embed_dims[i]
            attn = _attention(sizes, i, trained, **drops, **factory)
            return attn, ConvGLU(dim, int(dim * sizes.mlp_ratios[i]), proj_drop_rate, **factory)

        stages = normed_stages(in_chans, sizes.embed_dims, sizes.depths, drop_path_rate, parts, **factory)
        super().__init__(stages, architecture.embed_dims, nn.Identity(), in_chans, num_classes, global_pool, drop_rate)
        self.architecture = architecture

    def no_weight_decay(self) -> set[str]:
        """Temperatures, query embeddings and everything that makes a position bias, as published."""
        kinds = (".temperature", ".query_embedding", ".local_bias", ".position_bias.")
        return {name for name, _ in self.named_parameters() if any(kind in name for kind in kinds)}


def _attention(architecture: Architecture, stage: int, trained_grid: Grid, **options: Any) -> nn.Module:
    dim, num_heads = architecture.embed_dims[stage], architecture.num_heads[stage]
    heads = None
    if architecture.shared is not None and architecture.routed is not None:
        heads = architecture.shared[stage], architecture.routed[stage]
    reduction = architecture.reductions[stage]
    if reduction == 1:
        return CosineAttention(dim, num_heads, trained_grid, heads, **options)
    return AggregatedAttention(dim, num_heads, trained_grid, heads, reduction=reduction, **options)


_SMALL = Architecture((5, 5, 22, 5), embed_dims=(72, 144, 288, 576), num_heads=(3, 6, 12, 24))
_BASE = Architecture((5, 5, 23, 5), embed_dims=(96, 192, 384, 768), num_heads=(4, 8, 16, 32))

# The official weights of MoH are files of a model hub, those of TransNeXt of another: neither is a plain download.
default_cfgs = generate_default_cfgs(
    {
        name: default_cfg("stages.0.patch_embed.proj")
        for name in (
            "transnext_micro",
            "transnext_tiny",
            "transnext_small",
            "transnext_base",
            "moh_transnext_small_80",
            "moh_transnext_small_75",
            "moh_transnext_base_75",
            "moh_transnext_base_50",
        )
    }
)

# Official names -> ours. Stages are counted from 1 there.
_RENAMED = (
    (r"^patch_embed(\d+)\.", lambda found: f"stages.{int(found[1]) - 1}.patch_embed."),
    (r"^block(\d+)\.(\d+)\.", lambda found: f"stages.{int(found[1]) - 1}.blocks.{found[2]}."),
    (r"^norm(\d+)\.", lambda found: f"stages.{int(found[1]) - 1}.norm."),
    (r"\.mlp\.dwconv\.dwconv\.", lambda _: ".mlp.dwconv."),
    (r"\.attn\.sr\.", lambda _: ".attn.pool_proj."),
    (r"\.attn\.norm\.", lambda _: ".attn.pool_norm."),
    (r"\.attn\.cpb_(fc\d)\.", lambda found: f".attn.position_bias.{found[1]}."),
    (r"\.attn\.relative_pos_bias_local$", lambda _: ".attn.local_bias"),
    (r"\.attn\.learnable_tokens$", lambda _: ".attn.local_tokens"),
    (r"\.attn\.learnable_bias$", lambda _: ".attn.local_tokens_bias"),
    (r"\.attn\.wg\.", lambda _: ".attn.router.choose."),
    (r"\.attn\.wg_0\.", lambda _: ".attn.router.weigh."),
    (r"\.attn\.wg_1\.", lambda _: ".attn.router.share."),
)
# Tables for one image size, which some checkpoints carry; here they are computed.
_TABLES = ("relative_pos_index", "relative_coords_table", "seq_length_scale", "padding_mask")


def checkpoint_filter_fn(state_dict: dict[str, Any], model: nn.Module) -> dict[str, Tensor]:
    """Read a checkpoint of the official training scripts, or a bare state_dict, into our names.

    Args:
        state_dict: the file's content; the weights may stand under "model" or "state_dict", and names may carry the
            "module." of DistributedDataParallel. A state_dict of ours stays as it is.
        model: the model to load into.
    """
    weights = unwrapped(state_dict, ("model", "state_dict"))
    return renamed({n: w for n, w in weights.items() if not any(table in n for table in _TABLES)}, _RENAMED)


def _create(variant: str, pretrained: bool, options: dict[str, Any]) -> TransNeXt:
    return create(TransNeXt, variant, pretrained, checkpoint_filter_fn, options)


@register_model
def transnext_micro(pretrained: bool = False, **options: Any) -> TransNeXt:
    """TransNeXt-Micro, 12,809,304 parameters."""
    sizes = Architecture((2, 2, 15, 2), embed_dims=(48, 96, 192, 384), num_heads=(2, 4, 8, 16))
    return _create("transnext_micro", pretrained, {"architecture": sizes, **options})


@register_model
def transnext_tiny(pretrained: bool = False, **options: Any) -> TransNeXt:
    """TransNeXt-Tiny, 28,258,960 parameters."""
    return _create("transnext_tiny", pretrained, {"architecture": replace(_SMALL, depths=(2, 2, 15, 2)), **options})


@register_model
def transnext_small(pretrained: bool = False, **options: Any) -> TransNeXt:
    """TransNeXt-Small, 49,741,564 parameters."""
    return _create("transnext_small", pretrained, {"architecture": _SMALL, **options})


@register_model
def transnext_base(pretrained: bool = False, **options: Any) -> TransNeXt:
    """TransNeXt-Base, 89,721,496 parameters."""
    return _create("transnext_base", pretrained, {"architecture": _BASE, **options})


@register_model
def moh_transnext_small_80(pretrained: bool = False, **options: Any) -> TransNeXt:
    """MoH-TransNeXt-Small with 80 % of the heads, 49,910,548 parameters."""
    sizes = replace(_SMALL, shared=(3, 6, 3, 8), routed=(0, 0, 6, 12))
    return _create("moh_transnext_small_80", pretrained, {"architecture": sizes, **options})


@register_model
def moh_transnext_small_75(pretrained: bool = False, **options: Any) -> TransNeXt:
    """MoH-TransNeXt-Small with 75 % of the heads, 49,910,548 parameters."""
    sizes = replace(_SMALL, shared=(3, 6, 3, 4), routed=(0, 0, 6, 12))
    return _create("moh_transnext_small_75", pretrained, {"architecture": sizes, **options})


@register_model
def moh_transnext_base_75(pretrained: bool = False, **options: Any) -> TransNeXt:
    """MoH-TransNeXt-Base with 75 % of the heads, 90,020,632 parameters."""
    sizes = replace(_BASE, shared=(4, 8, 4, 5), routed=(0, 0, 8, 16))
    return _create("moh_transnext_base_75", pretrained, {"architecture": sizes, **options})


@register_model
def moh_transnext_base_50(pretrained: bool = False, **options: Any) -> TransNeXt:
    """MoH-TransNeXt-Base with 50 % of the heads, 90,023,512 parameters."""
    sizes = replace(_BASE, shared=(2, 2, 2, 4), routed=(2, 4, 6, 8))
    return _create("moh_transnext_base_50", pretrained, {"architecture": sizes, **options})
