"""Mechanisms as values: frozen dataclasses with one text form, the same in Python, on the command line and in JSON.

`KNN(topk=0.5)` is written `knn(topk=0.5)`; `knn` alone takes the defaults. What changes a model around its mechanism is
a modifier: `KNN() + Gated()` is written `knn + gated`, and `gated` alone is `dense + gated`. A class stands in the file
of its mixer, reduction or loss, which registers it here.
"""

import ast
import dataclasses
import difflib
from collections.abc import Iterable
from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

from regard.cards import Card

if TYPE_CHECKING:
    from torch import Tensor, nn

__all__ = [
    "Composed",
    "Mechanism",
    "Modifier",
    "nearest",
    "parse",
    "quiet",
    "register",
    "registered",
    "registered_modifiers",
]

# What registers mechanisms and modifiers when it is imported; a text may name any of them.
_ROOMS = ("regard.mixers", "regard.reduction", "regard.losses")
_DENSE = "dense"
_MECHANISMS: dict[str, type["Mechanism"]] = {}
_MODIFIERS: dict[str, type["Modifier"]] = {}


def quiet(default: Any) -> Any:
    """A field of a value that its text form leaves out while it has its default."""
    return dataclasses.field(default=default, metadata={"quiet": True})


class _Value:
    """A frozen dataclass whose fields are options, with its text form.

    The text form holds all options, but for those declared by `quiet` that have their default value: what a mechanism
    learns later does not change the text of what it could before.

    Two are equal if their text forms are: `knn(topk=1)` is one key and `knn(topk=1.0)` all of them, though 1 == 1.0. So
    subclasses are declared with eq=False.
    """

    card: ClassVar[Card]

    @property
    def name(self) -> str:
        return self.card.name

    def __str__(self) -> str:
        shown = [f for f in dataclasses.fields(self) if not (f.metadata.get("quiet") and self._is_default(f))]  # type: ignore[arg-type]
        options = ", ".join(f"{f.name}={getattr(self, f.name)!r}" for f in shown)
        return f"{self.name}({options})" if options else self.name

    @property
    def label(self) -> str:
        """The text form without the options that have their default values: what a figure has room for."""
        fields = [f for f in dataclasses.fields(self) if not self._is_default(f)]  # type: ignore[arg-type]
        options = ", ".join(f"{f.name}={getattr(self, f.name)!r}" for f in fields)
        return f"{self.name}({options})" if options else self.name

    @property
    def options(self) -> dict[str, Any]:
        """The options and their values."""
        return {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}  # type: ignore[arg-type]

    def _is_default(self, field: "dataclasses.Field[Any]") -> bool:
        return repr(getattr(self, field.name)) == repr(field.default)

    def __eq__(self, other: object) -> bool:
        return type(self) is type(other) and str(self) == str(other)

    def __hash__(self) -> int:
        return hash(str(self))


class Modifier(_Value):
    """Base of the values that change a model around its mechanism: a gate, a loss, fewer tokens.

    Subclasses are frozen dataclasses whose fields are the options. `mechanism + modifier` is a mechanism again.
    """

    def attn_options(self) -> dict[str, Any]:
        """What the mixer's constructor is given: `gated=True`."""
        return {}

    def apply(self, model: "nn.Module") -> None:
        """Change a model that was built with the mechanism, in place.

        Raises:
            ValueError: the model is none that this modifier can change; it is left as it was.
        """


class Mechanism(_Value):
    """Base of every mechanism value. Subclasses are frozen dataclasses whose fields are the mechanism's options."""

    @property
    def converts(self) -> bool:
        """True if `attend` needs no weights of its own, so that a trained dense model can be converted."""
        return self.card.converts

    def __add__(self, modifier: Modifier) -> "Composed":
        if not isinstance(modifier, Modifier):
            return NotImplemented
        return Composed(self, (modifier,))

    def attend(
        self,
        query: "Tensor",
        key: "Tensor",
        value: "Tensor",
        *,
        attn_mask: "Tensor | None" = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
        grid_size: tuple[int, ...] | None = None,
        num_prefix_tokens: int = 0,
    ) -> "Tensor":
        """Apply the mechanism's operator, called like scaled_dot_product_attention.

        Args:
            query: (..., H, N, D). key: (..., H_kv, M, D). value: (..., H_kv, M, D_v).
            grid_size: the tokens' grid without the prefix tokens; mechanisms that need none ignore it.
            num_prefix_tokens: how many of the first tokens stand outside the grid.
            The rest is as in torch.nn.functional.scaled_dot_product_attention.
        """
        raise NotImplementedError

    def attn_layer(self, **options: Any) -> "type[nn.Module]":
        """The mixer class with this mechanism's options bound: a timm `attn_layer`.

        Args:
            options: further arguments of the mixer, such as num_prefix_tokens=1.
        """
        raise NotImplementedError

    def apply(self, model: "nn.Module") -> None:
        """Change a model that was built with `attn_layer` as its modifiers ask for, in place; once."""


