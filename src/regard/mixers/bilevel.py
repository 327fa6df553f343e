"""Bi-level routing attention (BiFormer, arXiv 2303.08810): regions choose regions, then tokens attend within them."""

import math
import numbers
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from regard.cards import Card, Evidence
from regard.mixers._attention import MechanismMixer, resolve_grid
from regard.ops import BlockOrder, routed_attention
from regard.ops._arguments import autocast_off, check_tensors, fold, key_mask
from regard.ops._counts import check_count, share_of
from regard.ops._selection import raised
from regard.ops.routed.arranging import block_sums, from_blocks, to_blocks
from regard.specs import Mechanism, register

__all__ = ["CARD", "BiLevel", "BiLevelRoutingAttention", "conv_on_grid"]

CARD = Card(
    name="bilevel",
    title="Bi-level routing attention",
    paper="BiFormer: Vision Transformer with Bi-Level Routing Attention",
    authors="Zhu et al.",
    venue="CVPR 2023",
    arxiv="2303.08810",
    exact=True,
    cost="R^2 products of regions, N k N / R keys; N^(4/3) at the best R",
    needs_grid=True,
    adds_parameters=True,
    query_masks=False,
    summary="The grid falls into R regions; each chooses k regions by the products of mean queries and mean keys, and "
    "its queries attend to all tokens of those. A depthwise convolution of the values is added.",
    equation=r"o_i = \sum_{j \in T_{r(i)}} \operatorname{softmax}_{j \in T_{r(i)}}\!\left("
    r"\frac{q_i \cdot k_j}{\sqrt{d}}\right) v_j + \operatorname{LCE}(v)_i, \qquad T_r = \text{tokens of the } k "
    r"\text{ regions } s \text{ with the largest } \bar q_r \cdot \bar k_s",
    variants=(
        "The published form, here `regard.BiLevelRoutingAttention` and the backbones `biformer_tiny`, "
        "`biformer_small`, `biformer_base` and `biformer_stl`: 7 x 7 regions at any resolution, one choice for all "
        "heads, no gradient through the choice. A region need not choose itself.",
        "On given queries, keys and values (`BiLevel.attend`, for trained dense models): the same without LCE, the "
        "convolution of the values, which has to be trained.",
        "`region_size` fixes how many tokens a region has along each axis, instead of how many regions there are.",
        "Prefix tokens (class token, registers) are none of the published models'. Here every query sees them, they "
        "see everything, and they take no part in the choice of regions.",
    ),
    claims=(
        "ImageNet-1k top-1 at 224 pixels, 300 epochs: BiFormer-T 81.4 (13.1 M parameters, 2.2 GFLOPs), S 83.8 (25.5 M, "
        "4.5), B 84.3 (56.8 M, 9.8), BiFormer-STL (in Swin-T's layout) 82.7 (28.4 M, 4.6).",
        "COCO, Mask R-CNN 1x, box and mask AP: S 47.8 and 43.2, B 48.6 and 43.7. ADE20K, UPerNet, mIoU at one scale: S "
        "49.8, B 51.0.",
    ),
    claims_source="the paper and the official repository",
    official="rayleizhu/BiFormer",
    licence="MIT",
    quirks=(
        "Logits are scaled by 1 / sqrt(C), C all channels, where each head has d = C / H of them. The backbones here "
        "do so too, as the published weights need it; the mixer's default is 1 / sqrt(d), dense attention's.",
        "Where regions do not divide the grid, it is padded with zeros before the projection, and padded keys, which "
        "the biases fill, are averaged, chosen and attended to. Here they are hidden; `mask_padding=False` is the "
        "official way. The refactored code (bra_nchw) pads after the projection and attends to its zeros.",
        "K and V are copied k times, for every region that chose them; memory and the backward's time grow with it.",
        "The last stage's full attention has 8 heads whatever the channels, no biases in qkv, the usual scale, and "
        "takes LCE of its input, not of its values (of its values in the refactored code, other weights).",
        "reset_classifier gives a list of widths to a linear layer and raises.",
    ),
    evidence=Evidence(
        identities=(
            "all regions chosen equals dense attention, LCE apart",
            "one region equals dense attention",
            "regions of one token: each token attends to its k best by the products of all channels",
            "one region chosen, each its own: window attention",
            "without LCE, permuting regions permutes the outputs; with it, it does not",
            "the gathered form that the paper writes gives the same outputs",
            "prefix queries attend densely, prefix keys are seen by all",
        ),
        parity="rayleizhu/BiFormer at 1697bbb, biformer_tiny and biformer_stl on synthetic weights: float64 logits "
        "within 1e-9",
        parameters={
            "biformer_tiny": 13_142_760,
            "biformer_small": 25_536_232,
            "biformer_base": 56_804_968,
            "biformer_stl": 28_372_552,
        },
        trained="`regard compare` trains it beside dense attention on real images, with several seeds",
    ),
)


