"""The specification of multipole attention, differentiable by autograd. All else is checked against it."""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from regard.ops._arguments import full_precision
from regard.ops._selection import kept_by_stable_sort, raised, softmax_of_kept
from regard.ops.clustering.sums import cluster_sums
from regard.ops.multipole.call import MultipoleCall

__all__ = [
    "FarField",
    "cluster_logits",
    "far_field",
    "key_logits",
    "keys_and_values",
    "multipole_attention_reference",
    "near_clusters",
    "row_weights",
]

# Stands for the spread of clusters whose keys are all alike: they come last.
_SMALLEST = torch.finfo(torch.float32).tiny

Select = Callable[[Tensor, int], Tensor]


class FarField(NamedTuple):
    """What is left of each cluster when seen from afar, over its visible keys.

    Args:
        log_count: (B, H_kv, C), -inf for an empty cluster.
        key, variance: (B, H_kv, C, D), mean and variance of its keys in each dimension.
        value: (B, H_kv, C, D_v), mean of its values.
        log_spread: (B, H_kv, C), logarithm of the mean squared distance of its keys to their mean; no gradient.
        radius: (B, H_kv, C), largest distance of its keys to their mean; no gradient. None unless a tolerance asks.
    """

    log_count: Tensor
    key: Tensor
    variance: Tensor
    value: Tensor
    log_spread: Tensor
    radius: Tensor | None


def far_field(call: MultipoleCall) -> FarField:
    """The clusters' moments; means and variances carry gradient to keys and values."""
    prefix, clusters, (batch, heads) = call.num_prefix_tokens, call.num_clusters, call.key.shape[:2]
    key, value = (t[:, :, prefix:].flatten(0, 1) for t in keys_and_values(call))
    assignment = call.clusters.flatten(0, 1)
    shown = torch.ones_like(key[..., :1])
    if call.visible is not None:
        shown = call.visible.expand(call.key.shape[:-1])[:, :, prefix:].flatten(0, 1).unsqueeze(-1).to(key.dtype)

    def mean(x: Tensor) -> Tensor:
        return cluster_sums(x * shown, assignment, clusters) / counts.clamp(min=1)

    counts = cluster_sums(shown, assignment, clusters)
    mean_key, mean_value = mean(key), mean(value)
    own = mean_key.gather(1, assignment.unsqueeze(-1).expand(-1, -1, key.shape[-1]))
    away = key - own
    variance = mean(away.square())
    spread = variance.detach().sum(dim=-1).clamp(min=_SMALLEST).log()
    parts = [counts.squeeze(-1).log(), mean_key, variance, mean_value, spread]
    if bounded(call):
        distance = torch.linalg.vector_norm(away.detach() * shown, dim=-1)
        parts.append(torch.zeros_like(spread).scatter_reduce(1, assignment, distance, "amax"))
    log_count, key, variance, value, spread, *radius = (part.unflatten(0, (batch, heads)) for part in parts)
    return FarField(log_count, key, variance, value, spread, radius[0] if radius else None)


def keys_and_values(call: MultipoleCall) -> tuple[Tensor, Tensor]:
    """Raised; hidden ones are zero, so that it does not matter what they hold."""
    key, value = raised(call.key), raised(call.value)
    if call.visible is None:
        return key, value
    hidden = ~call.visible.unsqueeze(-1)
    return key.masked_fill(hidden, 0.0), value.masked_fill(hidden, 0.0)


def cluster_logits(call: MultipoleCall, field: FarField, rows: Tensor) -> Tensor:
    """(B, H_kv, R, C) logits of whole clusters: the logarithm of the mass that their keys are estimated to have.

    For keys spread around mu with variance v, sum_j exp(q . k_j) is n exp(q . mu + q^T diag(v) q / 2 + ...).
    """
    rows = rows * call.scale
    logits = rows @ field.key.mT + field.log_count.unsqueeze(2)
    return logits + 0.5 * (rows.square() @ field.variance.mT) if call.second_order else logits


def key_logits(call: MultipoleCall, rows: Tensor) -> Tensor:
    """(B, H_kv, R, M) logits of keys; hidden ones are -inf."""
    logits = (rows * call.scale) @ raised(call.key).mT
    return logits if call.visible is None else logits.masked_fill(~call.visible.unsqueeze(2), float("-inf"))


