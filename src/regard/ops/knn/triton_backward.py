"""The backward of k-NN attention in Triton: the forward's logits again, and its selection from the saved state.

Every gradient is summed by one program in one order, without atomics: those of queries by row blocks, those of keys and
values by key blocks, which visit all rows, and a mask's by what it was broadcast to.

A row's weights are exp(logit - lse) times `inverse`, one over their sum: the rounding of a large log-sum-exp would
otherwise be every weight's error. `delta` is the row's sum of weight times its gradient, over the kept keys: as exact
as the terms, which dot(output, its gradient) is not.
"""

import triton
import triton.language as tl

from regard.ops.knn.triton_logits import kept_again, load_tile, logits_of_tile, mask_of, store_tile

__all__ = ["keys_kernel", "mask_kernel", "rows_kernel"]


@triton.jit
def _state(place, inside, lse, kth_logit, last_tie):
    """Of each row; rows beyond the last keep nothing."""
    return (
        tl.load(lse + place, mask=inside, other=0.0),
        tl.load(kth_logit + place, mask=inside, other=float("inf")),
        tl.load(last_tie + place, mask=inside, other=-1),
    )


@triton.jit(do_not_specialize=["heads", "groups", "queries", "keys"])
def rows_kernel(
    query,
    key,
    value,
    mask,
    grad_output,
    lse,
    kth_logit,
    last_tie,
    grad_query,
    inverse,  # (B, H, N) float32, written
    delta,  # (B, H, N) float32, written
    query_b,
    query_h,
    query_n,
    query_d,
    key_b,
    key_h,
    key_m,
    key_d,
    value_b,
    value_h,
    value_m,
    value_d,
    grad_b,
    grad_h,
    grad_n,
    grad_d,
    out_b,
    out_h,
    out_n,
    out_d,
    mask_b,
    mask_h,
    mask_n,
    mask_m,
    heads,
    groups,
    queries,
    keys,
    scale,
    DIM: tl.constexpr,
    DIM_BLOCK: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    VALUE_BLOCK: tl.constexpr,
    MASK: tl.constexpr,
    CAUSAL: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
):
    """grad_query, and what the other gradients need of each row."""
    blocks = tl.cdiv(queries, ROWS)
    plane = tl.program_id(0) // blocks
    first = tl.program_id(0) % blocks * ROWS
    rows = first + tl.arange(0, ROWS)
    batch, head = (plane // heads).to(tl.int64), (plane % heads).to(tl.int64)
    q = load_tile(query + batch * query_b + head * query_h, rows, queries, query_n, query_d, DIM, DIM_BLOCK)
    go = load_tile(grad_output + batch * grad_b + head * grad_h, rows, queries, grad_n, grad_d, VALUE_DIM, VALUE_BLOCK)
    key += batch * key_b + head // groups * key_h
    value += batch * value_b + head // groups * value_h
    held = mask_of(mask, batch, head, mask_b, mask_h, MASK)
    limit = tl.minimum(keys, first + ROWS) if CAUSAL else keys
    place = plane.to(tl.int64) * queries + rows
    inside = rows < queries
    shift, kth, tie = _state(place, inside, lse, kth_logit, last_tie)

    total = tl.zeros([ROWS], tl.float32)
    mean = tl.zeros([ROWS], tl.float32)
    for start in range(0, limit, KEYS):
        columns = start + tl.arange(0, KEYS)
        k = load_tile(key, columns, keys, key_m, key_d, DIM, DIM_BLOCK)
        s = logits_of_tile(q, k, rows, columns, queries, keys, scale, held, mask_n, mask_m, MASK, CAUSAL)
        kept = kept_again(s, rows, columns, keys, kth, tie, CAUSAL)
        v = load_tile(value, columns, keys, value_m, value_d, VALUE_DIM, VALUE_BLOCK)
        grad_weights = tl.dot(go, tl.trans(v), input_precision="ieee")
        weights = tl.where(kept, tl.exp(s - shift[:, None]), 0.0)
        total += tl.sum(weights, axis=1)
        mean += tl.sum(tl.where(kept, weights * grad_weights, 0.0), axis=1)
    one_over = tl.where(total == 0.0, 0.0, 1.0 / total)
    mean *= one_over
    tl.store(inverse + place, one_over, mask=inside)
    tl.store(delta + place, mean, mask=inside)

    gradient = tl.zeros([ROWS, DIM_BLOCK], tl.float32)
    for start in range(0, limit, KEYS):
        columns = start + tl.arange(0, KEYS)
        k = load_tile(key, columns, keys, key_m, key_d, DIM, DIM_BLOCK)
        s = logits_of_tile(q, k, rows, columns, queries, keys, scale, held, mask_n, mask_m, MASK, CAUSAL)
        kept = kept_again(s, rows, columns, keys, kth, tie, CAUSAL)
        v = load_tile(value, columns, keys, value_m, value_d, VALUE_DIM, VALUE_BLOCK)
        grad_weights = tl.dot(go, tl.trans(v), input_precision="ieee")
        weights = tl.exp(s - shift[:, None]) * one_over[:, None]
        grad_logits = tl.where(kept, weights * (grad_weights - mean[:, None]), 0.0)
        gradient = tl.dot(grad_logits.to(k.dtype), k, gradient, input_precision="ieee")
    grad_query += batch * out_b + head * out_h
    store_tile(grad_query, rows, queries, out_n, out_d, gradient * scale, DIM, DIM_BLOCK)


@triton.jit(do_not_specialize=["key_heads", "groups", "queries", "keys"])
def keys_kernel(
    query,
    key,
    value,
    mask,
    grad_output,
    lse,
    kth_logit,
    last_tie,
    inverse,
    delta,
    grad_key,
    grad_value,
    query_b,
    query_h,
    query_n,
    query_d,
    key_b,
    key_h,
    key_m,
    key_d,
    value_b,
    value_h,
    value_m,
    value_d,
    grad_b,
    grad_h,
    grad_n,
    grad_d,
    out_key_b,
    out_key_h,
    out_key_m,
    out_key_d,
    out_value_b,
    out_value_h,
    out_value_m,
    out_value_d,
    mask_b,
    mask_h,
    mask_n,
    mask_m,
    key_heads,
    groups,
    queries,
    keys,
    scale,
    DIM: tl.constexpr,
    DIM_BLOCK: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    VALUE_BLOCK: tl.constexpr,
    MASK: tl.constexpr,
    CAUSAL: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
):
    """grad_key and grad_value of one block of keys, over all rows of all query heads that share them."""
    blocks = tl.cdiv(keys, KEYS)
    plane = tl.program_id(0) // blocks
    start = tl.program_id(0) % blocks * KEYS
    columns = start + tl.arange(0, KEYS)
    batch, key_head = (plane // key_heads).to(tl.int64), (plane % key_heads).to(tl.int64)
    k = load_tile(key + batch * key_b + key_head * key_h, columns, keys, key_m, key_d, DIM, DIM_BLOCK)
    v = load_tile(value + batch * value_b + key_head * value_h, columns, keys, value_m, value_d, VALUE_DIM, VALUE_BLOCK)
    of_keys = tl.zeros([KEYS, DIM_BLOCK], tl.float32)
    of_values = tl.zeros([KEYS, VALUE_BLOCK], tl.float32)
    earliest = start // ROWS * ROWS if CAUSAL else 0
    for group in range(0, groups):
        head = key_head * groups + group
        held = mask_of(mask, batch, head, mask_b, mask_h, MASK)
        before = (batch * key_heads * groups + head) * queries
        for first in range(earliest, queries, ROWS):
            rows = first + tl.arange(0, ROWS)
            inside = rows < queries
            q = load_tile(query + batch * query_b + head * query_h, rows, queries, query_n, query_d, DIM, DIM_BLOCK)
            go = load_tile(
                grad_output + batch * grad_b + head * grad_h, rows, queries, grad_n, grad_d, VALUE_DIM, VALUE_BLOCK
            )
            shift, kth, tie = _state(before + rows, inside, lse, kth_logit, last_tie)
            one_over = tl.load(inverse + before + rows, mask=inside, other=0.0)
            mean = tl.load(delta + before + rows, mask=inside, other=0.0)
            s = logits_of_tile(q, k, rows, columns, queries, keys, scale, held, mask_n, mask_m, MASK, CAUSAL)
            kept = kept_again(s, rows, columns, keys, kth, tie, CAUSAL)
            weights = tl.where(kept, tl.exp(s - shift[:, None]) * one_over[:, None], 0.0)
            of_values = tl.dot(tl.trans(weights.to(go.dtype)), go, of_values, input_precision="ieee")
            grad_weights = tl.dot(go, tl.trans(v), input_precision="ieee")
            grad_logits = tl.where(kept, weights * (grad_weights - mean[:, None]), 0.0)
            of_keys = tl.dot(tl.trans(grad_logits.to(q.dtype)), q, of_keys, input_precision="ieee")
    grad_key += batch * out_key_b + key_head * out_key_h
    store_tile(grad_key, columns, keys, out_key_m, out_key_d, of_keys * scale, DIM, DIM_BLOCK)
    grad_value += batch * out_value_b + key_head * out_value_h
    store_tile(grad_value, columns, keys, out_value_m, out_value_d, of_values, VALUE_DIM, VALUE_BLOCK)


@triton.jit(do_not_specialize=["batches", "heads", "groups", "queries", "keys"])
def mask_kernel(
    query,
    key,
    value,
    mask,
    grad_output,
    lse,
    kth_logit,
    last_tie,
    inverse,
    delta,
    grad_mask,  # contiguous
    query_b,
    query_h,
    query_n,
    query_d,
    key_b,
    key_h,
    key_m,
    key_d,
    value_b,
    value_h,
    value_m,
    value_d,
    grad_b,
    grad_h,
    grad_n,
    grad_d,
    mask_b,
    mask_h,
    mask_n,
    mask_m,
    batches,
    heads,
    groups,
    queries,
    keys,
    scale,
    DIM: tl.constexpr,
    DIM_BLOCK: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    VALUE_BLOCK: tl.constexpr,
    ALL_BATCHES: tl.constexpr,  # the mask has size 1 along that dimension: sum over it
    ALL_HEADS: tl.constexpr,
    ALL_ROWS: tl.constexpr,
    ALL_KEYS: tl.constexpr,
    CAUSAL: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
):
    """A float mask's gradient: the logits' own, summed over what the mask was broadcast to, tile upon tile."""
    row_tiles = 1 if ALL_ROWS else tl.cdiv(queries, ROWS)
    key_tiles = 1 if ALL_KEYS else tl.cdiv(keys, KEYS)
    tile = tl.program_id(0)
    first_key = tile % key_tiles * KEYS
    first_row = tile // key_tiles % row_tiles * ROWS
    plane = tile // (key_tiles * row_tiles)
    mask_heads = 1 if ALL_HEADS else heads
    first_batch, first_head = plane // mask_heads, plane % mask_heads
    last_batch = batches if ALL_BATCHES else first_batch + 1
    last_head = heads if ALL_HEADS else first_head + 1
    last_row = queries if ALL_ROWS else first_row + 1
    last_key = keys if ALL_KEYS else first_key + 1

    summed = tl.zeros([ROWS, KEYS], tl.float32)
    for b in range(first_batch, last_batch):
        for h in range(first_head, last_head):
            batch, head = tl.cast(b, tl.int64), tl.cast(h, tl.int64)
            held = mask_of(mask, batch, head, mask_b, mask_h, 2)
            before = (batch * heads + head) * queries
            for first in range(first_row, last_row, ROWS):
                rows = first + tl.arange(0, ROWS)
                inside = rows < queries
                q = load_tile(query + batch * query_b + head * query_h, rows, queries, query_n, query_d, DIM, DIM_BLOCK)
                go = load_tile(
                    grad_output + batch * grad_b + head * grad_h, rows, queries, grad_n, grad_d, VALUE_DIM, VALUE_BLOCK
                )
                shift, kth, tie = _state(before + rows, inside, lse, kth_logit, last_tie)
                one_over = tl.load(inverse + before + rows, mask=inside, other=0.0)
                mean = tl.load(delta + before + rows, mask=inside, other=0.0)
                for start in range(first_key, last_key, KEYS):
                    columns = start + tl.arange(0, KEYS)
                    of_key = key + batch * key_b + head // groups * key_h
                    k = load_tile(of_key, columns, keys, key_m, key_d, DIM, DIM_BLOCK)
                    of_value = value + batch * value_b + head // groups * value_h
                    v = load_tile(of_value, columns, keys, value_m, value_d, VALUE_DIM, VALUE_BLOCK)
                    s = logits_of_tile(q, k, rows, columns, queries, keys, scale, held, mask_n, mask_m, 2, CAUSAL)
                    kept = kept_again(s, rows, columns, keys, kth, tie, CAUSAL)
                    grad_weights = tl.dot(go, tl.trans(v), input_precision="ieee")
                    weights = tl.exp(s - shift[:, None]) * one_over[:, None]
                    summed += tl.where(kept, weights * (grad_weights - mean[:, None]), 0.0)

    grad_mask += plane.to(tl.int64) * (1 if ALL_ROWS else queries) * (1 if ALL_KEYS else keys)
    rows = first_row + tl.arange(0, ROWS)
    columns = first_key + tl.arange(0, KEYS)
    if ALL_ROWS:
        along = tl.sum(summed, axis=0)
        if ALL_KEYS:
            tl.store(grad_mask, tl.sum(along, axis=0))
        else:
            tl.store(grad_mask + columns, along, mask=columns < keys)
    else:
        if ALL_KEYS:
            tl.store(grad_mask + rows, tl.sum(summed, axis=1), mask=rows < queries)
        else:
            places = grad_mask + rows.to(tl.int64)[:, None] * keys + columns[None, :]
            tl.store(places, summed, mask=(rows < queries)[:, None] & (columns < keys)[None, :])
