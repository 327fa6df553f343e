"""`regard compare`: train one model with each mechanism, measure the operators, write table, page and JSON."""

import sys
from dataclasses import dataclass, field
from typing import Annotated

import tyro

from regard.studies.settings import CompareSettings

__all__ = ["Compare"]


@dataclass(frozen=True)
class Compare:
    """Compare mechanisms: accuracy over seeds under one recipe, operator cost beside it, attention maps.

    With no option: dense, k-NN, clustered and multipole attention, three seeds each, on the embedded images.
    """

    settings: Annotated[CompareSettings, tyro.conf.arg(name="")] = field(default_factory=CompareSettings)

    def __call__(self) -> int:
        from regard.studies import Interrupted, compare

        try:
            comparison = compare(self.settings)
        except Interrupted as stop:
            comparison = stop.comparison
            print("regard compare: stopped; the same command resumes", file=sys.stderr)
        from rich.console import Console

        from regard.report import terminal_table
        from regard.report.findings import headline
        from regard.report.page import PAGE_NAME

        console = Console(highlight=False)
        for sentence in headline(comparison):
            console.print(sentence, markup=False)
        console.print(terminal_table(comparison))
        console.print(f"page: {self.settings.out / PAGE_NAME}", markup=False, soft_wrap=True)
        return 130 if comparison.interrupted else 0
