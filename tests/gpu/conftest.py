"""Two rooms in one. Triton asks once, when it is imported, whether kernels are to be interpreted (TRITON_INTERPRET=1,
CPU tensors) or compiled, and any test of torch.compile may have imported it before. So a process is one or the other:

- uninterpreted, as `pytest` runs: kernels are compiled ahead of time for GPUs that need not be here, and
  test_interpreted.py runs each file of interpreted/ in a process of its own;
- `TRITON_INTERPRET=1 pytest tests/gpu` runs interpreted/ directly.
"""

import sys
from pathlib import Path

from regard.ops import _triton

sys.path[:0] = [str(Path(__file__).parents[1] / "ops"), str(Path(__file__).parent)]  # their input factories

if _triton.available() is not None:
    collect_ignore_glob = ["*"]
elif _triton.interpreted():
    collect_ignore_glob = ["test_*.py"]
else:
    collect_ignore = ["interpreted"]
