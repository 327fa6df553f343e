"""ADL as a modifier: every mixer reports the loss of its own weights, with any mechanism."""

import copy
import pickle

import pytest
import timm
import torch
from torch import nn

from regard.losses import ADL, attention_diversification, collect_losses
from regard.mixers import Dense, mechanisms, parse_mechanism

DIM, HEADS = 24, 3
MECHANISMS = [*mechanisms(), "knn(topk=3)"]


def mixer_of(mechanism):
    torch.manual_seed(0)
    mixer = parse_mechanism(mechanism).attn_layer()(DIM, HEADS, qkv_bias=True, qk_norm=True, norm_layer=nn.LayerNorm)
    return mixer.double().eval()


def vit(mechanism="dense"):
    torch.manual_seed(0)
    size = {"img_size": 32, "patch_size": 8, "embed_dim": DIM, "depth": 2, "num_heads": HEADS, "num_classes": 5}
    made = parse_mechanism(mechanism)
    model = timm.models.VisionTransformer(**size, attn_layer=made.attn_layer(num_prefix_tokens=1))
    made.apply(model)
    return model


def reported(model, *args, **options):
    with collect_losses(model) as losses:
        model(*args, **options)
    return losses


@pytest.mark.parametrize("mechanism", MECHANISMS)
def test_reports_the_loss_of_the_mixers_own_weights(mechanism):
    """In blocks of rows or from the maps: the same, and with the same gradients."""
    mixer, x = mixer_of(mechanism), 2 * torch.randn(2, 36, DIM, dtype=torch.float64)
    ADL(weight=0.5, threshold=1.0).apply(mixer)
    losses = reported(mixer, x)
    expected = attention_diversification(mixer.attention_weights(x), 1.0)
    (found,) = losses.by_name["adl"]
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
    assert losses.weights["adl"] == 0.5
    ours, theirs = (torch.autograd.grad(loss, mixer.qkv.weight)[0] for loss in (found, expected))
    torch.testing.assert_close(ours, theirs, rtol=1e-7, atol=1e-12)
    assert theirs.abs().max() > 1e-6


@pytest.mark.parametrize("mechanism", ["dense", "knn", "neighborhood(kernel_size=3)"])
def test_masks_and_grids_reach_it(mechanism):
    mixer, x = mixer_of(mechanism), torch.randn(2, 35, DIM, dtype=torch.float64)
    ADL(threshold=1.0).apply(mixer)
    options = {"attn_mask": torch.rand(2, 1, 35, 35) > 0.3, "is_causal": True, "grid_size": (5, 7)}
    options["attn_mask"] |= torch.eye(35, dtype=torch.bool)
    if mechanism.startswith("neighborhood"):
        del options["attn_mask"], options["is_causal"]
    (found,) = reported(mixer, x, **options).by_name["adl"]
    expected = attention_diversification(mixer.attention_weights(x, **options), 1.0)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    "mechanism", ["adl(threshold=0.5)", "knn + adl(threshold=0.5)", "clustered(reduction=2) + tap + adl(threshold=0.5)"]
)
def test_a_model_trains_with_it(mechanism):
    model, x = vit(mechanism), torch.randn(2, 3, 32, 32)
    losses = reported(model, x)
    assert len(losses.by_name["adl"]) == 2
    losses.total().backward()
    assert all(block.attn.qkv.weight.grad.abs().sum() > 0 for block in model.blocks)


def test_descending_it_makes_rows_differ():
    model, x = vit("adl(threshold=0.5)"), torch.randn(4, 3, 32, 32)
    optimizer = torch.optim.SGD(model.parameters(), lr=5.0)
    values = []
    for _ in range(5):
        total = reported(model, x).total()
        optimizer.zero_grad()
        total.backward()
        optimizer.step()
        values.append(total.item())
    assert values[-1] < values[0]


def test_nothing_happens_unless_somebody_collects(monkeypatch):
    plain, model, x = vit(), vit("adl"), torch.randn(2, 3, 32, 32)

    def never(*args, **options):
        raise AssertionError("computed without being asked for")

    monkeypatch.setattr("regard.losses.adl.attention_diversification_of", never)
    assert set(model.state_dict()) == set(plain.state_dict())
    torch.testing.assert_close(model(x), plain(x), rtol=0, atol=0)
    with pytest.raises(AssertionError, match="computed without"):
        reported(model, x)


def test_copies_and_pickles_report_too():
    model, x = vit("adl(threshold=0.5)").eval(), torch.randn(2, 3, 32, 32)
    expected = reported(model, x).total()
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        torch.testing.assert_close(reported(twin, x).total(), expected, rtol=0, atol=0)


def test_checkpointed_activations_give_the_same_gradients():
    grads = []
    for checkpointed in (False, True):
        model, x = vit("adl(threshold=0.5)"), torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))
        model.set_grad_checkpointing(checkpointed)
        with collect_losses(model) as losses:
            (model(x).square().mean() + losses.total()).backward()
        grads.append([p.grad for p in model.parameters()])
    torch.testing.assert_close(*grads)


def test_models_and_options_that_it_refuses():
    with pytest.raises(ValueError, match="model: Linear has no attention mixer of regard"):
        ADL().apply(nn.Linear(2, 2))
    model = vit("adl")
    with pytest.raises(ValueError, match="reports the attention diversification loss already"):
        ADL().apply(model)
    with pytest.raises(ValueError, match="weight: expected at least 0, got -1"):
        ADL(weight=-1)
    with pytest.raises(TypeError, match="threshold: expected a number, got str"):
        ADL(threshold="2")


def test_text_form():
    assert parse_mechanism("adl(weight=0.5)") == Dense() + ADL(weight=0.5)
    assert str(parse_mechanism("knn + adl")) == "knn(topk=0.5) + adl(weight=1.0, threshold=2.0)"
