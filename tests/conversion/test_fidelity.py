"""Fidelity on hand-made features, whose figures can be worked out on paper, and on small models."""

import math

import pytest
import torch
from torch import nn

from regard.conversion import (
    FidelityMeter,
    compare_models,
    features_of,
    head_fidelity,
    measure_fidelity,
    patch_cosines,
    picture_fidelity,
    record_attention,
)
from regard.mixers import KNN
from regard.results import Fidelity, PictureFidelity, Spread


def batch(*rows):
    return torch.tensor([rows], dtype=torch.float32)


def test_equal_features_are_perfect():
    x = torch.randn(2, 5, 8)
    for one in picture_fidelity(x, x.clone(), num_prefix_tokens=1, dense_logits=x[:, 0], logits=x[:, 0]):
        figures = (one.cosine, one.centred_cosine, one.worst_cosine, one.worst_centred_cosine, one.prefix_cosine)
        assert figures == pytest.approx((1.0,) * 5)
        assert one.relative_l2 == 0.0
        assert one.same_top1 is True
        assert one.patches == 4


def test_the_figures_of_a_case_worked_out_by_hand():
    # Patches (3, 0) and (3, 2) with mean (3, 1); the other model keeps the first and turns the second to (3, 0).
    dense, other = batch([0.0, 1.0], [3.0, 0.0], [3.0, 2.0]), batch([1.0, 0.0], [3.0, 0.0], [3.0, 0.0])
    (one,) = picture_fidelity(dense, other, num_prefix_tokens=1)
    turned = 3 / math.sqrt(13)
    assert one.cosine == pytest.approx((1 + turned) / 2)
    # Centred: (0, -1) and (0, 1) against (0, -1) twice: 1 and -1.
    assert one.centred_cosine == pytest.approx(0.0)
    assert one.relative_l2 == pytest.approx(2 / math.sqrt(9 + 13))
    assert one.worst_cosine == pytest.approx(turned + 0.01 * (1 - turned))
    assert one.worst_centred_cosine == pytest.approx(-1 + 0.01 * 2)
    assert one.prefix_cosine == pytest.approx(0.0)
    assert one.same_top1 is None


def test_a_common_mean_flatters_the_raw_cosine_alone():
    spread = torch.randn(1, 200, 16, generator=torch.Generator().manual_seed(0))
    noise = torch.randn(1, 200, 16, generator=torch.Generator().manual_seed(1))
    apart = measure_fidelity(spread, spread + noise)
    shifted = measure_fidelity(spread + 100, spread + noise + 100)
    assert shifted.cosine.mean > 0.999 > 0.9 > apart.cosine.mean
    assert shifted.centred_cosine.mean == pytest.approx(apart.centred_cosine.mean, abs=1e-4)


def test_the_worst_hundredth_is_the_first_percentile_of_the_patches():
    angles = torch.linspace(0, math.pi / 2, 101)
    dense = torch.tensor([1.0, 0.0]).expand(1, 101, 2)
    other = torch.stack([angles.cos(), angles.sin()], dim=-1)[None]
    (one,) = picture_fidelity(dense, other)
    assert one.worst_cosine == pytest.approx(float(angles[99].cos()))


def test_zero_vectors_are_defined():
    dense, other = batch([0.0, 0.0], [1.0, 0.0], [2.0, 0.0]), batch([0.0, 0.0], [0.0, 0.0], [2.0, 0.0])
    assert patch_cosines(dense, other).tolist() == [[1.0, 0.0, 1.0]]
    same = torch.full((1, 7, 3), 0.1)
    assert patch_cosines(same, same.clone(), centred=True).tolist() == [[1.0] * 7]
    (one,) = picture_fidelity(torch.zeros(1, 2, 3), torch.ones(1, 2, 3))
    assert (one.cosine, one.relative_l2) == (0.0, math.inf)


def test_patch_cosines_are_those_that_the_figures_come_from():
    dense, other = torch.randn(2, 2, 9, 4).unbind(0)
    for centred, name in ((False, "cosine"), (True, "centred_cosine")):
        found = patch_cosines(dense, other, num_prefix_tokens=2, centred=centred)
        assert found.shape == (2, 7)
        wanted = [getattr(one, name) for one in picture_fidelity(dense, other, num_prefix_tokens=2)]
        assert found.mean(dim=1).tolist() == pytest.approx(wanted)


