"""The C++ backend: exact selection on the processor, forward and backward, without an N x M buffer."""

from regard.ops import _library
from regard.ops._dispatch import Refusal
from regard.ops._operator import AttentionCall, KernelBackend, refusal_of_modes

__all__ = ["CPUBackend"]

_SMALLEST_DIM, _LARGEST_DIM = 8, 256


class CPUBackend(KernelBackend):
    """KernelBackend, but for sizes that its kernels do not take."""

    def supports(self, call: AttentionCall) -> Refusal | None:
        if refusal := _library.refusal(call.query):
            return refusal
        for name, dim in (("head_dim", call.query.shape[-1]), ("value's head_dim", call.value.shape[-1])):
            if not _SMALLEST_DIM <= dim <= _LARGEST_DIM:
                return Refusal(f"{name} {dim} is outside {_SMALLEST_DIM} to {_LARGEST_DIM}")
        if call.key.shape[2] == 0:
            return Refusal("there are no keys")
        return refusal_of_modes(call.dropout_p)
