"""What stands in a converted module's `forward`, and how it is put there and taken out."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from regard.conversion.adapters import Adapter, Attention, Override
from regard.specs import Mechanism

__all__ = [
    "SCALED_DOT_PRODUCT_ATTENTION",
    "Layout",
    "Seam",
    "attends_tokens",
    "broadcast",
    "forward_with",
    "install",
    "is_closed",
    "remove",
    "seams_of",
]

# What torch calls by this name: other libraries put functions of their own in its place, which end up calling it.
SCALED_DOT_PRODUCT_ATTENTION = F.scaled_dot_product_attention


@dataclass(frozen=True)
class Layout:
    """What is known of the tokens that a seam sees.

    Args:
        num_prefix_tokens: how many of the first tokens stand outside the grid.
        grid_size: the only grid that the others can have, None if it depends on the image.
    """

    num_prefix_tokens: int = 0
    grid_size: tuple[int, ...] | None = None

    def options(
        self, tokens: int, keys: int, grid_size: tuple[int, ...] | None, num_prefix_tokens: int | None
    ) -> dict[str, Any]:
        """What `Mechanism.attend` is told of a call of so many tokens and keys. A grid that does not fit is None."""
        prefix = self.num_prefix_tokens if num_prefix_tokens is None else num_prefix_tokens
        grid = grid_size or self.grid_size
        fits = grid is not None and tokens == keys == prefix + math.prod(grid)
        return {"grid_size": grid if fits else None, "num_prefix_tokens": min(prefix, keys)}


def attends_tokens(query: Tensor, key: Tensor) -> bool:
    """True if tokens look at tokens: one query (a pool) or one key leaves a mechanism nothing to choose."""
    return query.shape[-2] > 1 and key.shape[-2] > 1


class Answer(TorchFunctionMode):
    """Within this context calls of scaled_dot_product_attention are answered by `attention`."""

    def __init__(self, attention: Callable[..., Tensor]) -> None:
        super().__init__()
        self.attention = attention

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is SCALED_DOT_PRODUCT_ATTENTION:
            return self.attention(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


@dataclass(eq=False, repr=False)
class Seam:
    """A converted module's `forward`: its class's own, with attention computed by a mechanism.

    An instance of a class at module level, kept in the module's own attributes: deepcopy and pickle take it along, and
    no parameter or buffer is added.

    Args:
        module: the module in whose `forward` this stands.
        mechanism: computes its attention.
        adapter: for a class that hides its scaled_dot_product_attention, or that knows its grid.
        layout: what is known of its tokens.
        before: the module's own `forward` attribute, if it had one.
        overridden: attributes that have another value while this stands here, with the values to put back.
    """

    module: nn.Module
    mechanism: Mechanism
    adapter: Adapter | None = None
    layout: Layout = Layout()
    before: Callable[..., Any] | None = None
    overridden: list[Override] = field(default_factory=list)

    def __repr__(self) -> str:
        return f"<forward of {type(self.module).__name__} with {self.mechanism}>"

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return forward_with(self.module, self.attend, self.adapter, self.before, args, kwargs)

    def attend(
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
    ) -> Tensor:
        """The mechanism in place of scaled_dot_product_attention; what is not tokens to tokens stays dense."""
        given: dict[str, Any] = {"attn_mask": attn_mask, "dropout_p": dropout_p, "is_causal": is_causal}
        given |= {"scale": scale, "enable_gqa": enable_gqa}
        if not attends_tokens(query, key):
            return F.scaled_dot_product_attention(query, key, value, **given)
        query, key, value = broadcast(query, key, value, enable_gqa)
        known = self.layout.options(query.shape[-2], key.shape[-2], grid_size, num_prefix_tokens)
        return self.mechanism.attend(query, key, value, **given, **known)


def forward_with(
    module: nn.Module,
    attention: Attention,
    adapter: Adapter | None,
    before: Callable[..., Any] | None,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> Any:
    """Run a module's forward with another attention."""
    if adapter is not None and adapter.forward is not None:
        return adapter.forward(module, attention, *args, **kwargs)
    answer: Callable[..., Tensor] = attention
    if adapter is not None and adapter.grid is not None:
        grid = adapter.grid(module, args)

        def answer(*inputs: Any, **options: Any) -> Tensor:
            return attention(*inputs, **options, grid_size=grid)

    with Answer(answer):
        return type(module).forward(module, *args, **kwargs) if before is None else before(*args, **kwargs)


def broadcast(query: Tensor, key: Tensor, value: Tensor, enable_gqa: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Leading dimensions made equal, as scaled_dot_product_attention does by itself."""
    kept = 3 if enable_gqa else 2  # grouped heads are the operator's own matter
    leads = [tensor.shape[:-kept] for tensor in (query, key, value)]
    if leads[0] == leads[1] == leads[2]:
        return query, key, value
    lead = torch.broadcast_shapes(*leads)
    return tuple(tensor.expand(*lead, *tensor.shape[-kept:]) for tensor in (query, key, value))  # type: ignore[return-value]


def install(seam: Seam, around: Sequence[nn.Module]) -> None:
    """Put a seam into its module.

    Args:
        around: the modules that hold the seam's module, outermost first.
    """
    overrides = [Override(seam.module, "fused_attn", True)] if is_closed(seam.module) else []
    if seam.adapter is not None and seam.adapter.overrides is not None:
        overrides += seam.adapter.overrides(seam.module, around)
    for module, name, value in overrides:
        found = getattr(module, name)
        if found != value:  # else another seam has overridden it, and will put it back
            seam.overridden.append(Override(module, name, found))
            setattr(module, name, value)
    vars(seam.module)["forward"] = seam


def remove(seam: Seam) -> None:
    """Take a seam out of its module, and put back what stood there."""
    if seam.before is None:
        del vars(seam.module)["forward"]
    else:
        vars(seam.module)["forward"] = seam.before
    for module, name, value in seam.overridden:
        setattr(module, name, value)


def is_closed(module: nn.Module) -> bool:
    """True for timm's classes that would call scaled_dot_product_attention, but take the softmax by hand for now."""
    return vars(module).get("fused_attn") is False


def seams_of(model: nn.Module) -> list[Seam]:
    """The seams installed in a model."""
    return [seam for module in model.modules() if isinstance(seam := vars(module).get("forward"), Seam)]
