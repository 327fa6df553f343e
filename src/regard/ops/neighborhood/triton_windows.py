"""The windows of windows.py as tables that Triton kernels read, and the steps that all of those kernels take with them.

Along each axis queries stand in *order*: the dilation groups one after the other, so that a dilated window is a run of
neighbors. Keys stand at *places*: the same order, and where the border makes something of what lies beyond the ends of
a group ("zeropad", "replicate"), room for it on both sides of each group. So the keys of a query are the places
[low, high) whatever the border, low and high ascend with the query, a tile of queries sees one box of places, and a
tile of keys is seen by one box of queries. The tables hold a few int32 per token of each axis.
"""

import triton
import triton.language as tl

__all__ = [
    "AXES",
    "along",
    "bias_center",
    "bias_part",
    "fill_tables",
    "in_box",
    "in_grid",
    "inside",
    "keys_box",
    "order_row",
    "place_row",
    "tile_order",
    "token_at",
]

# The options of each axis.
AXES = [f"{name}{axis}" for axis in "012" for name in ("length", "width", "dilation", "stride", "causal")]


@triton.jit
def _pick(axis, a, b, c):
    return tl.where(axis == 0, a, tl.where(axis == 1, b, c))


@triton.jit(do_not_specialize=[*AXES, "border"])
def fill_tables(
    data,
    length0,
    width0,
    dilation0,
    stride0,
    causal0,
    length1,
    width1,
    dilation1,
    stride1,
    causal1,
    length2,
    width2,
    dilation2,
    stride2,
    causal2,
    border,
    BLOCK: tl.constexpr,
):
    """One block of the tables of one axis: 6 rows of its length (order_row), then 3 of its places (place_row).

    A group of n tokens begins at order `begin`; its i-th token is at place `home + i`. `border`: place in BORDERS.
    """
    axis = tl.program_id(1)
    dilation = _pick(axis, dilation0, dilation1, dilation2)
    stride = _pick(axis, stride0, stride1, stride2)
    causal = _pick(axis, causal0, causal1, causal2) != 0
    length, width = _pick(axis, length0, length1, length2), _pick(axis, width0, width1, width2)
    shift, extends, replicate = border == 0, border >= 2, border == 3
    before = tl.where(causal, width - 1, width // 2)
    lead = tl.where(causal, stride - 1, stride // 2)
    left = tl.where(extends, before - lead, 0)
    right = tl.where(extends & (causal == 0), lead - before + width - 1, 0)
    least, longer = length // dilation, length % dilation  # so many groups have one token more than the least
    groups = tl.minimum(dilation, length)
    places = length + groups * (left + right)

    # Where this axis' tables begin.
    for earlier in range(0, 2):
        if earlier < axis:
            n, w = _pick(earlier, length0, length1, length2), _pick(earlier, width0, width1, width2)
            d, s = _pick(earlier, dilation0, dilation1, dilation2), _pick(earlier, stride0, stride1, stride2)
            c = _pick(earlier, causal0, causal1, causal2) != 0
            beyond = tl.where(c, w - s, w - 1)  # left and right together
            data += 9 * n + tl.where(extends, 3 * tl.minimum(d, n) * beyond, 0)

    x = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    long = longer * (least + 1)
    group = tl.where(x < long, x // (least + 1), longer + tl.maximum(x - long, 0) // tl.maximum(least, 1))
    begin = group * least + tl.minimum(group, longer)
    n = least + (group < longer).to(tl.int32)
    i = x - begin
    home = begin + group * (left + right) + left
    leader = i // stride * stride + lead
    start = tl.where(shift, tl.minimum(tl.minimum(leader, n - 1) - before, n - width), leader - before)
    stop = tl.where(shift, tl.maximum(start, 0), start) + width
    start = tl.where(extends, start, tl.maximum(start, 0))
    stop = tl.where(extends, stop, tl.minimum(stop, n))
    stop = tl.where(causal, tl.minimum(stop, i + 1), stop)
    some = x < length
    tl.store(data + x, i * dilation + group, mask=some)
    tl.store(data + length + x, home + i, mask=some)
    tl.store(data + 2 * length + x, home + start, mask=some)
    tl.store(data + 3 * length + x, home + stop, mask=some)
    tl.store(data + 4 * length + x, home + i - tl.where(replicate & (i == 0), left, 0), mask=some)
    tl.store(data + 5 * length + x, home + i + 1 + tl.where(replicate & (i == n - 1), right, 0), mask=some)

    data += 6 * length
    room = least + left + right
    long = longer * (room + 1)
    group = tl.where(x < long, x // (room + 1), longer + tl.maximum(x - long, 0) // tl.maximum(room, 1))
    begin = group * least + tl.minimum(group, longer)
    n = least + (group < longer).to(tl.int32)
    i = x - begin - group * (left + right) - left
    at = tl.minimum(tl.maximum(i, 0), n - 1)
    source = tl.where((border == 2) & (i != at), -1, at * dilation + group)
    # Strides whose window reaches the place; with "shift" those that would if none were moved, and all at the ends.
    first = tl.maximum(i - (lead - before) - width + stride, 0) // stride * stride
    first = tl.where(shift & (i < width), 0, first)
    first = tl.minimum(tl.where(causal, tl.maximum(first, i), first), n)
    end = tl.maximum(i - (lead - before), 0) // stride * stride + stride
    end = tl.where(shift & ((i >= n - width) | (i + before >= n - 1)), n, tl.minimum(end, n))
    some = x < places
    tl.store(data + x, source, mask=some)
    tl.store(data + places + x, begin + first, mask=some)
    tl.store(data + 2 * places + x, begin + end, mask=some)


@triton.jit
def order_row(tables, row: tl.constexpr, axis: tl.constexpr):
    """Where a row of queries begins: 0 token, 1 place, 2 low, 3 high, 4 first and 5 end of its key's copies."""
    data, lengths, places = tables
    for earlier in tl.static_range(axis):
        data += 6 * lengths[earlier] + 3 * places[earlier]
    return data + row * lengths[axis]


@triton.jit
def place_row(tables, row: tl.constexpr, axis: tl.constexpr):
    """Where a row of places begins: 0 source, 1 first and 2 end of the queries that may see it."""
    data, lengths, places = tables
    for earlier in tl.static_range(axis):
        data += 6 * lengths[earlier] + 3 * places[earlier]
    return data + 6 * lengths[axis] + row * places[axis]


@triton.jit
def tile_order(tile, lane, shape, lengths):
    """Order along each axis of the lanes of a tile; past an axis' length where it hangs over the end."""
    down, across = tl.cdiv(lengths[1], shape[1]), tl.cdiv(lengths[2], shape[2])
    z = tile // (down * across) * shape[0] + lane // (shape[1] * shape[2])
    y = tile // across % down * shape[1] + lane // shape[2] % shape[1]
    x = tile % across * shape[2] + lane % shape[2]
    return z, y, x


@triton.jit
def in_grid(order, lengths):
    return (order[0] < lengths[0]) & (order[1] < lengths[1]) & (order[2] < lengths[2])


@triton.jit
def in_box(cell, low, size):
    """Coordinates of the cells of a box, counted from its corner `low`, the last axis running fastest."""
    y, x = tl.maximum(size[1], 1), tl.maximum(size[2], 1)
    return low[0] + cell // (y * x), low[1] + cell // x % y, low[2] + cell % x


@triton.jit
def along(tables, row: tl.constexpr, order, mask):
    """A row of queries' tables along each axis at these orders; 0 where the mask is false."""
    z = tl.load(order_row(tables, row, 0) + order[0], mask=mask, other=0)
    y = tl.load(order_row(tables, row, 1) + order[1], mask=mask, other=0)
    x = tl.load(order_row(tables, row, 2) + order[2], mask=mask, other=0)
    return z, y, x


@triton.jit
def token_at(coordinates, prefix, lengths):
    return prefix + (coordinates[0] * lengths[1] + coordinates[1]) * lengths[2] + coordinates[2]


@triton.jit
def keys_box(tables, tile, shape):
    """The box of places that a tile of queries sees: its corner and its size."""
    data, lengths, places = tables
    first = tile_order(tile, 0, shape, lengths)
    z = tl.load(order_row(tables, 2, 0) + first[0])
    y = tl.load(order_row(tables, 2, 1) + first[1])
    x = tl.load(order_row(tables, 2, 2) + first[2])
    to_z = tl.load(order_row(tables, 3, 0) + tl.minimum(first[0] + shape[0], lengths[0]) - 1)
    to_y = tl.load(order_row(tables, 3, 1) + tl.minimum(first[1] + shape[1], lengths[1]) - 1)
    to_x = tl.load(order_row(tables, 3, 2) + tl.minimum(first[2] + shape[2], lengths[2]) - 1)
    return (z, y, x), (to_z - z, to_y - y, to_x - x)


@triton.jit
def inside(place, low, width, RANK: tl.constexpr):
    """Whether places are among [low, low + width) along each axis of the grid."""
    seen = (place[2] - low[2]).to(tl.uint32) < width[2].to(tl.uint32)
    if RANK > 1:
        seen &= (place[1] - low[1]).to(tl.uint32) < width[1].to(tl.uint32)
    if RANK > 2:
        seen &= (place[0] - low[0]).to(tl.uint32) < width[0].to(tl.uint32)
    return seen


@triton.jit
def bias_part(place, kernel):
    """The index of a key's entry in a head's bias is the part of its place less the part of its query's own place."""
    return (place[0] * (2 * kernel[1] - 1) + place[1]) * (2 * kernel[2] - 1) + place[2]


@triton.jit
def bias_center(kernel):
    """The entry of a query's own place."""
    return ((kernel[0] - 1) * (2 * kernel[1] - 1) + kernel[1] - 1) * (2 * kernel[2] - 1) + kernel[2] - 1
