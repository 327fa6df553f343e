"""The PyTorch backend: takes every valid call; its products are dense attention's, a block of queries at a time.

With dropout or under torch.func it holds the N x M logits: there nothing but PyTorch's own operations will do.
"""

from torch import Tensor

from regard.ops._dispatch import Refusal, functorch_active
from regard.ops._selection import kept_by_threshold
from regard.ops.multipole.call import MultipoleCall
from regard.ops.multipole.op import multipole_attention_blocks
from regard.ops.multipole.reference import multipole_attention_reference

__all__ = ["PyTorchBackend"]


class PyTorchBackend:
    name = "pytorch"
    is_slow_path = True

    def supports(self, call: MultipoleCall) -> Refusal | None:
        return None

    def run(self, call: MultipoleCall) -> Tensor:
        if call.dropout_p > 0.0 or functorch_active():
            return multipole_attention_reference(call, kept_by_threshold)
        return multipole_attention_blocks(*call.operands())