def _check_sizes(name: str, sizes: int | Sequence[int]) -> None:
    for size in sizes if isinstance(sizes, Sequence) and not isinstance(sizes, str) else (sizes,):
        check_count(name, size)  # type: ignore[arg-type]


def _check_topk(topk: int | float) -> None:
    if isinstance(topk, bool) or not isinstance(topk, numbers.Real):
        raise TypeError(f"topk: expected an int (regions) or a float in (0, 1] (fraction), got {type(topk).__name__}")
    if isinstance(topk, numbers.Integral):
        check_count("topk", topk)  # type: ignore[arg-type]
    elif not 0.0 < topk <= 1.0:  # NaN lands here too
        raise ValueError(f"topk: as a fraction it must lie in (0, 1], got {topk}; give an int for a number of regions")


def _check_lce(lce: int) -> None:
    check_count("lce", lce, least=0)
    if lce and lce % 2 == 0:
        raise ValueError(f"lce: expected an odd kernel size, or 0 for no convolution, got {lce}")


def _each(name: str, sizes: int | tuple[int, ...], grid: tuple[int, ...]) -> tuple[int, ...]:
    """A size for each axis of the grid."""
    if not isinstance(sizes, tuple):
        return (sizes,) * len(grid)
    if len(sizes) != len(grid):
        raise ValueError(f"{name}: {sizes} has {len(sizes)} axes, the grid {len(grid)}; give one number for all")
    return sizes


