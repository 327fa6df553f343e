"""What Triton kernels that stream keys past queries share: rows of tensors, the running softmax, its gradient.

Logits that are -inf are hidden keys. NaN and infinity go where dense attention would take them.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl
from torch import Tensor

__all__ = [
    "Rows",
    "begin",
    "differentiate",
    "end",
    "head_of",
    "load_rows",
    "load_state",
    "matrix",
    "mixed",
    "product",
    "rows_of",
    "store_rows",
    "take_in",
]


class Rows(NamedTuple):
    """A tensor (B, H, N) or, with channels side by side, (B, H, N, D): where it starts and its first three strides."""

    start: Any
    batch: Any
    head: Any
    token: Any


def rows_of(tensor: Tensor) -> Rows:
    """For (B, H, N); a boolean tensor is read as bytes."""
    return Rows(tensor, *tensor.stride()[:3])


def matrix(tensor: Tensor) -> Rows:
    """For (B, H, N, D); copied if its channels are not side by side."""
    return rows_of(tensor if tensor.stride(3) == 1 else tensor.contiguous())


@triton.jit
def head_of(rows, batch, head):
    """Where a head's first token is."""
    return rows.start + batch.to(tl.int64) * rows.batch + head.to(tl.int64) * rows.head


@triton.jit
def load_rows(rows, batch, head, token, there, DIM: tl.constexpr, WIDTH: tl.constexpr):
    """(tokens, WIDTH) channels of these tokens; zeros beyond DIM, and for tokens that are not there."""
    channel = tl.arange(0, WIDTH)
    place = head_of(rows, batch, head) + token.to(tl.int64)[:, None] * rows.token + channel[None, :]
    return tl.load(place, mask=there[:, None] & (channel < DIM)[None, :], other=0.0)


@triton.jit
def store_rows(rows, batch, head, token, there, x, DIM: tl.constexpr, WIDTH: tl.constexpr):
    """Store x (tokens, WIDTH), in the tensor's dtype, as these tokens' channels."""
    channel = tl.arange(0, WIDTH)
    place = head_of(rows, batch, head) + token.to(tl.int64)[:, None] * rows.token + channel[None, :]
    tl.store(place, x.to(rows.start.dtype.element_ty), mask=there[:, None] & (channel < DIM)[None, :])


@triton.jit
def mixed(a, b, before, PRECISION: tl.constexpr = "ieee"):
    """before (R, D), float32, and a (R, S) times b (S, D)."""
    return tl.dot(a, b, before, input_precision=PRECISION)


@triton.jit
def product(a, b, PRECISION: tl.constexpr = "ieee"):
    """a (R, D) times the rows of b (S, D): (R, S) in float32."""
    return mixed(a, tl.trans(b), tl.zeros([a.shape[0], b.shape[0]], tl.float32), PRECISION)


# ---- softmax ---------------------------------------------------------------------------------------------------------


@triton.jit
def begin(ROWS: tl.constexpr):
    """Of no logits: the largest, and the sum of exponentials under it."""
    return tl.full([ROWS], float("-inf"), tl.float32), tl.zeros([ROWS], tl.float32)


@triton.jit
def take_in(logits, most, total):
    """Weights under the rows' largest logits so far, by what all before shrinks, and the new state."""
    now = tl.maximum(most, tl.max(logits, 1))
    shift = tl.where(now == float("-inf"), 0.0, now)
    weight = tl.exp(logits - shift[:, None])
    shrink = tl.exp(most - shift)
    return weight, shrink, now, total * shrink + tl.sum(weight, 1)


@triton.jit
def end(most, total, mean):
    """The logarithm of the sum of exponentials, and the sum of p dp, of rows whose weights are not yet divided.

    A row that sees nothing has an infinite one, under which all its weights are zero.
    """
    nothing = total == 0.0
    return tl.where(nothing, float("inf"), most + tl.log(total)), tl.where(nothing, 0.0, mean / total)


@triton.jit
def differentiate(logits, grad_weight, seen, lse, mean):
    """Weights, and gradients of the logits; zeros, whatever the logits hold, where a row does not see a key."""
    away = logits - lse[:, None]
    # Never above 1, as rounded logits may have it where they are huge; NaN stays.
    weight = tl.where(seen, tl.exp(tl.where(away > 0.0, 0.0, away)), 0.0)
    return weight, tl.where(seen, weight * (grad_weight - mean[:, None]), 0.0)


@triton.jit
def load_state(lse, mean, batch, head, token, there):
    """A row's `end`."""
    place = token.to(tl.int64)
    return (
        tl.load(head_of(lse, batch, head) + place * lse.token, mask=there, other=float("inf")),
        tl.load(head_of(mean, batch, head) + place * mean.token, mask=there, other=0.0),
    )
