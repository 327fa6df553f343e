"""The PyTorch backend: takes every valid call, on any device; gathers the windows of a block of queries at a time.

With dropout or under torch.func it holds all windows at once: there nothing but PyTorch's own operations will do.
"""

from torch import Tensor

from regard.ops._dispatch import Refusal, functorch_active
from regard.ops.neighborhood.call import NeighborhoodCall
from regard.ops.neighborhood.op import neighborhood_attention_blocks
from regard.ops.neighborhood.reference import neighborhood_attention_reference

__all__ = ["PyTorchBackend"]


class PyTorchBackend:
    name = "pytorch"
    is_slow_path = True

    def supports(self, call: NeighborhoodCall) -> Refusal | None:
        return None

    def run(self, call: NeighborhoodCall) -> Tensor:
        if call.dropout_p > 0.0 or functorch_active():
            return neighborhood_attention_reference(call)
        return neighborhood_attention_blocks(*call.operands())
