"""What the attention operators have in common: their entries in the dispatcher, their backends, the second gradient."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from regard.ops import _library, _triton
from regard.ops._dispatch import Refusal, functorch_active

__all__ = [
    "AttentionCall",
    "KernelBackend",
    "PyTorchBackend",
    "TritonBackend",
    "define",
    "refusal_of_modes",
    "second_gradients",
]


def define(
    name: str,
    schema: str,
    *,
    compute: Callable[..., Any],
    fake: Callable[..., Any],
    setup: Callable[..., None],
    gradient: Callable[..., Any],
) -> Any:
    """Define `regard::name`, computed by PyTorch (`compute`) wherever no kernel is registered for it.

    Args:
        fake, setup, gradient: as torch.library's register_fake and register_autograd take them.
    """
    torch.library.define(f"regard::{name}", schema)
    torch.library.register_fake(f"regard::{name}", fake)
    torch.library.impl(f"regard::{name}", "CompositeExplicitAutograd", compute)
    torch.library.register_autograd(f"regard::{name}", gradient, setup_context=setup)
    return getattr(torch.ops.regard, name).default


def second_gradients(
    output: Tensor, leaves: Sequence[Tensor], grads: Sequence[Tensor | None], *, materialize: bool = False
) -> tuple[Tensor | None, ...]:
    """Gradients, with respect to `leaves`, of what the inputs' gradients send.

    Args:
        output: of a differentiable formulation, from leaves[1:].
        leaves: the output's gradient and then the inputs.
        grads: what arrives for the gradient of each input; there may be more than inputs.
        materialize: gradients of inputs that the output does not depend on are zeros, not an error.
    """
    first = torch.autograd.grad(output, leaves[1:], leaves[0], create_graph=True, materialize_grads=materialize)
    pairs = [(f, g) for f, g in zip(first, grads, strict=False) if g is not None]
    return torch.autograd.grad([f for f, _ in pairs], leaves, [g for _, g in pairs], allow_unused=True)


class AttentionCall(Protocol):
    """What these backends must know of a checked call."""

    @property
    def query(self) -> Tensor: ...

    @property
    def key(self) -> Tensor: ...

    @property
    def value(self) -> Tensor: ...

    @property
    def dropout_p(self) -> float: ...

    def operands(self) -> tuple[Any, ...]:
        """The arguments of the operator in the dispatcher."""


def refusal_of_modes(dropout_p: float) -> Refusal | None:
    """Why no kernel takes a call whatever its tensors; None if one may."""
    if dropout_p > 0.0:
        return Refusal("dropout of attention weights is computed on the PyTorch path only (dropout_p > 0)")
    if functorch_active():
        return Refusal("torch.func transforms (vmap, grad, jvp) see through PyTorch operations only")
    return None


@dataclass(frozen=True)
class KernelBackend:
    """The C++ kernels registered for an operator."""

    operator: Callable[..., Tensor]
    name: str = "cpu"
    is_slow_path: bool = False

    def supports(self, call: AttentionCall) -> Refusal | None:
        return _library.refusal(call.query) or refusal_of_modes(call.dropout_p)

    def run(self, call: AttentionCall) -> Tensor:
        return self.operator(*call.operands())


@dataclass(frozen=True)
class TritonBackend:
    """The Triton kernels registered for an operator (see _triton.register)."""

    operator: Callable[..., Tensor]
    name: str = "triton"
    is_slow_path: bool = False

    def supports(self, call: AttentionCall) -> Refusal | None:
        return _triton.refusal(call.query, call.value) or refusal_of_modes(call.dropout_p)

    def run(self, call: AttentionCall) -> Tensor:
        return self.operator(*call.operands())


@dataclass(frozen=True)
class PyTorchBackend:
    """Takes every valid call, on any device.

    With dropout or under torch.func the differentiable `reference` runs, which holds all weights at once: there nothing
    but PyTorch's own operations will do.
    """

    operator: Callable[..., Tensor]
    reference: Callable[[Any], Tensor]
    name: str = "pytorch"
    is_slow_path: bool = True

    def supports(self, call: AttentionCall) -> Refusal | None:
        return None

    def run(self, call: AttentionCall) -> Tensor:
        return self.operator(*call.operands()) if refusal_of_modes(call.dropout_p) is None else self.reference(call)
