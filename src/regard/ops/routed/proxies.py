"""Which key blocks each block of queries should see, found by few heads for many: ProxyAttn (arXiv 2509.24745).

Heads look at much the same tokens, but some at few of them and some at many. So the blocks are ranked once for a group
of heads, by the mean of its queries and keys, token by token; and each head says how many of the best it needs.
`regard::proxy_blocks` is one node in a compiled graph, at any number of tokens; it has no gradient. Some blocks of
queries are ranked at a time, so that not even the sampled scores are ever held at once.
"""

from collections.abc import Iterator
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad
from torch.utils.flop_counter import register_flop_formula

from regard.ops._arguments import full_precision
from regard.ops._counts import check_count
from regard.ops._dispatch import functorch_active
from regard.ops._selection import raised, softmax_of_kept

__all__ = ["BUDGETS", "ProxyCall", "ProxyRule", "proxy_blocks", "proxy_lists"]

BUDGETS = ("head", "block")

# Elements of one block of scores: a few MB, whatever the number of tokens.
_BLOCK = 1 << 21


@dataclass(frozen=True)
class ProxyRule:
    """How blocks are ranked, and how many a head keeps.

    Args:
        num_proxies: groups of consecutive heads, as equal as they can be; at most one a head. 1: all heads together.
        stride: the first of every `stride` tokens of a block stands for them in the ranking.
        gamma: share of a query's attention that the kept blocks must hold, by the head's own estimate. 1: all blocks.
        min_blocks: every query sees at least so many.
        budget: "head": one number for all queries of a head: the mean over the blocks of queries of what the first
            query in each needs; causal: what the last block needs on average. "block": each block's own number (that
            mean, where no query has a say).

    Raises:
        TypeError, ValueError: an option of the wrong type or out of range.
    """

    num_proxies: int = 1
    stride: int = 4
    gamma: float = 0.95
    min_blocks: int = 1
    budget: str = "head"

    def __post_init__(self) -> None:
        check_count("num_proxies", self.num_proxies)
        check_count("stride", self.stride)
        check_count("min_blocks", self.min_blocks)
        if isinstance(self.gamma, bool) or not isinstance(self.gamma, int | float):
            raise TypeError(f"gamma: expected a share of the attention in (0, 1], got {type(self.gamma).__name__}")
        if not 0.0 < self.gamma <= 1.0:  # NaN lands here too
            raise ValueError(
                f"gamma: expected a share of the attention in (0, 1], got {self.gamma}; 1 keeps all blocks"
            )
        if self.budget not in BUDGETS:
            raise ValueError(f"budget: expected one of {', '.join(map(repr, BUDGETS))}, got {self.budget!r}")


@dataclass(frozen=True)
class ProxyCall:
    """What is ranked. Queries and keys lie in whole blocks; padding is not shown.

    Args:
        query: (B, H, R query_block, D). key: (B, H_kv, C key_block, D), H a multiple of H_kv.
        extra_key: (B, H_kv, S, D), seen by all queries, so never ranked; their attention counts as held.
        voting: (B, R query_block) boolean, queries that have a say; None: all.
        shown: (B, S + C key_block) boolean, keys that may be seen; None: all.
        query_block, key_block: tokens in a block.
        is_causal: query i sees keys 0 ... i and the extra ones; then R = C and the blocks are as long.
        scale: factor of the logits.
        num_proxies, stride, gamma, min_blocks, by_block: the rule, budget="block" being by_block.
    """

    query: Tensor
    key: Tensor
    extra_key: Tensor
    voting: Tensor | None
    shown: Tensor | None
    query_block: int
    key_block: int
    is_causal: bool
    scale: float
    num_proxies: int
    stride: int
    gamma: float
    min_blocks: int
    by_block: bool

    @property
    def query_blocks(self) -> int:
        return self.query.shape[2] // self.query_block

    @property
    def key_blocks(self) -> int:
        return self.key.shape[2] // self.key_block


