"""A small vision transformer and three images for it."""

import pytest
import torch
from small_vits import small_vit
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor


@pytest.fixture
def vit() -> VisionTransformer:
    return small_vit()


@pytest.fixture
def images() -> Tensor:
    return torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(1))
