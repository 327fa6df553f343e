"""The specification of density peak clustering, with N x N distances at hand: the streamed path is checked on it."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

__all__ = ["density_peaks_reference", "largest_count"]


def largest_count(counts: Sequence[int]) -> int:
    """The largest, of sizes that are not known yet too."""
    largest: int | torch.SymInt = counts[0]
    for count in counts[1:]:
        largest = torch.sym_max(largest, count)
    return largest  # type: ignore[return-value]


def _squares(x: Tensor) -> Tensor:
    return (x[:, :, None] - x[:, None]).square().sum(-1)


def density_peaks_reference(
    x: Tensor,
    num_clusters: Sequence[int],
    *,
    neighbors: int = 5,
    mask: Tensor | None = None,
    squares: Callable[[Tensor], Tensor] = _squares,
) -> tuple[list[Tensor], Tensor]:
    """Density peaks (Rodriguez and Laio, 2014) with the k-nearest-neighbour density of ClusTR (arXiv 2208.13138).

    With D_ij = |x_i - x_j| / sqrt(C):

        rho_i   = exp(-mean of D_ij^2 over the nearest `neighbors` tokens j, i itself among them)
        delta_i = min of D_ij over the tokens j denser than i; for the densest token the largest D of all
        gamma_i = rho_i * delta_i

    The centres are the tokens of largest gamma, and every token joins its nearest centre. Of tokens alike in density
    the lower index counts as the denser, of those alike in gamma it comes first, and of centres equally near the first
    is joined; a centre is in its own cluster always. Everything is compared in logarithms, which neither underflow far
    from all others nor round to one close to them.

    A token outside `mask`, or not finite, takes no part: it is nobody's neighbour, comes last as a centre, and is
    assigned to the first cluster.

    Args:
        x: (B, N, C), B N^2 C entries are held.
        num_clusters: counts M of centres.
        mask: (B, N) boolean, True = takes part.
        squares: gives the squared distances (B, N, N) of tokens (B, N, C).

    Returns:
        An assignment (B, N) for each count, and the centres (B, max M) in descending gamma, of which each count takes
        the first M.
    """
    x = x if x.dtype == torch.float64 else x.float()
    batch, tokens, channels = x.shape
    part = x.square().sum(-1).isfinite() & (torch.ones_like(x[..., 0], dtype=torch.bool) if mask is None else mask)
    x = x.masked_fill(~part[..., None], 0.0)
    between = squares(x).double().masked_fill(~(part[:, :, None] & part[:, None]), float("inf"))

    near = between.topk(torch.sym_min(neighbors, tokens), dim=-1, largest=False).values
    counted = near.isfinite()
    mean = near.masked_fill(~counted, 0.0).sum(-1) / counted.sum(-1) / channels  # -log(rho)
    mean = mean.masked_fill(~part, float("inf"))
    order = mean.sort(dim=-1, stable=True).indices  # the densest first
    rank = order.argsort(dim=-1)
    denser = rank[:, None, :] < rank[:, :, None]
    delta = between.masked_fill(~denser, float("inf")).amin(-1)
    largest = between.masked_fill(between.isinf(), 0.0).amax((1, 2))
    delta = torch.where(rank == 0, largest[:, None], delta)
    score = (delta.log() / 2 - mean).clamp(min=torch.finfo(torch.float64).min).masked_fill(~part, float("-inf"))
    centers = score.sort(dim=-1, descending=True, stable=True).indices[:, : largest_count(num_clusters)]

    to_center = between.gather(2, centers[:, None].expand(-1, tokens, -1))
    assignments = []
    for count in num_clusters:
        assignment = to_center[..., :count].argmin(-1).masked_fill(~part, 0)
        own = torch.arange(count, device=x.device).expand(batch, count)
        assignments.append(assignment.scatter(1, centers[:, :count], own))
    return assignments, centers
