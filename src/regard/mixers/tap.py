"""Token-aware average pooling (TAP, arXiv 2303.11126): each token chooses how much of its neighbours it stands for."""

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from regard.cards import Card, Evidence
from regard.mixers._attention import resolve_grid
from regard.ops._counts import check_count
from regard.specs import Modifier, register

__all__ = ["CARD", "TAP", "TokenAwarePooling"]

CARD = Card(
    name="tap",
    title="Token-aware average pooling",
    paper="Robustifying Token Attention for Vision Transformers",
    authors="Guo et al.",
    venue="ICCV 2023",
    arxiv="2303.11126",
    exact=True,
    cost="9 N C K for the weights, 4 N C (K - 1) additions for the averages, beside the mechanism's own",
    needs_grid=True,
    adds_parameters=True,
    modifies=True,
    converts=False,
    summary="Whatever the mechanism: before a block's attention each token is replaced by a mix of itself and the "
    "averages of its 3 x 3 neighbourhoods at dilations 1 to K - 1, under weights predicted for each place; the "
    "residual keeps the token.",
    equation=r"x \leftarrow x + \operatorname{Attn}\!\Big(\operatorname{LN}\big(\textstyle\sum_{k=0}^{K-1} m_k \odot "
    r"D_k(x)\big)\Big), \qquad D_0(x) = x, \quad D_k(x)_p = \tfrac19 \sum_{\delta \in \{-1, 0, 1\}^2} "
    r"x_{p + k \delta}, \qquad m = \operatorname{softmax}_k\big(\operatorname{conv}_{3 \times 3}(\operatorname{BN}("
    r"\operatorname{conv}_{3 \times 3}(x)))\big)",
    variants=(
        "The published form on FAN, here the backbones `tap_fan_tiny` to `tap_fan_large` and their hybrids: K = 4, in "
        "every block, no pooling in class attention or the convolutional stem. K = 1 is FAN (`fan_tiny` ...).",
        "On any vision transformer with any attention mixer, here the modifier `tap`: the authors did so with RVT. "
        "Class and register tokens are neither pooled nor averaged into others.",
    ),
    claims=(
        "With ADL, FAN-B-Hybrid, ImageNet-1k: 83.9 to 84.3 % top-1; ImageNet-C mCE 46.1 to 43.7; ImageNet-A 39.6 to "
        "42.3 %.",
        "With ADL, RVT-B: 83.1 % top-1, ImageNet-C mCE 44.7, ImageNet-A 32.7 %, 92.1 M parameters.",
        "With ADL, segmentation with FAN-B-Hybrid: Cityscapes 82.9, Cityscapes-C 69.7, ACDC 63.6 mIoU.",
    ),
    claims_source="the paper and the official README",
    official="guoyongcs/TAPADL",
    licence="MIT",
    quirks=(
        "Beyond the border stand zeros that count in the average (always a ninth of the sum), so a constant picture "
        "darkens towards its borders; so it does here.",
        "The grid is taken to be a square (the root of the number of tokens), other pictures raise; here any grid.",
        "Neighbourhoods are unfolded: nine copies of the tokens for each dilation; here two passes of three shifted "
        "sums, no copy beyond the K averages.",
        "The default of the model functions is K = 1, which keeps a predictor whose weights are all one; the training "
        "script passes K = 4. Here K = 4, and K = 1 has no parameters.",
        "README's FAN-B-ViT checkpoint is the hybrid (`tap_fan_base_16_p4_hybrid`, 50.7 M).",
    ),
    evidence=Evidence(
        identities=(
            "K = 1 is the identity, bit for bit",
            "weights that choose k = 0 alone: the identity",
            "a constant picture stays as it is wherever no neighbourhood leaves it",
            "class and register tokens stay as they are",
        ),
        parity="guoyongcs/TAPADL at 6e4dbff, tap_fan_tiny on synthetic weights: float64 logits within 1e-9",
        parameters={
            "tap_fan_tiny": 7_404_688,
            "tap_fan_small": 28_513_048,
            "tap_fan_base": 54_643_360,
            "tap_fan_large": 80_992_468,
            "tap_fan_hybrid_tiny": 7_523_752,
            "tap_fan_hybrid_small": 26_257_704,
            "tap_fan_hybrid_base": 50_735_528,
            "tap_fan_hybrid_large": 77_238_644,
        },
        trained="`regard compare` trains it beside dense attention on real images, with several seeds",
    ),
)


