"""Gated attention (arXiv 2505.06708): the heads' outputs are multiplied by sigmoid gates of the query's token."""

from dataclasses import dataclass
from typing import Any, ClassVar

from regard.cards import Card, Evidence
from regard.mixers._attention import GATES
from regard.specs import Modifier, register

__all__ = ["CARD", "Gated"]

CARD = Card(
    name="gated",
    title="Gated attention",
    paper="Gated Attention for Large Language Models: Non-linearity, Sparsity, and Attention-Sink-Free",
    authors="Qiu et al.",
    venue="NeurIPS 2025",
    arxiv="2505.06708",
    exact=True,
    cost="N, beside the mechanism's",
    needs_grid=False,
    adds_parameters=True,
    modifies=True,
    converts=False,
    summary="Whatever the mechanism, each head's output is multiplied by a sigmoid of the query's own token before the "
    "output projection, so that a head may also say nothing.",
    equation=r"y_i = W_O \left[ \operatorname{concat}_h o_i^h \odot \sigma(W_\theta x_i) \right]",
    variants=(
        "The position that the paper recommends (G1): after the mechanism, before the output projection, from the same "
        "normed tokens that make the queries. Gates on values, keys, queries or the projected output are not offered.",
        "`gated(kind='elementwise')`: a gate a channel, C x C weights; `gated(kind='headwise')`: one a head, C x H. "
        "Every mixer takes them as `gated=`, True meaning elementwise as in timm's `Attention`.",
    ),
    claims=(
        "A mixture of experts of 15 billion parameters: perplexity 6.026 without, 5.761 elementwise, 5.792 headwise; "
        "MMLU 58.8, 60.8, 60.1.",
        "The first token's share of attention falls from 0.467 to 0.048, the largest activation from 1053 to 94; less "
        "than 2 % latency. All on language; no vision results.",
    ),
    official="qiuzh20/gated_attention",
    licence="MIT",
    quirks=(
        "The gate's projection is part of a wider `q_proj`, grouped by key/value head; here it is `gate`, under timm's "
        "name. With scale_norm the gate comes after the norm, as in timm.",
        "No special initialisation: gates start near one half, which halves every output.",
    ),
    evidence=Evidence(
        identities=(
            "gates held open: the mechanism itself",
            "zero gate weights: the mechanism with its output projection halved",
            "elementwise gates tied within each head: headwise gates",
            "gates held shut: the output projection's bias alone",
        ),
        parity="timm's gated Attention: the same weights give the same outputs; transformers' Qwen3-Next attention "
        "without rotation: within 1e-12 in float64",
        trained="`regard compare` trains it beside dense attention on real images, with several seeds",
    ),
)


@register
@dataclass(frozen=True, eq=False)
class Gated(Modifier):
    """Gated attention, `gated(kind='elementwise')` in text: a gate for each channel, or 'headwise' for each head.

    Raises:
        ValueError, TypeError: kind is neither of the two.
    """

    card: ClassVar[Card] = CARD
    kind: str = "elementwise"

    def __post_init__(self) -> None:
        if not isinstance(self.kind, str) or self.kind not in GATES:
            raise ValueError(f"kind: expected one of {', '.join(GATES)}, got {self.kind!r}")

    def attn_options(self) -> dict[str, Any]:
        return {"gated": self.kind}
