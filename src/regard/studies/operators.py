"""Operators beside their peers over a grid of sizes: gated, interleaved, resumable, and beside an older commit."""

import contextlib
import dataclasses
import math
import shlex
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from regard.benchmark import environment, measure_ceilings
from regard.benchmark.against import Against, AgainstError, commit_of, worktree
from regard.benchmark.entry import Case
from regard.benchmark.grid import OWN, Grid, Point, expected_seconds, measure_memory, measure_point, points_of
from regard.benchmark.operators import entries_of
from regard.conversion._progress import ProgressBar, progress_bar
from regard.report.bench import write_bench_report
from regard.results import BenchCell, BenchStudy, Ceiling, growth_of, write_text
from regard.studies.devices import check_device
from regard.studies.photographs import installed_photographs
from regard.studies.settings import BenchSettings, SettingsError

__all__ = ["JSON_NAME", "planned", "study_operators"]

JSON_NAME = "bench.json"
_CEILING_SECONDS = 1.0
_MEMORY_SECONDS = 300.0  # of one operator's processes
_RECORDED_LAYER = 5  # of 12, in the middle
_SAME = ("machine", "threads", "instruction_set", "device", "torch", "regard", "commit")  # of the place, to resume


def planned(settings: BenchSettings) -> list[str]:
    """What `study_operators` would measure, a line each, and about how long; nothing is run.

    Raises:
        SettingsError: as `study_operators`.
    """
    points = _points(settings)
    if settings.against is not None:
        _commit(settings.against)
    lines = []
    for point in points:
        refused = {peer.name: peer.refuses(point.case, point.dtype, point.direction) for peer in point.peers()}
        told = [name if not reason else f"{name} (left out: {reason})" for name, reason in refused.items()]
        told += [f"{settings.against}, built in a worktree"] if settings.against is not None else []
        lines.append(f"{point}: beside {', '.join(told)}")
    seconds = expected_seconds(points, settings.point_seconds) * (2 if settings.against is not None else 1)
    return [*lines, f"{len(points)} points, about {max(1, round(seconds / 60))} min on a quiet machine"]


def study_operators(settings: BenchSettings, *, show_progress: bool = True) -> BenchStudy:
    """Measure operators over a grid of sizes, beside every peer that is installed.

    A point whose correctness gate is red is not timed. Every point is on disk as soon as it is measured; after Ctrl-C
    the same settings on the same machine and commit resume, and a finished job starts anew.

    Args:
        settings: what to do.
        show_progress: what is being done, on standard error.

    Returns:
        All that was found, as far as it got; also in `out`/bench.json, and as a figure beside it where a series has two
        sizes.

    Raises:
        SettingsError: a setting cannot be obeyed: an unknown operator, device, commit or photograph, weights of another
            model. Nothing was measured.
    """
    points = _points(settings)
    check_device(settings.device)
    before = torch.get_num_threads()
    torch.set_num_threads(settings.threads or before)
    try:
        with progress_bar("bench", show=show_progress) as bar:
            return _Job(settings, points, bar).run()
    finally:
        torch.set_num_threads(before)


def _points(settings: BenchSettings) -> list[Point]:
    try:
        entries = entries_of(settings.operators)
    except ValueError as error:
        raise SettingsError("operators", str(error)) from None
    return points_of(entries, dtypes=settings.dtypes, directions=settings.directions, quick=settings.quick)


def _commit(reference: str) -> tuple[Path, str]:
    try:
        return commit_of(reference)
    except AgainstError as error:
        raise SettingsError("against", str(error)) from None


