"""The correctness gate: no speed-up is told of an operator that is wrong.

The rule, for values: error(kernel against float64) <= 2 x error(eager in the same dtype against float64), with a floor
of one unit in the last place of the output's scale. Where a selection is discontinuous two judgements are needed, since
two correct kernels may keep different keys where logits are one rounding apart:
- selection: no dropped logit exceeds a kept one by more than the logits' rounding bounds, and exactly k are kept;
- values and gradients: compared on the kernel's own selection. Eager's error is the worst of several orders of
  summation.
"""

import dataclasses
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from regard.ops.knn.api import OPERATOR
from regard.ops.knn.call import KNNCall
from regard.ops.knn.reference import knn_attention_reference, logits

__all__ = ["GateResult", "Judgement", "check_knn", "error_budget"]

_WIDEST = 256  # columns of value that every backend takes
_NARROWEST = 8
_ORDERS = 4  # in which eager's error is taken


@dataclass(frozen=True)
class Judgement:
    """One compared tensor: the largest absolute error and what is allowed."""

    name: str
    error: float
    budget: float

    @property
    def passed(self) -> bool:
        return self.error <= self.budget  # a NaN is not

    def __str__(self) -> str:
        return f"{self.name} {self.error:.2g} of {self.budget:.2g}"


@dataclass(frozen=True)
class GateResult:
    """What the gate found.

    Args:
        dropped_excess: by how much, in logits, a dropped key exceeds a kept one beyond both rounding bounds, over all
            judged rows; <= 0 is right, -inf if nothing was dropped.
        miscounted_rows: judged rows that keep more or fewer keys than they must.
        rows: how many rows were judged.
    """

    operator: str
    backend: str
    dtype: str
    judgements: tuple[Judgement, ...]
    dropped_excess: float
    miscounted_rows: int
    rows: int

    @property
    def passed(self) -> bool:
        return all(one.passed for one in self.judgements) and self.dropped_excess <= 0 and self.miscounted_rows == 0

    def __str__(self) -> str:
        verdict = "green" if self.passed else "RED"
        values = ", ".join(str(one) for one in self.judgements)
        return (
            f"{self.operator} ({self.backend}, {self.dtype}), {self.rows} rows: {verdict}; error of budget: {values}; "
            f"dropped above kept by {self.dropped_excess:.2g}; {self.miscounted_rows} rows miscounted"
        )


def error_budget(exact: Tensor, *eager: Tensor, terms: Tensor | None = None) -> float:
    """How far a kernel may be from `exact`: twice as far as eager is, but at least one unit in the last place.

    Args:
        exact: float64.
        eager: the same in the kernel's dtype, from plain PyTorch operations; the worst counts if they were run several
            times (in several orders of summation). Their dtype and `exact`'s largest entry say what a unit in the last
            place is.
        terms: how large what was summed is, where sums cancel: its largest entry then says that.
    """
    if exact.numel() == 0:
        return 0.0
    scale = (exact if terms is None else terms).abs().max().item()
    info = torch.finfo(eager[0].dtype)
    unit = info.eps * 2.0 ** math.floor(math.log2(scale)) if scale > info.tiny else info.tiny * info.eps
    return max(2.0 * max(largest_error(one, exact) for one in eager), unit)


def largest_error(found: Tensor, exact: Tensor) -> float:
    """The largest absolute difference; NaN if there is one."""
    return (found.double() - exact).abs().max().item() if exact.numel() else 0.0


