"""Results: plain dataclasses that measure rooms fill and the report reads. They know no torch and turn into JSON.

Seconds are wall-clock seconds, memory is bytes, accuracy is a fraction, FLOPs count a multiply-add as two.
"""

import dataclasses
import json
from dataclasses import dataclass, field
from typing import Any, Self

from regard.results._json import fields_of, to_json, write_text
from regard.results.bench import BenchCell, BenchStudy, BenchTime, Ceiling, Growth, growth_of
from regard.results.conversion import ConversionRecord, ConversionRow, MeasuredSetting, Tuning
from regard.results.conversion_study import ConversionStudy, ConvertedModel, ConvertedPhoto
from regard.results.environment import Environment
from regard.results.export import ExportCheck, ExportStudy
from regard.results.fidelity import Fidelity, FidelityPoint, FidelityStudy, PictureFidelity, Spread
from regard.results.maps import AttentionMap
from regard.results.mechanisms import LayerTime, MechanismResult, MechanismStudy

__all__ = [
    "AttentionMap",
    "BenchCell",
    "BenchStudy",
    "BenchTime",
    "Ceiling",
    "Comparison",
    "ConversionRecord",
    "ConversionRow",
    "ConversionStudy",
    "ConvertedModel",
    "ConvertedPhoto",
    "CostPoint",
    "Crossover",
    "Environment",
    "EpochRecord",
    "ExportCheck",
    "ExportStudy",
    "Fidelity",
    "FidelityPoint",
    "FidelityStudy",
    "Growth",
    "LayerTime",
    "MeasuredSetting",
    "MechanismResult",
    "MechanismStudy",
    "PictureFidelity",
    "Spread",
    "TrainingRun",
    "Tuning",
    "growth_of",
    "to_json",
    "write_text",
]


@dataclass
class EpochRecord:
    """One epoch of one run. `seconds` is training time since the run's start, evaluation left out."""

    epoch: int
    seconds: float
    train_loss: float
    test_accuracy: float


@dataclass
class TrainingRun:
    """One model trained with one mechanism from one seed."""

    mechanism: str
    seed: int
    model: str
    data: str
    recipe: dict[str, Any]
    parameters: int
    forward_flops: int  # of one image
    epochs: list[EpochRecord] = field(default_factory=list)
    train_images_per_second: float = 0.0
    test_images_per_second: float = 0.0
    test_correct: list[bool] = field(default_factory=list)  # one a test image, for paired comparison
    finished: bool = False
    tokens: int = 0  # that attend to each other in one image; 0 if unknown
    failure: str = ""  # why the run ended early, if it was not the user who stopped it

    @classmethod
    def from_dict(cls, fields: dict[str, Any]) -> Self:
        """The run that `dataclasses.asdict` turned into `fields`. Raises ValueError if it is not one."""
        known = fields_of(cls, fields)
        return cls(**{**known, "epochs": [EpochRecord(**fields_of(EpochRecord, e)) for e in known.get("epochs", [])]})

    @property
    def accuracy(self) -> float:
        """Test accuracy after the last epoch (not the best one, which would be chosen on the test set)."""
        return self.epochs[-1].test_accuracy if self.epochs else float("nan")


@dataclass
class CostPoint:
    """One operator measured at one size. Times are medians of interleaved repeats with their quartiles."""

    mechanism: str
    tokens: int
    batch: int
    heads: int
    head_dim: int
    dtype: str
    direction: str  # "forward" or "forward+backward"
    backend: str
    seconds: float
    seconds_low: float  # first quartile
    seconds_high: float  # third quartile
    repeats: int
    flops: int
    peak_memory: int | None = (
        None  # growth of the peak resident size beyond inputs, outputs and gradients, in a fresh process
    )


@dataclass
class Crossover:
    """From how many tokens on a mechanism's operator is faster than dense attention's."""

    mechanism: str
    direction: str  # "forward" or "forward+backward"
    tokens: float | None  # interpolated between measured sizes; None: slower than dense at the largest size
    always: bool = False  # already faster at the smallest measured size; `tokens` is then that size


@dataclass
class Comparison:
    """All that one `regard compare` found.

    Args:
        settings: the settings it ran under; `mechanisms` and `seeds` tell which runs were asked for.
        environment: where it ran.
        crossovers: derived from `costs`.
        interrupted: the user stopped it before all was done.
        notes: what a reader must know beside the figures, one sentence each.
        command: the command that reproduces it.
        seconds: wall-clock seconds of each part of the job.
        labels: a mechanism's text -> what tables and figures call it; empty: its text.
    """

    settings: dict[str, Any]
    environment: Environment
    runs: list[TrainingRun] = field(default_factory=list)
    costs: list[CostPoint] = field(default_factory=list)
    maps: list[AttentionMap] = field(default_factory=list)
    interrupted: bool = False
    crossovers: list[Crossover] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    command: str = ""
    seconds: dict[str, float] = field(default_factory=dict)
    labels: dict[str, str] = field(default_factory=dict)

    def to_json(self) -> str:
        return to_json(dataclasses.asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Self:
        """Read what `to_json` wrote.

        Raises:
            ValueError: the text is no JSON, or no comparison; the message names the field.
        """
        known = fields_of(cls, json.loads(text))
        known["environment"] = Environment(**fields_of(Environment, known["environment"]))
        known["runs"] = [TrainingRun.from_dict(run) for run in known.get("runs", [])]
        for name, kind in (("costs", CostPoint), ("crossovers", Crossover), ("maps", AttentionMap)):
            known[name] = [kind(**fields_of(kind, one)) for one in known.get(name, [])]
        for one in known["maps"]:
            one.query = tuple(one.query)
        return cls(**known)
