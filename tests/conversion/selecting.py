"""The oracle: a model's own code, in which every softmax over keys first loses all but its largest scores."""

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor, nn

_softmax = Tensor.softmax


def _enter(inside: list[float], count: float, *_) -> None:
    inside.append(count)


def _leave(inside: list[float], *_) -> None:
    inside.pop()


@contextmanager
def selecting(
    model: nn.Module, fraction: float, spared: set[str] = frozenset(), *, topk: Mapping[str, float] | None = None
) -> Iterator[None]:
    """Within this context rows of scores keep their ceil(fraction * keys) largest; modules named in `spared` do not.

    Modules named in `topk` keep that fraction, or, if it is an int, that many.
    """
    counts = dict.fromkeys(spared, 1.0) | dict(topk or {})
    inside = [fraction]

    def softmax(scores: Tensor, dim: int = -1, **options) -> Tensor:
        over_keys = scores.dim() >= 3 and dim in (-1, scores.dim() - 1) and min(scores.shape[-2:]) > 1
        if over_keys:
            kept = inside[-1] if isinstance(inside[-1], int) else math.ceil(inside[-1] * scores.shape[-1])
            order = scores.detach().sort(dim=-1, descending=True, stable=True).indices[..., kept:]  # ties: first stay
            scores = scores.scatter(-1, order, float("-inf"))
        return _softmax(scores, dim, **options)

    def attention(query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, enable_gqa=False):
        assert dropout_p == 0.0 and not is_causal
        scores = query @ key.transpose(-2, -1) * (query.shape[-1] ** -0.5 if scale is None else scale)
        if attn_mask is not None and attn_mask.dtype == torch.bool:
            scores = scores.masked_fill(~attn_mask, float("-inf"))
        elif attn_mask is not None:
            scores = scores + attn_mask
        return softmax(scores) @ value

    handles = []
    for name, module in model.named_modules():
        if name in counts:
            enter, leave = partial(_enter, inside, counts[name]), partial(_leave, inside)
            handles += [module.register_forward_pre_hook(enter), module.register_forward_hook(leave)]
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with (
            mock.patch.object(Tensor, "softmax", softmax),
            mock.patch.object(F, "scaled_dot_product_attention", attention),
        ):
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
        for handle in handles:
            handle.remove()
