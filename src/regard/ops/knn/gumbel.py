"""Keys drawn from attention's own distribution by lazy Gumbel sampling, and gradients estimated from such draws.

kNN Attention Demystified (arXiv 2411.04013) reads an output as an expectation over a key drawn from a row's softmax,
and its gradients likewise. Eager PyTorch, to compute with and to learn from: the k largest logits are found among all,
where the paper assumes an index that finds them in less.
"""

import torch
from torch import Tensor

from regard.ops._arguments import check_scale, check_tensors
from regard.ops._counts import check_count
from regard.ops._selection import raised

__all__ = ["gumbel_samples", "random_walk_product", "sampled_attention_gradients"]


def gumbel_samples(
    query: Tensor,
    key: Tensor,
    *,
    topk: int,
    num_samples: int,
    scale: float | None = None,
    generator: torch.Generator | None = None,
) -> tuple[Tensor, Tensor]:
    """Draw keys from each query's softmax, exactly, looking at its `topk` largest logits and few others.

    The winner of logits plus Gumbel noise is a draw from their softmax. Once the k largest have theirs, another key
    wins only with noise above the gap between the best so far and the k-th logit. How many keys have that much is
    binomial, which ones is uniform, so only these, at most M / k on average, are looked at.

    Args:
        query: (..., H, N, D). key: (..., H, M, D).
        topk: k >= 1, at most all keys. The more, the fewer others are looked at.
        num_samples: S, draws for each query, independent and with replacement.
        scale: factor of the logits, 1 / sqrt(D) if None.
        generator: of the draws; None: the device's default.

    Returns:
        indices (..., H, N, S) int64 of the drawn keys, and (..., H, N, S) how many keys beyond the k were looked at.

    Raises:
        TypeError, ValueError: tensors that do not fit, a count out of range, or no keys.
    """
    check_tensors(query, key, key, enable_gqa=False)
    check_scale(scale)
    check_count("topk", topk)
    check_count("num_samples", num_samples)
    if key.shape[-2] == 0:
        raise ValueError(f"key: a draw needs at least one key, got shape {tuple(key.shape)}")
    logits = raised(query) @ raised(key).mT * (query.shape[-1] ** -0.5 if scale is None else scale)
    best, order = logits.sort(dim=-1, descending=True, stable=True)
    best = best[..., : min(topk, key.shape[-2])]
    shape = (*logits.shape[:-1], num_samples)
    gumbels = _uniform((*shape, best.shape[-1]), logits, generator).log().neg().log().neg()
    leader, winner = (best.unsqueeze(-2) + gumbels).max(dim=-1)
    tail = logits.shape[-1] - best.shape[-1]
    # P(a Gumbel exceeds b) = 1 - exp(-e^-b), b = leader - k-th logit
    chance = torch.expm1(-torch.exp(best[..., -1:] - leader)).neg()
    count = torch.binomial(torch.full_like(chance, tail), chance, generator=generator).long()
    place = best.shape[-1] + _distinct(tail, count, generator)  # in the order of the logits
    there = torch.arange(place.shape[-1], device=count.device) < count.unsqueeze(-1)
    noise = torch.log1p(-chance.unsqueeze(-1) * _uniform(tuple(place.shape), logits, generator)).neg().log().neg()
    sorted_logits = logits.gather(-1, order)
    others = sorted_logits.gather(-1, place.clamp(max=logits.shape[-1] - 1).flatten(-2)).view_as(noise) + noise
    others = torch.cat([leader.unsqueeze(-1), others.masked_fill(~there, float("-inf"))], dim=-1)
    places = torch.cat([winner.unsqueeze(-1), place], dim=-1)
    chosen = places.gather(-1, others.argmax(dim=-1, keepdim=True)).squeeze(-1)
    return order.gather(-1, chosen), count


def _uniform(shape: tuple[int, ...], like: Tensor, generator: torch.Generator | None) -> Tensor:
    """In (0, 1), both ends excluded."""
    drawn = torch.rand(shape, dtype=like.dtype, device=like.device, generator=generator)
    return drawn.clamp_(min=torch.finfo(like.dtype).tiny)


def _distinct(whole: int, count: Tensor, generator: torch.Generator | None) -> Tensor:
    """(..., largest count) int64: the first `count` are a uniform choice of so many numbers below `whole`.

    Floyd's algorithm: a number below `whole - count + step`, or that bound itself if the number was chosen before.
    """
    width = int(count.max()) if count.numel() else 0
    chosen = torch.full((*count.shape, width), -1, dtype=torch.int64, device=count.device)
    for step in range(width):
        bound = whole - count + step
        number = (
            torch.rand(count.shape, device=count.device, dtype=torch.float64, generator=generator) * (bound + 1)
        ).long()
        repeated = (chosen[..., :step] == number.unsqueeze(-1)).any(dim=-1)
        chosen[..., step] = torch.where(repeated, bound, number)
    return chosen.clamp_(min=0)


