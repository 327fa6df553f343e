"""Options that are a number (int) or a fraction (float) of something."""

import math
import numbers
from fractions import Fraction

import torch

from regard.ops._dispatch import constant_when_traced

__all__ = ["check_count", "share_of"]

# Products such as 0.07 * 100 come out one rounding above the whole number that was meant.
_ROUNDING = 1.0 - 2.0**-51


def share_of(count: int | float, whole: int) -> int:
    """An int is clamped to `whole`; a fraction f gives ceil(f * whole)."""
    is_count = isinstance(count, numbers.Integral | torch.SymInt)
    if isinstance(whole, torch.SymInt):  # a size that torch.export leaves open
        if not is_count:
            above, below = _fraction(float(count))
            count = (above * whole + below - 1) // below
        return torch.sym_min(count, whole)  # type: ignore[return-value]
    if is_count:
        return min(count, whole)  # type: ignore[return-value]
    return min(math.ceil(count * whole * _ROUNDING), whole)


@constant_when_traced
def _fraction(share: float) -> tuple[int, int]:
    """Numerator and denominator. For sizes that are not known yet: exporters have whole numbers only."""
    found = Fraction(share).limit_denominator(10**9)
    return (found if found or not share else Fraction(1, 10**9)).as_integer_ratio()


def check_count(name: str, count: int, least: int = 1) -> None:
    """Raise TypeError unless `count` is an int, ValueError unless it is at least `least`."""
    if isinstance(count, bool) or not isinstance(count, numbers.Integral | torch.SymInt):
        raise TypeError(f"{name}: expected an int, got {type(count).__name__}")
    if count < least:
        raise ValueError(f"{name}: expected at least {least}, got {count}")
