"""Every mechanism under one recipe: what docs/mechanisms.md is made from."""

import dataclasses
import json
from dataclasses import dataclass, field
from typing import Any, Self

from regard.results._json import fields_of, to_json
from regard.results.environment import Environment

__all__ = ["LayerTime", "MechanismResult", "MechanismStudy"]


@dataclass
class LayerTime:
    """One mechanism beside dense attention at one size. Ratios are dense time over this one's: above 1 is faster."""

    tokens: int
    direction: str  # "forward" or "forward+backward"
    seconds: float  # median of interleaved repeats
    ratio: float
    ratio_low: float  # first quartile of the rounds' ratios
    ratio_high: float  # third quartile


@dataclass
class MechanismResult:
    """One mechanism, modifier or composition.

    Args:
        name: of its card; empty for other forms and for compositions.
        mechanism: text form of what was trained.
        label: the same without options at their defaults.
        accuracies: test accuracy by seed.
        difference: mean of the paired differences from dense attention; None for dense attention itself.
        half_width: half of their 95 % t-interval.
        parameters: of the trained model.
        flops: of its forward, one image.
        times: of one attention layer; of a whole small model where the mechanism changes more than the layer.
        best_part: of a composition, the one of its parts that did best; empty if it is none.
        gain, gain_half_width: mean of the paired differences from that part, and half of their 95 % t-interval.
        growth: exponent of the layer's forward time over tokens, between the two largest sizes; None for whole models.
    """

    name: str
    mechanism: str
    label: str
    accuracies: list[float] = field(default_factory=list)
    difference: float | None = None
    half_width: float | None = None
    parameters: int | None = None
    flops: int | None = None
    times: list[LayerTime] = field(default_factory=list)
    growth: float | None = None
    best_part: str = ""
    gain: float | None = None
    gain_half_width: float | None = None


@dataclass
class MechanismStudy:
    """All mechanisms trained and timed side by side.

    Args:
        settings: model, data, epochs, seeds, sizes.
        environment: where it ran.
        results: in the order of the registry; compositions last.
        command: the command that reproduces it.
        notes: what a reader must know beside the figures, one sentence each.
    """

    settings: dict[str, Any]
    environment: Environment
    results: list[MechanismResult] = field(default_factory=list)
    command: str = ""
    notes: list[str] = field(default_factory=list)

    def to_json(self) -> str:
        return to_json(dataclasses.asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Self:
        """Read what `to_json` wrote.

        Raises:
            ValueError: the text is no JSON, or no such study; the message names the field.
        """
        known = fields_of(cls, json.loads(text))
        known["environment"] = Environment(**fields_of(Environment, known["environment"]))
        known["results"] = [MechanismResult(**fields_of(MechanismResult, one)) for one in known.get("results", [])]
        for one in known["results"]:
            one.times = [LayerTime(**fields_of(LayerTime, time)) for time in one.times]
        return cls(**known)

    def by_name(self) -> dict[str, MechanismResult]:
        """The results of mechanisms and modifiers, by their card's name."""
        return {one.name: one for one in self.results if one.name}
