"""Peers of neighborhood attention: the unfold formulation, compiled FlexAttention, and natten where it is installed.

Each reads `grid_size`, `kernel_size`, `stride`, `dilation` and `is_causal` from a case's options, one number standing
for all axes. Windows are moved at the borders; other border policies have no peer here.
"""

import math
from collections.abc import Callable
from functools import lru_cache
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from regard.benchmark.entry import Case, Peer
from regard.benchmark.workload import FORWARD
from regard.simulation import NeighborhoodPattern, window_bounds

__all__ = ["FLEX_NEIGHBORHOOD", "NATTEN", "UNFOLD", "compiled_flex", "flex_refusal", "unfold_neighborhood_attention"]

_MOST_FLEX_TOKENS = 20_000  # the mask of blocks is made from one of all pairs


def unfold_neighborhood_attention(
    query: Tensor, key: Tensor, value: Tensor, pattern: NeighborhoodPattern, scale: float | None = None
) -> Tensor:
    """Local attention as it is written with unfolded keys: those of every query's window copied side by side.

    Windows overlap, so each key and value is copied as often as a window has keys: N x prod(window) x D numbers.

    Args:
        query, key: (B, H, N, D), N = prod(pattern.grid_size). value: (B, H, N, D_v).

    Returns:
        (B, H, N, D_v).
    """
    index, allowed = _neighbors(pattern)
    index = index.to(query.device)
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    logits = (query.unsqueeze(-2) @ key[:, :, index].mT).squeeze(-2) * scale
    if allowed is not None:
        logits = logits.masked_fill(~allowed.to(query.device), float("-inf"))
    return (logits.softmax(dim=-1).unsqueeze(-2) @ value[:, :, index]).squeeze(-2)


@lru_cache(maxsize=8)
def _neighbors(pattern: NeighborhoodPattern) -> tuple[Tensor, Tensor | None]:
    """(N, W) keys of every query, W = prod(window), and which of them count; None if all do."""
    per_axis = [_axis_neighbors(*axis) for axis in pattern.axes]
    rank = len(per_axis)
    index, allowed = torch.zeros((), dtype=torch.int64), torch.ones((), dtype=torch.bool)
    for axis, (keys, counts) in enumerate(per_axis):
        shape = [1] * (2 * rank)
        shape[axis], shape[rank + axis] = keys.shape
        index = index * pattern.grid_size[axis] + keys.view(shape)
        allowed = allowed & counts.view(shape)
    tokens = math.prod(pattern.grid_size)
    index, allowed = index.reshape(tokens, -1), allowed.expand(index.shape).reshape(tokens, -1)
    return index, None if bool(allowed.all()) else allowed


def _axis_neighbors(length: int, window: int, stride: int, dilation: int, is_causal: bool) -> tuple[Tensor, Tensor]:
    """(length, window) keys along one axis and which of them count."""
    keys = torch.zeros(length, window, dtype=torch.int64)
    counts = torch.zeros(length, window, dtype=torch.bool)
    for token in range(length):
        start, end, group = _axis_window(token, length, window, stride, dilation, is_causal)
        keys[token, : end - start] = torch.arange(start, end) * dilation + group
        counts[token, : end - start] = True
    return keys, counts


def _axis_window(
    token: int, length: int, window: int, stride: int, dilation: int, is_causal: bool
) -> tuple[int, int, int]:
    """(start, end, group): the keys of a token along one axis are group + dilation * i, start <= i < end."""
    index, group = divmod(token, dilation)
    tokens = len(range(group, length, dilation))
    return *window_bounds(index, tokens, window, stride, is_causal), group


def flex_refusal(case: Case, dtype: str, direction: str) -> str:
    """Why compiled FlexAttention cannot run here; empty if it can."""
    if direction != FORWARD and not torch.cuda.is_available():
        return "FlexAttention has no backward on the processor"
    if case.tokens > _MOST_FLEX_TOKENS:
        return "FlexAttention's mask of blocks needs one of all pairs first"
    return ""


