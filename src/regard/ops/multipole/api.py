"""multipole_attention: the checked entry."""

import dataclasses
import math
import numbers
from collections.abc import Sequence

import torch
from torch import Tensor

from regard.ops._arguments import check_dropout, check_scale, check_tensors, fold, lowered_for_autocast, visible_keys
from regard.ops._counts import check_count, share_of
from regard.ops._dispatch import Operator, Refusal
from regard.ops._operator import AttentionCall, KernelBackend, PyTorchBackend, TritonBackend
from regard.ops._selection import kept_by_threshold
from regard.ops.multipole.call import MultipoleCall, beyond_triton, clusters_of_keys
from regard.ops.multipole.op import multipole_attention_blocks, multipole_attention_op
from regard.ops.multipole.reference import multipole_attention_reference

__all__ = ["FAR_FIELDS", "OPERATOR", "check_clusters", "default_num_clusters", "multipole_attention"]

FAR_FIELDS = ("centroid", "gaussian")


def default_num_clusters(keys: int) -> int:
    """What `num_clusters=None` means: 4 sqrt(keys), so that the far field grows slowly; see docs/fidelity.md."""
    return min(keys, round(4.0 * math.sqrt(keys)))


def check_clusters(
    num_clusters: int | None, near: int | float, far: str, iterations: int, tolerance: float | None
) -> None:
    """Raise unless these options of multipole attention are of the right kind and in range, whatever the tokens."""
    if num_clusters is not None:
        check_count("num_clusters", num_clusters)
    check_count("iterations", iterations, least=0)
    if isinstance(near, bool) or not isinstance(near, numbers.Real | torch.SymInt | torch.SymFloat):
        raise TypeError(f"near: expected an int (clusters) or a float in [0, 1] (fraction), got {type(near).__name__}")
    if isinstance(near, numbers.Integral | torch.SymInt):
        if near < 0:
            raise ValueError(f"near: expected 0 clusters or more, got {near}")
        if num_clusters is not None and near > num_clusters:
            raise ValueError(f"near: {near} near clusters, but num_clusters is {num_clusters}; give at most all")
    elif not 0.0 <= near <= 1.0:  # NaN lands here too
        raise ValueError(f"near: as a fraction it must lie in [0, 1], got {near}; give an int for a number of clusters")
    if far not in FAR_FIELDS:
        raise ValueError(f"far: expected one of {', '.join(map(repr, FAR_FIELDS))}, got {far!r}")
    if tolerance is None:
        return
    if isinstance(tolerance, bool) or not isinstance(tolerance, numbers.Real):
        raise TypeError(f"tolerance: expected a number or None, got {type(tolerance).__name__}")
    if not 0.0 <= tolerance < math.inf:
        raise ValueError(f"tolerance: expected a number of at least 0, or None for no bound, got {tolerance}")
    if far != "centroid":
        raise ValueError(f"tolerance: the error of far={far!r} has no bound; take far='centroid', or no tolerance")


def multipole_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    num_clusters: int | None,
    near: int | float,
    far: str = "centroid",
    num_prefix_tokens: int = 0,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    scale: float | None = None,
    iterations: int = 2,
    grid_size: Sequence[int] | None = None,
    enable_gqa: bool = False,
    tolerance: float | None = None,
) -> Tensor:
    """Attention with a near field of exact keys and a far field of clusters.

    The keys are grouped by k-means, without gradient. Each query estimates the mass of every cluster: n exp(q . mean),
    times exp(q^T diag(variance) q / 2) with far="gaussian". The keys of the `near` clusters with the largest mass times
    spread (the sum of their variances: seen from afar a tight cluster is right, however heavy) enter its softmax one by
    one; every other cluster enters as one key of its mass, with its mean value. Means and variances carry gradient.

    After multipole attention for language models (arXiv 2506.13059), which has whole clusters near, and improved
    clustered attention (arXiv 2007.04825), which has single keys of the best clusters. Other than there, clusters are
    found in the queries' metric and ranked by spread, too, and the far field may be of second order.

    With all clusters near, or a cluster for each key, it equals scaled_dot_product_attention.

    Args:
        query: (..., H, N, D).
        key: (..., H_kv, M, D).
        value: (..., H_kv, M, D_v).
        num_clusters: clusters of each key head, at most M - P; None: 4 sqrt(M - P).
        near: int: clusters, at most num_clusters. float in [0, 1]: that fraction, rounded up. 0: far field only.
        far: "centroid", or "gaussian" for the second-order far field.
        num_prefix_tokens: P: the first P keys stand outside of all clusters and are seen by all; the first P queries
            attend densely.
        attn_mask: boolean (True = attend), broadcastable to (..., H, 1, M): it may hide keys, the same for all queries.
        dropout_p: dropout of the attention weights, of keys and clusters alike (holds N x M weights).
        scale: factor of the logits, 1 / sqrt(D) if None.
        iterations: of k-means.
        grid_size: the grid of the M - P other keys, of any rank; it only spreads the starting centroids over the image.
        enable_gqa: allow H to be a multiple of H_kv.
        tolerance: for each query more clusters become near, those that may err most first, until the output is known to
            differ from dense attention's by at most `tolerance` times the largest distance between two values (up to
            rounding). The bound follows from the clusters' radii and holds for any input; what is found is much
            closer. 0 is dense attention. None: no bound. With far="centroid" only.

    Returns:
        (..., H, N, D_v), in the query's dtype; zeros where all keys are hidden.

    Raises:
        TypeError: an argument of the wrong type or dtype.
        ValueError: shapes that do not fit, a count out of range, or a mask that differs between queries.
    """
    call, lead, grid = _bind(
        query,
        key,
        value,
        num_clusters=num_clusters,
        near=near,
        far=far,
        num_prefix_tokens=num_prefix_tokens,
        attn_mask=attn_mask,
        dropout_p=dropout_p,
        scale=scale,
        iterations=iterations,
        grid_size=grid_size,
        enable_gqa=enable_gqa,
        tolerance=tolerance,
    )
    call = dataclasses.replace(call, assignment=clusters_of_keys(call, iterations, grid))
    output = OPERATOR.run(call)
    return output.reshape(*lead, *output.shape[1:]) if len(lead) != 1 else output


