"""neighborhood_attention: the checked entry."""

import math
import numbers
from collections.abc import Sequence
from typing import TypeVar

import torch
from torch import Tensor

from regard.ops._arguments import check_dropout, check_scale, check_tensors, fold, key_mask, lowered_for_autocast
from regard.ops._counts import check_count
from regard.ops._dispatch import Operator
from regard.ops._operator import KernelBackend, PyTorchBackend, TritonBackend
from regard.ops.neighborhood.call import NeighborhoodCall
from regard.ops.neighborhood.op import neighborhood_attention_blocks, neighborhood_attention_op
from regard.ops.neighborhood.reference import neighborhood_attention_reference
from regard.ops.neighborhood.windows import BORDERS, Pattern

__all__ = ["OPERATOR", "check_windows", "neighborhood_attention"]

Each = TypeVar("Each", int, bool)
_RANKS = (1, 2, 3)


def check_windows(
    kernel_size: int | Sequence[int],
    dilation: int | Sequence[int],
    stride: int | Sequence[int],
    is_causal: bool | Sequence[bool] = False,
    border: str = "shift",
) -> None:
    """Raise unless these options of neighborhood attention are of the right kind and in range, whatever the grid."""
    options = {"kernel_size": kernel_size, "dilation": dilation, "stride": stride}
    ranks = {}
    for name, option in options.items():
        entries = option if _is_several(option) else (option,)
        for entry in entries:  # type: ignore[union-attr]
            check_count(name, entry)  # type: ignore[arg-type]
        if _is_several(option):
            ranks[name] = len(option)  # type: ignore[arg-type]
    for flag in is_causal if _is_several(is_causal) else (is_causal,):  # type: ignore[union-attr]
        if not isinstance(flag, bool):
            raise TypeError(f"is_causal: expected a bool, or one for each axis, got {is_causal!r}")
    if _is_several(is_causal):
        ranks["is_causal"] = len(is_causal)  # type: ignore[arg-type]
    given = list(ranks.values())
    if any(rank != given[0] or rank not in _RANKS for rank in given):
        found = ", ".join(f"{name} {rank}" for name, rank in ranks.items())
        raise ValueError(f"{next(iter(ranks))}: expected one number, or one for each of 1 to 3 axes, got {found} axes")
    rank = given[0] if given else 1
    for size, step in zip(_each("kernel_size", kernel_size, rank), _each("stride", stride, rank), strict=True):
        if step > size:
            raise ValueError(f"stride: {step} queries share a window of {size} keys; give at most kernel_size")
    if border not in BORDERS:
        raise ValueError(f"border: expected one of {', '.join(map(repr, BORDERS))}, got {border!r}")


