"""What a model tells of its tokens: which stand outside the grid, and the grid if it can be no other."""

import math
import re
from collections.abc import Sequence

from torch import nn

from regard.conversion.seam import Layout

__all__ = ["layout_of"]

_PREFIX = re.compile(r"(cls|class|dist|distillation|reg|register)_(token|tokens|embedding)(_\d+)?")


def layout_of(around: Sequence[nn.Module], tokens: int) -> Layout:
    """The layout of an attention module's tokens.

    A model's prefix tokens need not be among the tokens of each of its attention modules (TNT's pixels, CaiT's first
    layers): they are, unless the tokens make a grid only without them.

    Args:
        around: the modules that hold it, outermost first, and the module itself.
        tokens: how many keys one call of it has.
    """
    grid = next((g for outer in reversed(around) if (g := _fixed_grid(outer)) is not None), None)
    prefix = next((p for outer in reversed(around) if (p := _prefix_tokens(outer)) is not None), 0)
    if not _makes_grid(tokens - prefix, grid) and _makes_grid(tokens, grid):
        prefix = 0
    return Layout(prefix, grid)


def _prefix_tokens(module: nn.Module) -> int | None:
    """By timm's attribute, else by the learned tokens of the module and of its embedding; None if it says nothing."""
    known = getattr(module, "num_prefix_tokens", None)
    if isinstance(known, int):
        return known
    found = {}
    for owner in (module, *module.children()):
        for name, parameter in owner.named_parameters(recurse=False):
            if match := _PREFIX.fullmatch(name):
                # CrossViT has one class token a branch, and each of its layers sees one branch.
                found[match[1]] = parameter.shape[-2] if parameter.dim() > 1 else 1
    return sum(found.values()) if found else None


def _fixed_grid(module: nn.Module) -> tuple[int, ...] | None:
    """The grid of patches, if the model takes images of one size only."""
    embed = getattr(module, "patch_embed", None)
    grid = getattr(embed, "grid_size", None)
    return tuple(grid) if grid is not None and getattr(embed, "strict_img_size", False) else None


def _makes_grid(cells: int, grid: tuple[int, ...] | None) -> bool:
    return cells > 0 and (math.isqrt(cells) ** 2 == cells or (grid is not None and cells == math.prod(grid)))
