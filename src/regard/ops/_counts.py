"""Options that are a number (int) or a fraction (float) of something."""

import math
import numbers

import torch

__all__ = ["share_of"]

# Products such as 0.07 * 100 come out one rounding above the whole number that was meant.
_ROUNDING = 1.0 - 2.0**-51


def share_of(count: int | float, whole: int) -> int:
    """An int is clamped to `whole`; a fraction f gives ceil(f * whole)."""
    if isinstance(count, numbers.Integral | torch.SymInt):
        return min(count, whole)  # type: ignore[call-overload, no-any-return]
    return min(math.ceil(count * whole * _ROUNDING), whole)
