"""ProxyAttention beside dense attention: what is exact, what its blocks leave out, and its causal form."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from regard import routed_attention
from regard.mixers import DenseAttention, Proxy, ProxyAttention, parse_mechanism
from regard.mixers.proxy import _tiles
from regard.ops.routed.arranging import from_blocks, to_blocks

DIM, HEADS = 48, 3

pytestmark = pytest.mark.filterwarnings("ignore::regard.SlowPathWarning")


def drawn(tokens: int, heads: int = 4, key_heads: int = 4, keys: int | None = None, seed: int = 0) -> list[Tensor]:
    g = torch.Generator().manual_seed(seed)
    sizes = [(2, heads, tokens, 8), (2, key_heads, keys or tokens, 8), (2, key_heads, keys or tokens, 8)]
    return [2.0 * torch.randn(size, generator=g, dtype=torch.float64) for size in sizes]


def dense(query, key, value, mask=None, causal=False, **options):
    if causal:
        earlier = torch.ones(query.shape[-2], key.shape[-2], dtype=torch.bool).tril()
        mask = earlier if mask is None else mask & earlier
    return F.scaled_dot_product_attention(query, key, value, attn_mask=mask, **options)


def weights(mechanism: Proxy, query: Tensor, key: Tensor, **options) -> Tensor:
    eye = torch.eye(key.shape[2]).to(key).expand(*key.shape[:2], -1, -1)
    return mechanism.attend(query, key, eye, **options)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("prefix", [0, 3])
@pytest.mark.parametrize("hide", [False, True])
@pytest.mark.parametrize("key_heads", [4, 2])
@pytest.mark.parametrize("budget", ["head", "block"])
def test_gamma_one_is_dense(causal: bool, prefix: int, hide: bool, key_heads: int, budget: str) -> None:
    """On a grid that its tiles do not fit, with grouped heads, hidden keys and prefix tokens: output and gradients."""
    tensors = [t.requires_grad_() for t in drawn(prefix + 35, key_heads=key_heads)]
    mask = None
    if hide:
        mask = torch.rand(2, 1, 1, prefix + 35, generator=torch.Generator().manual_seed(1)) > 0.3
        mask[..., 0] = True  # so that causal rows see something: the first token is seen by all
        if prefix == 0 and causal:
            mask[1, ..., :9] = False  # whole rows and blocks that see nothing
    mechanism = Proxy(num_proxies=2, gamma=1.0, block_size=9, budget=budget)
    options = {"attn_mask": mask, "is_causal": causal, "enable_gqa": True}
    found = mechanism.attend(*tensors, grid_size=(5, 7), num_prefix_tokens=prefix, **options)
    expected = dense(*tensors, mask, causal, enable_gqa=True)
    torch.testing.assert_close(found, expected)
    ours, theirs = (torch.autograd.grad(y.square().sum(), tensors) for y in (found, expected))
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("gamma", [0.2, 0.95])
@pytest.mark.parametrize("causal", [False, True])
def test_a_single_block_is_dense(gamma: float, causal: bool) -> None:
    tensors = drawn(2 + 30)
    found = Proxy(gamma=gamma, block_size=64).attend(*tensors, grid_size=(5, 6), num_prefix_tokens=2, is_causal=causal)
    torch.testing.assert_close(found, dense(*tensors, causal=causal))


def largest_up_to(query: Tensor, key: Tensor, gamma: float) -> Tensor:
    """(B, H, N, M) which weights, the largest first, reach a share gamma of their sum."""
    soft = (query @ key.mT * query.shape[-1] ** -0.5).softmax(dim=-1)
    ordered, order = soft.sort(dim=-1, descending=True)
    kept = ordered.cumsum(dim=-1) - ordered < gamma
    return torch.zeros_like(kept).scatter(-1, order, kept)


@pytest.mark.parametrize("gamma", [0.3, 0.7])
def test_blocks_of_one_token_keep_the_largest_weights(gamma: float) -> None:
    """Each head its own proxy, nothing pooled, nothing left out of the ranking: exact, and as many as each needs."""
    query, key, value = drawn(25)
    options = {"num_proxies": 4, "gamma": gamma, "block_size": 1, "stride": 1, "min_tokens": 0}
    kept = largest_up_to(query, key, gamma)
    found = Proxy(**options, budget="block").attend(query, key, value, grid_size=(5, 5))
    torch.testing.assert_close(found, dense(query, key, value, kept))
    counts = kept.sum(dim=-1).double().mean(dim=-1).ceil().int()  # a head's mean, for all its queries
    rank = (query @ key.mT).argsort(dim=-1, descending=True).argsort(dim=-1)
    found = Proxy(**options, budget="head").attend(query, key, value, grid_size=(5, 5))
    torch.testing.assert_close(found, dense(query, key, value, rank < counts[..., None, None]))


def test_causal_blocks_of_one_token_keep_what_the_last_query_needs() -> None:
    query, key, value = drawn(25)
    last = largest_up_to(query[:, :, -1:], key, 0.6).sum(dim=-1)
    mechanism = Proxy(num_proxies=4, gamma=0.6, block_size=1, stride=1, min_tokens=0)
    scores = (query @ key.mT).masked_fill(~torch.ones(25, 25, dtype=torch.bool).tril(-1), -math.inf)
    earlier = scores.argsort(dim=-1, descending=True).argsort(dim=-1) < last[..., None] - 1
    kept = (earlier & (scores > -math.inf)) | torch.eye(25, dtype=torch.bool)
    torch.testing.assert_close(mechanism.attend(query, key, value, is_causal=True), dense(query, key, value, kept))


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("budget", ["head", "block"])
def test_whole_blocks_are_kept(causal: bool, budget: str) -> None:
    """Each query's weights are dense attention's over whole blocks; queries of a block see the same ones; prefix keys
    and, causally, the own block are among them; a prefix query sees all that it may."""
    query, key, _ = drawn(2 + 64)
    options = {"num_prefix_tokens": 2, "is_causal": causal}
    mechanism = Proxy(num_proxies=2, gamma=0.8 if causal else 0.4, block_size=16, min_tokens=0, budget=budget)
    found = weights(mechanism, query, key, grid_size=(8, 8), **options)
    torch.testing.assert_close(found, dense(query, key, torch.eye(66).double().expand(2, 4, 66, 66), found > 0))
    allowed = torch.ones(66, 66, dtype=torch.bool)
    allowed = allowed.tril() if causal else allowed
    assert (found[:, :, :, :2] > 0).eq(allowed[:, :2]).all() and (found[:, :, :2] > 0).eq(allowed[:2]).all()
    order = _tiles((64,) if causal else (8, 8), 16)
    seen = to_blocks(to_blocks((found[:, :, 2:, 2:] > 0).float(), order).mT, order).mT.unflatten(-1, (4, 16))
    if causal:
        own = torch.block_diag(*[torch.ones(16, 16).tril()] * 4).unflatten(-1, (4, 16))
        assert ((own > 0) <= (seen > 0)).all()
        seen = seen.masked_fill(torch.eye(4, dtype=torch.bool).repeat_interleave(16, 0)[..., None], 0.0)
    assert (seen == seen[..., :1]).all()
    blocks = seen[..., 0].unflatten(2, (4, 16))
    assert (blocks == blocks[:, :, :, :1]).all()
    assert 0 < blocks.mean() < 1


def test_tiles_are_square_blocks_of_the_grid() -> None:
    """A token that all look at is seen with its tile, not with its row."""
    query, key, _ = drawn(64)
    query, key = query.abs(), key * 0.01
    key[:, :, 8 * 5 + 6] = 5.0  # row 5, column 6
    seen = weights(Proxy(gamma=0.1, block_size=16, min_tokens=0, stride=1), query, key, grid_size=(8, 8)) > 0
    tile = torch.zeros(8, 8, dtype=torch.bool)
    tile[4:, 4:] = True
    assert (seen == tile.flatten()).all()


def test_min_tokens_is_seen_by_all() -> None:
    query, key, _ = drawn(64)
    few = weights(Proxy(gamma=0.01, block_size=4, min_tokens=0), query, key, grid_size=(8, 8))
    more = weights(Proxy(gamma=0.01, block_size=4, min_tokens=21), query, key, grid_size=(8, 8))
    assert ((few > 0).sum(-1) == 4).all() and ((more > 0).sum(-1) == 24).all()


@pytest.mark.parametrize("causal", [False, True])
def test_torch_func_transforms(causal: bool) -> None:
    query, key, value = drawn(2 + 35)
    mechanism = Proxy(num_proxies=2, gamma=0.5, block_size=9, min_tokens=0)

    def attend(*tensors: Tensor) -> Tensor:
        return mechanism.attend(*tensors, grid_size=(5, 7), num_prefix_tokens=2, is_causal=causal)

    torch.testing.assert_close(torch.vmap(attend)(query, key, value), attend(query, key, value))
    found = torch.func.grad(lambda q: attend(q, key, value).square().sum())(query)
    query.requires_grad_()
    (expected,) = torch.autograd.grad(attend(query, key, value).square().sum(), query)
    torch.testing.assert_close(found, expected)


def test_what_it_chooses_can_be_looked_at() -> None:
    query, key, _ = drawn(1 + 64, key_heads=2)
    mechanism = Proxy(gamma=0.4, block_size=16, min_tokens=0)
    lists, order = mechanism.choose(query, key, num_prefix_tokens=1)
    seen = weights(mechanism, query, key, num_prefix_tokens=1, enable_gqa=True)[:, :, 1:, 1:] > 0
    seen = to_blocks(to_blocks(seen.float(), order).mT, order).mT[:, :, ::16, ::16]
    want = torch.zeros(2, 4, 4, 5).scatter(-1, torch.where(lists < 0, 4, lists), 1.0)[..., :4]
    assert order.block_grid == (2, 2) and torch.equal(seen, want)


def test_more_gamma_is_closer_to_dense() -> None:
    query, key, value = drawn(256)
    errors = [
        (
            Proxy(num_proxies=4, gamma=gamma, block_size=16, min_tokens=0).attend(query, key, value)
            - dense(query, key, value)
        )
        .square()
        .mean()
        .item()
        for gamma in (0.3, 0.6, 0.9, 1.0)
    ]
    assert errors == sorted(errors, reverse=True) and errors[-1] < 1e-20 < 1e-4 < errors[-2]


@pytest.mark.parametrize("tokens", [(40, 18), (18, 40), (30, 2)])
def test_other_keys_than_queries(tokens: tuple[int, int]) -> None:
    """As in attention with reduced keys: both are sequences; gamma = 1 is dense, and a share is not."""
    query, key, value = drawn(tokens[0], keys=tokens[1])
    for prefix in (0, 2):
        found = Proxy(gamma=1.0, block_size=4).attend(query, key, value, num_prefix_tokens=prefix)
        torch.testing.assert_close(found, dense(query, key, value))
    few = Proxy(gamma=0.2, block_size=4, min_tokens=0).attend(query, key, value)
    assert torch.isfinite(few).all() and (tokens[1] == 2 or not torch.allclose(few, dense(query, key, value)))


@pytest.mark.parametrize("causal", [False, True])
def test_only_prefix_tokens_and_other_ranks(causal: bool) -> None:
    query, key, value = drawn(5)
    found = Proxy(gamma=0.2).attend(query, key, value, num_prefix_tokens=5, is_causal=causal)
    torch.testing.assert_close(found, dense(query, key, value, causal=causal))
    query, key, value = drawn(24)
    wide = [t.unflatten(0, (1, 2)).expand(3, -1, -1, -1, -1) for t in (query, key, value)]
    mask = torch.rand(3, 2, 1, 1, 24) > 0.2
    mechanism = Proxy(gamma=0.5, block_size=4, min_tokens=0)
    found = mechanism.attend(*wide, attn_mask=mask, is_causal=causal, grid_size=(2, 3, 4))
    assert found.shape == (3, 2, 4, 24, 8)
    one = mechanism.attend(query, key, value, attn_mask=mask[1], is_causal=causal, grid_size=(2, 3, 4))
    torch.testing.assert_close(found[1], one)
    single = mechanism.attend(*(t[0] for t in (query, key, value)), is_causal=causal)
    torch.testing.assert_close(single, mechanism.attend(*(t[:1] for t in (query, key, value)), is_causal=causal)[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_causal_half_types(dtype: torch.dtype) -> None:
    """The own block's weight goes through the value's dtype: no more than twice what eager attention loses in it."""
    query, key, value = (t.to(dtype) for t in drawn(100))
    found = Proxy(gamma=1.0, block_size=16).attend(query, key, value, is_causal=True)
    exact = dense(query.double(), key.double(), value.double(), causal=True)
    later = torch.ones(100, 100, dtype=torch.bool).triu(1)
    eager = (query @ key.mT * 8**-0.5).masked_fill(later, -math.inf).softmax(dim=-1) @ value
    assert found.dtype == dtype
    error, budget = ((t.double() - exact).abs().max() for t in (found, eager))
    assert error <= 2 * budget


def test_causal_dropout_keeps_the_mean_and_drops_key_by_key() -> None:
    torch.manual_seed(0)
    query, key, value = (t[:1, :1].float() for t in drawn(12))
    mechanism = Proxy(gamma=1.0, block_size=4)
    wide = [t.expand(6000, -1, -1, -1) for t in (query, key, value)]
    mean = mechanism.attend(*wide, is_causal=True, dropout_p=0.3).mean(dim=0, keepdim=True)
    torch.testing.assert_close(mean, dense(query, key, value, causal=True), rtol=0.1, atol=0.1)
    eye = torch.eye(12).expand(6000, 1, 12, 12)
    dropped = mechanism.attend(wide[0], wide[1], eye, is_causal=True, dropout_p=0.3)[:, 0, -1] == 0
    together = (dropped[:, -1] & dropped[:, -2]).float().mean()  # two keys of the own block
    assert abs(together - 0.09) < 0.02 and abs(dropped[:, 0].float().mean() - 0.3) < 0.03


def test_grid_is_inferred_and_sequences_are_taken() -> None:
    query, key, value = drawn(1 + 64)
    mechanism = Proxy(gamma=0.4, block_size=16, min_tokens=0)
    square = mechanism.attend(query, key, value, grid_size=(8, 8), num_prefix_tokens=1)
    assert torch.equal(mechanism.attend(query, key, value, num_prefix_tokens=1), square)
    line = mechanism.attend(query, key, value, grid_size=(64,), num_prefix_tokens=1)
    assert not torch.allclose(line, square)
    assert mechanism.attend(*drawn(65)).shape == (2, 4, 65, 8)  # no square: a sequence


def test_dense_weights_serve() -> None:
    torch.manual_seed(0)
    plain = DenseAttention(DIM, HEADS, num_prefix_tokens=1).double().eval()
    x = torch.randn(2, 1 + 36, DIM).double()
    for gamma, same in ((1.0, True), (0.3, False)):
        ours = ProxyAttention(DIM, HEADS, gamma=gamma, block_size=9, min_tokens=0, num_prefix_tokens=1).double().eval()
        ours.load_state_dict(plain.state_dict())
        assert torch.allclose(ours(x), plain(x)) == same
        assert torch.allclose(ours(x, is_causal=True), plain(x, is_causal=True)) == same


def test_text_form() -> None:
    text = "proxy(num_proxies=4, gamma=0.9, block_size=128, stride=2, min_tokens=2048, budget='block')"
    mechanism = parse_mechanism(text)
    assert str(mechanism) == text
    mixer = mechanism.attn_layer()(DIM, HEADS)
    assert isinstance(mixer, ProxyAttention) and mixer.mechanism == mechanism and "gamma=0.9" in repr(mixer)


def test_arranging_is_differentiable_and_opaque() -> None:
    order = _tiles((5, 7), 9)
    x = torch.randn(2, 3, 35, 4, dtype=torch.float64, requires_grad=True)
    blocks = to_blocks(x, order)
    assert torch.equal(blocks, order.arrange(x)) and torch.equal(from_blocks(blocks, order), x)
    assert torch.autograd.gradcheck(lambda t: from_blocks(to_blocks(t, order).square(), order), x[:1, :1])
    for op, t in (("to_blocks", x), ("from_blocks", blocks.detach().requires_grad_())):
        torch.library.opcheck(getattr(torch.ops.regard, op).default, (t, [5, 7], [3, 3], [0, 0]))
    line = _tiles((9,), 9)  # one block of one axis: nothing moves, but an operator hands nothing back
    assert to_blocks(x[:, :, :9].detach(), line).data_ptr() != x.data_ptr()


def test_the_lists_are_as_long_as_the_longest() -> None:
    """What is left out costs nothing: no list has more places than its longest fills."""
    seen = []

    def spy(*args, **kwargs):
        seen.append(kwargs["blocks"])
        return routed_attention(*args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("regard.mixers.proxy.routed_attention", spy)
        Proxy(gamma=0.3, block_size=16, min_tokens=0).attend(*drawn(256))
    (blocks,) = seen
    assert blocks.shape[-1] == (blocks >= 0).sum(dim=-1).max() < 16


@pytest.mark.parametrize(
    ("options", "error", "said"),
    [
        ({"block_size": 0}, ValueError, "block_size"),
        ({"block_size": 8.0}, TypeError, "block_size"),
        ({"min_tokens": -1}, ValueError, "min_tokens"),
        ({"num_proxies": 0}, ValueError, "num_proxies"),
        ({"stride": 0}, ValueError, "stride"),
        ({"gamma": 2.0}, ValueError, "gamma"),
        ({"budget": "layer"}, ValueError, "budget"),
    ],
)
def test_bad_options(options, error, said) -> None:
    with pytest.raises(error, match=said):
        Proxy(**options)
    with pytest.raises(error, match=said):
        ProxyAttention(DIM, HEADS, **options)


def test_bad_calls() -> None:
    query, key, value = drawn(16)
    with pytest.raises(ValueError, match="num_prefix_tokens: 17 of 16 queries and 16 keys"):
        Proxy().attend(query, key, value, num_prefix_tokens=17)
    with pytest.raises(ValueError, match="is_causal: 16 queries and 12 keys"):
        Proxy().attend(query, key[:, :, :12], value[:, :, :12], is_causal=True)
    with pytest.raises(ValueError, match="attn_mask: .* may differ between queries"):
        Proxy().attend(query, key, value, attn_mask=torch.ones(16, 16, dtype=torch.bool).tril())
    with pytest.raises(TypeError, match="attn_mask: expected a boolean"):
        Proxy().attend(query, key, value, attn_mask=torch.zeros(16))
    with pytest.raises(TypeError, match="scale"):
        Proxy().attend(query, key, value, scale="1")
