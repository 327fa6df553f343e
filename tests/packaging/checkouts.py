"""Copies of the checkout and environments for the tests that install regard."""

import os
import shutil
import subprocess
import sys
import tomllib
import venv
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]


def run(*command: str | Path, cwd: Path | None = None, **environment: str) -> str:
    """Run a command and return what it printed.

    Raises:
        AssertionError: it failed; with the end of what it printed.
    """
    done = subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        env={**os.environ, **environment},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        check=False,
    )
    if done.returncode != 0:
        raise AssertionError(f"{command} exited with {done.returncode}:\n{done.stdout[-6000:]}")
    return done.stdout


def source_files() -> list[str]:
    """The files that git knows or would take, relative to the root: nothing that a build or a run left."""
    listed = run("git", "ls-files", "-z", "--cached", "--others", "--exclude-standard", cwd=ROOT)
    return [name for name in listed.split("\0") if name and (ROOT / name).is_file()]


def copy_checkout(target: Path) -> Path:
    """A copy of the checkout as a clone would have it, uncommitted changes included."""
    for name in source_files():
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / name, target / name)
    return target


def borrowing_environment(target: Path) -> Path:
    """A virtual environment that sees this one's packages but not its regard; returns its Python.

    Installing torch again would take minutes and gigabytes. The path file adds site-packages without reading the path
    files in there, one of which makes regard importable here.
    """
    venv.create(target, with_pip=True)
    python = target / "bin" / "python"
    site = Path(run(python, "-c", "import sysconfig; print(sysconfig.get_paths()['purelib'])").strip())
    import torch

    (site / "borrowed.pth").write_text(str(Path(torch.__file__).resolve().parents[1]) + "\n")
    run(python, "-m", "pip", "install", "--quiet", *project()["build-system"]["requires"])
    return python


def project() -> dict[str, Any]:
    """pyproject.toml, read."""
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


PYTHON = Path(sys.executable)
