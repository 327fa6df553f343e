"""A checked call of k-NN attention: what every backend is given."""

from dataclasses import dataclass
from typing import Any

from torch import Tensor

__all__ = ["KNNCall"]


@dataclass(frozen=True)
class KNNCall:
    """Arguments in one canonical form.

    Args:
        query: (B, H, N, D). key: (B, H_kv, M, D), H a multiple of H_kv. value: (B, H_kv, M, D_v). Any strides.
        attn_mask: (1 or B, 1 or H, 1 or N, 1 or M), boolean (True = attend) or floating
            (added; float32, for float64 queries float64), or None.
        topk: how many keys a row keeps, 0 <= topk <= M (0 only when M is 0).
        scale: factor of the logits.
        metric: what ranks the keys of a row: "dot" or "euclidean".
        num_samples: how many keys of a row's tail stand for all of it; 0 drops the tail.
        seed: of the sample, an int64 scalar on the query's device; None where none is given yet.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    attn_mask: Tensor | None
    topk: int
    dropout_p: float
    is_causal: bool
    scale: float
    metric: str = "dot"
    num_samples: int = 0
    seed: Tensor | None = None

    @property
    def groups(self) -> int:
        """How many query heads share a key head."""
        return self.query.shape[1] // self.key.shape[1] if self.key.shape[1] else 1

    def operands(self) -> tuple[Any, ...]:
        """The arguments of the operator in op.py, which knows neither distances nor tails."""
        return self.query, self.key, self.value, self.attn_mask, self.topk, self.is_causal, self.scale

    def blocks_operands(self) -> tuple[Any, ...]:
        """The arguments of the operator in blocks_op.py."""
        tensors = (self.query, self.key, self.value, self.attn_mask, self.seed)
        return *tensors, self.topk, self.metric, self.num_samples, self.is_causal, self.scale

    @classmethod
    def of_blocks_operands(cls, *operands: Any) -> "KNNCall":
        query, key, value, attn_mask, seed, topk, metric, num_samples, is_causal, scale = operands
        return cls(query, key, value, attn_mask, topk, 0.0, is_causal, scale, metric, num_samples, seed)

    @property
    def of_kernels(self) -> bool:
        """True if the kernels' operator knows what is asked."""
        return self.metric == "dot" and not self.num_samples