def near_clusters(call: MultipoleCall, field: FarField, rows: Tensor, select: Select) -> tuple[Tensor, Tensor]:
    """(B, H_kv, R, C) logits of whole clusters, and which of them each of these rows resolves."""
    far = cluster_logits(call, field, rows)
    # From afar a cluster errs by its mass times its spread: a tight one is right however heavy it is.
    near = select(far.detach() + field.log_spread.unsqueeze(2), call.near)
    if field.radius is not None:
        near = near | _beyond_tolerance(call, field.radius, rows.detach(), far.detach(), near)
    return far, near


def bounded(call: MultipoleCall) -> bool:
    return call.tolerance < math.inf


def _beyond_tolerance(call: MultipoleCall, radius: Tensor, rows: Tensor, far: Tensor, near: Tensor) -> Tensor:
    """(B, H_kv, R, C) clusters that must not stay far, beside the near ones, for the far field to keep the tolerance.

    A key at k_j = mu + delta has the weight exp(q . mu) exp(q . delta), the far field gives it exp(q . mu). With
    x = |q| radius >= |q . delta| they differ by exp(q . mu) (exp(x) - 1) at most, so a cluster of mass m by
    m (exp(x) - 1) <= m min(1, x) exp(x). A mean of exponentials is above the exponential of the mean, so dense
    attention's total weight is at least that of all clusters seen from afar. Hence the output differs from dense
    attention's by at most the sum of those errors over that total, times the largest distance between two values.
    """
    reach = torch.linalg.vector_norm(rows * call.scale, dim=-1, keepdim=True) * radius.unsqueeze(2)
    error = far + reach + reach.log().clamp(max=0.0) - far.logsumexp(dim=-1, keepdim=True)
    error = error.exp().masked_fill(near, 0.0)
    ascending = error.sort(dim=-1).values
    kept = (ascending.cumsum(dim=-1) <= call.tolerance).sum(dim=-1, keepdim=True)
    ascending = torch.nn.functional.pad(ascending, (0, 1), value=math.inf)
    return (error >= ascending.gather(-1, kept)) & (error > 0.0)


def row_weights(call: MultipoleCall, field: FarField, rows: Tensor, select: Select) -> tuple[Tensor, Tensor]:
    """Attention of non-prefix queries.

    Args:
        rows: (B, H_kv, R, D) queries, raised. select: answers which clusters a row resolves.

    Returns:
        logits (B, H_kv, R, M + C) of all keys and all clusters, and which of them count: prefix keys, keys of near
        clusters, and the other clusters.
    """
    far, near = near_clusters(call, field, rows, select)
    of_key = near.gather(-1, call.clusters.unsqueeze(2).expand(-1, -1, rows.shape[2], -1))
    prefix = of_key.new_ones((*of_key.shape[:-1], call.num_prefix_tokens))
    logits = torch.cat([key_logits(call, rows), far], dim=-1)
    counted = torch.cat([prefix, of_key, ~near], dim=-1)
    return logits, counted & (logits != float("-inf"))


@full_precision
def multipole_attention_reference(call: MultipoleCall, select: Select = kept_by_stable_sort) -> Tensor:
    """(B, H, N, D_v) output of a checked call with its clusters; `select` answers which clusters a row resolves."""
    prefix = call.num_prefix_tokens
    query, (_, value) = raised(call.query), keys_and_values(call)
    first = key_logits(call, call.grouped(query[:, :, :prefix]))
    outputs = [call.ungrouped(_dropped(call, softmax_of_kept(first, first != float("-inf"))) @ value)]
    field = far_field(call)
    soft = softmax_of_kept(*row_weights(call, field, call.grouped(query[:, :, prefix:]), select))
    outputs.append(call.ungrouped(_dropped(call, soft) @ torch.cat([value, field.value], dim=2)))
    return torch.cat(outputs, dim=2).to(call.query.dtype)


def _dropped(call: MultipoleCall, soft: Tensor) -> Tensor:
    return torch.nn.functional.dropout(soft, call.dropout_p) if call.dropout_p > 0.0 else soft
