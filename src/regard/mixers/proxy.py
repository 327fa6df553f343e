"""ProxyAttn (arXiv 2509.24745): few proxy heads rank blocks of keys for all heads; each head says how many it needs."""

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.functional import dropout, pad

from regard.cards import Card, Evidence
from regard.mixers._attention import MechanismMixer
from regard.mixers.dense import Dense
from regard.ops import BlockOrder, routed_attention
from regard.ops._arguments import autocast_off, check_scale, check_tensors, fold, key_mask, lowered_for_autocast
from regard.ops._counts import check_count
from regard.ops._dispatch import functorch_active
from regard.ops._selection import raised, softmax_of_kept
from regard.ops.routed.arranging import from_blocks, to_blocks
from regard.ops.routed.proxies import ProxyRule, proxy_blocks
from regard.specs import Mechanism, register

__all__ = ["CARD", "Proxy", "ProxyAttention"]

CARD = Card(
    name="proxy",
    title="ProxyAttn",
    paper="ProxyAttn: Guided Sparse Attention via Representative Heads",
    authors="Wang et al.",
    venue="ICLR 2026",
    arxiv="2509.24745",
    exact=True,
    cost="N^2 / 16 scores a proxy, the kept blocks of N^2",
    needs_grid=False,
    adds_parameters=False,
    query_masks=False,
    causal=True,
    summary="Each block of queries sees the key blocks that a proxy, the mean of several heads, scores highest; how "
    "many differs from head to head: as many as hold a share gamma of its attention.",
    equation=r"o_i = \sum_{j \in \mathcal B_h(I)} \operatorname{softmax}_{j \in \mathcal B_h(I)}\!\left(\frac{q_i "
    r"\cdot k_j}{\sqrt d}\right) v_j, \qquad \mathcal B_h(I) = \text{the } b_h \text{ blocks } J \text{ with the "
    r"largest } \max_{i \in I,\, j \in J} \operatorname{softmax}_j\!\left(\frac{\bar q_i \cdot \bar k_j}{\sqrt d}"
    r"\right)",
    variants=(
        "The published form is for prompts of language models (is_causal here): heads are averaged before the softmax, "
        "the first of every 4 tokens is scored, the last block of queries tells each head's budget, and every query "
        "block takes that many of the best blocks.",
        "For images (not causal, not in the paper) there is no last block: each block of queries asks with its first "
        "token, and the budget is the mean, or with budget='block' each block's own. Blocks are square tiles of the "
        "grid; class token and registers are seen by all and see everything.",
        "The authors' code (wyxstriker/ProxyAttn) could not be read, so nothing here is compared with it; what the "
        "paper leaves open is listed below as a choice.",
    ),
    claims=(
        "RULER, weighted average, Llama-3.1-8B: full attention 86.49; gamma 0.95 (69 % of the blocks left out) 87.43; "
        "gamma 0.90 (80 %) 86.31. Qwen2.5-7B-1M: 85.53; 84.53 (61 %).",
        "Attention 10.3 times faster at 256K tokens, the first token 2.4 times sooner. All of it in language models.",
    ),
    claims_source="the paper; no figure is about images",
    evidence=Evidence(
        identities=(
            "gamma = 1 equals dense attention, causal too",
            "a single block equals dense attention",
            "with one head the proxy is the head; equal heads share what each would choose alone",
            "blocks of one token, stride 1 and a proxy a head equal attention to each query's largest weights up to "
            "gamma of their sum",
            "prefix queries attend densely, prefix keys are always seen; causal queries see no later key",
        ),
        trained="`regard compare` trains it beside dense attention on real images, with several seeds",
    ),
)


def _check_options(num_proxies: int, gamma: float, block_size: int, stride: int, min_tokens: int, budget: str) -> None:
    check_count("block_size", block_size)
    check_count("min_tokens", min_tokens, least=0)
    ProxyRule(num_proxies, stride, gamma, 1, budget)


def _tiles(grid_size: tuple[int, ...], tokens: int) -> BlockOrder:
    """Blocks of about so many tokens, as long along each axis; the same for every grid: one graph then serves all."""
    return BlockOrder(grid_size, max(1, round(tokens ** (1.0 / len(grid_size)))))


def _shown(order: BlockOrder, visible: Tensor | None, like: Tensor) -> Tensor | None:
    """(B, places): which places hold a token that counts; None: all.

    Args:
        visible: (B, cells) boolean, or None.
        like: (B, H, cells, D).
    """
    if visible is None:
        if not order.padded:
            return None
        visible = torch.ones(like.shape[0], like.shape[2], dtype=torch.bool, device=like.device)
    return to_blocks(visible.unsqueeze(-1), order).squeeze(-1)


