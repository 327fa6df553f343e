"""The PyTorch path: blocks of queries, so that no N x M matrix is ever held; forward and backward written out."""

from collections.abc import Iterator

import torch
from torch import Tensor

from regard.ops._arguments import full_precision
from regard.ops._selection import kept_by_threshold, raised, softmax_of_kept
from regard.ops.multipole.call import MultipoleCall
from regard.ops.multipole.reference import FarField, far_field, key_logits, keys_and_values, row_weights

__all__ = ["add_from_moments", "attend", "gradients"]

# Elements of one block's logits: a few MB, whatever the number of queries.
_BLOCK = 1 << 21


def _blocks(call: MultipoleCall) -> Iterator[tuple[slice, bool]]:
    """Slices of the queries, and whether they are prefix queries."""
    per_query = call.query.shape[0] * call.query.shape[1] * (call.key.shape[2] + call.num_clusters)
    rows = max(1, _BLOCK // max(1, per_query))
    queries, prefix = call.query.shape[2], call.num_prefix_tokens
    for first, last in ((0, prefix), (prefix, queries)):
        for start in range(first, last, rows):
            yield slice(start, min(start + rows, last)), last == prefix


def _soft(call: MultipoleCall, field: FarField, rows: Tensor, is_prefix: bool) -> Tensor:
    """(B, H_kv, R, M + C) weights of keys and clusters."""
    if not is_prefix:
        return softmax_of_kept(*row_weights(call, field, rows, kept_by_threshold))
    logits = key_logits(call, rows)
    soft = softmax_of_kept(logits, logits != float("-inf"))
    return torch.nn.functional.pad(soft, (0, call.num_clusters))


@full_precision
def attend(call: MultipoleCall) -> Tensor:
    """(B, H, N, D_v) output of a call with its clusters."""
    field = far_field(call)
    query, values = raised(call.query), torch.cat([keys_and_values(call)[1], field.value], dim=2)
    output = call.query.new_empty((*call.query.shape[:-1], call.value.shape[-1]))
    for rows, is_prefix in _blocks(call):
        soft = _soft(call, field, call.grouped(query[:, :, rows]), is_prefix)
        output[:, :, rows] = call.ungrouped(soft @ values)
    return output


@full_precision
def gradients(call: MultipoleCall, grad_output: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of query, key and value: a cluster's moments hand theirs on to its keys and values."""
    field = far_field(call)
    grad_output = raised(grad_output)
    query, (key, value) = raised(call.query), keys_and_values(call)
    keys, values = torch.cat([key, field.key], dim=2), torch.cat([value, field.value], dim=2)
    grad_query = torch.empty_like(query)
    grad_keys, grad_values = torch.zeros_like(keys), torch.zeros_like(values)
    grad_variance = torch.zeros_like(field.variance)
    for rows, is_prefix in _blocks(call):
        q, grad = (call.grouped(t[:, :, rows]) for t in (query, grad_output))
        soft = _soft(call, field, q, is_prefix)
        grad_soft = grad @ values.mT
        grad_logits = soft * (grad_soft - (soft * grad_soft).sum(dim=-1, keepdim=True))
        grad_values += soft.mT @ grad
        grad_keys += call.scale * (grad_logits.mT @ q)
        grad_q = call.scale * (grad_logits @ keys)
        if call.second_order and not is_prefix:
            far = grad_logits[..., key.shape[2] :]
            grad_variance += (0.5 * call.scale**2) * (far.mT @ q.square())
            grad_q += call.scale**2 * q * (far @ field.variance)
        grad_query[:, :, rows] = call.ungrouped(grad_q)
    grad_key, from_mean = grad_keys.split([key.shape[2], call.num_clusters], dim=2)
    grad_value, from_value = grad_values.split([key.shape[2], call.num_clusters], dim=2)
    add_from_moments(call, field, (from_mean, grad_variance, from_value), grad_key, grad_value)
    return grad_query, grad_key, grad_value


def add_from_moments(
    call: MultipoleCall, field: FarField, grads: tuple[Tensor, Tensor, Tensor], grad_key: Tensor, grad_value: Tensor
) -> None:
    """Add to keys and values what reaches them through mean key, variance and mean value of their cluster."""
    prefix, assignment = call.num_prefix_tokens, call.clusters.unsqueeze(-1)

    def own(moment: Tensor) -> Tensor:
        return moment.gather(2, assignment.expand(-1, -1, -1, moment.shape[-1]))

    share = own(field.log_count.neg().exp().unsqueeze(-1))
    if call.visible is not None:
        share = share.masked_fill(~call.visible[:, :, prefix:].unsqueeze(-1), 0.0)
    mean, variance, value = grads
    away = keys_and_values(call)[0][:, :, prefix:] - own(field.key)
    grad_key[:, :, prefix:] += share * (own(mean) + 2.0 * own(variance) * away)
    grad_value[:, :, prefix:] += share * own(value)
