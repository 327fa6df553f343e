"""The C++ backend: near clusters key by key, all others from afar; O(N (clusters + near keys)) time, O(N) memory."""

import torch
from torch import Tensor

from regard.ops import _library
from regard.ops._dispatch import Refusal, functorch_active
from regard.ops.multipole.call import MultipoleCall
from regard.ops.multipole.op import multipole_attention_op

__all__ = ["CPUBackend"]

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class CPUBackend:
    name = "cpu"
    is_slow_path = False

    def supports(self, call: MultipoleCall) -> Refusal | None:
        if problem := _library.problem():
            return Refusal(problem)
        if call.query.device.type != "cpu":
            return Refusal(f"the tensors are on {call.query.device.type}; this kernel runs on the processor")
        if call.query.dtype not in _DTYPES:
            return Refusal(f"{call.query.dtype} is not among float32, bfloat16, float16")
        if call.dropout_p > 0.0:
            return Refusal("dropout of attention weights is computed on the PyTorch path only (dropout_p > 0)")
        if functorch_active():
            return Refusal("torch.func transforms (vmap, grad, jvp) see through PyTorch operations only")
        return None

    def run(self, call: MultipoleCall) -> Tensor:
        return multipole_attention_op(*call.operands())
