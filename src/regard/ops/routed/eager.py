"""The PyTorch backend: takes every valid call, some blocks of queries at a time.

With dropout or under torch.func it gathers K and V for all blocks: there nothing but PyTorch's own operations will do.
"""

from torch import Tensor

from regard.ops._dispatch import Refusal, functorch_active
from regard.ops.routed.call import RoutedCall
from regard.ops.routed.op import routed_attention_gathered
from regard.ops.routed.reference import routed_attention_reference

__all__ = ["PyTorchBackend"]


class PyTorchBackend:
    name = "pytorch"
    is_slow_path = True

    def supports(self, call: RoutedCall) -> Refusal | None:
        return None

    def run(self, call: RoutedCall) -> Tensor:
        if call.dropout_p > 0.0 or functorch_active():
            return routed_attention_reference(call)
        return routed_attention_gathered(*call.operands())
