"""k-NN attention (KVT, arXiv 2106.00515): every query keeps the k keys with its largest logits."""

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor, nn

from regard.cards import Card, Evidence
from regard.mixers._attention import AttentionMixer
from regard.ops import knn_attention
from regard.ops.knn.api import check_topk
from regard.specs import Mechanism, register

__all__ = ["CARD", "KNN", "KNNAttention"]

CARD = Card(
    name="knn",
    title="k-NN attention",
    paper="KVT: k-NN Attention for Boosting Vision Transformers",
    authors="Wang et al.",
    venue="ECCV 2022",
    arxiv="2106.00515",
    exact=True,
    cost="N^2 logits, N k values",
    needs_grid=False,
    adds_parameters=False,
    summary="Each query keeps its k largest logits, per head and row, and softmax runs over those alone.",
    official="damo-cv/KVT",
    licence="MIT",
    quirks=(
        "The published training script imports models.py and so trains dense attention; the k-NN file is imported by nothing.",
        "k is hard-coded to 100 and raises where there are fewer keys; here k is clamped to the number of keys.",
        "A float32 mask and an int64 index of N x M entries are built even under autocast; here no N x M buffer exists.",
    ),
    evidence=Evidence(
        identities=(
            "k >= M equals dense attention",
            "k = 1 hands over the value of the arg-max key, with zero gradient to query and key",
            "permuting keys with their values changes nothing",
            "ties go to the lowest index, exactly k are kept",
        ),
        parity="damo-cv/KVT vit_deit_tiny_patch16_224 on synthetic weights",
        parameters={"kvt_deit_tiny": 5_717_416},
        trained="regard compare",
    ),
)


class KNNAttention(AttentionMixer):
    """k-NN attention (KVT, arXiv 2106.00515). The state_dict equals dense attention's.

    Args:
        topk: int >= 1: keys each query keeps, at most all. float in (0, 1]: that fraction of the keys, rounded up.
        The rest is as in AttentionMixer.

    Raises:
        ValueError, TypeError: topk is out of range or no number.
    """

    def __init__(self, dim: int, num_heads: int = 8, *args: Any, topk: int | float = 0.5, **kwargs: Any) -> None:
        check_topk(topk)
        super().__init__(dim, num_heads, *args, **kwargs)
        self.topk = topk

    def extra_repr(self) -> str:
        return f"topk={self.topk!r}"

    def attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None,
        is_causal: bool,
        grid_size: tuple[int, ...] | None,
    ) -> Tensor:
        return knn_attention(
            query, key, value, topk=self.topk, attn_mask=attn_mask, dropout_p=self.dropout_p, is_causal=is_causal
        )


@register
@dataclass(frozen=True)
class KNN(Mechanism):
    """k-NN attention, `knn(topk=0.5)` in text: an int is a number of keys, a float a fraction of them."""

    card: ClassVar[Card] = CARD
    topk: int | float = 0.5

    def __post_init__(self) -> None:
        check_topk(self.topk)

    def attend(self, query: Tensor, key: Tensor, value: Tensor, **options: Any) -> Tensor:
        options.pop("grid_size", None)
        options.pop("num_prefix_tokens", None)
        return knn_attention(query, key, value, topk=self.topk, **options)

    def attn_layer(self) -> type[nn.Module]:
        return KNNAttention.bind(topk=self.topk)
