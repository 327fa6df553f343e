"""The largest few of each row, ties to the lowest index: what every operator that selects shares."""

import torch
from torch import Tensor

__all__ = [
    "kept_above_kth",
    "kept_by_stable_sort",
    "kept_by_threshold",
    "raised",
    "selection_state",
    "softmax_of_kept",
]


def raised(tensor: Tensor) -> Tensor:
    """Half types in float32, others as they are."""
    return tensor.float() if tensor.dtype in (torch.bfloat16, torch.float16) else tensor


def kept_by_stable_sort(scores: Tensor, topk: int) -> Tensor:
    """Boolean (..., N, M): the topk largest logits of each row, ties to the lowest index, hidden keys never."""
    order = scores.sort(dim=-1, descending=True, stable=True).indices[..., :topk]
    kept = torch.zeros_like(scores, dtype=torch.bool).scatter(-1, order, True)
    return kept & (scores != float("-inf"))


def kept_by_threshold(scores: Tensor, topk: int) -> Tensor:
    """The reference's selection without a full sort: all above the k-th logit, then the first of its ties."""
    if isinstance(topk, torch.SymInt):  # left open by torch.export, which could not prove that topk is at most M
        last = torch.scalar_tensor(topk - 1, dtype=torch.int64, device=scores.device).reshape(1)
        return _kept_from(scores, topk, scores.sort(dim=-1, descending=True).values.index_select(-1, last))
    kept = scores != float("-inf")
    if topk >= scores.shape[-1]:
        return kept
    if topk == 0:
        return torch.zeros_like(kept)
    return kept_above_kth(scores, topk)


def kept_above_kth(scores: Tensor, topk: int) -> Tensor:
    """kept_by_threshold for 1 <= topk <= M; asks nothing of the sizes, so a trace of it serves them all."""
    return _kept_from(scores, topk, scores.topk(topk, dim=-1, sorted=False).values.amin(dim=-1, keepdim=True))


def _kept_from(scores: Tensor, topk: int, kth: Tensor) -> Tensor:
    """Given the k-th logit of each row."""
    above, tied = scores > kth, scores == kth
    room = topk - above.sum(dim=-1, keepdim=True)
    # A NaN is no number's equal: kept explicitly, so that it reaches the output as in SDPA.
    kept = above | (tied & (tied.cumsum(dim=-1) <= room)) | scores.isnan()
    return kept & (scores != float("-inf"))


def softmax_of_kept(scores: Tensor, kept: Tensor) -> Tensor:
    """Softmax of each row's logits (..., N, M) over its kept keys alone; zeros where a row keeps none."""
    soft = scores.masked_fill(~kept, float("-inf")).softmax(dim=-1)
    return soft.masked_fill(~kept.any(dim=-1, keepdim=True), 0.0)


def selection_state(scores: Tensor, kept: Tensor, topk: int) -> tuple[Tensor, Tensor, Tensor]:
    """(lse, kth_logit, last_tie) of each row, each (B, H, N): all that the backward needs to select again.

    kth_logit is -inf and last_tie -1 where a row keeps all its allowed keys.
    """
    hidden = float("-inf")
    columns = scores.shape[-1]
    lse = scores.masked_fill(~kept, hidden).logsumexp(dim=-1)
    if columns == 0:
        return lse, torch.full_like(lse, hidden), torch.full_like(lse, -1, dtype=torch.int32)
    kth = scores.masked_fill(~kept, float("inf")).amin(dim=-1)
    index = torch.arange(columns, device=scores.device, dtype=torch.int32)
    tie = torch.where(kept & (scores == kth.unsqueeze(-1)), index, -1).amax(dim=-1)
    full = (scores != hidden).sum(dim=-1) <= topk
    return lse, kth.masked_fill(full, hidden), tie.masked_fill(full, -1)
