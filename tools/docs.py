"""Write the parts of the documentation that the mechanisms' cards hold.

    python tools/docs.py            writes docs/mechanisms.md, docs/mechanisms/<name>.md and the table in README.md
    python tools/docs.py --check    writes nothing; names the files that are not up to date and fails if there are any

A page is the card, followed by hand-written notes from docs/notes/<name>.md where there are any.
"""

import argparse
import dataclasses
import sys
from pathlib import Path

from regard.cards import Card, table
from regard.markdown import markdown_table
from regard.mixers import mechanisms, modifiers
from regard.results import write_text
from regard.specs import Mechanism, Modifier

ROOT = Path(__file__).resolve().parents[1]
BEGIN, END = "<!-- mechanisms -->", "<!-- /mechanisms -->"
NOTICE = (
    "<!-- Written by tools/docs.py from the mechanism's card. Edit src/regard/mixers or docs/notes, then run it. -->"
)


def documents(root: Path) -> dict[Path, str]:
    """Every generated file below `root` with the text that it should hold.

    Raises:
        ValueError: README.md has only one of the two marks that enclose the table.
    """
    known = {**mechanisms(), **modifiers()}
    cards = [mechanism.card for mechanism in known.values()]
    wanted = {root / "docs" / "mechanisms.md": overview(cards)}
    for name, mechanism in known.items():
        notes = root / "docs" / "notes" / f"{name}.md"
        text = notes.read_text(encoding="utf-8").strip() if notes.exists() else ""
        wanted[root / "docs" / "mechanisms" / f"{name}.md"] = page(mechanism, text)
    readme = root / "README.md"
    if readme.exists():
        text = readme.read_text(encoding="utf-8")
        wanted[readme] = with_table(text, table(cards, pages="docs/mechanisms"))
    return wanted


def overview(cards: list[Card]) -> str:
    """docs/mechanisms.md."""
    return f"""{NOTICE}

# Mechanisms

Every mechanism answers three questions: which keys a query sees, how strongly, and what they hand over. Each has one
text form, the same in Python, in every command and in every result file: `knn(topk=0.5)`; the name alone takes the
defaults. What changes a model around its mechanism is added: `knn + gated`; alone it stands around dense attention.

{table(cards, pages="mechanisms")}
*Exact* and *approximate* are judged against the mechanism's own definition, not against dense attention.
"""


def page(mechanism: type[Mechanism] | type[Modifier], notes: str) -> str:
    """docs/mechanisms/<name>.md."""
    card = mechanism.card
    source = f"{card.authors}, *{card.paper}*, {card.venue}"
    source += f", [arXiv {card.arxiv}]({card.paper_link})." if card.arxiv else "."
    parts = [NOTICE, f"# {card.title}", card.summary, source]
    if card.equation:
        parts += [f"$$\n{card.equation}\n$$"]
    parts += [_facts(mechanism)]
    for heading, items in (
        ("Variants", card.variants),
        (f"What is claimed ({card.claims_source})", card.claims),
        ("Where the official code departs", card.quirks),
    ):
        if items:
            parts += [f"## {heading}", _list(items)]
    parts += _evidence(card)
    return "\n\n".join([*parts, *([notes] if notes else [])]) + "\n"


def _facts(mechanism: type[Mechanism] | type[Modifier]) -> str:
    card, default = mechanism.card, mechanism()
    fields = dataclasses.fields(mechanism)  # type: ignore[arg-type]
    if isinstance(default, Mechanism):
        module = f"`regard.{type(default.attn_layer()(8, 1)).__name__}`"
    else:
        module = f"added to any mechanism: `regard.{mechanism.__name__}`"
    facts = {
        "text form": f"`{default}`" + ("" if fields else " (no options)"),
        "module": module,
        "own definition": "computed exactly" if card.exact else "approximated",
        "cost in N tokens": card.cost,
        "tokens' grid": "needed" if card.needs_grid else "not needed",
        "trained dense models": "can be converted" if card.converts else "must be trained with it",
        "weights": "adds parameters to dense attention's" if card.adds_parameters else "the same as dense attention's",
    }
    if card.official:
        licence = f", {card.licence}" if card.licence else ", without a licence"
        facts["official code"] = f"[{card.official}](https://github.com/{card.official}){licence}"
    return markdown_table(["", ""], facts.items()).rstrip()


def _evidence(card: Card) -> list[str]:
    """What this repository shows; nothing is listed that no test or result stands behind."""
    evidence, items = card.evidence, []
    if evidence.identities:
        items.append("Identities, proved by tests: " + "; ".join(evidence.identities) + ".")
    if evidence.parity:
        items.append(f"Parity: {evidence.parity}.")
    if evidence.parameters:
        counts = ", ".join(f"`{name}` {count:,}" for name, count in evidence.parameters.items())
        items.append(f"Parameters, equal to the published code's: {counts}.")
    if evidence.trained:
        items.append(f"Trained: {evidence.trained}.")
    return ["## What is shown here", _list(tuple(items))] if items else []


def _list(items: tuple[str, ...]) -> str:
    return "\n".join(f"- {item}" for item in items)


def with_table(text: str, mechanisms_table: str) -> str:
    """`text` with the table between its marks; unchanged if it has no marks."""
    if BEGIN not in text and END not in text:
        return text
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not (begin and end):
        raise ValueError(f"README.md: the table of mechanisms stands between {BEGIN} and {END}; one of them is missing")
    return f"{before}{BEGIN}\n{mechanisms_table}{END}{after}"


def stale(root: Path) -> list[Path]:
    """Generated files that differ from what they should hold, and pages of mechanisms that are no more."""
    wanted = documents(root)
    differing = [path for path, text in wanted.items() if not path.exists() or path.read_text(encoding="utf-8") != text]
    return differing + [path for path in sorted((root / "docs" / "mechanisms").glob("*.md")) if path not in wanted]


def main(arguments: list[str] | None = None, root: Path = ROOT) -> int:
    parser = argparse.ArgumentParser(description="Write the documentation that the mechanisms' cards hold.")
    parser.add_argument("--check", action="store_true", help="write nothing; fail if a file is not up to date")
    options = parser.parse_args(arguments)
    found, wanted = stale(root), documents(root)
    for path in found:
        name = path.relative_to(root)
        if options.check:
            print(f"{name} is not up to date: run python tools/docs.py")
        elif path in wanted:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_text(path, wanted[path])
            print(f"wrote {name}")
        else:
            path.unlink()
            print(f"removed {name}: no such mechanism")
    if not found:
        print(f"{len(wanted)} files are up to date")
    return 1 if options.check and found else 0


if __name__ == "__main__":
    sys.exit(main())
