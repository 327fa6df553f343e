"""The forward of k-NN attention in Triton: find each row's threshold, then softmax over what reaches it.

No buffer of N x M: every pass computes the logits again, tile by tile, and they are the same in each
(see triton_logits). `select_kernel` brackets the k-th logit of each row between two floats, lo and hi, with the counts
of logits that reach them, until the count at lo is exactly k, or no float lies between them: then the ties at lo are
kept in the order of the keys. Its passes:

- a sample of the keys, for a first guess;
- counting at four thresholds, first around the guess, then where the counts put the k-th logit; each fourth time the
  floats in the bracket, in their order as integers, are cut in five equal parts, so that no distribution needs more
  than about 50 passes;
- once few logits are left in every row's bracket, or counting leads nowhere, a pass that collects them: each lane of a
  tile keeps the three largest below hi that it meets, and the k-th is found among those on chip. What a lane missed is
  at most its third: counts above that are certain, and so are all if as many were found as the bracket holds. If they
  are not, what was found is counted next.

`attend_kernel` is then one pass of softmax and values, with the row's maximum known beforehand.
"""

import triton
import triton.language as tl

from regard.ops.knn.triton_logits import LOWEST, load_tile, logits_of_tile, mask_of, ordered, real, store_tile

__all__ = ["attend_kernel", "select_kernel"]

SAMPLES = tl.constexpr(4)  # tiles of sampled keys
NO_HINT = tl.constexpr(-(1 << 40))
ALL_TIES = tl.constexpr(2147483647)


@triton.jit
def _count(s, threshold):
    return tl.sum((s >= threshold[:, None]).to(tl.int32), axis=1)


@triton.jit
def _reaching(s, low, high, wanted):
    """A threshold that about `wanted` of each row's logits reach; `low` and `high` bound them."""
    for _ in range(8):
        middle = 0.5 * low + 0.5 * high
        enough = _count(s, middle) >= wanted
        low = tl.where(enough, middle, low)
        high = tl.where(enough, high, middle)
    return 0.5 * low + 0.5 * high


@triton.jit
def _narrowed(lo, at_lo, hi, at_hi, threshold, count, topk):
    """The bracket after `count` logits were found to reach `threshold`; unchanged if that is not inside (or NaN)."""
    inside = (threshold > lo) & (threshold < hi)
    raised = inside & (count >= topk)
    lowered = inside & (count < topk)
    lo = tl.where(raised, threshold, lo)
    at_lo = tl.where(raised, count, at_lo)
    hi = tl.where(lowered, threshold, hi)
    at_hi = tl.where(lowered, count, at_hi)
    return lo, at_lo, hi, at_hi


@triton.jit
def _inside(threshold, lo, hi):
    return tl.minimum(tl.maximum(threshold, lo + 1), hi - 1)


@triton.jit
def _next_thresholds(lo, at_lo, hi, at_hi, hint, topk, EVEN_PARTS):
    """Four thresholds strictly inside each row's bracket, as ordered integers."""
    fifth = (hi - lo) // 5
    t1, t2, t3, t4 = lo + fifth, lo + 2 * fifth, lo + 3 * fifth, lo + 4 * fifth
    # Logits are taken to lie evenly between lo and hi. Of c the k-th then lies where it should, give or take a standard
    # deviation of at most sqrt(c) / 2 places; three to either side are covered, since the rows of a block wait for all.
    low, high = real(lo), real(hi)
    left = (at_lo - at_hi).to(tl.float32)
    place = ((at_lo - topk).to(tl.float32) + 0.5) / left
    step = 0.5 / tl.sqrt(left)
    width = high - low
    even = (width != width) | (width == float("inf")) | EVEN_PARTS
    t1 = tl.where(even, t1, ordered(low + (place - 3.0 * step) * width))
    t2 = tl.where(even, t2, ordered(low + (place - step) * width))
    t3 = tl.where(even, t3, ordered(low + (place + step) * width))
    t4 = tl.where(even, t4, ordered(low + (place + 3.0 * step) * width))
    # A logit that may be the k-th itself: count what reaches it and what exceeds it. Ties end here.
    hinted = hint != NO_HINT
    t2 = tl.where(hinted, hint, t2)
    t3 = tl.where(hinted, hint + 1, t3)
    return _inside(t1, lo, hi), _inside(t2, lo, hi), _inside(t3, lo, hi), _inside(t4, lo, hi)


@triton.jit
def _count_slots(first, second, third, threshold):
    return _count(first, threshold) + _count(second, threshold) + _count(third, threshold)


