"""Mixture-of-head attention (MoH, arXiv 2410.11842): every token chooses which heads answer it, and how loudly."""

import math
import numbers
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from regard.auxiliary import Reporter
from regard.cards import Card, Evidence
from regard.mixers._attention import AttentionMixer
from regard.mixers.dense import Dense
from regard.ops._dispatch import functorch_active
from regard.specs import Mechanism, register

__all__ = ["CARD", "HeadRouter", "MixtureOfHeadsAttention", "MoH", "Routing", "attend_chosen", "split_heads"]

CARD = Card(
    name="moh",
    title="Mixture-of-head attention",
    paper="MoH: Multi-Head Attention as Mixture-of-Head Attention",
    authors="Jin et al.",
    venue="ICML 2025",
    arxiv="2410.11842",
    exact=True,
    cost="N^2 for shared heads, r N^2 / (H - s) for each routed one",
    needs_grid=False,
    adds_parameters=True,
    converts=False,
    summary="Every key, but not in every head: s shared heads answer all tokens, of the others each token chooses the "
    "r that its router scores highest, and each head's answer is weighted by a gate of the token.",
    equation=r"o_i = \sum_{h=1}^{H} g_{ih} \, W^O_h \sum_j \operatorname{softmax}_j\!\left(\frac{q_{ih} \cdot k_{jh}}"
    r"{\sqrt d}\right) v_{jh}, \quad g_{ih} = \begin{cases} w_0 \, s \operatorname{softmax}(W_1 x_i)_h & h \le s \\ "
    r"w_1 \, r \operatorname{softmax}_{T_i}(W_g x_i)_h & h \in T_i \\ 0 & \text{otherwise} \end{cases}, \quad "
    r"(w_0, w_1) = 2 \operatorname{softmax}(W_0 x_i), \quad T_i = \text{the } r \text{ largest of } W_g x_i",
    variants=(
        "The published form for vision, here `regard.MixtureOfHeadsAttention` and the backbones "
        "`moh_transnext_small_80`, `moh_transnext_small_75`, `moh_transnext_base_75` and `moh_transnext_base_50`: "
        "shared heads are the first s, both groups of gates are rescaled to a mean of one, and a balance loss of "
        "weight 0.01 keeps routed heads in use.",
        "The papers' diffusion and language models (DiT, LLaMA3-8B by continued training) route alike; no such model "
        "stands here.",
    ),
    claims=(
        "TransNeXt-S with 80 % and 75 % of its heads: 84.7 and 84.6 % ImageNet-1k top-1 (dense 84.7); TransNeXt-B with "
        "75 % and 50 %: 84.9 and 84.7 % (dense 84.8).",
        "Ablation, S for 100 epochs: no gates 75.6 %, shared heads 78.3 %, two-stage routing 78.6 %; a share of shared "
        "heads between 14 and 74 % makes 0.2 points.",
        "DiT-XL/2 with 90 % of its heads: FID 8.56 against 9.62; with 75 % it is worse than dense.",
    ),
    official="SkyworkAI/MoH",
    licence="Apache-2.0",
    quirks=(
        "Every head is computed for every token and then multiplied by its gate, so nothing is saved; here the logits "
        "of pairs of token and head that were not chosen are never formed.",
        "Balance losses are appended to a list of the class, which whoever trains must empty at each step, and which "
        "activation checkpointing fills twice; here each module reports its own once (`regard.collect_losses`).",
        "One shared head and no routed one (a model of one head) raises AttributeError; here its gate is 1.",
        "The choice is made on the softmax, where scores that differ may have become equal, and ties fall as "
        "torch.topk lets them; here it is made on the scores, in float32 at least, and ties go to the lowest index.",
        "With r = 1 the chosen gate is w_1 whatever its score, so only the balance loss trains W_g; this is the "
        "paper's definition, and so it is here.",
    ),
    evidence=Evidence(
        identities=(
            "router weights of zero and all heads chosen: dense attention",
            "all heads shared with W_1 = 0: dense attention",
            "each token has s + r gates that are not zero, and they sum to w_0 s + w_1 r",
            "a uniform router has a balance loss of r",
            "permuting routed heads with their rows of W_g and columns of the projection changes nothing",
            "skipped heads equal heads multiplied by zero, gradients too",
        ),
        parity="SkyworkAI/MoH at 2cefd57, moh_transnext_small_80 on synthetic weights: float64 logits within 1e-9, "
        "balance losses of all 27 layers too",
        parameters={
            "moh_transnext_small_80": 49_910_548,
            "moh_transnext_small_75": 49_910_548,
            "moh_transnext_base_75": 90_020_632,
            "moh_transnext_base_50": 90_023_512,
        },
        trained="`regard compare` trains it beside dense attention on real images, with several seeds",
    ),
)

