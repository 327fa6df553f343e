"""Which images and which tokens the page shows."""

import torch

from regard.studies.maps import choose_images, choose_query, thumbnail


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
