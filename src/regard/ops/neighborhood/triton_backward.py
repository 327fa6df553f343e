"""The backward kernels of neighborhood attention in Triton: gradients of query, key and value.

`query_gradients` goes through the keys of a tile of queries twice: for the softmax's log-sum-exp and the mean gradient
of its weights, which other kernels read, and for the queries' gradients. `key_gradients` goes through the queries that
see a tile of keys, so that no sum needs atomics.
"""

import triton
import triton.language as tl

from regard.ops.neighborhood.triton_rows import (
    FAR,
    LOG2_E,
    SIZES,
    cleaned,
    columns_of,
    head_of,
    key_tile,
    keys_of_tile,
    load_rows,
    logits_of,
    logits_of_tile,
    mend_rows,
    own_tile,
    poison,
    query_tile,
    report,
    rows_of,
    shown_of,
    sound_rows,
    store_rows,
    tile_of,
)
from regard.ops.neighborhood.triton_windows import (
    along,
    bias_center,
    bias_part,
    in_box,
    place_row,
    token_at,
)

__all__ = ["key_gradients", "query_gradients"]


@triton.jit(do_not_specialize=SIZES)
def query_gradients(
    query,
    key,
    value,
    bias,
    visible,
    grad_output,
    tables,
    broken,
    lse,
    mean,
    grad_query,
    query_strides,
    key_strides,
    value_strides,
    visible_strides,
    grad_output_strides,
    grad_query_strides,
    scale,
    offsets,
    heads,
    groups,
    tokens,
    prefix,
    prefix_tiles,
    tiles,
    length0,
    length1,
    length2,
    places0,
    places1,
    places2,
    shape0,
    shape1,
    shape2,
    kernel0,
    kernel1,
    kernel2,
    RANK: tl.constexpr,
    PREFIX: tl.constexpr,
    DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    ROWS: tl.constexpr,
    OTHERS: tl.constexpr,
    DIM_BLOCK: tl.constexpr,
    VALUE_BLOCK: tl.constexpr,
    CAREFUL: tl.constexpr,
):
    """One tile of queries of one head: lse and mean (B, H, N), and grad_query. The rest as attend_tiles."""
    if CAREFUL:  # noqa: SIM102
        if tl.load(broken + tl.program_id(0)) == 0:
            return
    tables = (tables, (length0, length1, length2), (places0, places1, places2))
    shape, kernel = (shape0, shape1, shape2), (kernel0, kernel1, kernel2)
    batch, head, tile, is_prefix = tile_of(heads, prefix_tiles, tiles)
    token, some, windows = query_tile(tables, tile, is_prefix, prefix, shape, kernel, tl.arange(0, ROWS))
    box = keys_of_tile(tables, tile, is_prefix, prefix, tokens, shape)
    q = load_rows(head_of(query, query_strides, batch, head), query_strides, token, some, DIM, DIM_BLOCK)
    g = load_rows(
        head_of(grad_output, grad_output_strides, batch, head), grad_output_strides, token, some, VALUE_DIM, VALUE_BLOCK
    )
    key = head_of(key, key_strides, batch, head // groups)
    value = head_of(value, value_strides, batch, head // groups)
    if bias is not None:
        bias += head.to(tl.int64) * offsets

    at = (batch.to(tl.int64) * heads + head) * tokens + token
    if CAREFUL:
        row_lse = tl.load(lse + at, mask=some, other=0.0)
        row_mean = tl.load(mean + at, mask=some, other=0.0)
    else:
        largest = tl.full([ROWS], float("-inf"), tl.float32)
        total = tl.zeros([ROWS], tl.float32)
        inner = tl.zeros([ROWS], tl.float32)
        for start in range(0, box[1], OTHERS):
            keys = key_tile(box, start, tables, prefix, visible, visible_strides, batch, kernel, OTHERS)
            k = load_rows(key, key_strides, keys[0], keys[1], DIM, DIM_BLOCK)
            v = load_rows(value, value_strides, keys[0], keys[1], VALUE_DIM, VALUE_BLOCK)
            logits = logits_of_tile(q, k, scale, bias, windows, keys, RANK, PREFIX)
            top = tl.maximum(largest, tl.max(logits, axis=1))
            shift = tl.where(top == float("-inf"), 0.0, top)
            weights = tl.exp2(logits - shift[:, None])
            fade = tl.exp2(largest - shift)
            of_weights = tl.dot(g, tl.trans(v), input_precision="ieee")
            total = total * fade + tl.sum(weights, axis=1)
            of_rows = tl.where(logits == float("-inf"), 0.0, weights * of_weights)
            inner = inner * fade + tl.sum(of_rows, axis=1)
            largest = top
        # A row that sees nothing has logits of -inf: with any finite lse its weights are zero.
        row_lse = tl.where(total == 0, 0.0, largest + tl.log2(total))
        row_mean = tl.where(total == 0, 0.0, inner / total)
        tl.store(lse + at, row_lse, mask=some)
        tl.store(mean + at, row_mean, mask=some)

    grad = tl.zeros([ROWS, DIM_BLOCK], tl.float32)
    for start in range(0, box[1], OTHERS):
        keys = key_tile(box, start, tables, prefix, visible, visible_strides, batch, kernel, OTHERS)
        k = load_rows(key, key_strides, keys[0], keys[1], DIM, DIM_BLOCK)
        v = load_rows(value, value_strides, keys[0], keys[1], VALUE_DIM, VALUE_BLOCK)
        logits = logits_of_tile(q, k, scale, bias, windows, keys, RANK, PREFIX)
        of_weights = tl.dot(g, tl.trans(v), input_precision="ieee")
        of_logits = tl.exp2(logits - row_lse[:, None]) * (of_weights - row_mean[:, None])
        if CAREFUL:
            of_logits = tl.where(logits == float("-inf"), 0.0, of_logits)
            k = cleaned(k)
        grad += tl.dot(of_logits.to(k.dtype), k, input_precision="ieee")

    grad *= scale / LOG2_E
    grad_query = head_of(grad_query, grad_query_strides, batch, head)
    if CAREFUL:
        mend_rows(grad_query, grad_query_strides, token, some, grad, DIM, DIM_BLOCK)
    else:
        report(broken, sound_rows(grad))
        store_rows(grad_query, grad_query_strides, token, some, grad, DIM, DIM_BLOCK)


@triton.jit
def _seen_by(tables, place, valid):
    """The box of queries that may see any of these places, where `valid`: its corner and its size."""
    z, to_z = _range_along(tables, 0, place[0], valid)
    y, to_y = _range_along(tables, 1, place[1], valid)
    x, to_x = _range_along(tables, 2, place[2], valid)
    return (z, y, x), (tl.maximum(to_z - z, 0), tl.maximum(to_y - y, 0), tl.maximum(to_x - x, 0))


@triton.jit
def _range_along(tables, axis: tl.constexpr, place, valid):
    first = tl.load(place_row(tables, 1, axis) + place, mask=valid, other=1 << 30)
    end = tl.load(place_row(tables, 2, axis) + place, mask=valid, other=0)
    return tl.min(first, axis=0), tl.max(end, axis=0)


@triton.jit
def _query_list(dense, total, corner, size, start, tables, prefix, kernel, BLOCK: tl.constexpr):
    """Queries `start` to `start + BLOCK` of a list: those that see all keys, then a box. Their tokens, which are some,
    which see all keys, and what the others see, as query_tile has it."""
    data, lengths, places = tables
    j = start + tl.arange(0, BLOCK)
    boxed = (j >= dense) & (j < total)
    to_all = j < tl.minimum(dense, total)
    order = in_box(tl.maximum(j - dense, 0), corner, size)
    token = tl.where(boxed, token_at(along(tables, 0, order, boxed), prefix, lengths), j)
    low, high = along(tables, 2, order, boxed), along(tables, 3, order, boxed)
    width = (high[0] - low[0], high[1] - low[1], high[2] - low[2])
    part = bias_part(along(tables, 1, order, boxed), kernel) - bias_center(kernel)
    return token, boxed | to_all, to_all, low, width, part


@triton.jit(do_not_specialize=SIZES)
def key_gradients(
    query,
    key,
    value,
    bias,
    visible,
    grad_output,
    tables,
    broken,
    lse,
    mean,
    grad_key,
    grad_value,
    query_strides,
    key_strides,
    value_strides,
    visible_strides,
    grad_output_strides,
    grad_key_strides,
    grad_value_strides,
    scale,
    offsets,
    heads,
    groups,
    tokens,
    prefix,
    prefix_tiles,
    tiles,
    length0,
    length1,
    length2,
    places0,
    places1,
    places2,
    shape0,
    shape1,
    shape2,
    kernel0,
    kernel1,
    kernel2,
    RANK: tl.constexpr,
    PREFIX: tl.constexpr,
    DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    ROWS: tl.constexpr,
    OTHERS: tl.constexpr,
    DIM_BLOCK: tl.constexpr,
    VALUE_BLOCK: tl.constexpr,
    CAREFUL: tl.constexpr,
):
    """One tile of keys of one key head (`heads` counts those here). A tile of prefix tokens is seen by all tokens."""
    if CAREFUL:  # noqa: SIM102
        if tl.load(broken + tl.program_id(0)) == 0:
            return
    tables = (tables, (length0, length1, length2), (places0, places1, places2))
    shape, kernel = (shape0, shape1, shape2), (kernel0, kernel1, kernel2)
    batch, head, tile, is_prefix = tile_of(heads, prefix_tiles, tiles)
    lane = tl.arange(0, ROWS)
    order, gridded, some, token = own_tile(tables, tile, is_prefix, prefix, shape, lane)
    first, end = along(tables, 4, order, gridded), along(tables, 5, order, gridded)
    there = some
    if visible is not None:
        there = some & shown_of(visible, visible_strides, batch, token, some)
    k = load_rows(head_of(key, key_strides, batch, head), key_strides, token, there, DIM, DIM_BLOCK)
    v = load_rows(head_of(value, value_strides, batch, head), value_strides, token, there, VALUE_DIM, VALUE_BLOCK)
    query = head_of(query, query_strides, batch, head * groups)
    grad_output = head_of(grad_output, grad_output_strides, batch, head * groups)
    if bias is not None:
        bias += head.to(tl.int64) * groups * offsets
    rows = (batch.to(tl.int64) * heads + head) * groups * tokens
    dense = tl.where(is_prefix, tokens, prefix)

    of_keys = tl.zeros([ROWS, DIM_BLOCK], tl.float32)
    of_values = tl.zeros([ROWS, VALUE_BLOCK], tl.float32)
    spoiled = tl.zeros([ROWS, VALUE_BLOCK], tl.float32)
    # A key is at one place, but for copies beyond a border.
    most = (
        tl.maximum(tl.max(end[0] - first[0], axis=0), 1),
        tl.maximum(tl.max(end[1] - first[1], axis=0), 1),
        tl.maximum(tl.max(end[2] - first[2], axis=0), 1),
    )
    for copy in range(0, most[0] * most[1] * most[2]):
        step = in_box(copy, (0, 0, 0), most)
        place = (first[0] + step[0], first[1] + step[1], first[2] + step[2])
        valid = gridded & (place[0] < end[0]) & (place[1] < end[1]) & (place[2] < end[2])
        corner, size = _seen_by(tables, place, valid)
        part = bias_part(place, kernel)
        place = (place[0], place[1], tl.where(valid & there, place[2], FAR))
        once = tl.where(copy == 0, dense, 0)
        total = once + size[0] * size[1] * size[2]
        for group in range(0, groups):
            of_group = tl.cast(group, tl.int64)
            head_query, head_grad = query + of_group * query_strides[1], grad_output + of_group * grad_output_strides[1]
            head_rows = rows + of_group * tokens
            head_bias = bias
            if bias is not None:
                head_bias += of_group * offsets
            for start in range(0, total, OTHERS):
                at, seen_at, to_all, low, width, query_part = _query_list(
                    once, total, corner, size, start, tables, prefix, kernel, OTHERS
                )
                q = load_rows(head_query, query_strides, at, seen_at, DIM, DIM_BLOCK)
                g = load_rows(head_grad, grad_output_strides, at, seen_at, VALUE_DIM, VALUE_BLOCK)
                row_lse = tl.load(lse + head_rows + at, mask=seen_at, other=0.0)
                row_mean = tl.load(mean + head_rows + at, mask=seen_at, other=0.0)
                logits = logits_of(
                    tl.dot(k, tl.trans(q), input_precision="ieee") * scale,
                    head_bias,
                    columns_of(low),
                    columns_of(width),
                    query_part[None, :],
                    rows_of(place),
                    part[:, None],
                    to_all[None, :] & there[:, None],
                    RANK,
                    PREFIX,
                )
                weights = tl.exp2(logits - row_lse[None, :])
                of_weights = tl.dot(v, tl.trans(g), input_precision="ieee")
                of_logits = weights * (of_weights - row_mean[None, :])
                if CAREFUL:
                    weights = tl.where(logits == float("-inf"), 0.0, weights)
                    of_logits = tl.where(logits == float("-inf"), 0.0, of_logits)
                    spoiled += poison(logits, g)
                    q, g = cleaned(q), cleaned(g)
                of_values += tl.dot(weights.to(g.dtype), g, input_precision="ieee")
                of_keys += tl.dot(of_logits.to(q.dtype), q, input_precision="ieee")

    of_keys *= scale / LOG2_E
    grad_key = head_of(grad_key, grad_key_strides, batch, head)
    grad_value = head_of(grad_value, grad_value_strides, batch, head)
    if CAREFUL:
        mend_rows(grad_key, grad_key_strides, token, some, of_keys, DIM, DIM_BLOCK)
        mend_rows(grad_value, grad_value_strides, token, some, of_values + spoiled, VALUE_DIM, VALUE_BLOCK)
    else:
        report(broken, sound_rows(of_keys) & sound_rows(of_values))
        store_rows(grad_key, grad_key_strides, token, some, of_keys, DIM, DIM_BLOCK)
        store_rows(grad_value, grad_value_strides, token, some, of_values, VALUE_DIM, VALUE_BLOCK)
