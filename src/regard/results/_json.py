"""Results to JSON and back, and files written whole or not at all."""

import dataclasses
import json
import math
import re
from pathlib import Path
from typing import Any

__all__ = ["fields_of", "to_json", "write_text"]


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


def fields_of(kind: type, fields: Any) -> dict[str, Any]:
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
