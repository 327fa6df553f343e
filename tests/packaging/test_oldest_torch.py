"""The operator and mixer tests under the oldest torch and timm, with the kernels that were built here."""

import re
import shutil
import tempfile
import venv
from pathlib import Path

import pytest
from checkouts import ROOT, project, run

import regard
from regard.ops import _library

pytestmark = pytest.mark.slow

TORCHVISION = {"2.11": "0.26"}  # torch -> the torchvision made for it

CHECK = "import sys, torch; print(torch.__version__); from regard.ops._library import problem; sys.exit(problem() or 0)"


def oldest(requirements: list[str]) -> list[str]:
    """The requirements with torch, torchvision and timm held to the oldest that pyproject.toml allows."""
    floors = {}
    for requirement in requirements:
        if found := re.fullmatch(r"(torch|timm)>=([\d.]+)", requirement):
            floors[found[1]] = found[2]
    held = [f"torch=={floors['torch']}.*", f"torchvision=={TORCHVISION[floors['torch']]}.*", f"timm=={floors['timm']}"]
    return held + [need for need in requirements if not re.match(r"(torch|torchvision|timm)\b", need)]


@pytest.fixture
def folder():
    # Gigabytes: not tmp_path, which pytest keeps for a while.
    path = Path(tempfile.mkdtemp(prefix="regard-oldest-"))
    yield path
    shutil.rmtree(path, ignore_errors=True)


def test_operators_and_mixers_under_the_oldest_torch(folder):
    assert not _library.problem(), "the kernels must be built here, so that they can be loaded there"
    package = Path(regard.__file__).resolve().parent
    venv.create(folder / "environment", with_pip=True)
    python = folder / "environment" / "bin" / "python"
    described = project()["project"]
    # Without extras of its own: what they test is skipped where they are missing.
    tested = [need for need in described["optional-dependencies"]["test"] if not need.startswith("regard[")]
    needs = [*oldest(described["dependencies"]), *tested]
    run(python, "-m", "pip", "install", "--quiet", *needs)

    path = {"PYTHONPATH": str(package.parent), "REGARD_KERNELS": str(next(package.glob("_C*.so")))}
    assert run(python, "-c", CHECK, **path).startswith("2.11.")
    rooms = ("tests/ops", "tests/mixers", "tests/backbones", "tests/conversion")
    said = run(
        *(python, "-m", "pytest", "-q", "-n0", "-p", "no:cacheprovider", *rooms),
        cwd=ROOT,
        **path,
    )
    assert re.search(r"\d+ passed", said)
