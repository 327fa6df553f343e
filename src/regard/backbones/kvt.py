"""k-NN attention (KVT, ECCV 2022, arXiv 2106.00515) in DeiT and in backbones that timm lacks: CvT, T2T-ViT, So-ViT.

k-NN attention adds no parameters: each is its family's model with another mixer, and dense weights load unchanged. Only
the DeiT models are in the official implementation (damo-cv/KVT), whose checkpoints load as they are; for the others the
paper's table names the model and `topk` is half of the keys.
"""

from collections.abc import Sequence
from typing import Any

from timm.models import VisionTransformer, build_model_with_cfg, generate_default_cfgs, register_model
from timm.models.vision_transformer import checkpoint_filter_fn as vit_checkpoint_filter_fn
from torch import Tensor

from regard.backbones import cvt, so_vit, t2t_vit
from regard.backbones._attention import per_stage
from regard.backbones._published import published_cfg, unwrapped
from regard.mixers import KNNAttention

__all__ = ["checkpoint_filter_fn", "default_cfgs"]

# What the official code keeps in every layer, of 197 tokens at 224 pixels.
PUBLISHED_TOPK = 100
# For models whose k is not known: half of the keys.
DEFAULT_TOPK = 0.5


# No addresses: the authors publish no weights.
_DEIT_CFG = published_cfg("patch_embed.proj", fixed_input_size=True)
default_cfgs = generate_default_cfgs(
    {
        "kvt_deit_tiny": _DEIT_CFG,
        "kvt_deit_small": _DEIT_CFG,
        "kvt_cvt_13": cvt.cfg(),
        "kvt_so_vit_7": so_vit.cfg(),
        "kvt_t2t_vit_t_14": t2t_vit.cfg(),
        "kvt_t2t_vit_t_19": t2t_vit.cfg(),
    }
)


def checkpoint_filter_fn(state_dict: dict[str, Any], model: VisionTransformer) -> dict[str, Tensor]:
    """Read a checkpoint of the official training script, or a bare state_dict, into timm's names.

    Args:
        state_dict: the file's content; the weights may stand under "model", and names may carry the "module." of
            DistributedDataParallel.
        model: the model to load into; position embeddings and patch projection are resampled to its size.
    """
    return vit_checkpoint_filter_fn(unwrapped(state_dict, ("model",)), model)


def _create_deit(variant: str, pretrained: bool, topk: int | float, **options: Any) -> VisionTransformer:
    return build_model_with_cfg(
        VisionTransformer,
        variant,
        pretrained,
        pretrained_filter_fn=checkpoint_filter_fn,
        feature_cfg={"out_indices": options.pop("out_indices", 3), "feature_cls": "getter"},
        attn_layer=KNNAttention.bind(topk=topk),
        **options,
    )


@register_model
def kvt_deit_tiny(pretrained: bool = False, *, topk: int | float = PUBLISHED_TOPK, **options: Any) -> VisionTransformer:
    """KVT DeiT-Tiny, 5,717,416 parameters. `topk`: keys each query keeps, an int or a fraction; at most all."""
    architecture: dict[str, Any] = {"patch_size": 16, "embed_dim": 192, "depth": 12, "num_heads": 3}
    return _create_deit("kvt_deit_tiny", pretrained, topk, **{**architecture, **options})


@register_model
def kvt_deit_small(
    pretrained: bool = False, *, topk: int | float = PUBLISHED_TOPK, **options: Any
) -> VisionTransformer:
    """KVT DeiT-Small, 22,050,664 parameters. `topk`: keys each query keeps, an int or a fraction; at most all."""
    architecture: dict[str, Any] = {"patch_size": 16, "embed_dim": 384, "depth": 12, "num_heads": 6}
    return _create_deit("kvt_deit_small", pretrained, topk, **{**architecture, **options})


@register_model
def kvt_cvt_13(
    pretrained: bool = False, *, topk: int | float | Sequence[int | float] = DEFAULT_TOPK, **options: Any
) -> cvt.CvT:
    """KVT CvT-13, 19,997,480 parameters. `topk`: as in DeiT, one for all stages or one for each.

    At 224 pixels the stages have 784, 196 and 50 keys for 3136, 784 and 197 queries.
    """
    architecture = options.setdefault("architecture", cvt.CVT_13)
    kept = per_stage("topk", topk, len(architecture.depths))
    return cvt.create_cvt(
        "kvt_cvt_13", pretrained, {"attn_layer": [KNNAttention.bind(topk=k) for k in kept], **options}
    )


def _create_t2t(variant: str, pretrained: bool, topk: int | float, options: dict[str, Any]) -> t2t_vit.T2TViT:
    return t2t_vit.create_t2t_vit(variant, pretrained, {"attn_layer": KNNAttention.bind(topk=topk), **options})


@register_model
def kvt_t2t_vit_t_14(pretrained: bool = False, *, topk: int | float = DEFAULT_TOPK, **options: Any) -> t2t_vit.T2TViT:
    """KVT T2T-ViT-t-14, 21,541,070 parameters. `topk`: as in DeiT, for the blocks.

    The token transformers before the blocks stay dense; `token_attn_layer` takes a mechanism for them.
    """
    return _create_t2t("kvt_t2t_vit_t_14", pretrained, topk, options)


@register_model
def kvt_t2t_vit_t_19(pretrained: bool = False, *, topk: int | float = DEFAULT_TOPK, **options: Any) -> t2t_vit.T2TViT:
    """KVT T2T-ViT-t-19, 39,172,942 parameters. `topk`: as in DeiT, for the blocks."""
    return _create_t2t("kvt_t2t_vit_t_19", pretrained, topk, options)


@register_model
def kvt_so_vit_7(pretrained: bool = False, *, topk: int | float = DEFAULT_TOPK, **options: Any) -> so_vit.SoViT:
    """KVT So-ViT-7, 5,579,664 parameters. `topk`: keys each query keeps, an int or a fraction; at most all."""
    return so_vit.create_so_vit("kvt_so_vit_7", pretrained, {"attn_layer": KNNAttention.bind(topk=topk), **options})