def _trimmed(lists: Tensor) -> Tensor:
    """Without the places that no list fills. Elsewhere than on the processor, or in a graph, asking would cost more."""
    traced = torch.compiler.is_compiling() or functorch_active() or type(lists) is not Tensor
    if traced or lists.device.type != "cpu" or lists.numel() == 0:
        return lists
    return lists[..., : max(1, int((lists >= 0).sum(dim=-1).max()))]


def _grid_of(cells: int, grid_size: tuple[int, ...] | None, is_causal: bool) -> tuple[int, ...]:
    """The queries' grid: as given, a square if they make one, else (and causally) a sequence."""
    if is_causal:
        return (cells,)
    if grid_size is not None:
        return grid_size
    side = math.isqrt(cells)
    return (side, side) if side * side == cells else (cells,)


@dataclass(frozen=True)
class _Tokens:
    """The tokens of a call, prefix tokens apart.

    Args:
        query: (B, H, N, D). key: (B, H_kv, M, D). value: (B, H_kv, M, D_v).
        visible: (B, M) boolean, or None if all keys are.
        prefix: P. options: dropout_p, scale and enable_gqa of the call.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    visible: Tensor | None
    prefix: int
    options: dict[str, Any]

    @property
    def scale(self) -> float:
        scale = self.options["scale"]
        return self.query.shape[-1] ** -0.5 if scale is None else float(scale)

    @property
    def same(self) -> bool:
        """Whether queries and keys are the same tokens."""
        return self.query.shape[2] == self.key.shape[2]

    def dense(self, queries: slice, keys: slice, is_causal: bool = False) -> Tensor:
        mask = None if self.visible is None else self.visible[:, None, None, keys]
        key, value = self.key[:, :, keys], self.value[:, :, keys]
        return Dense().attend(
            self.query[:, :, queries], key, value, attn_mask=mask, is_causal=is_causal, **self.options
        )

    def extra(self) -> dict[str, Any]:
        """The prefix keys as routed_attention takes them."""
        bias = None
        if self.visible is not None:
            state = torch.promote_types(self.query.dtype, torch.float32)
            hidden = ~self.visible[:, None, None, : self.prefix]
            bias = torch.zeros(hidden.shape, dtype=state, device=hidden.device).masked_fill(hidden, float("-inf"))
        key, value = (t[:, :, : self.prefix] for t in (self.key, self.value))
        return {"extra_key": key, "extra_value": value, "extra_bias": bias}


@dataclass(frozen=True)
class _Blocks:
    """The other tokens in the order of their blocks; `shown` and `voting` as in ProxyCall, but without the prefix."""

    queries: BlockOrder
    keys: BlockOrder
    query: Tensor
    key: Tensor
    value: Tensor
    voting: Tensor | None
    shown: Tensor | None

    @classmethod
    def of(cls, tokens: _Tokens, block_size: int, grid_size: tuple[int, ...]) -> "_Blocks":
        prefix = tokens.prefix
        query, key, value = (t[:, :, prefix:] for t in (tokens.query, tokens.key, tokens.value))
        queries = _tiles(grid_size, block_size)
        keys = queries if tokens.same else _tiles((key.shape[2],), block_size)
        visible = None if tokens.visible is None else tokens.visible[:, prefix:]
        shown = _shown(keys, visible, key)
        # A token that is hidden has no say in what others see either.
        voting = shown if tokens.same else _shown(queries, None, query)
        query, key, value = to_blocks(query, queries), to_blocks(key, keys), to_blocks(value, keys)
        return cls(queries, keys, query, key, value, voting, shown)

    def lists(self, tokens: _Tokens, mechanism: "Proxy", is_causal: bool) -> Tensor:
        shown, key_block = self.shown, self.keys.block_tokens
        if shown is not None:
            prefix = tokens.visible[:, : tokens.prefix] if tokens.visible is not None else None
            shown = torch.cat([shown.new_ones(shown.shape[0], tokens.prefix) if prefix is None else prefix, shown], 1)
        lists = proxy_blocks(
            self.query,
            self.key,
            tokens.key[:, :, : tokens.prefix],
            mechanism.rule(key_block),
            query_block=self.queries.block_tokens,
            key_block=key_block,
            voting=self.voting,
            shown=shown,
            is_causal=is_causal,
            scale=tokens.scale,
        )
        return _trimmed(lists)

    def routed(self, lists: Tensor, value: Tensor, extra: dict[str, Any], options: dict[str, Any]) -> Tensor:
        mask = None if self.shown is None else self.shown[:, None, None]
        return routed_attention(
            self.query,
            self.key,
            value,
            blocks=lists,
            query_block=self.queries.block_tokens,
            key_block=self.keys.block_tokens,
            attn_mask=mask,
            **extra,
            **options,
        )


def _own_blocks(tokens: _Tokens, blocks: _Blocks) -> tuple[Tensor, Tensor]:
    """Each query's causal attention within its own block: (B, H, N, D_v), and (B, H, N) log-sum-exp, -inf for none."""
    count, size = blocks.queries.blocks, blocks.queries.block_tokens
    groups = blocks.query.shape[1] // max(1, blocks.key.shape[1])
    with autocast_off(blocks.query.device.type):
        query = raised(blocks.query).unflatten(2, (count, size))
        key, value = (
            raised(t).repeat_interleave(groups, dim=1).unflatten(2, (count, size)) for t in (blocks.key, blocks.value)
        )
        seen = torch.ones(size, size, dtype=torch.bool, device=query.device).tril()
        if blocks.shown is not None:
            seen = seen & blocks.shown.unflatten(1, (count, size))[:, None, :, None]
        logits = ((query * tokens.scale) @ key.mT).masked_fill(~seen, float("-inf"))
        soft = softmax_of_kept(logits, logits != float("-inf"))
        nothing = ~seen.any(dim=-1).expand(logits.shape[:-1])
        # Rows that see nothing have no gradient, rather than the NaN of exp(-inf + inf).
        lse = logits.masked_fill(nothing.unsqueeze(-1), 0.0).logsumexp(dim=-1).masked_fill(nothing, float("-inf"))
        if tokens.options["dropout_p"] > 0.0:
            soft = dropout(soft, tokens.options["dropout_p"])
        return (soft @ value).flatten(2, 3), lse.flatten(2, 3)


