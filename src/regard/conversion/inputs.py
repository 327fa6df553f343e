"""What a model is run with when nobody says."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["Inputs", "given_inputs", "known_inputs"]

_BATCH = 2  # two images, so that a mix-up of images with windows shows


@dataclass(frozen=True)
class Inputs:
    """Arguments of a model's forward, and what they are in words."""

    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = field(default_factory=dict)
    text: str = ""


def given_inputs(example_inputs: Any) -> Inputs:
    """The user's own: a tensor, a tuple or list of positional arguments, or a mapping of keyword arguments.

    Raises:
        TypeError: none of these.
    """
    if isinstance(example_inputs, Tensor):
        return Inputs((example_inputs,), {}, f"example_inputs {_shape(example_inputs)}")
    if isinstance(example_inputs, Mapping):
        text = ", ".join(f"{name} {_shape(value)}" for name, value in example_inputs.items())
        return Inputs((), dict(example_inputs), f"example_inputs {text}")
    if isinstance(example_inputs, tuple | list):
        return Inputs(tuple(example_inputs), {}, f"example_inputs {', '.join(map(_shape, example_inputs))}")
    raise TypeError(
        "example_inputs: expected a tensor, a tuple of positional or a dict of keyword arguments, "
        f"got {type(example_inputs).__name__}"
    )


def known_inputs(model: nn.Module) -> Iterator[Inputs]:
    """Random images of the sizes that a model names, the likeliest first; none if it names no size."""
    parameter = next((p for p in model.parameters() if p.is_floating_point()), None)
    # A model built for other channels keeps the configuration of the one that was trained: ask its first layer, too.
    first = next((m.in_channels for m in model.modules() if isinstance(m, nn.Conv2d)), None)
    shapes: dict[tuple[int, ...], str] = {}
    for source, (channels, height, width) in _sizes(model):
        for number in (first or channels, channels):
            shapes.setdefault((_BATCH, number, height, width), source)
    for shape, source in shapes.items():
        images = torch.randn(shape, generator=torch.Generator().manual_seed(0))
        if parameter is not None:
            images = images.to(parameter.device, parameter.dtype)
        text = f"random images {_shape(images)}, the size from {source}"
        config = getattr(model, "config", None)
        if config is not None and hasattr(config, "text_config") and hasattr(config, "vision_config"):
            words = torch.ones((_BATCH, 8), dtype=torch.long, device=images.device)
            yield Inputs((), {"input_ids": words, "pixel_values": images}, text)
        else:
            yield Inputs((images,), {}, text)


def _sizes(model: nn.Module) -> Iterator[tuple[str, tuple[int, int, int]]]:
    """(where it stands, (channels, height, width)): first what the model was built for, then what it was trained at."""
    for path in ("patch_embed.img_size", "img_size", "image_size", "pixel_embed.img_size", "visual.image_size"):
        if (pair := _pair(_follow(model, path))) is not None:
            yield f"model.{path}", (3, *pair)
    config = getattr(model, "config", None)
    for path in ("image_size", "vision_config.image_size"):
        if (pair := _pair(_follow(config, path))) is not None:
            yield f"model.config.{path}", (_follow(config, path.replace("image_size", "num_channels")) or 3, *pair)
    for name in ("pretrained_cfg", "default_cfg"):
        found = getattr(model, name, None)
        size = found.get("input_size") if isinstance(found, Mapping) else None
        if isinstance(size, tuple | list) and len(size) == 3:
            yield f"model.{name}", (size[0], size[1], size[2])


def _follow(start: Any, path: str) -> Any:
    for name in path.split("."):
        start = getattr(start, name, None)
    return start


def _pair(value: Any) -> tuple[int, int] | None:
    if isinstance(value, int) and not isinstance(value, bool):
        return (value, value)
    if isinstance(value, tuple | list) and len(value) == 2 and all(isinstance(v, int) for v in value):
        return (value[0], value[1])
    return None


def _shape(value: Any) -> str:
    return " x ".join(map(str, value.shape)) if isinstance(value, Tensor) else type(value).__name__
