"""k-NN attention (KVT, arXiv 2106.00515): every query keeps the k keys with its largest logits."""

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor, nn

from regard.cards import Card, Evidence
from regard.mixers._attention import AttentionMixer
from regard.ops import knn_attention
from regard.ops._counts import share_of
from regard.ops._selection import kept_by_threshold
from regard.ops.knn.api import check_metric, check_topk
from regard.ops.knn.tail import check_tail
from regard.specs import Mechanism, quiet, register

__all__ = ["CARD", "KNN", "KNNAttention"]

_SEED = 0  # of the tail's sample where the same input must give the same output

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
    equation=r"o_i = \sum_{j \in T_i} \operatorname{softmax}_{j \in T_i}\!\left(\frac{q_i \cdot k_j}{\sqrt{d}}\right) "
    r"v_j, \qquad T_i = \text{the } k \text{ keys } j \text{ with the largest } q_i \cdot k_j",
    variants=(
        "The fast version, the only one in the official code and the default here: the k largest logits, then softmax "
        "over them. The class token is a query and a key like any other.",
        "The slow version (Attn-slow in the authors' table), absent from the official code, here metric='euclidean': "
        "the k keys nearest to the query in Euclidean distance, then softmax over the same logits. With keys of one "
        "length both select the same. No kernel has it.",
        "tail='sample' (kNN Attention Demystified, arXiv 2411.04013, ICLR 2025): `num_samples` of each row's other "
        "keys stand for all of them, so that numerator and denominator of the softmax are unbiased. A new sample each "
        "call in training, always the same one in evaluation. No kernel has it.",
    ),
    claims=(
        "DeiT-Tiny 72.2 to 73.0 (fast and slow alike), DeiT-Small 79.8 to 80.1: ImageNet-1k top-1, 224 pixels.",
        "So-ViT-7 76.2 to 77.0, Visformer-Tiny 78.6 to 79.0, CvT-13 81.6 to 81.9, TNT-Small 81.5 to 81.9, Swin-Tiny "
        "81.2 to 81.3, T2T-ViT-t-19 82.2 to 82.7, Twins-SVT-Base 83.2 to 83.4, PiT-Base 82.0 to 82.6, DINO-Small "
        "(self-supervised) 76.0 to 76.2, VOLO-D1 (384 pixels) 85.2 to 85.4, VOLO-D3 (448 pixels) 86.3 to 86.5.",
        "Equal parameters and FLOPs. The table holds one figure a model, no spread over seeds, and no speed.",
    ),
    claims_source="the table of results in the official repository",
    official="damo-cv/KVT",
    licence="MIT",
    quirks=(
        "The published training script imports models.py and so trains dense attention; nothing imports the k-NN file.",
        "The k-NN file lacks its table default_cfgs, so that each of its model functions raises NameError.",
        "k is 100 in every layer and no model function passes another; with fewer keys it raises, here all are kept.",
        "A float32 mask of N x M and an int64 index of N x k entries are built, even under autocast; the kernel needs "
        "neither.",
        "Neither masks nor biases are taken, and ties fall as torch.topk lets them; here they go to the lowest index.",
    ),
    evidence=Evidence(
        identities=(
            "k >= M equals dense attention",
            "k = 1 hands over the value of the arg-max key, with zero gradient to query and key",
            "permuting keys with their values changes nothing",
            "ties go to the lowest index, exactly k are kept",
            "metric='euclidean' keeps the nearest keys, and equals the fast version for keys of one length",
            "a tail sampled whole equals dense attention, one of which nothing is sampled k-NN attention",
            "numerator and denominator with a sampled tail are unbiased, their variance falls as 1 / num_samples",
        ),
        parity="damo-cv/KVT at fd84745, vit_deit_tiny_patch16_224 on synthetic weights: float64 logits within 1e-9; "
        "the backbones CvT-13, T2T-ViT and So-ViT-7 likewise against their own official code, with dense attention",
        parameters={
            "kvt_deit_tiny": 5_717_416,
            "kvt_deit_small": 22_050_664,
            "kvt_cvt_13": 19_997_480,
            "kvt_t2t_vit_t_14": 21_541_070,
            "kvt_t2t_vit_t_19": 39_172_942,
            "kvt_so_vit_7": 5_579_664,
        },
        trained="`regard compare` trains it beside dense attention on real images, with several seeds",
    ),
)


class KNNAttention(AttentionMixer):
    """k-NN attention (KVT, arXiv 2106.00515). The state_dict equals dense attention's.

    Args:
        topk: int >= 1: keys each query keeps, at most all. float in (0, 1]: that fraction of the keys, rounded up.
        metric: "dot": those with the largest logits. "euclidean": the nearest.
        tail: what becomes of the other keys: "drop", or "sample": `num_samples` of them stand for all. Training draws
            them anew at each call (torch.manual_seed); evaluation always takes the same.
        The rest is as in AttentionMixer.

    Raises:
        ValueError, TypeError: topk or num_samples is out of range or no number, or metric or tail is unknown.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        *args: Any,
        topk: int | float = 0.5,
        metric: str = "dot",
        tail: str = "drop",
        num_samples: int = 64,
        **kwargs: Any,
    ) -> None:
        check_topk(topk)
        check_metric(metric)
        check_tail(tail, num_samples)
        super().__init__(dim, num_heads, *args, **kwargs)
        self.topk = topk
        self.metric = metric
        self.row_wise = metric == "dot" and tail == "drop"  # `kept_keys` knows logits only
        self.tail = tail
        self.num_samples = num_samples

    def extra_repr(self) -> str:
        tail = f", tail={self.tail!r}, num_samples={self.num_samples}" if self.tail != "drop" else ""
        return f"topk={self.topk!r}, metric={self.metric!r}{tail}"

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
            query,
            key,
            value,
            topk=self.topk,
            attn_mask=attn_mask,
            dropout_p=self.dropout_p,
            is_causal=is_causal,
            metric=self.metric,
            tail=self.tail,
            num_samples=self.num_samples,
            seed=None if self.training else _SEED,
        )

    def kept_keys(self, logits: Tensor) -> Tensor:
        return kept_by_threshold(logits, share_of(self.topk, logits.shape[-1]))


@register
@dataclass(frozen=True, eq=False)
class KNN(Mechanism):
    """k-NN attention, `knn(topk=0.5)` in text: an int is a number of keys, a float a fraction of them.

    `knn(topk=0.5, metric='euclidean')` keeps the nearest keys instead of those with the largest logits.
    `knn(topk=0.125, tail='sample', num_samples=64)`: so many of a query's other keys stand for all of them; `attend`
    always takes the same.
    """

    card: ClassVar[Card] = CARD
    topk: int | float = 0.5
    metric: str = quiet("dot")
    tail: str = quiet("drop")
    num_samples: int = quiet(64)

    def __post_init__(self) -> None:
        check_topk(self.topk)
        check_metric(self.metric)
        check_tail(self.tail, self.num_samples)

    def attend(self, query: Tensor, key: Tensor, value: Tensor, **options: Any) -> Tensor:
        options.pop("grid_size", None)
        options.pop("num_prefix_tokens", None)
        sample: dict[str, Any] = {"tail": self.tail, "num_samples": self.num_samples, "seed": _SEED}
        return knn_attention(query, key, value, topk=self.topk, metric=self.metric, **sample, **options)

    def attn_layer(self, **options: Any) -> type[nn.Module]:
        return KNNAttention.bind(**self.options, **options)
