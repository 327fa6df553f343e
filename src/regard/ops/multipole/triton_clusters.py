"""Multipole attention in Triton: the clusters, and which of them each query resolves. Not yet measured on a GPU.

Keys are not moved: they are read through their order by cluster, in which visible prefix keys come behind all clusters
as one more, which all queries resolve, and hidden keys last. Queries are read in the order of their best cluster, so
that a tile of them resolves few clusters in all. Everything is computed again in the backward, bit for bit.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn.functional import pad

from regard.ops._triton import padded
from regard.ops._triton_rows import head_of, load_rows, matrix, product, rows_of
from regard.ops.multipole.call import MultipoleCall
from regard.ops.multipole.reference import FarField

__all__ = ["Clusters", "Tiles", "clusters_of", "is_resolved", "tiles_of"]

_SELECTING_ROWS = 16
_SIZES = [
    "heads", "groups", "key_heads", "rows", "prefix", "clusters", "near", "tiles", "lines", "entries", "entry_stride",
]  # fmt: skip


class Clusters(NamedTuple):
    """The keys of each key head by cluster.

    Args:
        order: (B, H_kv, M) keys by cluster, then those of the visible prefix, then hidden ones.
        starts: (B, H_kv, C + 2) where each cluster, the prefix and the hidden keys begin.
        field: the clusters' moments, in float32.
    """

    order: Tensor
    starts: Tensor
    field: FarField


class Tiles(NamedTuple):
    """The R queries behind the prefix in tiles, by their best cluster.

    Args:
        words: (B, H, R, ceil(C / 32)) bit c % 32 of word c // 32: whether a query resolves cluster c.
        order: (B, H, R) queries in the order of the tiles.
        lists, counts: (B, H, tiles, C) and (B, H, tiles): clusters that any query of a tile resolves, and how many.
        union: (B, H, tiles, C) the same as bytes.
    """

    words: Tensor
    order: Tensor
    lists: Tensor
    counts: Tensor
    union: Tensor


@triton.jit(do_not_specialize=_SIZES)
def _moments(
    key, value, order, starts, log_count, mean_key, variance, mean_value, log_spread,
    key_heads, clusters,
    DIM: tl.constexpr, VALUE_DIM: tl.constexpr, WIDTH: tl.constexpr, VALUE_WIDTH: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """One cluster: how many keys it has, their mean and variance, their values' mean, their spread."""
    program = tl.program_id(0)
    cluster = program % clusters
    head = program // clusters % key_heads
    batch = program // clusters // key_heads
    bounds = head_of(starts, batch, head) + cluster * starts.token
    begins, ends = tl.load(bounds), tl.load(bounds + starts.token)
    number = tl.maximum(ends - begins, 1).to(tl.float32)
    sum_key = tl.zeros([WIDTH], tl.float32)
    sum_value = tl.zeros([VALUE_WIDTH], tl.float32)
    for first in range(begins, ends, COLUMNS):
        place = first + tl.arange(0, COLUMNS)
        there = place < ends
        index = tl.load(head_of(order, batch, head) + place, mask=there, other=0)
        sum_key += tl.sum(load_rows(key, batch, head, index, there, DIM, WIDTH).to(tl.float32), 0)
        sum_value += tl.sum(load_rows(value, batch, head, index, there, VALUE_DIM, VALUE_WIDTH).to(tl.float32), 0)
    mean = sum_key / number
    squares = tl.zeros([WIDTH], tl.float32)
    for first in range(begins, ends, COLUMNS):
        place = first + tl.arange(0, COLUMNS)
        there = place < ends
        index = tl.load(head_of(order, batch, head) + place, mask=there, other=0)
        k = load_rows(key, batch, head, index, there, DIM, WIDTH).to(tl.float32)
        away = tl.where(there[:, None], k - mean[None, :], 0.0)
        squares += tl.sum(away * away, 0)
    squares = squares / number
    channel, value_channel = tl.arange(0, WIDTH), tl.arange(0, VALUE_WIDTH)
    place = cluster.to(tl.int64)
    tl.store(head_of(mean_key, batch, head) + place * mean_key.token + channel, mean, mask=channel < DIM)
    tl.store(head_of(variance, batch, head) + place * variance.token + channel, squares, mask=channel < DIM)
    own = head_of(mean_value, batch, head) + place * mean_value.token + value_channel
    tl.store(own, sum_value / number, mask=value_channel < VALUE_DIM)
    there = tl.where(ends > begins, tl.log(number), float("-inf"))
    tl.store(head_of(log_count, batch, head) + place * log_count.token, there)
    # The smallest normal number stands for the spread of clusters whose keys are all alike: they come last.
    spread = tl.sum(squares, 0)
    spread = tl.where(spread < 1.1754943508222875e-38, 1.1754943508222875e-38, spread)  # NaN stays
    tl.store(head_of(log_spread, batch, head) + place * log_spread.token, tl.log(spread))


