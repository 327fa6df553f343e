"""The kernels of lesser instruction sets than this machine's best pass the same tests, in processes held to them."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from attention_cases import needs_kernels

HERE = Path(__file__).parent
# All that computes with kernels; how operators fit into PyTorch does not depend on the instruction set.
FILES = [
    *(f"test_knn_{part}.py" for part in ("forward", "backward", "edges")),
    *(f"test_multipole_{part}.py" for part in ("forward", "backward", "identities", "edges")),
    *(f"test_routed_{part}.py" for part in ("forward", "backward", "identities", "edges")),
    "test_kmeans.py",
]


@needs_kernels
@pytest.mark.skipif("REGARD_INSTRUCTION_SET" in os.environ, reason="already held to one instruction set")
@pytest.mark.parametrize("name", ["avx2", "plain"])
def test_lesser_instruction_sets_pass_the_same_tests(name: str) -> None:
    environment = {**os.environ, "REGARD_INSTRUCTION_SET": name}
    seen = subprocess.run(
        [sys.executable, "-c", "from regard.ops._library import instruction_set; print(instruction_set())"],
        env=environment, capture_output=True, text=True, check=True,
    )  # fmt: skip
    if seen.stdout.strip() != name:
        pytest.skip(f"this machine has {seen.stdout.strip()} at most")
    chosen = ["-k", "not (pytorch or blocks or derivatives or compiles or opcheck)", *(str(HERE / f) for f in FILES)]
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-n0", "-x", *chosen], env=environment, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stdout[-3000:]
