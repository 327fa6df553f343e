"""The attention diversification loss as a modifier: every attention mixer of a model reports it while it is trained."""

import numbers
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor, nn

from regard.auxiliary import Reporter
from regard.cards import Card, Evidence
from regard.losses.diversification import attention_diversification, attention_diversification_of, check_threshold
from regard.specs import Modifier, register

__all__ = ["ADL", "CARD"]

CARD = Card(
    name="adl",
    title="Attention diversification loss",
    paper="Robustifying Token Attention for Vision Transformers",
    authors="Guo et al.",
    venue="ICCV 2023",
    arxiv="2303.11126",
    exact=True,
    cost="N^2 logits in training, O(N) memory; nothing in evaluation",
    needs_grid=False,
    adds_parameters=False,
    modifies=True,
    converts=False,
    summary="Whatever the mechanism: training adds a loss that is high where the attention rows of different queries "
    "are alike, the mean cosine of each row, averaged over heads, to the mean of all rows.",
    equation=r"\mathcal L = \frac{1}{L N} \sum_{l=1}^{L} \sum_{i=1}^{N} \cos\!\left(T(A^l_i),\, "
    r"T\!\left(\tfrac1N \textstyle\sum_m A^l_m\right)\right), \qquad A^l_i = \tfrac1H \textstyle\sum_h A^{l,h}_i, "
    r"\qquad T(a)_j = a_j \, [a_j > \tau / N]",
    variants=(
        "The published code, here: rows and their mean are thresholded each by itself at tau / N, tau = 2, and the "
        "loss joins the task's with weight 1. The official FAN and RVT trainings share it.",
        "Explicit maps (`attention_diversification`), for any mechanism, and queries and keys alone "
        "(`attention_diversification_of`), in blocks of rows: the same value and gradients, O(N) memory.",
    ),
    claims=(
        "With TAP, FAN-B-Hybrid, ImageNet-1k: 83.9 to 84.3 % top-1; ImageNet-C mCE 46.1 to 43.7; ImageNet-A 39.6 to "
        "42.3 %.",
        "With TAP, RVT-B: 83.1 % top-1, ImageNet-C mCE 44.7, ImageNet-A 32.7 %, 92.1 M parameters.",
        "With TAP, segmentation with FAN-B-Hybrid: Cityscapes 82.9, Cityscapes-C 69.7, ACDC 63.6 mIoU.",
    ),
    claims_source="the paper and the official README",
    official="guoyongcs/TAPADL",
    licence="MIT",
    quirks=(
        "The head-averaged map is squeezed, so that with a batch of one the mean runs over keys instead of queries, "
        "and the cosine compares other things; here one picture's loss is its row of a larger batch.",
        "The mean row is taken before the threshold and then thresholded itself; so is it here.",
        "The maps are taken after dropout of the weights (0 in the recipe). Here dropout takes no part where rows are "
        "formed in blocks.",
        "The mean over layers divides by L + 1e-6; here by L.",
        "All N x N maps of all layers and heads are kept until the backward.",
    ),
    evidence=Evidence(
        identities=(
            "identical rows above the threshold give 1, rows without a common column less",
            "the value lies in [0, 1], and is 0 where no column's mean exceeds the threshold",
            "one picture's loss is its part of a larger batch's",
            "in blocks of any size: value and gradients of the explicit form",
        ),
        parity="guoyongcs/TAPADL at 6e4dbff, random maps and all twelve layers of tap_fan_tiny: within 1e-12 and 1e-9",
        trained="`regard compare` trains it beside dense attention on real images, with several seeds",
    ),
)


@register
@dataclass(frozen=True, eq=False)
class ADL(Modifier):
    """Attention diversification loss, `adl(weight=1.0, threshold=2.0)` in text; reported under the name "adl".

    Args:
        weight: factor of the loss beside the task's.
        threshold: tau; weights of at most tau / N count as zero.

    Raises:
        TypeError, ValueError: weight or threshold is no number, or negative.
    """

    card: ClassVar[Card] = CARD
    weight: float = 1.0
    threshold: float = 2.0

    def __post_init__(self) -> None:
        if isinstance(self.weight, bool) or not isinstance(self.weight, numbers.Real):
            raise TypeError(f"weight: expected a number, got {type(self.weight).__name__}")
        if not self.weight >= 0.0:
            raise ValueError(f"weight: expected at least 0, got {self.weight}")
        check_threshold(self.threshold)

    def apply(self, model: nn.Module) -> None:
        """Make every attention mixer of the model report the loss of its own weights, while somebody collects losses.

        Raises:
            ValueError: the model has no attention mixer of regard, or reports the loss already.
        """
        mixers: list[Any] = [
            module for module in model.modules() if isinstance(module, Reporter) and _has_weights(module)
        ]
        if not mixers:
            raise ValueError(
                f"model: {type(model).__name__} has no attention mixer of regard, whose weights ADL could read; build "
                "it with attn_layer=parse_mechanism('dense').attn_layer()"
            )
        if any(isinstance(hook, _Diversify) for mixer in mixers for hook in mixer._forward_hooks.values()):
            raise ValueError("model: it reports the attention diversification loss already; apply ADL once")
        for mixer in mixers:
            seen = _Seen(mixer)
            if getattr(mixer, "row_wise", False):
                mixer.q_norm.register_forward_hook(_Note(seen, "query"))
                mixer.k_norm.register_forward_hook(_Note(seen, "key"))
            mixer.register_forward_hook(_Diversify(seen, self.weight, self.threshold), with_kwargs=True)


def _has_weights(module: nn.Module) -> bool:
    return hasattr(module, "attention_weights")


# Hooks are copied and pickled with their modules, so these are no closures.
@dataclass(eq=False)
class _Seen:
    """The normed queries and keys of the forward that a mixer is in, noted while somebody collects losses."""

    mixer: Any
    query: Tensor | None = None
    key: Tensor | None = None


@dataclass(frozen=True, eq=False)
class _Note:
    """Forward hook of the norm (or identity) through which a mixer's queries, or keys, go."""

    seen: _Seen
    place: str

    def __call__(self, norm: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        if self.seen.mixer.reporting:
            setattr(self.seen, self.place, output)


@dataclass(frozen=True, eq=False)
class _Diversify:
    """A mixer's forward hook.

    Mixers stand in a room beside, and are known here by what they can do: `row_wise` ones make queries and keys and say
    which keys a row keeps (`kept_keys`); others are asked for their maps (`attention_weights`).
    """

    seen: _Seen
    weight: float
    threshold: float

    def __call__(self, mixer: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> None:
        if mixer.reporting:
            mixer.report("adl", self.loss(mixer, *args, **kwargs), weight=self.weight)

    def loss(
        self,
        mixer: Any,
        x: Tensor,
        attn_mask: Tensor | None = None,
        is_causal: bool = False,
        *,
        grid_size: tuple[int, ...] | None = None,
    ) -> Tensor:
        """The loss of what the mixer made of the arguments that `forward` was given."""
        query, key = self.seen.query, self.seen.key
        self.seen.query = self.seen.key = None
        if query is None or key is None:
            weights = mixer.attention_weights(x, attn_mask, is_causal, grid_size=grid_size)
            return attention_diversification(weights, self.threshold)
        return attention_diversification_of(
            query,
            key,
            threshold=self.threshold,
            attn_mask=attn_mask,
            is_causal=is_causal,
            scale=mixer.scale,
            keep=mixer.kept_keys,
        )
