"""What is published of a family: timm's description of its weights, and how its checkpoint files are read."""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import Tensor

__all__ = ["joined", "published_cfg", "renamed", "unwrapped"]

# A pattern in official names, and what stands in ours: as `re.sub` takes it.
Renaming = tuple[str, str | Callable[[re.Match[str]], str]]


def published_cfg(first_conv: str | None, **changes: Any) -> dict[str, Any]:
    """timm's description of a plain vision transformer trained on ImageNet-1k at 224 pixels, whose weights have no
    address; pyramids and other families say what differs."""
    return {
        "url": "",
        "num_classes": 1000,
        "input_size": (3, 224, 224),
        "pool_size": None,
        "crop_pct": 0.9,
        "interpolation": "bicubic",
        "fixed_input_size": False,
        "mean": IMAGENET_DEFAULT_MEAN,
        "std": IMAGENET_DEFAULT_STD,
        "first_conv": first_conv,
        "classifier": "head",
        **changes,
    }


def unwrapped(
    checkpoint: Mapping[str, Any], places: Sequence[str] = ("state_dict_ema", "state_dict", "model")
) -> dict[str, Tensor]:
    """The weights of a training script's checkpoint, without DistributedDataParallel's prefix.

    Args:
        checkpoint: the file's content, or bare weights.
        places: where the weights may stand; the first that is there is read. By default averaged ones come first.
    """
    weights: Mapping[str, Any] = next((checkpoint[place] for place in places if place in checkpoint), checkpoint)
    return {name.removeprefix("module."): weight for name, weight in weights.items()}


def renamed(weights: Mapping[str, Tensor], renamings: Iterable[Renaming]) -> dict[str, Tensor]:
    """The weights under the names that all renamings, one after the other, make of theirs."""
    renamings, found = tuple(renamings), {}
    for name, weight in weights.items():
        for pattern, ours in renamings:
            name = re.sub(pattern, ours, name)
        found[name] = weight
    return found


def joined(weights: Mapping[str, Tensor], parts: Sequence[str], whole: str, *, within: str = "") -> dict[str, Tensor]:
    """The weights with the rows of several layers in one.

    Args:
        parts: of the layers' names, in the order of the rows: (".attn.q.", ".attn.kv.").
        whole: what stands in its place: ".attn.qkv.".
        within: only names that begin so.
    """
    found, first = dict(weights), parts[0]
    for name in [name for name in weights if first in name and name.startswith(within)]:
        found[name.replace(first, whole)] = torch.cat([found.pop(name.replace(first, part)) for part in parts])
    return found