def _with_own_block(tokens: _Tokens, blocks: _Blocks, lists: Tensor) -> Tensor:
    """Causal attention to the listed earlier blocks, the prefix and the own block, one softmax over all.

    The own block enters as one extra key: its logit is its log-sum-exp, query by query, and the weight that it gets,
    read from a column of its own, is what the softmax over everything gives to the own block as a whole.
    """
    own, lse = _own_blocks(tokens, blocks)
    extra = tokens.extra()
    bias, prefix = extra["extra_bias"], tokens.prefix
    of_prefix = lse.new_zeros(()) if bias is None else bias
    of_prefix = of_prefix.expand(*lse.shape, prefix)
    key, value = extra["extra_key"], extra["extra_value"]
    with_own: dict[str, Any] = {
        "extra_key": pad(key, (0, 0, 0, 1)),
        "extra_value": torch.cat(
            [pad(value, (0, 1)), pad(value.new_ones(*value.shape[:2], 1, 1), (value.shape[3], 0))], 2
        ),
        "extra_bias": torch.cat([of_prefix, lse.unsqueeze(-1)], dim=-1),
    }
    padded = pad(blocks.value, (0, 1))
    mixed = blocks.routed(lists, padded, with_own, tokens.options)
    share = mixed[..., -1:]
    if tokens.options["dropout_p"] > 0.0:  # the own block's weights were dropped one by one, not all at once
        share = blocks.routed(lists, padded, with_own, tokens.options | {"dropout_p": 0.0})[..., -1:]
    return mixed[..., :-1] + (share * own).to(mixed.dtype)


