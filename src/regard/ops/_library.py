"""Loads the compiled kernels, if the install built them.

Two environment variables are for tests: `REGARD_KERNELS` names another library to load (one built with sanitizers),
`REGARD_INSTRUCTION_SET` (`plain`, `avx2`, `avx512`) holds the kernels to less than the machine's best instruction set.
"""

import os
from pathlib import Path

import torch
from torch import Tensor

from regard.ops._dispatch import Refusal

__all__ = ["instruction_set", "problem", "refusal"]


_DTYPES = (torch.float32, torch.bfloat16, torch.float16)

# None until the kernels were looked for. The operators look when they are imported, so a compiled call finds text here,
# which torch.compile takes for a constant.
_problem: str | None = None


def problem() -> str:
    """Why the C++ kernels are not here; empty if they are loaded."""
    global _problem
    if _problem is None:
        _problem = _look_and_load()
    return _problem


def refusal(tensor: Tensor) -> Refusal | None:
    """Why the C++ kernels do not take tensors like this one; None if they do."""
    if found := problem():
        return Refusal(found)
    if tensor.device.type != "cpu":
        return Refusal(f"the tensors are on {tensor.device.type}; this kernel runs on the processor", elsewhere=True)
    if tensor.dtype not in _DTYPES:
        return Refusal(f"{tensor.dtype} is not among float32, bfloat16, float16")
    return None


def _look_and_load() -> str:
    asked = os.environ.get("REGARD_KERNELS")
    found = [Path(asked)] if asked else sorted(Path(__file__).resolve().parents[1].glob("_C*.so"))
    if not found:
        return (
            "the C++ kernels were not built (no C++ compiler at install time?); install a compiler and reinstall regard"
        )
    try:
        torch.ops.load_library(str(found[0]))
    except (OSError, RuntimeError) as error:
        return f"the C++ kernels do not load: {error}"
    if not torch._C._dispatch_has_kernel_for_dispatch_key("regard::knn_attention", "CPU"):
        return f"{found[0].name} holds no kernels; reinstall regard"
    return ""


def instruction_set() -> str:
    """The instruction set that the CPU kernels use on this machine, or why there are none."""
    if problem():
        return "none"
    return ("plain", "avx2", "avx512")[torch.ops.regard.instruction_set()]
