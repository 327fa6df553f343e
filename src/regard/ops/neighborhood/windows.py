"""Which keys a query sees: the windows of neighborhood attention, one axis of the grid at a time."""

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["BORDERS", "AxisWindows", "Axis", "Pattern", "Windows", "axis_windows", "windows_of"]

BORDERS = ("shift", "mask", "zeropad", "replicate")


class Axis(NamedTuple):
    """One axis of the grid: how long it is, and the window along it."""

    length: int
    kernel_size: int
    dilation: int
    stride: int
    is_causal: bool


@dataclass(frozen=True)
class Pattern:
    """The windows of a grid.

    Args:
        grid_size, kernel_size, dilation, stride, is_causal: one entry an axis.
        border: one of BORDERS.
    """

    grid_size: tuple[int, ...]
    kernel_size: tuple[int, ...]
    dilation: tuple[int, ...]
    stride: tuple[int, ...]
    is_causal: tuple[bool, ...]
    border: str

    def axes(self) -> Iterator[Axis]:
        parts = (self.grid_size, self.kernel_size, self.dilation, self.stride, self.is_causal)
        return itertools.starmap(Axis, zip(*parts, strict=True))

    @property
    def keys(self) -> int:
        """The places of a window, those beyond the border included."""
        return math.prod(self.kernel_size)

    @property
    def offsets(self) -> int:
        """Entries of a head's relative position bias."""
        return math.prod([2 * size - 1 for size in self.kernel_size])  # a list: Dynamo takes no generator

    def options(self) -> tuple[list[int], list[int], list[int], list[int], list[int], str]:
        """As the operators' schema has it."""
        causal = [int(flag) for flag in self.is_causal]
        return list(self.grid_size), list(self.kernel_size), list(self.dilation), list(self.stride), causal, self.border


class AxisWindows(NamedTuple):
    """The windows along one axis of length L with kernel size w, (L, w) each.

    Args:
        place: coordinates of the keys; of a place beyond the border the nearest one of the same dilation group.
        offset: (key - query) / dilation + w - 1, of the place itself, before it is brought back into the grid.
        absent: places that do not count: outside (where the border hides those), or later than a causal query.
        zero: places that count as a key of zeros.
    """

    place: Tensor
    offset: Tensor
    absent: Tensor
    zero: Tensor


def axis_windows(axis: Axis, border: str, device: torch.device | None = None) -> AxisWindows:
    """The windows along one axis: NATTEN's rule (arXiv 2504.16922) for border="shift".

    With dilation d the axis falls into d groups, coordinates x = g + d i, each an axis of its own. `stride` consecutive
    queries share the window of one of them, the leader: the middle one (right of the middle for an even stride), or the
    last of a causal axis. The window has w // 2 keys before its leader, a causal one w - 1, and:

    - "shift" moves a window that would leave the group back into it, and takes no leader beyond its end; a window
      larger than its group is cut down to it. (NATTEN refuses w d > L.)
    - Otherwise the group is thought to go on beyond its ends. What lies there does not count ("mask"), is a key of
      zeros ("zeropad"), or is the key at the end ("replicate").
    """
    length, width, dilation, stride, is_causal = axis
    x = torch.arange(length, device=device)
    group, own = x % dilation, x // dilation
    count = ((length - 1 - group) // dilation + 1).unsqueeze(1)
    leader = own // stride * stride + (stride - 1 if is_causal else stride // 2)
    own, leader = own.unsqueeze(1), leader.unsqueeze(1)
    before = width - 1 if is_causal else width // 2
    if border == "shift":
        start = torch.minimum(torch.minimum(leader, count - 1) - before, count - width).clamp(min=0)
    else:
        start = leader - before
    place = start + torch.arange(width, device=device)
    outside = (place < 0) | (place >= count)
    absent = place > own if is_causal else torch.zeros_like(outside)
    zero = outside & ~absent if border == "zeropad" else torch.zeros_like(outside)
    if border in ("shift", "mask"):
        absent = absent | outside
    inside = torch.minimum(place.clamp(min=0), count - 1) * dilation + group.unsqueeze(1)
    return AxisWindows(inside, place - own + width - 1, absent, zero)


class Windows(NamedTuple):
    """The windows of some queries, (R, K) each: AxisWindows of all axes joined, the last axis running fastest.

    Args:
        key: indices of keys in the flattened grid. offset: indices into a head's flattened bias.
    """

    key: Tensor
    offset: Tensor
    absent: Tensor
    zero: Tensor


def windows_of(pattern: Pattern, cells: Tensor) -> Windows:
    """The windows of the queries at `cells` (R,) of the flattened grid."""
    joined: Windows | None = None
    coordinates = []
    for size in reversed(pattern.grid_size):
        coordinates.append(cells % max(size, 1))
        cells = cells // max(size, 1)
    for axis, x in zip(pattern.axes(), reversed(coordinates), strict=True):
        along = Windows(*(table[x] for table in axis_windows(axis, pattern.border, cells.device)))
        joined = along if joined is None else _product(joined, along, axis)
    if joined is None:
        raise ValueError("grid_size: a grid has at least one axis")
    # No place both counts and does not.
    return joined._replace(zero=joined.zero & ~joined.absent)


def _product(outer: Windows, inner: Windows, axis: Axis) -> Windows:
    def join(a: Tensor, b: Tensor, scale: int) -> Tensor:
        return (a.unsqueeze(2) * scale + b.unsqueeze(1)).flatten(1)

    def either(a: Tensor, b: Tensor) -> Tensor:
        return (a.unsqueeze(2) | b.unsqueeze(1)).flatten(1)

    return Windows(
        join(outer.key, inner.key, axis.length),
        join(outer.offset, inner.offset, 2 * axis.kernel_size - 1),
        either(outer.absent, inner.absent),
        either(outer.zero, inner.zero),
    )
