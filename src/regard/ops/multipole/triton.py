"""Multipole attention in Triton, forward and backward. Not yet measured on a GPU.

A tile of queries takes in the far field, then the keys of every cluster that any of its queries resolves, each hidden
from the queries that do not, then the prefix keys, under a running softmax. Queries stand in the order of their best
cluster, so that a tile resolves few. The backward computes the weights again: by queries (each row's log-sum-exp and
sum p dp, then its gradient), by clusters (the gradients of their moments) and by keys (over the tiles that resolve
their cluster). There are no atomic sums: two runs agree bit for bit.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from regard.ops._arguments import heads_last
from regard.ops._triton import Config, first_that_fits, padded
from regard.ops._triton_rows import (
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
from regard.ops.multipole.call import MultipoleCall, beyond_triton
from regard.ops.multipole.streamed import add_from_moments
from regard.ops.multipole.triton_clusters import Clusters, Tiles, clusters_of, compacted, is_resolved, tiles_of
from regard.ops.routed import triton as routed
from regard.ops.routed.call import RoutedCall

__all__ = ["attend", "backward", "configs", "forward", "gradients", "shared_memory"]

_SIZES = ["heads", "groups", "key_heads", "rows", "prefix", "clusters", "tiles"]


@triton.jit
def _tile(heads, rows, tiles, order, ROWS: tl.constexpr):
    """This program's batch, head and tile, the tile's rows, and which of these there are."""
    program = tl.program_id(0)
    tile = program % tiles
    head = program // tiles % heads
    batch = program // tiles // heads
    place = tile * ROWS + tl.arange(0, ROWS)
    there = place < rows
    return batch, head, tile, tl.load(head_of(order, batch, head) + place, mask=there, other=0), there


@triton.jit
def _far(
    q, mean_key, variance, log_count, words, batch, head, key_head, row, there, cluster, clusters, scale,
    DIM: tl.constexpr, WIDTH: tl.constexpr, SECOND_ORDER: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Logits of whole clusters, and which of them rows see from afar."""
    real = cluster < clusters
    x = q.to(tl.float32)
    logits = product(x, load_rows(mean_key, batch, key_head, cluster, real, DIM, WIDTH), PRECISION) * scale
    if SECOND_ORDER:
        spread = load_rows(variance, batch, key_head, cluster, real, DIM, WIDTH)
        logits += product(x * x, spread, PRECISION) * (0.5 * scale * scale)
    number = tl.load(head_of(log_count, batch, key_head) + cluster, mask=real, other=float("-inf"))
    resolved = is_resolved(words, batch, head, row[:, None], cluster[None, :], clusters, there[:, None])
    return logits + number[None, :], (resolved == 0) & (number > float("-inf"))[None, :]


@triton.jit
def _near(lists, starts, words, batch, head, key_head, tile, step, count, clusters, row, there):
    """The `step`-th cluster that a tile resolves, behind which come the prefix keys: where its keys begin and end, and
    the rows that resolve it."""
    listed = step < count
    own = head_of(lists, batch, head) + tile.to(tl.int64) * lists.token + step
    cluster = tl.load(own, mask=listed, other=clusters)
    bounds = head_of(starts, batch, key_head) + cluster * starts.token
    seeing = there & is_resolved(words, batch, head, row, cluster, clusters, there)
    return tl.load(bounds), tl.load(bounds + starts.token), seeing


@triton.jit
def _keys(order, batch, key_head, first, ends, COLUMNS: tl.constexpr):
    """Keys at these places of the order by cluster, and which there are."""
    place = first + tl.arange(0, COLUMNS)
    there = place < ends
    return tl.load(head_of(order, batch, key_head) + place, mask=there, other=0), there


