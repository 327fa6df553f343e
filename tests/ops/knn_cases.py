"""Input factories and judgements that the tests of k-NN attention share."""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from regard.ops import _library
from regard.ops._selection import kept_by_stable_sort
from regard.ops.knn.call import KNNCall
from regard.ops.knn.reference import knn_attention_reference, logits, weights

# The baseline instruction set rounds a product and its sum, where eager PyTorch on the same machine may fuse them.
ROUNDINGS = 2.0 if _library.instruction_set() == "plain" else 1.0

Layout = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Shape:
    batch: int = 2
    heads: int = 2
    key_heads: int = 2
    queries: int = 50
    keys: int = 50
    dim: int = 16
    value_dim: int = 16


def grid_values(*size: int, generator: torch.Generator, levels: int = 4) -> Tensor:
    """Multiples of 1/levels in [-1, 1]: their dot products are exact in float32, and full of ties."""
    return torch.randint(-levels, levels + 1, size, generator=generator).float() / levels


def inputs(
    shape: Shape, *, seed: int = 0, dtype: torch.dtype = torch.float32, exact: bool = True
) -> tuple[Tensor, ...]:
    """Query, key, value. With `exact` the logits have no rounding (head dims that are powers of 4 keep the scale exact
    too), so that the selection of every correct implementation is the same, ties included."""
    g = torch.Generator().manual_seed(seed)
    draw = grid_values if exact else lambda *size, generator: torch.randn(*size, generator=generator)
    query = draw(shape.batch, shape.heads, shape.queries, shape.dim, generator=g)
    key = draw(shape.batch, shape.key_heads, shape.keys, shape.dim, generator=g)
    value = torch.randn(shape.batch, shape.key_heads, shape.keys, shape.value_dim, generator=g)
    return query.to(dtype), key.to(dtype), value.to(dtype)


def contiguous(t: Tensor) -> Tensor:
    return t.contiguous()


def heads_last(t: Tensor) -> Tensor:
    """As timm's qkv projections leave it: (B, N, H, D) in memory."""
    return t.transpose(1, 2).contiguous().transpose(1, 2)


def channels_first(t: Tensor) -> Tensor:
    """Channels are not adjacent: (B, H, D, N) in memory."""
    return t.transpose(-1, -2).contiguous().transpose(-1, -2)


def gapped(t: Tensor) -> Tensor:
    """Every second token of a longer tensor whose gaps are NaN: reading one is seen at once."""
    wide = torch.full((*t.shape[:2], 2 * t.shape[2], t.shape[3] + 3), float("nan"), dtype=t.dtype)
    view = wide[:, :, ::2, 1 : 1 + t.shape[3]]
    view.copy_(t)
    return view


LAYOUTS: dict[str, Layout] = {f.__name__: f for f in (contiguous, heads_last, channels_first, gapped)}


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


def within_budget(ours: Tensor, eager: list[Tensor], exact: Tensor, terms: Tensor | None = None) -> None:
    """error(ours) <= 2 x error(eager in the same dtype), with a floor of one unit in the last place of the scale.

    The scale is the largest exact value, or `terms` where values are sums that cancel (the size of what they sum)."""
    assert ours.shape == exact.shape and ours.dtype == eager[0].dtype
    assert torch.isfinite(ours).all()
    if ours.numel() == 0:
        return
    error, *others = ((t.double() - exact).abs().max().item() for t in (ours, *eager))
    size = exact if terms is None else terms
    floor = torch.finfo(ours.dtype).eps * size.abs().max().item()
    budget = max(*(2.0 * other for other in others), floor) * ROUNDINGS
    assert error <= budget, f"error {error:.3g}, eager {others}, floor {floor:.3g}"


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
