"""The forward kernel of neighborhood attention in Triton: online softmax over the keys that a tile of queries sees."""

import triton
import triton.language as tl

from regard.ops.neighborhood.triton_rows import (
    SIZES,
    finite,
    head_of,
    key_tile,
    keys_of_tile,
    load_rows,
    logits_of_tile,
    poison,
    query_tile,
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
):
    """One tile of queries of one head. `tables` and the sizes after it are of triton_windows, scale times log2(e)."""
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
    for start in range(0, box[1], OTHERS):
        keys = key_tile(box, start, tables, prefix, visible, visible_strides, batch, kernel, OTHERS)
        k = load_rows(key, key_strides, keys[0], keys[1], DIM, DIM_BLOCK)
        logits, _ = logits_of_tile(q, k, scale, bias, windows, keys, RANK, PREFIX)
        top = tl.maximum(largest, tl.max(logits, axis=1))
        shift = tl.where(top == float("-inf"), 0.0, top)
        weights = tl.exp2(logits - shift[:, None])
        fade = tl.exp2(largest - shift)
        total = total * fade + tl.sum(weights, axis=1)
        v = load_rows(value, value_strides, keys[0], keys[1], VALUE_DIM, VALUE_BLOCK)
        mixed = mixed * fade[:, None] + tl.dot(weights.to(v.dtype), v, input_precision="ieee")
        largest = top

    sound = tl.min(finite(mixed).to(tl.int32), axis=1) > 0
    if tl.min(sound.to(tl.int32), axis=0) == 0:
        # Rare: a value that is not finite, perhaps of a key that a row does not see. Again, with care.
        shift = tl.where(largest == float("-inf"), 0.0, largest)
        careful = tl.zeros([ROWS, VALUE_BLOCK], tl.float32)
        for start in range(0, box[1], OTHERS):
            keys = key_tile(box, start, tables, prefix, visible, visible_strides, batch, kernel, OTHERS)
            k = load_rows(key, key_strides, keys[0], keys[1], DIM, DIM_BLOCK)
            logits, seen = logits_of_tile(q, k, scale, bias, windows, keys, RANK, PREFIX)
            weights = tl.where(seen, tl.exp2(logits - shift[:, None]), 0.0)
            v = load_rows(value, value_strides, keys[0], keys[1], VALUE_DIM, VALUE_BLOCK)
            clean = tl.where(finite(v), v, 0.0).to(v.dtype)
            careful += tl.dot(weights.to(v.dtype), clean, input_precision="ieee")
            careful = poison(careful, weights, v)
        mixed = tl.where(sound[:, None], mixed, careful)
    mixed = tl.where(total[:, None] == 0, 0.0, mixed / total[:, None])
    output = head_of(output, output_strides, batch, head)
    store_rows(output, output_strides, token, some, mixed, VALUE_DIM, VALUE_BLOCK)
