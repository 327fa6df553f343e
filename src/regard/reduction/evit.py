"""EViT (arXiv 2202.07800): patches that the class token hardly attends to are dropped on the way, or fused into one."""

from dataclasses import dataclass
from typing import ClassVar

from torch import nn

from regard.cards import Card, Evidence
from regard.reduction.reorganize import check_keep_rate, check_layers, reorganize
from regard.specs import Modifier, register

__all__ = ["CARD", "EViT"]

CARD = Card(
    name="evit",
    title="Token reorganization (EViT)",
    paper="Not All Patches are What You Need: Expediting Vision Transformers via Token Reorganizations",
    authors="Liang et al.",
    venue="ICLR 2022",
    arxiv="2202.07800",
    exact=True,
    cost="the mechanism's, of fewer and fewer tokens; N for the scores",
    needs_grid=False,
    adds_parameters=False,
    modifies=True,
    query_masks=False,
    summary="In a few layers the patches that the class token attends to least are dropped, or summed up in one token.",
    equation=r"X' = \left[\, x_{\mathrm{cls}},\; \{x_j\}_{j \in T},\; \textstyle\sum_{j \notin T} a_j x_j \right], "
    r"\qquad a_j = \frac{1}{H} \sum_h \operatorname{softmax}_j\!\left(\frac{q^h_{\mathrm{cls}} \cdot k^h_j}"
    r"{\sqrt{d}}\right), \qquad T = \text{the } \lceil \rho n \rceil \text{ of } n \text{ patches of largest } a_j",
    variants=(
        "`evit(keep_rate=0.7, layers=(3, 6, 9), fuse=True)`, the published form for twelve layers: after the attention "
        "of the fourth, the seventh and the tenth. `layers=None` takes the same quarters of any depth.",
        "Without class token, which the paper does not treat, the score is how much all tokens attend to a patch: the "
        "mean over all queries, for a matrix of logits more in these layers, some rows at a time.",
        "`regard.reduction.reorganize` puts it into any trained vision transformer of timm's, and `KeepRateSchedule` "
        "lowers the rate in training along the published cosine.",
    ),
    claims=(
        "DeiT-S, ImageNet-1k top-1 with fusing, at keep rates 1 / 0.9 / 0.8 / 0.7 / 0.6 / 0.5: 79.8, 79.8, 79.8, 79.5, "
        "78.9, 78.5; 4.6, 4.0, 3.5, 3.0, 2.6, 2.3 GFLOPs. Without fusing: 79.9, 79.7, 79.4, 79.1, 78.4 from 0.9 on.",
        "At 0.7, 50 % more images a second for 0.3 points; at equal cost and more pixels 1 point more.",
        "Trained from scratch for 300 epochs, all patches kept for 10 and the rate lowered over the next 100.",
    ),
    official="youweiliang/evit",
    licence="Apache-2.0",
    quirks=(
        "The scores are read off the N x N map after its dropout, so every layer forms that map; here the class "
        "token's row alone is computed, before dropout, and attention stays what it was (SDPA, or any mixer).",
        "A distillation token is scored and may be dropped like a patch; here all prefix tokens stay.",
        "The count is ceil of a floating product, which keeps one patch too many where rounding falls so (0.55 of 100 "
        "keeps 56); here 55.",
        "The picture tool draws a kept fused token as the image's first patch, in every later layer.",
        "While the rate falls, the training script validates at the rate of the last step, not at the base rate, and "
        "its --shrink_epochs is 0 unless given: the rate then jumps at epoch 10.",
        "deit_small_patch16_224_shrink and four more model functions take base_keep_rate and ignore it.",
    ),
    evidence=Evidence(
        identities=(
            "keep_rate=1 is the unchanged model, bit for bit",
            "outputs and gradients equal the paper's written out with the whole attention map",
            "uniform class attention keeps the first patches and fuses the sum of the others, each times 1 / N",
            "the order of the kept patches does not matter to the output",
            "197, 140, 100, 72 tokens with fusing and 197, 139, 98, 69 without, at 0.7",
            "the published multiply-adds of DeiT-S at four rates",
        ),
        parity="youweiliang/evit at 5ca95a7, deit_small_patch16_shrink_base at 0.7 with fusing on synthetic weights: "
        "the same patches kept, float64 logits within 1e-9",
        parameters={"evit_deit_small": 22_050_664, "evit_deit_base": 86_567_656},
        trained="`regard compare` trains it beside dense attention on real images, with several seeds",
    ),
)


@register
@dataclass(frozen=True, eq=False)
class EViT(Modifier):
    """Token reorganization, `evit(keep_rate=0.7)` in text: drops patches between the layers of any mechanism.

    Args:
        keep_rate, layers, fuse: as in regard.reduction.reorganize, with one rate for all layers.

    Raises:
        ValueError, TypeError: an option is out of range or of the wrong type; in `apply`: as `reorganize`.
    """

    card: ClassVar[Card] = CARD
    keep_rate: float = 0.7
    layers: tuple[int, ...] | None = None
    fuse: bool = True

    def __post_init__(self) -> None:
        check_keep_rate(self.keep_rate)
        if self.layers is not None:
            object.__setattr__(self, "layers", check_layers(self.layers))
        if not isinstance(self.fuse, bool):
            raise TypeError(f"fuse: expected True or False, got {self.fuse!r}")

    def apply(self, model: nn.Module) -> None:
        reorganize(model, self.keep_rate, self.layers, self.fuse)