def _attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mechanism: "Proxy",
    *,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    grid_size: tuple[int, ...] | None = None,
    num_prefix_tokens: int = 0,
) -> Tensor:
    """As in Mechanism. A square of tokens is taken for their grid; causal tokens are a sequence."""
    check_tensors(query, key, value, enable_gqa)
    check_scale(scale)
    count, keys, lead = query.shape[-2], key.shape[-2], query.shape[:-2]
    prefix = num_prefix_tokens
    if not 0 <= prefix <= min(count, keys):
        raise ValueError(f"num_prefix_tokens: {prefix} of {count} queries and {keys} keys")
    if is_causal and count != keys:
        raise ValueError(f"is_causal: {count} queries and {keys} keys; proxies need as many of both")
    visible = None if attn_mask is None else key_mask(attn_mask, (*query.shape[:-1], keys), query.device)
    query, key, value = (fold(t) for t in lowered_for_autocast(query, key, value))
    options = {"dropout_p": dropout_p, "scale": scale, "enable_gqa": enable_gqa}
    tokens = _Tokens(query, key, value, visible, prefix, options)
    if count == prefix or keys == prefix:
        return tokens.dense(slice(None), slice(None), is_causal).reshape(*lead, count, value.shape[-1])
    blocks = _Blocks.of(tokens, mechanism.block_size, _grid_of(count - prefix, grid_size, is_causal))
    lists = blocks.lists(tokens, mechanism, is_causal)
    if is_causal:
        found = _with_own_block(tokens, blocks, lists)
    else:
        found = blocks.routed(lists, blocks.value, tokens.extra(), options)
    found = from_blocks(found, blocks.queries)
    if prefix:
        first = tokens.dense(slice(prefix), slice(prefix) if is_causal else slice(None), is_causal)
        found = torch.cat([first, found], dim=2)
    return found.reshape(*lead, count, value.shape[-1])


@register
@dataclass(frozen=True, eq=False)
class Proxy(Mechanism):
    """ProxyAttn, `proxy(gamma=0.9)` in text.

    Args:
        num_proxies: groups of consecutive heads that share a ranking; at most one a head.
        gamma: share of the attention that a head's blocks must hold by its estimate; 1 is dense attention.
        block_size: tokens of a block: a run of the sequence, or a tile of the grid of about so many, as long along each
            axis (64: 8 x 8).
        stride: the first of every `stride` tokens of a block is scored.
        min_tokens: every query sees the blocks of at least so many keys.
        budget: "head": as many blocks for all queries of a head. "block": each block of queries has its own number.
    """

    card: ClassVar[Card] = CARD
    num_proxies: int = 1
    gamma: float = 0.95
    block_size: int = 64
    stride: int = 4
    min_tokens: int = 256
    budget: str = "head"

    def __post_init__(self) -> None:
        _check_options(self.num_proxies, self.gamma, self.block_size, self.stride, self.min_tokens, self.budget)

    def rule(self, key_block: int) -> ProxyRule:
        """How blocks of so many keys are ranked and counted."""
        least = max(1, -(-self.min_tokens // key_block))
        return ProxyRule(self.num_proxies, self.stride, self.gamma, least, self.budget)

    def attend(self, query: Tensor, key: Tensor, value: Tensor, **options: Any) -> Tensor:
        return _attend(query, key, value, self, **options)

    def choose(
        self,
        query: Tensor,
        key: Tensor,
        *,
        grid_size: tuple[int, ...] | None = None,
        num_prefix_tokens: int = 0,
        is_causal: bool = False,
    ) -> tuple[Tensor, BlockOrder]:
        """What `attend` would let the queries see, for those who want to look.

        Args:
            query: (B, H, N, D). key: (B, H_kv, M, D). The rest is as in `attend`.

        Returns:
            (B, H, R, T) int64, the key blocks of each block of queries, -1 for none (causal: without the own block),
            and the order of the queries' blocks.
        """
        tokens = _Tokens(query, key, key, None, num_prefix_tokens, {"dropout_p": 0.0, "scale": None})
        grid = _grid_of(query.shape[2] - num_prefix_tokens, grid_size, is_causal)
        blocks = _Blocks.of(tokens, self.block_size, grid)
        return blocks.lists(tokens, self, is_causal), blocks.queries

    def attn_layer(self, **options: Any) -> type[nn.Module]:
        return ProxyAttention.bind(**self.options, **options)


class ProxyAttention(MechanismMixer):
    """ProxyAttn (arXiv 2509.24745). The state_dict equals dense attention's.

    Args:
        num_proxies, gamma, block_size, stride, min_tokens, budget: as in Proxy.
        The rest is as in AttentionMixer.

    Raises:
        ValueError, TypeError: an option is out of range or of the wrong type; in forward: masks that differ between
            queries, float masks.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        *args: Any,
        num_proxies: int = Proxy.num_proxies,
        gamma: float = Proxy.gamma,
        block_size: int = Proxy.block_size,
        stride: int = Proxy.stride,
        min_tokens: int = Proxy.min_tokens,
        budget: str = Proxy.budget,
        **kwargs: Any,
    ) -> None:
        mechanism = Proxy(num_proxies, gamma, block_size, stride, min_tokens, budget)
        super().__init__(dim, num_heads, *args, **kwargs)
        self.mechanism = mechanism
