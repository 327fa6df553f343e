"""Mechanisms' names where their whole texts have no room."""

import dataclasses
import json
import textwrap
from typing import Any

from regard.results import Comparison

__all__ = ["labelled", "narrow"]


def narrow(mechanism: str, width: int) -> str:
    """A mechanism's text on lines of `width` characters: broken between parts and options, those left open dropped."""
    parts = mechanism.split(" + ")
    if len(mechanism) > width and len(parts) > 1:
        return "\n+ ".join(narrow(part, width) for part in parts)
    if len(mechanism) <= width or "(" not in mechanism:
        return mechanism
    name, options = mechanism.split("(", 1)
    told = ", ".join(option for option in options[:-1].split(", ") if not option.endswith("=None"))
    return "\n".join([f"{name}(", *textwrap.wrap(f"{told})", width, break_long_words=False)])


def labelled(comparison: Comparison) -> Comparison:
    """The comparison with `labels` in place of mechanisms' texts; what each stands for is told among its notes."""
    labels = comparison.labels
    if not labels:
        return comparison
    command, notes = comparison.command, list(comparison.notes)
    short = Comparison.from_json(json.dumps(_renamed(json.loads(comparison.to_json()), labels)))
    notes += [f"{label} stands for {text}." for text, label in labels.items() if label != text]
    return dataclasses.replace(short, labels={}, command=command, notes=notes)


def _renamed(value: Any, labels: dict[str, str]) -> Any:
    if isinstance(value, str):
        return labels.get(value, value)
    if isinstance(value, list):
        return [_renamed(one, labels) for one in value]
    if isinstance(value, dict):
        return {labels.get(key, key): _renamed(one, labels) for key, one in value.items()}
    return value
