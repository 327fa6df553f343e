"""Source distribution and wheel hold all that git knows of the package, and nothing generated but the kernels."""

import tarfile
import zipfile

import pytest
from checkouts import borrowing_environment, copy_checkout, run, source_files

pytestmark = pytest.mark.slow

BUILD_SDIST = "import sys; from setuptools.build_meta import build_sdist; print(build_sdist(sys.argv[1]))"
LOAD = """
import sys
import regard
from regard.ops._library import problem

print(regard.__file__)
sys.exit(problem() or 0)
"""


def package_files() -> set[str]:
    """The package's files, as `regard/...`."""
    return {name.removeprefix("src/") for name in source_files() if name.startswith("src/regard/")}


def test_sdist_and_wheel(tmp_path):
    python = borrowing_environment(tmp_path / "environment")
    checkout = copy_checkout(tmp_path / "checkout")
    # What builds and runs leave behind must not travel.
    for left in ("src/regard/_C.so", "src/regard/__pycache__/x.cpython-311.pyc", "build/lib/regard/old.py"):
        (checkout / left).parent.mkdir(parents=True, exist_ok=True)
        (checkout / left).write_text("left behind")

    run(python, "-c", BUILD_SDIST, tmp_path, cwd=checkout)
    (sdist,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    in_package = {name.removeprefix("src/") for name in names if name.startswith("src/regard/") and "." in name[-8:]}
    assert package_files() <= {name.removeprefix("src/") for name in names}
    assert not in_package - package_files()
    assert {"setup.py", "pyproject.toml", "README.md", "LICENSE"} <= names

    pip = (python, "-m", "pip")
    wheel_options = ("--no-build-isolation", "--no-deps", "--quiet")
    run(*pip, "wheel", *wheel_options, "-w", tmp_path, sdist, REGARD_REQUIRE_KERNELS="1")
    (wheel,) = tmp_path.glob("*.whl")
    assert "-cp311-abi3-" in wheel.name
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if not name.endswith("/")}
    assert {name for name in names if ".dist-info/" not in name} == package_files() | {"regard/_C.so"}
    assert any(name.endswith("licenses/LICENSE") for name in names)

    run(*pip, "install", "--no-deps", "--quiet", wheel)
    assert str(tmp_path / "environment") in run(python, "-c", LOAD, cwd=tmp_path)
