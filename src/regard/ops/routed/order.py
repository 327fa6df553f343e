"""Tokens of a grid in the order of its blocks: windows, regions and halos become runs of tokens."""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor
from torch.nn.functional import pad

from regard.ops._counts import check_count

__all__ = ["BlockOrder"]


@dataclass(frozen=True)
class BlockOrder:
    """Cuts a grid of tokens into blocks of one size, each a run of consecutive tokens after `arrange`.

        windows = BlockOrder((56, 56), (7, 7))
        query, key, value = (windows.arrange(t) for t in (query, key, value))
        own = torch.arange(windows.blocks)[:, None]
        output = routed_attention(
            query, key, value, blocks=own, query_block=49, key_block=49, attn_mask=windows.mask()
        )
        output = windows.restore(output)

    Where blocks do not fit, the grid is padded to whole ones; `mask` hides the padding. Shifted windows are windows
    with an offset.

    Args:
        grid_size: tokens along each axis, of any rank.
        block_size: tokens of a block along each axis; an int: the same along all.
        offset: how many tokens of padding stand before the first along each axis, less than the block's own; an int:
            the same along all.

    Raises:
        TypeError: a size is no int.
        ValueError: sizes of different lengths, a block of no tokens, or an offset of a block or more.
    """

    grid_size: tuple[int, ...]
    block_size: int | tuple[int, ...]
    offset: int | tuple[int, ...] = 0

    def __post_init__(self) -> None:
        grid = tuple(self.grid_size)
        if not grid:
            raise ValueError("grid_size: expected at least one axis, got ()")
        for size in grid:
            check_count("grid_size", size, least=0)
        block = _along_axes("block_size", self.block_size, grid, least=1)
        offset = _along_axes("offset", self.offset, grid, least=0)
        for before, size in zip(offset, block, strict=True):
            if before >= size:
                raise ValueError(f"offset: {offset} reaches the block_size {block}; give less than a block")
        for name, value in (("grid_size", grid), ("block_size", block), ("offset", offset)):
            object.__setattr__(self, name, value)

    @property
    def block_grid(self) -> tuple[int, ...]:
        """How many blocks stand along each axis."""
        return tuple([-(-(size + before) // block) for size, block, before in self._axes()])

    @property
    def blocks(self) -> int:
        """How many blocks there are."""
        return math.prod(self.block_grid)

    @property
    def block_tokens(self) -> int:
        """How many tokens a block has, padding included: routed_attention's query_block or key_block."""
        return math.prod([block for _, block, _ in self._axes()])

    @property
    def padded(self) -> bool:
        """Whether some blocks hold padding; True where a trace leaves it open, for to ask would fix the sizes."""
        return not _surely_equal(self.blocks * self.block_tokens, math.prod(self.grid_size))

    def arrange(self, tokens: Tensor) -> Tensor:
        """(..., N, D) in the grid's order -> (..., blocks * block_tokens, D), block after block; padding is zero."""
        if tokens.dim() < 2 or tokens.shape[-2] != math.prod(self.grid_size):
            raise ValueError(f"tokens: expected (..., {math.prod(self.grid_size)}, D), got {tuple(tokens.shape)}")
        lead, rank = tokens.dim() - 2, len(self.grid_size)
        x = tokens.unflatten(-2, self.grid_size)
        if self.padded:
            x = pad(x, (0, 0, *itertools.chain(*reversed(self._padding()))))
        for axis, (count, (_, block, _)) in enumerate(zip(self.block_grid, self._axes(), strict=True)):
            x = x.unflatten(lead + 2 * axis, (count, block))
        inside = [lead + 2 * axis + 1 for axis in range(rank)]
        outside = [lead + 2 * axis for axis in range(rank)]
        return x.permute(*range(lead), *outside, *inside, x.dim() - 1).flatten(lead, -2)

    def restore(self, tokens: Tensor) -> Tensor:
        """The inverse of `arrange`, without the padding."""
        places = self.blocks * self.block_tokens
        if tokens.dim() < 2 or tokens.shape[-2] != places:
            raise ValueError(f"tokens: expected (..., {places}, D), got {tuple(tokens.shape)}")
        lead, rank = tokens.dim() - 2, len(self.grid_size)
        x = tokens.unflatten(-2, (*self.block_grid, *(block for _, block, _ in self._axes())))
        x = x.permute(
            *range(lead), *(lead + place for axis in range(rank) for place in (axis, rank + axis)), x.dim() - 1
        )
        for axis, (size, _, before) in enumerate(self._axes()):
            x = x.flatten(lead + axis, lead + axis + 1).narrow(lead + axis, before, size)
        return x.flatten(lead, -2)

    def mask(self, device: torch.device | str | None = None) -> Tensor | None:
        """(1, blocks * block_tokens) boolean for `attn_mask`, False for padding; None where there is no padding."""
        if not self.padded:
            return None
        real = torch.ones(math.prod(self.grid_size), 1, dtype=torch.bool, device=device)
        return self.arrange(real).squeeze(-1).unsqueeze(0)

    def _axes(self) -> list[tuple[int, int, int]]:
        """(tokens, of a block, padding before the first) of each axis."""
        sizes = (self.grid_size, self.block_size, self.offset)  # tuples, since __post_init__
        return list(zip(*cast(tuple[tuple[int, ...], ...], sizes), strict=True))

    def _padding(self) -> list[tuple[int, int]]:
        pairs = zip(self.block_grid, self._axes(), strict=True)
        return [(before, count * block - before - size) for count, (size, block, before) in pairs]


def _surely_equal(one: int, other: int) -> bool:
    if not torch.compiler.is_compiling():
        return one == other
    from torch.fx.experimental.symbolic_shapes import statically_known_true  # takes long to import

    return statically_known_true(one == other)


def _along_axes(name: str, given: int | Sequence[int], grid: tuple[int, ...], least: int) -> tuple[int, ...]:
    sizes = tuple(given) if isinstance(given, Sequence) else (given,) * len(grid)
    for size in sizes:
        check_count(name, size, least=least)
    if len(sizes) != len(grid):
        raise ValueError(f"{name}: {sizes} has {len(sizes)} axes, the grid_size {grid} {len(grid)}")
    return sizes
