"""A data set in memory."""

from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["ImageData"]


@dataclass(frozen=True, eq=False)
class ImageData:
    """Training and test images of one size, with their classes.

    Args:
        name: what `load` was asked for.
        class_names: one a label.
        train_images, test_images: (images, channels, height, width), uint8.
        train_labels, test_labels: (images,), int64.
    """

    name: str
    class_names: tuple[str, ...]
    train_images: Tensor
    train_labels: Tensor
    test_images: Tensor
    test_labels: Tensor

    @property
    def channels(self) -> int:
        return self.train_images.shape[1]

    @property
    def image_size(self) -> tuple[int, int]:
        """Height and width in pixels."""
        return self.train_images.shape[-2], self.train_images.shape[-1]

    def normalise(self, images: Tensor) -> Tensor:
        """uint8 images -> float32, centred on 0: (pixel / 255 - 0.5) / 0.5, the same for every data set."""
        return images.to(torch.float32).div(127.5).sub(1.0)
