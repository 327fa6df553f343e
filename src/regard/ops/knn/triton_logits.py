"""What the Triton kernels of k-NN attention share: a tile's logits, and floats in their order as integers.

Forward and backward must select the same keys, so they must compute the same logits, bit for bit. All kernels therefore
call `logits_of_tile` with tiles of the same shape, in the same orientation (rows are queries), with the same number of
warps: one product over the whole head_dim, of one kind of instruction, in one order. float32 is multiplied in float32
("ieee", no TF32), and kernels are launched without fusing multiplications and additions (enable_fp_fusion=False), which
a compiler would do in one place and not in another.
"""

import triton
import triton.language as tl

__all__ = ["LOWEST", "kept_again", "load_tile", "logits_of_tile", "mask_of", "ordered", "real", "store_tile"]

LOWEST = tl.constexpr(-3.4028234663852886e38)  # the least finite float32: all above are allowed keys


@triton.jit
def load_tile(base, rows, count, row_stride, channel_stride, DIM: tl.constexpr, BLOCK: tl.constexpr):
    """[rows, BLOCK] of (count, DIM) values; zero beyond."""
    channels = tl.arange(0, BLOCK)
    places = base + rows.to(tl.int64)[:, None] * row_stride + channels.to(tl.int64)[None, :] * channel_stride
    return tl.load(places, mask=(rows < count)[:, None] & (channels < DIM)[None, :], other=0.0)


@triton.jit
def store_tile(base, rows, count, row_stride, channel_stride, tile, DIM: tl.constexpr, BLOCK: tl.constexpr):
    """The inverse of `load_tile`, in the memory's dtype."""
    channels = tl.arange(0, BLOCK)
    places = base + rows.to(tl.int64)[:, None] * row_stride + channels.to(tl.int64)[None, :] * channel_stride
    tl.store(places, tile.to(base.dtype.element_ty), mask=(rows < count)[:, None] & (channels < DIM)[None, :])


@triton.jit
def mask_of(mask, batch, head, batch_stride, head_stride, MASK: tl.constexpr):
    """Where the mask of a head begins."""
    return mask + batch * batch_stride + head * head_stride if MASK else 0


@triton.jit
def logits_of_tile(
    q,
    k,
    rows,
    columns,
    queries,
    keys,
    scale,
    mask,
    mask_row_stride,
    mask_column_stride,
    MASK: tl.constexpr,
    CAUSAL: tl.constexpr,
):
    """[rows, columns] scaled logits after bias and masks, float32; hidden keys and those beyond the last are -inf.

    MASK: 0 none, 1 boolean (bytes), 2 float32.
    """
    s = tl.dot(q, tl.trans(k), input_precision="ieee") * scale
    inside = (columns < keys)[None, :]
    if MASK:
        places = (
            mask + rows.to(tl.int64)[:, None] * mask_row_stride + columns.to(tl.int64)[None, :] * mask_column_stride
        )
        held = tl.load(places, mask=(rows < queries)[:, None] & inside, other=0)
        if MASK == 1:
            inside = inside & (held != 0)
        else:
            s = s + held
    if CAUSAL:
        inside = inside & (columns[None, :] <= rows[:, None])
    return tl.where(inside, s, float("-inf"))


@triton.jit
def kept_again(s, rows, columns, keys, kth, tie, CAUSAL: tl.constexpr):
    """[rows, columns]: the keys that the forward kept. Of a row that holds NaN, whose k-th logit is NaN: all it saw."""
    kept = (s > kth[:, None]) | ((s == kth[:, None]) & (columns[None, :] <= tie[:, None]))
    seen = (kth != kth)[:, None] & (columns < keys)[None, :]
    if CAUSAL:
        seen = seen & (columns[None, :] <= rows[:, None])
    return kept | seen


@triton.jit
def ordered(x):
    """float32 -> int64 of the same order; both zeros are 0. Of NaN some number beyond the infinities'."""
    bits = x.to(tl.int32, bitcast=True).to(tl.int64)
    return tl.where(bits >= 0, bits, -2147483648 - bits)


@triton.jit
def real(order):
    """The inverse of `ordered`."""
    return tl.where(order >= 0, order, -2147483648 - order).to(tl.int32).to(tl.float32, bitcast=True)
