"""routed_attention: the checked entry."""

import torch
from torch import Tensor

from regard.ops._arguments import (
    check_dropout,
    check_scale,
    check_tensors,
    fold,
    lowered_for_autocast,
    visible_keys,
)
from regard.ops._counts import check_count, share_of
from regard.ops._dispatch import Operator, functorch_active
from regard.ops._operator import KernelBackend, PyTorchBackend, TritonBackend
from regard.ops.routed.call import RoutedCall, check_range
from regard.ops.routed.op import routed_attention_gathered, routed_attention_op
from regard.ops.routed.reference import routed_attention_reference

__all__ = ["OPERATOR", "routed_attention"]


def routed_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    blocks: Tensor,
    query_block: int,
    key_block: int,
    extra_key: Tensor | None = None,
    extra_value: Tensor | None = None,
    extra_bias: Tensor | None = None,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """Attention in which each block of queries sees the key blocks on its own list, and what all see.

    Queries are cut into runs of `query_block` consecutive tokens, keys into runs of `key_block`. One softmax runs over
    the keys of the listed blocks and the extra keys. K and V are never copied for the blocks that list them. Bi-level
    routing (BiFormer, arXiv 2303.08810), blocks chosen by proxy heads (arXiv 2509.24745), windows and halos are lists;
    `BlockOrder` brings the tokens of a grid into the order of its blocks. Pooled keys, global tokens and attention
    sinks are extra keys.

    With all key blocks on every list it equals scaled_dot_product_attention.

    Args:
        query: (..., H, N, D).
        key: (..., H_kv, M, D).
        value: (..., H_kv, M, D_v).
        blocks: (..., H or 1, ceil(N / query_block), T) int64 or int32, leading dimensions broadcastable: for each block
            of queries the key blocks that it attends to, in any order; -1 is none. A block listed twice counts twice,
            as it would if it were gathered twice.
        query_block, key_block: tokens in a block; the last block may have fewer.
        extra_key: (..., H_kv, S, D), seen by all queries.
        extra_value: (..., H_kv, S, D_v).
        extra_bias: floating, broadcastable to (..., H, N, S): added to the logits of the extra keys, such as the
            logarithm of how many tokens each stands for.
        attn_mask: boolean (True = attend), broadcastable to (..., H, 1, M): it may hide keys, the same for all queries;
            extra keys are hidden by a bias of -inf.
        dropout_p: dropout of the attention weights (gathers K and V for all lists).
        scale: factor of the logits, 1 / sqrt(D) if None.
        enable_gqa: allow H to be a multiple of H_kv.

    Returns:
        (..., H, N, D_v), in the query's dtype; zeros for queries that see nothing.

    Raises:
        TypeError: an argument of the wrong type or dtype.
        ValueError: shapes that do not fit, a block that is not there, or a mask that differs between queries.
    """
    call, lead = _bind(
        query,
        key,
        value,
        blocks=blocks,
        query_block=query_block,
        key_block=key_block,
        extra_key=extra_key,
        extra_value=extra_value,
        extra_bias=extra_bias,
        attn_mask=attn_mask,
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
    blocks: Tensor,
    query_block: int,
    key_block: int,
    extra_key: Tensor | None = None,
    extra_value: Tensor | None = None,
    extra_bias: Tensor | None = None,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> tuple[RoutedCall, tuple[int, ...]]:
    """The call in canonical form, and the leading dimensions that were folded into the batch."""
    check_count("query_block", query_block)
    check_count("key_block", key_block)
    check_tensors(query, key, value, enable_gqa)
    check_dropout(dropout_p)
    check_scale(scale)
    lists = _canonical_lists(blocks, query, key, query_block, key_block)
    extra_key, extra_value = _check_extra(extra_key, extra_value, extra_bias, key, value)
    bias = None if extra_bias is None else _canonical_bias(extra_bias, query, extra_key)
    visible = None if attn_mask is None else visible_keys(attn_mask, query, key)
    # A block larger than all tokens is all tokens, and needs no padding.
    query_block, key_block = (
        share_of(size, max(1, t.shape[-2])) for size, t in ((query_block, query), (key_block, key))
    )
    lead = tuple(query.shape[:-3])
    tensors = lowered_for_autocast(query, key, value, extra_key, extra_value)
    if len(lead) != 1:
        tensors = tuple(fold(tensor) for tensor in tensors)
    query, key, value, extra_key, extra_value = tensors
    call = RoutedCall(
        query,
        key,
        value,
        visible,
        lists,
        extra_key,
        extra_value,
        bias,
        query_block,
        key_block,
        query.shape[-1] ** -0.5 if scale is None else float(scale),
        float(dropout_p),
    )
    return call, lead


def _canonical_lists(blocks: Tensor, query: Tensor, key: Tensor, query_block: int, key_block: int) -> Tensor:
    """(1 or B, 1 or H, ceil(N / query_block), T) int64."""
    if not isinstance(blocks, Tensor) or blocks.dtype not in (torch.int64, torch.int32):
        found = blocks.dtype if isinstance(blocks, Tensor) else type(blocks).__name__
        raise TypeError(f"blocks: expected an int64 or int32 tensor of key blocks, got {found}")
    if blocks.device != query.device:
        raise ValueError(f"blocks: on {blocks.device}, the query on {query.device}; move one of them")
    rows = -(-query.shape[-2] // query_block)
    full = (*query.shape[:-2], rows)
    missing = len(full) + 1 - blocks.dim()
    lead = (1,) * max(missing, 0) + tuple(blocks.shape[:-1])
    fits = missing >= 0 and blocks.dim() >= 2 and lead[-1] == rows
    if not fits or any(size not in (1, whole) for size, whole in zip(lead[:-1], full[:-1], strict=True)):
        raise ValueError(
            f"blocks: shape {tuple(blocks.shape)} holds no list for each of {rows} query blocks ({query.shape[-2]} "
            f"queries, query_block {query_block}); expected (..., H or 1, {rows}, T), broadcastable to {(*full, 'T')}"
        )
    # Not while tracing, and on other devices it would have to wait; the operators check again.
    traced = torch.compiler.is_compiling() or functorch_active() or type(blocks) is not Tensor
    if not traced and blocks.device.type == "cpu":
        check_range(blocks, key.shape[-2], key_block)
    blocks = blocks.reshape(*lead, blocks.shape[-1])
    outer = lead[:-2]
    if len(outer) != 1:
        whole = (1,) * len(outer) if all(size == 1 for size in outer) else tuple(query.shape[:-3])
        blocks = blocks.expand(*whole, *blocks.shape[-3:]).reshape(-1, *blocks.shape[-3:])
    return blocks.to(torch.int64)


def _check_extra(
    extra_key: Tensor | None, extra_value: Tensor | None, extra_bias: Tensor | None, key: Tensor, value: Tensor
) -> tuple[Tensor, Tensor]:
    """Extra keys and values, with no tokens where there are none."""
    if extra_key is None and extra_value is None:
        if extra_bias is not None:
            raise ValueError(
                "extra_bias: is the bias of extra keys, and there are none; give extra_key and extra_value"
            )
        return tuple(t.new_empty((*t.shape[:-2], 0, t.shape[-1])) for t in (key, value))  # type: ignore[return-value]
    if extra_key is None or extra_value is None:
        absent = "extra_key" if extra_key is None else "extra_value"
        raise ValueError(f"{absent}: is missing; extra keys need extra_key and extra_value")
    for name, tensor, like in (("extra_key", extra_key, key), ("extra_value", extra_value, value)):
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name}: expected a tensor, got {type(tensor).__name__}")
        if tensor.dtype != like.dtype:
            raise TypeError(f"{name}: dtype {tensor.dtype} differs from the query's {like.dtype}; convert one of them")
        if tensor.device != like.device:
            raise ValueError(f"{name}: on {tensor.device}, the query on {like.device}; move one of them")
        expected = (*like.shape[:-2], "S", like.shape[-1])
        if tensor.dim() != like.dim() or (*tensor.shape[:-2], tensor.shape[-1]) != (*like.shape[:-2], like.shape[-1]):
            raise ValueError(f"{name}: shape {tuple(tensor.shape)}; expected {expected}, as the keys are")
    if extra_key.shape[-2] != extra_value.shape[-2]:
        raise ValueError(f"extra_value: {extra_value.shape[-2]} tokens, extra_key has {extra_key.shape[-2]}")
    return extra_key, extra_value


def _canonical_bias(bias: Tensor, query: Tensor, extra_key: Tensor) -> Tensor:
    """(B, H, 1 or N, S), at least float32."""
    if not isinstance(bias, Tensor) or not bias.is_floating_point():
        found = bias.dtype if isinstance(bias, Tensor) else type(bias).__name__
        raise TypeError(f"extra_bias: expected a floating tensor, got {found}; -inf hides an extra key")
    if bias.device != query.device:
        raise ValueError(f"extra_bias: on {bias.device}, the query on {query.device}; move one of them")
    full = (*query.shape[:-1], extra_key.shape[-2])
    missing = len(full) - bias.dim()
    aligned = (1,) * max(missing, 0) + tuple(bias.shape)
    if missing < 0 or any(size not in (1, whole) for size, whole in zip(aligned, full, strict=False)):
        raise ValueError(f"extra_bias: shape {tuple(bias.shape)} does not broadcast to (..., H, N, S) = {full}")
    bias = bias.to(torch.promote_types(query.dtype, torch.float32)).reshape(aligned)
    bias = bias.expand(*full[:-2], bias.shape[-2], full[-1])
    return fold(bias) if bias.dim() != 4 else bias


OPERATOR = Operator(
    "routed_attention",
    lambda *args, **kwargs: _bind(*args, **kwargs)[0],
    (
        KernelBackend(routed_attention_op),
        TritonBackend(routed_attention_op),
        PyTorchBackend(routed_attention_gathered, routed_attention_reference),
    ),
)