def random_walk_product(
    query: Tensor,
    key: Tensor,
    y: Tensor,
    *,
    topk: int,
    walks: int,
    scale: float | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """P^T y, P the softmax rows, by random walks of one step: unbiased.

    A column of y, shifted until no entry is negative, is a distribution over queries: a walk draws a query from it and
    then a key from that query's row. The histogram of the keys, times the column's sum, estimates the shifted product;
    the same for the constant shift, whose queries are uniform, is taken off.

    Args:
        query: (..., H, N, D). key: (..., H, M, D). y: (..., H, N, C).
        walks: for each column of y, and again for the constant.
        topk, scale, generator: as in gumbel_samples.

    Returns:
        (..., H, M, C).

    Raises:
        TypeError, ValueError: tensors that do not fit, or a count out of range.
    """
    check_count("walks", walks)
    y = raised(y)
    *lead, rows, columns = y.shape
    shift = y.amin(dim=-2, keepdim=True).clamp(max=0.0).neg()
    shifted = torch.cat([y + shift, torch.ones_like(y[..., :1])], dim=-1).mT  # (..., C + 1, N)
    total = shifted.sum(dim=-1, keepdim=True)
    flat = torch.where(total > 0.0, shifted, 1.0).reshape(-1, rows)
    start = torch.multinomial(flat, walks, replacement=True, generator=generator).view(*lead, (columns + 1) * walks)
    begin = query.gather(-2, start.unsqueeze(-1).expand(*start.shape, query.shape[-1]))
    end = gumbel_samples(begin, key, topk=topk, num_samples=1, scale=scale, generator=generator)[0]
    end = end.view(*lead, columns + 1, walks)
    ones = total.expand(end.shape) / walks
    found = ones.new_zeros((*lead, columns + 1, key.shape[-2])).scatter_add(-1, end, ones).mT
    return found[..., :columns] - shift * found[..., columns:]


def sampled_attention_gradients(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    grad_output: Tensor,
    *,
    topk: int,
    num_samples: int,
    walks: int | None = None,
    scale: float | None = None,
    generator: torch.Generator | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Estimate dense attention's gradients from keys drawn from each row's softmax: unbiased, variance O(1 / S).

    With t ~ P_i and g_t = dO_i . V_t the gradients are, up to the scale of the logits, dQ_i = cov(K_t, g_t),
    dK_t = sum_i P_it (g_t - E g) Q_i and dV_t = sum_i P_it dO_i. Each row's S draws give all three: the sample
    covariance (divided by S - 1), its terms scattered to the drawn keys, and dO_i / S scattered to them. The paper
    draws dV by random walks instead; its code has no estimator of dK.

    Args:
        query: (..., H, N, D). key: (..., H, M, D). value: (..., H, M, D_v). grad_output: (..., H, N, D_v).
        num_samples: S >= 2, draws a row.
        walks: dV by so many random walks a column, as the paper has it; None: from the rows' own draws.
        topk, scale, generator: as in gumbel_samples.

    Returns:
        Gradients of query, key and value, in their dtype.

    Raises:
        TypeError, ValueError: tensors that do not fit, or a count out of range.
    """
    check_tensors(query, key, value, enable_gqa=False)
    check_count("num_samples", num_samples, least=2)
    expected = (*query.shape[:-1], value.shape[-1])
    if tuple(grad_output.shape) != expected:
        raise ValueError(f"grad_output: expected {expected}, got {tuple(grad_output.shape)}")
    factor = query.shape[-1] ** -0.5 if scale is None else scale
    options = {"topk": topk, "scale": factor, "generator": generator}
    drawn = gumbel_samples(query, key, num_samples=num_samples, **options)[0]  # type: ignore[arg-type]
    grad = raised(grad_output)
    gained = torch.einsum("...nsd,...nd->...ns", _rows(raised(value), drawn), grad)
    weight = factor * (gained - gained.mean(dim=-1, keepdim=True)) / (num_samples - 1)
    grad_query = torch.einsum("...ns,...nsd->...nd", weight, _rows(raised(key), drawn))
    grad_key = _scattered(weight.unsqueeze(-1) * raised(query).unsqueeze(-2), drawn, key.shape[-2])
    if walks is None:
        share = (grad / num_samples).unsqueeze(-2).expand(*drawn.shape, -1)
        grad_value = _scattered(share, drawn, key.shape[-2])
    else:
        grad_value = random_walk_product(query, key, grad, walks=walks, **options)  # type: ignore[arg-type]
    return grad_query.to(query.dtype), grad_key.to(key.dtype), grad_value.to(value.dtype)


def _rows(tokens: Tensor, index: Tensor) -> Tensor:
    """(..., M, D) tokens at (..., N, S) indices: (..., N, S, D)."""
    flat = index.flatten(-2).unsqueeze(-1)
    return tokens.gather(-2, flat.expand(*flat.shape[:-1], tokens.shape[-1])).unflatten(-2, index.shape[-2:])


def _scattered(terms: Tensor, index: Tensor, keys: int) -> Tensor:
    """(..., N, S, D) terms added up at their (..., N, S) keys: (..., M, D)."""
    flat = index.flatten(-2).unsqueeze(-1).expand(*index.shape[:-2], -1, terms.shape[-1])
    zeros = terms.new_zeros((*index.shape[:-2], keys, terms.shape[-1]))
    return zeros.scatter_add(-2, flat, terms.flatten(-3, -2))
