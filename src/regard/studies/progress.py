"""Live progress of a comparison: all runs, the run at hand, and the time that is left."""

import time
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

__all__ = ["CompareProgress"]


class CompareProgress:
    """Two bars on a terminal; elsewhere one line for each finished part. Writes to standard error.

    Args:
        runs: runs in all. epochs: epochs of each. cost_seconds: what follows the runs, for the estimate.
        show: False keeps silent.
    """

    def __init__(self, runs: int, epochs: int, cost_seconds: float, *, show: bool = True) -> None:
        self._console = Console(stderr=True, quiet=not show, highlight=False)
        self._bars = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            TextColumn("{task.fields[note]}"),
            TimeElapsedColumn(),
            console=self._console,
            disable=not show or not self._console.is_terminal,
            transient=True,
        )
        self._runs, self._epochs, self._cost_seconds = runs, epochs, cost_seconds
        self._epochs_done = self._epochs_skipped = 0
        self._runs_done = 0
        self._started = time.monotonic()
        self._all = self._bars.add_task("comparison", total=runs * epochs, note="")
        self._one = self._bars.add_task("", total=epochs, note="", visible=False)

    def __enter__(self) -> Self:
        self._bars.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bars.stop()

    def say(self, text: str) -> None:
        """A line that stays."""
        self._console.print(text, markup=False, soft_wrap=True)

    def start_run(self, mechanism: str, seed: int) -> None:
        self._bars.reset(self._one, total=self._epochs, visible=True, description=f"{mechanism} seed {seed}", note="")
        self._note()

    def epoch(self, epoch: int, accuracy: float) -> None:
        """An epoch of the run at hand is over; the estimate of the remaining time follows."""
        self._epochs_done += 1
        self._bars.update(self._one, completed=epoch, note=f"epoch {epoch} of {self._epochs}, accuracy {accuracy:.1%}")
        self._note()

    def step(self, fraction: float) -> None:
        """The run at hand is `fraction` (0 to 1) of the way."""
        self._bars.update(self._one, completed=fraction * self._epochs)

    def finish_run(self, text: str, *, skipped: bool = False) -> None:
        """A run is finished, or was found finished."""
        self._runs_done += 1
        if skipped:
            self._epochs_skipped += self._epochs
        self._bars.update(self._one, visible=False)
        self._note()
        self.say(f"[{self._runs_done}/{self._runs}] {text}")

    def start_part(self, name: str) -> None:
        """A part without epochs starts."""
        self._bars.reset(self._one, total=1.0, visible=True, description=name, note="")

    def advance_part(self, completed: float, note: str) -> None:
        """The part at hand is `completed` (0 to 1) of the way."""
        self._bars.update(self._one, completed=completed, note=note)

    def _note(self) -> None:
        done = self._epochs_done + self._epochs_skipped
        left = self._runs * self._epochs - done
        note = f"{self._runs_done} of {self._runs} runs"
        if self._epochs_done:
            seconds = (time.monotonic() - self._started) / self._epochs_done * left + self._cost_seconds
            note += f", about {_clock(seconds)} left"
        self._bars.update(self._all, completed=done, note=note)


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"