def test_half_precision_is_judged_in_float64():
    x = torch.randn(1, 64, 32)
    half = x.bfloat16()
    assert measure_fidelity(half, half).cosine.mean > 1 - 1e-12
    assert 0.999 < measure_fidelity(x, half.float()).cosine.mean < 1.0


def test_a_meter_gives_what_one_batch_gives():
    dense, other = torch.randn(2, 6, 5, 4).unbind(0)
    logits, dense_logits = torch.randn(2, 6, 3).unbind(0)
    meter = FidelityMeter(num_prefix_tokens=1)
    for part in (slice(0, 1), slice(1, 6)):
        added = meter.update(dense[part], other[part], dense_logits=dense_logits[part], logits=logits[part])
        assert len(added) == part.stop - part.start
    whole = measure_fidelity(dense, other, num_prefix_tokens=1, dense_logits=dense_logits, logits=logits)
    assert meter.compute() == whole
    assert whole.pictures == 6
    assert whole.top1_agreement == (logits.argmax(1) == dense_logits.argmax(1)).double().mean().item()


def test_the_spread_is_over_pictures():
    found = Spread.of([1.0, 2.0, 3.0, 4.0, 10.0])
    assert found == Spread(mean=4.0, low=1.0, quartile1=2.0, median=3.0, quartile3=4.0, high=10.0)
    assert Spread.of([0.5]) == Spread(*[0.5] * 6)


@pytest.mark.parametrize(
    ("arguments", "error", "says"),
    [
        ((torch.ones(1, 3, 4), torch.ones(1, 4, 4)), ValueError, r"features: shape \(1, 4, 4\) differs from dense"),
        ((torch.ones(3, 4), torch.ones(3, 4)), ValueError, r"expected \(B, N, C\), got shape \(3, 4\)"),
        ((torch.ones(1, 3, 4), torch.ones(1, 3, 4).long()), TypeError, "features: expected a floating tensor"),
        ((None, torch.ones(1, 3, 4)), TypeError, "dense_features: expected a floating tensor, got NoneType"),
    ],
)
def test_wrong_features_are_refused(arguments, error, says):
    with pytest.raises(error, match=says):
        picture_fidelity(*arguments)


def test_features_without_patches_are_refused():
    x = torch.ones(1, 3, 4)
    for prefix in (3, -1):
        with pytest.raises(ValueError, match=f"num_prefix_tokens: {prefix} of 3 tokens leave no patch"):
            picture_fidelity(x, x, num_prefix_tokens=prefix)


@pytest.mark.parametrize("wrong", [math.nan, math.inf])
def test_values_that_are_not_finite_are_told(wrong):
    x, y = torch.ones(3, 4, 5), torch.ones(3, 4, 5)
    y[1, 2, :2] = wrong
    with pytest.raises(FloatingPointError, match="^features: 2 values of picture 1 are NaN or infinite"):
        picture_fidelity(x, y)
    with pytest.raises(FloatingPointError, match="^dense_features"):
        picture_fidelity(y, x)
    with pytest.raises(FloatingPointError, match="^logits: 1 values of picture 0"):
        picture_fidelity(x, x, dense_logits=torch.ones(3, 2), logits=torch.tensor([[wrong, 1], [1, 1], [1, 1]]))


def test_logits_of_one_model_alone_are_refused():
    x = torch.ones(2, 3, 4)
    with pytest.raises(ValueError, match="given for one model alone"):
        picture_fidelity(x, x, logits=torch.ones(2, 5))
    with pytest.raises(ValueError, match=r"logits: expected \(2, classes\)"):
        picture_fidelity(x, x, dense_logits=torch.ones(2, 5), logits=torch.ones(2, 4))


def test_a_meter_without_pictures_is_refused():
    with pytest.raises(ValueError, match="none were measured"):
        FidelityMeter().compute()


def test_pictures_of_different_kinds_do_not_mix():
    one = PictureFidelity(4, 1.0, 1.0, 0.0, 1.0, 1.0, prefix_cosine=1.0)
    other = PictureFidelity(4, 1.0, 1.0, 0.0, 1.0, 1.0)
    with pytest.raises(ValueError, match="prefix_cosine is known of 1 of 2"):
        Fidelity.of([one, other])


