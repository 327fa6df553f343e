"""Conversion of a pretrained model: what it saves, what it costs in fidelity, and where in the pictures."""

import dataclasses
import json
import shlex
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor, nn

from regard.benchmark import Job, environment, interleave, measure_peaks
from regard.conversion import Features, convert, features_of, picture_fidelity, tune
from regard.conversion.flops import counting_flops
from regard.conversion.tuning import DEFAULT_CANDIDATES
from regard.report.conversion import write_conversion_report
from regard.results import (
    ConversionRecord,
    ConversionStudy,
    ConvertedModel,
    Fidelity,
    PictureFidelity,
    Tuning,
    write_text,
)
from regard.specs import Mechanism, parse
from regard.studies.converted_maps import DENSE, Setting, layer_fidelity, photo_of
from regard.studies.photographs import choose_photographs, installed_photographs
from regard.studies.pretrained import build_pretrained, copy_sharing_weights, model_size, read_picture
from regard.studies.settings import ConvertSettings, SettingsError

__all__ = ["DEFAULT_CONVERSION", "conversion_command", "prepare_forward", "study_conversion"]

DEFAULT_CONVERSION = "multipole"
TUNED = "tuned"
_SHOWN_PHOTOS = 3
_QUOTABLE = 10  # pictures from which on a fidelity may be quoted
_ROUNDS = 5  # from which on quartiles tell something
_MEMORY_SECONDS = 60.0  # for a process to start, beside several times its forward


def study_conversion(settings: ConvertSettings, *, show_progress: bool = True) -> ConversionStudy:
    """Convert a pretrained model with each mechanism, measure it beside the dense one, and write page and JSON.

    Tuning keeps its measurements in `out`, so the same settings resume it.

    Args:
        settings: what to do.
        show_progress: what is being done, on standard error.

    Returns:
        All that was found; also in `out`/convert.json, and as a page in `out`/convert.html.

    Raises:
        SettingsError: a setting cannot be obeyed: unknown mechanism, model or device, weights or photographs that are
            missing or do not fit, a size that the model refuses, a mechanism that converts nothing.
        FloatingPointError: features are NaN or infinite.
    """
    job = _Job(settings, Console(stderr=True, quiet=not show_progress, highlight=False))
    study = job.run()
    write_conversion_report(study, settings.out)
    if settings.save is not None:
        write_text(settings.save, json.dumps(job.pattern(study), indent=1) + "\n")
    return study


def prepare_forward(
    *, settings: dict[str, Any], size: int, picture: str, pattern: dict[str, str | None] | None
) -> Callable[[], tuple[Tensor, ...]]:
    """One picture's forward of the model, converted by `pattern`: what a measuring process is told to run.

    Args:
        settings: the arguments of `build_pretrained`, and `device`.
        picture: path of the photograph.
    """
    path = settings["checkpoint"]
    model = build_pretrained(
        settings["name"], checkpoint=path and Path(path), random_weights=settings["random_weights"], size=size
    ).to(settings["device"])
    image = read_picture(model, Path(picture), size).to(settings["device"])
    if pattern is not None:
        convert(model, pattern, example_inputs=image)

    def forward() -> tuple[Tensor, ...]:
        return (_forward(model, image),)

    return forward


