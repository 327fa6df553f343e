"""ClusTR's attention (arXiv 2208.13138): the keys are clusters of tokens, at two granularities."""

import numbers
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from regard.cards import Card, Evidence
from regard.mixers._attention import AttentionMixer
from regard.mixers.dense import Dense
from regard.ops import Clusters, density_peak_clusters
from regard.ops._arguments import check_tensors, fold, key_mask
from regard.ops.clustering.merge import merge_by_score, merge_equally
from regard.specs import Mechanism, register

__all__ = ["CARD", "Clustered", "ClusteredAttention"]

CARD = Card(
    name="clustered",
    title="Clustered attention",
    paper="ClusTR: Exploring Efficient Self-attention via Clustering for Vision Transformers",
    authors="Xie et al.",
    venue="arXiv 2022",
    arxiv="2208.13138",
    exact=True,
    cost="N^2 distances, N M keys",
    needs_grid=False,
    adds_parameters=True,
    query_masks=False,
    summary="Tokens are grouped around density peaks into M clusters and into 4 M; each cluster is one key, the mean "
    "of its tokens under learned weights, and the outputs of the two scales are added.",
    equation=r"o_i = \sum_{s \in \{1, 2\}} \sum_{c=1}^{M_s} \operatorname{softmax}_c\!\left(\frac{q_i \cdot W^K_s "
    r"\hat x_c}{\sqrt d}\right) W^V_s \hat x_c, \qquad \hat x_c = \frac{\sum_{j \in c} e^{w \cdot x_j} x_j}"
    r"{10^{-6} + \sum_{j \in c} e^{w \cdot x_j}}, \qquad M_1 = \lfloor N / r^2 \rfloor, \; M_2 = 4 M_1",
    variants=(
        "The published form, here `regard.ClusteredAttention` and the backbones `clustr_b1` to `clustr_b3`: every "
        "layer groups its own input tokens, all heads share the groups, each scale has its own key and value "
        "projection. With r = 1 (their last stage) it is dense attention.",
        "On given queries, keys and values (`Clustered.attend`, for trained dense models): the keys are grouped, keys "
        "and values merged with equal weights, and the mean of the two scales is taken, so that weights sum to one.",
    ),
    claims=(
        "ClusTR-Small (`clustr_b2`): 83.2 % ImageNet-1k top-1 at 224 pixels, 22.7 M parameters.",
        "2.15, 4.8 and 7.48 GFLOPs (multiply-adds) for the three sizes.",
    ),
    claims_source="the paper's abstract and the official repository",
    official="YtongXie/ClusTR",
    licence="",
    quirks=(
        "The batch is clustered a quarter at a time, so fewer than 4 images raise ValueError; here any number goes.",
        "Noise of up to 1e-6 is added to the densities, in evaluation too, so that equal densities are ordered at "
        "random; here the lower index counts as the denser.",
        "The weights exp(s) overflow in float16 beyond s = 11; here the largest s of each cluster is subtracted, and "
        "the 1e-6 scaled alike, which changes nothing else.",
        "All N x N distances are held, and the published FLOPs leave them out: N^2 C multiply-adds a layer, 0.85 G "
        "more for `clustr_b1`.",
        "reset_classifier reads an attribute that does not exist and raises.",
    ),
    evidence=Evidence(
        identities=(
            "reduction 1 equals dense attention",
            "as many clusters as tokens equals dense attention, up to the 1e-6",
            "tokens alike within each cluster: their weights do not matter",
            "equal projections and clusters at both scales: twice one scale",
            "permuting tokens permutes the outputs",
        ),
        parity="YtongXie/ClusTR at 3b5e28d, ClusTR_b1 on synthetic weights: float64 logits within 1e-9",
        parameters={"clustr_b1": 11_682_417, "clustr_b2": 22_690_941, "clustr_b3": 40_246_210},
        trained="`regard compare` trains it beside dense attention on real images, with several seeds",
    ),
)

_FINER = 4  # clusters of the fine scale for each of the coarse one


def _check_reduction(reduction: int) -> None:
    if isinstance(reduction, bool) or not isinstance(reduction, numbers.Integral):
        raise TypeError(f"reduction: expected an int, got {type(reduction).__name__}")
    if reduction < 1:
        raise ValueError(f"reduction: expected at least 1 (dense attention), got {reduction}")


def _check_not_causal(is_causal: bool) -> None:
    if is_causal:
        raise ValueError("is_causal: a cluster merges earlier and later tokens; clustered attention cannot be causal")


