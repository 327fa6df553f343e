"""ClusteredAttention: its identities beside dense attention, prefix tokens, masks, its training-free form."""

import pytest
import torch
from torch import nn

from regard import Clustered, ClusteredAttention, DenseAttention, density_peak_clusters, merge_tokens
from regard.inspection import attention_maps

DIM, HEADS, TOKENS = 48, 3, 36


def make(reduction=2, **options):
    torch.manual_seed(0)
    return ClusteredAttention(DIM, HEADS, reduction=reduction, qkv_bias=True, **options).double().eval()


def dense_like(mixer):
    dense = DenseAttention(DIM, HEADS, qkv_bias=True).double().eval()
    names = dense.state_dict().keys()
    dense.load_state_dict({name: weight for name, weight in mixer.state_dict().items() if name in names})
    return dense


def tokens(count=TOKENS, batch=2, seed=1):
    return torch.randn(batch, count, DIM, generator=torch.Generator().manual_seed(seed)).double()


def by_hand(mixer, x):
    """The published module on its own projections, from the operators."""
    batch, count, _ = x.shape
    query, key, value = mixer.qkv.weight.chunk(3)
    query_bias, key_bias, value_bias = mixer.qkv.bias.chunk(3)
    coarse = max(1, count // mixer.reduction**2)
    found = density_peak_clusters(x, (coarse, min(4 * coarse, count)))
    weights, mixed = mixer.score(x).exp(), 0
    split = lambda t: t.unflatten(-1, (HEADS, -1)).transpose(1, 2)  # noqa: E731
    q = split(x @ query.T + query_bias)
    for one, projection in zip(found, ("coarse", "fine"), strict=True):
        merged = merge_tokens(x, one.assignment, weights, num_clusters=one.centers.shape[1])
        if projection == "coarse":
            k, v = map(split, mixer.kv_coarse(merged).chunk(2, dim=-1))
        else:
            k, v = split(merged @ key.T + key_bias), split(merged @ value.T + value_bias)
        mixed = mixed + (q @ k.mT / 4).softmax(-1) @ v
    return mixer.proj(mixed.transpose(1, 2).flatten(2))


@pytest.mark.parametrize("reduction", [2, 3, 4, 7])
def test_is_the_published_module(reduction):
    mixer, x = make(reduction), tokens()
    torch.testing.assert_close(mixer(x), by_hand(mixer, x))


def test_reduction_one_is_dense():
    mixer, x = make(reduction=1), tokens()
    dense = dense_like(mixer)
    assert mixer.state_dict().keys() == dense.state_dict().keys()
    torch.testing.assert_close(mixer(x), dense(x), rtol=0, atol=0)
    mask = torch.arange(TOKENS) % 3 > 0
    torch.testing.assert_close(mixer(x, attn_mask=mask), dense(x, attn_mask=mask[None]))
    torch.testing.assert_close(mixer.attention_weights(x, mask), dense.attention_weights(x, mask[None]))
    query, key, value = torch.randn(3, 2, HEADS, TOKENS, 16).double()
    torch.testing.assert_close(
        Clustered(1).attend(query, key, value, scale=0.3),
        nn.functional.scaled_dot_product_attention(query, key, value, scale=0.3),
    )


def test_as_many_clusters_as_tokens_is_dense():
    """36 tokens at reduction 2: 36 clusters at the fine scale. Without the coarse one it is dense, but for the 1e-6."""
    mixer, x = make(reduction=2), tokens()
    with torch.no_grad():
        mixer.kv_coarse.weight[DIM:] = 0  # its values are then 0
        mixer.kv_coarse.bias[DIM:] = 0
        mixer.score.weight.zero_()
        mixer.score.bias.fill_(30.0)  # beside which 1e-6 is nothing
    torch.testing.assert_close(mixer(x), dense_like(mixer)(x))


def test_equal_scales_give_twice_one():
    """Tokens alike in groups of nine: both scales merge to the same four vectors, some of them repeated alike."""
    mixer = make(reduction=3)
    x = tokens(4).repeat_interleave(9, dim=1)
    with torch.no_grad():
        mixer.kv_coarse.weight.copy_(mixer.qkv.weight[DIM:])
        mixer.kv_coarse.bias.copy_(mixer.qkv.bias[DIM:])
        mixer.score.bias.fill_(30.0)
    coarse, fine = density_peak_clusters(x, (4, 16))
    assert sorted(coarse.assignment[0].bincount().tolist()) == [9] * 4
    weights = mixer.attention_weights(x)
    values = (x @ mixer.qkv.weight[2 * DIM :].T + mixer.qkv.bias[2 * DIM :]).unflatten(-1, (HEADS, -1)).transpose(1, 2)
    mixed = 2 * (weights @ values).transpose(1, 2).flatten(2)
    torch.testing.assert_close(mixer(x), mixer.proj(mixed))


def test_scores_do_not_matter_where_tokens_are_alike():
    mixer = make(reduction=3)
    x = tokens(4).repeat_interleave(9, dim=1)
    before = mixer(x)
    with torch.no_grad():
        mixer.score.bias.fill_(5.0)
    torch.testing.assert_close(mixer(x), before, atol=1e-5, rtol=0)


def test_scores_matter_otherwise():
    mixer, x = make(), tokens()
    before = mixer(x)
    with torch.no_grad():
        mixer.score.weight.mul_(3.0)
    assert not torch.allclose(mixer(x), before)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_large_scores_do_not_overflow(dtype):
    mixer, x = make().to(dtype), tokens().to(dtype)
    with torch.no_grad():
        mixer.score.bias.fill_(200.0)
    assert torch.isfinite(mixer(x)).all()


def test_prefix_tokens_are_keys_of_their_own():
    """What a prefix token holds reaches every query, and it never changes the clusters."""
    mixer, x = make(num_prefix_tokens=2), tokens(TOKENS + 2)
    weights = mixer.attention_weights(x)
    other = x.clone()
    other[:, 0] += 1.0
    assert (mixer(other) - mixer(x)).abs().amin(dim=1).max() > 0
    # A prefix key is not merged with any: its weight is its own softmax weight at each scale.
    query = mixer._query(x)
    parts = []
    for scale in mixer._scales(x, None):
        key, _ = mixer._key_value(scale.merge(x), scale.coarse)
        assert torch.equal(scale.merge(x)[:, :2], x[:, :2])
        parts.append((query @ key.mT / 4).softmax(-1)[..., :2])
    torch.testing.assert_close(weights[..., :2], (parts[0] + parts[1]) / 2)


@pytest.mark.parametrize("count", [1, 2, 3])
def test_few_tokens_and_prefix_tokens_alone(count):
    for prefix in range(count + 1):
        mixer = make(num_prefix_tokens=prefix)
        y = mixer(tokens(count), grid_size=(count - prefix,))
        assert y.shape == (2, count, DIM) and torch.isfinite(y).all()


def test_masks_that_differ_between_images():
    mixer, x = make(num_prefix_tokens=1), tokens(TOKENS + 1)
    mask = torch.rand(2, 1, 1, TOKENS + 1, generator=torch.Generator().manual_seed(2)) > 0.5
    other = torch.where(mask[:, 0, 0, :, None], x, torch.full_like(x, torch.nan))
    other[:, 0] = x[:, 0] + torch.where(mask[:, 0, 0, :1], 0.0, 7.0)  # NaN in a hidden key of its own: NaN, as in SDPA
    for images in (slice(None), slice(1, 2)):
        got = mixer(x[images], attn_mask=mask[images])[mask[images][:, 0, 0]]
        torch.testing.assert_close(got, mixer(other[images], attn_mask=mask[images])[mask[images][:, 0, 0]])
    weights = mixer.attention_weights(x, mask)
    assert (weights.masked_select(~mask) == 0).all()
    torch.testing.assert_close(weights.sum(-1), torch.ones_like(weights[..., 0]), atol=1e-5, rtol=0)


def test_all_tokens_hidden_give_zeros():
    mixer, x = make(), tokens()
    nothing = torch.zeros(TOKENS, dtype=torch.bool)
    torch.testing.assert_close(mixer(x, attn_mask=nothing), mixer.proj.bias.expand(2, TOKENS, DIM))
    query, key, value = torch.randn(3, 2, HEADS, TOKENS, 16)
    assert (Clustered(2).attend(query, key, value, attn_mask=nothing) == 0).all()


@pytest.mark.parametrize(
    ("mask", "error", "said"),
    [
        (torch.ones(TOKENS, TOKENS, dtype=torch.bool), ValueError, "attn_mask: .* may differ between queries"),
        (torch.ones(2, HEADS, 1, TOKENS, dtype=torch.bool), ValueError, "attn_mask: .* may differ between heads"),
        (torch.zeros(TOKENS), TypeError, "attn_mask: expected a boolean tensor .* got torch.float32"),
        (torch.ones(7, dtype=torch.bool), ValueError, r"attn_mask: shape \(7,\) does not broadcast"),
    ],
)
@pytest.mark.parametrize("reduction", [1, 2])
def test_masks_that_are_refused(mask, error, said, reduction):
    x = tokens()
    query = x.unflatten(-1, (HEADS, -1)).transpose(1, 2)
    with pytest.raises(error, match=said):
        make(reduction)(x, attn_mask=mask)
    with pytest.raises(error, match=said):
        Clustered(reduction).attend(query, query, query, attn_mask=mask)
    with pytest.raises(ValueError, match="is_causal"):
        Clustered(reduction).attend(query, query, query, is_causal=True)


def test_training_free_form_of_any_layout():
    """Leading dimensions, fewer key heads, prefix keys, more keys than queries, another value width."""
    g = torch.Generator().manual_seed(0)
    query, key, value = (
        torch.randn(2, 3, heads, count, dim, generator=g).double()
        for heads, count, dim in ((4, 5, 8), (2, 36, 8), (2, 36, 6))
    )
    options = {"enable_gqa": True, "num_prefix_tokens": 4}
    found = Clustered(2).attend(query, key, value, **options)
    assert found.shape == (2, 3, 4, 5, 6)
    wide_key, wide_value = (t.repeat_interleave(2, dim=-3) for t in (key, value))
    torch.testing.assert_close(found, Clustered(2).attend(query, wide_key, wide_value, num_prefix_tokens=4))
    one = Clustered(2).attend(query[1, 2], key[1, 2], value[1, 2], **options)
    torch.testing.assert_close(found[1, 2], one)
    identity = torch.eye(36).double().expand(2, 3, 2, 36, 36)
    weights = Clustered(2).attend(query, key, identity, **options)
    torch.testing.assert_close(weights.sum(-1), torch.ones(2, 3, 4, 5).double())
    with pytest.raises(ValueError, match="num_prefix_tokens: 37 of 36 keys"):
        Clustered(2).attend(query, key, value, enable_gqa=True, num_prefix_tokens=37)


def test_training_free_form_is_dense_where_keys_repeat():
    """Equal keys within each cluster, equally many, and any values: the mean value is what dense attention gives."""
    g = torch.Generator().manual_seed(0)
    key = torch.randn(1, HEADS, 4, 8, generator=g).double().repeat_interleave(9, dim=2)
    query, value = torch.randn(2, 1, HEADS, 36, 8, generator=g).double()
    merged = Clustered(3).attend(query, key, value)
    joined = key.transpose(1, 2).flatten(2)
    coarse, fine = density_peak_clusters(joined, (4, 16))
    assert sorted(coarse.assignment[0].bincount().tolist()) == [9] * 4
    # The fine scale splits the same groups unequally, which weighs them anew; so the coarse one is looked at alone.
    sizes = torch.zeros(16).index_add(0, fine.assignment[0], torch.ones(36))
    logits = (query @ key[:, :, fine.centers[0]].mT) / 8**0.5
    means = merge_tokens(value.transpose(1, 2).flatten(2), fine.assignment, num_clusters=16)
    means = means * (1 + 1e-6 / sizes[:, None])
    fine_output = logits.softmax(-1) @ means.unflatten(-1, (HEADS, -1)).transpose(1, 2)
    dense = nn.functional.scaled_dot_product_attention(query, key, value)
    torch.testing.assert_close(2 * merged - fine_output, dense)


@pytest.mark.parametrize(
    ("reduction", "error"), [(0, ValueError), (-2, ValueError), (2.0, TypeError), (True, TypeError), ("2", TypeError)]
)
def test_bad_reduction(reduction, error):
    for make_one in (Clustered, lambda r: ClusteredAttention(DIM, HEADS, reduction=r)):
        with pytest.raises(error, match="reduction"):
            make_one(reduction)


def test_maps_of_a_model_with_it():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.attn = make(3)

        def forward(self, x):
            return self.attn(x, attn_mask=torch.arange(TOKENS) != 5)

    maps = attention_maps(Model(), tokens())
    assert maps.shape == (2, HEADS, TOKENS, TOKENS) and (maps[..., 5] == 0).all() and (maps >= 0).all()
    torch.testing.assert_close(maps.sum(-1), torch.ones(2, HEADS, TOKENS).double(), atol=1e-5, rtol=0)


def test_repr_tells_the_reduction():
    assert "reduction=3" in repr(make(3))
