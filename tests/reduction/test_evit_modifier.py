"""EViT as a value: its text, what it refuses, and what it does to a model built around a mechanism."""

import pytest
import torch
from small_vits import small_vit

import regard
from regard.auxiliary import collect_losses
from regard.reduction import EViT
from regard.reduction.layer import reduced_blocks
from regard.specs import parse


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("evit", EViT()),
        ("evit(keep_rate=0.5)", EViT(0.5)),
        ("evit(layers=[1, 3], fuse=False)", EViT(layers=(1, 3), fuse=False)),
    ],
)
def test_text_form(text, value):
    assert parse(text) == regard.Dense() + value == parse(str(regard.Dense() + value))
    assert str(EViT()) == "evit(keep_rate=0.7, layers=None, fuse=True)" and EViT(0.5).label == "evit(keep_rate=0.5)"


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"keep_rate": 0}, ValueError),
        ({"keep_rate": None}, TypeError),
        ({"layers": (3, 3)}, ValueError),
        ({"layers": 3}, TypeError),
        ({"fuse": 1}, TypeError),
    ],
)
def test_bad_options_are_refused(options, error):
    with pytest.raises(error, match=next(iter(options))):
        EViT(**options)


@pytest.mark.parametrize(
    "text",
    [
        "evit(keep_rate=0.5)",
        "knn(topk=0.5) + evit(keep_rate=0.5)",
        "multipole(num_clusters=4) + gated(kind='headwise') + evit(keep_rate=0.5, layers=(1,))",
    ],
)
def test_models_are_built_with_it(text, images):
    mechanism = parse(text)
    model = small_vit(attn_layer=mechanism.attn_layer(num_prefix_tokens=1))
    mechanism.apply(model)
    assert [layer.layer for layer in reduced_blocks(model)] == ([1] if "layers" in text else [1, 2, 3])
    with collect_losses(model.train()) as losses:
        loss = model(images).square().mean()
    (loss + losses.total()).backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_the_small_model_of_the_comparison_has_no_class_token():
    """Two layers and an average pool: the second drops patches by the mean attention."""
    model = small_vit(depth=2, class_token=False, global_pool="avg")
    parse("evit").apply(model)
    (layer,) = reduced_blocks(model)
    assert (layer.layer, layer.score) == (1, "mean")
    with torch.no_grad():
        assert model.forward_features(torch.randn(2, 3, 32, 32)).shape == (2, 13, 32)


def test_a_model_that_cannot_be_reorganized_is_left_as_it_was():
    mechanism = parse("neighborhood(kernel_size=3) + evit")
    model = small_vit(attn_layer=mechanism.attn_layer(num_prefix_tokens=1))
    with pytest.raises(ValueError, match="needs the tokens' grid"):
        mechanism.apply(model)
    assert not reduced_blocks(model)
