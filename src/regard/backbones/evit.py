"""DeiT with token reorganization (EViT, ICLR 2022, arXiv 2202.07800).

timm ships DeiT, and token reorganization adds no parameters: the model is timm's VisionTransformer, reorganized. The
names are those of the official implementation (youweiliang/evit), whose checkpoints load as they are.
"""

from collections.abc import Sequence
from typing import Any

from timm.models import VisionTransformer, build_model_with_cfg, generate_default_cfgs, register_model

from regard.backbones.kvt import checkpoint_filter_fn  # both official codes write DeiT's training script's format
from regard.backbones.kvt import default_cfgs as deit_cfgs
from regard.reduction import reorganize

__all__ = ["ReorganizedVisionTransformer", "checkpoint_filter_fn", "default_cfgs"]

# Between attention and MLP of the fourth, seventh and tenth layer.
PUBLISHED_LAYERS = (3, 6, 9)

# No weights: the authors' lie on a file service that timm cannot read; download one and pass it as a checkpoint.
default_cfgs = generate_default_cfgs(
    dict.fromkeys(("evit_deit_small", "evit_deit_base"), deit_cfgs["kvt_deit_small"].default)
)


class ReorganizedVisionTransformer(VisionTransformer):
    """timm's VisionTransformer that drops patches on its way (EViT, arXiv 2202.07800).

    Args:
        keep_rate, layers, fuse: as in regard.reduction.reorganize.
        The rest is as in timm's VisionTransformer.
    """

    def __init__(
        self,
        *args: Any,
        keep_rate: float | Sequence[float] = 0.7,
        layers: Sequence[int] = PUBLISHED_LAYERS,
        fuse: bool = True,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        reorganize(self, keep_rate, layers, fuse)


def _create(variant: str, pretrained: bool, **options: Any) -> VisionTransformer:
    return build_model_with_cfg(
        ReorganizedVisionTransformer,
        variant,
        pretrained,
        pretrained_filter_fn=checkpoint_filter_fn,
        feature_cfg={"out_indices": options.pop("out_indices", 3), "feature_cls": "getter"},
        **options,
    )


@register_model
def evit_deit_small(pretrained: bool = False, **options: Any) -> VisionTransformer:
    """EViT DeiT-Small, 22,050,664 parameters. `keep_rate`, `layers` and `fuse` as in regard.reorganize.

    The official deit_small_patch16_shrink_base.
    """
    architecture: dict[str, Any] = {"patch_size": 16, "embed_dim": 384, "depth": 12, "num_heads": 6}
    return _create("evit_deit_small", pretrained, **{**architecture, **options})


@register_model
def evit_deit_base(pretrained: bool = False, **options: Any) -> VisionTransformer:
    """EViT DeiT-Base, 86,567,656 parameters. `keep_rate`, `layers` and `fuse` as in regard.reorganize.

    The official deit_base_patch16_shrink_base.
    """
    architecture: dict[str, Any] = {"patch_size": 16, "embed_dim": 768, "depth": 12, "num_heads": 12}
    return _create("evit_deit_base", pretrained, **{**architecture, **options})
