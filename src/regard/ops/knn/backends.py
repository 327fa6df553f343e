"""Who computes k-NN attention: kernels in C++ and Triton, which hold no N x M buffer, and PyTorch."""

from torch import Tensor

from regard.ops import _library
from regard.ops._dispatch import Refusal
from regard.ops._operator import KernelBackend, TritonBackend, refusal_of_modes
from regard.ops._selection import kept_by_threshold
from regard.ops.knn.blocks_op import knn_attention_blocks_op
from regard.ops.knn.call import KNNCall
from regard.ops.knn.reference import knn_attention_reference

__all__ = ["CPUBackend", "GPUBackend", "PyTorchBackend"]

_SMALLEST_DIM, _LARGEST_DIM = 8, 256


class CPUBackend(KernelBackend):
    """KernelBackend, but for sizes and options that its kernels do not take."""

    def supports(self, call: KNNCall) -> Refusal | None:  # type: ignore[override]
        if refusal := _refusal_of_options(call) or _library.refusal(call.query):
            return refusal
        for name, dim in (("head_dim", call.query.shape[-1]), ("value's head_dim", call.value.shape[-1])):
            if not _SMALLEST_DIM <= dim <= _LARGEST_DIM:
                return Refusal(f"{name} {dim} is outside {_SMALLEST_DIM} to {_LARGEST_DIM}")
        if call.key.shape[2] == 0:
            return Refusal("there are no keys")
        return refusal_of_modes(call.dropout_p)


class GPUBackend(TritonBackend):
    """TritonBackend, but for what its kernels do not know."""

    def supports(self, call: KNNCall) -> Refusal | None:  # type: ignore[override]
        return super().supports(call) or _refusal_of_options(call)


class PyTorchBackend:
    """Takes every valid call, on any device, under every transform."""

    name = "pytorch"
    is_slow_path = True

    def supports(self, call: KNNCall) -> Refusal | None:
        return None

    def run(self, call: KNNCall) -> Tensor:
        if not call.of_kernels and refusal_of_modes(call.dropout_p) is None:
            return knn_attention_blocks_op(*call.blocks_operands())
        return knn_attention_reference(call, kept_by_threshold)


def _refusal_of_options(call: KNNCall) -> Refusal | None:
    """The kernels rank by the very logits that they weigh with, and drop the rest."""
    if call.metric != "dot":
        return Refusal("keys nearest in Euclidean distance are found on the PyTorch path only (metric='euclidean')")
    if call.num_samples:
        return Refusal("a sampled tail is computed on the PyTorch path only (tail='sample')")
    return None
