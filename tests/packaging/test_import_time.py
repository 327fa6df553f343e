"""`import regard` is light: at most 0.3 s beyond torch's own import."""

import statistics
import subprocess
import sys

import pytest

ALLOWANCE = 0.3  # seconds, where torch's own import takes UNDISTURBED or less
UNDISTURBED = 1.2  # seconds; on a slower or busier machine the allowance grows with torch's own time
ROUNDS = 3

TIMED = """
from time import perf_counter
start = perf_counter()
import torch
torch_done = perf_counter()
{statement}
print(torch_done - start, perf_counter() - torch_done)
"""


@pytest.mark.parametrize("statement", ["import regard", "import regard; regard.knn_attention"])
def test_import_costs_little_beyond_torchs(statement):
    torchs, beyond = [], []
    for _ in range(ROUNDS):  # fresh processes; each measures both, so that load on the machine falls on both
        done = subprocess.run(
            [sys.executable, "-c", TIMED.format(statement=statement)], capture_output=True, text=True, check=True
        )
        first, second = map(float, done.stdout.split())
        torchs.append(first)
        beyond.append(second)
    ratio = statistics.median(other / first for first, other in zip(torchs, beyond, strict=True))
    allowed = ALLOWANCE / min(UNDISTURBED, *torchs)
    assert ratio <= allowed, f"{statement!r} takes {beyond} s beyond torch's {torchs} s"


def test_import_alone_loads_no_torch():
    check = "import sys, regard; sys.exit(1 if 'torch' in sys.modules else 0)"
    assert subprocess.run([sys.executable, "-c", check], check=False).returncode == 0


def test_the_operators_leave_torchs_compiler_unloaded():
    """torch._dynamo takes a second to import; a decorator of torch.compiler is enough to load it."""
    check = "import sys, torch; {} sys.exit('torch._dynamo' in sys.modules)"
    codes = [
        subprocess.run([sys.executable, "-c", check.format(statement)], check=False).returncode
        for statement in ("", "import regard; regard.knn_attention;")
    ]
    assert codes == [0, 0], "torch alone, then regard's operators: 1 where torch._dynamo was loaded"
