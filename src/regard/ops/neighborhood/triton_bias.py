"""The gradient of neighborhood attention's bias in Triton.

A lane goes through the keys of its own query, all lanes of a tile at the same offset at a time: products of rows, not
of tiles, but nothing is scattered, and what a program adds up it adds in a fixed order.
"""

import triton
import triton.language as tl

from regard.ops.neighborhood.triton_rows import LOG2_E, SIZES, head_of, load_rows, shown_of
from regard.ops.neighborhood.triton_windows import along, in_box, in_grid, inside, place_row, tile_order, token_at

__all__ = ["bias_gradients"]


@triton.jit(do_not_specialize=[*SIZES, "span", "chunks"])
def bias_gradients(
    query,
    key,
    value,
    bias,
    visible,
    grad_output,
    tables,
    lse,
    mean,
    partial,
    query_strides,
    key_strides,
    value_strides,
    visible_strides,
    grad_output_strides,
    scale,
    span,
    chunks,
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
    DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    ROWS: tl.constexpr,
    ENTRIES: tl.constexpr,
    DIM_BLOCK: tl.constexpr,
    VALUE_BLOCK: tl.constexpr,
):
    """What `span` tiles of queries of one head add to ENTRIES entries of its bias: those of `partial` (chunks, B, H,
    offsets). The rest as attend_tiles; lse and mean of query_gradients."""
    tables = (tables, (length0, length1, length2), (places0, places1, places2))
    lengths, shape = tables[1], (shape0, shape1, shape2)
    blocks = tl.cdiv(offsets, ENTRIES)
    program = tl.program_id(0)
    block, rest = program % blocks, program // blocks
    chunk, rest = rest % chunks, rest // chunks
    batch, head = rest // heads, rest % heads
    query = head_of(query, query_strides, batch, head)
    grad_output = head_of(grad_output, grad_output_strides, batch, head)
    key = head_of(key, key_strides, batch, head // groups)
    value = head_of(value, value_strides, batch, head // groups)
    bias += head.to(tl.int64) * offsets
    rows = (batch.to(tl.int64) * heads + head) * tokens
    entries = 2 * kernel1 - 1, 2 * kernel2 - 1
    column = tl.arange(0, ENTRIES)
    sums = tl.zeros([ENTRIES], tl.float32)
    for tile in range(chunk * span, tl.minimum((chunk + 1) * span, tiles)):
        order = tile_order(tile, tl.arange(0, ROWS), shape, lengths)
        some = in_grid(order, lengths)
        token = token_at(along(tables, 0, order, some), prefix, lengths)
        own = along(tables, 1, order, some)
        low, high = along(tables, 2, order, some), along(tables, 3, order, some)
        width = (high[0] - low[0], high[1] - low[1], high[2] - low[2])
        q = load_rows(query, query_strides, token, some, DIM, DIM_BLOCK).to(tl.float32)
        g = load_rows(grad_output, grad_output_strides, token, some, VALUE_DIM, VALUE_BLOCK).to(tl.float32)
        row_lse = tl.load(lse + rows + token, mask=some, other=0.0)
        row_mean = tl.load(mean + rows + token, mask=some, other=0.0)
        for entry in range(block * ENTRIES, tl.minimum((block + 1) * ENTRIES, offsets)):
            step = in_box(entry, (1 - kernel0, 1 - kernel1, 1 - kernel2), (1, entries[0], entries[1]))
            place = (own[0] + step[0], own[1] + step[1], own[2] + step[2])
            seen = some & inside(place, low, width, RANK)
            if tl.max(seen.to(tl.int32), axis=0) > 0:
                z = tl.load(place_row(tables, 0, 0) + place[0], mask=seen, other=-1)
                y = tl.load(place_row(tables, 0, 1) + place[1], mask=seen, other=-1)
                x = tl.load(place_row(tables, 0, 2) + place[2], mask=seen, other=-1)
                there = (z >= 0) & (y >= 0) & (x >= 0)
                at = tl.where(there, token_at((z, y, x), prefix, lengths), 0)
                if visible is not None:
                    shown = shown_of(visible, visible_strides, batch, at, there)
                    seen, there = seen & (shown | (there == 0)), there & shown
                k = load_rows(key, key_strides, at, there, DIM, DIM_BLOCK).to(tl.float32)
                v = load_rows(value, value_strides, at, there, VALUE_DIM, VALUE_BLOCK).to(tl.float32)
                logits = tl.sum(q * k, axis=1) * scale + tl.load(bias + entry) * LOG2_E
                of_logits = tl.exp2(logits - row_lse) * (tl.sum(g * v, axis=1) - row_mean)
                found = tl.sum(tl.where(seen, of_logits, 0.0), axis=0)
                sums += tl.where(column == entry - block * ENTRIES, found, 0.0)
    batches = tl.num_programs(0) // (blocks * chunks * heads)
    at = ((chunk.to(tl.int64) * batches + batch) * heads + head) * offsets + block * ENTRIES
    tl.store(partial + at + column, sums, mask=column < offsets - block * ENTRIES)
