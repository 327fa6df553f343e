"""Options that are a number (int) or a fraction (float) of something."""

import math
import numbers

import torch

__all__ = ["check_count", "share_of"]

# Products such as 0.07 * 100 come out one rounding above the whole number that was meant.
_ROUNDING = 1.0 - 2.0**-51


def share_of(count: int | float, whole: int) -> int:
    """An int is clamped to `whole`; a fraction f gives ceil(f * whole)."""
    if isinstance(count, numbers.Integral | torch.SymInt):
        return min(count, whole)  # type: ignore[call-overload, no-any-return]
    return min(math.ceil(count * whole * _ROUNDING), whole)


def check_count(name: str, count: int, least: int = 1) -> None:
    """Raise TypeError unless `count` is an int, ValueError unless it is at least `least`."""
    if isinstance(count, bool) or not isinstance(count, numbers.Integral | torch.SymInt):
        raise TypeError(f"{name}: expected an int, got {type(count).__name__}")
    if count < least:
        raise ValueError(f"{name}: expected at least {least}, got {count}")
