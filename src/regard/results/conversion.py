"""What conversion did to a model, and what tuning found."""

import dataclasses
import glob
import json
import statistics
from dataclasses import dataclass, field
from typing import Any, Self

from regard.results._json import fields_of, to_json
from regard.results.fidelity import Fidelity, PictureFidelity

__all__ = ["ConversionRecord", "ConversionRow", "MeasuredSetting", "Tuning"]


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
        known = fields_of(cls, json.loads(text))
        return cls(**{**known, "rows": tuple(ConversionRow(**fields_of(ConversionRow, row)) for row in known["rows"])})


@dataclass(frozen=True)
class MeasuredSetting:
    """A model with some of its attention modules converted, measured on pictures.

    Args:
        setting: mechanism in text form by module name; the modules not named are dense.
        flops: of the forward of all pictures together.
        pictures: how close the features of each came to those of the dense model.
    """

    setting: dict[str, str]
    flops: int
    pictures: tuple[PictureFidelity, ...]

    @classmethod
    def from_dict(cls, fields: dict[str, Any]) -> Self:
        """What `dataclasses.asdict` turned into `fields`. Raises ValueError if it is not one."""
        known = fields_of(cls, fields)
        pictures = tuple(PictureFidelity(**fields_of(PictureFidelity, one)) for one in known["pictures"])
        return cls(**{**known, "pictures": pictures})

    @property
    def fidelity(self) -> Fidelity:
        return Fidelity.of(self.pictures)

    def value(self, measure: str) -> float:
        """The mean over the pictures of one figure of PictureFidelity."""
        return statistics.fmean(getattr(one, measure) for one in self.pictures)


@dataclass(frozen=True)
class Tuning:
    """The cheapest setting of a model that `regard.tune` found, and all that was measured on the way.

    Prints as a table. `regard.convert(model, tuning.pattern)` puts it into a model of the same architecture.

    Args:
        model: the model's class.
        measure: the figure of PictureFidelity whose mean over the pictures was to hold.
        target: what it was to hold at least.
        dense: the model as it was.
        best: the setting found, measured again after it was put in by `regard.convert`.
        alone: each module with each candidate, all others dense.
        steps: the settings of the whole model that were tried after that, in order.
        left: why a module takes none of the candidates, by module name.
        modules: names of all attention modules, in the order in which the model calls them.
    """

    model: str
    measure: str
    target: float
    dense: MeasuredSetting
    best: MeasuredSetting
    alone: tuple[MeasuredSetting, ...] = ()
    steps: tuple[MeasuredSetting, ...] = ()
    left: dict[str, str] = field(default_factory=dict)
    modules: tuple[str, ...] = ()

    @property
    def pattern(self) -> dict[str, str | None]:
        """For `regard.convert`: the mechanism of every attention module in text form, None for those left dense."""
        return {glob.escape(name): self.best.setting.get(name) for name in self.modules}

    @property
    def curve(self) -> tuple[MeasuredSetting, ...]:
        """The trade-off: dense attention and every setting that held, from the most FLOPs to the fewest."""
        return (self.dense, *sorted((one for one in self.steps if self.holds(one)), key=lambda one: -one.flops))

    def holds(self, one: MeasuredSetting) -> bool:
        """True if a setting reaches the target."""
        return one.value(self.measure) >= self.target

    def __str__(self) -> str:
        lines = [
            f"{self.model}: {len(self.best.setting)} of {len(self.modules)} attention modules converted; "
            f"{self.measure} {self.best.value(self.measure):.5f} (asked for {self.target:g}) on {self._pictures()}; "
            f"{100 * (1 - self.best.flops / self.dense.flops):.1f} % of the model's FLOPs saved"
        ]
        losses = {next(iter(one.setting.items())): 1 - one.value(self.measure) for one in self.alone}
        cells = [("module", "alone loses", "mechanism, or why it was left")]
        for name in self.modules:
            chosen = self.best.setting.get(name)
            loss = f"{losses[name, chosen]:.2g}" if chosen else ""
            cells.append((name or "(the model)", loss, chosen or self.left.get(name, "no candidate held or paid")))
        widths = [max(len(row[i]) for row in cells) for i in range(2)]
        lines += [f"{a.ljust(widths[0])}  {b.rjust(widths[1])}  {c}" for a, b, c in cells]
        return "\n".join(lines)

    def _pictures(self) -> str:
        count = len(self.best.pictures)
        return f"{count} picture{'s' if count != 1 else ''}"

    def to_json(self) -> str:
        return to_json(dataclasses.asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Self:
        """Read what `to_json` wrote. Raises ValueError if the text is no JSON or no tuning."""
        return cls.from_dict(json.loads(text))

    @classmethod
    def from_dict(cls, fields: dict[str, Any]) -> Self:
        """What `dataclasses.asdict` turned into `fields`. Raises ValueError if it is not one."""
        known = fields_of(cls, fields)
        one = MeasuredSetting.from_dict
        return cls(
            **{
                **known,
                "dense": one(known["dense"]),
                "best": one(known["best"]),
                "alone": tuple(map(one, known.get("alone", ()))),
                "steps": tuple(map(one, known.get("steps", ()))),
                "modules": tuple(known.get("modules", ())),
            }
        )
