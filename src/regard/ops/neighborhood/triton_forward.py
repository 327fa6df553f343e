"""The forward kernel of neighborhood attention in Triton: online softmax over the keys that a tile of queries sees."""

import triton
import triton.language as tl

from regard.ops.neighborhood.triton_rows import (
    SIZES,
    cleaned,
    head_of,
    key_tile,
    keys_of_tile,
    load_rows,
    logits_of_tile,
    mend_rows,
    poison,
    query_tile,
    report,
    sound_rows,
    store_rows,
    tile_of,
)

__all__ = ["attend_tiles"]


@triton.jit(do_not_specialize=SIZES)
def attend_tiles(
    query,
    key,
    value,
    bias,
    visible,
    tables,
    broken,
    output,
    query_strides,
    key_strides,
    value_strides,
    visible_strides,
    output_strides,
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
    """One tile of queries of one head.

    Args:
        tables: of fill_tables. broken: by program, for report. scale: times log2(e). The sizes: see triton.py.
        CAREFUL: mend what `broken` reports.
    """
    if CAREFUL:  # noqa: SIM102
        if tl.load(broken + tl.program_id(0)) == 0:
            return
    tables = (tables, (length0, length1, length2), (places0, places1, places2))
    shape, kernel = (shape0, shape1, shape2), (kernel0, kernel1, kernel2)
    batch, head, tile, is_prefix = tile_of(heads, prefix_tiles, tiles)
    token, some, windows = query_tile(tables, tile, is_prefix, prefix, shape, kernel, tl.arange(0, ROWS))
    box = keys_of_tile(tables, tile, is_prefix, prefix, tokens, shape)
    q = load_rows(head_of(query, query_strides, batch, head), query_strides, token, some, DIM, DIM_BLOCK)
    key = head_of(key, key_strides, batch, head // groups)
    value = head_of(value, value_strides, batch, head // groups)
    if bias is not None:
        bias += head.to(tl.int64) * offsets

    largest = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    mixed = tl.zeros([ROWS, VALUE_BLOCK], tl.float32)
    spoiled = tl.zeros([ROWS, VALUE_BLOCK], tl.float32)
    for start in range(0, box[1], OTHERS):
        keys = key_tile(box, start, tables, prefix, visible, visible_strides, batch, kernel, OTHERS)
        k = load_rows(key, key_strides, keys[0], keys[1], DIM, DIM_BLOCK)
        logits = logits_of_tile(q, k, scale, bias, windows, keys, RANK, PREFIX)
        top = tl.maximum(largest, tl.max(logits, axis=1))
        shift = tl.where(top == float("-inf"), 0.0, top)
        weights = tl.exp2(logits - shift[:, None])
        fade = tl.exp2(largest - shift)
        total = total * fade + tl.sum(weights, axis=1)
        v = load_rows(value, value_strides, keys[0], keys[1], VALUE_DIM, VALUE_BLOCK)
        if CAREFUL:
            spoiled += poison(logits, v)
            v = cleaned(v)
        mixed = mixed * fade[:, None] + tl.dot(weights.to(v.dtype), v, input_precision="ieee")
        largest = top

    mixed = tl.where(total[:, None] == 0, 0.0, mixed / total[:, None])
    output = head_of(output, output_strides, batch, head)
    if CAREFUL:
        mend_rows(output, output_strides, token, some, mixed + spoiled, VALUE_DIM, VALUE_BLOCK)
    else:
        report(broken, sound_rows(mixed))
        store_rows(output, output_strides, token, some, mixed, VALUE_DIM, VALUE_BLOCK)
