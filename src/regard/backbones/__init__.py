"""Backbones, one file per published family, registered with timm: `import regard.backbones` makes timm know them."""

from typing import Any

import timm
from timm.models import is_model, register_notrace_module
from torch import nn

from regard.backbones import biformer, clustr, cvt, evit, fan, kvt, so_vit, sparsifiner, t2t_vit, transnext
from regard.mixers import AttentionMixer
from regard.specs import nearest

__all__ = ["FAMILIES", "create_model", "list_models"]

# One file each; importing it registers its models with timm.
FAMILIES = (
    biformer,
    clustr,
    cvt,
    evit,
    fan,
    kvt,
    so_vit,
    sparsifiner,
    t2t_vit,
    transnext,
)

# Symbolic tracing (timm's features_only with feature_cls="fx") takes a mixer as one node: mixers look at shapes.
register_notrace_module(AttentionMixer)

# timm reads the model from elsewhere when its name starts like this, so no list of known names can judge it.
_REMOTE = ("hf-hub:", "hf_hub:", "local-dir:")
_SUGGESTIONS = 5


def create_model(name: str, pretrained: bool = False, **options: Any) -> nn.Module:
    """Create one of regard's backbones, or any of timm's models.

    Args:
        name: a name such as "kvt_deit_tiny", or whatever timm.create_model accepts.
        pretrained: load published weights.
        options: passed to timm.create_model (num_classes, in_chans, img_size, dynamic_img_size, drop_path_rate,
            features_only, ...) and on to the model; the mechanism's own options too (`topk=100`).

    Raises:
        TypeError: `name` is no text.
        ValueError: `name` is unknown; the nearest known names are listed.
        RuntimeError: from timm, if pretrained weights are asked for where none are published.
    """
    if not isinstance(name, str):
        raise TypeError(f"name: expected a model's name, got {type(name).__name__}")
    if not name.startswith(_REMOTE) and not is_model(name):
        likely = ", ".join(nearest(name, timm.list_models())[:_SUGGESTIONS])
        raise ValueError(f"name: unknown model {name!r}; nearest known: {likely}; timm.list_models() lists all")
    return timm.create_model(name, pretrained=pretrained, **options)


def list_models() -> list[str]:
    """The names of regard's own backbones."""
    return sorted({name.partition(".")[0] for family in FAMILIES for name in family.default_cfgs})
