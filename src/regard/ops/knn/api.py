"""knn_attention: the checked entry."""

import dataclasses
import numbers
from typing import Any

import torch
from torch import Tensor

from regard.ops._arguments import canonical_mask, check_dropout, check_scale, check_tensors, fold, lowered_for_autocast
from regard.ops._counts import share_of
from regard.ops._dispatch import Operator
from regard.ops.knn.backends import CPUBackend, GPUBackend, PyTorchBackend
from regard.ops.knn.call import KNNCall
from regard.ops.knn.op import knn_attention_op
from regard.ops.knn.tail import check_tail, seed_tensor

__all__ = ["METRICS", "OPERATOR", "check_metric", "check_topk", "knn_attention"]

METRICS = ("dot", "euclidean")


def check_topk(topk: int | float, name: str = "topk") -> None:
    """Raise unless `topk`, the argument `name`, is an int >= 1 (keys) or a float in (0, 1] (fraction of the keys)."""
    if isinstance(topk, bool) or not isinstance(topk, numbers.Real | torch.SymInt | torch.SymFloat):
        raise TypeError(f"{name}: expected an int (keys) or a float in (0, 1] (fraction), got {type(topk).__name__}")
    if isinstance(topk, numbers.Integral | torch.SymInt):
        if topk < 1:
            raise ValueError(f"{name}: a row keeps at least one key, got {topk}; give an int >= 1 or a float in (0, 1]")
    elif not 0.0 < topk <= 1.0:  # NaN lands here too
        raise ValueError(f"{name}: as a fraction it must lie in (0, 1], got {topk}; give an int for a number of keys")


def check_metric(metric: str) -> None:
    """Raise unless `metric` names what ranks the keys."""
    if metric not in METRICS:
        raise ValueError(f"metric: expected one of {', '.join(map(repr, METRICS))}, got {metric!r}")


def knn_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    topk: int | float,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    metric: str = "dot",
    tail: str = "drop",
    num_samples: int = 64,
    seed: int | Tensor | None = None,
) -> Tensor:
    """Attention in which each query keeps its `topk` largest logits (KVT, arXiv 2106.00515, the "fast version").

    The logits are scaled, then masked or biased, then selected, then softmax runs over the kept ones. Ties go to the
    lowest index, so a row keeps exactly `topk` keys; a row with fewer allowed keys keeps all of them; a row with none
    gives zeros.
    With `metric="euclidean"` it keeps the `topk` keys nearest to the query (KVT's definition, its "slow version"), and
    softmax runs over the same logits: both select the same where all keys are of one length. A bias brings a key
    nearer, as it would raise its logit.
    With `topk` at least the number of keys it equals scaled_dot_product_attention.

    With tail="sample" (arXiv 2411.04013) `num_samples` of each row's other keys, drawn uniformly and without repeats,
    stand for all of them. Numerator and denominator of the softmax are unbiased, and their variance falls as
    1 / num_samples; with samples for the whole tail the result is dense attention. In one draw a small sample may be
    farther from dense attention than no tail at all. The paper's condition for a denominator within a factor 1 +- eps,
    with probability 1 - delta, is topk^2 num_samples >= 8 M^2 eps^-2 log(4 / delta); see regard.ops.tail_samples_for.
    The sample depends on seed, head, query and key alone, so the backward draws it again: all images of a batch share
    it, and 64 neighbouring queries walk the keys in one order. It runs in PyTorch, on blocks of queries, and holds no
    N x M matrix unless there is dropout.

    Args:
        query: (..., H, N, D).
        key: (..., H_kv, M, D).
        value: (..., H_kv, M, D_v).
        topk: int >= 1: that many keys, at most all. float in (0, 1]: that fraction of all M keys, rounded up.
        attn_mask: boolean (True = attend) or floating (added to the logits), broadcastable to (..., H, N, M).
        dropout_p: dropout of the attention weights (PyTorch path).
        is_causal: query i sees keys 0 ... i only. Combines with attn_mask.
        scale: factor of the logits, 1 / sqrt(D) if None.
        enable_gqa: allow H to be a multiple of H_kv.
        metric: "dot", or "euclidean" (PyTorch path; a block of the N x M logits at a time).
        tail: "drop" or "sample", see above.
        num_samples: of each row's tail, at most all; 0 is tail="drop".
        seed: of the sample: an int, an int64 tensor of one element, or None: drawn from the device's default generator
            (torch.manual_seed). A program exported with an int draws the same sample at every call.

    Returns:
        (..., H, N, D_v), in the query's dtype. No queries, heads or batch: an empty tensor. No keys: zeros.

    Raises:
        TypeError: an argument of the wrong type or dtype.
        ValueError: shapes that do not fit, `topk`, `num_samples` or `seed` out of range, `metric` or `tail` unknown, or
            distances with a scale that is not positive.
    """
    call, lead = _bind(
        query,
        key,
        value,
        topk=topk,
        attn_mask=attn_mask,
        dropout_p=dropout_p,
        is_causal=is_causal,
        scale=scale,
        enable_gqa=enable_gqa,
        metric=metric,
        tail=tail,
        num_samples=num_samples,
        seed=seed,
    )
    if call.num_samples and call.seed is None:
        call = dataclasses.replace(call, seed=seed_tensor(None, call.query.device))
    output = OPERATOR.run(call)
    return output.reshape(*lead, *output.shape[1:]) if len(lead) != 1 else output


def _bind(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    topk: int | float,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    metric: str = "dot",
    tail: str = "drop",
    num_samples: int = 64,
    seed: int | Tensor | None = None,
) -> tuple[KNNCall, tuple[int, ...]]:
    """Check the arguments and bring them to one form; also the leading dimensions that were folded into the batch."""
    check_topk(topk)
    check_metric(metric)
    check_tail(tail, num_samples)
    check_tensors(query, key, value, enable_gqa)
    check_dropout(dropout_p)
    check_scale(scale)
    query, key, value = lowered_for_autocast(query, key, value)
    lead = tuple(query.shape[:-3])
    mask = None if attn_mask is None else canonical_mask(attn_mask, query, key)
    if len(lead) != 1:
        query, key, value = (fold(tensor) for tensor in (query, key, value))
    if scale is None:
        scale = query.shape[-1] ** -0.5
    kept = share_of(topk, key.shape[2])
    if metric == "euclidean" and not scale > 0.0:
        raise ValueError(f"scale: {scale} makes no logit of a near key large; metric='euclidean' needs a positive one")
    given = None if seed is None else seed_tensor(seed, query.device)
    samples = num_samples if tail == "sample" else 0
    options = (float(dropout_p), bool(is_causal), float(scale), metric, samples, given)
    return KNNCall(query, key, value, mask, kept, *options), lead


def _attend(*operands: Any) -> Tensor:
    return knn_attention_op(*operands)[0]


OPERATOR = Operator(
    "knn_attention",
    lambda *args, **kwargs: _bind(*args, **kwargs)[0],
    (CPUBackend(_attend), GPUBackend(_attend), PyTorchBackend()),
)
