"""Merge the tokens of each cluster into one: weighted means, differentiable, in O(N)."""

import torch
from torch import Tensor

from regard.ops._counts import check_count
from regard.ops._selection import raised
from regard.ops.clustering.density_peaks import check_tokens
from regard.ops.clustering.sums import cluster_sums

__all__ = ["merge_by_score", "merge_equally", "merge_tokens"]

_EPSILON = 1e-6  # in the published denominator


def merge_tokens(x: Tensor, assignment: Tensor, weights: Tensor | None = None, *, num_clusters: int) -> Tensor:
    """The weighted mean of each cluster's tokens: sum w x / (sum w + 1e-6), as ClusTR has it (arXiv 2208.13138).

    Differentiable in `x` and `weights`. Half types are summed in float32. Sums run in the order of the tokens on the
    processor; on CUDA their order varies unless torch.use_deterministic_algorithms(True) is set, which fixes it.

    Args:
        x: (B, N, C).
        assignment: (B, N) int64: the cluster of each token, as density_peak_clusters gives it. 0 <= assignment <
            num_clusters; this is not checked.
        weights: (B, N) or (B, N, 1), non-negative; ones if None.
        num_clusters: M.

    Returns:
        (B, M, C) in the dtype of x; zeros for a cluster without tokens.

    Raises:
        TypeError: an argument of the wrong type or dtype.
        ValueError: shapes that do not fit, or num_clusters below 1.
    """
    _check(x, assignment, num_clusters)
    if weights is None:
        return _means(x, assignment, None, num_clusters, _EPSILON)
    if not isinstance(weights, Tensor) or not weights.is_floating_point():
        raise TypeError(f"weights: expected a floating tensor, got {getattr(weights, 'dtype', type(weights).__name__)}")
    if weights.shape not in (x.shape[:2], (*x.shape[:2], 1)):
        raise ValueError(
            f"weights: expected (B, N) or (B, N, 1) for x of shape {tuple(x.shape)}, got {tuple(weights.shape)}"
        )
    return _means(x, assignment, weights.reshape(x.shape[:2]), num_clusters, _EPSILON)


def merge_by_score(x: Tensor, assignment: Tensor, score: Tensor, *, num_clusters: int) -> Tensor:
    """merge_tokens(x, assignment, exp(score)) without its overflow, and the same to the last 1e-6.

    Args:
        score: (B, N) logarithms of the weights; -inf leaves a token out.
    """
    _check(x, assignment, num_clusters)
    score = raised(score)
    lowest = score.new_full((x.shape[0], num_clusters), -torch.inf)
    highest = lowest.scatter_reduce(1, assignment, score.detach(), "amax")
    highest = highest.masked_fill(highest == -torch.inf, 0.0)
    # Numerator and denominator are both divided by exp(highest); the published 1e-6 is then, too.
    weights = (score - highest.gather(1, assignment)).exp()
    return _means(x, assignment, weights, num_clusters, _EPSILON * (-highest).exp()[..., None])


def merge_equally(x: Tensor, assignment: Tensor, weights: Tensor | None = None, *, num_clusters: int) -> Tensor:
    """Plain means, nothing added to the denominator: their weights sum to one. A cluster of weight 0 gives zeros.

    Args:
        weights: (B, N), 0 or 1: which tokens count; all if None.
    """
    _check(x, assignment, num_clusters)
    return _means(x, assignment, weights, num_clusters, None)


def _means(
    x: Tensor, assignment: Tensor, weights: Tensor | None, num_clusters: int, epsilon: float | Tensor | None
) -> Tensor:
    batch, tokens, channels = x.shape
    values = raised(x)
    if weights is None:
        weights = values.new_ones(()).expand(batch, tokens)
    mass = raised(weights).to(torch.promote_types(values.dtype, raised(weights).dtype))[..., None]
    # Sums and masses in one pass: the masses are one channel more.
    sums = cluster_sums(torch.cat([mass * values, mass], dim=-1), assignment, num_clusters)
    total, sums = sums[..., channels:], sums[..., :channels]
    total = torch.where(total == 0, 1.0, total) if epsilon is None else total + epsilon
    return (sums / total).to(x.dtype)


def _check(x: Tensor, assignment: Tensor, num_clusters: int) -> None:
    check_tokens(x)
    check_count("num_clusters", num_clusters)
    if not isinstance(assignment, Tensor) or assignment.dtype != torch.int64:
        found = assignment.dtype if isinstance(assignment, Tensor) else type(assignment).__name__
        raise TypeError(f"assignment: expected an int64 tensor, got {found}")
    if assignment.shape != x.shape[:2]:
        raise ValueError(
            f"assignment: expected (B, N) = {tuple(x.shape[:2])} for x of shape {tuple(x.shape)}, "
            f"got {tuple(assignment.shape)}"
        )