def neighborhood_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    grid_size: Sequence[int],
    kernel_size: int | Sequence[int],
    dilation: int | Sequence[int] = 1,
    stride: int | Sequence[int] = 1,
    is_causal: bool | Sequence[bool] = False,
    border: str = "shift",
    attn_bias: Tensor | None = None,
    attn_mask: Tensor | None = None,
    num_prefix_tokens: int = 0,
    dropout_p: float = 0.0,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """Attention in which each query sees a box of keys around its own place in a grid of rank 1, 2 or 3.

    With border="shift" it is neighborhood attention (arXiv 2204.07143), with its dilation (2209.15001), causal axes
    (2403.04690) and stride (2504.16922), by NATTEN's rule: at the border a window moves inward, so that all have
    prod(kernel_size) keys. With dilation d the grid falls into prod(d) interleaved ones, each on its own. `stride`
    consecutive queries share one window. A causal axis has no later key.

    A window larger than the axis (or, with dilation, than what the axis holds of a query's interleaved grid) is cut
    down to it: kernel_size at least the grid is dense attention. NATTEN raises there; but the late stages of a
    pyramid, small images and thin grids need the same module, and the meaning is plain.

    Args:
        query: (..., H, N, D), N = num_prefix_tokens + prod(grid_size).
        key: (..., H_kv, N, D).
        value: (..., H_kv, N, D_v).
        grid_size: the grid of the tokens that are no prefix tokens, the last axis running fastest.
        kernel_size: keys of a window along each axis, or along all. An even one has one more before its query.
        dilation: step between the keys of a window.
        stride: queries that share a window, at most kernel_size. 1: each has its own; kernel_size: blocks.
        is_causal: for each axis, or for all.
        border: what a window holds beyond the border. "shift": nothing, it moves inward. "mask": nothing, it is
            smaller there. "zeropad": keys and values of zeros, which take part in the softmax. "replicate": the key at
            the edge (of the query's interleaved grid) again.
        attn_bias: (H, prod(2 kernel_size - 1)) or (H, 2 kernel_size[0] - 1, ...), floating: a relative position bias,
            added to the logits; its entry along each axis is (key - query) / dilation + kernel_size - 1.
        attn_mask: boolean (True = attend), broadcastable to (..., 1, 1, N): it may hide keys, the same for all queries
            and heads.
        num_prefix_tokens: P: the first P keys are seen by all queries, without bias; the first P queries see all keys.
        dropout_p: dropout of the attention weights (PyTorch path).
        scale: factor of the logits, 1 / sqrt(D) if None.
        enable_gqa: allow H to be a multiple of H_kv.

    Returns:
        (..., H, N, D_v), in the query's dtype; zeros where all keys of a window are hidden.

    Raises:
        TypeError: an argument of the wrong type or dtype.
        ValueError: shapes that do not fit, an option out of range, or a mask that differs between queries or heads.
    """
    call, lead = _bind(
        query,
        key,
        value,
        grid_size=grid_size,
        kernel_size=kernel_size,
        dilation=dilation,
        stride=stride,
        is_causal=is_causal,
        border=border,
        attn_bias=attn_bias,
        attn_mask=attn_mask,
        num_prefix_tokens=num_prefix_tokens,
        dropout_p=dropout_p,
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
    grid_size: Sequence[int],
    kernel_size: int | Sequence[int],
    dilation: int | Sequence[int] = 1,
    stride: int | Sequence[int] = 1,
    is_causal: bool | Sequence[bool] = False,
    border: str = "shift",
    attn_bias: Tensor | None = None,
    attn_mask: Tensor | None = None,
    num_prefix_tokens: int = 0,
    dropout_p: float = 0.0,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> tuple[NeighborhoodCall, tuple[int, ...]]:
    """The call in canonical form; the leading dimensions that were folded into the batch."""
    check_windows(kernel_size, dilation, stride, is_causal, border)
    check_tensors(query, key, value, enable_gqa)
    check_dropout(dropout_p)
    check_scale(scale)
    grid = _check_grid(grid_size, num_prefix_tokens, query, key)
    rank = len(grid)
    pattern = Pattern(
        grid,
        _each("kernel_size", kernel_size, rank),
        _each("dilation", dilation, rank),
        _each("stride", stride, rank),
        _each("is_causal", is_causal, rank),
        border,
    )
    query, key, value = lowered_for_autocast(query, key, value)
    visible = None
    if attn_mask is not None:
        full = (*query.shape[:-1], key.shape[-2])
        visible = key_mask(attn_mask, full, query.device, because="a window's keys are the same for all that see them")
    bias = None if attn_bias is None else _check_bias(attn_bias, query, pattern)
    lead = tuple(query.shape[:-3])
    if len(lead) != 1:
        query, key, value = (fold(tensor) for tensor in (query, key, value))
    scale = query.shape[-1] ** -0.5 if scale is None else float(scale)
    return NeighborhoodCall(query, key, value, bias, visible, pattern, num_prefix_tokens, scale, float(dropout_p)), lead


def _is_several(option: object) -> bool:
    return isinstance(option, Sequence) and not isinstance(option, str)


def _each(name: str, option: Each | Sequence[Each], rank: int) -> tuple[Each, ...]:
    """The option for each axis."""
    if not _is_several(option):
        return (option,) * rank  # type: ignore[return-value]
    found: tuple[Each, ...] = tuple(option)  # type: ignore[arg-type]
    if len(found) != rank:
        raise ValueError(f"{name}: {found} has {len(found)} axes, the grid {rank}; give one number, or {rank}")
    return found


def _check_grid(grid_size: Sequence[int], prefix: int, query: Tensor, key: Tensor) -> tuple[int, ...]:
    if isinstance(prefix, bool) or not isinstance(prefix, numbers.Integral | torch.SymInt):
        raise TypeError(f"num_prefix_tokens: expected an int, got {type(prefix).__name__}")
    tokens = query.shape[-2]
    if key.shape[-2] != tokens:
        raise ValueError(f"key: {key.shape[-2]} tokens, the query has {tokens}; it is among the tokens of one grid")
    if not 0 <= prefix <= tokens:
        raise ValueError(f"num_prefix_tokens: {prefix} of {tokens} tokens")
    if not _is_several(grid_size) or not all(isinstance(n, numbers.Integral | torch.SymInt) for n in grid_size):
        raise TypeError(f"grid_size: expected integers such as (height, width), got {grid_size!r}")
    grid = tuple(grid_size)
    if len(grid) not in _RANKS:
        raise ValueError(f"grid_size: expected rank 1, 2 or 3, got {grid}")
    if any(size < 0 for size in grid) or math.prod(grid) != tokens - prefix:
        raise ValueError(
            f"grid_size: {grid} is no grid of {tokens - prefix} cells; {tokens} tokens, of which {prefix} are "
            "prefix tokens"
        )
    return grid


def _check_bias(bias: Tensor, query: Tensor, pattern: Pattern) -> Tensor:
    """(H, offsets), at least float32."""
    if not isinstance(bias, Tensor) or not bias.is_floating_point():
        found = bias.dtype if isinstance(bias, Tensor) else type(bias).__name__
        raise TypeError(f"attn_bias: expected a floating tensor, got {found}")
    if bias.device != query.device:
        raise ValueError(f"attn_bias: on {bias.device}, the query on {query.device}; move one of them")
    heads, sizes = query.shape[-3], tuple(2 * size - 1 for size in pattern.kernel_size)
    if tuple(bias.shape) not in ((heads, pattern.offsets), (heads, *sizes)):
        raise ValueError(
            f"attn_bias: shape {tuple(bias.shape)}; kernel_size {pattern.kernel_size} and {heads} heads need "
            f"{(heads, *sizes)}, or {(heads, pattern.offsets)}"
        )
    return bias.reshape(heads, pattern.offsets).to(torch.promote_types(query.dtype, torch.float32))


OPERATOR = Operator(
    "neighborhood_attention",
    lambda *args, **kwargs: _bind(*args, **kwargs)[0],
    (
        KernelBackend(neighborhood_attention_op),
        TritonBackend(neighborhood_attention_op),
        PyTorchBackend(neighborhood_attention_blocks, neighborhood_attention_reference),
    ),
)
