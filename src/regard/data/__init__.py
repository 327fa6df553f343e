"""Data sets as tensors: the embedded one, image folders, and any data-set string of timm's create_dataset."""

from regard.data.images import ImageData
from regard.data.sources import load

__all__ = ["ImageData", "load"]