@triton.jit(do_not_specialize=_SIZES)
def _forward(
    query, key, value, order, starts, log_count, mean_key, variance, mean_value, words, rows_order, lists, counts,
    output, scale, heads, groups, rows, prefix, clusters, tiles,
    DIM: tl.constexpr, VALUE_DIM: tl.constexpr, WIDTH: tl.constexpr, VALUE_WIDTH: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, SECOND_ORDER: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    batch, head, tile, row, there = _tile(heads, rows, tiles, rows_order, ROWS)
    key_head = head // groups
    q = load_rows(query, batch, head, prefix + row, there, DIM, WIDTH)
    most, total = begin(ROWS)
    out = tl.zeros([ROWS, VALUE_WIDTH], tl.float32)
    for first in range(0, clusters, COLUMNS):
        cluster = first + tl.arange(0, COLUMNS)
        logits, seen = _far(
            q, mean_key, variance, log_count, words, batch, head, key_head, row, there, cluster, clusters, scale,
            DIM, WIDTH, SECOND_ORDER, PRECISION,
        )  # fmt: skip
        v = load_rows(mean_value, batch, key_head, cluster, cluster < clusters, VALUE_DIM, VALUE_WIDTH).to(q.dtype)
        weight, shrink, most, total = take_in(tl.where(seen, logits, float("-inf")), most, total)
        out = mixed(weight.to(q.dtype), v, out * shrink[:, None])
    count = tl.load(head_of(counts, batch, head) + tile * counts.token)
    for step in range(0, count + 1):
        begins, ends, seeing = _near(
            lists, starts, words, batch, head, key_head, tile, step, count, clusters, row, there
        )  # fmt: skip
        for first in range(begins, ends, COLUMNS):
            index, inside = _keys(order, batch, key_head, first, ends, COLUMNS)
            logits = product(q, load_rows(key, batch, key_head, index, inside, DIM, WIDTH)) * scale
            v = load_rows(value, batch, key_head, index, inside, VALUE_DIM, VALUE_WIDTH)
            logits = tl.where(seeing[:, None] & inside[None, :], logits, float("-inf"))
            weight, shrink, most, total = take_in(logits, most, total)
            out = mixed(weight.to(q.dtype), v, out * shrink[:, None])
    # A row that sees nothing is all zeros and stays so.
    out = out / tl.where(total == 0.0, 1.0, total)[:, None]
    store_rows(output, batch, head, prefix + row, there, out, VALUE_DIM, VALUE_WIDTH)


@triton.jit(do_not_specialize=_SIZES)
def _backward_queries(
    query, key, value, order, starts, log_count, mean_key, variance, mean_value, words, rows_order, lists, counts,
    grad_output, grad_query, lse, mean,
    scale, heads, groups, rows, prefix, clusters, tiles,
    DIM: tl.constexpr, VALUE_DIM: tl.constexpr, WIDTH: tl.constexpr, VALUE_WIDTH: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, SECOND_ORDER: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Each row's log-sum-exp and sum p dp; then its gradient."""
    batch, head, tile, row, there = _tile(heads, rows, tiles, rows_order, ROWS)
    key_head = head // groups
    q = load_rows(query, batch, head, prefix + row, there, DIM, WIDTH)
    grad = load_rows(grad_output, batch, head, prefix + row, there, VALUE_DIM, VALUE_WIDTH)
    count = tl.load(head_of(counts, batch, head) + tile * counts.token)
    most, total = begin(ROWS)
    product_sum = tl.zeros([ROWS], tl.float32)
    for first in range(0, clusters, COLUMNS):
        cluster = first + tl.arange(0, COLUMNS)
        logits, seen = _far(
            q, mean_key, variance, log_count, words, batch, head, key_head, row, there, cluster, clusters, scale,
            DIM, WIDTH, SECOND_ORDER, PRECISION,
        )  # fmt: skip
        v = load_rows(mean_value, batch, key_head, cluster, cluster < clusters, VALUE_DIM, VALUE_WIDTH).to(q.dtype)
        weight, shrink, most, total = take_in(tl.where(seen, logits, float("-inf")), most, total)
        product_sum = product_sum * shrink + tl.sum(weight * product(grad, v), 1)
    for step in range(0, count + 1):
        begins, ends, seeing = _near(
            lists, starts, words, batch, head, key_head, tile, step, count, clusters, row, there
        )  # fmt: skip
        for first in range(begins, ends, COLUMNS):
            index, inside = _keys(order, batch, key_head, first, ends, COLUMNS)
            logits = product(q, load_rows(key, batch, key_head, index, inside, DIM, WIDTH)) * scale
            grad_weight = product(grad, load_rows(value, batch, key_head, index, inside, VALUE_DIM, VALUE_WIDTH))
            logits = tl.where(seeing[:, None] & inside[None, :], logits, float("-inf"))
            weight, shrink, most, total = take_in(logits, most, total)
            product_sum = product_sum * shrink + tl.sum(weight * grad_weight, 1)
    row_lse, row_mean = end(most, total, product_sum)
    tl.store(head_of(lse, batch, head) + row.to(tl.int64) * lse.token, row_lse, mask=there)
    tl.store(head_of(mean, batch, head) + row.to(tl.int64) * mean.token, row_mean, mask=there)

    out = tl.zeros([ROWS, WIDTH], tl.float32)
    from_spread = tl.zeros([ROWS, WIDTH], tl.float32)
    for first in range(0, clusters, COLUMNS):
        cluster = first + tl.arange(0, COLUMNS)
        logits, seen = _far(
            q, mean_key, variance, log_count, words, batch, head, key_head, row, there, cluster, clusters, scale,
            DIM, WIDTH, SECOND_ORDER, PRECISION,
        )  # fmt: skip
        real = cluster < clusters
        v = load_rows(mean_value, batch, key_head, cluster, real, VALUE_DIM, VALUE_WIDTH).to(q.dtype)
        _, grad_logits = differentiate(logits, product(grad, v), seen, row_lse, row_mean)
        k = load_rows(mean_key, batch, key_head, cluster, real, DIM, WIDTH)
        out = mixed(grad_logits, k, out, PRECISION)
        if SECOND_ORDER:
            spread = load_rows(variance, batch, key_head, cluster, real, DIM, WIDTH)
            from_spread = mixed(grad_logits, spread, from_spread, PRECISION)
    for step in range(0, count + 1):
        begins, ends, seeing = _near(
            lists, starts, words, batch, head, key_head, tile, step, count, clusters, row, there
        )  # fmt: skip
        for first in range(begins, ends, COLUMNS):
            index, inside = _keys(order, batch, key_head, first, ends, COLUMNS)
            k = load_rows(key, batch, key_head, index, inside, DIM, WIDTH)
            grad_weight = product(grad, load_rows(value, batch, key_head, index, inside, VALUE_DIM, VALUE_WIDTH))
            seen = seeing[:, None] & inside[None, :]
            _, grad_logits = differentiate(product(q, k) * scale, grad_weight, seen, row_lse, row_mean)
            out = mixed(grad_logits.to(q.dtype), k, out)
    out = out * scale
    if SECOND_ORDER:
        out += from_spread * q.to(tl.float32) * (scale * scale)
    store_rows(grad_query, batch, head, prefix + row, there, out, DIM, WIDTH)


@triton.jit(do_not_specialize=_SIZES)
def _backward_clusters(
    query, log_count, mean_key, variance, mean_value, words, grad_output, lse, mean,
    grad_key, grad_variance, grad_value,
    scale, heads, groups, rows, prefix, clusters, tiles,
    DIM: tl.constexpr, VALUE_DIM: tl.constexpr, WIDTH: tl.constexpr, VALUE_WIDTH: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, SECOND_ORDER: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """A tile of clusters, past which all queries stream: the gradients of the clusters' moments."""
    program = tl.program_id(0)
    cluster = program % tiles * COLUMNS + tl.arange(0, COLUMNS)
    key_heads = heads // groups
    key_head = program // tiles % key_heads
    batch = program // tiles // key_heads
    real = cluster < clusters
    sum_key = tl.zeros([COLUMNS, WIDTH], tl.float32)
    sum_variance = tl.zeros([COLUMNS, WIDTH], tl.float32)
    sum_value = tl.zeros([COLUMNS, VALUE_WIDTH], tl.float32)
    for member in range(0, groups):
        head = key_head * groups + member
        for first in range(0, rows, ROWS):
            row = first + tl.arange(0, ROWS)
            there = row < rows
            q = load_rows(query, batch, head, prefix + row, there, DIM, WIDTH)
            grad = load_rows(grad_output, batch, head, prefix + row, there, VALUE_DIM, VALUE_WIDTH)
            row_lse, row_mean = load_state(lse, mean, batch, head, row, there)
            logits, seen = _far(
                q, mean_key, variance, log_count, words, batch, head, key_head, row, there, cluster, clusters, scale,
                DIM, WIDTH, SECOND_ORDER, PRECISION,
            )  # fmt: skip
            v = load_rows(mean_value, batch, key_head, cluster, real, VALUE_DIM, VALUE_WIDTH).to(q.dtype)
            weight, grad_logits = differentiate(logits, product(grad, v), seen, row_lse, row_mean)
            sum_value = mixed(tl.trans(weight.to(q.dtype)), grad, sum_value)
            sum_key = mixed(tl.trans(grad_logits.to(q.dtype)), q, sum_key)
            if SECOND_ORDER:
                x = q.to(tl.float32)
                sum_variance = mixed(tl.trans(grad_logits), x * x, sum_variance, PRECISION)
    store_rows(grad_key, batch, key_head, cluster, real, sum_key * scale, DIM, WIDTH)
    store_rows(grad_value, batch, key_head, cluster, real, sum_value, VALUE_DIM, VALUE_WIDTH)
    if SECOND_ORDER:
        sum_variance = sum_variance * (0.5 * scale * scale)
        store_rows(grad_variance, batch, key_head, cluster, real, sum_variance, DIM, WIDTH)


@triton.jit(do_not_specialize=_SIZES)
def _backward_keys(
    query, key, value, order, starts, words, rows_order, lists, counts, grad_output, lse, mean, grad_key, grad_value,
    scale, heads, groups, rows, prefix, clusters, tiles,
    DIM: tl.constexpr, VALUE_DIM: tl.constexpr, WIDTH: tl.constexpr, VALUE_WIDTH: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """One cluster's keys, past which stream the tiles that resolve it; past the prefix keys, which come first because
    they take longest, all tiles."""
    program = tl.program_id(0)
    cluster = clusters - program % (clusters + 1)
    key_heads = heads // groups
    key_head = program // (clusters + 1) % key_heads
    batch = program // (clusters + 1) // key_heads
    bounds = head_of(starts, batch, key_head) + cluster * starts.token
    ends = tl.load(bounds + starts.token)
    for first_key in range(tl.load(bounds), ends, COLUMNS):
        index, inside = _keys(order, batch, key_head, first_key, ends, COLUMNS)
        k = load_rows(key, batch, key_head, index, inside, DIM, WIDTH)
        v = load_rows(value, batch, key_head, index, inside, VALUE_DIM, VALUE_WIDTH)
        sum_key = tl.zeros([COLUMNS, WIDTH], tl.float32)
        sum_value = tl.zeros([COLUMNS, VALUE_WIDTH], tl.float32)
        for member in range(0, groups):
            head = key_head * groups + member
            listing = head_of(lists, batch, head) + cluster.to(tl.int64) * lists.token
            listed = cluster < clusters
            count = tl.load(head_of(counts, batch, head) + cluster * counts.token, mask=listed, other=tiles)
            for step in range(0, count):
                place = tl.load(listing + step, mask=listed, other=step) * ROWS + tl.arange(0, ROWS)
                there = place < rows
                row = tl.load(head_of(rows_order, batch, head) + place, mask=there, other=0)
                seeing = there & is_resolved(words, batch, head, row, cluster, clusters, there)
                q = load_rows(query, batch, head, prefix + row, there, DIM, WIDTH)
                grad = load_rows(grad_output, batch, head, prefix + row, there, VALUE_DIM, VALUE_WIDTH)
                row_lse, row_mean = load_state(lse, mean, batch, head, row, there)
                seen = seeing[:, None] & inside[None, :]
                weight, grad_logits = differentiate(product(q, k) * scale, product(grad, v), seen, row_lse, row_mean)
                # Rows of the tile that do not see these keys must not spoil them with a NaN.
                q = tl.where(seeing[:, None], q, 0.0)
                grad = tl.where(seeing[:, None], grad, 0.0)
                sum_value = mixed(tl.trans(weight.to(q.dtype)), grad, sum_value)
                sum_key = mixed(tl.trans(grad_logits.to(q.dtype)), q, sum_key)
        store_rows(grad_key, batch, key_head, index, inside, sum_key * scale, DIM, WIDTH)
        store_rows(grad_value, batch, key_head, index, inside, sum_value, VALUE_DIM, VALUE_WIDTH)


# ---- launchers -------------------------------------------------------------------------------------------------------


def _rows_of_a_tile(width: int, itemsize: int) -> int:
    """How many queries are visited together, by all passes alike."""
    return 64 if itemsize == 2 and width <= 64 else 32 if width <= 128 else 16


def configs(width: int, itemsize: int) -> list[Config]:
    """Block sizes to launch with, best first; none was measured yet. Clusters are small, so tiles of keys are, too.

    Args:
        width: padded head_dim, of values if those are wider. itemsize: bytes of a number.
    """
    rows = _rows_of_a_tile(width, itemsize)
    warps = 8 if width >= 128 and rows > 16 else 4
    return [
        Config.of(ROWS=rows, COLUMNS=columns, num_warps=warps, num_stages=stages)
        for columns in (32, 16)
        for stages in (2, 1)
        if columns <= rows
    ]


def shared_memory(config: Config, width: int, value_width: int, itemsize: int) -> int:
    """Bytes that a program may need: tiles of queries, raised ones too, and of output gradients; of the clusters'
    moments, which are float32; of logits and their gradients; and what the compiler adds.

    Args:
        width, value_width: padded head_dim of keys and values.
    """
    own = config["ROWS"] * (itemsize * (width + value_width) + (4 * width if itemsize < 4 else 0))
    moments = 4 * config.num_stages * config["COLUMNS"] * (2 * width + value_width)
    return own + moments + 12 * config["ROWS"] * config["COLUMNS"] + 4096


def _options(call: MultipoleCall) -> dict[str, int]:
    """Constants of a launch: the dimensions of heads and the sizes of tiles."""
    dim, value_dim = call.query.shape[3], call.value.shape[3]
    width, value_width = padded(dim), padded(value_dim)
    itemsize = call.query.element_size()
    config = first_that_fits(
        configs(max(width, value_width), itemsize),
        lambda config: shared_memory(config, width, value_width, itemsize),
        call.query.device,
    )
    dims = {"DIM": dim, "VALUE_DIM": value_dim, "WIDTH": width, "VALUE_WIDTH": value_width}
    return {**dims, **config.options()}


def _far_options(call: MultipoleCall) -> dict[str, Any]:
    """Half types meet the moments as TF32 numbers, which hold all of a query and more of a mean than its own type."""
    return {"SECOND_ORDER": call.second_order, "PRECISION": "ieee" if call.query.dtype == torch.float32 else "tf32"}


class _Problem:
    """What forward and backward launch with: the keys by cluster, the queries in tiles, the numbers of both."""

    def __init__(self, call: MultipoleCall) -> None:
        self.options = _options(call)
        self.clusters: Clusters = clusters_of(call)
        self.tiles: Tiles = tiles_of(call, self.clusters, self.options["ROWS"])
        batch, heads, queries, _ = call.query.shape
        rows = queries - call.num_prefix_tokens
        self.count = triton.cdiv(rows, self.options["ROWS"])
        self.grid = (batch * heads * self.count,)
        self.sizes = (float(call.scale), heads, call.groups, rows, call.num_prefix_tokens, call.num_clusters)
        field = self.clusters.field
        self.keys = (rows_of(self.clusters.order), rows_of(self.clusters.starts))
        self.moments = tuple(rows_of(t) for t in (field.log_count, field.key, field.variance, field.value))
        self.words = rows_of(self.tiles.words)
        self.lists = tuple(rows_of(t) for t in (self.tiles.order, self.tiles.lists, self.tiles.counts))


def _densely(call: MultipoleCall) -> RoutedCall:
    """The prefix queries, which attend to all keys: routed attention with one block."""
    query = call.query[:, :, : call.num_prefix_tokens]
    block = torch.zeros((1, 1, 1, 1), dtype=torch.int64, device=query.device)
    nothing = (call.key[:, :, :0], call.value[:, :, :0], None)
    return RoutedCall(
        query, call.key, call.value, call.visible, block, *nothing, query.shape[2], call.key.shape[2], call.scale
    )


def attend(call: MultipoleCall) -> Tensor:
    """(B, H, N, D_v) output of a call with its clusters."""
    prefix, queries = call.num_prefix_tokens, call.query.shape[2]
    output = heads_last(call.query, (*call.query.shape[:3], call.value.shape[3]))
    if output.numel() == 0 or call.key.numel() == 0:
        return output.zero_()
    if prefix > 0:
        output[:, :, :prefix] = routed.attend(_densely(call))
    if queries > prefix:
        problem = _Problem(call)
        _forward[problem.grid](
            matrix(call.query), matrix(call.key), matrix(call.value), *problem.keys, *problem.moments, problem.words,
            *problem.lists, rows_of(output), *problem.sizes, problem.count, **problem.options, **_far_options(call),
        )  # fmt: skip
    return output


def gradients(call: MultipoleCall, grad_output: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of query, key and value; those of keys and values in float32."""
    prefix, queries = call.num_prefix_tokens, call.query.shape[2]
    grad_query = heads_last(call.query, tuple(call.query.shape))
    grad_key, grad_value = (t.new_zeros(t.shape, dtype=torch.float32) for t in (call.key, call.value))
    if call.query.numel() == 0 or call.key.numel() == 0:
        return grad_query.zero_(), grad_key, grad_value
    if queries > prefix:
        _gradients_behind_the_prefix(call, grad_output, grad_query, grad_key, grad_value)
    if prefix > 0:
        found = routed.gradients(_densely(call), grad_output[:, :, :prefix], torch.float32)
        grad_query[:, :, :prefix] = found[0]
        grad_key += found[1]
        grad_value += found[2]
    return grad_query, grad_key, grad_value


def _gradients_behind_the_prefix(
    call: MultipoleCall, grad_output: Tensor, grad_query: Tensor, grad_key: Tensor, grad_value: Tensor
) -> None:
    """Fill in the queries' gradients and add to those of keys and values."""
    problem = _Problem(call)
    batch, heads, queries, _ = call.query.shape
    key_heads, clusters = call.key.shape[1], call.num_clusters
    rows = queries - call.num_prefix_tokens
    lse, mean = (call.query.new_empty((batch, heads, rows), dtype=torch.float32) for _ in range(2))
    inputs = (matrix(call.query), matrix(call.key), matrix(call.value))
    states = (matrix(grad_output), rows_of(lse), rows_of(mean))
    _backward_queries[problem.grid](
        *inputs, *problem.keys, *problem.moments, problem.words, *problem.lists, states[0], rows_of(grad_query),
        *states[1:], *problem.sizes, problem.count, **problem.options, **_far_options(call),
    )  # fmt: skip
    # For each cluster the tiles that resolve it; and all tiles for the prefix, of which there is no list.
    lists, counts = compacted(problem.tiles.union.transpose(2, 3))
    _backward_keys[(batch * key_heads * (clusters + 1),)](
        *inputs, *problem.keys, problem.words, rows_of(problem.tiles.order), rows_of(lists), rows_of(counts), *states,
        rows_of(grad_key), rows_of(grad_value), *problem.sizes, problem.count, **problem.options,
    )  # fmt: skip
    if clusters == 0:
        return
    field = problem.clusters.field
    grads = torch.empty_like(field.key), torch.zeros_like(field.variance), torch.empty_like(field.value)
    tiles = triton.cdiv(clusters, problem.options["COLUMNS"])
    _backward_clusters[(batch * key_heads * tiles,)](
        inputs[0], *problem.moments, problem.words, *states, *(rows_of(t) for t in grads),
        *problem.sizes, tiles, **problem.options, **_far_options(call),
    )  # fmt: skip
    add_from_moments(call, field, grads, grad_key, grad_value)


def _checked(call: MultipoleCall) -> MultipoleCall:
    if refusal := beyond_triton(call):
        raise ValueError(f"{refusal.reason}; multipole_attention and multipole_attention_blocks take it")
    return call


def forward(*operands: Any) -> Tensor:
    """What `regard::multipole_attention` takes and returns."""
    return attend(_checked(MultipoleCall(*operands)))


def backward(grad_output: Tensor, *operands: Any) -> tuple[Tensor, ...]:
    """What `regard::multipole_attention_backward` takes and returns."""
    call = _checked(MultipoleCall(*operands))
    grad_query, *grads = gradients(call, grad_output)
    like = (call.key, call.value)
    return grad_query, *(heads_last(t, tuple(t.shape)).copy_(grad) for t, grad in zip(like, grads, strict=True))
