"""Sums of each cluster's tokens: the one scatter that merging, k-means and far fields share."""

import torch
from torch import Tensor

__all__ = ["cluster_sums"]


def cluster_sums(x: Tensor, assignment: Tensor, num_clusters: int) -> Tensor:
    """The sum of each cluster's tokens.

    Args:
        x: (B, N, C). assignment: (B, N).

    Returns:
        (B, M, C), in x's dtype. In a fixed order of summation on the processor; elsewhere as deterministic as torch's
        index_add, which obeys torch.use_deterministic_algorithms.
    """
    batch, _, channels = x.shape
    offsets = torch.arange(batch, device=x.device).unsqueeze(1) * num_clusters
    flat = (assignment + offsets).flatten()
    sums, rows = x.new_zeros(batch * num_clusters, channels), x.reshape(-1, channels)
    if x.device.type == "cpu":  # several times faster here than index_add
        sums = sums.scatter_add(0, flat.unsqueeze(-1).expand(-1, channels), rows)
    else:
        sums = sums.index_add(0, flat, rows)
    return sums.unflatten(0, (batch, num_clusters))