@triton.jit
def _narrowed_by_slots(first, second, third, lo, at_lo, hi, at_hi, done, topk):
    """The bracket after collecting each lane's three largest below hi, and a hint for the rows that are not settled."""
    found = _count_slots(first, second, third, real(lo))
    wanted = topk - at_hi
    a, at_a = lo, found
    b, at_b = hi, tl.zeros_like(found)
    searching = (~done) & (b - a > 1) & (at_a > wanted)
    while tl.max(searching.to(tl.int32), axis=0) > 0:
        middle = a + (b - a) // 2
        count = _count_slots(first, second, third, real(middle))
        enough = searching & (count >= wanted)
        short = searching & (count < wanted)
        a = tl.where(enough, middle, a)
        at_a = tl.where(enough, count, at_a)
        b = tl.where(short, middle, b)
        at_b = tl.where(short, count, at_b)
        searching = searching & (b - a > 1) & (at_a > wanted)
    certain = ordered(tl.max(third, axis=1)) + 1
    at_certain = at_hi + _count_slots(first, second, third, real(certain))
    from_a = real(a)[:, None]
    candidates = tl.minimum(
        tl.where(third >= from_a, third, float("inf")),
        tl.minimum(tl.where(second >= from_a, second, float("inf")), tl.where(first >= from_a, first, float("inf"))),
    )
    candidate = ordered(tl.min(candidates, axis=1))
    whole = (found == at_lo - at_hi) | (a >= certain)
    nowhere = lo - 1
    below, above = tl.where(whole, a, nowhere), tl.where(whole, b, nowhere)
    at_below, at_above = at_hi + at_a, at_hi + at_b
    lo, at_lo, hi, at_hi = _narrowed(lo, at_lo, hi, at_hi, certain, at_certain, topk)
    lo, at_lo, hi, at_hi = _narrowed(lo, at_lo, hi, at_hi, below, at_below, topk)
    lo, at_lo, hi, at_hi = _narrowed(lo, at_lo, hi, at_hi, above, at_above, topk)
    return lo, at_lo, hi, at_hi, tl.where(whole | done, NO_HINT, candidate)


