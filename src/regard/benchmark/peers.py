"""Other ways to compute what regard's operators compute, written from their equations: what to measure them against."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from regard.benchmark.entry import Case, Peer
from regard.ops._counts import share_of
from regard.ops.clustering.kmeans import spread_over_grid
from regard.ops.knn.api import check_topk

__all__ = [
    "EAGER_KMEANS",
    "PUBLISHED_DENSITY_PEAKS",
    "PUBLISHED_KNN",
    "SDPA",
    "eager_kmeans",
    "published_density_peaks",
    "published_knn_attention",
]


def published_knn_attention(
    query: Tensor, key: Tensor, value: Tensor, topk: int | float, scale: float | None = None
) -> Tensor:
    """k-NN attention the way KVT (arXiv 2106.00515) computes it, from its equations.

    All logits; the indices of each row's `topk` largest; a float32 mask of zeros, one scattered at those indices;
    logits where the mask is positive, else -inf; softmax; product with the values. Several N x M buffers, and ties go
    anywhere.

    Args:
        query: (B, H, N, D). key: (B, H, M, D). value: (B, H, M, D_v).
        topk, scale: as in regard.knn_attention.

    Returns:
        (B, H, N, D_v).
    """
    check_topk(topk)
    logits = query @ key.transpose(-2, -1) * (query.shape[-1] ** -0.5 if scale is None else scale)
    largest = logits.topk(share_of(topk, key.shape[-2]), dim=-1).indices
    mask = torch.zeros_like(logits, dtype=torch.float32).scatter_(-1, largest, 1.0)
    hidden = torch.full_like(logits, float("-inf"))
    return torch.where(mask > 0, logits, hidden).softmax(dim=-1) @ value


def published_density_peaks(x: Tensor, num_clusters: Sequence[int], neighbors: int = 5) -> list[Tensor]:
    """Density peak clustering the way ClusTR (arXiv 2208.13138) computes it, from its equations and without noise.

    All N x N distances; the density of a token from its nearest `neighbors`; its distance to the nearest denser token
    from a masked copy of all distances; all distances to the centres gathered.

    Args:
        x: (B, N, C).
        num_clusters, neighbors: as in regard.density_peak_clusters.

    Returns:
        The assignment (B, N) of each count.
    """
    batch, tokens, channels = x.shape
    distance = torch.cdist(x, x) / channels**0.5
    nearest = distance.topk(neighbors, dim=-1, largest=False).values
    density = nearest.square().mean(dim=-1).neg().exp()
    denser = (density[:, None, :] > density[:, :, None]).to(x.dtype)
    largest = distance.flatten(1).amax(dim=-1)[:, None, None]
    delta = (distance * denser + largest * (1 - denser)).amin(dim=-1)
    assignments = []
    for count in num_clusters:
        centers = (density * delta).topk(count, dim=-1).indices
        to_center = distance.gather(1, centers[..., None].expand(-1, -1, tokens))
        own = torch.arange(count, device=x.device).expand(batch, -1)
        assignments.append(to_center.argmin(dim=1).scatter(1, centers, own))
    return assignments


def eager_kmeans(x: Tensor, num_clusters: int, iterations: int = 2) -> tuple[Tensor, Tensor]:
    """Lloyd's iterations in plain PyTorch operations: all distances at once, sums by scattering.

    Args:
        x: (B, N, C).
        num_clusters, iterations: as in regard.kmeans_clusters, whose start over a sequence it takes.

    Returns:
        assignment (B, N) and centroids (B, M, C).
    """
    channels = x.shape[-1]
    centroids = x[:, list(spread_over_grid((x.shape[1],), num_clusters))]
    assignment = torch.cdist(x, centroids).argmin(dim=-1)
    for _ in range(iterations):
        index = assignment[..., None].expand(-1, -1, channels)
        sums = torch.zeros_like(centroids).scatter_add_(1, index, x)
        counts = x.new_zeros(x.shape[0], num_clusters).scatter_add_(1, assignment, torch.ones_like(x[..., 0]))
        counts = counts[..., None]
        centroids = torch.where(counts > 0, sums / counts.clamp(min=1), centroids)
        assignment = torch.cdist(x, centroids).argmin(dim=-1)
    return assignment, centroids


def _dense(case: Case) -> Callable[..., Tensor]:
    def attend(query: Tensor, key: Tensor, value: Tensor, **rest: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(query, key, value)

    return attend


def _with_options(function: Callable[..., Any]) -> Callable[[Case], Callable[..., Any]]:
    """Of a case: the function with the case's options."""
    return lambda case: partial(function, **case.options)


def _float32_only(case: Case, dtype: str, direction: str) -> str:
    return "" if dtype == "float32" else "torch.cdist takes no half type"


SDPA = Peer("sdpa", _dense)
PUBLISHED_KNN = Peer("published", _with_options(published_knn_attention))
PUBLISHED_DENSITY_PEAKS = Peer("published", _with_options(published_density_peaks), _float32_only)
EAGER_KMEANS = Peer("eager", _with_options(eager_kmeans), _float32_only, growth=1.5)
