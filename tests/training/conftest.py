"""Data and recipe so small that a run takes a fraction of a second."""

from collections.abc import Iterator

import pytest
import torch

from regard.data import ImageData
from regard.training import Recipe


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Work this small only waits for further threads, above all on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def tiny() -> ImageData:
    """Two classes, dark and bright, 24 training and 10 test images of 9 x 9."""
    generator = torch.Generator().manual_seed(1)

    def images(count: int) -> tuple[torch.Tensor, torch.Tensor]:
        labels = torch.arange(count) % 2
        noise = torch.randint(0, 100, (count, 1, 9, 9), generator=generator)
        return (noise + 150 * labels[:, None, None, None]).to(torch.uint8), labels

    return ImageData("tiny", ("dark", "bright"), *images(24), *images(10))


@pytest.fixture(scope="session")
def short() -> Recipe:
    """Two steps an epoch."""
    return Recipe(epochs=1, batch_size=12)
