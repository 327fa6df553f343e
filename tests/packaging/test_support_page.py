"""docs/support.md covers every operator, dtype and backend; what is in it was run by tools/support.py."""

import itertools
import runpy
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
TOOL = runpy.run_path(str(ROOT / "tools" / "support.py"), run_name="tool")


def cells() -> dict[tuple[str, ...], list[str]]:
    lines = (ROOT / "docs" / "support.md").read_text(encoding="utf-8").splitlines()
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("|")]
    assert tuple(rows[0]) == TOOL["COLUMNS"]
    return {tuple(row[:3]): row[3:] for row in rows[2:]}


def test_every_operator_dtype_and_backend_has_a_row():
    found = cells()
    for row in itertools.product(TOOL["OPERATORS"], TOOL["DTYPES"], TOOL["BACKENDS"]):
        assert row in found
    assert (ROOT / "docs" / "support.md").read_text(encoding="utf-8").startswith(TOOL["TEXT"])


def test_float32_works_everywhere_and_is_exact_to_rounding():
    for (operator, dtype, backend), row in cells().items():
        if dtype == "float32":
            assert row[2:] == ["yes"] * 3, (operator, backend, row)
            assert all(float(error) < 1e-4 for error in row[:2]), (operator, backend, row)


def test_gpus_are_not_claimed():
    assert all(row[0] == TOOL["UNMEASURED"] for (_, _, backend), row in cells().items() if backend == "cuda")
