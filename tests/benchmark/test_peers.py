"""Peers against attention under a mask written out pair by pair, and against the operators that they stand beside."""

import itertools
import math

import pytest
import torch
import torch.nn.functional as F

from regard import density_peak_clusters, kmeans_clusters, knn_attention
from regard.benchmark.entry import Case
from regard.benchmark.peers import eager_kmeans, published_density_peaks, published_knn_attention
from regard.benchmark.peers_local import FLEX_NEIGHBORHOOD, NATTEN, UNFOLD, unfold_neighborhood_attention
from regard.benchmark.peers_routed import FLEX_ROUTED, GATHER, PUBLISHED_GATHER, gathered_routed_attention
from regard.simulation import NeighborhoodPattern, window_bounds


def normal(*shape: int, count: int = 3, seed: int = 0, dtype=torch.float64) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for _ in range(count)]


def neighborhood_mask(pattern: NeighborhoodPattern) -> torch.Tensor:
    """(N, N) who sees whom, token by token and axis by axis."""
    tokens = list(itertools.product(*(range(n) for n in pattern.grid_size)))
    mask = torch.zeros(len(tokens), len(tokens), dtype=torch.bool)
    for i, query in enumerate(tokens):
        for j, key in enumerate(tokens):
            sees = True
            for q, k, (length, window, stride, dilation, causal) in zip(query, key, pattern.axes, strict=True):
                group = list(range(q % dilation, length, dilation))
                start, end = window_bounds(group.index(q), len(group), window, stride, causal)
                sees = sees and k in group[start:end]
            mask[i, j] = sees
    return mask


PATTERNS = [
    NeighborhoodPattern((13,), 4),
    NeighborhoodPattern((16,), 5, 3, 2, True),
    NeighborhoodPattern((7, 9), (3, 5)),
    NeighborhoodPattern((8, 9), (4, 3), (2, 3), (2, 1), (False, True)),
    NeighborhoodPattern((4, 5, 6), (2, 3, 3), (1, 2, 1), (1, 1, 2), (True, False, False)),
    NeighborhoodPattern((5, 5), 5),
]


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_unfold_is_attention_under_the_windows_mask(pattern):
    tokens = math.prod(pattern.grid_size)
    leaves = [one.requires_grad_() for one in normal(2, 3, tokens, 8)]
    found = unfold_neighborhood_attention(*leaves, pattern)
    expected = F.scaled_dot_product_attention(*leaves, attn_mask=neighborhood_mask(pattern))
    torch.testing.assert_close(found, expected)
    gradient = torch.randn_like(expected)
    for mine, theirs in zip(*(torch.autograd.grad(one, leaves, gradient) for one in (found, expected)), strict=True):
        torch.testing.assert_close(mine, theirs)


def neighborhood_case(pattern: NeighborhoodPattern) -> Case:
    options = {name: list(getattr(pattern, name)) for name in ("grid_size", "kernel_size", "stride", "dilation")}
    options["is_causal"] = list(pattern.is_causal)
    return Case(math.prod(pattern.grid_size), heads=2, head_dim=16, options=options)


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_the_mask_that_flex_compiles_is_the_windows(pattern):
    from regard.benchmark.peers_local import flex_neighborhood_mask

    index = torch.arange(math.prod(pattern.grid_size))
    mask = flex_neighborhood_mask(pattern, torch.device("cpu"))
    nothing = torch.zeros((), dtype=torch.int64)
    assert torch.equal(mask(nothing, nothing, index[:, None], index[None, :]), neighborhood_mask(pattern))


@pytest.mark.slow
@pytest.mark.parametrize("pattern", PATTERNS[1:4], ids=str)
def test_compiled_flex_is_attention_under_the_windows_mask(pattern):
    case = neighborhood_case(pattern)
    tensors = normal(1, 2, case.tokens, 16, dtype=torch.float32)
    assert FLEX_NEIGHBORHOOD.refuses(case, "float32", "forward") == ""
    found = FLEX_NEIGHBORHOOD.make(case)(*tensors)
    expected = F.scaled_dot_product_attention(*tensors, attn_mask=neighborhood_mask(pattern))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("pattern", PATTERNS[:5], ids=str)
def test_natten_is_attention_under_the_windows_mask(pattern):
    pytest.importorskip("natten")
    case = neighborhood_case(pattern)
    assert NATTEN.refuses(case, "float32", "forward") == ""
    tensors = normal(1, 2, case.tokens, 16, dtype=torch.float32)
    expected = F.scaled_dot_product_attention(*tensors, attn_mask=neighborhood_mask(pattern))
    torch.testing.assert_close(NATTEN.make(case)(*tensors), expected, rtol=1e-4, atol=1e-4)


