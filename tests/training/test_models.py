"""build_model: what timm's models are told that timm itself does not tell their mixers."""

import pytest
import torch

from regard.data import ImageData
from regard.mixers import AttentionMixer, parse_mechanism
from regard.training import build_model


@pytest.mark.parametrize(("name", "prefix"), [("deit_tiny_distilled_patch16_224", 2), ("vit_tiny_patch16_224", 1)])
@pytest.mark.parametrize("mechanism", ["clustered", "multipole"])
def test_mixers_know_of_prefix_tokens(name, prefix, mechanism):
    images, labels = torch.zeros(2, 3, 32, 32, dtype=torch.uint8), torch.arange(2)
    data = ImageData("blank", ("a", "b"), images, labels, images, labels)
    with torch.device("meta"):
        model = build_model(name, parse_mechanism(mechanism), data)
    assert {m.num_prefix_tokens for m in model.modules() if isinstance(m, AttentionMixer)} == {prefix}