BALANCE_WEIGHT = 0.01
# Tokens from which skipping is taken to be faster than multiplying by zero on a CPU: at 196 it was not, at 784 it was
# (docs/notes/moh.md).
_SKIP_FROM = 512
# Calls of attention over which the pairs of image and routed head are spread, sorted by how many queries they have.
_GROUPS = 4


def _check_share(name: str, share: int | float) -> None:
    if isinstance(share, bool) or not isinstance(share, numbers.Real):
        raise TypeError(f"{name}: expected an int (heads) or a float (fraction), got {type(share).__name__}")
    if isinstance(share, numbers.Integral):
        if share < 0:
            raise ValueError(f"{name}: expected 0 heads or more, got {share}")
    elif not 0.0 <= share <= 1.0:
        raise ValueError(f"{name}: expected a fraction of the heads from 0.0 to 1.0, or an int of heads, got {share}")


def split_heads(num_heads: int, shared: int | float, routed: int | float) -> tuple[int, int]:
    """How many heads are shared, and how many of the others each token chooses.

    Args:
        num_heads: heads H.
        shared, routed: int: heads. float: that fraction of all H heads, rounded down, but one head at least unless it
            is 0.0; a fraction `routed` takes no more than the shared heads leave.

    Raises:
        TypeError: shared or routed is no number.
        ValueError: one is out of range, they ask for more than H heads, or no token would choose any of the heads that
            are not shared.
    """
    counts = []
    for name, share in (("shared", shared), ("routed", routed)):
        _check_share(name, share)
        whole = isinstance(share, numbers.Integral)
        # 1e-9: 0.29 * 100 is 28.999999999999996
        counts.append(int(share) if whole or share == 0 else max(1, math.floor(share * num_heads + 1e-9)))
    s, r = counts
    if s > num_heads:
        raise ValueError(f"shared: {s} shared heads, but there are only {num_heads} heads; pass fewer, or a fraction")
    if not isinstance(routed, numbers.Integral):
        r = min(r, num_heads - s)
    if s + r > num_heads:
        raise ValueError(
            f"routed: {r} of the {num_heads - s} heads that {s} shared ones leave of {num_heads}; pass fewer, or a "
            "fraction"
        )
    if r == 0 and s < num_heads:
        raise ValueError(f"routed: 0 leaves {num_heads - s} of {num_heads} heads unused; pass 1 or more, or shared=1.0")
    return s, r


class Routing(NamedTuple):
    """What a router decides.

    Attributes:
        gates: (B, H, N), shared heads first; zero where a head was not chosen. float32, or float64 in double models.
        chosen: (B, H - s, N) boolean: which routed heads each token chose; None if there are none.
    """

    gates: Tensor
    chosen: Tensor | None


