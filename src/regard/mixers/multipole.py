"""Multipole attention: near clusters key by key, far clusters as one weighted key each."""

import math
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor, nn

from regard.cards import Card, Evidence
from regard.mixers._attention import MechanismMixer
from regard.ops import multipole_attention
from regard.ops._counts import share_of
from regard.ops.multipole.api import check_clusters, default_num_clusters
from regard.specs import Mechanism, register

__all__ = ["CARD", "Multipole", "MultipoleAttention"]

CARD = Card(
    name="multipole",
    title="Multipole attention",
    paper="Multipole Attention for Efficient Long Context Reasoning",
    authors="Hooper et al.",
    venue="NeurIPS 2025",
    arxiv="2506.13059",
    exact=True,
    cost="N sqrt(N) clusters, N k keys",
    needs_grid=False,
    adds_parameters=False,
    query_masks=False,
    summary="The clusters of keys with the largest estimated mass times spread are seen key by key; every other "
    "cluster is one key: its mean, weighted by its mass.",
    equation=r"o_i \propto \sum_{j \in \text{near}_i} e^{q_i \cdot k_j} v_j + \sum_{c \notin \text{near}_i} n_c\, "
    r"e^{q_i \cdot \mu_c + \frac12 q_i^\top \operatorname{diag}(\sigma_c^2)\, q_i}\, \bar v_c "
    r"\qquad (q_i \text{ scaled by } 1/\sqrt d)",
    variants=(
        "Improved clustered attention (Vyas et al., arXiv 2007.04825) clusters queries, and resolves single keys. "
        "Multipole attention (arXiv 2506.13059, for the key-value cache of language models) clusters keys and resolves "
        "whole clusters, as here.",
        "Different from both: clusters are found in the queries' metric (each dimension weighed with the queries' root "
        "mean square); they are ranked by mass times spread, for a tight cluster is right from afar however heavy it "
        "is; and the far field may be of second order: 'gaussian' knows the variance of a cluster's keys, 'centroid' "
        "their mean alone.",
    ),
    evidence=Evidence(
        identities=(
            "all clusters near equals dense attention",
            "a cluster for each key equals dense attention",
            "no cluster near and equal keys within each cluster equals dense attention",
            "prefix queries attend densely, prefix keys are always near",
            "tolerance=0 equals dense attention, and the bound of any other tolerance holds for any input",
        ),
        trained="`regard compare` trains it beside dense attention on real images, with several seeds",
    ),
)


def _attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mechanism: "Multipole",
    *,
    attn_mask: Tensor | None = None,
    is_causal: bool = False,
    num_prefix_tokens: int = 0,
    grid_size: tuple[int, ...] | None = None,
    **options: Any,
) -> Tensor:
    """The operator for any number of tokens: at most one cluster a key; a square of keys is taken for their grid."""
    if is_causal:
        raise ValueError("is_causal: a cluster holds earlier and later keys; multipole attention cannot be causal")
    cells = max(0, key.shape[-2] - num_prefix_tokens)
    clusters, near = mechanism.counts(cells)
    if grid_size is None:
        side = math.isqrt(cells)
        grid_size = (side, side) if side * side == cells else None
    return multipole_attention(
        query,
        key,
        value,
        num_clusters=clusters or None,
        near=near,
        far=mechanism.far,
        iterations=mechanism.iterations,
        tolerance=mechanism.tolerance,
        attn_mask=attn_mask,
        num_prefix_tokens=num_prefix_tokens,
        grid_size=grid_size,
        **options,
    )


@register
@dataclass(frozen=True, eq=False)
class Multipole(Mechanism):
    """Multipole attention, `multipole(near=0.1)` in text. Options as in regard.multipole_attention; with fewer keys
    than `num_clusters` each key is a cluster."""

    card: ClassVar[Card] = CARD
    num_clusters: int | None = None
    near: int | float = 0.1
    far: str = "centroid"
    iterations: int = 2
    tolerance: float | None = None

    def __post_init__(self) -> None:
        check_clusters(self.num_clusters, self.near, self.far, self.iterations, self.tolerance)

    def counts(self, cells: int) -> tuple[int, int]:
        """How many clusters so many keys have, and how many of them are near: at most one a key, and at most all."""
        clusters = min(self.num_clusters or default_num_clusters(cells), cells)
        return clusters, share_of(self.near, clusters)

    def attend(self, query: Tensor, key: Tensor, value: Tensor, **options: Any) -> Tensor:
        return _attend(query, key, value, self, **options)

    def attn_layer(self, **options: Any) -> type[nn.Module]:
        return MultipoleAttention.bind(**self.options, **options)


class MultipoleAttention(MechanismMixer):
    """Multipole attention. The state_dict equals dense attention's.

    Args:
        num_clusters, near, far, iterations, tolerance: as in regard.multipole_attention; with fewer keys than
            `num_clusters` each key is a cluster.
        The rest is as in AttentionMixer.

    Raises:
        ValueError, TypeError: an option is out of range or of the wrong type; in forward: masks that differ between
            queries, float masks, is_causal.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        *args: Any,
        num_clusters: int | None = Multipole.num_clusters,
        near: int | float = Multipole.near,
        far: str = Multipole.far,
        iterations: int = Multipole.iterations,
        tolerance: float | None = Multipole.tolerance,
        **kwargs: Any,
    ) -> None:
        mechanism = Multipole(num_clusters, near, far, iterations, tolerance)
        super().__init__(dim, num_heads, *args, **kwargs)
        self.mechanism = mechanism
