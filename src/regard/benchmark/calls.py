"""One call of every operator that works at any batch and number of tokens: what the support matrix and tests make."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from regard.ops import (
    density_peak_clusters,
    kmeans_clusters,
    knn_attention,
    merge_tokens,
    multipole_attention,
    neighborhood_attention,
    routed_attention,
)

__all__ = ["CALLS", "OperatorCall"]


@dataclass(frozen=True)
class OperatorCall:
    """Args:
    operator: name in the dispatcher, `regard::<operator>`.
    run: query, key, value (B, H, N, D) -> a floating tensor, differentiable in at least one of them.
    multiple: N must be a multiple of this.
    """

    operator: str
    run: Callable[[Tensor, Tensor, Tensor], Tensor]
    multiple: int = 1


def _tokens(query: Tensor) -> Tensor:
    return query.transpose(1, 2).flatten(2)


def _biased_knn(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    return knn_attention(query, key, value, topk=7, attn_mask=key[..., :1].mT, is_causal=True)


def _sampled_tail(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    return knn_attention(query, key, value, topk=7, tail="sample", num_samples=9, seed=0)


def _nearest(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    return knn_attention(query, key, value, topk=0.07, metric="euclidean")


def _line(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    return neighborhood_attention(query, key, value, grid_size=(query.shape[2],), kernel_size=5, dilation=2)


def _grid(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    bias = query[0, :, :1].amax(dim=-1) * torch.linspace(-1.0, 1.0, 25, dtype=query.dtype, device=query.device)
    return neighborhood_attention(
        query, key, value, grid_size=(query.shape[2] // 8, 8), kernel_size=3, border="zeropad", attn_bias=bias
    )


def _routed(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Each block of eight queries sees its own eight keys, the block before, and two extra keys."""
    own = torch.arange(-(-query.shape[2] // 8), device=query.device)
    return routed_attention(
        query,
        key,
        value,
        blocks=torch.stack([own - 1, own], dim=-1),
        query_block=8,
        key_block=8,
        extra_key=key[:, :, :2],
        extra_value=value[:, :, :2],
        extra_bias=query[..., :1, :2],
    )


def _multipole(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    return multipole_attention(query, key, value, num_clusters=6, near=2, far="gaussian", num_prefix_tokens=3)


def _bounded_multipole(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    return multipole_attention(query, key, value, num_clusters=6, near=1, tolerance=0.5)


def _kmeans(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    found = kmeans_clusters(_tokens(query), 5)
    return merge_tokens(_tokens(value), found.assignment, num_clusters=5) + found.centroids.to(value.dtype)


def _density_peaks(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    coarse, fine = density_peak_clusters(_tokens(query), (4, query.shape[2] // 3))
    merged = [merge_tokens(_tokens(value), one.assignment, num_clusters=one.centers.shape[1]) for one in (coarse, fine)]
    return torch.cat(merged, dim=1)


CALLS = {
    "knn": OperatorCall("knn_attention", lambda query, key, value: knn_attention(query, key, value, topk=0.07)),
    "knn, causal, bias": OperatorCall("knn_attention", _biased_knn),
    "knn, sampled tail": OperatorCall("knn_attention_blocks", _sampled_tail),
    "knn, euclidean": OperatorCall("knn_attention_blocks", _nearest),
    "multipole": OperatorCall("multipole_attention", _multipole),
    "multipole, tolerance": OperatorCall("multipole_attention", _bounded_multipole),
    "neighborhood": OperatorCall("neighborhood_attention", _line),
    "neighborhood, 2-D, bias": OperatorCall("neighborhood_attention", _grid, multiple=8),
    "routed": OperatorCall("routed_attention", _routed),
    "kmeans": OperatorCall("kmeans", _kmeans),
    "density_peaks": OperatorCall("density_peak_clusters", _density_peaks),
}
