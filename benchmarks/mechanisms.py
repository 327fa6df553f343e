"""Train and time every mechanism beside dense attention, and make the table of mechanisms and their pages anew.

    python benchmarks/mechanisms.py --out mechanisms

All mechanisms and modifiers, and some compositions, are trained under one recipe on the embedded images from three
seeds (`regard compare`); one layer of each is timed at 196, 784 and 3,136 tokens; whom a token looks at is drawn.
Writes docs/mechanisms_measured.json, docs/images/mechanisms/*.png, docs/mechanisms.md and docs/mechanisms/*.md. About
half an hour on 2 cores; the same folder again resumes the training.
"""

import argparse
import importlib.util
import shlex
import sys
from pathlib import Path

from regard.report.labels import labelled
from regard.report.maps import draw_rows, map_rows
from regard.report.picture import raster
from regard.report.style import looks
from regard.results import Comparison, MechanismStudy, write_text
from regard.studies import SettingsError
from regard.studies.mechanisms import COMPOSITIONS, VARIANTS, MechanismSettings, default_texts, study_mechanisms

ROOT = Path(__file__).resolve().parents[1]
MEASURED = ROOT / "docs" / "mechanisms_measured.json"
PICTURES = ROOT / "docs" / "images" / "mechanisms"
ROWS, DPI = 3, 80


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder of the comparison; the same again resumes")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="names of mechanisms; the pages are not written then")
    parser.add_argument("--compositions", nargs="*", default=COMPOSITIONS, help="text forms trained beside them")
    parser.add_argument("--variants", nargs="*", default=VARIANTS, help="other forms, trained beside them")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=int, help="the recipe's own number if not given")
    parser.add_argument("--seconds", type=float, default=30.0, help="for timing one size and direction")
    options = parser.parse_args()
    texts = default_texts()
    if options.only and (unknown := sorted(set(options.only) - set(texts))):
        parser.error(f"--only: unknown {', '.join(unknown)}; known: {', '.join(texts)}")
    settings = MechanismSettings(
        out=options.out,
        mechanisms={name: text for name, text in texts.items() if not options.only or name in options.only},
        variants=tuple(options.variants),
        compositions=tuple(options.compositions),
        seeds=options.seeds,
        epochs=options.epochs,
        seconds=options.seconds,
    )
    try:
        study, comparison = study_mechanisms(settings)
    except SettingsError as error:
        parser.error(str(error))
    study.command = shlex.join(["python", "benchmarks/mechanisms.py", "--out", options.out.name])
    write_text(options.out / "mechanisms.json", study.to_json())
    if options.only:
        print(options.out / "mechanisms.json")
        return 0
    write_text(MEASURED, study.to_json())
    draw(study, comparison)
    return docs_tool().main([])


def draw(study: MechanismStudy, comparison: Comparison) -> None:
    """One picture a mechanism: whom one token of each of three images looks at, beside dense attention."""
    PICTURES.mkdir(parents=True, exist_ok=True)
    comparison = labelled(comparison)
    rows, styles = map_rows(comparison)[:ROWS], looks(comparison)
    for name, one in study.by_name().items():
        columns = list(dict.fromkeys(["dense", one.label]))
        figure = draw_rows([{m: row[m] for m in columns} for row in rows], columns, styles)
        path = PICTURES / f"{name}.png"
        temporary = path.with_name(path.name + ".part")
        raster(figure, DPI).quantize(128).save(temporary, format="PNG", optimize=True)
        temporary.replace(path)


def docs_tool():
    spec = importlib.util.spec_from_file_location("docs_tool", ROOT / "tools" / "docs.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


if __name__ == "__main__":
    sys.exit(main())
