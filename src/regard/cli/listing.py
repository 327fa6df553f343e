"""`regard list`: the mechanisms and their cards. (A module called `list` would hide the builtin in this package.)"""

import dataclasses
import json
import sys
from dataclasses import dataclass
from typing import Any

__all__ = ["List"]

_FORM_WIDTH = 24


@dataclass(frozen=True)
class List:
    """List the mechanisms, and what can be added to them, with their cards.

    Args:
        json: Print JSON instead of a table.
    """

    json: bool = False

    def __call__(self) -> int:
        entries = _entries()
        if self.json:
            print(json.dumps(entries, indent=1))
        else:
            _print_table(entries)
        return 0


def _entries() -> list[dict[str, Any]]:
    from regard.mixers import mechanisms, modifiers

    entries = []
    for name, mechanism in {**mechanisms(), **modifiers()}.items():
        options = {
            field.name: None if field.default is dataclasses.MISSING else field.default
            for field in dataclasses.fields(mechanism)  # type: ignore[arg-type]
        }
        entries.append({**dataclasses.asdict(mechanism.card), "name": name, "options": options})
    return entries


def _print_table(entries: list[dict[str, Any]]) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for heading in ("text form", "paper", "cost in N", "which keys, how strongly"):
        table.add_column(heading, no_wrap=heading == "text form", overflow="fold")
    for one in entries:
        options = [f"{name}={value!r}" for name, value in one["options"].items()]
        name = f"+ {one['name']}" if one["modifies"] else one["name"]
        form = f"{name}({', '.join(options)})" if options else name
        if len(form) > _FORM_WIDTH:  # one option a line: the terminal may be 80 columns wide
            form = ",\n  ".join([f"{name}(\n  {options[0]}", *options[1:]]) + ")"
        table.add_row(form, f"{one['title']} ({one['venue']}, {one['arxiv']})", one["cost"], one["summary"])
    console = Console(file=sys.stdout, highlight=False, markup=False)
    console.print(table)
    console.print("The text form is what --mechanisms takes; a name alone takes the options shown.")
    console.print("What begins with + is added to any of the others: 'knn(topk=0.5) + gated'.")
