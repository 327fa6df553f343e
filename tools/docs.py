"""Write the parts of the documentation that the mechanisms' cards hold.

    python tools/docs.py            writes docs/mechanisms.md, docs/mechanisms/<name>.md and the table in README.md
    python tools/docs.py --check    writes nothing; names the files that are not up to date and fails if there are any

A page is the card, what docs/mechanisms_measured.json holds of it with its picture (benchmarks/mechanisms.py writes
them), and the hand-written notes from docs/notes/<name>.md.
"""

import argparse
import dataclasses
import inspect
import statistics
import sys
import textwrap
from pathlib import Path

from timm.models import model_entrypoint

from regard.backbones import FAMILIES
from regard.cards import Card, table
from regard.markdown import markdown_table
from regard.mixers import mechanisms, modifiers
from regard.results import MechanismResult, MechanismStudy, write_text
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
    study = measured(root)
    found = study.by_name() if study else {}
    wanted = {root / "docs" / "mechanisms.md": overview(cards, study), root / "docs" / "backbones.md": backbones()}
    for name, mechanism in known.items():
        notes = root / "docs" / "notes" / f"{name}.md"
        text = notes.read_text(encoding="utf-8").strip() if notes.exists() else ""
        parts = [text]
        if study and name in found:
            parts = [beside_dense(found[name], study, picture=picture(root, name)), text]
        wanted[root / "docs" / "mechanisms" / f"{name}.md"] = page(mechanism, *filter(None, parts))
    readme = root / "README.md"
    if readme.exists():
        text = readme.read_text(encoding="utf-8")
        wanted[readme] = with_table(text, table(cards, pages="docs/mechanisms", short=True))
    return wanted


def measured(root: Path) -> MechanismStudy | None:
    """What benchmarks/mechanisms.py found; None before its first run."""
    path = root / "docs" / "mechanisms_measured.json"
    return MechanismStudy.from_json(path.read_text(encoding="utf-8")) if path.exists() else None


def picture(root: Path, name: str) -> str:
    """The address of a mechanism's picture from its page; empty if there is none."""
    return (
        f"../images/mechanisms/{name}.png" if (root / "docs" / "images" / "mechanisms" / f"{name}.png").exists() else ""
    )


def backbones() -> str:
    """docs/backbones.md: every family with its models, as their own docstrings tell."""
    parts = [
        NOTICE.replace("mechanism's card", "models' docstrings").replace("src/regard/mixers", "src/regard/backbones"),
        "# Backbones",
        "Models that timm lacks, registered with it: `regard.create_model(name)`, or `timm.create_model(name)` after "
        "`import regard.backbones`. Each has what timm expects of a model (classifier, features, intermediate outputs, "
        "checkpointing, layer groups, any image size), reads the official checkpoint format, and equals the official "
        "code on the same weights where that could be run ([mechanisms](mechanisms.md) tell which).",
    ]
    for family in FAMILIES:
        names = sorted({name.partition(".")[0] for name in family.default_cfgs})
        rows = [[f"`{name}`", _first_line(model_entrypoint(name))] for name in names]
        parts += [f"## {_first_line(family).rstrip('.')}", markdown_table(["name", "model"], rows).rstrip()]
    return "\n\n".join(parts) + "\n"


def _first_line(documented: object) -> str:
    return (inspect.getdoc(documented) or "").partition("\n")[0].strip()


def overview(cards: list[Card], study: MechanismStudy | None) -> str:
    """docs/mechanisms.md."""
    return f"""{NOTICE}

# Mechanisms

Every mechanism answers three questions: which keys a query sees, how strongly, and what they hand over. Each has one
text form, the same in Python, in every command and in every result file: `knn(topk=0.5)`; the name alone takes the
defaults. What changes a model around its mechanism is added: `knn + gated`; alone it stands around dense attention.

{table(cards, pages="mechanisms")}
*Exact* and *approximate* are judged against the mechanism's own definition, not against dense attention.
{evidence_table(cards, study) if study else ""}"""


def evidence_table(cards: list[Card], study: MechanismStudy) -> str:
    """What is held and was measured of each, and of compositions."""
    found = study.by_name()
    rows = []
    for card in cards:
        parity = card.evidence.parity or ("no official code" if not card.official else "none held")
        cells = _cells(found[card.name], study) if card.name in found else [""] * 4
        name = f"[`{card.name}`](mechanisms/{card.name}.md)"
        if card.name in found and found[card.name].label not in (card.name, f"dense + {card.name}"):
            name += f" as `{found[card.name].label}`"
        rows.append([name, *cells, parity.replace("|", "\\|")])
    labels = {one.mechanism: one.label for one in study.results}
    shown = {one.mechanism for one in found.values()}
    for one in study.results:
        if not one.best_part and one.mechanism not in shown:
            rows.append([f"`{one.label if '(' in one.label else one.mechanism}`", *_cells(one, study), ""])
    compositions = [
        [
            f"`{one.label}`",
            *_cells(one, study)[1:],
            f"`{labels[one.best_part]}`",
            _points(one.gain, one.gain_half_width),
        ]
        for one in study.results
        if one.best_part
    ]
    largest = max(study.settings["tokens"])
    heading = ["growth", f"speed at {largest:,} tokens", "accuracy", "against dense"]
    text = f"""
## What is held and measured of each

{markdown_table(["name", *heading, "parity"], rows)}
{_explained(study)}
"""
    if compositions:
        text += f"""
## Compositions

What no paper has, beside its parts under the same recipe and seeds: the mechanism alone, and each modifier around
dense attention. *Gain*: the paired difference in points from the part that did best.

{markdown_table(["composition", *heading[1:], "best part", "gain"], compositions)}"""
    return text


