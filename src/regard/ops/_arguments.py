"""What operators called like scaled_dot_product_attention check of their arguments, and the form they give them."""

import contextlib
import functools
import numbers
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor

from regard.ops._dispatch import constant_when_traced

__all__ = [
    "DTYPES",
    "autocast_off",
    "canonical_mask",
    "check_dropout",
    "check_scale",
    "check_tensors",
    "fold",
    "full_precision",
    "heads_last",
    "key_mask",
    "lowered_for_autocast",
    "visible_keys",
]

Function = TypeVar("Function", bound=Callable[..., Any])

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def check_dropout(dropout_p: float) -> None:
    """Raise ValueError unless `dropout_p` is a probability below 1."""
    if not 0.0 <= dropout_p < 1.0:
        raise ValueError(f"dropout_p: expected a probability in [0, 1), got {dropout_p}")


def check_scale(scale: float | None) -> None:
    """Raise TypeError unless `scale` is a number or None."""
    if scale is not None and not isinstance(scale, numbers.Real | torch.SymFloat):
        raise TypeError(f"scale: expected a number or None, got {type(scale).__name__}")


def lowered_for_autocast(*tensors: Tensor) -> tuple[Tensor, ...]:
    """The tensors in autocast's dtype where it is on, as dense attention takes them; float64 stays."""
    device = tensors[0].device.type
    if not (_has_autocast(device) and torch.is_autocast_enabled(device)) or tensors[0].dtype == torch.float64:
        return tensors
    lower = torch.get_autocast_dtype(device)
    return tuple(tensor.to(lower) for tensor in tensors)


def autocast_off(device: str) -> contextlib.AbstractContextManager[Any]:
    """A context without autocast, which would lower the products that half types are raised to float32 for."""
    return torch.autocast(device, enabled=False) if _has_autocast(device) else contextlib.nullcontext()


def full_precision(function: Function) -> Function:
    """Run `function`, whose first argument is a call with a `query`, without autocast."""

    @functools.wraps(function)
    def run(call: Any, *args: Any, **kwargs: Any) -> Any:
        with autocast_off(call.query.device.type):
            return function(call, *args, **kwargs)

    return run  # type: ignore[return-value]


@constant_when_traced  # torch 2.11's Dynamo cannot trace it
def _has_autocast(device: str) -> bool:
    return torch.amp.is_autocast_available(device)


def check_tensors(query: Tensor, key: Tensor, value: Tensor, enable_gqa: bool) -> None:
    """Raise unless query (..., H, N, D), key (..., H_kv, M, D) and value (..., H_kv, M, D_v) fit each other."""
    for name, tensor in (("query", query), ("key", key), ("value", value)):
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name}: expected a tensor, got {type(tensor).__name__}")
        if tensor.dtype not in DTYPES:
            raise TypeError(f"{name}: expected float32, bfloat16, float16 or float64, got {tensor.dtype}")
        if tensor.dim() < 3:
            raise ValueError(f"{name}: expected (..., heads, tokens, head_dim), got shape {tuple(tensor.shape)}")
    shapes = f"query {tuple(query.shape)}, key {tuple(key.shape)}, value {tuple(value.shape)}"
    for name, tensor in (("key", key), ("value", value)):
        if tensor.dtype != query.dtype:
            raise TypeError(f"{name}: dtype {tensor.dtype} differs from the query's {query.dtype}; convert one of them")
        if tensor.device != query.device:
            raise ValueError(f"{name}: on {tensor.device}, the query on {query.device}; move one of them")
        if tensor.shape[:-3] != query.shape[:-3]:
            raise ValueError(f"{name}: leading dimensions differ from the query's: {shapes}; expand them first")
    if query.shape[-1] != key.shape[-1]:
        raise ValueError(f"key: head_dim {key.shape[-1]} differs from the query's {query.shape[-1]}: {shapes}")
    if query.shape[-1] == 0:
        raise ValueError(f"query: head_dim is 0: {shapes}")
    if key.shape[-3:-1] != value.shape[-3:-1]:
        raise ValueError(f"value: heads and tokens must equal the key's: {shapes}")
    heads, key_heads = query.shape[-3], key.shape[-3]
    if heads != key_heads:
        if not enable_gqa:
            raise ValueError(
                f"key: {key_heads} heads, the query has {heads}: {shapes}; grouped heads need enable_gqa=True"
            )
        if key_heads == 0 or heads % key_heads != 0:
            raise ValueError(f"key: the query's {heads} heads are no multiple of the key's {key_heads}: {shapes}")


