"""The C++ backend: the keys of each window and no others; O(N prod(kernel_size)) time, O(N) memory."""

from torch import Tensor

from regard.ops import _library
from regard.ops._dispatch import Refusal, functorch_active
from regard.ops.neighborhood.call import NeighborhoodCall
from regard.ops.neighborhood.op import neighborhood_attention_op

__all__ = ["CPUBackend"]


class CPUBackend:
    name = "cpu"
    is_slow_path = False

    def supports(self, call: NeighborhoodCall) -> Refusal | None:
        if refusal := _library.refusal(call.query):
            return refusal
        if call.dropout_p > 0.0:
            return Refusal("dropout of attention weights is computed on the PyTorch path only (dropout_p > 0)")
        if functorch_active():
            return Refusal("torch.func transforms (vmap, grad, jvp) see through PyTorch operations only")
        return None

    def run(self, call: NeighborhoodCall) -> Tensor:
        return neighborhood_attention_op(*call.operands())