def _explained(study: MechanismStudy) -> str:
    settings, place = study.settings, study.environment
    sizes = sorted(settings["tokens"])
    text = (
        f"*Growth*: the exponent of the forward's time over tokens, {sizes[-2]:,} to {sizes[-1]:,}, of one layer "
        f"({settings['dim']} channels, {settings['heads']} heads, projections included). *Speed*: dense time over this "
        "one's, forward; forward + backward: medians of interleaved rounds with their quartiles, of a layer, or of a "
        f"model of {settings['depth']} blocks where more than the layer changes. Above 1 is faster. *Accuracy*: "
        f"{settings['epochs']} epochs of the `{settings['model']}` model on the {settings['data']} images (81 tokens: "
        f"too few for most of these to be faster), mean and deviation of {settings['seeds']} seeds; then the paired "
        f"difference in points with its 95 % t-interval. {place.machine}, {place.threads} threads, "
        f"torch {place.torch}, regard {place.commit}, {place.date[:10]}; `{study.command}` makes all of this anew."
    )
    text = " ".join([text, *study.notes])
    return textwrap.fill(text, 120, break_long_words=False, break_on_hyphens=False)


def _cells(one: MechanismResult, study: MechanismStudy) -> list[str]:
    """Growth, speed at the largest size, accuracy, difference."""
    return [
        f"N^{one.growth:.2f}" if one.growth is not None else "",
        "; ".join(_speed(one, max(study.settings["tokens"]))),
        _accuracy(one),
        _points(one.difference, one.half_width),
    ]


def _speed(one: MechanismResult, tokens: int) -> list[str]:
    return [
        f"{time.ratio:.2f}x ({time.ratio_low:.2f}-{time.ratio_high:.2f})" for time in one.times if time.tokens == tokens
    ]


def _accuracy(one: MechanismResult) -> str:
    if not one.accuracies:
        return "not trained"
    mean = f"{100 * statistics.fmean(one.accuracies):.1f}"
    return f"{mean} ± {100 * statistics.stdev(one.accuracies):.1f} %" if len(one.accuracies) > 1 else f"{mean} %"


def _points(difference: float | None, half_width: float | None) -> str:
    """A paired difference in points with its 95 % t-interval."""
    if difference is None:
        return ""
    half = f" ± {100 * half_width:.1f}" if half_width is not None else ""
    shown = half_width is not None and abs(difference) > half_width
    return f"{100 * difference:+.1f}{half}" + ("" if shown else ", none shown")


def beside_dense(one: MechanismResult, study: MechanismStudy, *, picture: str) -> str:
    """A page's section of what benchmarks/mechanisms.py found."""
    dense = study.by_name()["dense"]
    lines = ["## Beside dense attention"]
    if picture:
        lines += [
            f"![Three images with a query token, and the weights with which it looks at the others]({picture})",
            "Last layer of the model trained below, mean over its heads; the frame is the query. Brighter is heavier, "
            "on one scale a row. Drawn by `benchmarks/mechanisms.py`.",
        ]
    trained = f"`{one.label}`, trained: {_accuracy(one)}"
    if one.difference is not None:
        points, _, none_shown = _points(one.difference, one.half_width).partition(", ")
        trained += f" against dense attention's {_accuracy(dense)}, a paired difference of {points} points"
        trained += f" ({none_shown})" if none_shown else ""
    lines += [
        f"{trained}. The model has {one.parameters:,} parameters and {one.flops / 1e6:.1f} MFLOPs (dense "
        f"{dense.parameters:,} and {dense.flops / 1e6:.1f})."
    ]
    rows = [[f"{size:,}", *_speed(one, size)] for size in study.settings["tokens"]]
    if one.name != "dense":
        lines += [markdown_table(["tokens", "forward", "forward + backward"], rows).rstrip()]
        lines += [f"Times faster than dense attention; growth N^{one.growth:.2f}." if one.growth else "Times faster."]
    return "\n\n".join([*lines, "How it was measured: [mechanisms](../mechanisms.md)."])


def page(mechanism: type[Mechanism] | type[Modifier], *sections: str) -> str:
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
    return "\n\n".join([*parts, *sections]) + "\n"


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
