"""Weights and images made from a rule, so that two implementations of one model can be given the same ones.

Each weight is drawn from a generator of its own, seeded with the CRC-32 of its official name, and scaled by what it is:
norm scales near one, biases and tables small, matrices and filters by the square root of their fan-in. The goldens were
made by this rule.
"""

import math
import zlib
from collections.abc import Mapping

import torch
from torch import Tensor

_TABLES = ("pos_embed", "cls_token", "dist_token", "class_token")


def synthetic_weight(name: str, shape: torch.Size, scale: float = 1.0) -> Tensor:
    """The float32 tensor that the rule assigns to an official state_dict name; `scale` of matrices and filters."""
    noise = torch.randn(shape, generator=torch.Generator().manual_seed(zlib.crc32(name.encode())))
    leaf = name.rpartition(".")[2]
    if leaf == "running_var":
        return noise.abs() + 0.5
    if leaf == "running_mean":
        return noise * 0.1
    if noise.dim() < 2:
        return noise * 0.1 + 1 if leaf == "weight" else noise * 0.1
    if shape[0] == 1 and any(table in leaf for table in _TABLES):
        return noise * 0.02
    return scale * noise / math.sqrt(shape[1:].numel())


def synthetic_state(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A state_dict of the same names and shapes by the rule; integer entries stay."""
    return {
        name: synthetic_weight(name, tensor.shape) if tensor.is_floating_point() else tensor
        for name, tensor in state.items()
    }


def synthetic_images(batch: int, size: int) -> Tensor:
    """(batch, 3, size, size) standard normal."""
    return torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(0))


def samples(tensor: Tensor, count: int = 64) -> Tensor:
    """`count` values of a tensor, spread over it."""
    return tensor.reshape(-1)[torch.arange(count) * tensor.numel() // count]