def test_local_peers_say_what_they_cannot_do():
    case = neighborhood_case(PATTERNS[2])
    other = Case(63, options={**case.options, "border": "zeropad"})
    assert UNFOLD.refuses(case, "float32", "forward+backward") == ""
    assert "zeropad" in UNFOLD.refuses(other, "float32", "forward")
    assert "zeropad" in FLEX_NEIGHBORHOOD.refuses(other, "float32", "forward")
    if not torch.cuda.is_available():
        assert "no backward" in FLEX_NEIGHBORHOOD.refuses(case, "float32", "forward+backward")
    assert "all pairs" in FLEX_NEIGHBORHOOD.refuses(Case(50_000, options=case.options), "float32", "forward")
    tensors = normal(1, 1, 63, 8)
    torch.testing.assert_close(UNFOLD.make(case)(*tensors), unfold_neighborhood_attention(*tensors, PATTERNS[2]))


def listed_mask(blocks: torch.Tensor, query_block: int, key_block: int, tokens: int, keys: int) -> torch.Tensor:
    mask = torch.zeros(*blocks.shape[:2], tokens, keys, dtype=torch.bool)
    for image, head, row in itertools.product(*(range(n) for n in blocks.shape[:3])):
        for block in blocks[image, head, row].tolist():
            if block >= 0:
                rows = slice(row * query_block, (row + 1) * query_block)
                mask[image, head, rows, block * key_block : (block + 1) * key_block] = True
    return mask


def lists(images: int, heads: int, rows: int, blocks: int, length: int) -> torch.Tensor:
    """Different blocks for each row, some missing; the last row of all has one at least."""
    generator = torch.Generator().manual_seed(1)
    found = torch.rand(images, heads, rows, blocks, generator=generator).argsort(dim=-1)[..., :length]
    found[..., 0, 1:] = -1
    return found


@pytest.mark.parametrize(("images", "heads"), [(2, 3), (1, 1), (2, 1)])
def test_gather_is_attention_under_the_lists_mask(images, heads):
    blocks = lists(images, heads, 4, 6, 3)
    query, _, _ = normal(2, 3, 20, 8)
    key, value, _ = normal(2, 3, 24, 8, seed=1)
    leaves = [one.requires_grad_() for one in (query, key, value)]
    found = gathered_routed_attention(*leaves, blocks, 5, 4)
    expected = F.scaled_dot_product_attention(*leaves, attn_mask=listed_mask(blocks, 5, 4, 20, 24))
    torch.testing.assert_close(found, expected)
    gradient = torch.randn_like(expected)
    for mine, theirs in zip(*(torch.autograd.grad(one, leaves, gradient) for one in (found, expected)), strict=True):
        torch.testing.assert_close(mine, theirs)


def test_gather_gives_zeros_where_nothing_is_listed_and_refuses_odd_blocks():
    tensors = normal(1, 2, 12, 8)
    blocks = torch.tensor([[[[0, 1], [-1, -1], [2, -1]]]])
    found = gathered_routed_attention(*tensors, blocks, 4, 4)
    assert (found[:, :, 4:8] == 0).all() and found.isfinite().all()
    with pytest.raises(ValueError, match="query_block"):
        gathered_routed_attention(*tensors, blocks, 5, 4)


@pytest.mark.slow
@pytest.mark.parametrize(("images", "heads"), [(2, 2), (1, 1)])
def test_compiled_flex_is_attention_under_the_lists_mask(images, heads):
    case = Case(60, batch=2, heads=2, head_dim=16, options={"query_block": 5, "key_block": 4})
    tensors, blocks = normal(2, 2, 60, 16, dtype=torch.float32), lists(images, heads, 12, 15, 4)
    found = FLEX_ROUTED.make(case)(*tensors, blocks)
    expected = F.scaled_dot_product_attention(*tensors, attn_mask=listed_mask(blocks, 5, 4, 60, 60))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(GATHER.make(case)(*tensors, blocks=blocks), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("images", [1, 2])
def test_the_published_gather_is_the_other_one(images):
    case = Case(60, batch=2, heads=3, head_dim=16, options={"query_block": 5, "key_block": 4})
    blocks = lists(images, 1, 12, 15, 4)
    blocks[..., 0, :] = torch.arange(4)
    leaves = [one.requires_grad_() for one in normal(2, 3, 60, 16)]
    found, expected = (peer.make(case)(*leaves, blocks=blocks.clamp(min=0)) for peer in (PUBLISHED_GATHER, GATHER))
    torch.testing.assert_close(found, expected)
    gradient = torch.randn_like(expected)
    for mine, theirs in zip(*(torch.autograd.grad(one, leaves, gradient) for one in (found, expected)), strict=True):
        torch.testing.assert_close(mine, theirs)
    for wrong in (lists(images, 3, 12, 15, 4), blocks - 1):
        with pytest.raises(ValueError, match="blocks"):
            PUBLISHED_GATHER.make(case)(*leaves, blocks=wrong)


def test_published_formulations_compute_what_the_operators_compute():
    tensors = normal(2, 3, 50, 8)
    torch.testing.assert_close(published_knn_attention(*tensors, topk=0.2), knn_attention(*tensors, topk=0.2))
    (x,) = normal(2, 60, 8, count=1)
    grouped = [one.assignment for one in density_peak_clusters(x, [5, 12])]
    assert all(map(torch.equal, published_density_peaks(x, [5, 12]), grouped))
    for found, expected in zip(eager_kmeans(x, 7, 3), kmeans_clusters(x, 7, iterations=3), strict=True):
        torch.testing.assert_close(found, expected)