def vit(**options):
    timm = pytest.importorskip("timm")
    torch.manual_seed(0)
    return timm.create_model(
        "vit_tiny_patch16_224", img_size=64, depth=2, embed_dim=32, num_heads=2, dynamic_img_size=True, **options
    )


@pytest.fixture
def images():
    return torch.randn(3, 3, 64, 64, generator=torch.Generator().manual_seed(0))


def test_two_models_on_the_same_images(images):
    dense, other = vit(num_classes=7), vit(num_classes=7, attn_layer=KNN(topk=0.5).attn_layer())
    whole = vit(num_classes=7, attn_layer=KNN(topk=1.0).attn_layer())
    for model in (other, whole):
        model.load_state_dict(dense.state_dict())
    dense.train()
    found = compare_models(dense, other, iter([images[:1], images[1:]]))
    assert dense.training and dense.blocks[1].training, "left as found"
    assert found.pictures == 3
    assert found.prefix_cosine is not None
    assert found.top1_agreement is not None
    assert 0.0 < found.cosine.low <= found.cosine.mean < 1.0
    exact = compare_models(dense, whole, images)
    assert exact.cosine.low > 1 - 1e-6
    assert exact.top1_agreement == 1.0


def test_a_model_is_not_compared_with_itself(images):
    model = vit()
    with pytest.raises(ValueError, match="it is the dense model itself"):
        compare_models(model, model, images)
    with pytest.raises(ValueError, match="images: there are none"):
        compare_models(model, vit(), [])


def test_maps_become_tokens_and_no_classifier_gives_no_logits():
    class ChannelsFirst(nn.Module):
        num_features = 5

        def forward(self, x):
            return self.maps

    x, model = torch.randn(2, 3, 8, 8), ChannelsFirst()
    model.maps = torch.randn(2, 5, 3, 4)
    found = features_of(model, x)
    assert found.logits is None and found.num_prefix_tokens == 0
    assert torch.equal(found.tokens, model.maps.flatten(2).mT)
    model.maps = torch.randn(2, 3, 4, 5)
    assert torch.equal(features_of(model, x).tokens, model.maps.flatten(1, 2))
    model.maps = torch.randn(2, 5)
    with pytest.raises(ValueError, match=r"features of shape \(2, 5\)"):
        features_of(model, x)
    model.maps = [torch.randn(2, 5, 3)]
    with pytest.raises(TypeError, match="returned list, no features"):
        features_of(model, x)


@pytest.mark.parametrize("classes", [0, 4])
def test_transformers_models_are_read(classes):
    transformers = pytest.importorskip("transformers")
    config = transformers.ViTConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, image_size=32, patch_size=8
    )
    if classes:
        config.num_labels = classes
        model = transformers.ViTForImageClassification(config)
    else:
        model = transformers.ViTModel(config, add_pooling_layer=False)
    found = features_of(model, torch.randn(2, 3, 32, 32))
    assert found.tokens.shape == (2, 17, 16)
    assert found.num_prefix_tokens == 1
    assert (found.logits is None) if not classes else found.logits.shape == (2, 4)


def test_layers_are_recorded_and_judged_head_by_head(images):
    model = vit(num_classes=0)
    calls = record_attention(model, images)
    assert [call.layer for call in calls] == ["blocks.0.attn", "blocks.1.attn"]
    assert calls[0].query.shape == (3, 2, 17, 16)
    exact = head_fidelity(KNN(topk=1.0), calls[1], num_prefix_tokens=1)
    half = head_fidelity(KNN(topk=0.5), calls[1], num_prefix_tokens=1)
    assert [len(heads) for heads in half] == [2, 2, 2]
    assert all(head.cosine > 1 - 1e-6 for heads in exact for head in heads)
    assert all(head.cosine < 1 - 1e-6 and head.patches == 16 for heads in half for head in heads)
    assert not any(hooks for m in model.modules() for hooks in (m._forward_hooks, m._forward_pre_hooks))


def test_a_model_without_dense_attention_cannot_be_recorded(images):
    with pytest.raises(ValueError, match="called scaled_dot_product_attention nowhere; restore it"):
        record_attention(vit(attn_layer=KNN().attn_layer()), images)
