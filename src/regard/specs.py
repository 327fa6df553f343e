"""Mechanisms as values: frozen dataclasses with one text form, the same in Python, on the command line and in JSON.

`KNN(topk=0.5)` is written `knn(topk=0.5)`; `knn` alone takes the defaults. A mechanism's class stands in the file of
its mixer (`regard/mixers/`), which registers it here.
"""

import ast
import dataclasses
import difflib
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, ClassVar

from regard.cards import Card

if TYPE_CHECKING:
    from torch import Tensor, nn

__all__ = ["Mechanism", "nearest", "parse", "quiet", "register", "registered"]

_REGISTRY: dict[str, type["Mechanism"]] = {}


def quiet(default: Any) -> Any:
    """A field of a mechanism that its text form leaves out while it has its default."""
    return dataclasses.field(default=default, metadata={"quiet": True})


class Mechanism:
    """Base of every mechanism value. Subclasses are frozen dataclasses whose fields are the mechanism's options.

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

    def _is_default(self, field: "dataclasses.Field[Any]") -> bool:
        return repr(getattr(self, field.name)) == repr(field.default)

    def __eq__(self, other: object) -> bool:
        return type(self) is type(other) and str(self) == str(other)

    def __hash__(self) -> int:
        return hash(str(self))

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


def register(mechanism: type[Mechanism]) -> type[Mechanism]:
    """Class decorator: make a mechanism known by its card's name."""
    _REGISTRY[mechanism.card.name] = mechanism
    return mechanism


def registered() -> dict[str, type[Mechanism]]:
    """The known mechanisms by name, in the order in which they were registered."""
    return dict(_REGISTRY)


def nearest(name: str, known: Iterable[str]) -> list[str]:
    """The known names, those most like `name` first."""
    return sorted(known, key=lambda other: -difflib.SequenceMatcher(None, name.lower(), other.lower()).ratio())


def parse(text: "str | Mechanism") -> Mechanism:
    """Read a mechanism's text form.

    Args:
        text: `knn`, `knn(topk=0.5)`, or a Mechanism, which is returned as it is.

    Raises:
        ValueError: the text is no call with keyword literals, the name or an option is unknown (the known ones are
            listed, nearest first), or an option's value is refused.
        TypeError: `text` is neither text nor a Mechanism.
    """
    if isinstance(text, Mechanism):
        return text
    if not isinstance(text, str):
        raise TypeError(f"mechanism: expected text such as 'knn(topk=0.5)' or a Mechanism, got {type(text).__name__}")
    name, options = _split(text)
    if name not in _REGISTRY:
        raise ValueError(f"mechanism: unknown name {name!r} in {text!r}; known: {', '.join(nearest(name, _REGISTRY))}")
    mechanism = _REGISTRY[name]
    known = [f.name for f in dataclasses.fields(mechanism)]  # type: ignore[arg-type]
    for option in options:
        if option not in known:
            allowed = ", ".join(nearest(option, known)) if known else "none"
            raise ValueError(f"mechanism: {name!r} has no option {option!r} in {text!r}; its options: {allowed}")
    return mechanism(**options)


def _split(text: str) -> tuple[str, dict[str, Any]]:
    """`knn(topk=0.5)` -> ("knn", {"topk": 0.5})."""
    problem = f"mechanism: cannot read {text!r}; write a name with keyword options, such as 'knn(topk=0.5)'"
    try:
        node = ast.parse(text.strip(), mode="eval").body
    except (SyntaxError, ValueError) as error:
        raise ValueError(problem) from error
    if isinstance(node, ast.Name):
        return node.id, {}
    if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Name) or node.args:
        raise ValueError(problem)
    try:
        options = {str(keyword.arg): ast.literal_eval(keyword.value) for keyword in node.keywords if keyword.arg}
    except ValueError as error:
        raise ValueError(problem) from error
    if len(options) != len(node.keywords):
        raise ValueError(problem)
    return node.func.id, options
