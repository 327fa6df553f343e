"""Input factories and judgements that the tests of k-NN attention share."""

import dataclasses

import torch
from torch import Tensor

from regard.ops._selection import kept_by_stable_sort
from regard.ops.knn.call import KNNCall
from regard.ops.knn.reference import knn_attention_reference, logits, weights


def call_of(
    query: Tensor, key: Tensor, value: Tensor, topk: int, mask: Tensor | None = None, causal: bool = False
) -> KNNCall:
    return KNNCall(query, key, value, mask, topk, 0.0, causal, query.shape[-1] ** -0.5)


def in_float64(call: KNNCall) -> KNNCall:
    mask = call.attn_mask
    if mask is not None and mask.is_floating_point():
        mask = mask.double()
    return KNNCall(
        call.query.double(), call.key.double(), call.value.double(), mask, call.topk, 0.0, call.is_causal, call.scale
    )


def exact_output(call: KNNCall) -> Tensor:
    return knn_attention_reference(in_float64(call))


def eager(call: KNNCall, kept: Tensor) -> tuple[Tensor, list[Tensor]]:
    """Plain PyTorch operations in the call's own dtype, on given keys: the output, and what it depends on."""
    query, key, value = (t.detach().requires_grad_() for t in (call.query, call.key, call.value))
    wanted = [query, key, value]
    groups = query.shape[1] // key.shape[1]
    scores = (query * call.scale) @ key.repeat_interleave(groups, dim=1).transpose(-1, -2)
    if call.attn_mask is not None and call.attn_mask.is_floating_point():
        wanted.append(call.attn_mask.detach().requires_grad_())
        scores = scores + wanted[3].to(scores.dtype)
    soft = scores.masked_fill(~kept, float("-inf")).softmax(dim=-1).masked_fill(~kept.any(dim=-1, keepdim=True), 0.0)
    return soft @ value.repeat_interleave(groups, dim=1), wanted


def yardsticks(call: KNNCall, grad_output: Tensor | None = None, orders: int = 4) -> list[list[Tensor]]:
    """What eager PyTorch makes of the output and, given `grad_output`, of the gradients, summing in several orders.

    One result's largest error is a matter of luck where it has few elements. So the same problem is put again with its
    queries, keys and channels permuted: other roundings of the same sums.
    """
    kept = kept_by_stable_sort(logits(in_float64(call)), call.topk)
    results = []
    for seed in range(orders):
        g = torch.Generator().manual_seed(seed)
        rows, columns, channels = (
            torch.randperm(n, generator=g) for n in (kept.shape[2], kept.shape[3], call.query.shape[3])
        )
        mask = call.attn_mask
        if mask is not None:
            mask = mask[:, :, rows] if mask.shape[2] > 1 else mask
            mask = mask[..., columns] if mask.shape[3] > 1 else mask
        permuted = dataclasses.replace(
            call,
            query=call.query[:, :, rows][..., channels],
            key=call.key[:, :, columns][..., channels],
            value=call.value[:, :, columns],
            attn_mask=mask,
        )
        output, wanted = eager(permuted, kept[:, :, rows][..., columns])
        back, back_columns, back_channels = rows.argsort(), columns.argsort(), channels.argsort()
        found = [output.detach()[:, :, back]]
        if grad_output is not None:
            grads = torch.autograd.grad(output, wanted, grad_output[:, :, rows])
            found += [grads[0][:, :, back][..., back_channels], grads[1][:, :, back_columns][..., back_channels]]
            found.append(grads[2][:, :, back_columns])
            for grad in grads[3:]:
                grad = grad[:, :, back] if grad.shape[2] > 1 else grad
                found.append(grad[..., back_columns] if grad.shape[3] > 1 else grad)
        results.append(found)
    return [list(same) for same in zip(*results, strict=True)]


def term_sizes(call: KNNCall, grad_output: Tensor) -> list[Tensor | None]:
    """How large the terms are that each gradient (query, key, value, mask) sums: the scale of its rounding.

    A gradient may be a small difference of large terms; a bias that all keys of a row share even has none at all. Each
    term counts twice, since its weight is rounded by the exponential, the sum and the division, and then with half
    the root of how many are summed: the probable growth of rounding in a sum (Higham and Mary, 2019). Hypothesis seeks
    the unluckiest of thousands of sums, and eager PyTorch's luck is another's.
    """
    groups = call.query.shape[1] // call.key.shape[1]
    key, value = (t.repeat_interleave(groups, dim=1) for t in (call.key, call.value))
    soft = weights(call)
    roundings = _roundings(call)
    grad_soft = grad_output.abs() @ value.abs().transpose(-1, -2)
    grad_logits = roundings * soft * (grad_soft + (soft * grad_soft).sum(dim=-1, keepdim=True))
    sizes = [
        grad_logits @ key.abs() * call.scale,
        (grad_logits.transpose(-1, -2) @ call.query.abs() * call.scale).unflatten(1, (-1, groups)).sum(dim=2),
        (roundings * soft.transpose(-1, -2) @ grad_output.abs()).unflatten(1, (-1, groups)).sum(dim=2),
    ]
    if call.attn_mask is None or not call.attn_mask.is_floating_point():
        return [*sizes, None]
    return [*sizes, grad_logits.sum_to_size(call.attn_mask.shape)]


def output_terms(call: KNNCall) -> Tensor:
    """The same for the output: the size of the weighted values that a row sums."""
    value = call.value.double().repeat_interleave(call.query.shape[1] // call.key.shape[1], dim=1)
    return _roundings(call) * weights(in_float64(call)) @ value.abs()


def _roundings(call: KNNCall) -> float:
    return 2.0 + 0.5 * max(call.query.shape[2], call.key.shape[2]) ** 0.5
