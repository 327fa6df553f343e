"""What is simulated: a pattern of windows, and the tiles in which a kernel walks over it."""

from collections.abc import Sequence
from dataclasses import dataclass

__all__ = ["NeighborhoodPattern", "PatternError", "Tiling"]

PerAxis = int | Sequence[int]


class PatternError(ValueError):
    """A pattern or tiling that cannot be.

    Args:
        argument: its name, such as "kernel_size".
        problem: what was received, and what is allowed.
    """

    def __init__(self, argument: str, problem: str) -> None:
        super().__init__(f"{argument}: {problem}")
        self.argument = argument
        self.problem = problem


@dataclass(frozen=True)
class NeighborhoodPattern:
    """Neighborhood attention over a grid, named as in `neighborhood_attention`; one number stands for all axes.

    Args:
        grid_size: tokens along each of 1 to 3 axes.
        kernel_size: window along each axis, in keys; times the dilation at most the grid.
        stride: how many queries in a row share a window, 1 ... kernel_size.
        dilation: step between the keys of a window.
        is_causal: along which axes a query sees nothing behind itself.

    Raises:
        PatternError: a value is out of range; it names the argument, what was received and what is allowed.
    """

    grid_size: tuple[int, ...]
    kernel_size: PerAxis
    stride: PerAxis = 1
    dilation: PerAxis = 1
    is_causal: bool | Sequence[bool] = False

    def __post_init__(self) -> None:
        if isinstance(self.grid_size, int) or not 1 <= len(self.grid_size) <= 3:
            raise PatternError("grid_size", f"expected the tokens along 1 to 3 axes, got {self.grid_size!r}")
        rank = len(self.grid_size)
        object.__setattr__(self, "grid_size", per_axis("grid_size", self.grid_size, rank))
        for name in ("kernel_size", "stride", "dilation"):
            object.__setattr__(self, name, per_axis(name, getattr(self, name), rank))
        causal = self.is_causal
        flags = (causal,) * rank if isinstance(causal, bool) else tuple(causal)
        if len(flags) != rank or not all(isinstance(one, bool) for one in flags):
            raise PatternError("is_causal", f"expected a bool, or one for each of {rank} axes, got {causal!r}")
        object.__setattr__(self, "is_causal", flags)
        for axis, (length, window, stride, dilation, _) in enumerate(self.axes):
            if window * dilation > length:
                raise PatternError(
                    "kernel_size",
                    f"axis {axis}: {window} keys at dilation {dilation} span {window * dilation} of {length} tokens; "
                    "give a smaller window or dilation",
                )
            if stride > window:
                raise PatternError("stride", f"axis {axis}: expected 1 to the window's {window}, got {stride}")

    @property
    def axes(self) -> list[tuple[int, int, int, int, bool]]:
        """(tokens, window, stride, dilation, causal) along each axis."""
        parts = (self.grid_size, self.kernel_size, self.stride, self.dilation, self.is_causal)
        return list(zip(*parts, strict=True))  # type: ignore[arg-type]


@dataclass(frozen=True)
class Tiling:
    """The blocks of queries and keys that a kernel takes at a time.

    Args:
        query, key: tokens along each axis; one number stands for a grid of one axis.
        dynamic: key tiles begin where a query tile's windows begin. Otherwise (static) at whole multiples of the tile.

    Raises:
        PatternError: a value is out of range.
    """

    query: tuple[int, ...]
    key: tuple[int, ...]
    dynamic: bool = False

    def __post_init__(self) -> None:
        for name in ("query", "key"):
            value = getattr(self, name)
            rank = 1 if isinstance(value, int) else len(value)
            object.__setattr__(self, name, per_axis(f"{name}_tile", value, rank))

    def check(self, rank: int) -> None:
        """Raise PatternError unless the tiles have as many axes as the grid."""
        for name in ("query", "key"):
            if len(getattr(self, name)) != rank:
                raise PatternError(f"{name}_tile", f"expected {rank} axes as the grid has, got {getattr(self, name)}")


def per_axis(argument: str, value: PerAxis, rank: int) -> tuple[int, ...]:
    """`value` as one positive int for each axis. Raises PatternError."""
    values = (value,) * rank if isinstance(value, int) else tuple(value)
    if len(values) != rank or any(isinstance(one, bool) or not isinstance(one, int) or one < 1 for one in values):
        raise PatternError(argument, f"expected {rank} whole number{'s' * (rank > 1)} of at least 1, got {value!r}")
    return values