def check_knn(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    topk: int | float,
    backward: bool = True,
    units: int = 2,
    seed: int = 0,
    **options: Any,
) -> GateResult:
    """Judge k-NN attention on this very call, by whichever backend takes it (see regard.ops._dispatch.only_backend).

    The operator runs on the whole call. Judged are `units` pairs of an image and a key/value head, drawn at random,
    with all their rows: float64 logits of everything would not fit into memory at the sizes that matter. The kernel's
    own selection comes from the kernel: with the identity as value, its output is its matrix of weights.

    Args:
        query, key, value, topk: as in knn_attention. Finite.
        backward: judge the gradients of query, key and value too.
        units: how many pairs; all if there are fewer.
        seed: of the draw and of the output's gradient.
        options: attn_mask (its own gradient is not judged), is_causal, scale, enable_gqa.

    Raises:
        TypeError: float64, which is the measure itself.
        ValueError: the operator refuses the call, there is nothing to judge, or an input is not finite.
    """
    if query.dtype == torch.float64:
        raise TypeError("query: float64 is what the gate measures against; give float32, bfloat16 or float16")
    if query.numel() == 0 or key.numel() == 0 or value.numel() == 0:
        raise ValueError("query, key, value: empty tensors leave nothing to judge")
    for name, tensor in (("query", query), ("key", key), ("value", value)):
        if not tensor.isfinite().all():
            raise ValueError(f"{name}: holds NaN or infinity; the gate judges finite numbers")
    options.setdefault("dropout_p", 0.0)
    call: KNNCall = OPERATOR.bind(query, key, value, topk=topk, **options)
    if call.dropout_p > 0:
        raise ValueError("dropout_p: random numbers cannot be judged; leave it at 0")
    found, grad_output = _run(call, backward, seed)
    names = ("output", "grad_query", "grad_key", "grad_value")[: len(found)]
    errors: dict[str, list[tuple[float, float]]] = {name: [] for name in names}
    excess, miscounted, rows = float("-inf"), 0, 0
    for image, head in _draw(call, units, seed):
        unit, grad_unit = _unit(call, image, head), grad_output[_query_part(call, image, head)]
        kept = own_selection(unit)
        selection = judge_selection(unit, kept)
        excess, miscounted, rows = max(excess, selection[0]), miscounted + selection[1], rows + kept[..., 0].numel()
        exact = _on_selection(_as_float64(unit), kept, grad_unit.double(), backward)
        eager = _eager_in_orders(unit, kept, grad_unit, backward, seed)
        query_part, key_part = _query_part(call, image, head), _key_part(image, head)
        for place, name in enumerate(names):
            mine = found[place][key_part if name in ("grad_key", "grad_value") else query_part]
            budget = error_budget(exact[place], *(one[place] for one in eager))
            errors[name].append((largest_error(mine, exact[place]), budget))
    # Of each tensor, the unit that comes nearest to its budget, or exceeds it most.
    judgements = tuple(Judgement(name, *max(pairs, key=_strain)) for name, pairs in errors.items())
    backend = OPERATOR.choose(call)[0].name
    dtype = str(call.query.dtype).removeprefix("torch.")
    return GateResult("knn_attention", backend, dtype, judgements, excess, miscounted, rows)


def own_selection(call: KNNCall) -> Tensor:
    """Boolean (B, H, N, M): the keys to which the operator gives weight, read off its output for the identity as value.

    A kept key whose weight underflows to zero looks dropped.
    """
    batch, groups, keys, _ = call.key.shape
    parts = []
    for start in range(0, keys, _WIDEST):
        width = min(_WIDEST, keys - start)
        columns = torch.zeros(keys, max(width, _NARROWEST), dtype=call.value.dtype, device=call.value.device)
        columns[start : start + width, :width].fill_diagonal_(1.0)
        probe = dataclasses.replace(call, value=columns.expand(batch, groups, *columns.shape))
        with torch.no_grad():
            parts.append(OPERATOR.run(probe)[..., :width] != 0)
    return torch.cat(parts, dim=-1)


def judge_selection(call: KNNCall, kept: Tensor) -> tuple[float, int]:
    """(dropped_excess, miscounted_rows) of a selection; see GateResult.

    The bound of a logit's rounding is Higham's gamma_n * (|query| . |key| * scale + |bias|), n = D + 3 for the
    products' sum, the scale and the bias, in the dtype that the operator computes in (float32 for half types).
    """
    exact_call = _as_float64(call)
    exact = logits(exact_call)
    magnitudes = dataclasses.replace(
        exact_call,
        query=exact_call.query.abs(),
        key=exact_call.key.abs(),
        scale=abs(call.scale),
        attn_mask=None,
        is_causal=False,
    )
    size = logits(magnitudes)
    if call.attn_mask is not None and call.attn_mask.dtype != torch.bool:
        size = size + call.attn_mask.double().abs().nan_to_num(posinf=0.0)
    unit = torch.finfo(torch.float32).eps / 2
    steps = (call.query.shape[-1] + 3) * unit
    bound = size * (steps / (1 - steps))
    allowed = exact != float("-inf")
    dropped = allowed & ~kept
    lowest_kept = (exact + bound).masked_fill(~kept, float("inf")).amin(dim=-1)
    highest_dropped = (exact - bound).masked_fill(~dropped, float("-inf")).amax(dim=-1)
    excess = (highest_dropped - lowest_kept).masked_fill(~kept.any(dim=-1), float("-inf")).max().item()

    count, must = kept.sum(dim=-1), allowed.sum(dim=-1).clamp(max=call.topk)
    # Kept keys whose weight underflows cannot be seen; a missing one is a fault only if its weight would show.
    info = torch.finfo(call.query.dtype)
    best_dropped = exact.masked_fill(~dropped, float("-inf")).amax(dim=-1)
    lse = exact.masked_fill(~kept, float("-inf")).logsumexp(dim=-1)
    # Keeping none at all where some are allowed has a log-sum-exp of -inf, and so shows.
    shows = best_dropped - lse > math.log(info.tiny)
    wrong = (count > must) | ((count < must) & shows) | (kept & ~allowed).any(dim=-1)
    return excess, int(wrong.sum())


