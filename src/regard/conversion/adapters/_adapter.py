"""What an adapter is."""

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

from torch import Tensor, nn

__all__ = ["Adapter", "AdapterError", "Attention", "Override"]


class Attention(Protocol):
    """What an adapter calls in place of softmax(Q K^T) V: scaled_dot_product_attention, with what it knows beside.

    `grid_size` is the grid of the tokens without the prefix tokens, `num_prefix_tokens` how many of the first tokens
    stand outside it; None leaves either to what is known of the model.
    """

    def __call__(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
        *,
        grid_size: tuple[int, ...] | None = None,
        num_prefix_tokens: int | None = None,
    ) -> Tensor: ...


class AdapterError(RuntimeError):
    """A class is not as its adapter knows it: another version of its library."""


class Override(NamedTuple):
    """An attribute that has another value while a module is converted."""

    module: nn.Module
    name: str
    value: Any


@dataclass(frozen=True)
class Adapter:
    """How one attention class is computed through a mechanism, or how the grid of its tokens is read.

    Args:
        arguments: the parameters of the class's forward, by which a changed class is noticed.
        attributes: what the adapter reads of the module.
        forward: (module, attention, *the forward's arguments) -> the forward's result. None if the class calls
            scaled_dot_product_attention: its own forward runs then.
        grid: (module, the forward's positional arguments) -> the grid of the tokens, where the own forward runs.
        overrides: (module, the modules around it) -> what must be set so that nothing goes past the module's forward.
    """

    arguments: tuple[str, ...]
    attributes: tuple[str, ...] = ()
    forward: Callable[..., Any] | None = None
    grid: Callable[[Any, tuple[Any, ...]], tuple[int, ...] | None] | None = None
    overrides: Callable[[nn.Module, Sequence[nn.Module]], list[Override]] | None = None

    def misfit(self, module: nn.Module) -> str:
        """How the module's class differs from the one that this adapter was written for; empty if it does not."""
        found = tuple(inspect.signature(type(module).forward).parameters)[1:]
        if found != self.arguments:
            return f"its forward takes ({', '.join(found)}), not ({', '.join(self.arguments)})"
        missing = [name for name in self.attributes if not hasattr(module, name)]
        return f"it has no attribute {missing[0]!r}" if missing else ""