def _two_scales(x: Tensor, reduction: int, visible: Tensor | None) -> tuple[Clusters, ...]:
    """The tokens' clusters (B, N, C), coarse and fine; none where there are no tokens."""
    tokens = x.shape[1]
    if tokens == 0:
        none = torch.zeros(x.shape[0], 0, dtype=torch.int64, device=x.device)
        return Clusters(none, none), Clusters(none, none)
    coarse = max(1, tokens // reduction**2)
    return density_peak_clusters(x, (coarse, min(_FINER * coarse, tokens)), mask=visible)


def _seen(visible: Tensor | None, clusters: Clusters, num_prefix_tokens: int) -> Tensor | None:
    """(B, 1, 1, P + M) mask of prefix tokens and clusters: a cluster is hidden if its centre is, and only then."""
    if visible is None:
        return None
    prefix, cells = visible[:, :num_prefix_tokens], visible[:, num_prefix_tokens:]
    return torch.cat([prefix, cells.gather(1, clusters.centers)], dim=1)[:, None, None]


class ClusteredAttention(AttentionMixer):
    """ClusTR's attention at two granularities (arXiv 2208.13138).

    N tokens make max(1, N // reduction^2) clusters, and four times as many; each has its own key and value projection,
    and the two outputs are added. Prefix tokens are not grouped: they are keys of their own at both scales.

    Of the dense parameters `qkv` holds the query's projection and that of the fine scale's keys and values; `kv_coarse`
    is the coarse scale's and `score` gives the logarithm of a token's weight in its cluster. With reduction 1 there is
    one scale, every token a key: dense attention and its parameters.

    Masks may only hide keys from all queries alike: boolean, (N,) or broadcastable to (B, 1, 1, N). Hidden tokens take
    no part in the grouping, the number of clusters stays that of all tokens.

    Args:
        reduction: r, an int >= 1.
        The rest is as in AttentionMixer.

    Raises:
        ValueError, TypeError: reduction is out of range or no int; in forward: a mask that differs between queries or
            heads, a float mask, is_causal.
    """

    def __init__(self, dim: int, num_heads: int = 8, *args: Any, reduction: int = 4, **kwargs: Any) -> None:
        _check_reduction(reduction)
        super().__init__(dim, num_heads, *args, **kwargs)
        self.reduction = reduction
        if reduction > 1:
            like: dict[str, Any] = {"device": self.qkv.weight.device, "dtype": self.qkv.weight.dtype}
            self.kv_coarse = nn.Linear(dim, 2 * self.attn_dim, bias=self.qkv.bias is not None, **like)
            self.score = nn.Linear(dim, 1, **like)

    def extra_repr(self) -> str:
        return f"reduction={self.reduction}"

    def attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None,
        is_causal: bool,
        grid_size: tuple[int, ...] | None,
    ) -> Tensor:
        """What `Clustered.attend` does. `forward` does it with reduction 1; otherwise it merges tokens, not keys."""
        return Clustered(self.reduction).attend(
            query,
            key,
            value,
            attn_mask=attn_mask,
            dropout_p=self.dropout_p,
            is_causal=is_causal,
            num_prefix_tokens=self.num_prefix_tokens,
        )

    def mix(self, x: Tensor, attn_mask: Tensor | None, is_causal: bool, grid_size: tuple[int, ...] | None) -> Tensor:
        if self.reduction == 1:
            return super().mix(x, attn_mask, is_causal, grid_size)
        query, mixed = self._query(x), []
        for scale in self._scales(x, self._visible(x, attn_mask, is_causal)):
            key, value = self._key_value(scale.merge(x), scale.coarse)
            options: dict[str, Any] = {"attn_mask": scale.seen, "dropout_p": self.dropout_p}
            mixed.append(F.scaled_dot_product_attention(query, key, value, **options))
        coarse, fine = mixed
        return coarse + fine

    def attention_weights(
        self,
        x: Tensor,
        attn_mask: Tensor | None = None,
        is_causal: bool = False,
        *,
        grid_size: tuple[int, ...] | None = None,
    ) -> Tensor:
        """(B, H, N, N): how much of each token reaches each query through the clusters, the mean of the two scales.

        Rows sum to one, up to the published 1e-6; `forward` adds the scales.
        """
        if self.reduction == 1:
            return super().attention_weights(x, attn_mask, is_causal, grid_size=grid_size)
        self._grid(x, grid_size)
        batch, tokens, _ = x.shape
        identity = torch.eye(tokens, device=x.device, dtype=x.dtype).expand(batch, tokens, tokens)
        query, weights = self._query(x), []
        for scale in self._scales(x, self._visible(x, attn_mask, is_causal)):
            key, _ = self._key_value(scale.merge(x), scale.coarse)
            share = scale.merge(identity).to(key.dtype)[:, None].expand(-1, self.num_heads, -1, -1)
            weights.append(F.scaled_dot_product_attention(query, key, share, attn_mask=scale.seen))
        return torch.stack(weights).mean(0)

    def _visible(self, x: Tensor, attn_mask: Tensor | None, is_causal: bool) -> Tensor | None:
        _check_not_causal(is_causal)
        batch, tokens, _ = x.shape
        return None if attn_mask is None else key_mask(attn_mask, (batch, self.num_heads, tokens, tokens), x.device)

    def _scales(self, x: Tensor, visible: Tensor | None) -> "list[_Scale]":
        cells = x[:, self.num_prefix_tokens :]
        score = self.score(cells).squeeze(-1)
        part = None if visible is None else visible[:, self.num_prefix_tokens :]
        coarse, fine = _two_scales(cells, self.reduction, part)
        return [
            _Scale(clusters, score, part, _seen(visible, clusters, self.num_prefix_tokens), is_coarse)
            for clusters, is_coarse in ((coarse, True), (fine, False))
        ]

    def _query(self, x: Tensor) -> Tensor:
        bias = None if self.qkv.bias is None else self.qkv.bias[: self.attn_dim]
        query = F.linear(x, self.qkv.weight[: self.attn_dim], bias)
        return self.normed_query(query.unflatten(-1, (self.num_heads, self.head_dim)).transpose(1, 2))

    def _key_value(self, tokens: Tensor, coarse: bool) -> tuple[Tensor, Tensor]:
        if coarse:
            projected = self.kv_coarse(tokens)
        else:
            bias = None if self.qkv.bias is None else self.qkv.bias[self.attn_dim :]
            projected = F.linear(tokens, self.qkv.weight[self.attn_dim :], bias)
        key, value = projected.unflatten(-1, (2, self.num_heads, self.head_dim)).permute(2, 0, 3, 1, 4).unbind(0)
        return self.k_norm(key), value


