"""Mechanisms compared: one model, one recipe, the same seeds; then the operators' cost, maps, table and page."""

import dataclasses
import math
import shlex
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from regard.benchmark import crossover, environment, measure_costs
from regard.data import ImageData, load
from regard.report.page import write_report
from regard.results import AttentionMap, Comparison, Environment, EpochRecord, TrainingRun
from regard.specs import Mechanism, parse, registered, registered_modifiers
from regard.studies.devices import check_device
from regard.studies.maps import maps_of, tokens_of
from regard.studies.progress import CompareProgress
from regard.studies.settings import ALL_MECHANISMS, CompareSettings, SettingsError
from regard.studies.store import RunStore
from regard.training import Recipe, build_model, load_weights, save_weights, train

__all__ = ["Interrupted", "compare"]


class Interrupted(KeyboardInterrupt):
    """Ctrl-C during a comparison. What was finished is on disk, page included, and in `comparison`."""

    def __init__(self, comparison: Comparison) -> None:
        super().__init__("the comparison was stopped; the same settings resume it")
        self.comparison = comparison


def compare(settings: CompareSettings | None = None, *, show_progress: bool = True, **options: Any) -> Comparison:
    """Compare mechanisms: train each from several seeds, measure the operators, and write page and JSON.

    All runs of one seed come before the next seed's, so a job stopped early holds runs that compare. Every finished run
    is on disk at once; the same `out` again resumes.

    Args:
        settings: what to do; the defaults if None.
        show_progress: live progress on standard error.
        options: fields of CompareSettings, which replace those of `settings`.

    Returns:
        All that was found; also in `out`/compare.json, and as a page in `out`/compare.html.

    Raises:
        SettingsError: a setting cannot be obeyed: an unknown mechanism, model, data set or device, or an `out` that
            holds runs made under other settings. Nothing was trained.
        Interrupted: Ctrl-C; the page was written with what is finished.
    """
    settings = dataclasses.replace(settings or CompareSettings(), **options)
    job = _prepare(settings)
    comparison = job.comparison
    with CompareProgress(
        len(job.mechanisms) * settings.seeds, job.recipe.epochs, settings.cost_seconds, show=show_progress
    ) as progress:
        try:
            with _timed(comparison, "training"):
                _train_all(job, progress)
            with _timed(comparison, "operators"):
                _measure(job, progress)
            with _timed(comparison, "maps"):
                _draw_maps(job)
        except KeyboardInterrupt:
            comparison.interrupted = True
    page, _ = write_report(comparison, settings.out)
    if comparison.interrupted:
        raise Interrupted(comparison)
    return comparison


@dataclass(frozen=True)
class _Job:
    """Checked settings, ready to run."""

    settings: CompareSettings
    mechanisms: tuple[Mechanism, ...]
    data: ImageData
    recipe: Recipe
    tokens: int
    store: RunStore
    environment: Environment
    comparison: Comparison


def _prepare(settings: CompareSettings) -> _Job:
    """Check all settings before anything is trained."""
    check_device(settings.device)
    mechanisms = _parse_all(settings.mechanisms)
    with _blaming("data"):
        data = load(settings.data)
    recipe = Recipe() if settings.epochs is None else Recipe(epochs=settings.epochs)
    tokens = _check_models(settings, mechanisms, data)
    fingerprint = {
        "data": settings.data,
        "train images": len(data.train_labels),
        "test images": len(data.test_labels),
        "classes": len(data.class_names),
        "model": settings.model,
        "device": settings.device,
        "recipe": dataclasses.asdict(recipe),
    }
    try:
        (settings.out / "runs").mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise SettingsError("out", f"{settings.out} cannot be made: {error.strerror}") from error
    store = RunStore(settings.out, fingerprint)
    here = environment(settings.device)
    shown = {**dataclasses.asdict(settings), "out": str(settings.out), "mechanisms": [str(one) for one in mechanisms]}
    shown["epochs"] = recipe.epochs
    labels = {str(one): one.label for one in mechanisms}
    comparison = Comparison(shown, here, command=_command(settings), labels=labels)
    job = _Job(settings, mechanisms, data, recipe, tokens, store, here, comparison)
    if not settings.overwrite:
        for mechanism, seed in _all_runs(job):
            store.load(str(mechanism), seed)  # raises now, not after an hour, if made under other settings
    return job