@triton.jit(do_not_specialize=["heads", "groups", "queries", "keys", "topk"])
def select_kernel(
    query,
    key,
    mask,
    threshold,  # (B, H, N) float32: all logits above it are kept; -inf where all allowed keys are
    room,  # (B, H, N) int32: and so many of those that equal it
    largest,  # (B, H, N) float32: the row's maximum; NaN where a logit is NaN or +inf
    query_b,
    query_h,
    query_n,
    query_d,
    key_b,
    key_h,
    key_m,
    key_d,
    mask_b,
    mask_h,
    mask_n,
    mask_m,
    heads,
    groups,
    queries,
    keys,
    topk,
    scale,
    DIM: tl.constexpr,
    DIM_BLOCK: tl.constexpr,
    MASK: tl.constexpr,
    CAUSAL: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
):
    blocks = tl.cdiv(queries, ROWS)
    plane = tl.program_id(0) // blocks
    first = tl.program_id(0) % blocks * ROWS
    rows = first + tl.arange(0, ROWS)
    batch, head = (plane // heads).to(tl.int64), (plane % heads).to(tl.int64)
    q = load_tile(query + batch * query_b + head * query_h, rows, queries, query_n, query_d, DIM, DIM_BLOCK)
    key += batch * key_b + head // groups * key_h
    held = mask_of(mask, batch, head, mask_b, mask_h, MASK)
    limit = tl.minimum(keys, first + ROWS) if CAUSAL else keys
    lanes = tl.arange(0, KEYS)

    # A first guess, from a sample of the keys: one and three standard deviations of its count to either side.
    upper = tl.zeros([ROWS], tl.float32)
    lower = tl.zeros([ROWS], tl.float32)
    if topk < limit:
        wanted = topk.to(tl.float32) * KEYS / limit
        deviation = tl.maximum(tl.sqrt(wanted * (1.0 - tl.minimum(wanted / KEYS, 1.0))), 1.0)
        for sample in range(SAMPLES):
            columns = (lanes * SAMPLES + sample) * limit // (KEYS * SAMPLES)
            k = load_tile(key, columns, keys, key_m, key_d, DIM, DIM_BLOCK)
            s = logits_of_tile(q, k, rows, columns, queries, keys, scale, held, mask_n, mask_m, MASK, CAUSAL)
            high = tl.max(s, axis=1)
            low = tl.min(tl.where(s >= LOWEST, s, float("inf")), axis=1)
            upper += _reaching(s, low, high, wanted - deviation) / SAMPLES
            lower += _reaching(s, low, high, wanted + deviation) / SAMPLES
    middle, step = 0.5 * (upper + lower), 0.25 * (upper - lower)
    u1, u2, u3, u4 = middle - 3.0 * step, middle - step, middle + step, middle + 3.0 * step

    # All keys: how many are allowed, their extremes, and the first counts.
    n1 = tl.zeros([ROWS], tl.int32)
    n2 = tl.zeros([ROWS], tl.int32)
    n3 = tl.zeros([ROWS], tl.int32)
    n4 = tl.zeros([ROWS], tl.int32)
    allowed = tl.zeros([ROWS], tl.int32)
    broken = tl.zeros([ROWS], tl.int32)
    most = tl.full([ROWS], float("-inf"), tl.float32)
    least = tl.full([ROWS], float("inf"), tl.float32)
    for start in range(0, limit, KEYS):
        columns = start + lanes
        k = load_tile(key, columns, keys, key_m, key_d, DIM, DIM_BLOCK)
        s = logits_of_tile(q, k, rows, columns, queries, keys, scale, held, mask_n, mask_m, MASK, CAUSAL)
        seen = s >= LOWEST
        allowed += tl.sum(seen.to(tl.int32), axis=1)
        broken += tl.sum((s < float("inf")).to(tl.int32), axis=1) - KEYS  # not below it: +inf or NaN
        most = tl.maximum(most, tl.max(s, axis=1))
        least = tl.minimum(least, tl.min(tl.where(seen, s, float("inf")), axis=1))
        n1 += _count(s, u1)
        n2 += _count(s, u2)
        n3 += _count(s, u3)
        n4 += _count(s, u4)

    settled = (rows >= queries) | (broken != 0) | (allowed <= topk)
    lo, hi = ordered(least), ordered(most) + 1
    at_lo, at_hi = allowed, tl.zeros_like(allowed)
    lo, at_lo, hi, at_hi = _narrowed(lo, at_lo, hi, at_hi, ordered(u1), n1, topk)
    lo, at_lo, hi, at_hi = _narrowed(lo, at_lo, hi, at_hi, ordered(u2), n2, topk)
    lo, at_lo, hi, at_hi = _narrowed(lo, at_lo, hi, at_hi, ordered(u3), n3, topk)
    lo, at_lo, hi, at_hi = _narrowed(lo, at_lo, hi, at_hi, ordered(u4), n4, topk)

    hint = tl.full([ROWS], NO_HINT, tl.int64)
    turn = 0
    collected = 0
    widest_before = keys + keys + 1
    done = settled | (at_lo == topk) | (hi - lo <= 1)
    while tl.min(done.to(tl.int32), axis=0) == 0:
        widest = tl.max(tl.where(done, 0, at_lo - at_hi), axis=0)
        # Many ties are never few, and counting does not part them: collecting shows their value, to be counted next.
        few = (widest <= KEYS // 4) | (limit <= 3 * KEYS) | (2 * widest > widest_before)
        if (~few) | (collected == 1):
            widest_before = widest
            t1, t2, t3, t4 = _next_thresholds(lo, at_lo, hi, at_hi, hint, topk, turn % 4 == 3)
            turn += 1
            collected = 0
            u1, u2, u3, u4 = real(t1), real(t2), real(t3), real(t4)
            n1 = tl.zeros([ROWS], tl.int32)
            n2 = tl.zeros([ROWS], tl.int32)
            n3 = tl.zeros([ROWS], tl.int32)
            n4 = tl.zeros([ROWS], tl.int32)
            for start in range(0, limit, KEYS):
                columns = start + lanes
                k = load_tile(key, columns, keys, key_m, key_d, DIM, DIM_BLOCK)
                s = logits_of_tile(q, k, rows, columns, queries, keys, scale, held, mask_n, mask_m, MASK, CAUSAL)
                n1 += _count(s, u1)
                n2 += _count(s, u2)
                n3 += _count(s, u3)
                n4 += _count(s, u4)
            lo, at_lo, hi, at_hi = _narrowed(lo, at_lo, hi, at_hi, t1, n1, topk)
            lo, at_lo, hi, at_hi = _narrowed(lo, at_lo, hi, at_hi, t2, n2, topk)
            lo, at_lo, hi, at_hi = _narrowed(lo, at_lo, hi, at_hi, t3, n3, topk)
            lo, at_lo, hi, at_hi = _narrowed(lo, at_lo, hi, at_hi, t4, n4, topk)
            hint = tl.full([ROWS], NO_HINT, tl.int64)
        else:
            collected = 1
            top = real(hi)
            first_of_lane = tl.full([ROWS, KEYS], float("-inf"), tl.float32)
            second_of_lane = tl.full([ROWS, KEYS], float("-inf"), tl.float32)
            third_of_lane = tl.full([ROWS, KEYS], float("-inf"), tl.float32)
            for start in range(0, limit, KEYS):
                columns = start + lanes
                k = load_tile(key, columns, keys, key_m, key_d, DIM, DIM_BLOCK)
                s = logits_of_tile(q, k, rows, columns, queries, keys, scale, held, mask_n, mask_m, MASK, CAUSAL)
                x = tl.where(s < top[:, None], s, float("-inf"))
                smaller = tl.minimum(first_of_lane, x)
                first_of_lane = tl.maximum(first_of_lane, x)
                smallest = tl.minimum(second_of_lane, smaller)
                second_of_lane = tl.maximum(second_of_lane, smaller)
                third_of_lane = tl.maximum(third_of_lane, smallest)
            lo, at_lo, hi, at_hi, hint = _narrowed_by_slots(
                first_of_lane, second_of_lane, third_of_lane, lo, at_lo, hi, at_hi, done, topk
            )
        done = settled | (at_lo == topk) | (hi - lo <= 1)

    place = plane.to(tl.int64) * queries + rows
    inside = rows < queries
    tl.store(threshold + place, tl.where(settled, float("-inf"), real(lo)), mask=inside)
    tl.store(room + place, tl.where(settled | (at_lo == topk), ALL_TIES, topk - at_hi), mask=inside)
    tl.store(largest + place, tl.where(broken != 0, float("nan"), most), mask=inside)


@triton.jit(do_not_specialize=["heads", "groups", "queries", "keys"])
def attend_kernel(
    query,
    key,
    value,
    mask,
    threshold,
    room,
    largest,
    output,
    lse,
    kth_logit,
    last_tie,
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
    output_b,
    output_h,
    output_n,
    output_d,
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
    blocks = tl.cdiv(queries, ROWS)
    plane = tl.program_id(0) // blocks
    first = tl.program_id(0) % blocks * ROWS
    rows = first + tl.arange(0, ROWS)
    batch, head = (plane // heads).to(tl.int64), (plane % heads).to(tl.int64)
    q = load_tile(query + batch * query_b + head * query_h, rows, queries, query_n, query_d, DIM, DIM_BLOCK)
    key += batch * key_b + head // groups * key_h
    value += batch * value_b + head // groups * value_h
    held = mask_of(mask, batch, head, mask_b, mask_h, MASK)
    limit = tl.minimum(keys, first + ROWS) if CAUSAL else keys
    lanes = tl.arange(0, KEYS)

    place = plane.to(tl.int64) * queries + rows
    inside = rows < queries
    kept_from = tl.load(threshold + place, mask=inside, other=float("inf"))
    places_left = tl.load(room + place, mask=inside, other=ALL_TIES)
    most = tl.load(largest + place, mask=inside, other=0.0)
    whole = kept_from == float("-inf")
    kept_from = tl.maximum(kept_from, LOWEST)  # hidden keys are never kept
    has_ties = tl.min(places_left, axis=0) < ALL_TIES

    mixed = tl.zeros([ROWS, VALUE_BLOCK], tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    tied_before = tl.zeros([ROWS], tl.int32)
    # Of each lane, the least kept logit and the last key that has it.
    least = tl.full([ROWS, KEYS], float("inf"), tl.float32)
    holder = tl.full([ROWS, KEYS], -1, tl.int32)
    for start in range(0, limit, KEYS):
        columns = start + lanes
        k = load_tile(key, columns, keys, key_m, key_d, DIM, DIM_BLOCK)
        s = logits_of_tile(q, k, rows, columns, queries, keys, scale, held, mask_n, mask_m, MASK, CAUSAL)
        kept = s >= kept_from[:, None]
        if has_ties:
            tied = s == kept_from[:, None]
            order = tied_before[:, None] + tl.cumsum(tied.to(tl.int32), axis=1)
            kept = kept & ((s > kept_from[:, None]) | (order <= places_left[:, None]))
            tied_before += tl.sum(tied.to(tl.int32), axis=1)
        x = tl.where(kept, s, float("inf"))
        holder = tl.where(x <= least, columns[None, :], holder)
        least = tl.minimum(least, x)
        weights = tl.where(kept, tl.exp(s - most[:, None]), 0.0)
        total += tl.sum(weights, axis=1)
        v = load_tile(value, columns, keys, value_m, value_d, VALUE_DIM, VALUE_BLOCK)
        mixed = tl.dot(weights.to(v.dtype), v, mixed, input_precision="ieee")

    broken = most != most
    nothing = (total == 0.0) & ~broken  # a row that keeps a key keeps its largest, whose weight is 1
    total = tl.where(broken, float("nan"), tl.where(nothing, 1.0, total))
    output += batch * output_b + head * output_h
    store_tile(output, rows, queries, output_n, output_d, mixed / total[:, None], VALUE_DIM, VALUE_BLOCK)
    tl.store(lse + place, tl.where(nothing, float("-inf"), most + tl.log(total)), mask=inside)
    kth = tl.min(least, axis=1)
    tie = tl.max(tl.where(least == kth[:, None], holder, -1), axis=1)
    kth = tl.where(whole, float("-inf"), kth)
    tl.store(kth_logit + place, tl.where(broken, float("nan"), kth), mask=inside)
    tl.store(last_tie + place, tl.where(whole | broken, -1, tie), mask=inside)
