"""Which module gets which mechanism: a mechanism, or patterns on module names."""

from collections.abc import Iterable, Mapping, Sequence
from fnmatch import fnmatchcase

from regard.mixers import parse_mechanism
from regard.specs import Composed, Mechanism, nearest

__all__ = ["Choice", "convertible"]

_SHOWN = 5


class Choice:
    """Reads `mechanism` and `where` of `convert`.

    Args:
        mechanism: a mechanism, its text form, or {pattern: mechanism, text form or None}, where the first pattern that
            matches a module's name wins and None leaves the module.
        where: a pattern or several; modules that match none are left.

    Raises:
        TypeError: neither text nor a Mechanism nor a mapping, or a pattern that is no text.
        ValueError: unknown mechanism, one that cannot be converted to, no pattern at all.
    """

    def __init__(
        self,
        mechanism: Mechanism | str | Mapping[str, Mechanism | str | None],
        where: str | Sequence[str] | None,
    ) -> None:
        if isinstance(mechanism, Mapping):
            if not mechanism:
                raise ValueError("mechanism: the dict of patterns is empty; give at least one, such as {'*': 'knn'}")
            _check_texts("mechanism", mechanism)
            self.mechanisms = {p: None if m is None else convertible(m) for p, m in mechanism.items()}
            self.patterns = {"mechanism": tuple(mechanism)}
        else:
            self.mechanisms = {"*": convertible(mechanism)}
            self.patterns = {}
        self.where: tuple[str, ...] | None = None
        if where is not None:
            self.where = (where,) if isinstance(where, str) else tuple(where)
            if not self.where:
                raise ValueError("where: no pattern given; leave it out to convert all attention modules")
            _check_texts("where", self.where)
            self.patterns["where"] = self.where

    def of(self, name: str) -> Mechanism | str:
        """The mechanism of a module, or why it gets none."""
        if self.where is not None and not any(fnmatchcase(name, pattern) for pattern in self.where):
            return "not selected by `where`"
        for pattern, mechanism in self.mechanisms.items():
            if fnmatchcase(name, pattern):
                return mechanism if mechanism is not None else f"left by the pattern {pattern!r}"
        return "matched by no pattern"

    def check(self, names: Iterable[str]) -> None:
        """Raise ValueError if a pattern matches none of the attention modules' names."""
        known = list(names)
        for argument, patterns in self.patterns.items():
            for pattern in patterns:
                if not any(fnmatchcase(name, pattern) for name in known):
                    shown = ", ".join(map(repr, nearest(pattern, known)[:_SHOWN]))
                    raise ValueError(f"{argument}: no attention module is named {pattern!r}; the nearest: {shown}")


def convertible(text: Mechanism | str) -> Mechanism:
    """A mechanism, known to need no trained weights of its own.

    Raises:
        ValueError: it does, or a modifier is part of it; or as parse_mechanism. TypeError: as parse_mechanism.
    """
    mechanism = parse_mechanism(text)
    if isinstance(mechanism, Composed):
        raise ValueError(
            f"mechanism: '{mechanism.label}' changes more than attention; convert to '{mechanism.base.label}', and "
            "apply the modifiers by themselves (regard.reorganize for evit) or build a model with its attn_layer"
        )
    if not mechanism.converts:
        raise ValueError(
            f"mechanism: '{mechanism.label}' needs trained weights of its own; build a model with its attn_layer "
            "instead of converting one"
        )
    return mechanism


def _check_texts(argument: str, patterns: Iterable[object]) -> None:
    for pattern in patterns:
        if not isinstance(pattern, str):
            raise TypeError(f"{argument}: patterns are texts such as 'blocks.3.*', got {type(pattern).__name__}")
