"""FLOPs of a model's forward."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch.utils.flop_counter import FlopCounterMode

__all__ = ["counting_flops"]


@contextmanager
def counting_flops() -> Iterator[FlopCounterMode]:
    """Within this context torch's flop counter counts, fused encoder layers of torch included.

    Those of nn.MultiheadAttention and nn.TransformerEncoderLayer are single operators that the counter does not know:
    they are taken apart meanwhile.
    """
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with FlopCounterMode(display=False) as counter:
            yield counter
    finally:
        torch.backends.mha.set_fastpath_enabled(before)