class TokenAwarePooling(nn.Module):
    """Mix every token with averages of its neighbourhoods, under weights predicted for each place (arXiv 2303.11126).

    Memory: K tensors of the tokens' size, and K numbers a token.

    Args:
        dim: channels C of the tokens.
        num_scales: K: the token itself and dilations 1 to K - 1. 1 is the identity, without parameters.
        num_prefix_tokens: how many of the first tokens (class, registers) stand outside the grid; they are kept.
        device, dtype: of the parameters.

    Raises:
        TypeError, ValueError: dim or num_scales is no int or below 1, num_prefix_tokens below 0.
    """

    def __init__(
        self,
        dim: int,
        num_scales: int = 4,
        *,
        num_prefix_tokens: int = 0,
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_count("dim", dim)
        check_count("num_scales", num_scales)
        check_count("num_prefix_tokens", num_prefix_tokens, least=0)
        self.dim = dim
        self.num_scales = num_scales
        self.num_prefix_tokens = num_prefix_tokens
        if num_scales > 1:
            options: dict[str, Any] = {"device": device, "dtype": dtype}
            self.predictor = nn.Sequential(
                nn.Conv2d(dim, num_scales, 3, padding=1, bias=False, **options),
                nn.BatchNorm2d(num_scales, **options),
                nn.Conv2d(num_scales, num_scales, 3, padding=1, bias=False, **options),
            )

    def extra_repr(self) -> str:
        return f"dim={self.dim}, num_scales={self.num_scales}, num_prefix_tokens={self.num_prefix_tokens}"

    def forward(self, x: Tensor, *, grid_size: tuple[int, ...] | None = None) -> Tensor:
        """(B, N, C) -> (B, N, C).

        Args:
            grid_size: (height, width) of the tokens after the prefix; a square is inferred if None.

        Raises:
            TypeError, ValueError: x is not (B, N, C), or the grid does not fit or is not of rank 2.
        """
        if x.dim() != 3 or x.shape[-1] != self.dim:
            raise ValueError(f"x: expected (batch, tokens, {self.dim}), got shape {tuple(x.shape)}")
        if self.num_scales == 1:
            return x
        grid = resolve_grid(x.shape[1], self.num_prefix_tokens, grid_size)
        if len(grid) != 2:
            raise ValueError(f"grid_size: neighbourhoods are 3 x 3 places of a (height, width) grid, got {grid}")
        prefix, cells = x[:, : self.num_prefix_tokens], x[:, self.num_prefix_tokens :].unflatten(1, grid)
        weights = self.predictor(cells.permute(0, 3, 1, 2)).softmax(dim=1)[..., None].unbind(1)
        mixed = weights[0] * cells
        for dilation in range(1, self.num_scales):
            mixed = mixed + weights[dilation] * dilated_average(cells, dilation)
        mixed = mixed.flatten(1, 2)
        return torch.cat([prefix, mixed], dim=1) if self.num_prefix_tokens else mixed


def dilated_average(cells: Tensor, dilation: int) -> Tensor:
    """(B, height, width, C): a ninth of the sum over each place's 3 x 3 neighbours `dilation` apart; zeros outside."""
    _, height, width, _ = cells.shape
    rows = F.pad(cells, (0, 0, 0, 0, dilation, dilation))
    cells = sum((rows[:, i * dilation : i * dilation + height] for i in (1, 2)), rows[:, :height])
    columns = F.pad(cells, (0, 0, dilation, dilation))
    return sum((columns[:, :, i * dilation : i * dilation + width] for i in (1, 2)), columns[:, :, :width]) / 9


@register
@dataclass(frozen=True, eq=False)
class TAP(Modifier):
    """Token-aware average pooling before every block's attention, `tap(num_scales=4)` in text.

    Raises:
        TypeError, ValueError: num_scales is no int or below 1.
    """

    card: ClassVar[Card] = CARD
    num_scales: int = 4

    def __post_init__(self) -> None:
        check_count("num_scales", self.num_scales)

    def apply(self, model: nn.Module) -> None:
        """Give each of `model.blocks` a `tap` that pools what its `norm1` reads; all other names stay.

        The model is a vision transformer as timm builds them: `patch_embed`, `blocks` with `norm1` before `attn`, and
        `num_prefix_tokens`. The grid is that of the patches in the picture last embedded, so pictures of any size do
        (with activation checkpointing, of one size between a forward and its backward).

        Raises:
            ValueError: the model is built otherwise, or has the pooling already.
        """
        patch_embed, blocks = getattr(model, "patch_embed", None), getattr(model, "blocks", None)
        prefix: Any = getattr(model, "num_prefix_tokens", 0)
        if not isinstance(patch_embed, nn.Module) or not isinstance(blocks, nn.Sequential | nn.ModuleList):
            raise ValueError(f"model: {type(model).__name__} is no vision transformer with `patch_embed` and `blocks`")
        for number, block in enumerate(blocks):
            kind = type(block).__name__
            if hasattr(block, "tap"):
                raise ValueError(f"model: blocks.{number} ({kind}) has token-aware pooling already; apply TAP once")
            # timm's blocks that norm the attention's output are called so, and name their norms alike.
            if not hasattr(block, "norm1") or not hasattr(block, "attn") or "Post" in kind:
                raise ValueError(f"model: blocks.{number} ({kind}) has no `norm1` before its `attn`, where TAP stands")
        grid = _Grid()
        patch_embed.register_forward_hook(_Watch(grid))
        for block in blocks:
            norm: Any = block.norm1
            like = next(block.parameters())
            options: dict[str, Any] = {"device": like.device, "dtype": like.dtype}
            tap = TokenAwarePooling(norm.normalized_shape[-1], self.num_scales, num_prefix_tokens=prefix, **options)
            block.tap = tap.train(block.training)
            norm.register_forward_pre_hook(_Pool(tap, grid))


@dataclass(eq=False)
class _Grid:
    """The grid of the patches in the picture last embedded; None: unknown. Shared by a model's hooks."""

    size: tuple[int, int] | None = None


@dataclass(frozen=True, eq=False)
class _Watch:
    """Forward hook of the patch embedding. Hooks are pickled and copied with their module, so these are no closures."""

    grid: _Grid

    def __call__(self, patch_embed: Any, args: tuple[Tensor, ...], output: Any) -> None:
        self.grid.size = self._seen(patch_embed, args[0], output)

    @staticmethod
    def _seen(patch_embed: Any, image: Tensor, output: Any) -> tuple[int, int] | None:
        if isinstance(output, tuple):  # tokens and grid
            return output[1]
        if output.dim() == 4:  # timm's dynamic_img_size: (B, height, width, C)
            return output.shape[1], output.shape[2]
        grid = getattr(patch_embed, "grid_size", None)
        if grid is not None and math.prod(grid) == output.shape[1]:
            return grid
        known = getattr(patch_embed, "dynamic_feat_size", None)
        return None if known is None else known((image.shape[-2], image.shape[-1]))


@dataclass(frozen=True, eq=False)
class _Pool:
    """Forward pre-hook of a block's norm1."""

    tap: TokenAwarePooling
    grid: _Grid

    def __call__(self, norm: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return (self.tap(args[0], grid_size=self.grid.size), *args[1:])
