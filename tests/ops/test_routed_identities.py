"""What routed attention must equal, and when: dense attention, windows, bi-level routing, halos, keys with a bias."""

import dataclasses
import math

import pytest
import torch
import torch.nn.functional as F
from attention_cases import BACKENDS, Shape, inputs
from routed_cases import attend, random_call

from regard import BlockOrder, routed_attention
from regard.ops import only_backend

# The kernel in float32, the PyTorch path in float32 and float64.
KINDS = [(b, torch.float32) for b in BACKENDS] + [("pytorch", torch.float64)]
everywhere = pytest.mark.parametrize(("backend", "dtype"), KINDS, ids=[f"{b}-{d}" for b, d in KINDS])


def tensors(dtype: torch.dtype, **shape) -> list[torch.Tensor]:
    return list(inputs(Shape(**shape), exact=False, dtype=dtype))


def dense(query, key, value, mask=None, scale=None) -> torch.Tensor:
    return F.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scale, enable_gqa=True)


@everywhere
@pytest.mark.parametrize(("query_block", "key_block"), [(7, 9), (1, 1), (37, 61), (100, 5), (8, 16)])
def test_all_blocks_listed_is_dense_attention(backend, dtype, query_block: int, key_block: int) -> None:
    query, key, value = tensors(dtype, heads=4, queries=37, keys=61, value_dim=24)
    count = -(-61 // key_block)
    lists = torch.randperm(count, generator=torch.Generator().manual_seed(0)).expand(-(-37 // query_block), count)
    mask = torch.rand(2, 1, 1, 61, generator=torch.Generator().manual_seed(0)) > 0.3
    options = {"blocks": lists, "query_block": query_block, "key_block": key_block, "enable_gqa": True}
    with only_backend(backend):
        for shown in (None, mask):
            ours = routed_attention(query, key, value, attn_mask=shown, **options)
            torch.testing.assert_close(ours, dense(query, key, value, shown))


@everywhere
def test_lists_are_a_mask_of_blocks(backend, dtype) -> None:
    query, key, value = tensors(dtype, queries=50, keys=70)
    chosen = torch.rand(2, 2, 7, 9, generator=torch.Generator().manual_seed(0)) > 0.6
    lists = torch.where(chosen, torch.arange(9), -1)
    mask = chosen.repeat_interleave(8, dim=2)[:, :, :50].repeat_interleave(8, dim=3)[..., :70]
    with only_backend(backend):
        ours = routed_attention(query, key, value, blocks=lists, query_block=8, key_block=8)
    want = dense(query, key, value, mask).nan_to_num(0.0)
    torch.testing.assert_close(ours, want)


@everywhere
def test_a_block_listed_twice_counts_twice(backend, dtype) -> None:
    query, key, value = tensors(dtype, queries=10, keys=12)
    with only_backend(backend):
        ours = routed_attention(query, key, value, blocks=torch.tensor([[2, 0, 2, -1, 2]]), query_block=10, key_block=4)
    counts = torch.tensor([1.0, 0.0, 3.0], dtype=dtype).log().repeat_interleave(4)
    torch.testing.assert_close(ours, dense(query, key, value, counts.expand(10, -1)))


@everywhere
def test_extra_keys_are_more_keys_with_a_bias(backend, dtype) -> None:
    call = random_call(Shape(heads=4, queries=30, keys=40), 8, 8, 5, extra=6, bias="query", hidden=True, dtype=dtype)
    key, value = (torch.cat(pair, dim=2) for pair in ((call.key, call.extra_key), (call.value, call.extra_value)))
    blocks = torch.zeros(2, 4, 4, 5, dtype=dtype).scatter_add(
        -1, call.blocks.clamp(min=0), (call.blocks >= 0).to(dtype)
    )
    shown = call.visible.repeat_interleave(2, dim=1).unsqueeze(2)
    bias = blocks.log().repeat_interleave(8, dim=2)[:, :, :30].repeat_interleave(8, dim=3)
    bias = torch.cat([bias.masked_fill(~shown, -math.inf), call.extra_bias], dim=-1)
    torch.testing.assert_close(attend(call, backend), dense(query=call.query, key=key, value=value, mask=bias))


@everywhere
def test_pooled_keys_with_log_counts_stand_for_equal_tokens(backend, dtype) -> None:
    """Runs of equal keys weigh as one of them with the logarithm of how many there are."""
    query, key, value = tensors(dtype, queries=20, keys=24)
    pooled = [t[:, :, ::4] for t in (key, value)]
    with only_backend(backend):
        ours = routed_attention(
            query, key, value, blocks=torch.full((3, 1), -1), query_block=8, key_block=8,
            extra_key=pooled[0], extra_value=pooled[1], extra_bias=torch.tensor(math.log(4.0)),
        )  # fmt: skip
        without = routed_attention(
            query, key, value, blocks=torch.zeros(3, 0, dtype=torch.int64), query_block=8, key_block=8,
            extra_key=pooled[0], extra_value=pooled[1],
        )  # fmt: skip
    want = dense(query, *(t.repeat_interleave(4, dim=2) for t in pooled))
    torch.testing.assert_close(ours, want)
    torch.testing.assert_close(without, want)  # a bias that all share changes nothing


@everywhere
def test_an_extra_key_with_a_bias_of_minus_infinity_is_not_there(backend, dtype) -> None:
    call = random_call(Shape(queries=30, keys=40), 8, 8, 2, extra=3, bias="head", dtype=dtype)
    bias = call.extra_bias.clone()
    bias[..., 1] = -math.inf
    kept = {"extra_key": call.extra_key[:, :, ::2], "extra_value": call.extra_value[:, :, ::2]}
    fewer = dataclasses.replace(call, **kept, extra_bias=bias[..., ::2])
    torch.testing.assert_close(attend(dataclasses.replace(call, extra_bias=bias), backend), attend(fewer, backend))
    nothing = dataclasses.replace(call, blocks=torch.full_like(call.blocks, -1), extra_bias=bias - math.inf)
    assert (attend(nothing, backend) == 0).all()


@everywhere
def test_the_order_of_a_list_and_missing_blocks_do_not_matter(backend, dtype) -> None:
    call = random_call(Shape(queries=30, keys=40), 8, 8, 4, dtype=dtype)
    want = attend(call, backend)
    torch.testing.assert_close(attend(dataclasses.replace(call, blocks=call.blocks.flip(-1)), backend), want)
    longer = torch.cat([torch.full_like(call.blocks, -1), call.blocks], dim=-1)
    torch.testing.assert_close(attend(dataclasses.replace(call, blocks=longer), backend), want)


@everywhere
def test_key_blocks_have_no_places(backend, dtype) -> None:
    """Blocks and the lists' entries renamed alike: the same result."""
    call = random_call(Shape(queries=30, keys=40), 8, 8, 4, dtype=dtype)
    order = torch.randperm(5, generator=torch.Generator().manual_seed(0))
    key, value = (t.unflatten(2, (5, 8))[:, :, order].flatten(2, 3) for t in (call.key, call.value))
    names = torch.cat([order.argsort(), torch.tensor([-1])])
    renamed = dataclasses.replace(call, key=key, value=value, blocks=names[call.blocks])
    torch.testing.assert_close(attend(renamed, backend), attend(call, backend))


@everywhere
def test_grouped_heads_are_repeated_heads(backend, dtype) -> None:
    call = random_call(Shape(heads=6, queries=30, keys=47), 8, 8, 3, extra=2, bias="head", hidden=True, dtype=dtype)
    names = ("key", "value", "extra_key", "extra_value", "visible")
    repeated = dataclasses.replace(call, **{n: getattr(call, n).repeat_interleave(3, dim=1) for n in names})
    torch.testing.assert_close(attend(call, backend), attend(repeated, backend))


@everywhere
def test_hidden_keys_are_as_if_removed_and_may_hold_anything(backend, dtype) -> None:
    query, key, value = tensors(dtype, queries=30, keys=40)
    shown = torch.rand(40, generator=torch.Generator().manual_seed(0)) > 0.4
    options = {"query_block": 30, "key_block": 1}
    lists = torch.arange(40).expand(1, 40)
    with only_backend(backend):
        ours = routed_attention(query, key, value, blocks=lists, attn_mask=shown, **options)
        removed = routed_attention(query, key, value, blocks=lists[:, shown], **options)
        junk = [t.masked_fill(~shown.unsqueeze(-1), math.nan) for t in (key, value)]
        again = routed_attention(query, *junk, blocks=lists, attn_mask=shown, **options)
    torch.testing.assert_close(ours, removed)
    assert torch.equal(again, ours)


@everywhere
def test_queries_are_independent_of_one_another(backend, dtype) -> None:
    call = random_call(Shape(queries=50), 20, 8, 3, dtype=dtype)
    order = torch.cat([start + torch.randperm(min(20, 50 - start)) for start in range(0, 50, 20)])
    ours = attend(call, backend)
    shuffled = attend(dataclasses.replace(call, query=call.query[:, :, order]), backend)
    torch.testing.assert_close(shuffled, ours[:, :, order])


@everywhere
def test_scale_is_a_factor_of_the_logits(backend, dtype) -> None:
    call = random_call(Shape(queries=50), dtype=dtype)
    louder = dataclasses.replace(call, query=2.0 * call.query, scale=call.scale / 2.0)
    torch.testing.assert_close(attend(louder, backend), attend(call, backend))


# ---- published mechanisms, from their equations --------------------------------------------------------------------


def biformer(query, key, value, regions: int, topk: int, heads: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Bi-level routing attention of (B, h, w, C) maps (arXiv 2303.08810), K and V gathered; also its routes."""
    batch, height, width, channels = query.shape
    cells = (regions, height // regions, regions, width // regions)

    def by_region(x):  # (B, S^2, n, C)
        return x.unflatten(1, cells[:2]).unflatten(3, cells[2:]).transpose(2, 3).flatten(3, 4).flatten(1, 2)

    q, k, v = (by_region(t) for t in (query, key, value))
    affinity = q.mean(dim=2) @ k.mean(dim=2).mT
    routes = affinity.topk(topk, dim=-1).indices
    images = torch.arange(batch)[:, None, None]
    gathered_key, gathered_value = (t[images, routes].flatten(2, 3) for t in (k, v))  # (B, S^2, k n, C)
    q, gathered_key, gathered_value = (
        t.unflatten(-1, (heads, -1)).transpose(2, 3) for t in (q, gathered_key, gathered_value)
    )
    soft = (q @ gathered_key.mT * channels**-0.5).softmax(dim=-1)
    out = (soft @ gathered_value).transpose(2, 3).flatten(3)
    out = out.unflatten(1, (regions, regions)).unflatten(3, (cells[1], cells[3]))
    return out.transpose(2, 3).flatten(3, 4).flatten(1, 2), routes


@everywhere
@pytest.mark.parametrize("topk", [1, 3, 9])
def test_bilevel_routing(backend, dtype, topk: int) -> None:
    g = torch.Generator().manual_seed(0)
    maps = [torch.randn(2, 12, 15, 32, generator=g).to(dtype) for _ in range(3)]
    want, routes = biformer(*maps, regions=3, topk=topk, heads=4)
    order = BlockOrder((12, 15), (4, 5))
    heads = [order.arrange(t.flatten(1, 2).unflatten(-1, (4, 8)).transpose(1, 2)) for t in maps]
    with only_backend(backend):
        ours = routed_attention(*heads, blocks=routes.unsqueeze(1), query_block=20, key_block=20, scale=32**-0.5)
    ours = order.restore(ours).transpose(1, 2).flatten(2).unflatten(1, (12, 15))
    torch.testing.assert_close(ours, want)


def swin_windows(query, key, value, size: int, shift: int) -> torch.Tensor:
    """Attention in shifted windows of (B, H, h, w, D) (arXiv 2103.14030): roll, cut, mask what was not beside."""
    height, width = query.shape[2:4]
    regions = torch.zeros(height, width)
    for i, rows in enumerate((slice(0, -size), slice(-size, -shift), slice(-shift, None))):
        for j, columns in enumerate((slice(0, -size), slice(-size, -shift), slice(-shift, None))):
            regions[rows, columns] = 3 * i + j

    def cut(x):  # (..., h, w, D) -> (..., windows, size^2, D)
        x = x.unflatten(-3, (-1, size)).unflatten(-2, (-1, size)).transpose(-4, -3)
        return x.flatten(-3, -2).flatten(-4, -3)

    rolled = [cut(t.roll((-shift, -shift), (2, 3)) if shift else t) for t in (query, key, value)]
    mask = None
    if shift:
        names = cut(regions.unsqueeze(-1)).squeeze(-1)
        mask = names.unsqueeze(-1) == names.unsqueeze(-2)
    out = dense(*rolled, mask)
    out = out.unflatten(-2, (size, size)).unflatten(2, (height // size, width // size)).transpose(3, 4)
    out = out.flatten(4, 5).flatten(2, 3)
    return out.roll((shift, shift), (2, 3)) if shift else out


@everywhere
@pytest.mark.parametrize("shift", [0, 2])
def test_shifted_windows_are_windows_with_an_offset(backend, dtype, shift: int) -> None:
    g = torch.Generator().manual_seed(0)
    maps = [torch.randn(2, 3, 8, 12, 16, generator=g).to(dtype) for _ in range(3)]
    order = BlockOrder((8, 12), 4, offset=(4 - shift) % 4)
    own = torch.arange(order.blocks).unsqueeze(1)
    with only_backend(backend):
        ours = routed_attention(
            *(order.arrange(t.flatten(2, 3)) for t in maps),
            blocks=own, query_block=16, key_block=16, attn_mask=order.mask(),
        )  # fmt: skip
    torch.testing.assert_close(order.restore(ours).unflatten(2, (8, 12)), swin_windows(*maps, size=4, shift=shift))


def halos(query, key, value, size: int, reach: int) -> torch.Tensor:
    """Attention of blocks of (B, H, h, w, D) to themselves and a halo (arXiv 2103.12731), nothing beyond the border."""
    height, width = query.shape[2:4]
    rows, columns = (torch.arange(n) for n in (height, width))

    def near(places):
        start = places // size * size
        return (places >= start[:, None] - reach) & (places < start[:, None] + size + reach)

    mask = near(rows)[:, None, :, None] & near(columns)[None, :, None, :]
    flat = [t.flatten(2, 3) for t in (query, key, value)]
    return dense(*flat, mask.flatten(2, 3).flatten(0, 1)).unflatten(2, (height, width))


@everywhere
@pytest.mark.parametrize("reach", [1, 2])
def test_halos_are_lists_of_smaller_blocks(backend, dtype, reach: int) -> None:
    g = torch.Generator().manual_seed(0)
    maps = [torch.randn(2, 3, 8, 12, 16, generator=g).to(dtype) for _ in range(3)]
    queries, keys = BlockOrder((8, 12), 4), BlockOrder((8, 12), reach)
    down, right = keys.block_grid
    step = 4 // reach
    lists = []
    for row in range(2):
        for column in range(3):
            around = [(row * step + i, column * step + j) for i in range(-1, step + 1) for j in range(-1, step + 1)]
            lists.append([i * right + j if 0 <= i < down and 0 <= j < right else -1 for i, j in around])
    with only_backend(backend):
        ours = routed_attention(
            queries.arrange(maps[0].flatten(2, 3)), *(keys.arrange(t.flatten(2, 3)) for t in maps[1:]),
            blocks=torch.tensor(lists), query_block=16, key_block=reach * reach,
        )  # fmt: skip
    torch.testing.assert_close(queries.restore(ours).unflatten(2, (8, 12)), halos(*maps, size=4, reach=reach))
