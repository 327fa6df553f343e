"""What backbones do with `attn_layer`: which mixer each block gets."""

from collections.abc import Sequence
from typing import Any

from torch import nn

from regard.mixers import AttentionMixer
from regard.specs import Composed, Mechanism

__all__ = ["AttnLayer", "attn_layers", "modify", "per_stage"]

# A class of mixers, as timm takes it, or a mechanism's value.
AttnLayer = type[AttentionMixer] | Mechanism


def per_stage(name: str, option: Any, stages: int) -> tuple[Any, ...]:
    """One option for each stage: `option` itself if it is a sequence, else repeated.

    Raises:
        ValueError: a sequence of another length.
    """
    if not isinstance(option, Sequence) or isinstance(option, str):
        return (option,) * stages
    if len(option) != stages:
        raise ValueError(f"{name}: expected one for all or one for each of {stages} stages, got {option!r}")
    return tuple(option)


def attn_layers(attn_layer: AttnLayer | Sequence[AttnLayer], stages: int = 1) -> tuple[type[AttentionMixer], ...]:
    """The mixer's class of each stage.

    Args:
        attn_layer: `regard.KNNAttention`, `regard.KNNAttention.bind(topk=0.5)` or `regard.KNN(0.5)`; one for all stages
            or one for each. A value's modifiers (`regard.KNN(0.5) + regard.Gated()`) change the whole model, see
            `modify`, so that it stands for all.

    Raises:
        TypeError: something else.
        ValueError: a sequence of another length, or with modifiers in it.
    """
    found = []
    for one in per_stage("attn_layer", attn_layer, stages):
        if isinstance(one, Composed) and one is not attn_layer:
            raise ValueError(f"attn_layer: '{one}' changes the whole model; give it for all stages, not for one")
        layer = one.attn_layer() if isinstance(one, Mechanism) else one
        if not (isinstance(layer, type) and issubclass(layer, AttentionMixer)):
            raise TypeError(
                "attn_layer: expected a mechanism such as regard.KNN(0.5) or a mixer's class such as "
                f"regard.KNNAttention, got {one!r}"
            )
        found.append(layer)
    return tuple(found)


def modify(model: nn.Module, attn_layer: AttnLayer | Sequence[AttnLayer]) -> None:
    """Do what a mechanism's modifiers ask for, once the model is built with `attn_layers`."""
    if isinstance(attn_layer, Mechanism):
        attn_layer.apply(model)
