"""A checked call of routed attention: what every backend is given."""

from dataclasses import dataclass
from typing import Any

from torch import Tensor

__all__ = ["RoutedCall", "check_range"]


@dataclass(frozen=True)
class RoutedCall:
    """Arguments in one canonical form.

    Args:
        query: (B, H, N, D). key: (B, H_kv, M, D), H a multiple of H_kv. value: (B, H_kv, M, D_v). Any strides.
        visible: (B, H_kv, M) boolean, possibly expanded, or None if all keys are.
        blocks: (1 or B, 1 or H, ceil(N / query_block), T) int64: key blocks below ceil(M / key_block), -1 for none.
        extra_key, extra_value: (B, H_kv, S, D) and (B, H_kv, S, D_v), S = 0 if there are none.
        extra_bias: (B, H, 1 or N, S), possibly expanded; float32, for float64 queries float64. None: all zero.
        query_block, key_block: tokens in a block; the last one may have fewer.
        scale: factor of the logits.
        dropout_p: dropout of the attention weights.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    visible: Tensor | None
    blocks: Tensor
    extra_key: Tensor
    extra_value: Tensor
    extra_bias: Tensor | None
    query_block: int
    key_block: int
    scale: float
    dropout_p: float = 0.0

    @property
    def groups(self) -> int:
        """How many query heads share a key head."""
        return self.query.shape[1] // self.key.shape[1] if self.key.shape[1] else 1

    def operands(self) -> tuple[Any, ...]:
        """The arguments of the operators in op.py."""
        return (
            self.query,
            self.key,
            self.value,
            self.visible,
            self.blocks,
            self.extra_key,
            self.extra_value,
            self.extra_bias,
            self.query_block,
            self.key_block,
            self.scale,
        )


def check_range(blocks: Tensor, keys: int, key_block: int) -> None:
    """Raise ValueError unless all listed blocks are there or -1."""
    if blocks.numel() == 0:
        return
    there = -(-keys // key_block)
    low, high = (int(x) for x in blocks.aminmax())
    if low < -1 or high >= there:
        raise ValueError(
            f"blocks: holds {low if low < -1 else high}, but {keys} keys make {there} blocks of {key_block}; "
            f"expected 0 to {there - 1}, or -1 for none"
        )
