"""The dispatcher's view of routed attention: schema, shapes, gradient, FLOPs.

Two operators with one schema: `regard::routed_attention`, for which kernels are registered, and
`regard::routed_attention_gathered`, the PyTorch path. Each is one node in a compiled graph, at any number of tokens,
and saves nothing but its inputs: the backward computes the weights again.
"""

from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from regard.ops import _library, _triton
from regard.ops._arguments import heads_last
from regard.ops._operator import define, second_gradients
from regard.ops.routed.call import RoutedCall
from regard.ops.routed.reference import routed_attention_reference
from regard.ops.routed.streamed import attend, gradients

__all__ = ["routed_attention_gathered", "routed_attention_op"]

_INPUTS = (
    "Tensor query, Tensor key, Tensor value, Tensor? visible, Tensor blocks, Tensor extra_key, Tensor extra_value, "
    "Tensor? extra_bias"
)
_OPTIONS = "SymInt query_block, SymInt key_block, float scale"
_GRADIENTS = (
    "Tensor grad_query, Tensor grad_key, Tensor grad_value, Tensor grad_extra_key, Tensor grad_extra_value, "
    "Tensor grad_extra_bias"
)
_COUNT = 8  # of inputs
_DIFFERENTIABLE = (0, 1, 2, 5, 6, 7)  # places of the inputs that have a gradient


def _laid(like: Tensor) -> Tensor:
    return heads_last(like, tuple(like.shape))


def _forward(*arguments: Any) -> Tensor:
    output = attend(RoutedCall(*arguments))
    return _laid(output).copy_(output)


def _backward(grad_output: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    call = RoutedCall(*arguments)
    *found, grad_bias = gradients(call, grad_output)
    inputs = (call.query, call.key, call.value, call.extra_key, call.extra_value)
    return *(_laid(like).copy_(grad) for like, grad in zip(inputs, found, strict=True)), grad_bias


def _fake(query: Tensor, key: Tensor, value: Tensor, *rest: Any) -> Tensor:
    return heads_last(query, (*query.shape[:-1], value.shape[-1]))


def _fake_backward(grad_output: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    call = RoutedCall(*arguments)
    bias = call.extra_bias
    # Of the whole size, where the bias itself may be expanded.
    grad_bias = call.query.new_empty(0, dtype=_state(call)) if bias is None else bias.new_empty(bias.shape)
    inputs = (call.query, call.key, call.value, call.extra_key, call.extra_value)
    return *(_laid(like) for like in inputs), grad_bias


def _state(call: RoutedCall) -> torch.dtype:
    return torch.promote_types(call.query.dtype, torch.float32)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:_COUNT])
    ctx.options = inputs[_COUNT:]


def _setup_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.save_for_backward(*inputs[: 1 + _COUNT])
    ctx.options = inputs[1 + _COUNT :]


def _places(saved: tuple[Tensor | None, ...]) -> list[int]:
    """The inputs that can have a gradient, among those that are there."""
    return [place for place in _DIFFERENTIABLE if saved[place] is not None]


def _double_backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
    """Gradient of the gradient, through the reference."""
    grad_output, *saved = ctx.saved_tensors
    places = _places(saved)
    with torch.enable_grad():
        leaves = [t.detach().requires_grad_() for t in (grad_output, *(saved[place] for place in places))]
        arguments = list(saved)
        for place, leaf in zip(places, leaves[1:], strict=True):
            arguments[place] = leaf
        output = routed_attention_reference(RoutedCall(*arguments, *ctx.options))
        second = second_gradients(output, leaves, grads)
    found = dict(zip(places, second[1:], strict=True))
    return second[0], *(found.get(place) for place in range(_COUNT)), *(None,) * 3


def _define(name: str) -> Any:
    """An operator with this schema and gradient, computed by PyTorch wherever no kernel is registered for it."""
    backward = define(
        f"{name}_backward",
        f"(Tensor grad_output, {_INPUTS}, {_OPTIONS}) -> ({_GRADIENTS})",
        compute=_backward,
        fake=_fake_backward,
        setup=_setup_backward,
        gradient=_double_backward,
    )

    def gradient(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        saved = ctx.saved_tensors
        found = dict(zip(_DIFFERENTIABLE, backward(grad_output, *saved, *ctx.options), strict=True))
        places = _places(saved)
        return *(found[place] if place in places else None for place in range(_COUNT)), *(None,) * 3

    return define(
        name, f"({_INPUTS}, {_OPTIONS}) -> Tensor", compute=_forward, fake=_fake, setup=_setup, gradient=gradient
    )


routed_attention_op = _define("routed_attention")
routed_attention_gathered = _define("routed_attention_gathered")
_library.problem()  # loads the kernels
_triton.register("routed_attention", "regard.ops.routed.triton", "forward", _forward)
_triton.register("routed_attention_backward", "regard.ops.routed.triton", "backward", _backward)


def _forward_flops(
    query: tuple[int, ...],
    key: tuple[int, ...],
    value: tuple[int, ...],
    visible: Any,
    blocks: tuple[int, ...],
    extra_key: tuple[int, ...],
    extra_value: Any,
    extra_bias: Any,
    query_block: int,
    key_block: int,
    *rest: Any,
    **kwargs: Any,
) -> int:
    """Logits and values of all keys that lists have room for, and of the extra keys; -1 is counted as a whole block."""
    batch, heads, rows, dim = query
    return 2 * batch * heads * rows * (blocks[3] * key_block + extra_key[2]) * (dim + value[3])


def _backward_flops(
    grad_output: Any, query: tuple[int, ...], key: Any, value: tuple[int, ...], *rest: Any, **kwargs: Any
) -> int:
    """The logits again, then the gradients of weights, values, queries and keys."""
    forward = _forward_flops(query, key, value, *rest)
    return forward // (query[3] + value[3]) * (3 * query[3] + 2 * value[3])


for _name in ("routed_attention", "routed_attention_gathered"):
    register_flop_formula(getattr(torch.ops.regard, _name))(_forward_flops)
    register_flop_formula(getattr(torch.ops.regard, f"{_name}_backward"))(_backward_flops)