@triton.jit(do_not_specialize=_SIZES)
def _select(
    query, mean_key, variance, log_count, log_spread, words, best,
    scale, heads, groups, rows, prefix, clusters, near, tiles,
    DIM: tl.constexpr, CHUNK: tl.constexpr, CLUSTERS: tl.constexpr, ROWS: tl.constexpr, SECOND_ORDER: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """The `near` clusters of the largest mass times spread, ties to the lowest index, as bits; and the best one."""
    program = tl.program_id(0)
    head = program // tiles % heads
    batch = program // tiles // heads
    key_head = head // groups
    row = program % tiles * ROWS + tl.arange(0, ROWS)
    there = row < rows
    cluster = tl.arange(0, CLUSTERS)
    real = cluster < clusters
    rank = tl.zeros([ROWS, CLUSTERS], tl.float32)
    for first in tl.static_range(0, DIM, CHUNK):
        channel = first + tl.arange(0, CHUNK)
        inside = (channel < DIM)[None, :]
        place = (prefix + row).to(tl.int64)[:, None] * query.token + channel[None, :]
        q = tl.load(head_of(query, batch, head) + place, mask=there[:, None] & inside, other=0.0).to(tl.float32) * scale
        place = cluster.to(tl.int64)[:, None] * mean_key.token + channel[None, :]
        mean = tl.load(head_of(mean_key, batch, key_head) + place, mask=real[:, None] & inside, other=0.0)
        rank += product(q, mean, PRECISION)
        if SECOND_ORDER:
            spread = tl.load(head_of(variance, batch, key_head) + place, mask=real[:, None] & inside, other=0.0)
            rank += 0.5 * product(q * q, spread, PRECISION)
    number = tl.load(head_of(log_count, batch, key_head) + cluster, mask=real, other=float("-inf"))
    rank += (number + tl.load(head_of(log_spread, batch, key_head) + cluster, mask=real, other=0.0))[None, :]

    # Whole numbers in the order of the ranks: NaN above all, the smallest for what is never selected.
    rank = tl.where(rank == 0.0, 0.0, rank)
    bits = rank.to(tl.int32, bitcast=True)
    code = tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
    code = tl.where(rank != rank, 0x7FFFFFFF, code)
    never = (number == float("-inf"))[None, :] | (rank == float("-inf"))
    code = tl.where(never, -2147483648, code)
    # The largest number that at least `near` reach: its sign, then from its highest bit on.
    kth = tl.where(tl.sum((code >= 0).to(tl.int32), 1) >= near, 0, -2147483648)
    for step in range(0, 31):
        candidate = kth | (1 << (30 - step))
        reached = tl.sum((code >= candidate[:, None]).to(tl.int32), 1)
        kth = tl.where(reached >= near, candidate, kth)
    above = code > kth[:, None]
    tied = (code == kth[:, None]) & (code != -2147483648)
    room = near - tl.sum(above.to(tl.int32), 1)
    resolved = above | (tied & (tl.cumsum(tied.to(tl.int32), 1) <= room[:, None]))

    WORDS: tl.constexpr = CLUSTERS // 32
    each = tl.reshape(resolved.to(tl.int32), [ROWS, WORDS, 32]) << tl.arange(0, 32)[None, None, :]
    place = row.to(tl.int64)[:, None] * words.token + tl.arange(0, WORDS)[None, :]
    tl.store(head_of(words, batch, head) + place, tl.sum(each, 2), mask=there[:, None])
    tl.store(head_of(best, batch, head) + row.to(tl.int64) * best.token, tl.argmax(code, 1), mask=there)


@triton.jit
def _either(a, b):
    return a | b


@triton.jit(do_not_specialize=_SIZES)
def _unite(words, order, union, heads, rows, clusters, tiles, CLUSTERS: tl.constexpr, ROWS: tl.constexpr):
    """The clusters that any query of a tile resolves, a byte for each."""
    program = tl.program_id(0)
    tile = program % tiles
    head = program // tiles % heads
    batch = program // tiles // heads
    place = tile * ROWS + tl.arange(0, ROWS)
    there = place < rows
    row = tl.load(head_of(order, batch, head) + place, mask=there, other=0).to(tl.int64)
    own = head_of(words, batch, head) + row[:, None] * words.token + tl.arange(0, CLUSTERS // 32)[None, :]
    together = tl.reduce(tl.load(own, mask=there[:, None], other=0), 0, _either)
    bits = tl.reshape((together[:, None] >> tl.arange(0, 32)[None, :]) & 1, [CLUSTERS])
    cluster = tl.arange(0, CLUSTERS)
    tl.store(head_of(union, batch, head) + tile.to(tl.int64) * union.token + cluster, bits, mask=cluster < clusters)


@triton.jit(do_not_specialize=_SIZES)
def _compact(members, lists, counts, heads, lines, entries, entry_stride, CHUNK: tl.constexpr):
    """The places of a line's nonzero bytes, in order, and how many there are."""
    program = tl.program_id(0)
    line = (program % lines).to(tl.int64)
    head = program // lines % heads
    batch = program // lines // heads
    found = tl.zeros([1], tl.int32)
    for first in range(0, entries, CHUNK):
        entry = first + tl.arange(0, CHUNK)
        start = head_of(members, batch, head) + line * members.token
        member = tl.load(start + entry.to(tl.int64) * entry_stride, mask=entry < entries, other=0).to(tl.int32)
        place = found + tl.cumsum(member, 0) - 1
        tl.store(head_of(lists, batch, head) + line * lists.token + place, entry, mask=member != 0)
        found += tl.sum(member, 0)
    tl.store(head_of(counts, batch, head) + line * counts.token + tl.arange(0, 1), found)


@triton.jit
def is_resolved(words, batch, head, row, cluster, clusters, there):
    """Whether rows, wherever `there`, resolve clusters, of those that there are; True elsewhere. Broadcasts."""
    place = row.to(tl.int64) * words.token + cluster // 32
    # No scalar condition meets a block of them: Triton's interpreter then forgets that they are booleans.
    word = tl.load(head_of(words, batch, head) + place, mask=there & (row * 0 + cluster < clusters), other=-1)
    return ((word >> (cluster % 32)) & 1) != 0


# ---- launchers -------------------------------------------------------------------------------------------------------


def clusters_of(call: MultipoleCall) -> Clusters:
    """The keys by cluster, and the clusters' moments."""
    prefix, clusters = call.num_prefix_tokens, call.num_clusters
    batch, heads, keys, dim = call.key.shape
    value_dim = call.value.shape[3]
    inside = (call.clusters >= 0) & (call.clusters < clusters)
    torch._assert_async(inside.all(), f"assignment: expected clusters 0 to {clusters - 1}")  # does not wait
    own = pad(call.clusters, (prefix, 0), value=clusters)
    if call.visible is not None:
        own = own.masked_fill(~call.visible, clusters + 1)
    ordered, order = own.sort(dim=2, stable=True)
    bounds = torch.arange(clusters + 2, device=own.device).expand(batch, heads, -1).contiguous()
    starts, order = torch.searchsorted(ordered, bounds).int(), order.int()
    sizes = ((), (dim,), (dim,), (value_dim,), ())
    moments = [call.key.new_empty((batch, heads, clusters, *size), dtype=torch.float32) for size in sizes]
    if moments[0].numel() > 0:
        _moments[(batch * heads * clusters,)](
            matrix(call.key), matrix(call.value), rows_of(order), rows_of(starts), *(rows_of(t) for t in moments),
            heads, clusters, DIM=dim, VALUE_DIM=value_dim, WIDTH=padded(dim), VALUE_WIDTH=padded(value_dim), COLUMNS=16,
        )  # fmt: skip
    log_count, mean_key, variance, mean_value, log_spread = moments
    return Clusters(order, starts, FarField(log_count, mean_key, variance, mean_value, log_spread, None))


def tiles_of(call: MultipoleCall, clusters: Clusters, rows_of_a_tile: int) -> Tiles:
    """Which clusters each query resolves, and in which order queries are to be visited."""
    batch, heads, queries, dim = call.query.shape
    rows, count = queries - call.num_prefix_tokens, call.num_clusters
    whole = max(32, 1 << max(0, count - 1).bit_length())
    new = call.query.new_empty
    words, best = (new((batch, heads, rows, *size), dtype=torch.int32) for size in ((whole // 32,), ()))
    field = clusters.field
    selecting = triton.cdiv(rows, _SELECTING_ROWS)
    _select[(batch * heads * selecting,)](
        matrix(call.query), *(rows_of(t) for t in (field.key, field.variance, field.log_count, field.log_spread)),
        rows_of(words), rows_of(best), float(call.scale), heads, call.groups, rows, call.num_prefix_tokens, count,
        call.near, selecting, DIM=dim, CHUNK=16, CLUSTERS=whole, ROWS=_SELECTING_ROWS, SECOND_ORDER=call.second_order,
        PRECISION=exact_precision(call), num_warps=4 if whole <= 256 else 8 if whole <= 1024 else 16, num_stages=1,
    )  # fmt: skip
    order = best.sort(dim=2, stable=True).indices.int()
    tiles = triton.cdiv(rows, rows_of_a_tile)
    union = new((batch, heads, tiles, count), dtype=torch.uint8)
    _unite[(batch * heads * tiles,)](
        rows_of(words), rows_of(order), rows_of(union), heads, rows, count, tiles, CLUSTERS=whole, ROWS=rows_of_a_tile
    )
    return Tiles(words, order, *compacted(union), union)


def compacted(members: Tensor) -> tuple[Tensor, Tensor]:
    """Where (B, H, lines, entries) bytes are not zero, (B, H, lines, entries), and how often, (B, H, lines)."""
    batch, heads, lines, entries = members.shape
    lists, counts = (members.new_empty((batch, heads, lines, *n), dtype=torch.int32) for n in ((entries,), ()))
    if counts.numel() > 0:
        _compact[(batch * heads * lines,)](
            rows_of(members), rows_of(lists), rows_of(counts), heads, lines, entries, members.stride(3), CHUNK=256
        )
    return lists, counts


def exact_precision(call: MultipoleCall) -> str:
    """Of products of queries and moments that decide: half types hold in one TF32 number, moments in two."""
    return "ieee" if call.query.dtype == torch.float32 else "tf32x3"
