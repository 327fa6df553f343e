"""Gated attention: a gate on every mixer, timm's and the paper's meaning."""

import pytest
import torch
from timm.layers import Attention
from torch import nn

from regard.mixers import KNN, DenseAttention, Gated, mechanisms, parse_mechanism

DIM, HEADS = 24, 3
KINDS = ("elementwise", "headwise")
MIXERS = list(mechanisms())


def make(name, kind, **options):
    mixer = parse_mechanism(name).attn_layer(gated=kind, **options)(DIM, HEADS, qkv_bias=True).double().eval()
    plain = parse_mechanism(name).attn_layer(**options)(DIM, HEADS, qkv_bias=True).double().eval()
    plain.load_state_dict({name: value for name, value in mixer.state_dict().items() if not name.startswith("gate.")})
    return mixer, plain


def tokens():
    return torch.randn(2, 16, DIM, dtype=torch.float64)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", MIXERS)
def test_open_half_open_and_shut(name, kind):
    mixer, plain = make(name, kind)
    x = tokens()
    with torch.no_grad():
        mixer.gate.weight.zero_()
        mixer.gate.bias.fill_(60.0)
        torch.testing.assert_close(mixer(x), plain(x))
        mixer.gate.bias.zero_()
        torch.testing.assert_close(mixer(x) - mixer.proj.bias, 0.5 * (plain(x) - plain.proj.bias))
        mixer.gate.bias.fill_(-800.0)
        torch.testing.assert_close(mixer(x), mixer.proj.bias.expand(2, 16, DIM))


@pytest.mark.parametrize("name", MIXERS)
def test_tied_elementwise_gates_are_headwise_ones(name):
    (by_head, _), (by_element, _) = make(name, "headwise"), make(name, "elementwise")
    state = by_head.state_dict()
    for part in ("gate.weight", "gate.bias"):
        state[part] = state[part].repeat_interleave(DIM // HEADS, dim=0)
    by_element.load_state_dict(state)
    x = tokens()
    torch.testing.assert_close(by_element(x), by_head(x))


@pytest.mark.parametrize("gated", [True, "elementwise"])
def test_elementwise_is_timms(gated):
    options = {"num_heads": HEADS, "scale_norm": True, "norm_layer": nn.LayerNorm}
    ours, timms = DenseAttention(DIM, gated=gated, **options).double(), Attention(DIM, gated=True, **options).double()
    ours.load_state_dict(timms.state_dict())
    x = tokens()
    torch.testing.assert_close(ours(x), timms(x), rtol=0, atol=1e-14)


def test_elementwise_is_qwen3_nexts():
    """transformers' attention with the authors' gate: no norms (they compute in float32), and nothing rotated."""
    modeling = pytest.importorskip("transformers.models.qwen3_next.modeling_qwen3_next")
    config = modeling.Qwen3NextConfig(
        hidden_size=DIM, num_attention_heads=HEADS, num_key_value_heads=HEADS, head_dim=8, attention_bias=True
    )
    config._attn_implementation = "sdpa"
    theirs = modeling.Qwen3NextAttention(config, layer_idx=0).double().eval()
    theirs.q_norm, theirs.k_norm = nn.Identity(), nn.Identity()
    ours = DenseAttention(DIM, HEADS, qkv_bias=True, gated=True).double().eval()
    state = {"proj.weight": theirs.o_proj.weight, "proj.bias": theirs.o_proj.bias}
    for part in ("weight", "bias"):
        query, gate = getattr(theirs.q_proj, part).unflatten(0, (HEADS, 2, 8)).unbind(1)
        key, value = getattr(theirs.k_proj, part), getattr(theirs.v_proj, part)
        state[f"qkv.{part}"] = torch.cat([query.flatten(0, 1), key, value])
        state[f"gate.{part}"] = gate.flatten(0, 1)
    ours.load_state_dict(state)
    x = tokens()
    cos, sin = torch.ones(2, 2, 16, 8, dtype=torch.float64) * torch.tensor([1.0, 0.0]).double().view(2, 1, 1, 1)
    with torch.no_grad():
        expected = theirs(x, position_embeddings=(cos, sin), attention_mask=torch.zeros(2, 1, 16, 16).double())[0]
        torch.testing.assert_close(ours(x), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("kind", KINDS)
def test_the_modifier_builds_gated_mixers(kind):
    mixer = (KNN(topk=3) + Gated(kind)).attn_layer()(DIM, HEADS)
    assert mixer.topk == 3
    assert mixer.gate.out_features == (DIM if kind == "elementwise" else HEADS)


def test_bad_kinds():
    with pytest.raises(ValueError, match="kind: expected one of elementwise, headwise, got 'rowwise'"):
        Gated("rowwise")
    with pytest.raises(ValueError, match="gated: expected a bool or one of elementwise, headwise, got 'both'"):
        DenseAttention(DIM, HEADS, gated="both")
    with pytest.raises(TypeError, match="gated: expected a bool or one of .*, got int"):
        DenseAttention(DIM, HEADS, gated=2)