def compiled_flex(
    mask: Callable[..., Tensor], tensors: tuple[Tensor, Tensor, Tensor], heads: bool
) -> Callable[..., Tensor]:
    """torch.compile of FlexAttention under a mask that is made into one of blocks here, once.

    Args:
        mask: batch, head, query, key -> whether they attend (indices as tensors).
        tensors: query, key and value of the shapes to come.
        heads: whether the mask depends on batch and head.
    """
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    query, key, _ = tensors
    batch, count = query.shape[:2] if heads else (None, None)
    blocks = create_block_mask(mask, batch, count, query.shape[2], key.shape[2], device=str(query.device))
    # Another size is another graph; after eight of them torch would give up and run FlexAttention uncompiled.
    torch.compiler.reset()
    compiled = torch.compile(flex_attention, dynamic=False)

    def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        output: Tensor = compiled(query, key, value, block_mask=blocks)
        return output

    return attend


def flex_neighborhood_mask(pattern: NeighborhoodPattern, device: torch.device) -> Callable[..., Tensor]:
    """Of a pattern: batch, head, query, key -> whether they attend."""
    axes = []
    for length, window, stride, dilation, causal in pattern.axes:
        found = [_axis_window(token, length, window, stride, dilation, causal) for token in range(length)]
        axes.append((length, dilation, torch.tensor(found, device=device)))

    def mask(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        allowed = query >= 0
        for length, dilation, bounds in reversed(axes):
            row, column = query % length, key % length
            query, key = query // length, key // length
            inside = torch.div(column, dilation, rounding_mode="floor")
            same = column % dilation == bounds[row, 2]
            allowed = allowed & same & (inside >= bounds[row, 0]) & (inside < bounds[row, 1])
        return allowed

    return mask


def _pattern(case: Case) -> NeighborhoodPattern:
    options = case.options
    plain = {name: _hashable(options[name]) for name in ("stride", "dilation", "is_causal") if name in options}
    return NeighborhoodPattern(_hashable(options["grid_size"]), _hashable(options["kernel_size"]), **plain)


def _hashable(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def _moved_borders_only(case: Case) -> str:
    border = case.options.get("border", "shift")
    return "" if border == "shift" else f"no {border!r} borders"


def _make_unfold(case: Case) -> Callable[..., Tensor]:
    pattern = _pattern(case)
    _neighbors(pattern)  # found once, as a layer would
    return lambda query, key, value: unfold_neighborhood_attention(query, key, value, pattern)


def _make_flex(case: Case) -> Callable[..., Tensor]:
    pattern = _pattern(case)
    compiled: list[Callable[..., Tensor]] = []

    def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        if not compiled:
            compiled.append(
                compiled_flex(flex_neighborhood_mask(pattern, query.device), (query, key, value), heads=False)
            )
        return compiled[0](query, key, value)

    return attend


def _make_natten(case: Case) -> Callable[..., Tensor]:
    import natten.functional

    pattern = _pattern(case)
    rank = len(pattern.grid_size)
    function = getattr(natten.functional, f"na{rank}d")
    options = {
        "kernel_size": pattern.kernel_size,
        "stride": pattern.stride,
        "dilation": pattern.dilation,
        "is_causal": pattern.is_causal,
    }

    def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        # natten has heads last. Views would do, but it asks for contiguous tensors: the copies are part of its price.
        given = [one.transpose(1, 2).unflatten(1, pattern.grid_size).contiguous() for one in (query, key, value)]
        return function(*given, **options).flatten(1, rank).transpose(1, 2)

    return attend


def _natten_refusal(case: Case, dtype: str, direction: str) -> str:
    if find_spec("natten") is None:
        return "natten is not installed"
    if not torch.cuda.is_available():
        if direction != FORWARD:
            return "natten has no backward on the processor"
        if case.head_dim & (case.head_dim - 1) or case.head_dim < 8:
            return f"natten on the processor asks for a power of two as head dim, not {case.head_dim}"
    return _moved_borders_only(case)


UNFOLD = Peer("unfold", _make_unfold, lambda case, dtype, direction: _moved_borders_only(case), growth=1.0)
FLEX_NEIGHBORHOOD = Peer(
    "flex",
    _make_flex,
    lambda case, dtype, direction: flex_refusal(case, dtype, direction) or _moved_borders_only(case),
    compiles=True,
    growth=1.0,
)
# Its kernels grow with the tokens, what it runs on the processor with their square.
NATTEN = Peer("natten", _make_natten, _natten_refusal, compiles=True)
