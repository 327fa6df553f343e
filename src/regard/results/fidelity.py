"""How close features come to those that dense attention gives."""

import dataclasses
import json
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Self

from regard.results._json import fields_of, to_json
from regard.results.environment import Environment

__all__ = ["Fidelity", "FidelityPoint", "FidelityStudy", "PictureFidelity", "Spread"]


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
        known = fields_of(cls, fields)
        known["fidelity"] = PictureFidelity(**fields_of(PictureFidelity, known["fidelity"]))
        if known.get("layers") is not None:
            known["layers"] = [
                [PictureFidelity(**fields_of(PictureFidelity, head)) for head in layer] for layer in known["layers"]
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
        known = fields_of(cls, json.loads(text))
        known["environment"] = Environment(**fields_of(Environment, known["environment"]))
        known["points"] = [FidelityPoint.from_dict(point) for point in known.get("points", [])]
        return cls(**known)
