"""Neighborhood attention (NAT, arXiv 2204.07143): every query sees a box of keys around its own place in the grid."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from regard.cards import Card, Evidence
from regard.mixers._attention import MechanismMixer, resolve_grid
from regard.ops import neighborhood_attention
from regard.ops.neighborhood.api import check_windows
from regard.specs import Mechanism, register

__all__ = ["CARD", "Neighborhood", "NeighborhoodAttention"]

CARD = Card(
    name="neighborhood",
    title="Neighborhood attention",
    paper="Neighborhood Attention Transformer",
    authors="Hassani et al.",
    venue="CVPR 2023",
    arxiv="2204.07143",
    exact=True,
    cost="N w, w keys in a window",
    needs_grid=True,
    adds_parameters=False,
    query_masks=False,
    summary="Each query sees the keys of a box around its own place in the grid; at the border the box moves inward, "
    "so that all see equally many.",
    equation=r"o_i = \sum_{j \in W(i)} \operatorname{softmax}_{j \in W(i)}\!\left(\frac{q_i \cdot k_j}{\sqrt{d}} + "
    r"b_{j - i}\right) v_j",
    variants=(
        "Dilated (DiNAT, arXiv 2209.15001): `dilation` steps between the keys of a window; the grid falls into "
        "interleaved ones, each on its own.",
        "Of any rank, along a sequence, an image or a video, with causal axes (FNA, arXiv 2403.04690): the operator's "
        "`is_causal`; the module is causal along a sequence.",
        "Generalized (GNA, arXiv 2504.16922): `stride` consecutive queries share a window. With stride = kernel_size "
        "it is blocked attention (Swin without its shift).",
        "Borders: 'shift' is the published one. 'mask' makes windows smaller at the border, as TransNeXt's local keys "
        "are; 'zeropad' counts what is missing as keys of zeros, as HaloNet (arXiv 2103.12731) does with stride = "
        "block and kernel_size = block + 2 halo; 'replicate' repeats the key at the edge.",
        "Prefix tokens (class token, registers) are none of the published models'. Here every query sees them, and "
        "they see everything.",
    ),
    claims=(
        "ImageNet-1k top-1 at 224 pixels: NAT-Mini 81.8 (20 M parameters), NAT-Tiny 83.2 (28 M), NAT-Small 83.7 "
        "(51 M), NAT-Base 84.3 (90 M); DiNAT-Tiny 82.7, DiNAT-Small 83.8, DiNAT-Base 84.4.",
        "In place of a ViT's attention, with a window of 7 x 7: ViT-Small with relative biases 81.2, NAT-isotropic "
        "80.0, DiNAT-isotropic 80.8.",
    ),
    claims_source="the papers' tables",
    official="SHI-Labs/NATTEN",
    licence="MIT",
    quirks=(
        "NATTEN has had no kernel for processors since 0.20, and no relative position bias; both are here.",
        "It refuses windows larger than the grid; here they are cut down to it.",
        "It refuses windows of one key along an axis; here (1, 7, 7), say, stays within the images of a video.",
    ),
    evidence=Evidence(
        identities=(
            "a window of the grid equals dense attention, under any stride",
            "stride = kernel_size equals blocked attention where the window divides the grid",
            "a dilation equals attention within each interleaved grid",
            "a causal window of the sequence equals causal attention",
            "blocks with a halo equal HaloNet's",
            "without logits, zero padding is a convolution with the bias's softmax",
            "prefix queries attend densely, prefix keys are seen by all",
        ),
        parity="NATTEN 0.21.7 (FlexAttention on the processor), random windows, strides, dilations and causal axes of "
        "ranks 1 to 3: float32 outputs within 1e-5",
        trained="`regard compare` trains it beside dense attention on real images, with several seeds",
    ),
)


def _attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mechanism: "Neighborhood",
    *,
    is_causal: bool = False,
    grid_size: tuple[int, ...] | None = None,
    num_prefix_tokens: int = 0,
    **options: Any,
) -> Tensor:
    """The operator; without a grid a square is inferred."""
    if query.shape[-2] != key.shape[-2]:
        raise ValueError(
            f"key: {key.shape[-2]} keys for {query.shape[-2]} queries; neighborhood attention needs them in one grid"
        )
    grid = resolve_grid(query.shape[-2], num_prefix_tokens, grid_size)
    if is_causal and (len(grid) > 1 or num_prefix_tokens > 0):
        raise ValueError(
            f"is_causal: the order of tokens in a grid {grid} with {num_prefix_tokens} prefix tokens is no window's; "
            "only a sequence without prefix tokens can be causal here (regard.neighborhood_attention has causal axes)"
        )
    return neighborhood_attention(
        query,
        key,
        value,
        grid_size=grid,
        kernel_size=mechanism.kernel_size,
        dilation=mechanism.dilation,
        stride=mechanism.stride,
        is_causal=is_causal,
        border=mechanism.border,
        num_prefix_tokens=num_prefix_tokens,
        **options,
    )


@register
@dataclass(frozen=True, eq=False)
class Neighborhood(Mechanism):
    """Neighborhood attention, `neighborhood(kernel_size=7)` in text. Options as in regard.neighborhood_attention; a
    window larger than the grid is cut down to it."""

    card: ClassVar[Card] = CARD
    kernel_size: int | tuple[int, ...] = 7
    dilation: int | tuple[int, ...] = 1
    stride: int | tuple[int, ...] = 1
    border: str = "shift"

    def __post_init__(self) -> None:
        for name in ("kernel_size", "dilation", "stride"):  # a list from JSON would not hash, and reads otherwise
            if isinstance(option := getattr(self, name), Sequence) and not isinstance(option, str):
                object.__setattr__(self, name, tuple(option))
        check_windows(self.kernel_size, self.dilation, self.stride, border=self.border)

    def attend(self, query: Tensor, key: Tensor, value: Tensor, **options: Any) -> Tensor:
        return _attend(query, key, value, self, **options)

    def attn_layer(self, **options: Any) -> type[nn.Module]:
        return NeighborhoodAttention.bind(**self.options, **options)


class NeighborhoodAttention(MechanismMixer):
    """Neighborhood attention. The state_dict equals dense attention's, with `rpb` beside it if it is asked for.

    Args:
        kernel_size, dilation, stride, border: as in regard.neighborhood_attention; for each axis, or for all.
        rel_pos_bias: learn a bias for each head and offset, `rpb` (H, 2 kernel_size[0] - 1, ...), as NAT does. Then the
            number of axes must be known: give kernel_size for each, or `rank`.
        rank: axes of the grid, if kernel_size is one number; only `rel_pos_bias` reads it.
        The rest is as in AttentionMixer.

    Raises:
        ValueError, TypeError: an option is out of range or of the wrong type; in forward: masks that differ between
            queries, float masks, is_causal on anything but a sequence.
    """

    needs_grid = True

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        *args: Any,
        kernel_size: int | tuple[int, ...] = Neighborhood.kernel_size,
        dilation: int | tuple[int, ...] = Neighborhood.dilation,
        stride: int | tuple[int, ...] = Neighborhood.stride,
        border: str = Neighborhood.border,
        rel_pos_bias: bool = False,
        rank: int = 2,
        **kwargs: Any,
    ) -> None:
        mechanism = Neighborhood(kernel_size, dilation, stride, border)
        if rank not in (1, 2, 3):
            raise ValueError(f"rank: expected 1, 2 or 3, got {rank}")
        super().__init__(dim, num_heads, *args, **kwargs)
        self.mechanism = mechanism
        self.rpb: nn.Parameter | None = None
        if rel_pos_bias:
            sizes = mechanism.kernel_size if isinstance(mechanism.kernel_size, tuple) else (kernel_size,) * rank
            shape = (num_heads, *(2 * size - 1 for size in sizes))  # type: ignore[operator]
            weight = self.qkv.weight
            self.rpb = nn.Parameter(torch.empty(shape, device=weight.device, dtype=weight.dtype))
            nn.init.trunc_normal_(self.rpb, std=0.02)

    def extra_repr(self) -> str:
        return f"{self.mechanism}{'' if self.rpb is None else ', rel_pos_bias=True'}"

    def attend_options(self) -> dict[str, Any]:
        return {"attn_bias": self.rpb}
