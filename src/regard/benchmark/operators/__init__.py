"""The operators that `regard bench` measures. One more: a file with an ENTRY, and its name in the list below."""

import difflib
from collections.abc import Sequence
from importlib import import_module

from regard.benchmark.entry import Entry

__all__ = ["OPERATORS", "entries_of"]

OPERATORS = ("knn", "multipole", "neighborhood", "routed", "density_peaks", "kmeans")


def entries_of(names: Sequence[str] = ()) -> list[Entry]:
    """The operators of these names in the order given; all of them if there are none.

    Raises:
        ValueError: an unknown name, or one that is given twice.
    """
    for place, name in enumerate(names):
        if name not in OPERATORS:
            nearest = difflib.get_close_matches(name, OPERATORS, len(OPERATORS), 0.0)
            raise ValueError(f"unknown name {name!r}; known: {', '.join(nearest)}")
        if name in names[:place]:
            raise ValueError(f"{name} is given twice")
    found: list[Entry] = [import_module(f"{__name__}.{name}").ENTRY for name in names or OPERATORS]
    return found
