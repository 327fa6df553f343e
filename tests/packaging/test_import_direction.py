"""The house: imports go down only, and no room imports a room beside it unless the table says so."""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[2] / "src" / "regard"

# room -> the rooms that it may import, beyond itself. `report` draws what it is given, from results alone.
_PLAIN = {"auxiliary", "cards", "markdown", "results", "simulation"}
_LOW = {*_PLAIN, "specs", "ops"}
_MIDDLE = {*_LOW, "mixers", "reduction", "losses", "backbones", "models", "data", "conversion", "export"}
ALLOWED: dict[str, set[str]] = {
    "auxiliary": set(),
    "cards": {"markdown"},
    "markdown": set(),
    "results": set(),
    "simulation": set(),
    "specs": {"cards"},
    "ops": set(_PLAIN),
    "mixers": _LOW,
    "reduction": _LOW,
    "losses": _LOW,
    "backbones": {*_LOW, "mixers", "reduction"},
    "models": {*_LOW, "mixers", "reduction"},
    "data": set(_PLAIN),
    "conversion": {*_LOW, "mixers"},
    "export": _LOW,
    "report": {"markdown", "results"},
    "benchmark": _MIDDLE,
    "training": _MIDDLE,
    "inspection": _MIDDLE,
    "studies": {*_MIDDLE, "report", "benchmark", "training", "inspection"},
    "__main__": {"cli"},
    "cli": {*_MIDDLE, "report", "benchmark", "training", "inspection", "studies"},
}


def room_of(path: Path, package: Path = PACKAGE) -> str:
    """`mixers` for src/regard/mixers/knn.py, `cards` for src/regard/cards.py, empty for the package itself."""
    parts = path.relative_to(package).with_suffix("").parts
    return "" if parts == ("__init__",) else parts[0]


def rooms_imported(tree: ast.AST, module: str) -> set[str]:
    """The rooms of regard that a module's imports name, at any depth of the code; "" for the package itself."""
    rooms = set()
    for node in ast.walk(tree):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                base = ".".join([*module.split(".")[: -node.level], *filter(None, [node.module])])
            # `from regard import x`: x may be a room, or a name that the package passes on
            names = [f"regard.{alias.name}" for alias in node.names] if base == "regard" else [base]
        for name in names:
            parts = name.split(".")
            if parts[0] == "regard":
                rooms.add(parts[1] if len(parts) > 1 else "")
    return rooms


def violations(path: Path, package: Path = PACKAGE) -> list[str]:
    room = room_of(path, package)
    module = ".".join(["regard", *path.relative_to(package).with_suffix("").parts])
    imported = rooms_imported(ast.parse(path.read_text(encoding="utf-8")), module) - {room}
    public = {"__version__"}  # the one name of the package itself that rooms need
    return [
        f"{path.relative_to(package)}: {room} imports {other}" for other in sorted(imported - ALLOWED[room] - public)
    ]


SOURCES = [path for path in sorted(PACKAGE.rglob("*.py")) if room_of(path)]


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_go_down_only(path):
    assert room_of(path) in ALLOWED, f"a new room: add {room_of(path)!r} to the table here and in the design"
    assert not violations(path)


def test_the_table_has_no_cycle():
    for room, below in ALLOWED.items():
        for other in below:
            assert room not in ALLOWED[other], f"{room} and {other} import each other"


@pytest.mark.parametrize(
    ("room", "source"),
    [
        ("ops", "from regard.mixers import KNN"),
        ("ops", "import regard.studies.comparison"),
        ("report", "def late():\n    from regard import benchmark"),
        ("mixers", "from ..backbones import kvt"),
        ("data", "import regard"),
    ],
)
def test_a_wrong_import_is_seen(tmp_path, room, source):
    path = tmp_path / room / "module.py"
    path.parent.mkdir()
    path.write_text(source)
    assert violations(path, tmp_path)
