"""Whom a token looks at."""

from dataclasses import dataclass

__all__ = ["AttentionMap"]


@dataclass
class AttentionMap:
    """Who one query looks at: weights over the grid of tokens, one map a mechanism, mean over heads."""

    mechanism: str
    seed: int
    image_index: int
    label: str
    prediction: str
    layer: int
    query: tuple[int, int]  # row and column of the query token on the grid
    weights: list[list[float]]  # grid rows x columns
    pixels: list[list[list[int]]]  # the image, rows x columns x channels, 0-255