class HeadRouter(Reporter, nn.Module):
    """The gates of a mixture of heads (arXiv 2410.11842), and its balance loss.

    Reports the loss `balance` with weight 0.01: (H - s)^2 * mean over routed heads of (mean score * mean choice), the
    means over all tokens of the batch. It is r if tokens are spread evenly, and larger if few heads get most of them.

    Args:
        dim: channels C of the tokens.
        num_heads: heads H.
        shared: heads s that answer every token.
        routed: heads r that each token chooses of the others.
        device, dtype: of the parameters.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        shared: int,
        routed: int,
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.shared, self.routed = split_heads(num_heads, shared, routed)
        self.routable = num_heads - self.shared
        options: dict[str, Any] = {"bias": False, "device": device, "dtype": dtype}
        self.choose = nn.Linear(dim, self.routable, **options) if self.routed else None  # W_g
        self.weigh = nn.Linear(dim, 2, **options) if self.routed and self.shared else None  # W_0
        self.share = nn.Linear(dim, self.shared, **options) if self.shared > 1 else None  # W_1

    def extra_repr(self) -> str:
        return f"shared={self.shared}, routed={self.routed} of {self.routable}"

    def forward(self, x: Tensor) -> Routing:
        """(B, N, C) -> the gates of every token and head."""
        gates, chosen = [], None
        if self.share is not None:
            gates.append(self.shared * _wide(self.share(x)).softmax(-1))
        elif self.shared:
            gates.append(_wide(x.new_ones(*x.shape[:-1], 1)))
        if self.choose is not None:
            scores = _wide(self.choose(x))
            chosen = _highest(scores, self.routed)
            if self.reporting:
                # Choices are counted in float32, as published, in double models too.
                mean_score, mean_choice = scores.softmax(-1).mean((0, 1)), chosen.float().mean((0, 1))
                self.report("balance", self.routable**2 * (mean_score * mean_choice).mean(), weight=BALANCE_WEIGHT)
            gates.append(self.routed * scores.masked_fill(~chosen, float("-inf")).softmax(-1))
        if self.weigh is not None:
            stages = 2 * _wide(self.weigh(x)).softmax(-1)
            gates = [stage * gate for stage, gate in zip(stages.split(1, dim=-1), gates, strict=True)]
        joined = torch.cat(gates, dim=-1).transpose(1, 2)
        return Routing(joined, None if chosen is None else chosen.transpose(1, 2))


def _wide(tensor: Tensor) -> Tensor:
    """In float32, unless it is float64: half types would make ties of scores that differ."""
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def _highest(scores: Tensor, count: int) -> Tensor:
    """Boolean, like `scores`: the `count` highest of the last dimension, the lowest indices among equals."""
    last = scores.detach().topk(count, dim=-1).values[..., -1:]
    above, level = scores > last, scores == last
    free = count - above.sum(-1, keepdim=True)
    return above | (level & (level.cumsum(-1) <= free))


def attend_chosen(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    chosen: Tensor,
    *,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
) -> Tensor:
    """Attention of chosen queries only: what dense attention gives times `chosen`, without the logits of the others.

    The queries of each image and head that are chosen are gathered. As each pair has its own number of them, pairs are
    sorted by it and spread over a few calls of SDPA, each padded to its longest pair. Reads these numbers on the host,
    so that it can neither be compiled nor exported: shapes depend on data.

    Args:
        query, key, value: (B, H, N, D), (B, H, M, D), (B, H, M, D_v).
        chosen: (B, H, N) boolean.
        attn_mask: as in scaled_dot_product_attention, (B or 1, H or 1, N or 1, M).
        dropout_p: dropout of the attention weights.

    Returns:
        (B, H, N, D_v), zero where a query is not chosen.
    """
    batch, heads, tokens, _ = query.shape
    pairs = batch * heads
    picked = chosen.reshape(pairs, tokens)
    count = picked.sum(-1)
    order = count.argsort(descending=True)
    if pairs == 0:
        return query.new_zeros(*query.shape[:-1], value.shape[-1])
    size = -(-pairs // _GROUPS)
    longest = count[order[::size]].tolist()
    # Chosen tokens first, in their order; what follows them pads, and is struck out at the end.
    first = picked.to(torch.uint8).sort(dim=-1, descending=True, stable=True).indices
    rows, keys, values = query.reshape(pairs * tokens, query.shape[-1]), key.flatten(0, 1), value.flatten(0, 1)
    places, mixed = [], []
    for group, width in zip(order.split(size), longest, strict=True):
        token = first[group, :width]
        place = (token + group[:, None] * tokens).flatten()
        mask = None if attn_mask is None else _rows_of_mask(attn_mask.expand(batch, heads, -1, -1), group, token)
        part = F.scaled_dot_product_attention(
            rows.index_select(0, place).view(1, len(group), width, query.shape[-1]),
            keys.index_select(0, group)[None],
            values.index_select(0, group)[None],
            attn_mask=mask,
            dropout_p=dropout_p,
        )
        places.append(place)
        mixed.append(part.flatten(0, 2))
    found = torch.cat(mixed)
    whole = found.new_zeros(pairs * tokens, found.shape[-1]).index_copy(0, torch.cat(places), found)
    return whole.view(*query.shape[:-1], value.shape[-1]) * chosen[..., None]


def _rows_of_mask(mask: Tensor, pairs: Tensor, token: Tensor) -> Tensor:
    """(B, H, N or 1, M) mask -> (1, G, T or 1, M): its rows of T tokens of each of G pairs of image and head."""
    image, head = pairs // mask.shape[1], pairs % mask.shape[1]
    if mask.shape[2] == 1:
        return mask[image, head][None]
    return mask[image[:, None], head[:, None], token][None]


class MixtureOfHeadsAttention(AttentionMixer):
    """Mixture-of-head attention (MoH, arXiv 2410.11842). `router` holds its own parameters.

    `attention_weights` are those of the heads times their gates: row i of a head sums to its gate of token i, and is
    zero where the token did not choose the head. Masks and is_causal are as in dense attention. The balance loss is the
    router's: `with regard.collect_losses(model) as losses: ...`, then add `losses.total()`.

    Args:
        shared: heads that answer every token, the first ones. int: heads. float: fraction of all heads, rounded down,
            one at least.
        routed: heads that each token chooses of the others; int or float likewise.
        skip: True: logits of heads that a token did not choose are never formed. False: all heads are computed, then
            multiplied by their gates. None: the faster one, as measured (skip on CPUs from 512 tokens). The values are
            the same. Compiled, exported, traced, transformed or captured models, and causal attention, never skip.
        The rest is as in AttentionMixer.

    Raises:
        ValueError, TypeError: shared or routed is out of range or no number; skip is neither bool nor None.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        *args: Any,
        shared: int | float = 0.25,
        routed: int | float = 0.5,
        skip: bool | None = None,
        **kwargs: Any,
    ) -> None:
        if skip is not None and not isinstance(skip, bool):
            raise TypeError(f"skip: expected True, False or None, got {type(skip).__name__}")
        super().__init__(dim, num_heads, *args, **kwargs)
        like: dict[str, Any] = {"device": self.qkv.weight.device, "dtype": self.qkv.weight.dtype}
        self.router = HeadRouter(dim, num_heads, *split_heads(num_heads, shared, routed), **like)
        self.skip = skip

    def attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None,
        is_causal: bool,
        grid_size: tuple[int, ...] | None,
    ) -> Tensor:
        """Dense attention, before the gates."""
        return Dense().attend(
            query, key, value, attn_mask=attn_mask, dropout_p=self.dropout_p, is_causal=is_causal, scale=None
        )

    def mix(self, x: Tensor, attn_mask: Tensor | None, is_causal: bool, grid_size: tuple[int, ...] | None) -> Tensor:
        query, key, value = self.heads(x)
        gates, chosen = self.router(x)
        if chosen is None or is_causal or not self._skips(query):
            mixed = self.attend(query, key, value, attn_mask, is_causal, grid_size)
        else:
            shared = self.router.shared
            mask, rest = _split_mask(attn_mask, shared)
            parts = [tensor.split([shared, self.num_heads - shared], dim=1) for tensor in (query, key, value)]
            (q, q_rest), (k, k_rest), (v, v_rest) = parts
            mixed = attend_chosen(q_rest, k_rest, v_rest, chosen, attn_mask=rest, dropout_p=self.dropout_p)
            if shared:
                mixed = torch.cat([self.attend(q, k, v, mask, False, grid_size), mixed], dim=1)
        return mixed * gates[..., None].to(mixed.dtype)

    def attention_weights(
        self,
        x: Tensor,
        attn_mask: Tensor | None = None,
        is_causal: bool = False,
        *,
        grid_size: tuple[int, ...] | None = None,
    ) -> Tensor:
        """(B, H, N, N): each head's weights times the gate of the token that asks; see the class."""
        weights = super().attention_weights(x, attn_mask, is_causal, grid_size=grid_size)
        return weights * self.router(x).gates[..., None].to(weights.dtype)

    def _skips(self, query: Tensor) -> bool:
        """Whether to leave out what was not chosen, where the choice can be read and leaves anything out."""
        if self.router.routed == self.router.routable or _unreadable(query):
            return False
        if self.skip is not None:
            return self.skip
        return query.device.type == "cpu" and query.shape[2] >= _SKIP_FROM


