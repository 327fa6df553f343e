"""`regard convert`: other attention in a pretrained model, measured beside dense attention on photographs."""

import sys
from dataclasses import dataclass
from typing import Annotated

import tyro

from regard.studies.settings import ConvertSettings

__all__ = ["Convert"]


@dataclass(frozen=True)
class Convert:
    """Convert a pretrained model: speed, memory and fidelity against dense attention, with maps and a page."""

    settings: Annotated[ConvertSettings, tyro.conf.arg(name="")]

    def __call__(self) -> int:
        from regard.studies import study_conversion

        try:
            study = study_conversion(self.settings)
        except FloatingPointError as error:
            print(f"regard convert: {error}", file=sys.stderr)
            return 1
        except KeyboardInterrupt:
            resumes = "; the same command resumes the tuning" if self.settings.tune is not None else ""
            print(f"regard convert: stopped{resumes}", file=sys.stderr)
            return 130
        from rich.console import Console

        from regard.report.conversion import CONVERSION_PAGE, conversion_headline, conversion_terminal

        console = Console(highlight=False)
        for one in study.models if study.tuning is None else ():
            if one.record is not None:  # one as a whole, of several the first line
                told = str(one.record) if len(study.models) == 2 else f"{one.name}: {str(one.record).splitlines()[0]}"
                console.print(told, markup=False, soft_wrap=True)
        if study.tuning is not None:
            console.print(str(study.tuning), markup=False, soft_wrap=True)
        console.print(conversion_terminal(study))
        for sentence in [*conversion_headline(study), *study.notes]:
            console.print(sentence, markup=False)
        if self.settings.save is not None:
            console.print(f"pattern: {self.settings.save}", markup=False, soft_wrap=True)
        console.print(f"page: {self.settings.out / CONVERSION_PAGE}", markup=False, soft_wrap=True)
        return 0