@dataclass(frozen=True)
class _Scale:
    """One granularity: the clusters of the tokens after the prefix, and what weighs and hides them.

    Args:
        score: (B, N - P) logarithms of the tokens' weights.
        part: (B, N - P) which tokens are not hidden; None: all.
        seen: (B, 1, 1, P + M) which keys; None: all.
    """

    clusters: Clusters
    score: Tensor
    part: Tensor | None
    seen: Tensor | None
    coarse: bool

    def merge(self, tokens: Tensor) -> Tensor:
        """(B, N, C) -> (B, P + M, C): prefix tokens as they are, then the clusters' weighted means."""
        assignment, centers = self.clusters
        count = centers.shape[1]
        prefix, cells = tokens.split([tokens.shape[1] - assignment.shape[1], assignment.shape[1]], dim=1)
        if count == 0:
            return prefix
        score = self.score
        if self.part is not None:
            cells = cells.masked_fill(~self.part[..., None], 0.0)
            score = score.masked_fill(~self.part, float("-inf"))
        merged = merge_by_score(cells, assignment, score, num_clusters=count)
        return torch.cat([prefix, merged], dim=1)


@register
@dataclass(frozen=True, eq=False)
class Clustered(Mechanism):
    """Clustered attention, `clustered(reduction=4)` in text: N tokens make N // reduction^2 clusters, and four times as
    many; reduction 1 is dense attention."""

    card: ClassVar[Card] = CARD
    reduction: int = 4

    def __post_init__(self) -> None:
        _check_reduction(self.reduction)

    def attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
        grid_size: tuple[int, ...] | None = None,
        num_prefix_tokens: int = 0,
    ) -> Tensor:
        """As in Mechanism, without training: clusters of the keys, all heads' channels joined; equal weights.

        The mean of the two scales, where the trained mixer adds them, so that each query's weights sum to one.
        """
        _check_not_causal(is_causal)
        check_tensors(query, key, value, enable_gqa)
        if not 0 <= num_prefix_tokens <= key.shape[-2]:
            raise ValueError(f"num_prefix_tokens: {num_prefix_tokens} of {key.shape[-2]} keys")
        shape = (*query.shape[:-1], key.shape[-2])
        visible = None if attn_mask is None else key_mask(attn_mask, shape, query.device)
        options: dict[str, Any] = {"dropout_p": dropout_p, "scale": scale, "enable_gqa": enable_gqa}
        if self.reduction == 1:
            mask = None if visible is None else visible.view(*shape[:-3], 1, 1, shape[-1])
            return Dense().attend(query, key, value, attn_mask=mask, **options)
        query, key, value = fold(query), fold(key), fold(value)
        joined = torch.cat([key, value], dim=-1).transpose(1, 2).flatten(2)
        prefix, cells = joined[:, :num_prefix_tokens], joined[:, num_prefix_tokens:]
        keys = key[:, :, num_prefix_tokens:].transpose(1, 2).flatten(2)
        part = None
        if visible is not None:
            part = visible[:, num_prefix_tokens:]
            cells = cells.masked_fill(~part[..., None], 0.0)
        outputs = []
        for clusters in _two_scales(keys, self.reduction, part):
            count = clusters.centers.shape[1]
            merged = merge_equally(cells, clusters.assignment, part, num_clusters=count) if count else cells
            seen = _seen(visible, clusters, num_prefix_tokens)
            both = torch.cat([prefix, merged], dim=1).unflatten(-1, (key.shape[1], -1)).transpose(1, 2)
            key_of, value_of = both.split([key.shape[-1], value.shape[-1]], dim=-1)
            outputs.append(F.scaled_dot_product_attention(query, key_of, value_of, attn_mask=seen, **options))
        return torch.stack(outputs).mean(0).reshape(*shape[:-1], value.shape[-1])

    def attn_layer(self, **options: Any) -> type[nn.Module]:
        return ClusteredAttention.bind(**self.options, **options)