@register
@dataclass(frozen=True, eq=False)
class BiLevel(Mechanism):
    """Bi-level routing attention, `bilevel(num_regions=7, topk=4)` in text.

    Args:
        num_regions: regions along each axis, or along all. Where they do not divide the grid they have ceil(size /
            num_regions) tokens along the axis, the last ones fewer, and there may be fewer of them.
        topk: regions that each region attends to: int, at most all; float in (0, 1]: that fraction, rounded up.
        region_size: tokens of a region along each axis, or along all; takes the place of num_regions.
        lce: kernel size of the depthwise convolution on the values, odd; 0: none. `attend` has none in any case.

    Raises:
        TypeError, ValueError: an option of the wrong type or out of range.
    """

    card: ClassVar[Card] = CARD
    num_regions: int | tuple[int, ...] = 7
    topk: int | float = 4
    region_size: int | tuple[int, ...] | None = None
    lce: int = 5

    def __post_init__(self) -> None:
        for name in ("num_regions", "region_size"):
            sizes = getattr(self, name)
            if sizes is None and name == "region_size":
                continue
            _check_sizes(name, sizes)
            if isinstance(sizes, Sequence):  # a list from JSON would not hash, and reads otherwise
                object.__setattr__(self, name, tuple(sizes))
        _check_topk(self.topk)
        _check_lce(self.lce)

    def region_in(self, grid: tuple[int, ...]) -> tuple[int, ...]:
        """Tokens of a region of this grid along each axis, at most the grid's."""
        if self.region_size is not None:
            pairs = zip(grid, _each("region_size", self.region_size, grid), strict=True)
            return tuple([max(1, share_of(region, size)) for size, region in pairs])
        counts = _each("num_regions", self.num_regions, grid)
        return tuple([max(1, -(-size // count)) for size, count in zip(grid, counts, strict=True)])

    def whole_regions(self, grid: tuple[int, ...]) -> tuple[int, ...]:
        """The smallest grid around this one that num_regions whole regions fill (or regions of region_size)."""
        region = self.region_in(grid)
        if self.region_size is not None:
            return tuple([-(-size // one) * one for size, one in zip(grid, region, strict=True)])
        return tuple([n * one for n, one in zip(_each("num_regions", self.num_regions, grid), region, strict=True)])

    def attend(self, query: Tensor, key: Tensor, value: Tensor, **options: Any) -> Tensor:
        return _attend(query, key, value, self, **options)

    def attn_layer(self, **options: Any) -> type[nn.Module]:
        return BiLevelRoutingAttention.bind(**self.options, **options)


def _attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mechanism: BiLevel,
    *,
    attn_mask: Tensor | None = None,
    is_causal: bool = False,
    grid_size: tuple[int, ...] | None = None,
    num_prefix_tokens: int = 0,
    **options: Any,
) -> Tensor:
    """Attention alone, as Mechanism.attend is called; `options` are dropout_p, scale and enable_gqa."""
    if is_causal:
        raise ValueError("is_causal: a region holds earlier and later tokens; bi-level routing cannot be causal")
    check_tensors(query, key, value, options.get("enable_gqa", False))
    shape = (*query.shape[:-1], key.shape[-2])
    if query.shape[-2] != key.shape[-2]:
        raise ValueError(f"key: {shape[-1]} keys for {shape[-2]} queries; bi-level routing needs them in one grid")
    grid = resolve_grid(shape[-1], num_prefix_tokens, grid_size)
    order = BlockOrder(grid, mechanism.region_in(grid))
    visible = None
    if attn_mask is not None:
        visible = key_mask(attn_mask, shape, query.device, because="a region is chosen for what all may see in it")
    query, key, value = fold(query), fold(key), fold(value)

    cells = [to_blocks(t[:, :, num_prefix_tokens:], order) for t in (query, key, value)]
    shown = _shown(order, None if visible is None else visible[:, num_prefix_tokens:], query.device)
    blocks = _chosen_regions(cells[0], cells[1], shown, order.block_tokens, share_of(mechanism.topk, order.blocks))
    extra: dict[str, Any] = {}
    if num_prefix_tokens:
        extra = {name: t[:, :, :num_prefix_tokens] for name, t in (("extra_key", key), ("extra_value", value))}
        if visible is not None:
            bias = torch.zeros_like(visible[:, :num_prefix_tokens], dtype=torch.float32)
            extra["extra_bias"] = bias.masked_fill(~visible[:, :num_prefix_tokens], float("-inf"))[:, None, None]
    output = routed_attention(
        cells[0],
        cells[1],
        cells[2],
        blocks=blocks,
        query_block=order.block_tokens,
        key_block=order.block_tokens,
        attn_mask=None if shown is None else shown[:, None, None],
        **extra,
        **options,
    )
    output = from_blocks(output, order)
    if num_prefix_tokens:
        mask = None if visible is None else visible[:, None, None]
        prefix = F.scaled_dot_product_attention(query[:, :, :num_prefix_tokens], key, value, attn_mask=mask, **options)
        output = torch.cat([prefix, output], dim=2)
    return output.reshape(*shape[:-1], value.shape[-1])


def _shown(order: BlockOrder, visible: Tensor | None, device: torch.device) -> Tensor | None:
    """(B or 1, R n): which places of the regions hold a token that is seen; None: all."""
    if visible is None:
        if not order.padded:
            return None
        visible = torch.ones(1, math.prod(order.grid_size), dtype=torch.bool, device=device)
    return to_blocks(visible.unsqueeze(-1), order).squeeze(-1)


def _chosen_regions(query: Tensor, key: Tensor, shown: Tensor | None, size: int, topk: int) -> Tensor:
    """(B, 1, R, topk): the regions that each region attends to, best first, ties to the lowest; -1: no more to see.

    Args:
        query, key: (B, H, R n, D) and (B, H_kv, R n, D) region after region. No gradient passes.
        shown: (B or 1, R n), False for tokens that are hidden or padding: no mean takes them in.
        size: n.
    """
    with autocast_off(query.device.type):
        mean_query, mean_key = (raised(t.detach()) for t in (query, key))
        if shown is None:
            mean_query, mean_key = (block_sums(t, size) / size for t in (mean_query, mean_key))
        else:
            hidden = ~shown[:, None, :, None]
            counts = block_sums((~hidden).to(mean_query.dtype), size)
            mean_query, mean_key = (
                block_sums(t.masked_fill(hidden, 0.0), size) / counts.clamp(min=1.0) for t in (mean_query, mean_key)
            )
        mean_key = mean_key.repeat_interleave(query.shape[1] // max(1, key.shape[1]), dim=1)
        mean_query, mean_key = (t.transpose(1, 2).flatten(2) for t in (mean_query, mean_key))
        affinity = mean_query @ mean_key.mT
        if shown is not None:
            affinity = affinity.masked_fill(counts.squeeze(1).mT == 0.0, float("-inf"))
        best = affinity.sort(dim=-1, descending=True, stable=True)
    chosen = best.indices[..., :topk]
    if shown is not None:
        chosen = chosen.masked_fill(best.values[..., :topk] == float("-inf"), -1)
    return chosen.unsqueeze(1)


def conv_on_grid(
    conv: nn.Conv2d, tokens: Tensor, grid: tuple[int, ...], num_prefix_tokens: int = 0, visible: Tensor | None = None
) -> Tensor:
    """A convolution of a grid's tokens, such as local context enhancement (LCE).

    A sequence is an image one token high; of a grid of rank 3 each image is convolved alone.

    Args:
        conv: keeps the grid's size.
        tokens: (B, N, C), N = num_prefix_tokens + prod(grid).
        visible: (B, N) boolean: tokens that are hidden count as zeros.

    Returns:
        (B, N, C), zeros for the prefix tokens.
    """
    cells = tokens[:, num_prefix_tokens:]
    if visible is not None:
        cells = cells.masked_fill(~visible[:, num_prefix_tokens:, None], 0.0)
    images, height, width = (1, 1, *grid)[-3:]
    planes = cells.unflatten(1, (images, height, width)).flatten(0, 1).permute(0, 3, 1, 2)
    found = conv(planes).permute(0, 2, 3, 1).reshape(cells.shape)
    return F.pad(found, (0, 0, num_prefix_tokens, 0)) if num_prefix_tokens else found


class BiLevelRoutingAttention(MechanismMixer):
    """Bi-level routing attention. The state_dict is dense attention's with the convolution `lepe` beside it.

    Masks may only hide keys from all queries alike: boolean, (N,) or broadcastable to (B, 1, 1, N). What they hide has
    no part in the means of regions nor in the convolution.

    Args:
        num_regions, topk, region_size, lce: as in BiLevel. The published models have 7 regions along each axis.
        mask_padding: hide the padding where regions do not divide the grid. False: as the official code does it, the
            grid is padded with zero tokens before the projection to num_regions whole regions along each axis, and
            padding is averaged, chosen and attended to.
        The rest is as in AttentionMixer. The published weights need scale=dim**-0.5.

    Raises:
        ValueError, TypeError: an option is out of range or of the wrong type; in forward: a mask that differs between
            queries or heads, a float mask, is_causal.
    """

    needs_grid = True
    mechanism: BiLevel

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        *args: Any,
        num_regions: int | tuple[int, ...] = BiLevel.num_regions,
        topk: int | float = BiLevel.topk,
        region_size: int | tuple[int, ...] | None = BiLevel.region_size,
        lce: int = BiLevel.lce,
        mask_padding: bool = True,
        **kwargs: Any,
    ) -> None:
        mechanism = BiLevel(num_regions, topk, region_size, lce)
        super().__init__(dim, num_heads, *args, **kwargs)
        self.mechanism = mechanism
        self.mask_padding = mask_padding
        self.lepe: nn.Conv2d | None = None
        if lce:
            like: dict[str, Any] = {"device": self.qkv.weight.device, "dtype": self.qkv.weight.dtype}
            self.lepe = nn.Conv2d(
                self.attn_dim, self.attn_dim, lce, padding=lce // 2, groups=self.attn_dim, bias=True, **like
            )

    def extra_repr(self) -> str:
        return f"{self.mechanism}{'' if self.mask_padding else ', mask_padding=False'}"

    def mix(self, x: Tensor, attn_mask: Tensor | None, is_causal: bool, grid_size: tuple[int, ...] | None) -> Tensor:
        grid = resolve_grid(x.shape[1], self.num_prefix_tokens, grid_size)
        padding = _Padding(self, grid)
        x, attn_mask = padding.of_tokens(x), padding.of_mask(x, attn_mask)
        query, key, value = self.heads(x)
        mixed = self.attend(query, key, value, attn_mask, is_causal, padding.grid)
        if self.lepe is not None:
            visible = None
            if attn_mask is not None:
                visible = key_mask(attn_mask, (*query.shape[:-1], key.shape[-2]), x.device)
            joined = value.transpose(1, 2).flatten(2)
            around = conv_on_grid(self.lepe, joined, padding.grid, self.num_prefix_tokens, visible)
            mixed = mixed + around.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
        return padding.without(mixed)

    def attention_weights(
        self,
        x: Tensor,
        attn_mask: Tensor | None = None,
        is_causal: bool = False,
        *,
        grid_size: tuple[int, ...] | None = None,
    ) -> Tensor:
        """(B, H, N, N): the weights of the attention, to which `forward` adds LCE.

        Rows sum to one, less what padding takes with mask_padding=False.
        """
        self._grid(x, grid_size)
        padding = _Padding(self, resolve_grid(x.shape[1], self.num_prefix_tokens, grid_size))
        padded, mask = padding.of_tokens(x), padding.of_mask(x, attn_mask)
        weights = super().attention_weights(padded, mask, is_causal, grid_size=padding.grid)
        return padding.without(padding.without(weights).mT).mT


class _Padding:
    """What stands around the tokens before they are projected, as the official code has it; nothing if it is masked."""

    def __init__(self, mixer: BiLevelRoutingAttention, grid: tuple[int, ...]) -> None:
        self.prefix = mixer.num_prefix_tokens
        self.grid = grid if mixer.mask_padding else mixer.mechanism.whole_regions(grid)
        self.order = None if mixer.mask_padding else BlockOrder(grid, self.grid)  # one block: the grid with its padding
        self.tokens = self.prefix + math.prod(grid)

    def of_tokens(self, x: Tensor) -> Tensor:
        """(..., N, C) -> (..., N', C), with zeros for padding."""
        if self.order is None or not self.order.padded:
            return x
        return torch.cat([x[..., : self.prefix, :], to_blocks(x[..., self.prefix :, :], self.order)], dim=-2)

    def of_mask(self, x: Tensor, attn_mask: Tensor | None) -> Tensor | None:
        """The mask that also shows the padding."""
        if attn_mask is None or self.order is None or not self.order.padded:
            return attn_mask
        hidden = ~key_mask(attn_mask, (x.shape[0], 1, self.tokens, self.tokens), x.device)
        return ~self.of_tokens(hidden[..., None])[:, None, None, :, 0]

    def without(self, tokens: Tensor) -> Tensor:
        """(..., N', D) -> (..., N, D)."""
        if self.order is None or not self.order.padded:
            return tokens
        return torch.cat(
            [tokens[..., : self.prefix, :], from_blocks(tokens[..., self.prefix :, :], self.order)], dim=-2
        )
