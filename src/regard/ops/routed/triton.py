"""Routed attention in Triton, forward and backward. Not yet measured on a GPU.

A program of the forward has a tile of the queries of one block and streams the keys on the block's list past them, then
the extra keys, under a running softmax. A list is read as one run of places, T key_block of them: blocks of a few keys
fill a tile of keys together. The backward computes the weights again, once by queries, which also finds each row's
log-sum-exp and sum p dp, and once by keys, over the inverse of the lists. There are no atomic sums: two runs agree bit
for bit.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from regard.ops._arguments import heads_last
from regard.ops._triton import Config, first_that_fits, padded
from regard.ops._triton_rows import (
    Rows,
    begin,
    differentiate,
    end,
    head_of,
    load_rows,
    load_state,
    matrix,
    mixed,
    product,
    rows_of,
    store_rows,
    take_in,
)
from regard.ops.routed.call import RoutedCall

__all__ = ["attend", "backward", "configs", "forward", "gradients", "shared_memory"]

_SIZES = [
    "heads", "groups", "queries", "keys", "extra", "listed", "query_block", "key_block", "query_blocks", "tiles",
    "run", "splits",
]  # fmt: skip


@triton.jit
def _place_of_queries(heads, queries, query_block, query_blocks, tiles, ROWS: tl.constexpr):
    """This program's batch, head and block of queries, its tokens, and which of these there are."""
    program = tl.program_id(0)
    tile = program % tiles
    block = program // tiles % query_blocks
    head = program // tiles // query_blocks
    row = tile * ROWS + tl.arange(0, ROWS)
    token = block * query_block + row
    return head // heads, head % heads, block, token, (row < query_block) & (token < queries)


@triton.jit
def _length(lists, batch, head, block, listed, place_stride, key_block):
    """How many places a list has up to the last block that is on it."""
    start = head_of(lists, batch, head) + block.to(tl.int64) * lists.token
    last = tl.zeros([64], tl.int32)
    for first in range(0, listed, 64):
        entry = first + tl.arange(0, 64)
        there = tl.load(start + entry.to(tl.int64) * place_stride, mask=entry < listed, other=-1) >= 0
        last = tl.maximum(last, tl.where(there, entry + 1, 0))
    return tl.max(last, 0) * key_block


@triton.jit
def _look(lists, visible, batch, head, key_head, block, place, length, place_stride, keys, key_block):
    """The keys at these places of a list, and which of them are there and shown."""
    start = head_of(lists, batch, head) + block.to(tl.int64) * lists.token
    entry = place // key_block
    listed = tl.load(start + entry.to(tl.int64) * place_stride, mask=place < length, other=-1)
    key = listed * key_block + place % key_block
    # Lists are checked by the launcher; nothing outside the keys is read even so.
    there = (place < length) & (listed >= 0) & (listed < tl.cdiv(keys, key_block)) & (key < keys)
    if visible is not None:
        shown = head_of(visible, batch, key_head) + key * visible.token
        there = there & (tl.load(shown, mask=there, other=0) != 0)
    return key, there


@triton.jit
def _biased(logits, bias, batch, head, token, rows, extra, there, bias_stride):
    """Logits of the extra keys with their bias."""
    if bias is not None:
        place = token.to(tl.int64)[:, None] * bias.token + extra.to(tl.int64)[None, :] * bias_stride
        logits += tl.load(head_of(bias, batch, head) + place, mask=rows[:, None] & there[None, :], other=0.0)
    return logits


