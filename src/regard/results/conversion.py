"""What conversion did to a model."""

import dataclasses
import json
from dataclasses import dataclass
from typing import Self

from regard.results._json import fields_of, to_json

__all__ = ["ConversionRecord", "ConversionRow"]


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