def _parse_all(texts: tuple[str, ...]) -> tuple[Mechanism, ...]:
    found = []
    for text in _named(texts):
        with _blaming("mechanisms"):
            mechanism = parse(text)
        if mechanism in found:
            raise SettingsError("mechanisms", f"{mechanism} is given twice")
        found.append(mechanism)
    return tuple(found)


def _named(texts: tuple[str, ...]) -> Iterator[str]:
    """The texts, with every mechanism and every modifier in place of ALL."""
    for text in texts:
        if text == ALL_MECHANISMS:
            yield from (*registered(), *registered_modifiers())
        else:
            yield text


def _check_models(settings: CompareSettings, mechanisms: tuple[Mechanism, ...], data: ImageData) -> int:
    """Build the model with every mechanism once; the number of tokens that attend to each other."""
    tokens = 0
    for mechanism in mechanisms:
        with _blaming("model"):
            tokens = tokens_of(build_model(settings.model, mechanism, data), data)
    return tokens


@contextmanager
def _blaming(setting: str) -> Iterator[None]:
    """Errors about what the user gave become SettingsErrors that name the setting."""
    try:
        yield
    except (ValueError, TypeError, OSError, ImportError, RuntimeError) as error:
        text = " ".join(str(error).split()) or type(error).__name__
        for prefix in (f"{setting}: ", "mechanism: ", "name: "):
            text = text.removeprefix(prefix)
        raise SettingsError(setting, text) from error


def _command(settings: CompareSettings) -> str:
    """The command that repeats this comparison: the options that differ from the defaults."""
    words = ["regard", "compare"]
    defaults = CompareSettings()
    for one in dataclasses.fields(settings):
        value = getattr(settings, one.name)
        if value == getattr(defaults, one.name) or one.name == "overwrite":
            continue
        for part in map(str, value) if isinstance(value, tuple) else [str(value)]:
            words += [f"--{one.name.replace('_', '-')}", part]
    return shlex.join(words)


def _all_runs(job: _Job) -> Iterator[tuple[Mechanism, int]]:
    for seed in range(job.settings.seeds):
        for mechanism in job.mechanisms:
            yield mechanism, seed


def _train_all(job: _Job, progress: CompareProgress) -> None:
    for mechanism, seed in _all_runs(job):
        progress.start_run(str(mechanism), seed)
        if not job.settings.overwrite:
            stored, problem = job.store.load(str(mechanism), seed)
            if stored is not None:
                job.comparison.runs.append(stored.run)
                _note_other_machine(job, stored.environment)
                progress.finish_run(f"{mechanism} seed {seed}: found, {stored.run.accuracy:.1%}", skipped=True)
                continue
            if problem:
                progress.say(f"{problem}: trained again")
        run = _train_one(job, mechanism, seed, progress)
        took = f"{run.epochs[-1].seconds:.0f} s" if run.epochs else "no epoch"
        progress.finish_run(f"{mechanism} seed {seed}: {run.failure or f'{run.accuracy:.1%}'}, {took}")


