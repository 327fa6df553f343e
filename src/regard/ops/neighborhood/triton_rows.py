"""What the Triton kernels of neighborhood attention share: rows in memory, and the logits of queries with keys.

A program has a tile of queries and goes through the keys that any of them sees, in one list: first the keys that all of
them see (the prefix tokens; all tokens for a tile of prefix queries), then the box of places that holds their windows.

A product of tiles multiplies by zero where a query does not see a key, and zero times NaN is not zero. So each kernel
reports whether its result is finite, and where it is not it runs again, CAREFUL: with what is not finite taken out of
the products and added apart, to those who see it. That is rare, so it is a launch of its own, whose programs end at
once where all is well: in one kernel it would cost all calls their registers.
"""

import triton
import triton.language as tl

from regard.ops.neighborhood.triton_windows import (
    along,
    bias_center,
    bias_part,
    in_box,
    in_grid,
    inside,
    keys_box,
    place_row,
    tile_order,
    token_at,
)

__all__ = [
    "FAR",
    "LOG2_E",
    "SIZES",
    "cleaned",
    "columns_of",
    "head_of",
    "key_tile",
    "keys_of_tile",
    "load_rows",
    "logits_of",
    "logits_of_tile",
    "mend_rows",
    "own_tile",
    "poison",
    "query_tile",
    "report",
    "rows_of",
    "shown_of",
    "sound_rows",
    "store_rows",
    "tile_of",
]

LOG2_E = tl.constexpr(1.4426950408889634)
FAR = tl.constexpr(-(1 << 30))  # a place that is in no window

# Numbers that differ from call to call: no kernel is compiled again for them.
SIZES = [
    *("offsets", "heads", "groups", "tokens", "prefix", "prefix_tiles", "tiles"),
    *(f"{name}{axis}" for name in ("length", "places", "shape", "kernel") for axis in "012"),
]


@triton.jit
def head_of(tensor, strides, batch, head):
    return tensor + batch.to(tl.int64) * strides[0] + head.to(tl.int64) * strides[1]


@triton.jit
def load_rows(base, strides, token, some, DIM: tl.constexpr, BLOCK: tl.constexpr):
    """(tokens, BLOCK): rows of a head, zeros where `some` is false."""
    channel = tl.arange(0, BLOCK)
    at = base + token.to(tl.int64)[:, None] * strides[2] + channel.to(tl.int64)[None, :] * strides[3]
    mask = some[:, None] if BLOCK == DIM else some[:, None] & (channel < DIM)[None, :]
    return tl.load(at, mask=mask, other=0.0)


@triton.jit
def store_rows(base, strides, token, some, rows, DIM: tl.constexpr, BLOCK: tl.constexpr):
    channel = tl.arange(0, BLOCK)
    at = base + token.to(tl.int64)[:, None] * strides[2] + channel.to(tl.int64)[None, :] * strides[3]
    tl.store(at, rows.to(base.dtype.element_ty), mask=some[:, None] & (channel < DIM)[None, :])


@triton.jit
def finite(rows):
    return tl.abs(rows.to(tl.float32)) < float("inf")


@triton.jit
def sound_rows(rows):
    """Which rows are finite throughout."""
    return tl.min(finite(rows).to(tl.int32), axis=1) > 0


@triton.jit
def report(broken, sound):
    """Notes whether any row of this program's result is not sound."""
    tl.store(broken + tl.program_id(0), 1 - tl.min(sound.to(tl.int32), axis=0))


@triton.jit
def mend_rows(base, strides, token, some, rows, DIM: tl.constexpr, BLOCK: tl.constexpr):
    """store_rows, of those rows in memory alone that hold something that is not finite."""
    sound = sound_rows(load_rows(base, strides, token, some, DIM, BLOCK))
    store_rows(base, strides, token, some & (sound == 0), rows, DIM, BLOCK)


@triton.jit
def cleaned(rows):
    return tl.where(finite(rows), rows, 0.0).to(rows.dtype)


@triton.jit
def poison(logits, rows):
    """(M, D): what infinite and NaN elements of `rows` (R, D) add to sums over the pairs whose logits (M, R) count:
    +inf, -inf, or NaN, as their sum is."""
    seen = (logits != float("-inf")).to(rows.dtype)
    bad = finite(rows) == 0
    up = tl.dot(seen, (bad & ((rows < 0) == 0)).to(rows.dtype), input_precision="ieee")
    down = tl.dot(seen, (bad & ((rows > 0) == 0)).to(rows.dtype), input_precision="ieee")
    return tl.where(up > 0, float("inf"), 0.0) + tl.where(down > 0, float("-inf"), 0.0)


@triton.jit
def tile_of(heads, prefix_tiles, tiles):
    """What this program does: image, head, tile, and whether the tile is of prefix tokens. Those have most to do and
    come first."""
    program = tl.program_id(0)
    total = tl.num_programs(0)
    of_prefix = total // (prefix_tiles + tiles) * prefix_tiles
    is_prefix = program < of_prefix
    local = tl.where(is_prefix, program, program - of_prefix)
    each = tl.where(is_prefix, prefix_tiles, tiles)
    head, tile = local // each, local % each
    return head // heads, head % heads, tile, is_prefix


