"""Dense attention: every query sees every key. The measure of all others."""

from dataclasses import dataclass
from typing import Any, ClassVar

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
    evidence=Evidence(parity="timm Attention: same weights, same outputs"),
)


class DenseAttention(AttentionMixer):
    """Dense attention through torch's scaled_dot_product_attention (arXiv 1706.03762). Arguments as in AttentionMixer."""

    def attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None,
        is_causal: bool,
        grid_size: tuple[int, ...] | None,
    ) -> Tensor:
        return F.scaled_dot_product_attention(
            query, key, value, attn_mask=attn_mask, dropout_p=self.dropout_p, is_causal=is_causal
        )


@register
@dataclass(frozen=True)
class Dense(Mechanism):
    """Dense attention, `dense` in text."""

    card: ClassVar[Card] = CARD

    def attend(self, query: Tensor, key: Tensor, value: Tensor, **options: Any) -> Tensor:
        options.pop("grid_size", None)
        options.pop("num_prefix_tokens", None)
        return F.scaled_dot_product_attention(query, key, value, **options)

    def attn_layer(self) -> type[nn.Module]:
        return DenseAttention
