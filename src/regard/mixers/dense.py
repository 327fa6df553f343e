"""Dense attention: every query sees every key. The measure of all others."""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from regard.cards import Card, Evidence
from regard.mixers._attention import AttentionMixer
from regard.specs import Mechanism, register

__all__ = ["CARD", "Dense", "DenseAttention"]

CARD = Card(
    name="dense",
    title="Scaled dot-product attention",
    paper="Attention Is All You Need",
    authors="Vaswani et al.",
    venue="NeurIPS 2017",
    arxiv="1706.03762",
    exact=True,
    cost="N^2",
    needs_grid=False,
    adds_parameters=False,
    summary="Every query sees every key, weighted by the softmax of their scaled products.",
    equation=r"o_i = \sum_j \operatorname{softmax}_j\!\left(\frac{q_i \cdot k_j}{\sqrt{d}}\right) v_j",
    evidence=Evidence(
        identities=("each row of weights is non-negative and sums to one", "permuting tokens permutes the outputs"),
        parity="timm's Attention: the same weights give the same outputs, with gate and norms too",
    ),
)


def _attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    attn_mask: Tensor | None = None,
    is_causal: bool = False,
    **options: Any,
) -> Tensor:
    """SDPA takes a mask or is_causal, not both; every mechanism here combines them."""
    if is_causal and attn_mask is not None:
        earlier = torch.ones(query.shape[-2], key.shape[-2], dtype=torch.bool, device=query.device).tril()
        boolean = attn_mask.dtype == torch.bool
        attn_mask = attn_mask & earlier if boolean else attn_mask.masked_fill(~earlier, float("-inf"))
        is_causal = False
    return F.scaled_dot_product_attention(query, key, value, attn_mask=attn_mask, is_causal=is_causal, **options)


class DenseAttention(AttentionMixer):
    """Dense attention through torch's SDPA (arXiv 1706.03762). Arguments as in AttentionMixer."""

    row_wise = True

    def attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None,
        is_causal: bool,
        grid_size: tuple[int, ...] | None,
    ) -> Tensor:
        return _attend(query, key, value, attn_mask=attn_mask, dropout_p=self.dropout_p, is_causal=is_causal)


@register
@dataclass(frozen=True, eq=False)
class Dense(Mechanism):
    """Dense attention, `dense` in text."""

    card: ClassVar[Card] = CARD

    def attend(self, query: Tensor, key: Tensor, value: Tensor, **options: Any) -> Tensor:
        options.pop("grid_size", None)
        options.pop("num_prefix_tokens", None)
        return _attend(query, key, value, **options)

    def attn_layer(self, **options: Any) -> type[nn.Module]:
        return DenseAttention.bind(**options) if options else DenseAttention
