"""knn_lists: which keys have the largest products with each query, as lists and not as an N x M mask.

For mechanisms that choose keys by one score and weigh them by another: the lists are what `routed_attention` takes,
with blocks of one token. One node in a compiled graph; the products are computed a block of rows at a time.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from regard.ops import _library
from regard.ops._arguments import autocast_off
from regard.ops._dispatch import Operator, functorch_active
from regard.ops._selection import kept_by_stable_sort, kept_by_threshold, raised
from regard.ops.clustering.backends import BACKENDS, Grouping, has_kernels

__all__ = ["knn_lists", "knn_lists_reference"]

_BLOCK = 1 << 21  # products held at once by the PyTorch path: a few MB


def knn_lists(query: Tensor, key: Tensor, *, topk: int, visible: Tensor | None = None) -> Tensor:
    """The `topk` keys with the largest products q . k of each query; ties go to the lowest index, NaN is the largest.

    No gradient. Half types are selected in float32.

    Args:
        query: (B, H, N, D). key: (B, H, M, D), of any strides: a dimension expanded is not copied.
        topk: 1 ... M keys.
        visible: (B, M) boolean: keys that all queries of an image may see; None: all.

    Returns:
        (B, H, N, topk) int64, ascending; -1 behind the last where fewer keys are visible, as in routed_attention.

    Raises:
        ValueError: shapes that do not fit, or topk out of range.
        TypeError: visible is not boolean.
    """
    call = _bind(query, key, topk=topk, visible=visible)
    if functorch_active():  # which sees through PyTorch operations only
        return knn_lists_reference(*call.arguments, kept=kept_by_threshold)
    return _OPERATOR.run(call)


def _bind(query: Tensor, key: Tensor, *, topk: int, visible: Tensor | None = None) -> Grouping:
    if query.dim() != 4 or key.dim() != 4 or query.shape[:2] != key.shape[:2] or query.shape[3] != key.shape[3]:
        raise ValueError(
            f"key: shape {tuple(key.shape)} does not fit the query's {tuple(query.shape)}; expected (B, H, M, D) and "
            "(B, H, N, D)"
        )
    if isinstance(topk, int) and isinstance(key.shape[2], int) and not 1 <= topk <= key.shape[2]:
        raise ValueError(f"topk: expected 1 to {key.shape[2]} keys, got {topk}")
    if visible is not None:
        if visible.dtype != torch.bool:
            raise TypeError(f"visible: expected a boolean tensor (True = may be seen), got {visible.dtype}")
        if tuple(visible.shape) != (key.shape[0], key.shape[2]):
            raise ValueError(f"visible: shape {tuple(visible.shape)}; expected {(key.shape[0], key.shape[2])}")
    return Grouping(torch.ops.regard.knn_lists, (query.detach(), key.detach(), visible, topk))


def knn_lists_reference(
    query: Tensor,
    key: Tensor,
    visible: Tensor | None,
    topk: int,
    *,
    kept: Callable[[Tensor, int], Tensor] = kept_by_stable_sort,
) -> Tensor:
    """The specification: all products at once, a mask of the kept, their indices moved to the front."""
    mask = kept(_products(query, key, visible), topk)
    # What is dropped is written behind the last place, and cut off.
    place = torch.where(mask, mask.cumsum(dim=-1) - 1, topk).clamp(max=topk)
    index = torch.arange(key.shape[2], device=query.device).expand(mask.shape)
    lists = torch.full((*mask.shape[:-1], topk + 1), -1, dtype=torch.int64, device=query.device)
    return lists.scatter(-1, place, index)[..., :topk]


def _products(query: Tensor, key: Tensor, visible: Tensor | None) -> Tensor:
    with autocast_off(query.device.type):
        scores = raised(query) @ raised(key).mT
    return scores if visible is None else scores.masked_fill(~visible[:, None, None], float("-inf"))


_SCHEMA = "(Tensor query, Tensor key, Tensor? visible, SymInt topk) -> Tensor"
torch.library.define("regard::knn_lists", _SCHEMA)
torch.library.define("regard::knn_lists_kernel", _SCHEMA)  # in C++, for the dtypes that kernels take
_library.problem()  # loads the kernels


@torch.library.register_fake("regard::knn_lists")
def _fake(query: Tensor, key: Tensor, visible: Tensor | None, topk: int) -> Tensor:
    return query.new_empty((*query.shape[:-1], topk), dtype=torch.int64)


@register_flop_formula(torch.ops.regard.knn_lists)
def _flops(query: tuple[int, ...], key: tuple[int, ...], *rest: object, **kwargs: object) -> int:
    """All products; the selection has none."""
    batch, heads, rows, dim = query
    return 2 * batch * heads * rows * key[2] * dim


def _compute(query: Tensor, key: Tensor, visible: Tensor | None, topk: int) -> Tensor:
    if has_kernels(query) and query.dtype == key.dtype:
        return torch.ops.regard.knn_lists_kernel(query, key, visible, topk)
    lists = _fake(query, key, visible, topk)
    batch, heads, rows, _ = query.shape
    step = max(1, _BLOCK // max(1, batch * heads * key.shape[2]))
    for begin in range(0, rows, step):
        part = slice(begin, begin + step)
        lists[:, :, part] = _largest(_products(query[:, :, part], key, visible), topk)
    return lists


def _largest(scores: Tensor, topk: int) -> Tensor:
    """(..., M) -> (..., topk): the lists."""
    keys = scores.shape[-1]
    index = _chosen(scores, topk) if scores.device.type == "cpu" else _sorted(scores, topk)
    hidden = scores.gather(-1, index) == float("-inf")
    index = index.masked_fill(hidden, keys).sort(dim=-1).values
    return index.masked_fill(index == keys, -1)


def _sorted(scores: Tensor, topk: int) -> Tensor:
    return scores.sort(dim=-1, descending=True, stable=True).indices[..., :topk]


def _chosen(scores: Tensor, topk: int) -> Tensor:
    """Sorts a row as a whole only where a tie is cut: cheaper, where looking for ties waits for no device."""
    keys = scores.shape[-1]
    found = scores.topk(min(topk + 1, keys), dim=-1)
    index = found.indices[..., :topk]
    if topk < keys:
        cut = ~(found.values[..., topk - 1] > found.values[..., topk])  # NaN too
        index[cut] = _sorted(scores[cut], topk)
    return index


torch.library.impl("regard::knn_lists", "CompositeExplicitAutograd", _compute)
_OPERATOR = Operator("knn_lists", _bind, BACKENDS)
