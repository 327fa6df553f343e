"""Operators: which keys may a query see, and how strongly. Each is called like scaled_dot_product_attention."""

from regard.ops._dispatch import Backend, Explanation, Refusal, SlowPathWarning, explain, only_backend
from regard.ops.clustering import Clusters, density_peak_clusters, kmeans_clusters, merge_tokens
from regard.ops.knn import gumbel_samples, knn_attention, sampled_attention_gradients, tail_samples_for
from regard.ops.multipole import multipole_attention
from regard.ops.neighborhood import neighborhood_attention
from regard.ops.routed import BlockOrder, routed_attention

__all__ = [
    "Backend",
    "BlockOrder",
    "Clusters",
    "Explanation",
    "Refusal",
    "SlowPathWarning",
    "density_peak_clusters",
    "explain",
    "gumbel_samples",
    "kmeans_clusters",
    "knn_attention",
    "merge_tokens",
    "multipole_attention",
    "neighborhood_attention",
    "only_backend",
    "routed_attention",
    "sampled_attention_gradients",
    "tail_samples_for",
]
