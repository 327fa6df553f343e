"""One progress bar of long work, and the lines of what is finished."""

from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

__all__ = ["ProgressBar", "progress_bar"]


class ProgressBar:
    """Made by `progress_bar`."""

    def __init__(self, progress: Progress, console: Console, name: str) -> None:
        self._progress, self._console = progress, console
        self._task = progress.add_task(name, total=None, note="")
        self._done = 0

    def start(self, total: int, *, done: int = 0) -> None:
        """The work has `total` steps, `done` of which were found finished."""
        self._done = done
        self._progress.update(self._task, total=total, completed=done)

    def remaining(self, steps: int) -> None:
        """About so many are still to come."""
        self._progress.update(self._task, total=self._done + steps)

    def advance(self) -> None:
        self._done += 1
        self._progress.advance(self._task)

    def say(self, note: str) -> None:
        """What is at hand."""
        self._progress.update(self._task, note=note)

    def tell(self, line: str) -> None:
        """A line that stays."""
        self._console.print(line, markup=False, soft_wrap=True)


@contextmanager
def progress_bar(name: str, *, show: bool = True) -> Iterator[ProgressBar]:
    """A bar on a terminal; elsewhere the lines that are told alone. On standard error. `show=False` keeps silent."""
    console = Console(stderr=True, quiet=not show, highlight=False)
    progress = Progress(
        TextColumn("{task.description}"),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("about"),
        TimeRemainingColumn(),
        TextColumn("left; {task.fields[note]}", markup=False),
        console=console,
        disable=not show or not console.is_terminal,
        transient=True,
    )
    with progress:
        yield ProgressBar(progress, console, name)
