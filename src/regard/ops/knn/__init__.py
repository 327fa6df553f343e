"""k-NN attention: every query attends to the k keys with its largest logits (KVT, arXiv 2106.00515)."""

from regard.ops.knn.api import knn_attention
from regard.ops.knn.reference import knn_attention_reference
from regard.ops.knn.tail import tail_samples_for

__all__ = ["knn_attention", "knn_attention_reference", "tail_samples_for"]
