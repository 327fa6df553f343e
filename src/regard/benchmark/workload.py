"""What is measured: one operator at one shape, forward or forward + backward. Timing and memory run this same code."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from regard.mixers import parse_mechanism

__all__ = ["DIRECTIONS", "FORWARD", "FORWARD_BACKWARD", "Shape", "attend_of", "attention", "prepare_attention"]

FORWARD = "forward"
FORWARD_BACKWARD = "forward+backward"
DIRECTIONS = (FORWARD, FORWARD_BACKWARD)
_DTYPES = ("float32", "bfloat16", "float16", "float64")


@dataclass(frozen=True)
class Shape:
    """Queries, keys and values of one self-attention: (batch, heads, tokens, head_dim) each."""

    tokens: int
    batch: int = 1
    heads: int = 6
    head_dim: int = 64
    dtype: str = "float32"
    device: str = "cpu"

    def __post_init__(self) -> None:
        for name in ("tokens", "batch", "heads", "head_dim"):
            size = getattr(self, name)
            if not isinstance(size, int) or isinstance(size, bool) or size < 1:
                raise ValueError(f"{name}: expected an int >= 1, got {size!r}")
        if self.dtype not in _DTYPES:
            raise ValueError(f"dtype: expected one of {', '.join(_DTYPES)}, got {self.dtype!r}")

    @property
    def torch_dtype(self) -> torch.dtype:
        found: torch.dtype = getattr(torch, self.dtype)
        return found

    @property
    def grid_size(self) -> tuple[int, int] | None:
        """The square grid of the tokens, or None where they make none."""
        side = math.isqrt(self.tokens)
        return (side, side) if side * side == self.tokens else None

    def normal(self, count: int, seed: int = 0) -> list[Tensor]:
        """`count` tensors of standard normal numbers, the same on every device and in every dtype up to rounding."""
        generator = torch.Generator().manual_seed(seed)
        size = (self.batch, self.heads, self.tokens, self.head_dim)
        return [torch.randn(size, generator=generator).to(self.device, self.torch_dtype) for _ in range(count)]


def attention(
    attend: Callable[[Tensor, Tensor, Tensor], Tensor], inputs: list[Tensor], direction: str
) -> Callable[[], tuple[Tensor, ...]]:
    """A callable that runs the operator once and returns its output, and the gradients where there are any.

    Args:
        attend: query, key, value -> output.
        inputs: query, key, value and the output's gradient.
        direction: "forward" (no autograd at all) or "forward+backward".
    """
    query, key, value, grad_output = (tensor.detach() for tensor in inputs)
    if direction == FORWARD:

        def forward() -> tuple[Tensor, ...]:
            with torch.no_grad():
                return (attend(query, key, value),)

        return forward
    if direction != FORWARD_BACKWARD:
        raise ValueError(f"direction: expected one of {', '.join(DIRECTIONS)}, got {direction!r}")
    leaves = [tensor.requires_grad_() for tensor in (query, key, value)]

    def both() -> tuple[Tensor, ...]:
        output = attend(*leaves)
        return (output.detach(), *torch.autograd.grad(output, leaves, grad_output))

    return both


def prepare_attention(*, mechanism: str, direction: str, shape: dict[str, Any]) -> Callable[[], tuple[Tensor, ...]]:
    """The same from plain values: what a measuring process is told to run.

    Args:
        mechanism: text form, such as `knn(topk=0.5)`.
        shape: the fields of Shape.
    """
    return attention(attend_of(parse_mechanism(mechanism), Shape(**shape)), Shape(**shape).normal(4), direction)


def attend_of(mechanism: Any, shape: Shape) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """A mechanism's operator at a shape: query, key, value -> output."""

    def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        output: Tensor = mechanism.attend(query, key, value, grid_size=shape.grid_size)
        return output

    return attend
