"""Operators: which keys may a query see, and how strongly. Each is called like scaled_dot_product_attention."""

from regard.ops._dispatch import Backend, Explanation, Refusal, SlowPathWarning, explain, only_backend
from regard.ops.knn import knn_attention

__all__ = ["Backend", "Explanation", "Refusal", "SlowPathWarning", "explain", "knn_attention", "only_backend"]
