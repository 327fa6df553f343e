"""The PyTorch path of what the kernels know: any device and every transform; holds the N x M logits in memory."""

import torch
from torch import Tensor

from regard.ops._arguments import full_precision
from regard.ops._selection import kept_by_threshold, selection_state, softmax_of_kept
from regard.ops.knn.call import KNNCall
from regard.ops.knn.reference import logits, mix, weights

__all__ = ["attend_with_state", "gradients", "gradients_under"]


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


def gradients_under(
    soft: Tensor, call: KNNCall, grad_output: Tensor, mask_gradient: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Gradients of query, key, value and float mask under these weights (B, H, N, M), in the weights' dtype."""
    query, grad_output = call.query.to(soft.dtype), grad_output.to(soft.dtype)
    key, value = (t.to(soft.dtype).repeat_interleave(call.groups, dim=1) for t in (call.key, call.value))
    grad_soft = torch.einsum("bhnd,bhmd->bhnm", grad_output, value)
    grad_logits = soft * (grad_soft - (soft * grad_soft).sum(dim=-1, keepdim=True))
    grad_query = torch.einsum("bhnm,bhmd->bhnd", grad_logits, key) * call.scale
    grad_key = torch.einsum("bhnm,bhnd->bhmd", grad_logits, query) * call.scale
    grad_value = torch.einsum("bhnm,bhnd->bhmd", soft, grad_output)
    grad_key, grad_value = (t.unflatten(1, (-1, call.groups)).sum(dim=2) for t in (grad_key, grad_value))
    grad_mask = grad_logits.sum_to_size(call.attn_mask.shape) if mask_gradient and call.attn_mask is not None else None
    return grad_query, grad_key, grad_value, grad_mask
