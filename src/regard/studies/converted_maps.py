"""What conversion does to single photographs: whom a patch looks at, and which patches' features change."""

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from regard.conversion import AttentionCall, Features, head_fidelity, patch_cosines, record_attention
from regard.mixers import Dense
from regard.results import AttentionMap, ConvertedPhoto
from regard.specs import Mechanism
from regard.studies.maps import choose_query, thumbnail
from regard.studies.pretrained import pixels_of

__all__ = ["DENSE", "Setting", "attention_of_query", "layer_fidelity", "photo_of", "square_grid"]

DENSE = "dense"
Setting = Mapping[str, Mechanism]  # what each converted module has, by its name
_PIXELS = 144


def square_grid(tokens: int, num_prefix_tokens: int) -> tuple[int, int] | None:
    """Rows and columns of the patches of a square image; None if they make no square."""
    side = math.isqrt(max(0, tokens - num_prefix_tokens))
    return (side, side) if side and side * side == tokens - num_prefix_tokens else None


def attention_of_query(
    mechanism: Mechanism, call: AttentionCall, query: int, *, num_prefix_tokens: int, grid_size: tuple[int, int]
) -> Tensor:
    """With which weights a mechanism mixes the values for one query, mean over the heads.

    A mechanism's output is linear in the values, so its derivative by them is the weights, whatever the mechanism does
    to find them.

    Args:
        call: what one layer saw, of one picture.
        query: index among all tokens.

    Returns:
        (M,), over all keys.
    """
    value = torch.zeros_like(call.value).requires_grad_()
    with torch.enable_grad():
        output = mechanism.attend(
            call.query, call.key, value, grid_size=grid_size, num_prefix_tokens=num_prefix_tokens, **call.options
        )
        (weights,) = torch.autograd.grad(output[..., query, 0].sum(), value)
    return weights[..., 0].sum(dim=(0, 1)) / call.query.shape[1]


def photo_of(
    model: nn.Module,
    picture: Tensor,
    name: str,
    settings: Mapping[str, Setting],
    dense: Features,
    features: Mapping[str, Features],
) -> ConvertedPhoto:
    """Maps of the last layer for the patch with the most contrast, and the loss of every patch.

    There are no maps where the patches make no square, or the last attention is not over all of them.

    Args:
        model: the dense model.
        picture: (1, channels, side, side).
        settings: by the names under which the converted models are shown.
        dense, features: of this picture.

    Raises:
        ValueError: the model's attention cannot be recorded.
    """
    pixels, prefix = pixels_of(model, picture), dense.num_prefix_tokens
    photo = ConvertedPhoto(name, thumbnail(pixels, _PIXELS).permute(1, 2, 0).tolist())
    grid = square_grid(dense.tokens.shape[1], prefix)
    if grid is None:
        return photo
    for shown, found in features.items():
        cosines = patch_cosines(dense.tokens, found.tokens, num_prefix_tokens=prefix, centred=True)[0]
        photo.losses[shown] = _rows(1 - cosines, grid)
    call = record_attention(model, picture)[-1]
    if call.key.shape[-2] != dense.tokens.shape[1] or call.query.shape[-2] != call.key.shape[-2]:
        return photo
    row, column = choose_query(pixels, grid)
    mechanisms: dict[str, Mechanism] = {DENSE: Dense()}
    mechanisms |= {shown: setting.get(call.layer, Dense()) for shown, setting in settings.items()}
    for shown, mechanism in mechanisms.items():
        weights = attention_of_query(
            mechanism, call, prefix + row * grid[1] + column, num_prefix_tokens=prefix, grid_size=grid
        )
        photo.maps.append(
            AttentionMap(
                mechanism=shown,
                seed=0,
                image_index=0,
                label=name,
                prediction=name,
                layer=-1,
                query=(row, column),
                weights=_rows(weights[prefix:], grid),
                pixels=[],  # the photograph's own
            )
        )
    return photo


def layer_fidelity(
    model: nn.Module, picture: Tensor, settings: Mapping[str, Setting], num_prefix_tokens: int
) -> dict[str, dict[str, float]]:
    """Centred cosine of each converted layer's attention alone on what dense attention saw, mean over heads.

    Raises:
        ValueError: the model's attention cannot be recorded.
    """
    found: dict[str, dict[str, float]] = {shown: {} for shown in settings}
    for call in record_attention(model, picture):
        grid = square_grid(call.query.shape[-2], num_prefix_tokens)
        prefix = num_prefix_tokens if grid is not None else 0
        for shown, setting in settings.items():
            if call.layer in setting:
                heads = head_fidelity(setting[call.layer], call, num_prefix_tokens=prefix, grid_size=grid)
                cosines = [head.centred_cosine for picture_heads in heads for head in picture_heads]
                found[shown][call.layer] = sum(cosines) / len(cosines)
    return found


def _rows(values: Tensor, grid: tuple[int, int]) -> list[list[float]]:
    return [[round(value, 6) for value in line] for line in values.reshape(grid).tolist()]
