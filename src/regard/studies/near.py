"""Which share of the keys a query sees one by one, under each mechanism."""

import dataclasses
import math
import statistics
from collections.abc import Sequence
from functools import singledispatch

import torch

from regard.conversion import AttentionCall
from regard.mixers import KNN, Dense, Multipole
from regard.ops._counts import share_of
from regard.ops._selection import kept_by_threshold
from regard.ops.multipole.call import MultipoleCall, clusters_of_keys
from regard.ops.multipole.reference import far_field, near_clusters
from regard.specs import Mechanism

__all__ = ["near_share"]


def near_share(
    mechanism: Mechanism, calls: Sequence[AttentionCall], *, num_prefix_tokens: int, grid_size: tuple[int, ...]
) -> float | None:
    """The mean over patch queries, heads, pictures and layers; None of mechanisms that are not counted here.

    Args:
        mechanism: dense, k-NN or multipole attention.
        calls: what each layer saw.
        num_prefix_tokens: the first queries, which are left out; prefix keys count.
        grid_size: the patches' grid.
    """
    shares = [_share(mechanism, call, num_prefix_tokens, grid_size) for call in calls]
    known = [share for share in shares if share is not None]
    return statistics.fmean(known) if known else None


@singledispatch
def _share(mechanism: Mechanism, call: AttentionCall, prefix: int, grid_size: tuple[int, ...]) -> float | None:
    return None


@_share.register
def _(mechanism: Dense, call: AttentionCall, prefix: int, grid_size: tuple[int, ...]) -> float | None:
    return 1.0


@_share.register
def _(mechanism: KNN, call: AttentionCall, prefix: int, grid_size: tuple[int, ...]) -> float | None:
    keys = call.key.shape[-2]
    sampled = mechanism.num_samples if mechanism.tail == "sample" else 0
    return min(share_of(mechanism.topk, keys) + sampled, keys) / keys


@_share.register
@torch.no_grad()
def _(mechanism: Multipole, call: AttentionCall, prefix: int, grid_size: tuple[int, ...]) -> float | None:
    keys = call.key.shape[-2]
    clusters, near = mechanism.counts(keys - prefix)
    if near == 0 and mechanism.tolerance is None:
        return prefix / keys
    scale = call.options.get("scale") or call.query.shape[-1] ** -0.5
    tolerance = math.inf if mechanism.tolerance is None else mechanism.tolerance
    bound = MultipoleCall(
        call.query,
        call.key,
        call.value,
        None,
        None,
        clusters,
        near,
        mechanism.far == "gaussian",
        prefix,
        scale,
        tolerance,
    )
    assignment = clusters_of_keys(bound, mechanism.iterations, grid_size)
    bound = dataclasses.replace(bound, assignment=assignment)
    field = far_field(bound)
    counts = torch.zeros_like(field.log_count).scatter_add(
        2, assignment, torch.ones_like(assignment, dtype=torch.float)
    )
    seen = [
        (near_clusters(bound, field, rows, kept_by_threshold)[1] * counts.unsqueeze(2)).sum(dim=-1).flatten()
        for rows in bound.grouped(call.query[:, :, prefix:]).float().split(1024, dim=2)
    ]
    return float((prefix + torch.cat(seen).mean()) / keys)