def _strain(pair: tuple[float, float]) -> float:
    error, budget = pair
    return math.inf if math.isnan(error) else error / budget if budget else error


def _run(call: KNNCall, backward: bool, seed: int) -> tuple[list[Tensor], Tensor]:
    """Output and gradients of the operator on the whole call, and the output's gradient that was sent back."""
    generator = torch.Generator().manual_seed(seed)
    shape = (*call.query.shape[:-1], call.value.shape[-1])
    grad_output = torch.randn(shape, generator=generator).to(call.query.device, call.query.dtype)
    return _differentiate(call, OPERATOR.run, grad_output, backward), grad_output


def _on_selection(call: KNNCall, kept: Tensor, grad_output: Tensor, backward: bool) -> list[Tensor]:
    return _differentiate(call, lambda c: knn_attention_reference(c, lambda *_: kept), grad_output, backward)


def _eager_in_orders(call: KNNCall, kept: Tensor, grad_output: Tensor, backward: bool, seed: int) -> list[list[Tensor]]:
    """Eager's results as given and with rows, keys and head dims shuffled: the same sums in other orders.

    The largest error of one order is a matter of luck, and a correct kernel that sums in another order may have less of
    it.
    """
    results = [_on_selection(call, kept, grad_output, backward)]
    generator = torch.Generator().manual_seed(seed)
    for _ in range(_ORDERS - 1):
        rows, keys, dims = (
            torch.randperm(size, generator=generator).to(kept.device)
            for size in (call.query.shape[2], call.key.shape[2], call.query.shape[3])
        )
        mask = call.attn_mask
        if mask is not None:
            mask = mask[:, :, rows] if mask.shape[2] > 1 else mask
            mask = mask[..., keys] if mask.shape[3] > 1 else mask
        shuffled = dataclasses.replace(
            call,
            query=call.query[:, :, rows][..., dims],
            key=call.key[:, :, keys][..., dims],
            value=call.value[:, :, keys],
            attn_mask=mask,
            is_causal=False,  # the selection has hidden those keys already
        )
        found = _on_selection(shuffled, kept[:, :, rows][..., keys], grad_output[:, :, rows], backward)
        back = [(rows, None), (rows, dims), (keys, dims), (keys, None)]
        results.append([_unshuffled(tensor, *order) for tensor, order in zip(found, back, strict=False)])
    return results


def _unshuffled(tensor: Tensor, tokens: Tensor, dims: Tensor | None) -> Tensor:
    tensor = tensor[:, :, tokens.argsort()]
    return tensor if dims is None else tensor[..., dims.argsort()]


def _differentiate(
    call: KNNCall, run: Callable[[KNNCall], Tensor], grad_output: Tensor, backward: bool
) -> list[Tensor]:
    leaves = [t.detach().requires_grad_(backward) for t in (call.query, call.key, call.value)]
    mask = None if call.attn_mask is None else call.attn_mask.detach()
    with torch.set_grad_enabled(backward):
        output = run(dataclasses.replace(call, query=leaves[0], key=leaves[1], value=leaves[2], attn_mask=mask))
        return [output.detach(), *(torch.autograd.grad(output, leaves, grad_output) if backward else ())]


def _as_float64(call: KNNCall) -> KNNCall:
    mask = call.attn_mask
    mask = mask.double() if mask is not None and mask.dtype != torch.bool else mask
    query, key, value = (tensor.double() for tensor in (call.query, call.key, call.value))
    return dataclasses.replace(call, query=query, key=key, value=value, attn_mask=mask)


def _draw(call: KNNCall, units: int, seed: int) -> Iterator[tuple[int, int]]:
    images, heads = call.query.shape[0], call.key.shape[1]
    order = torch.randperm(images * heads, generator=torch.Generator().manual_seed(seed))
    for place in order[: max(units, 1)].tolist():
        yield divmod(place, heads)


def _key_part(image: int, head: int) -> tuple[slice, slice]:
    return slice(image, image + 1), slice(head, head + 1)


def _query_part(call: KNNCall, image: int, head: int) -> tuple[slice, slice]:
    """The image and the query heads that share one key/value head."""
    group = call.query.shape[1] // call.key.shape[1]
    return slice(image, image + 1), slice(head * group, (head + 1) * group)


def _unit(call: KNNCall, image: int, head: int) -> KNNCall:
    """The part of a call that concerns one image and one key/value head."""
    of_query, of_key = _query_part(call, image, head), _key_part(image, head)
    mask = call.attn_mask
    if mask is not None:
        mask = mask[of_query[0] if mask.shape[0] > 1 else slice(None)]
        mask = mask[:, of_query[1] if mask.shape[1] > 1 else slice(None)]
    return dataclasses.replace(
        call, query=call.query[of_query], key=call.key[of_key], value=call.value[of_key], attn_mask=mask
    )
