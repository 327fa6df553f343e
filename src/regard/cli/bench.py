"""`regard bench`: operators over a grid of sizes beside every peer; table, figure, JSON."""

import sys
from dataclasses import dataclass, field
from typing import Annotated

import tyro

from regard.studies.settings import BenchSettings

__all__ = ["Bench"]


@dataclass(frozen=True)
class Bench:
    """Measure operators over a grid of sizes, beside every peer that is installed; correctness gate first.

    With no option: every operator in float32, forward and forward + backward, in a few minutes.
    """

    settings: Annotated[BenchSettings, tyro.conf.arg(name="")] = field(default_factory=BenchSettings)

    def __call__(self) -> int:
        from rich.console import Console

        from regard.studies.operators import planned, study_operators

        console = Console(highlight=False)
        if self.settings.dry_run:
            for line in planned(self.settings):
                console.print(line, markup=False, soft_wrap=True)
            return 0
        study = study_operators(self.settings)
        from regard.report.bench import bench_tables

        console.print(bench_tables(study), soft_wrap=False)
        for path in sorted(self.settings.out.glob("bench.*")):
            console.print(f"written: {path}", markup=False, soft_wrap=True)
        if study.interrupted:
            print("regard bench: stopped; the same command resumes", file=sys.stderr)
            return 130
        if any(not cell.passed for cell in study.cells):
            print("regard bench: a correctness gate is red; that operator was not timed there", file=sys.stderr)
            return 1
        return 0
