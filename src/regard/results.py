"""Results: plain dataclasses that measure rooms fill and the report reads. They know no torch and turn into JSON.

Seconds are wall-clock seconds, memory is bytes, accuracy is a fraction, FLOPs count a multiply-add as two.
"""

import dataclasses
import json
import math
import re
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

__all__ = [
    "AttentionMap",
    "Comparison",
    "ConversionRecord",
    "ConversionRow",
    "CostPoint",
    "Crossover",
    "Environment",
    "EpochRecord",
    "Fidelity",
    "FidelityPoint",
    "FidelityStudy",
    "PictureFidelity",
    "Spread",
    "TrainingRun",
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
        known = _fields_of(cls, fields)
        return cls(**{**known, "epochs": [EpochRecord(**_fields_of(EpochRecord, e)) for e in known.get("epochs", [])]})

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
class AttentionMap:
    """Who one query looks at: weights over the grid of tokens, one map a mechanism, mean over heads."""

    mechanism: str
    seed: int
    image_index: int
    label: str
    prediction: str
    layer: int
    query: tuple[int, int]  # row and column of the query token on the grid
    weights: list[list[float]]  # grid rows x columns
    pixels: list[list[list[int]]]  # the image, rows x columns x channels, 0-255


@dataclass
class Environment:
    """Where the figures were measured."""

    machine: str
    cores: int
    threads: int
    instruction_set: str
    device: str
    python: str
    torch: str
    timm: str
    regard: str
    commit: str
    date: str


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

    def to_json(self) -> str:
        return to_json(dataclasses.asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Self:
        """Read what `to_json` wrote.

        Raises:
            ValueError: the text is no JSON, or no comparison; the message names the field.
        """
        known = _fields_of(cls, json.loads(text))
        known["environment"] = Environment(**_fields_of(Environment, known["environment"]))
        known["runs"] = [TrainingRun.from_dict(run) for run in known.get("runs", [])]
        for name, kind in (("costs", CostPoint), ("crossovers", Crossover), ("maps", AttentionMap)):
            known[name] = [kind(**_fields_of(kind, one)) for one in known.get(name, [])]
        for one in known["maps"]:
            one.query = tuple(one.query)
        return cls(**known)


@dataclass(frozen=True)
class Spread:
    """One figure over pictures: its mean, and least value, quartiles (interpolated) and greatest value."""

    mean: float
    low: float
    quartile1: float
    median: float
    quartile3: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Self:
        """Raises ValueError if there are no values."""
        if not values:
            raise ValueError("values: there are none; a spread needs at least one")
        if len(values) == 1:
            return cls(values[0], values[0], values[0], values[0], values[0], values[0])
        first, median, third = statistics.quantiles(values, n=4, method="inclusive")
        return cls(statistics.fmean(values), min(values), first, median, third, max(values))


@dataclass(frozen=True)
class PictureFidelity:
    """How close the features of one picture come to those that dense attention gives. Definitions:
    `regard.conversion.picture_fidelity`."""

    patches: int
    cosine: float
    centred_cosine: float
    relative_l2: float
    worst_cosine: float  # 1st percentile of the patches
    worst_centred_cosine: float
    prefix_cosine: float | None = None  # None: no prefix tokens
    same_top1: bool | None = None  # None: no classifier


@dataclass(frozen=True)
class Fidelity:
    """How close a model comes to the dense one: each figure of PictureFidelity, over pictures.

    Args:
        pictures: how many were measured.
        prefix_cosine: None if there are no prefix tokens.
        top1_agreement: share of the pictures whose likeliest class is the same; None without a classifier.
    """

    pictures: int
    cosine: Spread
    centred_cosine: Spread
    relative_l2: Spread
    worst_cosine: Spread
    worst_centred_cosine: Spread
    prefix_cosine: Spread | None = None
    top1_agreement: float | None = None

    @classmethod
    def of(cls, pictures: Sequence[PictureFidelity]) -> Self:
        """The pictures taken together; every picture counts the same, however many patches it has.

        Raises:
            ValueError: there are no pictures, or only some have prefix tokens or a classifier.
        """
        if not pictures:
            raise ValueError("pictures: none were measured; update the meter first")
        prefix = [one.prefix_cosine for one in pictures if one.prefix_cosine is not None]
        same = [one.same_top1 for one in pictures if one.same_top1 is not None]
        for name, found in (("prefix_cosine", prefix), ("same_top1", same)):
            if found and len(found) != len(pictures):
                raise ValueError(f"pictures: {name} is known of {len(found)} of {len(pictures)}; measure all alike")
        return cls(
            pictures=len(pictures),
            cosine=Spread.of([one.cosine for one in pictures]),
            centred_cosine=Spread.of([one.centred_cosine for one in pictures]),
            relative_l2=Spread.of([one.relative_l2 for one in pictures]),
            worst_cosine=Spread.of([one.worst_cosine for one in pictures]),
            worst_centred_cosine=Spread.of([one.worst_centred_cosine for one in pictures]),
            prefix_cosine=Spread.of(prefix) if prefix else None,
            top1_agreement=statistics.fmean(same) if same else None,
        )


@dataclass(frozen=True)
class FidelityPoint:
    """One mechanism in every layer of a trained model, on one photograph at one size.

    Args:
        size: side of the square image, in pixels.
        near_share: share of the keys that a patch query sees one by one, mean over queries, heads and layers; None if
            the mechanism does not tell.
        seconds: of the forward.
        layers: [layer][head] of the operator alone, on dense attention's queries, keys and values; None if not asked.
    """

    mechanism: str
    size: int
    photo: str
    fidelity: PictureFidelity
    near_share: float | None
    seconds: float
    layers: list[list[PictureFidelity]] | None = None

    @classmethod
    def from_dict(cls, fields: dict[str, Any]) -> Self:
        """The point that `dataclasses.asdict` turned into `fields`. Raises ValueError if it is not one."""
        known = _fields_of(cls, fields)
        known["fidelity"] = PictureFidelity(**_fields_of(PictureFidelity, known["fidelity"]))
        if known.get("layers") is not None:
            known["layers"] = [
                [PictureFidelity(**_fields_of(PictureFidelity, head)) for head in layer] for layer in known["layers"]
            ]
        return cls(**known)


@dataclass
class FidelityStudy:
    """All that one fidelity study found.

    Args:
        settings: what it was asked.
        environment: where it ran; seconds of points found from an earlier run may come from elsewhere.
        dense_seconds: of dense attention's forward, by size and photograph: `{"896": {"teddy": 4.1}}`.
        interrupted: the user stopped it before all was done.
        command: the command that reproduces it.
    """

    settings: dict[str, Any]
    environment: Environment
    points: list[FidelityPoint] = field(default_factory=list)
    dense_seconds: dict[str, dict[str, float]] = field(default_factory=dict)
    interrupted: bool = False
    command: str = ""

    def to_json(self) -> str:
        return to_json(dataclasses.asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Self:
        """Read what `to_json` wrote.

        Raises:
            ValueError: the text is no JSON, or no study; the message names the field.
        """
        known = _fields_of(cls, json.loads(text))
        known["environment"] = Environment(**_fields_of(Environment, known["environment"]))
        known["points"] = [FidelityPoint.from_dict(point) for point in known.get("points", [])]
        return cls(**known)


@dataclass(frozen=True)
class ConversionRow:
    """One attention module of a converted model, as it was when the model was run to find it.

    Args:
        module: its name in the model.
        kind: its class.
        tokens: queries of one call (of one window, where attention is windowed).
        keys: keys of one call.
        heads: attention heads.
        mechanism: the mechanism put in, in text form; None if the module was left as it is.
        reason: why it was left.
    """

    module: str
    kind: str
    tokens: int
    keys: int
    heads: int
    mechanism: str | None = None
    reason: str = ""


@dataclass(frozen=True)
class ConversionRecord:
    """What a conversion did, in the order in which the model calls its attention modules. Prints as a table.

    Args:
        model: the model's class.
        inputs: what the model was run with to find them.
    """

    model: str
    inputs: str
    rows: tuple[ConversionRow, ...]

    @property
    def converted(self) -> tuple[ConversionRow, ...]:
        """The modules that have another mechanism now."""
        return tuple(row for row in self.rows if row.mechanism is not None)

    @property
    def left(self) -> tuple[ConversionRow, ...]:
        """The modules that were left as they are, each with a reason."""
        return tuple(row for row in self.rows if row.mechanism is None)

    def __str__(self) -> str:
        heading = ("module", "class", "tokens", "keys", "heads", "mechanism, or why it was left")
        cells = [
            (r.module or "(the model)", r.kind, f"{r.tokens:,}", f"{r.keys:,}", str(r.heads), r.mechanism or r.reason)
            for r in self.rows
        ]
        widths = [max(map(len, column)) for column in zip(heading, *cells, strict=True)]
        lines = [f"{self.model}: {len(self.converted)} of {len(self.rows)} attention modules converted ({self.inputs})"]
        for row in (heading, *cells):
            aligned = [
                text.rjust(width) if 2 <= i <= 4 else text.ljust(width)
                for i, (text, width) in enumerate(zip(row, widths, strict=True))
            ]
            lines.append("  ".join(aligned).rstrip())
        return "\n".join(lines)

    def to_json(self) -> str:
        return to_json(dataclasses.asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Self:
        """Read what `to_json` wrote. Raises ValueError if the text is no JSON or no conversion."""
        known = _fields_of(cls, json.loads(text))
        return cls(**{**known, "rows": tuple(ConversionRow(**_fields_of(ConversionRow, row)) for row in known["rows"])})


def to_json(value: Any) -> str:
    """JSON text that every reader takes: NaN and infinity, which JSON lacks, become null (read back as NaN)."""
    text = json.dumps(_finite(value), indent=1, allow_nan=False)
    # Lists of plain numbers (maps, pixels) go on one line each; within JSON strings no line break occurs.
    return re.sub(r"\[\n([^\[\]{}\"]*?)\n\s*\]", lambda found: f"[{' '.join(found[1].split())}]", text)


def _finite(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, dict):
        return {str(key): _finite(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(one) for one in value]
    return value


def _fields_of(kind: type, fields: Any) -> dict[str, Any]:
    """The fields of dataclass `kind` in what JSON gave; null in a field of type float is NaN."""
    if not isinstance(fields, dict):
        raise ValueError(f"{kind.__name__}: expected an object, got {type(fields).__name__}")
    declared = {f.name: f for f in dataclasses.fields(kind)}
    if unknown := sorted(set(fields) - set(declared)):
        raise ValueError(f"{kind.__name__}: unknown field {unknown[0]!r}; written by another version of regard?")
    for name, one in declared.items():
        required = one.default is dataclasses.MISSING and one.default_factory is dataclasses.MISSING
        if required and name not in fields:
            raise ValueError(f"{kind.__name__}: field {name!r} is missing")
    return {n: math.nan if value is None and declared[n].type is float else value for n, value in fields.items()}


def write_text(path: Path, text: str) -> None:
    """Write a file whole or not at all: to a temporary name beside it, then rename."""
    temporary = path.with_name(path.name + ".part")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)
