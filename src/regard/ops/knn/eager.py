"""The PyTorch path: takes every valid call, on any device, under every transform; holds the N x M logits in memory,
unless the tail is sampled.
"""

from torch import Tensor

from regard.ops._arguments import full_precision
from regard.ops._dispatch import Refusal
from regard.ops._operator import refusal_of_modes
from regard.ops._selection import kept_by_threshold, selection_state, softmax_of_kept
from regard.ops.knn.call import KNNCall
from regard.ops.knn.reference import knn_attention_reference, logits, mix, weights
from regard.ops.knn.sampled_op import knn_attention_sampled_op
from regard.ops.knn.streamed import gradients_under

__all__ = ["PyTorchBackend", "attend_with_state", "gradients"]


@full_precision
def attend_with_state(call: KNNCall) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The output and the selection's state, as the compiled operator returns them."""
    scores = logits(call)
    kept = kept_by_threshold(scores, call.topk)
    return mix(call, softmax_of_kept(scores, kept)), *selection_state(scores, kept, call.topk)


@full_precision
def gradients(call: KNNCall, grad_output: Tensor, mask_gradient: bool) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Gradients of query, key, value and float mask: below autograd nothing records them for us."""
    return gradients_under(weights(call, kept_by_threshold), call, grad_output, mask_gradient)


class PyTorchBackend:
    name = "pytorch"
    is_slow_path = True

    def supports(self, call: KNNCall) -> Refusal | None:
        return None

    def run(self, call: KNNCall) -> Tensor:
        if call.num_samples and refusal_of_modes(call.dropout_p) is None:
            return knn_attention_sampled_op(*call.sampled_operands())
        return knn_attention_reference(call, kept_by_threshold)
