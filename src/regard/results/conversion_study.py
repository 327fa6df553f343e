"""All that one `regard convert` found."""

import dataclasses
import json
from dataclasses import dataclass, field
from typing import Any, Self

from regard.results._json import fields_of, to_json
from regard.results.conversion import ConversionRecord, Tuning
from regard.results.environment import Environment
from regard.results.fidelity import Fidelity, Spread
from regard.results.maps import AttentionMap

__all__ = ["ConversionStudy", "ConvertedModel", "ConvertedPhoto"]


@dataclass
class ConvertedModel:
    """A model with one mechanism in it, beside the dense one.

    Args:
        name: `dense`, a mechanism's text form, or `tuned`.
        seconds, seconds_low, seconds_high: of one picture's forward: median and quartiles of interleaved repeats.
        speed, speed_low, speed_high: the dense model's time over this one's: median and quartiles of the repeats' own
            ratios.
        flops: of one picture's forward.
        peak_memory: of one picture's forward, in bytes; None if it was not measured.
        record: which modules were converted; None for the dense model.
        fidelity: of the features over all pictures; None for the dense model.
        layers: centred cosine of each converted module's attention alone, mean over heads, on what dense attention
            saw; None if that was not asked.
    """

    name: str
    seconds: float
    seconds_low: float
    seconds_high: float
    speed: float
    speed_low: float
    speed_high: float
    repeats: int
    flops: int
    peak_memory: int | None = None
    record: ConversionRecord | None = None
    fidelity: Fidelity | None = None
    layers: dict[str, float] | None = None

    @classmethod
    def from_dict(cls, fields: dict[str, Any]) -> Self:
        """What `dataclasses.asdict` turned into `fields`. Raises ValueError if it is not one."""
        known = fields_of(cls, fields)
        if known.get("record") is not None:
            known["record"] = ConversionRecord.from_json(json.dumps(known["record"]))
        if known.get("fidelity") is not None:
            found = fields_of(Fidelity, known["fidelity"])
            spreads = {name: Spread(**one) for name, one in found.items() if isinstance(one, dict)}
            known["fidelity"] = Fidelity(**{**found, **spreads})
        return cls(**known)


@dataclass
class ConvertedPhoto:
    """One photograph: whom a patch of it looks at, and where the features change.

    Args:
        name: of the photograph.
        pixels: rows x columns x channels, 0-255, as the model saw it but smaller.
        maps: of one query patch in the last layer, `dense` first; their own `pixels` are empty.
        losses: 1 - centred cosine of every patch, rows x columns, by mechanism.
    """

    name: str
    pixels: list[list[list[int]]]
    maps: list[AttentionMap] = field(default_factory=list)
    losses: dict[str, list[list[float]]] = field(default_factory=dict)

    @classmethod
    def from_dict(cls, fields: dict[str, Any]) -> Self:
        """What `dataclasses.asdict` turned into `fields`. Raises ValueError if it is not one."""
        known = fields_of(cls, fields)
        known["maps"] = [AttentionMap(**fields_of(AttentionMap, one)) for one in known.get("maps", [])]
        for one in known["maps"]:
            one.query = tuple(one.query)
        return cls(**known)


@dataclass
class ConversionStudy:
    """All that one `regard convert` found.

    Args:
        settings: what was asked, and what followed from it (size, tokens).
        environment: where it ran.
        models: the dense model first.
        photos: those that are shown.
        tuning: if it was asked.
        notes: what a reader must know beside the figures, one sentence each.
        command: the command that reproduces it.
    """

    settings: dict[str, Any]
    environment: Environment
    models: list[ConvertedModel] = field(default_factory=list)
    photos: list[ConvertedPhoto] = field(default_factory=list)
    tuning: Tuning | None = None
    notes: list[str] = field(default_factory=list)
    command: str = ""

    def to_json(self) -> str:
        return to_json(dataclasses.asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Self:
        """Read what `to_json` wrote. Raises ValueError if the text is no JSON or no study."""
        known = fields_of(cls, json.loads(text))
        known["environment"] = Environment(**fields_of(Environment, known["environment"]))
        known["models"] = [ConvertedModel.from_dict(one) for one in known.get("models", [])]
        known["photos"] = [ConvertedPhoto.from_dict(one) for one in known.get("photos", [])]
        if known.get("tuning") is not None:
            known["tuning"] = Tuning.from_dict(known["tuning"])
        return cls(**known)