def _train_one(job: _Job, mechanism: Mechanism, seed: int, progress: CompareProgress) -> TrainingRun:
    """Train, save, and add the run to the comparison; a run cut short by Ctrl-C or a failure is added as it stands."""
    name, seen = str(mechanism), list[EpochRecord]()
    steps = job.recipe.epochs * math.ceil(len(job.data.train_labels) / job.recipe.batch_size)

    def on_epoch(record: EpochRecord) -> None:
        seen.append(record)
        progress.epoch(record.epoch, record.test_accuracy)

    def on_step(step: int, _: float) -> None:
        progress.step(step / steps)

    def cut_short(failure: str = "") -> TrainingRun:
        settings = job.settings
        run = TrainingRun(name, seed, settings.model, settings.data, dataclasses.asdict(job.recipe), 0, 0, seen)
        run.tokens, run.failure = job.tokens, failure
        job.comparison.runs.append(run)
        return run

    try:
        run, model = train(
            mechanism,
            data=job.data,
            model=job.settings.model,
            recipe=job.recipe,
            seed=seed,
            device=job.settings.device,
            on_epoch=on_epoch,
            on_step=on_step,
        )
    except FloatingPointError as error:
        return cut_short(str(error))
    except KeyboardInterrupt:
        cut_short()
        raise
    run.tokens = job.tokens
    save_weights(model, job.store.weights_path(name, seed))
    job.store.save(run, job.environment)
    job.comparison.runs.append(run)
    return run


def _note_other_machine(job: _Job, stored: Environment) -> None:
    """A reused run may come from another machine or version; its seconds then do not compare, and the page says so."""
    here = job.environment
    fields = ("machine", "threads", "instruction_set", "device", "torch", "timm", "regard")
    other = [f"{f.replace('_', ' ')} {getattr(stored, f)}" for f in fields if getattr(stored, f) != getattr(here, f)]
    if other:
        note = f"Some runs were made earlier with {', '.join(other)}: their seconds do not compare with the others'."
        if note not in job.comparison.notes:
            job.comparison.notes.append(note)


def _measure(job: _Job, progress: CompareProgress) -> None:
    """The operators' cost, measured or found, and where they overtake dense attention."""
    settings, comparison = job.settings, job.comparison
    mechanisms = [one for one in job.mechanisms if one.converts]
    if settings.cost_seconds == 0 or not mechanisms:
        return
    if others := [one.label for one in job.mechanisms if not one.converts]:
        comparison.notes.append(
            f"No operator on given queries, keys and values, so measured in training only: {', '.join(others)}."
        )
    asked = {
        "mechanisms": [str(one) for one in mechanisms],
        "cost_seconds": settings.cost_seconds,
        "environment": {**dataclasses.asdict(job.environment), "date": ""},
    }
    costs = None if settings.overwrite else job.store.load_costs(asked)
    if costs is None:
        progress.start_part("operators")
        costs = measure_costs(
            mechanisms,
            device=settings.device,
            budget_seconds=settings.cost_seconds,
            on_progress=lambda done, total, what: progress.advance_part(done / total, what),
        )
        job.store.save_costs(costs, asked)
        progress.say(f"operators: {len(costs)} points measured")
    comparison.costs = costs
    comparison.crossovers = crossover(costs)


def _draw_maps(job: _Job) -> None:
    """Attention maps of the first seed that every mechanism finished."""
    finished = {(run.mechanism, run.seed) for run in job.comparison.runs if run.finished}
    names = [str(one) for one in job.mechanisms]
    seeds = [seed for seed in range(job.settings.seeds) if all((name, seed) in finished for name in names)]
    if seeds:
        for mechanism in job.mechanisms:
            job.comparison.maps += _maps_of_run(job, mechanism, seeds[0])


def _maps_of_run(job: _Job, mechanism: Mechanism, seed: int) -> list[AttentionMap]:
    model = build_model(job.settings.model, mechanism, job.data)
    load_weights(model, job.store.weights_path(str(mechanism), seed))
    return maps_of(model, job.data, str(mechanism), seed, layer=job.settings.layer)


@contextmanager
def _timed(comparison: Comparison, part: str) -> Iterator[None]:
    start = time.perf_counter()
    try:
        yield
    finally:
        comparison.seconds[part] = time.perf_counter() - start