def _bind(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    num_clusters: int | None,
    near: int | float,
    far: str = "centroid",
    num_prefix_tokens: int = 0,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    scale: float | None = None,
    iterations: int = 2,
    grid_size: Sequence[int] | None = None,
    enable_gqa: bool = False,
    tolerance: float | None = None,
) -> tuple[MultipoleCall, tuple[int, ...], tuple[int, ...] | None]:
    """The call in canonical form, not yet clustered; the leading dimensions that were folded; the grid."""
    check_clusters(num_clusters, near, far, iterations, tolerance)
    check_tensors(query, key, value, enable_gqa)
    check_dropout(dropout_p)
    check_scale(scale)
    clustered = _clustered_keys(query, key, num_prefix_tokens)
    grid = _check_grid(grid_size, clustered)
    if num_clusters is None:
        num_clusters = default_num_clusters(clustered)
    elif num_clusters > clustered:
        raise ValueError(
            f"num_clusters: {num_clusters} clusters of {clustered} keys (key {tuple(key.shape)}, "
            f"{num_prefix_tokens} prefix tokens); give at most one a key, or None"
        )
    if isinstance(near, numbers.Integral | torch.SymInt) and near > num_clusters:
        raise ValueError(f"near: {near} near clusters of {num_clusters}; give at most all, or a fraction")
    query, key, value = lowered_for_autocast(query, key, value)
    visible = None if attn_mask is None else visible_keys(attn_mask, query, key)
    lead = tuple(query.shape[:-3])
    if len(lead) != 1:
        query, key, value = (fold(tensor) for tensor in (query, key, value))
    call = MultipoleCall(
        query,
        key,
        value,
        visible,
        None,
        num_clusters,
        share_of(near, num_clusters),
        far == "gaussian",
        num_prefix_tokens,
        query.shape[-1] ** -0.5 if scale is None else float(scale),
        math.inf if tolerance is None else float(tolerance),
        float(dropout_p),
    )
    return call, lead, grid


def _clustered_keys(query: Tensor, key: Tensor, num_prefix_tokens: int) -> int:
    if isinstance(num_prefix_tokens, bool) or not isinstance(num_prefix_tokens, numbers.Integral | torch.SymInt):
        raise TypeError(f"num_prefix_tokens: expected an int, got {type(num_prefix_tokens).__name__}")
    queries, keys = query.shape[-2], key.shape[-2]
    if not 0 <= num_prefix_tokens <= min(queries, keys):
        raise ValueError(f"num_prefix_tokens: {num_prefix_tokens} of {queries} queries and {keys} keys")
    return keys - num_prefix_tokens


def _check_grid(grid_size: Sequence[int] | None, cells: int) -> tuple[int, ...] | None:
    if grid_size is None:
        return None
    grid = tuple(grid_size)
    if not grid or any(size < 0 for size in grid) or math.prod(grid) != cells:
        raise ValueError(f"grid_size: {grid} is no grid of the {cells} keys that are not prefix tokens")
    return grid


class _TritonBackend(TritonBackend):
    def supports(self, call: AttentionCall) -> Refusal | None:
        return super().supports(call) or beyond_triton(call)  # type: ignore[arg-type]


def _reference(call: MultipoleCall) -> Tensor:
    """Selects as the kernels do."""
    return multipole_attention_reference(call, kept_by_threshold)


OPERATOR = Operator(
    "multipole_attention",
    lambda *args, **kwargs: _bind(*args, **kwargs)[0],
    (
        KernelBackend(multipole_attention_op),
        _TritonBackend(multipole_attention_op),
        PyTorchBackend(multipole_attention_blocks, _reference),
    ),
)