@dataclass
class _Job:
    """Checked settings, and what was found so far."""

    settings: BenchSettings
    points: list[Point]
    bar: ProgressBar
    study: BenchStudy = field(init=False)

    def __post_init__(self) -> None:
        settings = self.settings
        shown = {name: _plain(value) for name, value in dataclasses.asdict(settings).items()}
        self.study = BenchStudy(shown, environment(settings.device), command=_command(settings))
        self.inputs = _recorded_inputs(settings)
        settings.out.mkdir(parents=True, exist_ok=True)

    def run(self) -> BenchStudy:
        study = self.study
        self._resume()
        self.bar.start(len(self.points), done=len(study.cells))
        try:
            with self._against() as against:
                self._ceilings()
                grid = Grid(
                    self.settings.point_seconds, self.settings.patience, self.settings.device, self.inputs, against
                )
                for name in dict.fromkeys(point.entry.name for point in self.points):
                    self._operator([point for point in self.points if point.entry.name == name], grid)
                self._ceilings()
        except KeyboardInterrupt:
            study.interrupted = True
        self._sort()
        study.growth = growth_of(study.cells)
        study.notes = _notes(study, self.settings)
        self._save()
        write_bench_report(study, self.settings.out)
        return study

    def _operator(self, points: list[Point], grid: Grid) -> None:
        """Measure what is not there yet; then the memory of all that have none."""
        found = {cell.key: cell for cell in self.study.cells}
        for point in points:
            if point.key in found:
                for one in found[point.key].times:
                    if not one.skipped:
                        grid.remember(point, one.name, one.seconds)
                continue
            self.bar.say(str(point))
            cell = measure_point(point, grid)
            self.study.cells.append(cell)
            self._save(interrupted=True)
            self.bar.advance()
            self.bar.tell(f"[{len(self.study.cells)}/{len(self.points)}] {point}: {_told(cell)}")
        if not self.settings.no_memory:
            mine = [cell for cell in self.study.cells if cell.operator == points[0].entry.name]
            missing = [cell for cell in mine if cell.passed and all(one.peak_memory is None for one in cell.times)]
            if missing:
                self.bar.say(f"{points[0].entry.name}: peak memory, in processes of its own")
                measure_memory(missing, points, self.settings.device, _MEMORY_SECONDS)
                self._save(interrupted=True)

    def _ceilings(self) -> None:
        """What the machine reaches at best, before and after: the better counts."""
        for dtype in self.settings.dtypes:
            found = measure_ceilings(self.settings.device, dtype, _CEILING_SECONDS)
            flops, size = found.matmul_flops_per_second, found.copy_bytes_per_second
            known = self.study.ceiling(dtype)
            if known is None:
                self.study.ceilings.append(Ceiling(dtype, flops, size))
            else:
                known.flops_per_second = max(known.flops_per_second, flops)
                known.bytes_per_second = max(known.bytes_per_second, size)

    @contextlib.contextmanager
    def _against(self) -> Iterator[Against | None]:
        if self.settings.against is None:
            yield None
            return
        root, commit = _commit(self.settings.against)
        try:
            with (
                worktree(root, commit, self.bar.tell) as tree,
                Against(tree / "src", f"at {self.settings.against}") as against,
            ):
                yield against
        except AgainstError as error:
            raise SettingsError("against", str(error)) from None

    def _resume(self) -> None:
        """Take over the points of a job that was stopped, if it was the same."""
        path = self.settings.out / JSON_NAME
        try:
            stopped = BenchStudy.from_json(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            return
        except (OSError, ValueError) as error:
            self.bar.tell(f"{path} cannot be read ({error}); measuring anew")
            return
        if not stopped.interrupted or stopped.settings != self.study.settings:
            return
        here = self.study.environment
        changed = [name for name in _SAME if getattr(stopped.environment, name) != getattr(here, name)]
        if changed or here.commit.endswith("-dirty"):
            reason = f"another {changed[0].replace('_', ' ')}" if changed else "changes that no commit names"
            self.bar.tell(f"{path} was stopped, but this is {reason}; measuring anew")
            return
        asked = {point.key for point in self.points}
        self.study.cells = [cell for cell in stopped.cells if cell.key in asked]
        self.study.ceilings = stopped.ceilings
        self.bar.tell(f"{path}: {len(self.study.cells)} of {len(self.points)} points are there")

    def _sort(self) -> None:
        order = {point.key: place for place, point in enumerate(self.points)}
        self.study.cells.sort(key=lambda cell: order[cell.key])

    def _save(self, interrupted: bool = False) -> None:
        """On disk a job that is not finished is one that was stopped."""
        told = dataclasses.replace(self.study, interrupted=self.study.interrupted or interrupted)
        write_text(self.settings.out / JSON_NAME, told.to_json() + "\n")


def _told(cell: BenchCell) -> str:
    if not cell.passed:
        return f"GATE RED, not timed: {cell.gate}"
    peers = [f"{one.name} {one.slower:.2f}x" for one in cell.times[1:] if not one.skipped]
    return ", ".join([f"{1e3 * cell.times[0].seconds:.3g} ms", *peers])


def _recorded_inputs(settings: BenchSettings) -> Callable[[str, Case], dict[str, Tensor] | None]:
    """Of multipole attention's cases: what a layer in the middle of the trained model computes on the photograph."""
    from regard.studies.recorded import PATCH, recorded_calls

    weights = settings.weights
    if weights is None:
        return lambda name, case: None
    photo = settings.photo or installed_photographs()[0]
    recorded: dict[int, dict[str, Tensor]] = {}

    def inputs(name: str, case: Case) -> dict[str, Tensor] | None:
        if name != "multipole":
            return None
        if case.tokens not in recorded:
            (call,) = recorded_calls(weights, photo, PATCH * math.isqrt(case.tokens - 1), [_RECORDED_LAYER])
            parts = {"query": call.query, "key": call.key, "value": call.value}
            recorded[case.tokens] = {part: one.detach().clone() for part, one in parts.items()}
        return recorded[case.tokens]

    try:
        inputs("multipole", Case(17))
    except SettingsError as error:
        raise SettingsError("weights" if error.setting == "checkpoint" else error.setting, error.problem) from error
    return inputs


def _notes(study: BenchStudy, settings: BenchSettings) -> list[str]:
    notes = []
    red = [cell for cell in study.cells if not cell.passed]
    notes += [f"GATE RED, not timed: {cell.label}: {cell.gate}" for cell in red]
    if any(cell.operator == "multipole" for cell in study.cells):
        if settings.weights is None:
            notes.append("Multipole attention's queries and keys are random; those of a trained model cluster better.")
        else:
            notes.append(
                f"Multipole attention's inputs are those of layer {_RECORDED_LAYER} of {settings.weights.name}."
            )
    few = sum(one.name == OWN and 0 < one.repeats < 3 for cell in study.cells for one in cell.times)
    if few:
        notes.append(f"Fewer than three rounds, and so no spread, in {few} of {len(study.cells)}; give more --seconds.")
    return notes


def _plain(value: Any) -> Any:
    return str(value) if isinstance(value, Path) else list(value) if isinstance(value, tuple) else value


def _command(settings: BenchSettings) -> str:
    """As a user would type it; folders by name alone."""
    words = ["regard", "bench", *settings.operators]
    for one in dataclasses.fields(settings):
        value = getattr(settings, one.name)
        option = f"--{one.name.replace('_', '-')}"
        if one.name in ("operators", "out") or value == one.default:
            continue
        if isinstance(value, bool):
            words.append(option)
        else:
            values = value if isinstance(value, tuple) else (value,)
            words += [word for v in values for word in (option, v.name if isinstance(v, Path) else str(v))]
    return shlex.join(words)
