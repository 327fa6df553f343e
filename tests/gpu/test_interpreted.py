"""The kernels under Triton's interpreter, each file in a process of its own (see conftest.py)."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent / "interpreted"
FILES = sorted(path.name for path in HERE.glob("test_*.py"))
NOTHING_COLLECTED = 5


def run(file: str, marked: str, root: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-n0", "-p", "no:cacheprovider", "-m", marked, str(HERE / file)],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        cwd=root,
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.parametrize("file", FILES)
def test_kernels_under_the_interpreter(file: str, request: pytest.FixtureRequest) -> None:
    done = run(file, "not slow", request.config.rootpath)
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
    assert " passed" in done.stdout


@pytest.mark.slow
@pytest.mark.parametrize("file", FILES)
def test_the_slow_ones(file: str, request: pytest.FixtureRequest) -> None:
    done = run(file, "slow", request.config.rootpath)
    if done.returncode == NOTHING_COLLECTED:
        pytest.skip("no slow ones")
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
