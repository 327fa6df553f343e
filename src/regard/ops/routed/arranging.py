"""BlockOrder's arrange and restore, and sums over blocks, as one node each in a compiled graph.

With sizes left open, what reshaping a padded grid asks of them keeps the compiler busy for half a minute, and what it
then knows holds for no other size.
"""

import math
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from regard.ops._dispatch import functorch_active
from regard.ops._operator import define
from regard.ops.routed.order import BlockOrder

__all__ = ["block_sums", "block_sums_reference", "from_blocks", "to_blocks"]


def to_blocks(tokens: Tensor, order: BlockOrder) -> Tensor:
    """(..., N, D) in the grid's order -> (..., blocks * block_tokens, D), block after block; padding is zero."""
    return order.arrange(tokens) if functorch_active() else _to_blocks(tokens, *_described(order))


def from_blocks(tokens: Tensor, order: BlockOrder) -> Tensor:
    """The inverse of to_blocks, without the padding."""
    return order.restore(tokens) if functorch_active() else _from_blocks(tokens, *_described(order))


def block_sums(tokens: Tensor, block_tokens: int) -> Tensor:
    """(..., blocks * block_tokens, D) -> (..., blocks, D): the sum over each run of so many tokens."""
    return _block_sums(tokens, block_tokens)


def _described(order: BlockOrder) -> list[list[int]]:
    return [list(axis) for axis in zip(*order._axes(), strict=True)]


def _order(grid: Sequence[int], block: Sequence[int], offset: Sequence[int]) -> BlockOrder:
    return BlockOrder(tuple(grid), tuple(block), tuple(offset))


def _arrange(tokens: Tensor, *order: Sequence[int]) -> Tensor:
    return _own(_order(*order).arrange(tokens), tokens)


def _restore(tokens: Tensor, *order: Sequence[int]) -> Tensor:
    return _own(_order(*order).restore(tokens), tokens)


def _own(found: Tensor, given: Tensor) -> Tensor:
    """Contiguous, in memory of its own: an operator must not hand its input back."""
    found = found.contiguous()
    return found.clone() if found.untyped_storage().data_ptr() == given.untyped_storage().data_ptr() else found


def _fake_arranged(tokens: Tensor, *order: Sequence[int]) -> Tensor:
    blocks = _order(*order)
    return tokens.new_empty((*tokens.shape[:-2], blocks.blocks * blocks.block_tokens, tokens.shape[-1]))


def _fake_restored(tokens: Tensor, *order: Sequence[int]) -> Tensor:
    return tokens.new_empty((*tokens.shape[:-2], math.prod(order[0]), tokens.shape[-1]))


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.order = inputs[1:]


def _gradient_of_arranged(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    return _from_blocks(grad, *ctx.order), None, None, None


def _gradient_of_restored(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    return _to_blocks(grad, *ctx.order), None, None, None


def block_sums_reference(tokens: Tensor, block_tokens: int) -> Tensor:
    """block_sums in PyTorch's own operations."""
    return tokens.unflatten(-2, (tokens.shape[-2] // block_tokens, block_tokens)).sum(dim=-2)


def _fake_sums(tokens: Tensor, block_tokens: int) -> Tensor:
    return tokens.new_empty((*tokens.shape[:-2], tokens.shape[-2] // block_tokens, tokens.shape[-1]))


def _setup_sums(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.block_tokens = inputs[1]


def _gradient_of_sums(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    return grad.repeat_interleave(ctx.block_tokens, dim=-2), None


_SCHEMA = "(Tensor tokens, SymInt[] grid_size, SymInt[] block_size, SymInt[] offset) -> Tensor"
_to_blocks = define(
    "to_blocks", _SCHEMA, compute=_arrange, fake=_fake_arranged, setup=_setup, gradient=_gradient_of_arranged
)
_from_blocks = define(
    "from_blocks", _SCHEMA, compute=_restore, fake=_fake_restored, setup=_setup, gradient=_gradient_of_restored
)
_block_sums = define(
    "block_sums",
    "(Tensor tokens, SymInt block_tokens) -> Tensor",
    compute=block_sums_reference,
    fake=_fake_sums,
    setup=_setup_sums,
    gradient=_gradient_of_sums,
)
