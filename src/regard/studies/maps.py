"""Attention maps for the page: the same query tokens of the same test images, under each mechanism."""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from regard.data import ImageData
from regard.inspection import attention_maps
from regard.mixers import AttentionMixer
from regard.reduction.layer import reduced_blocks
from regard.results import AttentionMap

__all__ = ["choose_images", "choose_query", "maps_of", "thumbnail", "tokens_of"]


def choose_images(labels: Tensor, count: int) -> list[int]:
    """The first image of each of `count` classes that lie evenly among all; the same for every mechanism and model.

    Args:
        labels: (images,) classes.
    """
    classes = labels.unique().tolist()
    count = min(count, len(classes))
    chosen = [classes[i * len(classes) // count] for i in range(count)]
    return [int((labels == one).nonzero()[0]) for one in chosen]


def choose_query(image: Tensor, grid_size: tuple[int, int]) -> tuple[int, int]:
    """Row and column of the token with the most contrast within its pixels: a token that shows something.

    Args:
        image: (channels, height, width).
    """
    pixels = image.float().mean(dim=0)[None, None]
    variance = F.adaptive_avg_pool2d(pixels.square(), grid_size) - F.adaptive_avg_pool2d(pixels, grid_size).square()
    row, column = divmod(int(variance.flatten().argmax()), grid_size[1])
    return row, column


@torch.no_grad()
def tokens_of(model: nn.Module, data: ImageData) -> int:
    """How many tokens attend to each other, at most, when the model sees one test image; 0 if none do."""
    return max(_tokens_by_mixer(model, data.normalise(data.test_images[:1])), default=0)


def _tokens_by_mixer(model: nn.Module, images: Tensor) -> list[int]:
    """How many tokens each attention mixer of the model sees, in the order in which they run."""
    seen: list[int] = []

    def note(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        seen.append(inputs[0].shape[1])

    hooks = [m.register_forward_pre_hook(note) for m in model.modules() if isinstance(m, AttentionMixer)]
    try:
        model.eval()(images)
    finally:
        for hook in hooks:
            hook.remove()
    return seen


def _before_reduction(model: nn.Module, images: Tensor, layer: int) -> int:
    """The layer itself, or the last one before it that sees all tokens, if a reduction has dropped some by then."""
    if not reduced_blocks(model):
        return layer
    tokens = _tokens_by_mixer(model, images)
    index = range(len(tokens))[layer] if -len(tokens) <= layer < len(tokens) else 0
    while index > 0 and tokens[index] < max(tokens):
        index -= 1
        layer = index
    return layer


@torch.no_grad()
def maps_of(
    model: nn.Module, data: ImageData, mechanism: str, seed: int, *, layer: int = -1, count: int = 4
) -> list[AttentionMap]:
    """Whom one token of each of `count` test images looks at in a trained model, mean over the heads.

    Args:
        model: takes what `data.normalise` gives, square grid of tokens after any prefix tokens.
        layer: index among the model's mixers, negative from the end. Where some tokens were dropped before it, the last
            layer before it that sees them all.
    """
    indices = choose_images(data.test_labels, count)
    images = data.test_images[indices]
    inputs = data.normalise(images)
    model.eval()
    layer = _before_reduction(model, inputs[:1], layer)
    weights = attention_maps(model, inputs, layer=layer).mean(dim=1).float()
    predictions = model(inputs).argmax(dim=-1).tolist()
    side = math.isqrt(weights.shape[-1])
    prefix = weights.shape[-1] - side * side
    found = []
    for i, index in enumerate(indices):
        query = choose_query(images[i], (side, side))
        row = weights[i, prefix + query[0] * side + query[1], prefix:]
        found.append(
            AttentionMap(
                mechanism=mechanism,
                seed=seed,
                image_index=index,
                label=data.class_names[int(data.test_labels[index])],
                prediction=data.class_names[predictions[i]],
                layer=layer,
                query=query,
                weights=[[round(value, 6) for value in line] for line in row.reshape(side, side).tolist()],
                pixels=thumbnail(images[i]).permute(1, 2, 0).tolist(),
            )
        )
    return found


def thumbnail(image: Tensor, most: int = 96) -> Tensor:
    """At most so many pixels a side: the page and the JSON hold the image itself.

    Args:
        image: (channels, height, width), uint8.
    """
    scale = most / max(image.shape[-2:])
    if scale >= 1:
        return image
    size = [max(1, round(side * scale)) for side in image.shape[-2:]]
    return F.interpolate(image[None].float(), size=size, mode="area")[0].round().to(torch.uint8)