@triton.jit
def own_tile(tables, tile, is_prefix, prefix, shape, lane):
    """A tile of tokens: their order, which lanes are in the grid, which are some, and the tokens."""
    data, lengths, places = tables
    # No scalar condition meets a block of them: Triton's interpreter then forgets that they are booleans.
    order = tile_order(tl.where(is_prefix, 0, tile), lane, shape, lengths)
    gridded = in_grid(order, (tl.where(is_prefix, 0, lengths[0]), lengths[1], lengths[2]))
    first = tile * lane.shape[0] + lane
    some = gridded | (first < tl.where(is_prefix, prefix, 0))
    return order, gridded, some, tl.where(gridded, token_at(along(tables, 0, order, gridded), prefix, lengths), first)


@triton.jit
def query_tile(tables, tile, is_prefix, prefix, shape, kernel, lane):
    """A tile of tokens as queries: their tokens, which lanes are some, and what they see, for logits_of: (low, width,
    part of the bias' index). A prefix query has no window."""
    order, gridded, some, token = own_tile(tables, tile, is_prefix, prefix, shape, lane)
    low, high = along(tables, 2, order, gridded), along(tables, 3, order, gridded)
    width = (high[0] - low[0], high[1] - low[1], high[2] - low[2])
    part = bias_part(along(tables, 1, order, gridded), kernel) - bias_center(kernel)
    return token, some, (low, width, part)


@triton.jit
def keys_of_tile(tables, tile, is_prefix, prefix, tokens, shape):
    """The list of keys that a tile of queries goes through: (those that all see, those and the box, its corner, its
    size)."""
    corner, size = keys_box(tables, tl.where(is_prefix, 0, tile), shape)
    box = tl.where(is_prefix, 0, size[0] * size[1] * size[2])
    dense = tl.where(is_prefix, tokens, prefix)
    return dense, dense + box, corner, size


@triton.jit
def key_tile(box, start, tables, prefix, visible, visible_strides, batch, kernel, BLOCK: tl.constexpr):
    """Keys `start` to `start + BLOCK` of the list: their tokens; which have a row (a key of zeros has none); which of
    them all queries see; their places (far away if they do not count); their part of the bias' index."""
    dense, total, corner, size = box
    data, lengths, places = tables
    j = start + tl.arange(0, BLOCK)
    boxed = (j >= dense) & (j < total)
    place = in_box(tl.maximum(j - dense, 0), corner, size)
    z = tl.load(place_row(tables, 0, 0) + place[0], mask=boxed, other=-1)
    y = tl.load(place_row(tables, 0, 1) + place[1], mask=boxed, other=-1)
    x = tl.load(place_row(tables, 0, 2) + place[2], mask=boxed, other=-1)
    to_all = j < tl.minimum(dense, total)
    there = to_all | ((z >= 0) & (y >= 0) & (x >= 0))
    token = tl.where(to_all, j, tl.where(there, token_at((z, y, x), prefix, lengths), 0))
    if visible is not None:
        shown = shown_of(visible, visible_strides, batch, token, there)
        to_all, boxed = to_all & shown, boxed & (shown | (there == 0))
        there = there & shown
    return token, there, to_all, (place[0], place[1], tl.where(boxed, place[2], FAR)), bias_part(place, kernel)


@triton.jit
def shown_of(visible, strides, batch, token, some):
    at = visible + batch.to(tl.int64) * strides[0] + token.to(tl.int64) * strides[1]
    return tl.load(at, mask=some, other=0) != 0


@triton.jit
def rows_of(triple):
    return triple[0][:, None], triple[1][:, None], triple[2][:, None]


@triton.jit
def columns_of(triple):
    return triple[0][None, :], triple[1][None, :], triple[2][None, :]


@triton.jit
def logits_of(
    products, bias, low, width, query_part, place, key_part, to_all, RANK: tl.constexpr, PREFIX: tl.constexpr
):
    """Logits of pairs, times log2(e); -inf where the query does not see the key.

    Args:
        products: query times key, scaled, times log2(e).
        bias: of the head, or None.
        low, width, query_part, place, key_part, to_all: of query_tile and key_tile, broadcastable to the products.
    """
    seen = inside(place, low, width, RANK)
    if bias is not None:
        products += tl.load(bias + (key_part - query_part), mask=seen, other=0.0) * LOG2_E
    if PREFIX:
        seen = seen | to_all
    return tl.where(seen, products, float("-inf"))


@triton.jit
def logits_of_tile(q, k, scale, bias, windows, keys, RANK: tl.constexpr, PREFIX: tl.constexpr):
    """logits_of the rows q (M, D) of query_tile with the rows k (N, D) of key_tile."""
    low, width, query_part = windows
    token, there, to_all, place, key_part = keys
    products = tl.dot(q, tl.trans(k), input_precision="ieee") * scale
    return logits_of(
        products,
        bias,
        rows_of(low),
        rows_of(width),
        query_part[:, None],
        columns_of(place),
        key_part[None, :],
        to_all[None, :],
        RANK,
        PREFIX,
    )