@dataclass(frozen=True, eq=False)
class Composed(Mechanism):
    """A mechanism and what changes the model around it, `knn(topk=0.5) + gated(kind='headwise')` in text.

    Args:
        base: the mechanism.
        modifiers: applied in this order, none twice.

    Raises:
        ValueError: a modifier is given twice.
    """

    base: Mechanism
    modifiers: tuple[Modifier, ...]

    def __post_init__(self) -> None:
        names = [modifier.name for modifier in self.modifiers]
        for name in names:
            if names.count(name) > 1:
                raise ValueError(f"mechanism: {name!r} is given twice in '{self}'")

    @property
    def card(self) -> Card:  # type: ignore[override]
        """The base's: the modifiers have cards of their own."""
        return self.base.card

    @property
    def name(self) -> str:
        return " + ".join(part.name for part in (self.base, *self.modifiers))

    def __str__(self) -> str:
        return " + ".join(map(str, (self.base, *self.modifiers)))

    @property
    def label(self) -> str:
        return " + ".join(part.label for part in (self.base, *self.modifiers))

    @property
    def converts(self) -> bool:
        return False

    def __add__(self, modifier: Modifier) -> "Composed":
        if not isinstance(modifier, Modifier):
            return NotImplemented
        return Composed(self.base, (*self.modifiers, modifier))

    def attend(self, query: "Tensor", key: "Tensor", value: "Tensor", **options: Any) -> "Tensor":
        raise ValueError(
            f"mechanism: '{self}' changes the model, not only its attention; attend with '{self.base}', or build a "
            "model with its attn_layer and apply it"
        )

    def attn_layer(self, **options: Any) -> "type[nn.Module]":
        asked: dict[str, Any] = {}
        for modifier in self.modifiers:
            asked |= modifier.attn_options()
        return self.base.attn_layer(**{**asked, **options})

    def apply(self, model: "nn.Module") -> None:
        for modifier in self.modifiers:
            modifier.apply(model)


_Registered = type[Mechanism] | type[Modifier]
_R = TypeVar("_R", bound=_Registered)


def register(value: _R) -> _R:
    """Class decorator: make a mechanism or a modifier known by its card's name."""
    if issubclass(value, Modifier):
        _MODIFIERS[value.card.name] = value
    else:
        _MECHANISMS[value.card.name] = value
    return value


def registered() -> dict[str, type[Mechanism]]:
    """The known mechanisms by name: dense attention, the measure of the others, then as they were registered."""
    _import_rooms()
    return {_DENSE: _MECHANISMS[_DENSE], **_MECHANISMS}


def registered_modifiers() -> dict[str, type[Modifier]]:
    """The known modifiers by name, in the order in which they were registered."""
    _import_rooms()
    return dict(_MODIFIERS)


def _import_rooms() -> None:
    for room in _ROOMS:
        import_module(room)


def nearest(name: str, known: Iterable[str]) -> list[str]:
    """The known names, those most like `name` first."""
    return sorted(known, key=lambda other: -difflib.SequenceMatcher(None, name.lower(), other.lower()).ratio())


def parse(text: str | Mechanism | Modifier) -> Mechanism:
    """Read a mechanism's text form.

    Args:
        text: `knn`, `knn(topk=0.5)`, `knn + gated(kind='headwise')`; `gated` alone is `dense + gated`. A Mechanism is
            returned as it is, and a Modifier put around dense attention.

    Raises:
        ValueError: the text is no call with keyword literals, the name or an option is unknown (the known ones are
            listed, nearest first), or an option's value is refused.
        TypeError: `text` is neither text nor a Mechanism.
    """
    if isinstance(text, Mechanism):
        return text
    if isinstance(text, Modifier):
        return registered()[_DENSE]() + text
    if not isinstance(text, str):
        raise TypeError(f"mechanism: expected text such as 'knn(topk=0.5)' or a Mechanism, got {type(text).__name__}")
    known: dict[str, _Registered] = {**registered(), **registered_modifiers()}
    parts = [_value(node, text, known) for node in _parts(text)]
    first = parts[0]
    base, rest = (first, parts[1:]) if isinstance(first, Mechanism) else (registered()[_DENSE](), parts)
    for part in rest:
        if isinstance(part, Mechanism):
            raise ValueError(f"mechanism: {text!r} adds {part.name!r}; only modifiers are added: {_listed(_MODIFIERS)}")
        base = base + part
    return base


def _listed(names: Iterable[str], name: str = "") -> str:
    return ", ".join(nearest(name, names)) or "none"


def _value(node: ast.expr, text: str, known: dict[str, _Registered]) -> Mechanism | Modifier:
    """The mechanism or modifier that one call of the text names."""
    name, options = _call(node, text)
    if name not in known:
        raise ValueError(f"mechanism: unknown name {name!r} in {text!r}; known: {_listed(known, name)}")
    fields = [f.name for f in dataclasses.fields(known[name])]  # type: ignore[arg-type]
    for option in options:
        if option not in fields:
            allowed = _listed(fields, option)
            raise ValueError(f"mechanism: {name!r} has no option {option!r} in {text!r}; its options: {allowed}")
    return known[name](**options)


def _problem(text: str) -> str:
    return f"mechanism: cannot read {text!r}; write a name with keyword options, such as 'knn(topk=0.5)'"


def _parts(text: str) -> list[ast.expr]:
    """`knn(topk=0.5) + gated` -> its calls, from left to right."""
    try:
        node = ast.parse(text.strip(), mode="eval").body
    except (SyntaxError, ValueError) as error:
        raise ValueError(_problem(text)) from error
    parts = []
    while isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        parts.append(node.right)
        node = node.left
    return [node, *reversed(parts)]


def _call(node: ast.expr, text: str) -> tuple[str, dict[str, Any]]:
    """`knn(topk=0.5)` -> ("knn", {"topk": 0.5})."""
    if isinstance(node, ast.Name):
        return node.id, {}
    if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Name) or node.args:
        raise ValueError(_problem(text))
    try:
        options = {str(keyword.arg): ast.literal_eval(keyword.value) for keyword in node.keywords if keyword.arg}
    except ValueError as error:
        raise ValueError(_problem(text)) from error
    if len(options) != len(node.keywords):
        raise ValueError(_problem(text))
    return node.func.id, options