@triton.jit(do_not_specialize=_SIZES)
def _forward(
    query, key, value, visible, lists, extra_key, extra_value, bias, output,
    place_stride, bias_stride, scale,
    heads, groups, queries, keys, extra, listed, query_block, key_block, query_blocks, tiles,
    DIM: tl.constexpr, VALUE_DIM: tl.constexpr, WIDTH: tl.constexpr, VALUE_WIDTH: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    batch, head, block, token, rows = _place_of_queries(heads, queries, query_block, query_blocks, tiles, ROWS)
    key_head = head // groups
    q = load_rows(query, batch, head, token, rows, DIM, WIDTH)
    most, total = begin(ROWS)
    out = tl.zeros([ROWS, VALUE_WIDTH], tl.float32)
    length = _length(lists, batch, head, block, listed, place_stride, key_block)
    for first in range(0, length, COLUMNS):
        index, there = _look(
            lists, visible, batch, head, key_head, block, first + tl.arange(0, COLUMNS), length, place_stride, keys,
            key_block,
        )  # fmt: skip
        logits = product(q, load_rows(key, batch, key_head, index, there, DIM, WIDTH)) * scale
        v = load_rows(value, batch, key_head, index, there, VALUE_DIM, VALUE_WIDTH)
        weight, shrink, most, total = take_in(tl.where(there[None, :], logits, float("-inf")), most, total)
        out = mixed(weight.to(v.dtype), v, out * shrink[:, None])
    for first in range(0, extra, COLUMNS):
        index = first + tl.arange(0, COLUMNS)
        there = index < extra
        logits = product(q, load_rows(extra_key, batch, key_head, index, there, DIM, WIDTH)) * scale
        logits = _biased(logits, bias, batch, head, token, rows, index, there, bias_stride)
        v = load_rows(extra_value, batch, key_head, index, there, VALUE_DIM, VALUE_WIDTH)
        weight, shrink, most, total = take_in(tl.where(there[None, :], logits, float("-inf")), most, total)
        out = mixed(weight.to(v.dtype), v, out * shrink[:, None])
    # A row that sees nothing is all zeros and stays so.
    out = out / tl.where(total == 0.0, 1.0, total)[:, None]
    store_rows(output, batch, head, token, rows, out, VALUE_DIM, VALUE_WIDTH)


@triton.jit(do_not_specialize=_SIZES)
def _backward_queries(
    query, key, value, visible, lists, extra_key, extra_value, bias, grad_output, grad_query, lse, mean, grad_bias,
    place_stride, bias_stride, scale,
    heads, groups, queries, keys, extra, listed, query_block, key_block, query_blocks, tiles,
    DIM: tl.constexpr, VALUE_DIM: tl.constexpr, WIDTH: tl.constexpr, VALUE_WIDTH: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Each row's log-sum-exp and sum p dp; then its gradient, and that of its biases if they are its own."""
    batch, head, block, token, rows = _place_of_queries(heads, queries, query_block, query_blocks, tiles, ROWS)
    key_head = head // groups
    q = load_rows(query, batch, head, token, rows, DIM, WIDTH)
    grad = load_rows(grad_output, batch, head, token, rows, VALUE_DIM, VALUE_WIDTH)
    most, total = begin(ROWS)
    product_sum = tl.zeros([ROWS], tl.float32)
    length = _length(lists, batch, head, block, listed, place_stride, key_block)
    for first in range(0, length, COLUMNS):
        index, there = _look(
            lists, visible, batch, head, key_head, block, first + tl.arange(0, COLUMNS), length, place_stride, keys,
            key_block,
        )  # fmt: skip
        logits = product(q, load_rows(key, batch, key_head, index, there, DIM, WIDTH)) * scale
        grad_weight = product(grad, load_rows(value, batch, key_head, index, there, VALUE_DIM, VALUE_WIDTH))
        weight, shrink, most, total = take_in(tl.where(there[None, :], logits, float("-inf")), most, total)
        product_sum = product_sum * shrink + tl.sum(weight * grad_weight, 1)
    for first in range(0, extra, COLUMNS):
        index = first + tl.arange(0, COLUMNS)
        there = index < extra
        logits = product(q, load_rows(extra_key, batch, key_head, index, there, DIM, WIDTH)) * scale
        logits = _biased(logits, bias, batch, head, token, rows, index, there, bias_stride)
        grad_weight = product(grad, load_rows(extra_value, batch, key_head, index, there, VALUE_DIM, VALUE_WIDTH))
        weight, shrink, most, total = take_in(tl.where(there[None, :], logits, float("-inf")), most, total)
        product_sum = product_sum * shrink + tl.sum(weight * grad_weight, 1)
    row_lse, row_mean = end(most, total, product_sum)
    place = token.to(tl.int64)
    tl.store(head_of(lse, batch, head) + place * lse.token, row_lse, mask=rows)
    tl.store(head_of(mean, batch, head) + place * mean.token, row_mean, mask=rows)

    out = tl.zeros([ROWS, WIDTH], tl.float32)
    for first in range(0, length, COLUMNS):
        index, there = _look(
            lists, visible, batch, head, key_head, block, first + tl.arange(0, COLUMNS), length, place_stride, keys,
            key_block,
        )  # fmt: skip
        k = load_rows(key, batch, key_head, index, there, DIM, WIDTH)
        grad_weight = product(grad, load_rows(value, batch, key_head, index, there, VALUE_DIM, VALUE_WIDTH))
        seen = rows[:, None] & there[None, :]
        _, grad_logits = differentiate(product(q, k) * scale, grad_weight, seen, row_lse, row_mean)
        out = mixed(grad_logits.to(k.dtype), k, out)
    for first in range(0, extra, COLUMNS):
        index = first + tl.arange(0, COLUMNS)
        there = index < extra
        k = load_rows(extra_key, batch, key_head, index, there, DIM, WIDTH)
        logits = _biased(product(q, k) * scale, bias, batch, head, token, rows, index, there, bias_stride)
        grad_weight = product(grad, load_rows(extra_value, batch, key_head, index, there, VALUE_DIM, VALUE_WIDTH))
        seen = rows[:, None] & there[None, :]
        _, grad_logits = differentiate(logits, grad_weight, seen, row_lse, row_mean)
        if grad_bias is not None:
            own = head_of(grad_bias, batch, head) + place[:, None] * grad_bias.token + index[None, :]
            tl.store(own, grad_logits, mask=seen)
        out = mixed(grad_logits.to(k.dtype), k, out)
    store_rows(grad_query, batch, head, token, rows, out * scale, DIM, WIDTH)


@triton.jit(do_not_specialize=_SIZES)
def _backward_keys(
    query, key, value, visible, starts, entries, grad_output, lse, mean, grad_key, grad_value,
    scale,
    heads, groups, queries, keys, query_block, key_block, tiles,
    DIM: tl.constexpr, VALUE_DIM: tl.constexpr, WIDTH: tl.constexpr, VALUE_WIDTH: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """A tile of the keys of one block, past which all queries stream that list the block, one after the other."""
    program = tl.program_id(0)
    column = program % tiles * COLUMNS + tl.arange(0, COLUMNS)
    blocks = tl.cdiv(keys, key_block)
    block = program // tiles % blocks
    key_heads = heads // groups
    batch = program // tiles // blocks // key_heads
    key_head = program // tiles // blocks % key_heads
    index = block * key_block + column
    inside = (column < key_block) & (index < keys)
    there = inside
    if visible is not None:
        shown = head_of(visible, batch, key_head) + index.to(tl.int64) * visible.token
        there = there & (tl.load(shown, mask=there, other=0) != 0)
    k = load_rows(key, batch, key_head, index, there, DIM, WIDTH)
    v = load_rows(value, batch, key_head, index, there, VALUE_DIM, VALUE_WIDTH)
    sum_key = tl.zeros([COLUMNS, WIDTH], tl.float32)
    sum_value = tl.zeros([COLUMNS, VALUE_WIDTH], tl.float32)
    for member in range(0, groups):
        head = key_head * groups + member
        bounds = head_of(starts, batch, head) + block.to(tl.int64) * starts.token
        begins = tl.load(bounds)
        length = ((tl.load(bounds + starts.token) - begins) * query_block).to(tl.int32)
        listing = head_of(entries, batch, head) + begins * entries.token
        for first in range(0, length, ROWS):
            place = first + tl.arange(0, ROWS)
            entry = (place // query_block).to(tl.int64)
            of_block = tl.load(listing + entry * entries.token, mask=place < length, other=0)
            token = of_block * query_block + place % query_block
            rows = (place < length) & (token < queries)
            q = load_rows(query, batch, head, token, rows, DIM, WIDTH)
            grad = load_rows(grad_output, batch, head, token, rows, VALUE_DIM, VALUE_WIDTH)
            row_lse, row_mean = load_state(lse, mean, batch, head, token, rows)
            seen = rows[:, None] & there[None, :]
            weight, grad_logits = differentiate(product(q, k) * scale, product(grad, v), seen, row_lse, row_mean)
            sum_value = mixed(tl.trans(weight.to(q.dtype)), grad, sum_value)
            sum_key = mixed(tl.trans(grad_logits.to(q.dtype)), q, sum_key)
    # What is hidden has no gradient, not even a query's NaN.
    sum_key = tl.where(there[:, None], sum_key * scale, 0.0)
    sum_value = tl.where(there[:, None], sum_value, 0.0)
    store_rows(grad_key, batch, key_head, index, inside, sum_key, DIM, WIDTH)
    store_rows(grad_value, batch, key_head, index, inside, sum_value, VALUE_DIM, VALUE_WIDTH)


@triton.jit(do_not_specialize=_SIZES)
def _backward_extra(
    query, extra_key, extra_value, bias, grad_output, lse, mean, grad_key, grad_value, grad_bias,
    bias_stride, scale,
    heads, groups, queries, extra, run, splits, tiles,
    DIM: tl.constexpr, VALUE_DIM: tl.constexpr, WIDTH: tl.constexpr, VALUE_WIDTH: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """A tile of extra keys past a run of `run` queries, one of `splits`, whose sums are added up afterwards."""
    program = tl.program_id(0)
    index = program % tiles * COLUMNS + tl.arange(0, COLUMNS)
    split = program // tiles % splits
    key_heads = heads // groups
    batch = program // tiles // splits // key_heads
    key_head = program // tiles // splits % key_heads
    there = index < extra
    k = load_rows(extra_key, batch, key_head, index, there, DIM, WIDTH)
    v = load_rows(extra_value, batch, key_head, index, there, VALUE_DIM, VALUE_WIDTH)
    sum_key = tl.zeros([COLUMNS, WIDTH], tl.float32)
    sum_value = tl.zeros([COLUMNS, VALUE_WIDTH], tl.float32)
    part = batch * splits + split
    for member in range(0, groups):
        head = key_head * groups + member
        sum_bias = tl.zeros([COLUMNS], tl.float32)
        for first in range(split * run, tl.minimum((split + 1) * run, queries), ROWS):
            token = first + tl.arange(0, ROWS)
            rows = token < tl.minimum((split + 1) * run, queries)
            q = load_rows(query, batch, head, token, rows, DIM, WIDTH)
            grad = load_rows(grad_output, batch, head, token, rows, VALUE_DIM, VALUE_WIDTH)
            row_lse, row_mean = load_state(lse, mean, batch, head, token, rows)
            logits = _biased(product(q, k) * scale, bias, batch, head, token, rows, index, there, bias_stride)
            seen = rows[:, None] & there[None, :]
            weight, grad_logits = differentiate(logits, product(grad, v), seen, row_lse, row_mean)
            sum_value = mixed(tl.trans(weight.to(q.dtype)), grad, sum_value)
            sum_key = mixed(tl.trans(grad_logits.to(q.dtype)), q, sum_key)
            sum_bias += tl.sum(grad_logits, 0)
        if grad_bias is not None:
            tl.store(head_of(grad_bias, part, head) + index, sum_bias, mask=there)
    store_rows(grad_key, part, key_head, index, there, sum_key * scale, DIM, WIDTH)
    store_rows(grad_value, part, key_head, index, there, sum_value, VALUE_DIM, VALUE_WIDTH)


# ---- launchers -------------------------------------------------------------------------------------------------------


def configs(own: int, width: int, itemsize: int, *, by_keys: bool = False, backward: bool = True) -> list[Config]:
    """Block sizes to launch with, best first; none was measured yet.

    Args:
        own: how many queries or, with `by_keys`, keys there are for a program to hold while the others stream past.
        width: padded head_dim, of values if those are wider. itemsize: bytes of a number.
        backward: where more tiles are held at a time.
    """
    most = 64 if itemsize == 2 and width * (2 if backward else 1) <= 256 else 32 if width * itemsize <= 512 else 16
    held = min(most, padded(own))
    warps = 8 if width >= 128 and held > 16 else 4
    names = ("COLUMNS", "ROWS") if by_keys else ("ROWS", "COLUMNS")
    return [
        Config.of(num_warps=warps, num_stages=stages, **dict(zip(names, (held, streamed), strict=True)))
        for streamed in (64, 32, 16)
        for stages in (2, 1)
        if streamed <= most
    ]


def shared_memory(config: Config, widths: int, itemsize: int, *, by_keys: bool = False) -> int:
    """Bytes that a program may need: the tile it holds, those that stream past it, logits and their gradients, and what
    the compiler adds.

    Args:
        widths: padded head_dim of keys and values, together.
    """
    held, streamed = ("COLUMNS", "ROWS") if by_keys else ("ROWS", "COLUMNS")
    rows = config[held] + config.num_stages * config[streamed]
    return itemsize * widths * rows + 8 * config["ROWS"] * config["COLUMNS"] + 8192


def _options(call: RoutedCall, own: int, *, by_keys: bool = False, backward: bool = True) -> dict[str, int]:
    """Constants of a launch: the dimensions of heads and the sizes of tiles."""
    dim, value_dim = call.query.shape[3], call.value.shape[3]
    width, value_width = padded(dim), padded(value_dim)
    itemsize = call.query.element_size()
    config = first_that_fits(
        configs(own, max(width, value_width), itemsize, by_keys=by_keys, backward=backward),
        lambda config: shared_memory(config, width + value_width, itemsize, by_keys=by_keys),
        call.query.device,
    )
    dims = {"DIM": dim, "VALUE_DIM": value_dim, "WIDTH": width, "VALUE_WIDTH": value_width}
    return {**dims, **config.options()}


def _by_token(tensor: Tensor, *sizes: int) -> Rows:
    """Expanded to these sizes, without a copy."""
    return rows_of(tensor.expand(*sizes, *(-1,) * (tensor.dim() - len(sizes))))


def _operands(call: RoutedCall) -> tuple[Any, ...]:
    """The tensors that the kernels over queries read."""
    heads = call.query.shape[:2]
    return (
        matrix(call.query),
        matrix(call.key),
        matrix(call.value),
        _visible(call),
        _by_token(call.blocks, *heads),
        matrix(call.extra_key),
        matrix(call.extra_value),
        _bias(call),
    )


def _visible(call: RoutedCall) -> Rows | None:
    return None if call.visible is None else rows_of(call.visible.view(torch.uint8))


def _bias(call: RoutedCall) -> Rows | None:
    bias = call.extra_bias
    return None if bias is None else rows_of(bias.expand(-1, -1, call.query.shape[2], -1))


def _sizes(call: RoutedCall, rows: int) -> tuple[tuple[int, ...], tuple[Any, ...]]:
    """The grid of the kernels over queries, and the numbers that they are given."""
    batch, heads, queries, _ = call.query.shape
    query_blocks, listed = call.blocks.shape[2:]
    tiles = triton.cdiv(call.query_block, rows)
    bias_stride = 0 if call.extra_bias is None else call.extra_bias.stride(3)
    numbers = (
        call.blocks.stride(3), bias_stride, float(call.scale),
        heads, call.groups, queries, call.key.shape[2], call.extra_key.shape[2], listed, call.query_block,
        call.key_block, query_blocks, tiles,
    )  # fmt: skip
    return (batch * heads * query_blocks * tiles,), numbers


def _check(call: RoutedCall) -> None:
    """Stop, without waiting for the device, at a list of blocks that are not there."""
    there = triton.cdiv(call.key.shape[2], call.key_block)
    inside = (call.blocks >= -1) & (call.blocks < there)
    torch._assert_async(inside.all(), f"blocks: expected 0 to {there - 1}, or -1 for none")


def attend(call: RoutedCall) -> Tensor:
    """(B, H, N, D_v) output of a checked call."""
    output = heads_last(call.query, (*call.query.shape[:3], call.value.shape[3]))
    if output.numel() == 0:
        return output
    _check(call)
    options = _options(call, call.query_block, backward=False)
    grid, numbers = _sizes(call, options["ROWS"])
    _forward[grid](*_operands(call), rows_of(output), *numbers, **options)
    return output


def gradients(call: RoutedCall, grad_output: Tensor, dtype: torch.dtype | None = None) -> tuple[Tensor, ...]:
    """Gradients of query, key, value, extra_key, extra_value and extra_bias (empty if there is none).

    Args:
        dtype: of the gradients of keys and values, extra ones too; the query's if None.
    """
    query, bias = call.query, call.extra_bias
    batch, heads, queries, _ = query.shape
    grad_query = heads_last(query, tuple(query.shape))
    grad_key, grad_value = (
        heads_last(t if dtype is None else t.new_empty(0, dtype=dtype), tuple(t.shape)) for t in (call.key, call.value)
    )
    grad_bias = query.new_empty(0, dtype=torch.float32) if bias is None else bias.new_empty(bias.shape)
    if query.numel() == 0:
        grads = (grad_query, grad_key, grad_value, *(torch.zeros_like(t) for t in (call.extra_key, call.extra_value)))
        return *(grad.zero_() for grad in grads), grad_bias.zero_()
    _check(call)
    lse, mean = (query.new_empty((batch, heads, queries), dtype=torch.float32) for _ in range(2))
    states = (matrix(grad_output), rows_of(lse), rows_of(mean))
    per_query = bias is not None and bias.shape[2] == queries
    options = _options(call, call.query_block)
    grid, numbers = _sizes(call, options["ROWS"])
    _backward_queries[grid](
        *_operands(call), states[0], rows_of(grad_query), *states[1:], rows_of(grad_bias) if per_query else None,
        *numbers, **options,
    )  # fmt: skip
    if grad_key.numel() + grad_value.numel() > 0:
        _launch_keys(call, states, grad_key, grad_value)
    sums = _extra_sums(call, states, None if per_query or bias is None else grad_bias)
    kept = query.dtype if dtype is None else dtype
    grad_extra = [heads_last(query.new_empty(0, dtype=kept), tuple(t.shape)).copy_(t) for t in sums]
    return grad_query, grad_key, grad_value, *grad_extra, grad_bias


States = tuple[Rows, Rows, Rows]  # the output's gradient, and each row's lse and mean


def _listing(call: RoutedCall) -> tuple[Tensor, Tensor]:
    """The inverse of the lists: where each key block's run begins, (..., blocks + 1), among the entries (..., R T): the
    query blocks that list it, in order, twice if they list it twice."""
    query_blocks, listed = call.blocks.shape[2:]
    blocks = triton.cdiv(call.key.shape[2], call.key_block)
    flat = call.blocks.flatten(2)
    ordered, place = flat.masked_fill(flat < 0, blocks).sort(dim=2, stable=True)
    bounds = torch.arange(blocks + 1, device=flat.device).expand(*flat.shape[:2], -1).contiguous()
    return torch.searchsorted(ordered, bounds), place // max(1, listed)


def _launch_keys(call: RoutedCall, states: States, grad_key: Tensor, grad_value: Tensor) -> None:
    """Gradients of keys and values."""
    batch, heads = call.query.shape[:2]
    key_heads, keys = call.key.shape[1:3]
    options = _options(call, call.key_block, by_keys=True)
    tiles = triton.cdiv(call.key_block, options["COLUMNS"])
    starts, entries = (_by_token(t, batch, heads) for t in _listing(call))
    _backward_keys[(batch * key_heads * triton.cdiv(keys, call.key_block) * tiles,)](
        matrix(call.query), matrix(call.key), matrix(call.value), _visible(call), starts, entries, *states,
        rows_of(grad_key), rows_of(grad_value), float(call.scale), heads, call.groups, call.query.shape[2], keys,
        call.query_block, call.key_block, tiles, **options,
    )  # fmt: skip


def _extra_sums(call: RoutedCall, states: States, grad_bias: Tensor | None) -> list[Tensor]:
    """Gradients of extra keys and values in float32; and into `grad_bias`, of biases that are the same for all queries.

    All queries see the few extra keys, so they are split among programs, and the parts added up.
    """
    batch, heads, queries, dim = call.query.shape
    key_heads, extra, value_dim = call.key.shape[1], call.extra_key.shape[2], call.value.shape[3]
    if extra == 0:
        return [call.query.new_zeros((batch, key_heads, 0, size), dtype=torch.float32) for size in (dim, value_dim)]
    options = _options(call, extra, by_keys=True)
    tiles = triton.cdiv(extra, options["COLUMNS"])
    # Enough programs to fill a GPU, none with less than a few tiles of queries.
    splits = max(1, min(triton.cdiv(256, batch * key_heads * tiles), triton.cdiv(queries, 4 * options["ROWS"])))
    run = triton.cdiv(queries, splits)
    sizes = ((key_heads, extra, dim), (key_heads, extra, value_dim), (heads, extra))
    parts = [call.query.new_empty((batch * splits, *size), dtype=torch.float32) for size in sizes]
    _backward_extra[(batch * key_heads * splits * tiles,)](
        matrix(call.query), matrix(call.extra_key), matrix(call.extra_value), _bias(call), *states,
        rows_of(parts[0]), rows_of(parts[1]), None if grad_bias is None else rows_of(parts[2].unsqueeze(2)),
        0 if call.extra_bias is None else call.extra_bias.stride(3), float(call.scale),
        heads, call.groups, queries, extra, run, splits, tiles, **options,
    )  # fmt: skip
    grad_keys, grad_values, biases = (part.unflatten(0, (batch, splits)).sum(dim=1) for part in parts)
    if grad_bias is not None:
        grad_bias.copy_(biases.unsqueeze(2))
    return [grad_keys, grad_values]


def forward(*operands: Any) -> Tensor:
    """What `regard::routed_attention` takes and returns."""
    return attend(RoutedCall(*operands))


def backward(grad_output: Tensor, *operands: Any) -> tuple[Tensor, ...]:
    """What `regard::routed_attention_backward` takes and returns."""
    return gradients(RoutedCall(*operands), grad_output)