def _unreadable(tensor: Tensor) -> bool:
    """True where the tensor's values cannot be read to decide on shapes: while tracing, transforming or capturing."""
    return (
        torch.compiler.is_compiling()
        or torch.jit.is_tracing()
        or functorch_active()
        or type(tensor) is not Tensor
        or tensor.is_meta
        or (tensor.is_cuda and torch.cuda.is_current_stream_capturing())
    )


def _split_mask(mask: Tensor | None, shared: int) -> tuple[Tensor | None, Tensor | None]:
    """A mask's parts for the shared and for the routed heads, of rank 4 each."""
    if mask is None:
        return None, None
    mask = mask[(None,) * (4 - mask.dim())]
    return (mask, mask) if mask.shape[1] == 1 else (mask[:, :shared], mask[:, shared:])


@register
@dataclass(frozen=True, eq=False)
class MoH(Mechanism):
    """Mixture-of-head attention, `moh(shared=0.25, routed=0.5)` in text: ints are heads, floats fractions of all heads,
    rounded down, one head at least; the default runs 75 % of 4, 8, 12 or 16 heads, and both of two."""

    card: ClassVar[Card] = CARD
    shared: int | float = 0.25
    routed: int | float = 0.5

    def __post_init__(self) -> None:
        _check_share("shared", self.shared)
        _check_share("routed", self.routed)

    def attend(self, query: Tensor, key: Tensor, value: Tensor, **options: Any) -> Tensor:
        """Raises: gates are made from the tokens, by a router whose weights must be trained.

        Raises:
            ValueError: always.
        """
        raise ValueError(
            f"mechanism: '{self}' gates heads by a router with weights of its own, which must be trained; queries, "
            "keys and values alone cannot tell the gates. Build a model with its attn_layer"
        )

    def attn_layer(self, **options: Any) -> type[nn.Module]:
        return MixtureOfHeadsAttention.bind(**self.options, **options)