class _Sample:
    """Some tokens of each block: the first that counts of every `stride`.

    Args:
        tokens: (B, H, blocks * block, D). counted: (B, blocks * block) boolean, or None.

    Attributes:
        tokens: (B, H, blocks * size, D). counted: (B, blocks * size) boolean, or None.
        places: (1 or B, blocks * size) where they were.
        size: how many of each block.
    """

    def __init__(self, tokens: Tensor, counted: Tensor | None, block: int, stride: int) -> None:
        blocks = tokens.shape[2] // block
        self.size = -(-block // stride)
        starts = torch.arange(blocks, device=tokens.device)[:, None] * block
        starts = (starts + torch.arange(self.size, device=tokens.device) * stride).reshape(1, -1)
        self.counted = None
        self.places = starts
        if counted is None:
            self.tokens = tokens.unflatten(2, (blocks, block))[:, :, :, ::stride].flatten(2, 3)
            return
        cells = pad(counted.unflatten(1, (blocks, block)), (0, self.size * stride - block))
        cells = cells.unflatten(2, (self.size, stride)).flatten(1, 2)
        self.counted = cells.any(dim=-1)
        self.places = starts + cells.to(torch.uint8).argmax(dim=-1)
        index = self.places[:, None, :, None].expand(-1, tokens.shape[1], -1, tokens.shape[3])
        self.tokens = tokens.gather(2, index)


def _pooled(call: ProxyCall, tensor: Tensor) -> Tensor:
    """(B, H or H_kv, n, D) -> (B, G, n, D): the mean over each group's heads; a key head counts once a query head."""
    heads, count = call.query.shape[1], min(call.num_proxies, call.query.shape[1])
    member = _groups(call).unsqueeze(0) == torch.arange(count, device=tensor.device).unsqueeze(1)
    share = member.to(tensor.dtype) / member.sum(dim=1, keepdim=True)
    share = share.unflatten(1, (tensor.shape[1], heads // max(1, tensor.shape[1]))).sum(dim=2)
    return torch.einsum("gh,bhnd->bgnd", share, tensor)


def _groups(call: ProxyCall) -> Tensor:
    """(H,) the group of each head."""
    heads = call.query.shape[1]
    return torch.arange(heads, device=call.query.device) * min(call.num_proxies, heads) // max(1, heads)


def _weights(query: Tensor, key: Tensor, hidden: Tensor | None, scale: float) -> Tensor:
    """(B, H, n, m) softmax over the keys that are not hidden."""
    logits = (query * scale) @ key.mT
    if hidden is not None:
        logits = logits.masked_fill(hidden, float("-inf"))
    return softmax_of_kept(logits, logits != float("-inf"))


def _hidden(call: ProxyCall, shown: Tensor | None, rows: Tensor, columns: Tensor) -> Tensor | None:
    """What queries at places `rows` (1 or B, n) do not see of the extra keys and the keys at `columns` (1 or B, m)."""
    hidden = None if shown is None else ~shown[:, None, None]
    if call.is_causal:
        later = columns[:, None, :] > rows[:, :, None]
        later = pad(later, (call.extra_key.shape[2], 0)).unsqueeze(1)
        hidden = later if hidden is None else hidden | later
    return hidden


class _Ranking:
    """Scores of key blocks, alike for all heads of a group."""

    def __init__(self, call: ProxyCall) -> None:
        extra = call.extra_key.shape[2]
        shown = None if call.shown is None else call.shown[:, extra:]
        self.call = call
        self.rows = _Sample(raised(call.query), call.voting, call.query_block, call.stride)
        self.columns = _Sample(raised(call.key), shown, call.key_block, call.stride)
        keys = torch.cat([raised(call.extra_key), self.columns.tokens], dim=2)
        self.query, self.key = _pooled(call, self.rows.tokens), _pooled(call, keys)
        self.shown = None
        if call.shown is not None and self.columns.counted is not None:
            self.shown = torch.cat([call.shown[:, :extra], self.columns.counted], dim=1)

    def scores(self, some: slice) -> Tensor:
        """(B, G, R, C) for some blocks of queries: the largest weight of a sampled key for a sampled query."""
        call, size = self.call, self.rows.size
        part = slice(some.start * size, some.stop * size)
        hidden = _hidden(call, self.shown, self.rows.places[:, part], self.columns.places)
        soft = _weights(self.query[:, :, part], self.key, hidden, call.scale)[..., call.extra_key.shape[2] :]
        if self.rows.counted is not None:
            soft = soft * self.rows.counted[:, None, part, None]
        return soft.unflatten(3, (call.key_blocks, self.columns.size)).unflatten(2, (-1, size)).amax(dim=(3, 5))


def _needed(mass: Tensor, held: Tensor, gamma: float) -> Tensor:
    """(...) how many blocks, the heaviest first, hold the share gamma together with what is `held`.

    Args:
        mass: (..., C) attention to each block. held: (..., 1) attention to the extra keys.
    """
    sorted_mass = mass.sort(dim=-1, descending=True).values
    before = sorted_mass.cumsum(dim=-1) - sorted_mass + held
    return (before < gamma).sum(dim=-1)


class _Budget:
    """How many blocks a head keeps, by its own attention at some of its queries."""

    def __init__(self, call: ProxyCall) -> None:
        self.call = call
        self.of_last = call.is_causal and not call.by_block
        query = raised(call.query)
        if self.of_last:
            self.rows = _Sample(query[:, :, -call.query_block :], self._last_voting(), call.query_block, 1)
            self.rows.places = self.rows.places + (call.query_blocks - 1) * call.query_block
        else:
            self.rows = _Sample(query, call.voting, call.query_block, call.query_block)
        groups = call.query.shape[1] // max(1, call.key.shape[1])
        self.key = torch.cat([raised(call.extra_key), raised(call.key)], dim=2).repeat_interleave(groups, dim=1)

    def _last_voting(self) -> Tensor | None:
        return None if self.call.voting is None else self.call.voting[:, -self.call.query_block :]

    def _mass(self, part: slice) -> tuple[Tensor, Tensor]:
        """(B, H, n, C) attention to the blocks, and (B, H, n, 1) to the extra keys, of some of the rows."""
        call, extra = self.call, self.call.extra_key.shape[2]
        places = torch.arange(call.key.shape[2], device=call.key.device).unsqueeze(0)
        hidden = _hidden(call, call.shown, self.rows.places[:, part], places)
        soft = _weights(self.rows.tokens[:, :, part], self.key, hidden, call.scale)
        held = soft[..., :extra].sum(dim=-1, keepdim=True)
        return soft[..., extra:].unflatten(3, (call.key_blocks, call.key_block)).sum(dim=-1), held

    def counts(self, pieces: Iterator[slice]) -> Tensor:
        """(B, H, R or 1) blocks kept."""
        call, counted = self.call, self.rows.counted
        if call.gamma >= 1.0:
            return torch.full_like(call.query[:, :, :1, 0], call.key_blocks, dtype=torch.int64)
        if self.of_last:
            mass, held = self._mass(slice(None))
            if counted is not None:
                count = counted.sum(dim=1).clamp(min=1)[:, None, None, None]
                mass, held = (t * counted[:, None, :, None] * (t.shape[2] / count) for t in (mass, held))
            found = _needed(mass.mean(dim=2, keepdim=True), held.mean(dim=2, keepdim=True), call.gamma)
        else:
            found = torch.cat([_needed(*self._mass(some), call.gamma) for some in pieces], dim=2)
            if not call.by_block:
                found = self._mean(found)
            elif counted is not None:
                found = torch.where(counted[:, None], found, self._mean(found))
        return found.clamp(min=min(call.min_blocks, call.key_blocks))

    def _mean(self, found: Tensor) -> Tensor:
        """(B, H, 1) mean over the blocks with a voting query, rounded up."""
        counted = self.rows.counted
        if counted is None:
            return -(-found.sum(dim=2, keepdim=True) // found.shape[2])
        total = (found * counted[:, None]).sum(dim=2, keepdim=True)
        return -(-total // counted.sum(dim=1).clamp(min=1)[:, None, None])


def _lists(call: ProxyCall, order: Tensor, counts: Tensor, some: slice) -> Tensor:
    """(B, H, R, C): the first of each block's ranking, as many as its head keeps; -1 behind them.

    Args:
        order: (B, G, R, C) key blocks, best first. counts: (B, H, R or 1).
    """
    counts = counts.unsqueeze(-1)
    if call.is_causal:  # one is the own block, which is always seen; there are no more than come before it
        earlier = torch.arange(some.start, some.stop, device=order.device).unsqueeze(1)
        counts = torch.minimum((counts - 1).clamp(min=0), earlier)
    place = torch.arange(call.key_blocks, device=order.device)
    return order[:, _groups(call)].masked_fill(place >= counts, -1)


@full_precision
def proxy_lists(call: ProxyCall, pieces: list[slice] | None = None) -> Tensor:
    """(B, H, R, C) int64: the key blocks of each block of queries, for routed_attention; -1 for none, at the end.

    Causal: blocks before the own one only, which is for the caller to add.

    Args:
        pieces: which blocks of queries are ranked together; None: all.
    """
    pieces = pieces or [slice(0, call.query_blocks)]
    ranking, found = _Ranking(call), []
    counts = _Budget(call).counts(iter(pieces))
    for some in pieces:
        scores = ranking.scores(some)
        if call.is_causal:
            blocks = torch.arange(call.key_blocks, device=scores.device)
            own = torch.arange(some.start, some.stop, device=scores.device).unsqueeze(1)
            scores = scores.masked_fill(blocks >= own, -1.0)
        order = scores.sort(dim=-1, descending=True, stable=True).indices
        found.append(_lists(call, order, counts[:, :, some] if counts.shape[2] > 1 else counts, some))
    return torch.cat(found, dim=2)


def _compute(*operands: Any) -> Tensor:
    call = ProxyCall(*operands)
    if 0 in (call.query.shape[0], call.query.shape[1], call.query_blocks, call.key_blocks):
        return _fake(*operands)
    sampled = -(-call.query_block // call.stride) * -(-call.key_block // call.stride) * call.key_blocks
    heads = call.query.shape[1]
    most = call.query.shape[0] * max(min(call.num_proxies, heads) * sampled, heads * call.key.shape[2])
    count = max(1, _BLOCK // most)
    return proxy_lists(call, [slice(i, min(i + count, call.query_blocks)) for i in range(0, call.query_blocks, count)])


def _fake(*operands: Any) -> Tensor:
    call = ProxyCall(*operands)
    return call.query.new_empty((*call.query.shape[:2], call.query_blocks, call.key_blocks), dtype=torch.int64)


torch.library.define(
    "regard::proxy_blocks",
    "(Tensor query, Tensor key, Tensor extra_key, Tensor? voting, Tensor? shown, SymInt query_block, SymInt key_block, "
    "bool is_causal, float scale, int num_proxies, int stride, float gamma, SymInt min_blocks, bool by_block) "
    "-> Tensor",
)
torch.library.register_fake("regard::proxy_blocks", _fake)
torch.library.impl("regard::proxy_blocks", "CompositeExplicitAutograd", _compute)
_operator = torch.ops.regard.proxy_blocks.default


def proxy_blocks(
    query: Tensor,
    key: Tensor,
    extra_key: Tensor,
    rule: ProxyRule,
    *,
    query_block: int,
    key_block: int,
    voting: Tensor | None = None,
    shown: Tensor | None = None,
    is_causal: bool = False,
    scale: float | None = None,
) -> Tensor:
    """(B, H, R, C) int64 lists for routed_attention, -1 for none: which key blocks each block of queries should see.

    Without gradient. Ties go to the lowest block. Arguments as in ProxyCall, scale 1 / sqrt(D) if None.
    """
    operands = (
        query.detach(),
        key.detach(),
        extra_key.detach(),
        voting,
        shown,
        query_block,
        key_block,
        is_causal,
        query.shape[-1] ** -0.5 if scale is None else float(scale),
        rule.num_proxies,
        rule.stride,
        float(rule.gamma),
        rule.min_blocks,
        rule.budget == "block",
    )
    # torch.func transforms see through PyTorch's operations only.
    return proxy_lists(ProxyCall(*operands)) if functorch_active() else _operator(*operands)


@register_flop_formula(torch.ops.regard.proxy_blocks)
def _flops(query: tuple[int, ...], key: tuple[int, ...], extra_key: tuple[int, ...], *rest: Any, **kwargs: Any) -> int:
    """The proxies' scores of sampled tokens, and each head's of one query a block (causal: of the last block)."""
    names = [field.name for field in fields(ProxyCall)][3:]
    rule = dict(zip(names, rest, strict=False))
    batch, heads, queries, dim = query
    blocks, stride = queries // rule["query_block"], rule["stride"]
    rows = blocks * -(-rule["query_block"] // stride)
    columns = key[2] // rule["key_block"] * -(-rule["key_block"] // stride) + extra_key[2]
    flops = 2 * batch * min(rule["num_proxies"], heads) * rows * columns * dim
    if rule["gamma"] < 1.0:
        own = rule["query_block"] if rule["is_causal"] and not rule["by_block"] else blocks
        flops += 2 * batch * heads * own * (key[2] + extra_key[2]) * dim
    return flops