@dataclass
class _Job:
    """Checked settings, the dense model and what it made of the pictures."""

    settings: ConvertSettings
    console: Console
    notes: list[str] = field(default_factory=list)
    records: dict[str, ConversionRecord] = field(default_factory=dict)
    models: dict[str, nn.Module] = field(default_factory=dict)

    def __post_init__(self) -> None:
        settings = self.settings
        self.mechanisms = _mechanisms(settings.mechanism)
        self.photos = _photographs(settings, self.notes)
        if len(self.photos) < _QUOTABLE:
            self.notes.append(f"Quote a fidelity over at least {_QUOTABLE} photographs, of the kind that you will use.")
        if settings.save is not None and not settings.save.parent.is_dir():
            raise SettingsError("save", f"there is no folder {settings.save.parent}; make it, or name another file")
        with _setting_of_errors("device", RuntimeError):
            torch.empty(1, device=settings.device)
        self.say(f"building {settings.model}")
        self.dense = build_pretrained(
            settings.model,
            checkpoint=settings.checkpoint,
            random_weights=settings.random_weights,
            size=settings.size,
        ).to(settings.device)
        if settings.random_weights:
            self.notes.append("The weights are random: the fidelity tells nothing of a trained model.")
        self.size = settings.size or model_size(self.dense)
        self.pictures = [read_picture(self.dense, path, self.size).to(settings.device) for path in self.photos]
        with _setting_of_errors("out", OSError):
            settings.out.mkdir(parents=True, exist_ok=True)

    def say(self, text: str) -> None:
        self.console.print(text, markup=False, soft_wrap=True)

    def run(self) -> ConversionStudy:
        self.say(f"dense attention, photographs: {len(self.pictures)}, {self.size} pixels")
        with _setting_of_errors("size", RuntimeError, AssertionError, ValueError):
            self.features = {DENSE: [self._features(self.dense, picture) for picture in self.pictures]}
        tuning = self._tuned()
        patterns: dict[str, Any] = dict(self.mechanisms)
        if tuning is not None:
            patterns[TUNED] = tuning.pattern
            self.notes.append("The tuned setting was chosen on these very photographs; others will keep a little less.")
        for name, pattern in patterns.items():
            self._convert(name, pattern)
        fidelities = {name: self._fidelity(name) for name in self.records}
        found = self._costs(fidelities)
        study = ConversionStudy(
            settings=self._shown(),
            environment=environment(self.settings.device),
            models=found,
            tuning=tuning,
            command=conversion_command(self.settings),
        )
        self._look(study)
        study.notes = self.notes
        return study

    def _tuned(self) -> Tuning | None:
        if self.settings.tune is None:
            return None
        file = self.settings.out / "tuning.json"
        with _setting_of_errors("out" if file.exists() else "tune", ValueError):
            return tune(
                self.dense,
                self.pictures,
                fidelity=self.settings.tune,
                mechanism=list(self.mechanisms.values()) if self.settings.mechanism else DEFAULT_CANDIDATES,
                file=file,
                show_progress=not self.console.quiet,
            )

    def _convert(self, name: str, pattern: Any) -> None:
        model = copy_sharing_weights(self.dense)
        with warnings.catch_warnings(), _setting_of_errors("model", ValueError, RuntimeError):
            warnings.simplefilter("ignore", UserWarning)  # of nothing converted: told below
            record = convert(model, pattern, example_inputs=self.pictures[0])
        if not record.converted and name == TUNED:
            self.notes.append("No candidate that saves anything reached the fidelity asked for: tuned is dense.")
        elif not record.converted:
            reason = record.left[0].reason
            raise SettingsError("mechanism", f"{name} converts nothing in {self.settings.model}: {reason}")
        self.models[name], self.records[name] = model, record

    def _features(self, model: nn.Module, picture: Tensor) -> Features:
        found = features_of(model, picture)
        logits = None if found.logits is None else found.logits.cpu()
        return Features(found.tokens.cpu(), logits, found.num_prefix_tokens)

    def _fidelity(self, name: str) -> Fidelity:
        self.say(f"fidelity of {name}")
        self.features[name] = [self._features(self.models[name], picture) for picture in self.pictures]
        pictures: list[PictureFidelity] = []
        for dense, other in zip(self.features[DENSE], self.features[name], strict=True):
            pictures += picture_fidelity(
                dense.tokens,
                other.tokens,
                num_prefix_tokens=dense.num_prefix_tokens,
                dense_logits=dense.logits,
                logits=other.logits,
            )
        return Fidelity.of(pictures)

    def _costs(self, fidelities: Mapping[str, Fidelity]) -> list[ConvertedModel]:
        """Time, FLOPs and memory of one picture's forward, the dense model first."""
        models = {DENSE: self.dense, **self.models}
        self.say(f"speed, about {self.settings.seconds:g} s")
        picture = self.pictures[0]
        calls = {name: lambda model=model: _forward(model, picture) for name, model in models.items()}
        wait = torch.cuda.synchronize if picture.device.type == "cuda" else None
        timings = interleave(
            calls, budget_seconds=self.settings.seconds, min_rounds=_ROUNDS, warm_up=1, synchronize=wait
        )
        rounds = timings[DENSE].repeats
        if rounds < _ROUNDS:
            self.notes.append(f"The speed comes from {rounds} rounds (--seconds): too few to tell a small difference.")
        self.say("peak memory, in processes of their own")
        peaks = self._peaks({name: _MEMORY_SECONDS + 6 * one.median for name, one in timings.items()})
        found = []
        for name, model in models.items():
            with counting_flops() as counter:
                _forward(model, picture)
            timing, ratio = timings[name], timings[name].ratio(timings[DENSE])
            found.append(
                ConvertedModel(
                    name=name,
                    seconds=timing.median,
                    seconds_low=timing.low,
                    seconds_high=timing.high,
                    speed=ratio.median,
                    speed_low=ratio.low,
                    speed_high=ratio.high,
                    repeats=timing.repeats,
                    flops=counter.get_total_flops(),
                    peak_memory=peaks[name],
                    record=self.records.get(name),
                    fidelity=fidelities.get(name),
                )
            )
        return found

    def _peaks(self, patience: Mapping[str, float]) -> dict[str, int | None]:
        """In bytes, by name; `patience` tells how many seconds each may take."""
        checkpoint = self.settings.checkpoint
        settings = {
            "name": self.settings.model,
            "checkpoint": None if checkpoint is None else str(checkpoint.resolve()),
            "random_weights": self.settings.random_weights,
            "device": self.settings.device,
        }
        common = {"settings": settings, "size": self.size, "picture": str(self.photos[0].resolve())}
        jobs = []
        for name in patience:
            record = self.records.get(name)
            given = {**common, "pattern": None if record is None or not record.converted else _pattern(record)}
            jobs.append(Job("regard.studies.conversion:prepare_forward", arguments=given, warm_up=given))
        peaks = measure_peaks(jobs, device=self.settings.device, timeout_seconds=sum(patience.values()))
        self.notes += [
            f"The peak memory of {name} was not measured: {peak.problem}"
            for name, peak in zip(patience, peaks, strict=True)
            if peak.problem
        ]
        return {name: peak.bytes for name, peak in zip(patience, peaks, strict=True)}

    def _look(self, study: ConversionStudy) -> None:
        """Maps, losses and layers."""
        settings: dict[str, Setting] = {
            name: {row.module: parse(row.mechanism) for row in record.converted if row.mechanism}
            for name, record in self.records.items()
        }
        try:
            for place in range(min(_SHOWN_PHOTOS, len(self.photos))):
                self.say(f"maps of {self.photos[place].stem}")
                features = {name: found[place] for name, found in self.features.items() if name != DENSE}
                study.photos.append(
                    photo_of(
                        self.dense,
                        self.pictures[place],
                        self.photos[place].stem,
                        settings,
                        self.features[DENSE][place],
                        features,
                    )
                )
            if self.settings.per_layer:
                prefix = self.features[DENSE][0].num_prefix_tokens
                layers = layer_fidelity(self.dense, self.pictures[0], settings, prefix)
                for one in study.models:
                    one.layers = layers.get(one.name)
        except ValueError as error:
            self.notes.append(f"No maps and no single layers: {error}")

    def pattern(self, study: ConversionStudy) -> dict[str, str | None]:
        """What --save writes: the tuned setting, or the one mechanism's."""
        return study.tuning.pattern if study.tuning is not None else _pattern(next(iter(self.records.values())))

    def _shown(self) -> dict[str, Any]:
        """What a reader must know; paths by their last name."""
        settings, dense = self.settings, self.features[DENSE][0]
        return {
            "model": settings.model,
            "weights": _weights(settings),
            "size": self.size,
            "tokens": dense.tokens.shape[1],
            "num_prefix_tokens": dense.num_prefix_tokens,
            "photographs": [path.stem for path in self.photos],
            "mechanisms": [str(one) for one in self.mechanisms.values()],
            "tune": settings.tune,
            "device": settings.device,
        }


