"""A checked call of multipole attention: what every backend is given."""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from regard.ops._dispatch import Refusal
from regard.ops._selection import raised
from regard.ops.clustering.kmeans import kmeans_operator

__all__ = ["MultipoleCall", "beyond_triton", "clusters_of_keys"]

# The moments of all clusters, some channels at a time, lie on chip, within what the smaller GPUs have.
_MOST_CLUSTERS = {False: 1024, True: 512}  # by second_order


@dataclass(frozen=True)
class MultipoleCall:
    """Arguments in one canonical form.

    Args:
        query: (B, H, N, D). key: (B, H_kv, M, D), H a multiple of H_kv. value: (B, H_kv, M, D_v). Any strides.
        visible: (B, H_kv, M) boolean, possibly expanded, or None if all keys are.
        assignment: (B, H_kv, M - P) int64, the cluster of each key after the P prefix tokens; None before clustering.
        num_clusters: C, 0 only if no keys but prefix tokens are there.
        near: how many clusters each query resolves, 0 <= near <= C.
        second_order: whether the far field knows the clusters' variance.
        num_prefix_tokens: P, at most N and at most M.
        scale: factor of the logits.
        tolerance: what the far field may err by, in units of the values' diameter; infinite if it is not bounded.
        dropout_p: dropout of the attention weights.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    visible: Tensor | None
    assignment: Tensor | None
    num_clusters: int
    near: int
    second_order: bool
    num_prefix_tokens: int
    scale: float
    tolerance: float = math.inf
    dropout_p: float = 0.0

    @property
    def groups(self) -> int:
        """How many query heads share a key head."""
        return self.query.shape[1] // self.key.shape[1] if self.key.shape[1] else 1

    @property
    def clusters(self) -> Tensor:
        """The assignment, which must be there."""
        if self.assignment is None:
            raise RuntimeError("the keys of this call were not clustered")
        return self.assignment

    def operands(self) -> tuple[Any, ...]:
        """The arguments of the operators in op.py."""
        return (
            self.query,
            self.key,
            self.value,
            self.visible,
            self.clusters,
            self.num_clusters,
            self.near,
            self.second_order,
            self.num_prefix_tokens,
            self.scale,
            self.tolerance,
        )

    def grouped(self, rows: Tensor) -> Tensor:
        """(B, H, N, D) -> (B, H_kv, groups * N, D): the rows that meet the same keys."""
        return rows.unflatten(1, (self.key.shape[1], self.groups)).flatten(2, 3)

    def ungrouped(self, rows: Tensor) -> Tensor:
        """The inverse of `grouped`."""
        return rows.unflatten(2, (self.groups, rows.shape[2] // self.groups)).flatten(1, 2)


def beyond_triton(call: MultipoleCall) -> Refusal | None:
    """Why the Triton kernels do not take this call, whatever its tensors; None if they do."""
    if call.tolerance < math.inf:
        return Refusal("a tolerance resolves a number of clusters of its own for each query; this kernel, a fixed one")
    if call.num_clusters > (most := _MOST_CLUSTERS[call.second_order]):
        return Refusal(f"{call.num_clusters} clusters; this kernel selects among {most} at most")
    return None


def clusters_of_keys(call: MultipoleCall, iterations: int, grid_size: tuple[int, ...] | None) -> Tensor:
    """(B, H_kv, M - P) clusters by k-means, without gradient.

    Each dimension is weighed with the queries' root mean square in it: what two keys differ by matters as far as
    queries see it. (On real queries and keys worth almost half of the centred loss: docs/fidelity.md.)
    """
    with torch.no_grad():
        prefix = call.num_prefix_tokens
        key = raised(call.key)[:, :, prefix:]
        if call.num_clusters == 0:
            return torch.zeros(key.shape[:-1], dtype=torch.int64, device=key.device)
        query = raised(call.query)[:, :, prefix:]
        if call.visible is not None and query.shape[2] == key.shape[2]:  # padding has no say, as query either
            shown = call.visible[:, :, prefix:].repeat_interleave(call.groups, dim=1)
            query = query.masked_fill(~shown.unsqueeze(-1), 0.0)
        weight = query.square().sum(dim=2, keepdim=True)
        weight = weight.unflatten(1, (key.shape[1], call.groups)).sum(dim=2).sqrt()
        # Only the ratio of the weights counts. One bad query must not spoil the clusters of all.
        weight = weight / weight.amax(dim=-1, keepdim=True)
        key = key * torch.where(weight.isfinite().all(dim=-1, keepdim=True), weight, 1.0)
        mask = None if call.visible is None else call.visible[:, :, prefix:]
        grid = None if grid_size is None else list(grid_size)
        assignment: Tensor = kmeans_operator(key, mask, call.num_clusters, iterations, grid)[0]
        return assignment
