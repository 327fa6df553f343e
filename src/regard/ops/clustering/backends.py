"""Who groups tokens: C++ kernels or PyTorch's own operations, one node in a compiled graph either way."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from regard.ops import _library
from regard.ops._dispatch import Refusal, allows

__all__ = ["BACKENDS", "Grouping", "has_kernels"]


def has_kernels(x: Tensor) -> bool:
    """Whether the C++ kernels group tokens like these."""
    return allows("cpu") and _library.refusal(x) is None


@dataclass(frozen=True)
class Grouping:
    """A checked call.

    Args:
        operator: the dispatcher's operator. arguments: its arguments, the tokens first.
    """

    operator: Callable[..., Any]
    arguments: tuple[Any, ...]


class _CPUBackend:
    name = "cpu"
    is_slow_path = False

    def supports(self, call: Grouping) -> Refusal | None:
        return _library.refusal(call.arguments[0])

    def run(self, call: Grouping) -> Any:
        return call.operator(*call.arguments)


class _PyTorchBackend:
    name = "pytorch"
    is_slow_path = True

    def supports(self, call: Grouping) -> Refusal | None:
        return None

    def run(self, call: Grouping) -> Any:
        return call.operator(*call.arguments)


BACKENDS = (_CPUBackend(), _PyTorchBackend())