@torch.no_grad()
def _forward(model: nn.Module, picture: Tensor) -> Tensor:
    output = model(picture)
    return output if isinstance(output, Tensor) else output[0]


def _weights(settings: ConvertSettings) -> str:
    if settings.random_weights:
        return "random"
    return "fetched by timm" if settings.checkpoint is None else settings.checkpoint.name


def _pattern(record: ConversionRecord) -> dict[str, str | None]:
    return {row.module: row.mechanism for row in record.rows}


def _mechanisms(texts: Sequence[str]) -> dict[str, Mechanism]:
    """Mechanisms by the texts that the user wrote, which are shorter than their own."""
    found: dict[str, Mechanism] = {}
    for text in texts or (DEFAULT_CONVERSION,):
        try:
            one = parse(text)
        except (ValueError, TypeError) as error:
            raise SettingsError("mechanism", str(error).removeprefix("mechanism: ")) from error
        if one in found.values():
            raise SettingsError("mechanism", f"{one} is given twice")
        if str(one) == DENSE:
            raise SettingsError("mechanism", "dense attention is always measured; leave it out")
        found[text.strip()] = one
    return found


def _photographs(settings: ConvertSettings, notes: list[str]) -> list[Path]:
    if settings.images is not None:
        return choose_photographs(settings.images, settings.pictures, setting="images", fewer=True)
    notes.append("The photographs are those that installed packages carry; pass --images FOLDER for your own.")
    return installed_photographs()[: settings.pictures]


@contextmanager
def _setting_of_errors(setting: str, *kinds: type[Exception]) -> Any:
    """Such errors within this context are told of the setting."""
    try:
        yield
    except FloatingPointError:
        raise
    except kinds as error:
        if isinstance(error, SettingsError):
            raise
        raise SettingsError(setting, " ".join(str(error).split())[:400]) from error


def conversion_command(settings: ConvertSettings) -> str:
    """The command that repeats the study; folders and files by their last names."""
    words = ["regard", "convert", settings.model]
    for one in dataclasses.fields(settings):
        value = getattr(settings, one.name)
        if one.name == "model" or value == one.default:
            continue
        option = f"--{one.name.replace('_', '-')}"
        if value is True:
            words.append(option)
        for part in value if isinstance(value, tuple) else () if value is True else (value,):
            words += [option, part.name if isinstance(part, Path) else str(part)]
    return shlex.join(words)
