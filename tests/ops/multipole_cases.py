"""Problems and judgements that the tests of multipole attention share."""

import dataclasses
from collections.abc import Callable, Sequence

import torch
from attention_cases import Shape, inputs, within_budget
from torch import Tensor

from regard.ops import only_backend
from regard.ops._selection import kept_by_stable_sort
from regard.ops.multipole.api import OPERATOR
from regard.ops.multipole.call import MultipoleCall
from regard.ops.multipole.reference import (
    cluster_logits,
    far_field,
    key_logits,
    multipole_attention_reference,
    row_weights,
)

Select = Callable[[Tensor, int], Tensor]


def clusters_of_sizes(sizes: Sequence[int], batch: int, heads: int, seed: int = 0) -> Tensor:
    """(B, H_kv, sum of sizes): clusters of the given sizes, their keys in another order for each head."""
    g = torch.Generator().manual_seed(seed)
    ordered = torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes))
    shuffled = [ordered[torch.randperm(len(ordered), generator=g)] for _ in range(batch * heads)]
    return torch.stack(shuffled).unflatten(0, (batch, heads))


def even_sizes(keys: int, clusters: int) -> list[int]:
    return [keys // clusters + (i < keys % clusters) for i in range(clusters)]


def call_of(
    tensors: Sequence[Tensor],
    sizes: Sequence[int],
    near: int,
    *,
    far: str = "gaussian",
    prefix: int = 0,
    visible: Tensor | None = None,
    assignment: Tensor | None = None,
) -> MultipoleCall:
    """A call whose keys, after the prefix, are in clusters of the given sizes."""
    query, key, value = tensors
    if assignment is None:
        assignment = clusters_of_sizes(sizes, *key.shape[:2])
    scale = query.shape[-1] ** -0.5
    return MultipoleCall(
        query, key, value, visible, assignment, len(sizes), near, far == "gaussian", prefix, scale
    )  # fmt: skip


def random_call(
    shape: Shape, sizes: Sequence[int], near: int, *, dtype=torch.float32, seed=0, **options
) -> MultipoleCall:
    """Keys, unlike the clusters' random members, that differ by so much that a kernel's selection can be told."""
    prefix = options.get("prefix", 0)
    shape = dataclasses.replace(shape, keys=sum(sizes) + prefix)
    return call_of(inputs(shape, seed=seed, dtype=dtype, exact=False), sizes, near, **options)


def attend(call: MultipoleCall, backend: str = "cpu") -> Tensor:
    with only_backend(backend):
        return OPERATOR.run(call)


def in_dtype(call: MultipoleCall, dtype: torch.dtype) -> MultipoleCall:
    return dataclasses.replace(call, query=call.query.to(dtype), key=call.key.to(dtype), value=call.value.to(dtype))


def in_float64(call: MultipoleCall) -> MultipoleCall:
    return in_dtype(call, torch.float64)


def taken(near: Tensor) -> Select:
    """The clusters that rows resolve, given instead of found."""
    return lambda scores, count: near


def ranks(call: MultipoleCall) -> Tensor:
    """(B, H_kv, R, C): by what rows that are no prefix queries choose the clusters to resolve, in float64."""
    call = in_float64(call)
    field, rows = far_field(call), call.grouped(call.query[:, :, call.num_prefix_tokens :])
    return cluster_logits(call, field, rows) + field.log_spread.unsqueeze(2)


def _extremes(x: Tensor, clusters: Tensor, count: int, hidden: Tensor | None) -> Tensor:
    """(B, H_kv, R, C): how far apart each cluster's visible x (B, H_kv, R, M - P) are."""
    index = clusters.unsqueeze(2).expand_as(x)
    start = x.new_empty((*x.shape[:-1], count))
    low, high = (x, x) if hidden is None else (x.masked_fill(hidden, s * float("inf")) for s in (1, -1))
    least = start.fill_(float("inf")).scatter_reduce(-1, index, low, "amin")
    most = start.fill_(-float("inf")).scatter_reduce(-1, index, high, "amax")
    return (most - least).nan_to_num(nan=0.0).clamp(min=0.0)


def kernel_selection(call: MultipoleCall) -> Tensor:
    """(B, H_kv, R, C): which clusters the kernel resolves for each row that is no prefix query, and whether it may.

    The kernel does not tell. But it is linear in the values: with the identity for values it returns its weights, and
    those of a resolved cluster's keys differ as the keys' logits do, while from afar a cluster's keys weigh the same.
    Where its keys have one logit only (a single key, above all) both are the same, and the specification decides.
    """
    prefix, keys = call.num_prefix_tokens, call.key.shape[2]
    eye = torch.eye(keys).expand(*call.key.shape[:2], -1, -1)
    probe = dataclasses.replace(in_dtype(call, torch.float32), value=eye)
    weights = call.grouped(attend(probe)[:, :, prefix:]).double()[..., prefix:]
    exact = in_float64(call)
    field, rows = far_field(exact), exact.grouped(exact.query[:, :, prefix:])
    hidden = None if call.visible is None else ~call.visible[:, :, prefix:].unsqueeze(2).expand_as(weights)
    logits = (rows * exact.scale) @ exact.key[:, :, prefix:].mT
    apart = _extremes(logits, call.clusters, call.num_clusters, hidden)
    seen = _extremes(weights.clamp(min=1e-300).log(), call.clusters, call.num_clusters, hidden)
    told = (apart > 1e-4) & (seen < 600)
    rank = ranks(call)
    by_rank = kept_by_stable_sort(rank, call.near)
    near = torch.where(told, seen > apart / 2, by_rank)

    there = field.log_count.unsqueeze(2) > -float("inf")
    allowed = there.sum(dim=-1).clamp(max=call.near).expand(near.shape[:-1])
    assert torch.equal(near.sum(dim=-1), allowed), "another number of clusters than asked for"
    if 0 < call.near < call.num_clusters:
        bound = _rounding_of_ranks(exact, rows)
        dropped = (rank - bound).masked_fill(near | ~there, -float("inf")).amax(dim=-1)
        kept = (rank + bound).masked_fill(~near, float("inf")).amin(dim=-1)
        assert (dropped <= kept).all(), "a cluster was dropped that ranks above one that was kept"
    return near


def _rounding_of_ranks(call: MultipoleCall, rows: Tensor) -> Tensor:
    """How far float32 may take the ranks of clusters: the length of their sums times the size of what they sum."""
    field = far_field(call)
    largest = field.log_count.clamp(min=0.0)
    rows = (rows * call.scale).abs()
    size = rows @ far_field(dataclasses.replace(call, key=call.key.abs())).key.mT + largest.unsqueeze(2)
    size = size + 1.0 + field.log_spread.abs().unsqueeze(2)
    if call.second_order:
        size = size + 0.5 * (rows.square() @ field.variance.mT)
    terms = call.query.shape[-1] + largest.exp().unsqueeze(2) + 8
    return torch.finfo(torch.float32).eps * terms * size


def exact_output(call: MultipoleCall, select: Select) -> Tensor:
    return multipole_attention_reference(in_float64(call), select)


def permuted(call: MultipoleCall, near: Tensor, seed: int) -> tuple[MultipoleCall, Tensor, Tensor, Tensor, Tensor]:
    """The same problem with queries, keys and channels in another order, within prefix and rest; the orders."""
    g = torch.Generator().manual_seed(seed)
    prefix = call.num_prefix_tokens

    def order(n: int) -> Tensor:
        first, rest = torch.randperm(prefix, generator=g), torch.randperm(n - prefix, generator=g)
        return torch.cat([first, prefix + rest])

    rows, columns = order(call.query.shape[2]), order(call.key.shape[2])
    channels = torch.randperm(call.query.shape[3], generator=g)
    other = dataclasses.replace(
        call,
        query=call.query[:, :, rows][..., channels],
        key=call.key[:, :, columns][..., channels],
        value=call.value[:, :, columns],
        visible=None if call.visible is None else call.visible[:, :, columns],
        assignment=call.clusters[:, :, columns[prefix:] - prefix],
    )
    near = near.unflatten(2, (call.groups, -1))[:, :, :, rows[prefix:] - prefix].flatten(2, 3)
    return other, near, rows, columns, channels


def yardsticks(
    call: MultipoleCall, near: Tensor, grad_output: Tensor | None = None, orders: int = 3
) -> list[list[Tensor]]:
    """What eager PyTorch makes of the output and, given `grad_output`, of the gradients, summing in several orders.

    It is the reference in the call's own dtype, where half types are computed in float32: less forgiving than sums in
    half types would be.
    """
    results = []
    for seed in range(orders):
        other, selection, rows, columns, channels = permuted(call, near, seed)
        wanted = [t.detach().requires_grad_() for t in (other.query, other.key, other.value)]
        other = dataclasses.replace(other, query=wanted[0], key=wanted[1], value=wanted[2])
        output = multipole_attention_reference(other, taken(selection))
        back, back_columns, back_channels = rows.argsort(), columns.argsort(), channels.argsort()
        found = [output.detach()[:, :, back]]
        if grad_output is not None:
            grads = torch.autograd.grad(output, wanted, grad_output[:, :, rows])
            found += [grads[0][:, :, back][..., back_channels], grads[1][:, :, back_columns][..., back_channels]]
            found.append(grads[2][:, :, back_columns])
        results.append(found)
    return [list(same) for same in zip(*results, strict=True)]


def _weights(call: MultipoleCall, near: Tensor) -> Tensor:
    """(B, H_kv, groups, N, M + C), of prefix queries too."""
    prefix = call.num_prefix_tokens
    first = key_logits(call, call.grouped(call.query[:, :, :prefix]))
    first = torch.nn.functional.pad(first, (0, call.num_clusters), value=-float("inf"))
    logits, counted = row_weights(call, far_field(call), call.grouped(call.query[:, :, prefix:]), taken(near))
    both = [t.unflatten(2, (call.groups, -1)) for t in (first, logits.masked_fill(~counted, -float("inf")))]
    return torch.cat(both, dim=3).softmax(dim=-1).nan_to_num(nan=0.0)


def _roundings(call: MultipoleCall) -> float:
    return 2.0 + 0.5 * max(call.query.shape[2], call.key.shape[2]) ** 0.5


def term_sizes(call: MultipoleCall, near: Tensor, grad_output: Tensor | None = None) -> list[Tensor]:
    """How large the terms are that output and gradients (query, key, value) sum: the scale of their rounding.

    See knn_cases.term_sizes, of which this is the counterpart; a cluster's part goes on to its keys.
    """
    call = in_float64(call)
    prefix, assignment = call.num_prefix_tokens, call.clusters.unsqueeze(-1)
    sizes = dataclasses.replace(call, key=call.key.abs(), value=call.value.abs())
    field, absolute = far_field(call), far_field(sizes)
    keys, values = torch.cat([sizes.key, absolute.key], dim=2), torch.cat([sizes.value, absolute.value], dim=2)
    roundings = _roundings(call)
    soft = _weights(call, near).flatten(2, 3)
    output = call.ungrouped(roundings * soft @ values)
    if grad_output is None:
        return [output]
    query, grad = (call.grouped(t.double().abs()) for t in (call.query, grad_output))
    grad_soft = grad @ values.mT
    grad_logits = roundings * soft * (grad_soft + (soft * grad_soft).sum(dim=-1, keepdim=True))
    grad_query, grad_keys = grad_logits @ keys * call.scale, grad_logits.mT @ query * call.scale
    grad_values = roundings * soft.mT @ grad
    count = call.key.shape[2]
    far = grad_logits[..., count:]
    away = torch.zeros_like(sizes.key)
    if call.second_order:
        grad_query = grad_query + call.scale**2 * query * (far @ field.variance)
        spread = (sizes.key[:, :, prefix:] + own(absolute.key, assignment)) * own(
            call.scale**2 * (far.mT @ query.square()), assignment
        )
        away[:, :, prefix:] = spread

    share = own(field.log_count.neg().exp().unsqueeze(-1), assignment)
    if call.visible is not None:
        share = share.masked_fill(~call.visible[:, :, prefix:].unsqueeze(-1), 0.0)
    grad_key, grad_value = grad_keys[:, :, :count].clone(), grad_values[:, :, :count].clone()
    grad_key[:, :, prefix:] += share * (own(grad_keys[:, :, count:], assignment) + away[:, :, prefix:])
    grad_value[:, :, prefix:] += share * own(grad_values[:, :, count:], assignment)
    return [output, call.ungrouped(grad_query), grad_key, grad_value]


def own(moment: Tensor, assignment: Tensor) -> Tensor:
    """Each key's own cluster's row of (B, H_kv, C, D)."""
    return moment.gather(2, assignment.expand(-1, -1, -1, moment.shape[-1]))


def judged(call: MultipoleCall, near: Tensor | None = None) -> None:
    """The kernel selects as it may, and its output on its own selection is within the error budget."""
    near = kernel_selection(call) if near is None else near
    (size,) = term_sizes(call, near)
    within_budget(attend(call), yardsticks(call, near)[0], exact_output(call, taken(near)), size)
