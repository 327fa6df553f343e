"""A checked call of neighborhood attention: what every backend is given."""

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from regard.ops.neighborhood.windows import Pattern

__all__ = ["NeighborhoodCall"]


@dataclass(frozen=True)
class NeighborhoodCall:
    """Arguments in one canonical form.

    Args:
        query: (B, H, N, D). key: (B, H_kv, N, D), H a multiple of H_kv. value: (B, H_kv, N, D_v). Any strides.
        attn_bias: (H, prod(2 w - 1)), at least float32, or None.
        visible: (B, N) boolean, possibly expanded, or None if all keys are.
        pattern: the windows of the N - P tokens after the prefix.
        num_prefix_tokens: P.
        scale: factor of the logits.
        dropout_p: dropout of the attention weights.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    attn_bias: Tensor | None
    visible: Tensor | None
    pattern: Pattern
    num_prefix_tokens: int
    scale: float
    dropout_p: float = 0.0

    @property
    def groups(self) -> int:
        """How many query heads share a key head."""
        return self.query.shape[1] // self.key.shape[1] if self.key.shape[1] else 1

    def operands(self) -> tuple[Any, ...]:
        """The arguments of the operators in op.py."""
        inputs = (self.query, self.key, self.value, self.attn_bias, self.visible)
        return *inputs, *self.pattern.options(), self.num_prefix_tokens, self.scale

    @staticmethod
    def of_operands(*operands: Any) -> "NeighborhoodCall":
        """The inverse of `operands`."""
        *sizes, border = operands[5:11]
        grid, kernel, dilation, stride, causal = (tuple(size) for size in sizes)
        pattern = Pattern(grid, kernel, dilation, stride, tuple(bool(flag) for flag in causal), border)
        query, key, value, attn_bias, visible = operands[:5]
        return NeighborhoodCall(query, key, value, attn_bias, visible, pattern, *operands[11:])

    def grouped(self, rows: Tensor) -> Tensor:
        """(B, H, R, ...) -> (B, H_kv, groups, R, ...): the heads that meet the same keys together."""
        return rows.unflatten(1, (self.key.shape[1], self.groups))
