"""The base of the mixers: agreement with timm's Attention, the grid, bound classes."""

import pickle

import pytest
import torch
from timm.layers import Attention
from torch import nn

from regard.mixers import AttentionMixer, ClusteredAttention, DenseAttention, KNNAttention
from regard.mixers._attention import resolve_grid

DIM, HEADS = 48, 3


def pair(**options):
    torch.manual_seed(0)
    timms = Attention(DIM, num_heads=HEADS, **options).eval()
    ours = DenseAttention(DIM, num_heads=HEADS, **options).eval()
    ours.load_state_dict(timms.state_dict())
    return ours, timms


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"qkv_bias": True, "proj_bias": False},
        {"attn_head_dim": 8, "dim_out": 40},
        {"qk_norm": True, "norm_layer": nn.LayerNorm},
        {"scale_norm": True, "norm_layer": nn.RMSNorm},
        {"gated": True, "qkv_bias": True},
        {"gated": True, "scale_norm": True, "qk_norm": True, "norm_layer": nn.LayerNorm, "qkv_bias": True},
    ],
)
def test_dense_equals_timms_attention_bit_for_bit(options):
    ours, timms = pair(**options)
    x, mask, bias = torch.randn(2, 20, DIM), torch.rand(20, 20) > 0.3, torch.randn(2, 1, 20, 20)
    mask |= torch.eye(20, dtype=torch.bool)
    for given in ({}, {"attn_mask": mask}, {"attn_mask": bias}, {"is_causal": True}):
        torch.testing.assert_close(ours(x, **given), timms(x, **given), rtol=0, atol=0)


def test_dropout_draws_as_timms():
    ours, timms = pair(attn_drop=0.3, proj_drop=0.2)
    ours.train(), timms.train()
    x, outputs = torch.randn(2, 20, DIM), []
    for module in (ours, timms):
        torch.manual_seed(3)
        outputs.append(module(x))
    torch.testing.assert_close(*outputs, rtol=0, atol=0)


def test_arguments_stand_in_timms_order():
    by_position = (DIM, HEADS, 8, 40, True, True, True, False, True, 0.1, 0.2, nn.LayerNorm)
    assert repr(DenseAttention(*by_position)).split("\n", 1)[1] == repr(Attention(*by_position)).split("\n", 1)[1]


@pytest.mark.parametrize(
    ("tokens", "prefix", "grid", "expected"),
    [
        (16, 0, None, (4, 4)),
        (17, 1, None, (4, 4)),
        (1, 1, None, (0, 0)),
        (221, 0, (13, 17), (13, 17)),
        (25, 1, [2, 3, 4], (2, 3, 4)),
        (7, 0, torch.Size([7]), (7,)),
    ],
)
def test_resolve_grid(tokens, prefix, grid, expected):
    assert resolve_grid(tokens, prefix, grid) == expected


def test_resolve_grid_refuses_what_makes_no_square():
    with pytest.raises(
        ValueError, match="grid_size: 15 tokens less 1 prefix tokens make no square grid; pass grid_size"
    ):
        resolve_grid(15, 1, None)
    with pytest.raises(ValueError, match="num_prefix_tokens: 3 prefix tokens, but x has only 2 tokens"):
        resolve_grid(2, 3, None)


class _Grid(AttentionMixer):
    """Remembers the grid that it was given."""

    needs_grid = True

    def attend(self, query, key, value, attn_mask, is_causal, grid_size):
        self.seen = grid_size
        return value


def test_mixers_that_need_a_grid_are_given_one():
    mixer = _Grid(DIM, HEADS, num_prefix_tokens=2)
    mixer(torch.randn(1, 11, DIM))
    assert mixer.seen == (3, 3)
    with pytest.raises(ValueError, match="grid_size"):
        mixer(torch.randn(1, 12, DIM))


def test_bound_classes():
    bound = KNNAttention.bind(topk=3)
    assert issubclass(bound, KNNAttention) and bound.__name__ == "KNNAttention(topk=3)"
    assert type(bound(DIM)) is KNNAttention and bound(DIM).topk == 3
    assert bound(DIM, topk=5).topk == 5, "as with functools.partial, later arguments win"
    twice = bound.bind(num_prefix_tokens=1).bind(topk=4)
    assert (twice(DIM).topk, twice(DIM).num_prefix_tokens) == (4, 1)
    assert pickle.loads(pickle.dumps(twice))(DIM).topk == 4


def test_subclass_of_a_bound_class_makes_its_own_instances():
    class Mine(KNNAttention.bind(topk=3)):
        pass

    assert type(Mine(DIM)) is Mine and Mine(DIM).topk == 3
    assert type(Mine.bind(topk=4)(DIM)) is Mine and Mine.bind(topk=4)(DIM).topk == 4


@pytest.mark.parametrize("mixer", [DenseAttention, ClusteredAttention.bind(reduction=2)])
def test_scale_is_the_logits_factor(mixer):
    """Another scale is the usual one with the queries' projection multiplied."""
    torch.manual_seed(0)
    plain = mixer(DIM, HEADS, qkv_bias=True).double()
    scaled = mixer(DIM, HEADS, qkv_bias=True, scale=0.03).double()
    scaled.load_state_dict(plain.state_dict())
    with torch.no_grad():
        for parameter in (plain.qkv.weight, plain.qkv.bias):
            parameter[:DIM] *= 0.03 * (DIM // HEADS) ** 0.5
    x = torch.randn(2, 16, DIM, dtype=torch.float64)
    torch.testing.assert_close(scaled(x), plain(x))
    torch.testing.assert_close(scaled.attention_weights(x), plain.attention_weights(x))


class EverySecond(nn.Module):
    """Queries from all tokens, keys from every second one, values from those doubled."""

    def forward(self, x, grid_size):
        self.grid_size = grid_size
        return x, x[:, ::2], 2 * x[:, ::2], None


@pytest.mark.parametrize("bias", [True, False])
def test_keys_can_be_projected_from_other_tokens(bias):
    torch.manual_seed(0)
    mixer = KNNAttention(DIM, HEADS, qkv_bias=bias, topk=3).double()
    x = torch.randn(2, 20, DIM, dtype=torch.float64)
    query, key, _ = mixer.heads(x)
    _, _, value = mixer.heads(2 * x)
    expected = mixer.attend(query, key[:, :, ::2], value[:, :, ::2], None, False, None)
    mixer.project_from(EverySecond())
    torch.testing.assert_close(mixer.mix(x, None, False, None), expected)
    weights = mixer.attention_weights(x, grid_size=(4, 5))
    assert mixer.sources.grid_size == (4, 5)
    assert weights.shape == (2, HEADS, 20, 10) and ((weights > 0).sum(-1) == 3).all()
    assert mixer(x).shape == x.shape


def test_mixers_that_make_their_own_keys_are_not_given_others():
    with pytest.raises(ValueError, match="attn_layer: ClusteredAttention makes its keys from the tokens themselves"):
        ClusteredAttention(DIM, HEADS).project_from(EverySecond())
