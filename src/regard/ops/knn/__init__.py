"""k-NN attention: every query attends to the k keys with its largest logits (KVT, arXiv 2106.00515)."""

from regard.ops.knn.api import knn_attention
from regard.ops.knn.gumbel import gumbel_samples, sampled_attention_gradients
from regard.ops.knn.reference import knn_attention_reference
from regard.ops.knn.tail import tail_samples_for

__all__ = [
    "gumbel_samples",
    "knn_attention",
    "knn_attention_reference",
    "sampled_attention_gradients",
    "tail_samples_for",
]