def canonical_mask(mask: Tensor, query: Tensor, key: Tensor) -> Tensor:
    """(1 or B, 1 or H, 1 or N, 1 or M), boolean or at least float32, with broadcast dimensions left at 1."""
    full = (*query.shape[:-1], key.shape[-2])
    if not isinstance(mask, Tensor) or not (mask.dtype == torch.bool or mask.is_floating_point()):
        found = mask.dtype if isinstance(mask, Tensor) else type(mask).__name__
        raise TypeError(f"attn_mask: expected a boolean (True = attend) or floating tensor, got {found}")
    if mask.device != query.device:
        raise ValueError(f"attn_mask: on {mask.device}, the query on {query.device}; move one of them")
    missing = len(full) - mask.dim()
    aligned = (1,) * max(missing, 0) + tuple(mask.shape)
    if missing < 0 or any(size not in (1, whole) for size, whole in zip(aligned, full, strict=False)):
        raise ValueError(f"attn_mask: shape {tuple(mask.shape)} does not broadcast to (..., H, N, M) = {full}")
    mask = mask.reshape(aligned)
    if mask.is_floating_point():
        mask = mask.to(torch.promote_types(query.dtype, torch.float32))
    lead = aligned[:-3]
    if len(lead) == 1:
        return mask
    if all(size == 1 for size in lead):
        return mask.reshape(1, *aligned[-3:])
    return mask.expand(*full[:-3], *aligned[-3:]).reshape(-1, *aligned[-3:])


def fold(tensor: Tensor) -> Tensor:
    """(..., H, N, D) -> (B, H, N, D); a view wherever the strides allow it."""
    return tensor.unsqueeze(0) if tensor.dim() == 3 else tensor.flatten(0, -4)


def key_mask(
    mask: Tensor,
    shape: tuple[int, ...],
    device: torch.device,
    *,
    by_head: bool = False,
    because: str = "here a key is hidden from all alike",
) -> Tensor:
    """(B, M): which keys a mask leaves to all queries and heads of an image; with `by_head` (B, 1 or H, M), to all
    queries of a head. For mechanisms that cannot hide a key from some queries alone.

    Args:
        mask: boolean (True = attend), broadcastable to `shape`, with 1 in the places of heads and queries, or one row
            expanded along them.
        shape: (..., H, N, M); the leading dimensions are folded to B.
        because: why the mechanism cannot, for the error.

    Raises:
        TypeError: the mask is not boolean.
        ValueError: it is on another device, does not broadcast, or may differ between queries or heads.
    """
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
        found = mask.dtype if isinstance(mask, Tensor) else type(mask).__name__
        raise TypeError(
            f"attn_mask: expected a boolean tensor (True = attend), got {found}; biases are not taken: {because}"
        )
    if mask.device != device:
        raise ValueError(f"attn_mask: on {mask.device}, the query on {device}; move one of them")
    missing = len(shape) - mask.dim()
    aligned = (1,) * max(missing, 0) + tuple(mask.shape)
    if missing < 0 or any(size not in (1, whole) for size, whole in zip(aligned, shape, strict=False)):
        raise ValueError(f"attn_mask: shape {tuple(mask.shape)} does not broadcast to (..., H, 1, M) = {shape}")
    given = tuple(mask.shape)
    mask = mask.expand(aligned)
    fix = "(..., 1, M)" if by_head else "(..., 1, 1, M)"
    for place, what in ((-2, "queries"),) if by_head else ((-2, "queries"), (-3, "heads")):
        if mask.shape[place] != 1 and mask.stride(place) != 0:
            raise ValueError(
                f"attn_mask: shape {given} may differ between {what}, but {because}; give a mask {fix} that hides "
                "keys from all"
            )
        mask = mask.narrow(place, 0, min(mask.shape[place], 1))
    mask = mask.squeeze(-2).expand(*shape[:-3], mask.shape[-3], shape[-1])
    return mask.reshape(-1, *mask.shape[-2:]) if by_head else mask.reshape(-1, shape[-1])


def visible_keys(mask: Tensor, query: Tensor, key: Tensor) -> Tensor:
    """(B, H_kv, M): the keys that a mask leaves to all queries; expanded where it is the same for all heads.

    Raises:
        TypeError, ValueError: as key_mask; ValueError: it differs between query heads that share a key head.
    """
    heads, key_heads = query.shape[-3], key.shape[-3]
    seen = key_mask(mask, (*query.shape[:-1], key.shape[-2]), query.device, by_head=True)
    if seen.shape[1] != 1 and heads != key_heads:
        raise ValueError(
            f"attn_mask: shape {tuple(mask.shape)} differs between query heads that share a key head; "
            "give a mask with 1 in the heads' place"
        )
    return seen.expand(-1, key_heads, -1)


def heads_last(tensor: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Empty (B, H, N, D) laid out as (B, N, H, D): joining the heads afterwards is then a view, as after SDPA."""
    batch, heads, tokens, dim = shape
    return tensor.new_empty((batch, tokens, heads, dim)).transpose(1, 2)
