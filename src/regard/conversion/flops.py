"""FLOPs of a model's forward."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode, flop_registry, sdpa_flop_count

__all__ = ["counting_flops"]


def _dense_attention(query: Any, key: Any, value: Any, *rest: Any, out_val: Any = None, **options: Any) -> int:
    """Of the shapes of queries, keys and values."""
    return sdpa_flop_count(query, key, value)


_MISSING: dict[Any, Any] = {
    operator: _dense_attention
    for operator in (torch.ops.aten._scaled_dot_product_flash_attention_for_cpu,)
    if operator not in flop_registry
}


@contextmanager
def counting_flops() -> Iterator[FlopCounterMode]:
    """Within this context torch's flop counter counts, fused encoder layers of torch included.

    Those of nn.MultiheadAttention and nn.TransformerEncoderLayer are single operators that the counter does not know:
    they are taken apart meanwhile. Torch 2.11 does not know the processor's dense attention either.
    """
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with FlopCounterMode(display=False, custom_mapping=_MISSING) as counter:
            yield counter
    finally:
        torch.backends.mha.set_fastpath_enabled(before)
