"""Which images and which tokens the page shows."""

import pytest
import torch
from timm.models.vision_transformer import VisionTransformer

from regard.data import ImageData
from regard.specs import parse
from regard.studies.maps import choose_images, choose_query, maps_of, thumbnail, tokens_of


def test_images_are_the_first_of_classes_that_lie_evenly():
    labels = torch.tensor([3, 3, 0, 1, 2, 5, 4, 7, 6, 0])
    assert [int(labels[i]) for i in choose_images(labels, 4)] == [0, 2, 4, 6]
    assert choose_images(labels, 2) == [2, 6]
    assert choose_images(torch.tensor([1, 1, 1]), 4) == [0]


def test_the_query_is_the_token_with_the_most_contrast():
    image = torch.full((3, 28, 28), 90, dtype=torch.uint8)
    image[:, 8:12:2, 20:24] = 255
    assert choose_query(image, (7, 7)) == (2, 5)
    assert choose_query(image, (14, 14)) in ((4, 10), (4, 11), (5, 10), (5, 11))


def test_large_images_are_made_small_for_the_page():
    image = torch.randint(0, 256, (3, 448, 224), dtype=torch.uint8)
    assert thumbnail(image).shape == (3, 96, 48)
    assert thumbnail(image).dtype == torch.uint8
    assert thumbnail(image[:, :28, :28]) is not None and torch.equal(thumbnail(image[:, :28, :28]), image[:, :28, :28])


@pytest.mark.parametrize(("asked", "drawn"), [(-1, 1), (2, 1), (1, 1), (0, 0), (-3, -3)])
def test_maps_are_those_of_a_layer_that_sees_all_tokens(asked, drawn):
    """Layer 1 drops half of the patches after its attention, so layer 2 has no grid to be drawn on."""
    mechanism = parse("evit(keep_rate=0.5, layers=(1,))")
    model = VisionTransformer(
        img_size=16, patch_size=4, embed_dim=16, depth=3, num_heads=2, attn_layer=mechanism.attn_layer()
    )
    mechanism.apply(model)
    pixels, labels = torch.randint(0, 256, (4, 3, 16, 16), dtype=torch.uint8), torch.tensor([0, 1, 0, 1])
    data = ImageData("noise", ("even", "odd"), pixels, labels, pixels, labels)
    assert tokens_of(model, data) == 17
    model.reset_classifier(2)
    (one, _) = maps_of(model, data, str(mechanism), 0, layer=asked, count=2)
    assert one.layer == drawn and len(one.weights) == len(one.weights[0]) == 4
