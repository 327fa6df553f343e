"""The sampled tail: some of the keys beyond the k largest logits stand for all of them (arXiv 2411.04013)."""

import math
import numbers

import torch
from torch import Tensor

from regard.ops._counts import check_count

__all__ = [
    "QUERIES_PER_ORDER",
    "TAILS",
    "check_tail",
    "orders_of_rows",
    "seed_tensor",
    "tail_samples_for",
    "with_sampled_tail",
]

TAILS = ("drop", "sample")
# So many consecutive queries of a head walk the keys in one random order. Each takes from it what its own tail has, so
# every row's sample is uniform; neighbours share theirs, and an order is made for 64 rows instead of for each.
QUERIES_PER_ORDER = 64
_WORD, _HALF = 1 << 32, 1 << 16
_LARGEST_SEED = (1 << 63) - 1


def check_tail(tail: str, num_samples: int) -> None:
    """Raise unless `tail` is one of TAILS and `num_samples` an int >= 0."""
    if tail not in TAILS:
        raise ValueError(f"tail: expected one of {', '.join(map(repr, TAILS))}, got {tail!r}")
    check_count("num_samples", num_samples, least=0)


def seed_tensor(seed: int | Tensor | None, device: torch.device) -> Tensor:
    """The seed as an int64 scalar on `device`; None draws one from the device's default generator.

    Raises:
        TypeError: `seed` is neither a whole number nor an int64 tensor.
        ValueError: it is negative, has more than one element or lies on another device.
    """
    if seed is None:
        return torch.randint(_LARGEST_SEED, (), device=device)
    if isinstance(seed, Tensor):
        if seed.dtype != torch.int64:
            raise TypeError(f"seed: expected an int64 tensor, got {seed.dtype}")
        if seed.numel() != 1 or seed.device != device:
            raise ValueError(f"seed: expected one element on {device}, got {tuple(seed.shape)} on {seed.device}")
        return seed.reshape(())
    if isinstance(seed, bool) or not isinstance(seed, numbers.Integral):
        raise TypeError(f"seed: expected an int, an int64 tensor or None, got {type(seed).__name__}")
    if not 0 <= seed <= _LARGEST_SEED:
        raise ValueError(f"seed: expected 0 to 2^63 - 1, got {seed}")
    return torch.scalar_tensor(int(seed), dtype=torch.int64, device=device)


def tail_samples_for(keys: int, topk: int, *, eps: float, delta: float) -> int:
    """How many samples bring every row's partition function within a factor 1 +- eps, with probability 1 - delta.

    A tail logit is at most the k-th, so a sample's term is at most m / k times the whole sum, m = keys - k, whatever
    the data. Hoeffding's inequality therefore asks for c = (m / k)^2 log(2 / delta) / (2 eps^2) samples drawn one by
    one, and Serfling's, for samples without repeats, for c (m + 1) / (c + m), which is what is returned. The paper's
    condition (arXiv 2411.04013), k^2 l >= 8 n^2 eps^-2 log(4 / delta), asks for more than sixteen times c. Both hold
    for the worst data; real logits need far fewer.

    Args:
        keys: that a row sees. topk: how many it keeps.
        eps: relative error of the sum of exponentials. delta: probability, for one row, that it is larger.

    Returns:
        num_samples, at most keys - topk.

    Raises:
        TypeError, ValueError: a number of the wrong type or out of range.
    """
    check_count("keys", keys)
    check_count("topk", topk)
    if not eps > 0.0:
        raise ValueError(f"eps: expected a number above 0, got {eps}")
    if not 0.0 < delta < 1.0:
        raise ValueError(f"delta: expected a probability in (0, 1), got {delta}")
    tail = max(keys - topk, 0)
    wanted = (tail / topk) ** 2 * math.log(2.0 / delta) / (2.0 * eps**2)
    return min(math.ceil(wanted * (tail + 1) / (wanted + tail)), tail) if tail else 0


def orders_of_rows(seed: Tensor, heads: int, first: int, last: int, keys: int, walked: int | None = None) -> Tensor:
    """(H, last - first, M) int64: the order in which queries `first` to `last - 1` of each head walk the keys.

    A counter-based draw: it depends on seed, head, query // QUERIES_PER_ORDER and key alone, so that a backward, a
    recomputation or another batch draws the same. The operations are those that every device and exporter has.

    Args:
        seed: int64 scalar.
        walked: so many keys of the order alone.
    """

    def numbers(begin: int, end: int) -> Tensor:
        return torch.arange(begin, end, device=seed.device)

    begin = first // QUERIES_PER_ORDER
    end = (last + QUERIES_PER_ORDER - 1) // QUERIES_PER_ORDER
    if isinstance(last, torch.SymInt):  # one more than is used: whether there is but one is then no condition
        end = end + 1
    state = _mixed(_mixed(seed % _WORD) ^ (seed // _WORD))
    for counter in (numbers(0, heads)[:, None, None], numbers(begin, end)[:, None], numbers(0, keys)):
        state = _mixed(state ^ _mixed(counter + 1))
    order = state.argsort(dim=-1)
    if walked is not None:
        order = order[..., :walked]
    return order.index_select(1, numbers(first, last) // QUERIES_PER_ORDER - begin)


def _mixed(x: Tensor) -> Tensor:
    """A bijection of 32-bit words (held in int64) after which they look random: two rounds of xor, shift, multiply."""
    for _ in range(2):
        x = (x ^ (x // _HALF)) * 0x45D9F3B % _WORD
    return x ^ (x // _HALF)


def with_sampled_tail(scores: Tensor, kept: Tensor, num_samples: int, order: Tensor) -> tuple[Tensor, Tensor]:
    """Let a row's first `num_samples` tail keys in `order` stand for its whole tail.

    Their logits grow by log(tail keys / sampled keys), so that numerator and denominator of the softmax are unbiased.

    Args:
        scores: (B, H, N, M) logits, -inf where a key is hidden. kept: boolean, the keys that count in any case.
        order: (H, N, S) keys, S <= M.

    Returns:
        The logits, and which of them count.
    """
    tail = ~kept & (scores != float("-inf"))
    order = order.expand(scores.shape[0], -1, -1, -1)
    drawn = tail.gather(-1, order)
    drawn = drawn & (drawn.cumsum(dim=-1) <= num_samples)
    sampled = torch.zeros_like(tail).scatter(-1, order, drawn)
    whole, part = (where.sum(dim=-1, keepdim=True).clamp(min=1).to(scores.dtype) for where in (tail, drawn))
    return torch.where(sampled, scores + (whole / part).log(), scores), kept | sampled
