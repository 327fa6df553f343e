"""knn_attention: the checked entry."""

import math
import numbers

import torch
from torch import Tensor

from regard.ops._dispatch import Operator, constant_when_traced
from regard.ops.knn.call import KNNCall
from regard.ops.knn.cpu import CPUBackend
from regard.ops.knn.eager import PyTorchBackend

__all__ = ["OPERATOR", "check_topk", "keys_kept", "knn_attention"]

_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)

# Products such as 0.07 * 100 come out one rounding above the whole number that was meant.
_ROUNDING = 1.0 - 2.0**-51


def check_topk(topk: int | float) -> None:
    """Raise unless `topk` is an int >= 1 (keys) or a float in (0, 1] (fraction of the keys)."""
    if isinstance(topk, bool) or not isinstance(topk, numbers.Real | torch.SymInt | torch.SymFloat):
        raise TypeError(f"topk: expected an int (keys) or a float in (0, 1] (fraction), got {type(topk).__name__}")
    if isinstance(topk, numbers.Integral | torch.SymInt):
        if topk < 1:
            raise ValueError(f"topk: a row keeps at least one key, got {topk}; give an int >= 1 or a float in (0, 1]")
    elif not 0.0 < topk <= 1.0:  # NaN lands here too
        raise ValueError(f"topk: as a fraction it must lie in (0, 1], got {topk}; give an int for a number of keys")


def keys_kept(topk: int | float, keys: int) -> int:
    """How many of `keys` keys a row keeps: an int is clamped, a fraction f gives ceil(f * keys)."""
    if isinstance(topk, numbers.Integral | torch.SymInt):
        return min(topk, keys)  # type: ignore[call-overload, no-any-return]
    return min(math.ceil(topk * keys * _ROUNDING), keys)


def knn_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    topk: int | float,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """Attention in which each query keeps its `topk` largest logits (KVT, arXiv 2106.00515, the "fast version").

    The logits are scaled, then masked or biased, then selected, then softmax runs over the kept ones. Ties go to the
    lowest index, so a row keeps exactly `topk` keys; a row with fewer allowed keys keeps all of them; a row with none
    gives zeros.
    With `topk` at least the number of keys it equals scaled_dot_product_attention.

    Args:
        query: (..., H, N, D).
        key: (..., H_kv, M, D).
        value: (..., H_kv, M, D_v).
        topk: int >= 1: that many keys, at most all. float in (0, 1]: that fraction of all M keys, rounded up.
        attn_mask: boolean (True = attend) or floating (added to the logits), broadcastable to (..., H, N, M).
        dropout_p: dropout of the attention weights (PyTorch path).
        is_causal: query i sees keys 0 ... i only. Combines with attn_mask.
        scale: factor of the logits, 1 / sqrt(D) if None.
        enable_gqa: allow H to be a multiple of H_kv.

    Returns:
        (..., H, N, D_v), in the query's dtype. No queries, heads or batch: an empty tensor. No keys: zeros.

    Raises:
        TypeError: an argument of the wrong type or dtype.
        ValueError: shapes that do not fit, `topk` out of range.
    """
    call, lead = _bind(
        query,
        key,
        value,
        topk=topk,
        attn_mask=attn_mask,
        dropout_p=dropout_p,
        is_causal=is_causal,
        scale=scale,
        enable_gqa=enable_gqa,
    )
    output = OPERATOR.run(call)
    return output.reshape(*lead, *output.shape[1:]) if len(lead) != 1 else output


def _bind(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    topk: int | float,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> tuple[KNNCall, tuple[int, ...]]:
    """Check the arguments and bring them to one form; also the leading dimensions that were folded into the batch."""
    check_topk(topk)
    _check_tensors(query, key, value, enable_gqa)
    if not 0.0 <= dropout_p < 1.0:
        raise ValueError(f"dropout_p: expected a probability in [0, 1), got {dropout_p}")
    if scale is not None and not isinstance(scale, numbers.Real | torch.SymFloat):
        raise TypeError(f"scale: expected a number or None, got {type(scale).__name__}")
    device = query.device.type
    if _has_autocast(device) and torch.is_autocast_enabled(device) and query.dtype != torch.float64:
        lower = torch.get_autocast_dtype(device)
        query, key, value = query.to(lower), key.to(lower), value.to(lower)
    lead = tuple(query.shape[:-3])
    mask = None if attn_mask is None else _canonical_mask(attn_mask, query, key)
    if len(lead) != 1:
        query, key, value = (_fold(tensor) for tensor in (query, key, value))
    if scale is None:
        scale = query.shape[-1] ** -0.5
    kept = keys_kept(topk, key.shape[2])
    return KNNCall(query, key, value, mask, kept, float(dropout_p), bool(is_causal), float(scale)), lead


@constant_when_traced  # torch 2.11's Dynamo cannot trace it
def _has_autocast(device: str) -> bool:
    return torch.amp.is_autocast_available(device)


def _check_tensors(query: Tensor, key: Tensor, value: Tensor, enable_gqa: bool) -> None:
    for name, tensor in (("query", query), ("key", key), ("value", value)):
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name}: expected a tensor, got {type(tensor).__name__}")
        if tensor.dtype not in _DTYPES:
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


def _canonical_mask(mask: Tensor, query: Tensor, key: Tensor) -> Tensor:
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


def _fold(tensor: Tensor) -> Tensor:
    """(..., H, N, D) -> (B, H, N, D); a view wherever the strides allow it."""
    return tensor.unsqueeze(0) if tensor.dim() == 3 else tensor.flatten(0, -4)


OPERATOR = Operator(
    "knn_attention", lambda *args, **kwargs: _bind(*args, **kwargs)[0], (CPUBackend(), PyTorchBackend())
)
