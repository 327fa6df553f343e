"""DeiT with k-NN attention (KVT, ECCV 2022, arXiv 2106.00515).

timm ships DeiT, and k-NN attention adds no parameters: the model is timm's VisionTransformer with another mixer. The
names are those of the official implementation (damo-cv/KVT), whose checkpoints load as they are.
"""

from typing import Any

from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.models import VisionTransformer, build_model_with_cfg, generate_default_cfgs, register_model
from timm.models.vision_transformer import checkpoint_filter_fn as vit_checkpoint_filter_fn
from torch import Tensor

from regard.mixers import KNNAttention

__all__ = ["checkpoint_filter_fn", "default_cfgs"]

# What the official code keeps in every layer, of 197 tokens at 224 pixels.
PUBLISHED_TOPK = 100


def _cfg(**changes: Any) -> dict[str, Any]:
    return {
        "url": "",  # the authors publish no weights
        "num_classes": 1000,
        "input_size": (3, 224, 224),
        "pool_size": None,
        "crop_pct": 0.9,
        "interpolation": "bicubic",
        "fixed_input_size": True,
        "mean": IMAGENET_DEFAULT_MEAN,
        "std": IMAGENET_DEFAULT_STD,
        "first_conv": "patch_embed.proj",
        "classifier": "head",
        **changes,
    }


default_cfgs = generate_default_cfgs({"kvt_deit_tiny": _cfg(), "kvt_deit_small": _cfg()})


def checkpoint_filter_fn(state_dict: dict[str, Any], model: VisionTransformer) -> dict[str, Tensor]:
    """Read a checkpoint of the official training script, or a bare state_dict, into timm's names.

    Args:
        state_dict: the file's content; the weights may stand under "model", and names may carry the "module." of
            DistributedDataParallel.
        model: the model to load into; position embeddings and patch projection are resampled to its size.
    """
    weights = state_dict.get("model", state_dict)
    weights = {name.removeprefix("module."): weight for name, weight in weights.items()}
    return vit_checkpoint_filter_fn(weights, model)


def _create(variant: str, pretrained: bool, topk: int | float, **options: Any) -> VisionTransformer:
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
    return _create("kvt_deit_tiny", pretrained, topk, **{**architecture, **options})


@register_model
def kvt_deit_small(
    pretrained: bool = False, *, topk: int | float = PUBLISHED_TOPK, **options: Any
) -> VisionTransformer:
    """KVT DeiT-Small, 22,050,664 parameters. `topk`: keys each query keeps, an int or a fraction; at most all."""
    architecture: dict[str, Any] = {"patch_size": 16, "embed_dim": 384, "depth": 12, "num_heads": 6}
    return _create("kvt_deit_small", pretrained, topk, **{**architecture, **options})
