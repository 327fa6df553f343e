"""Operators: which keys may a query see, and how strongly. Each is called like scaled_dot_product_attention."""

from regard.ops._dispatch import Backend, Explanation, Refusal, SlowPathWarning, explain, only_backend
from regard.ops.clustering.kmeans import kmeans_clusters
from regard.ops.knn import knn_attention
from regard.ops.multipole import multipole_attention

__all__ = [
    "Backend",
    "Explanation",
    "Refusal",
    "SlowPathWarning",
    "explain",
    "kmeans_clusters",
    "knn_attention",
    "multipole_attention",
    "only_backend",
]
