"""The choice of blocks by proxies (regard.ops.routed.proxies), against the same in loops over heads and blocks."""

import dataclasses
import math

import pytest
import torch
from attention_cases import Largest
from torch.utils.flop_counter import FlopCounterMode

from regard.ops.routed import proxies
from regard.ops.routed.proxies import ProxyCall, ProxyRule, proxy_blocks

BLOCK = 5


def drawn(heads: int = 4, key_heads: int = 4, queries: int = 30, keys: int = 30, extra: int = 2, seed: int = 0):
    g = torch.Generator().manual_seed(seed)
    sizes = ((2, heads, queries, 8), (2, key_heads, keys, 8), (2, key_heads, extra, 8))
    return [3.0 * torch.randn(size, generator=g, dtype=torch.float64) for size in sizes]


def parts(heads: int, count: int) -> list[list[int]]:
    """Consecutive heads, as equal as they can be."""
    count = min(count, heads)
    return [[h for h in range(heads) if h * count // heads == g] for g in range(count)]


def by_loops(query, key, extra, rule, voting=None, shown=None, causal=False):
    """The definition, one head and one block of queries at a time: lists of key blocks, best first."""
    batch, heads, queries, dim = query.shape
    keys, prefix, groups = key.shape[2], extra.shape[2], heads // key.shape[1]
    voting = torch.ones(batch, queries, dtype=torch.bool) if voting is None else voting
    shown = torch.ones(batch, prefix + keys, dtype=torch.bool) if shown is None else shown
    rows, columns = queries // BLOCK, keys // BLOCK
    everything = torch.cat([extra, key], dim=2)

    def first_of_cells(counted: torch.Tensor, block: int, stride: int) -> list[int]:
        found = []
        for start in range(block * BLOCK, (block + 1) * BLOCK, stride):
            cell = [i for i in range(start, min(start + stride, (block + 1) * BLOCK)) if counted[i]]
            found += cell[:1]
        return found

    def softmax(q, k, places, at, allowed):
        logits = (q * k).sum(-1) * dim**-0.5
        hidden = ~allowed
        if causal:
            hidden = hidden | (torch.tensor(places) > at)
        return logits.masked_fill(hidden, -math.inf).softmax(dim=-1).nan_to_num(0.0)

    def needed(mass, held):
        count, total = 0, held
        for one in sorted(mass.tolist(), reverse=True):
            if total >= rule.gamma:
                break
            count, total = count + 1, total + one
        return count

    lists = [[[None] * rows for _ in range(heads)] for _ in range(batch)]
    for b in range(batch):
        own = {}
        for h in range(heads):
            k = everything[b, h // groups]

            def masses(i, k=k, h=h, b=b):
                places = [-1] * prefix + list(range(keys))
                soft = softmax(query[b, h, i], k, places, i, shown[b])
                return soft[prefix:].reshape(columns, BLOCK).sum(-1), soft[:prefix].sum().item()

            if rule.gamma >= 1.0:
                own[h] = [columns] * rows
            elif causal and rule.budget == "head":
                last = [i for i in range(queries - BLOCK, queries) if voting[b, i]]
                found = [masses(i) for i in last]
                mean = sum(m for m, _ in found) / max(1, len(found))
                own[h] = [needed(mean, sum(held for _, held in found) / len(found)) if found else columns] * rows
            else:
                asked = [first_of_cells(voting[b], r, BLOCK) for r in range(rows)]
                counts = [needed(*masses(a[0])) if a else None for a in asked]
                there = [c for c in counts if c is not None]
                mean = math.ceil(sum(there) / max(1, len(there)))
                own[h] = [mean if rule.budget == "head" or c is None else c for c in counts]
        for members in parts(heads, rule.num_proxies):
            mean_query = query[b, members].mean(0)
            mean_key = torch.stack([everything[b, h // groups] for h in members]).mean(0)
            for r in range(rows):
                score = torch.zeros(columns, dtype=torch.float64)
                picked = [first_of_cells(shown[b, prefix:], c, rule.stride) for c in range(columns)]
                flat = [j for one in picked for j in one]
                used = [*range(prefix), *(prefix + j for j in flat)]
                for i in first_of_cells(voting[b], r, rule.stride):
                    soft = softmax(mean_query[i], mean_key[used], [-1] * prefix + flat, i, shown[b][used])[prefix:]
                    for j, weight in zip(flat, soft, strict=True):
                        score[j // BLOCK] = max(score[j // BLOCK], weight)
                candidates = range(r) if causal else range(columns)
                best = sorted(candidates, key=lambda c: (-score[c].item(), c))
                for h in members:
                    count = max(own[h][r], min(rule.min_blocks, columns))
                    lists[b][h][r] = best[: max(count - 1, 0)] if causal else best[:count]
    return lists


def same(found: torch.Tensor, want) -> None:
    for b, of_image in enumerate(want):
        for h, of_head in enumerate(of_image):
            for r, expected in enumerate(of_head):
                row = found[b, h, r]
                assert row[: len(expected)].tolist() == expected, (b, h, r)
                assert (row[len(expected) :] == -1).all(), (b, h, r)


RULES = [
    ProxyRule(num_proxies=1, stride=2, gamma=0.8),
    ProxyRule(num_proxies=3, stride=1, gamma=0.6, budget="block"),
    ProxyRule(num_proxies=9, stride=9, gamma=0.3, min_blocks=2),
    ProxyRule(num_proxies=2, stride=3, gamma=1.0),
]


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("key_heads", [4, 2])
@pytest.mark.parametrize("rule", RULES, ids=str)
def test_equals_the_definition(rule: ProxyRule, key_heads: int, causal: bool) -> None:
    query, key, extra = drawn(key_heads=key_heads)
    found = proxy_blocks(query, key, extra, rule, query_block=BLOCK, key_block=BLOCK, is_causal=causal)
    assert found.shape == (2, 4, 6, 6) and found.dtype == torch.int64
    same(found, by_loops(query, key, extra, rule, causal=causal))


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("rule", RULES, ids=str)
def test_hidden_tokens_neither_vote_nor_stand_for_others(rule: ProxyRule, causal: bool) -> None:
    query, key, extra = drawn()
    g = torch.Generator().manual_seed(4)
    voting, shown = torch.rand(2, 30, generator=g) > 0.4, torch.rand(2, 32, generator=g) > 0.4
    voting[0, 25:] = False  # a block, the last, in which nobody votes
    shown[1, 2 + 10 : 2 + 15] = False
    masks = {"voting": voting, "shown": shown}
    found = proxy_blocks(query, key, extra, rule, query_block=BLOCK, key_block=BLOCK, is_causal=causal, **masks)
    same(found, by_loops(query, key, extra, rule, **masks, causal=causal))
    query = torch.where(voting[:, None, :, None], query, torch.randn_like(query))
    hidden = ~shown[:, None, :, None]
    key = torch.where(hidden[:, :, 2:], torch.randn_like(key), key)
    extra = torch.where(hidden[:, :, :2], torch.randn_like(extra), extra)
    again = proxy_blocks(query, key, extra, rule, query_block=BLOCK, key_block=BLOCK, is_causal=causal, **masks)
    assert torch.equal(again, found)


def test_more_queries_than_keys() -> None:
    query, key, extra = drawn(queries=30, keys=15, extra=0)
    found = proxy_blocks(query, key, extra, RULES[0], query_block=BLOCK, key_block=BLOCK)
    assert found.shape == (2, 4, 6, 3)
    same(found, by_loops(query, key, extra, RULES[0]))


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("rule", RULES, ids=str)
def test_pieces_choose_what_all_at_once_choose(rule: ProxyRule, causal: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    query, key, extra = drawn()
    options = {"query_block": BLOCK, "key_block": BLOCK, "is_causal": causal}
    whole = proxy_blocks(query, key, extra, rule, **options)
    monkeypatch.setattr(proxies, "_BLOCK", 1)
    assert torch.equal(proxy_blocks(query, key, extra, rule, **options), whole)


def test_one_head_is_its_own_proxy_and_equal_heads_share_its_choice() -> None:
    query, key, extra = drawn(heads=1, key_heads=1)
    options = {"query_block": BLOCK, "key_block": BLOCK}
    alone = proxy_blocks(query, key, extra, ProxyRule(1, 1, 0.7), **options)
    many = [t.expand(-1, 4, -1, -1) for t in (query, key, extra)]
    for count in (1, 2, 4):
        assert torch.equal(proxy_blocks(*many, ProxyRule(count, 1, 0.7), **options), alone.expand(-1, 4, -1, -1))


def test_opposite_heads_cancel() -> None:
    """The weakness that the paper names: the mean of opposite heads knows nothing; a proxy each does."""
    query, key, extra = drawn(heads=2, key_heads=2, extra=0)
    query[:, 1], key[:, 1] = -query[:, 0], key[:, 0]
    together = proxy_blocks(query, key, extra, ProxyRule(1, 1, 0.3, budget="block"), query_block=BLOCK, key_block=BLOCK)
    apart = proxy_blocks(query, key, extra, ProxyRule(2, 1, 0.3, budget="block"), query_block=BLOCK, key_block=BLOCK)
    assert (together[..., 0] == 0).all()  # all scores tie
    assert (apart[:, 0, :, 0] != apart[:, 1, :, 0]).float().mean() > 0.5


def test_opcheck_and_no_gradient() -> None:
    query, key, extra = (t.float().requires_grad_() for t in drawn())
    voting, shown = torch.ones(2, 30, dtype=torch.bool), torch.ones(2, 32, dtype=torch.bool)
    arguments = (query, key, extra, voting, shown, BLOCK, BLOCK, True, 0.3, 2, 2, 0.9, 1, False)
    torch.library.opcheck(torch.ops.regard.proxy_blocks.default, arguments)
    assert not proxy_blocks(query, key, extra, RULES[0], query_block=BLOCK, key_block=BLOCK).requires_grad


def test_memory_grows_with_blocks_not_with_pairs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(proxies, "_BLOCK", 1 << 14)
    query, key = torch.randn(2, 1, 2, 2048, 8)
    for causal in (False, True):
        with Largest() as largest:
            proxy_blocks(
                query, key, key[:, :, :0], ProxyRule(), query_block=32, key_block=32, is_causal=causal, scale=1.0
            )
        assert largest.elements <= 1 << 18 < 2048 * 2048 // 8


def test_flops_are_counted() -> None:
    query, key, extra = drawn()
    for rule, causal, rows in (
        (ProxyRule(2, 2), False, 6),
        (ProxyRule(2, 2), True, BLOCK),
        (ProxyRule(2, 2, 1.0), False, 0),
    ):
        with FlopCounterMode(display=False) as counter:
            proxy_blocks(query, key, extra, rule, query_block=BLOCK, key_block=BLOCK, is_causal=causal)
        shared = 2 * 2 * 2 * 18 * (18 + 2) * 8  # 3 of 5 tokens are the first of two
        assert counter.get_total_flops() == shared + 2 * 2 * 4 * rows * 32 * 8


@pytest.mark.parametrize("size", [(0, 4, 30), (2, 4, 0)])
def test_nothing_to_rank(size: tuple[int, int, int]) -> None:
    batch, heads, tokens = size
    query = torch.randn(batch, heads, tokens, 8)
    found = proxy_blocks(query, query, query[:, :, :0], ProxyRule(), query_block=BLOCK, key_block=BLOCK)
    assert found.shape == (batch, heads, tokens // BLOCK, tokens // BLOCK)


@pytest.mark.parametrize(
    ("options", "error", "said"),
    [
        ({"num_proxies": 0}, ValueError, "num_proxies: expected at least 1"),
        ({"num_proxies": 1.0}, TypeError, "num_proxies: expected an int"),
        ({"stride": 0}, ValueError, "stride"),
        ({"min_blocks": 0}, ValueError, "min_blocks"),
        ({"gamma": 0.0}, ValueError, r"gamma: expected a share of the attention in \(0, 1\], got 0.0"),
        ({"gamma": 1.1}, ValueError, "gamma"),
        ({"gamma": math.nan}, ValueError, "gamma"),
        ({"gamma": "0.9"}, TypeError, "gamma"),
        ({"gamma": True}, TypeError, "gamma"),
        ({"budget": "query"}, ValueError, "budget: expected one of 'head', 'block', got 'query'"),
    ],
)
def test_bad_rules(options, error, said) -> None:
    with pytest.raises(error, match=said):
        dataclasses.replace(ProxyRule(), **options)


def test_half_types_are_ranked_in_float32() -> None:
    query, key, extra = (t.bfloat16() for t in drawn())
    found = proxy_blocks(query, key, extra, RULES[1], query_block=BLOCK, key_block=BLOCK)
    wide = proxy_blocks(query.float(), key.float(), extra.float(), RULES[1], query_block=BLOCK, key_block=BLOCK)
    assert torch.equal(found, wide)


def test_a_call_counts_its_blocks() -> None:
    query, key, extra = drawn(queries=30, keys=15)
    call = ProxyCall(query, key, extra, None, None, BLOCK, 3, False, 1.0, 1, 4, 0.9, 1, False)
    assert (call.query_blocks, call.key_blocks) == (6, 5)
