"""Fidelity layer by layer: a mechanism's operator on the queries, keys and values that dense attention really saw."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from regard.conversion.fidelity import evaluating, picture_fidelity
from regard.results import PictureFidelity
from regard.specs import Mechanism

__all__ = ["AttentionCall", "head_fidelity", "record_attention"]


@dataclass(frozen=True)
class AttentionCall:
    """What one layer handed to scaled_dot_product_attention.

    Args:
        layer: module name of the layer, such as `blocks.3.attn`.
        query: (B, H, N, D). key, value: (B, H_kv, M, D).
        options: the call's other arguments by name (attn_mask, is_causal, scale, enable_gqa).
    """

    layer: str
    query: Tensor
    key: Tensor
    value: Tensor
    options: dict[str, Any]


def record_attention(model: nn.Module, images: Tensor) -> list[AttentionCall]:
    """Run a dense model once, in evaluation mode without gradient, and record every attention in it, in order.

    All layers' queries, keys and values are held at once: 3 * layers * B * N * C numbers.

    Args:
        model: a model whose attention calls `torch.nn.functional.scaled_dot_product_attention` in eager mode.
        images: what the model takes.

    Raises:
        ValueError: the model called it nowhere.
    """
    calls: list[AttentionCall] = []
    with evaluating(model), torch.no_grad(), _named(model) as current, _Recorder(calls, current):
        (model.forward_features if hasattr(model, "forward_features") else model)(images)  # type: ignore[operator]
    if not calls:
        raise ValueError(
            f"model: {type(model).__name__} called scaled_dot_product_attention nowhere; restore it if it is "
            "converted; compiled models and those that do the softmax by hand cannot be recorded"
        )
    return calls


def head_fidelity(
    mechanism: Mechanism,
    call: AttentionCall,
    *,
    num_prefix_tokens: int = 0,
    grid_size: tuple[int, ...] | None = None,
) -> list[list[PictureFidelity]]:
    """The fidelity of a mechanism's operator in one layer to dense attention's: [picture][head].

    A head's output (N, head_dim) takes the place of a picture's features in `picture_fidelity`, so the centred cosine
    is about the mean output of that head on that picture.

    Args:
        mechanism: whose `attend` is judged.
        call: from `record_attention`.
        num_prefix_tokens: how many of the first queries are no patches.
        grid_size: the patches' grid, for mechanisms that need one.
    """
    with torch.no_grad():
        dense = F.scaled_dot_product_attention(call.query, call.key, call.value, **call.options)
        other = mechanism.attend(
            call.query,
            call.key,
            call.value,
            grid_size=grid_size,
            num_prefix_tokens=num_prefix_tokens,
            **call.options,
        )
    return [picture_fidelity(a, b, num_prefix_tokens=num_prefix_tokens) for a, b in zip(dense, other, strict=True)]


class _Recorder(TorchFunctionMode):
    def __init__(self, calls: list[AttentionCall], current: list[str]) -> None:
        super().__init__()
        self._calls, self._current = calls, current

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention:
            self._calls.append(_call(self._current[-1] if self._current else "", *args, **kwargs))
        return func(*args, **kwargs)


def _call(
    layer: str,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    **options: Any,
) -> AttentionCall:
    """Arguments as scaled_dot_product_attention takes them; dropout is left out, the model being in evaluation mode."""
    return AttentionCall(layer, query, key, value, {"attn_mask": attn_mask, "is_causal": is_causal, **options})


@contextmanager
def _named(model: nn.Module) -> Iterator[list[str]]:
    """A stack of the names of the modules whose forward is running."""
    current: list[str] = []
    with ExitStack() as handles:
        for name, module in model.named_modules():

            def enter(_module: nn.Module, _inputs: Any, name: str = name) -> None:
                current.append(name)

            def leave(*_: Any) -> None:
                current.pop()

            handles.callback(module.register_forward_pre_hook(enter).remove)
            handles.callback(module.register_forward_hook(leave, always_call=True).remove)
        yield current
