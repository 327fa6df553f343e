"""The kernels' backends: exact selection, forward and backward, without an N x M buffer; C++ on the processor, Triton
on a GPU.
"""

from regard.ops import _library
from regard.ops._dispatch import Refusal
from regard.ops._operator import KernelBackend, TritonBackend, refusal_of_modes
from regard.ops.knn.call import KNNCall

__all__ = ["CPUBackend", "GPUBackend"]

_SMALLEST_DIM, _LARGEST_DIM = 8, 256


class CPUBackend(KernelBackend):
    """KernelBackend, but for sizes that its kernels do not take."""

    def supports(self, call: KNNCall) -> Refusal | None:  # type: ignore[override]
        if refusal := _library.refusal(call.query) or _refusal_of_tail(call):
            return refusal
        for name, dim in (("head_dim", call.query.shape[-1]), ("value's head_dim", call.value.shape[-1])):
            if not _SMALLEST_DIM <= dim <= _LARGEST_DIM:
                return Refusal(f"{name} {dim} is outside {_SMALLEST_DIM} to {_LARGEST_DIM}")
        if call.key.shape[2] == 0:
            return Refusal("there are no keys")
        return refusal_of_modes(call.dropout_p)


class GPUBackend(TritonBackend):
    """TritonBackend, but for a sampled tail."""

    def supports(self, call: KNNCall) -> Refusal | None:  # type: ignore[override]
        return super().supports(call) or _refusal_of_tail(call)


def _refusal_of_tail(call: KNNCall) -> Refusal | None:
    return Refusal("a sampled tail is computed on the PyTorch path only (tail='sample')") if call.num_samples else None
