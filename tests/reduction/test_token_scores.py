"""Scores: rows and column means of the softmax that the attention module itself computes."""

import pytest
import torch
from timm.layers import Attention
from timm.models.eva import EvaAttention
from torch import nn

import regard
from regard.reduction import scores
from regard.reduction.scores import class_scores, mean_scores, unreadable


def dense_map(attn, x):
    """(B, N, N): the module's own softmax, mean over heads, read off its unfused path."""
    seen = []
    attn.fused_attn = False
    attn.attn_drop = Spy(seen)
    attn(x)
    return seen[0].mean(dim=1)


class Spy(nn.Module):
    def __init__(self, seen):
        super().__init__()
        self.seen, self.p = seen, 0.0

    def forward(self, weights):
        self.seen.append(weights)
        return weights


def perturbed(attn):
    torch.manual_seed(0)
    for parameter in attn.parameters():
        nn.init.normal_(parameter, std=0.5)
    return attn.double().eval()


MODULES = {
    "timm": lambda: Attention(24, 3, qkv_bias=True),
    "no bias": lambda: Attention(24, 3, attn_head_dim=6),
    "normed": lambda: Attention(24, 3, qkv_bias=True, qk_norm=True, norm_layer=nn.LayerNorm),
    "EVA": lambda: EvaAttention(24, 3, norm_layer=nn.LayerNorm),
    "EVA, apart": lambda: EvaAttention(24, 3, qkv_fused=False, norm_layer=nn.LayerNorm),
}


@pytest.mark.parametrize("kind", MODULES)
def test_scores_are_those_of_the_attention_map(kind):
    attn, x = perturbed(MODULES[kind]()), torch.randn(2, 11, 24, dtype=torch.float64)
    assert unreadable(attn) is None
    expected = dense_map(attn, x)
    torch.testing.assert_close(class_scores(attn, x), expected[:, 0])
    torch.testing.assert_close(mean_scores(attn, x), expected.mean(dim=1))


def test_scores_of_a_mixer_are_those_of_its_dense_weights():
    mixer, x = perturbed(regard.DenseAttention(24, 3, qkv_bias=True)), torch.randn(2, 11, 24, dtype=torch.float64)
    torch.testing.assert_close(class_scores(mixer, x), mixer.attention_weights(x).mean(dim=1)[:, 0])


@pytest.mark.parametrize("score", [class_scores, mean_scores])
def test_scores_have_the_gradient_of_the_attention_map(score):
    attn, x = perturbed(MODULES["timm"]()), torch.randn(2, 7, 24, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(2, 7, dtype=torch.float64)
    found = torch.autograd.grad((score(attn, x) * weight).sum(), [x, attn.qkv.weight])
    whole = dense_map(attn, x)
    row = whole[:, 0] if score is class_scores else whole.mean(dim=1)
    for ours, expected in zip(found, torch.autograd.grad((row * weight).sum(), [x, attn.qkv.weight]), strict=True):
        torch.testing.assert_close(ours, expected)


def test_mean_scores_some_rows_at_a_time(monkeypatch):
    attn, x = perturbed(MODULES["timm"]()), torch.randn(2, 11, 24, dtype=torch.float64, requires_grad=True)
    whole = mean_scores(attn, x)
    expected = torch.autograd.grad(whole.square().sum(), x)
    monkeypatch.setattr(scores, "_ROWS", 4)
    found = mean_scores(attn, x)
    torch.testing.assert_close(found, whole)
    torch.testing.assert_close(torch.autograd.grad(found.square().sum(), x), expected)


@pytest.mark.parametrize("score", [class_scores, mean_scores])
def test_half_types_are_scored_in_float32(score):
    attn, x = perturbed(MODULES["timm"]()).bfloat16(), torch.randn(2, 7, 24, dtype=torch.bfloat16)
    found = score(attn, x)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.sum(dim=1), torch.ones(2))


def test_what_cannot_be_read_is_told():
    assert "num_heads" in unreadable(nn.Linear(3, 3))
    attn = Attention(24, 3)
    attn.qkv = nn.Sequential(attn.qkv)
    assert "plain torch.nn.Linear" in unreadable(attn)
    attn.qkv = nn.Linear(24, 48)
    assert "3 heads of 8 channels" in unreadable(attn)
