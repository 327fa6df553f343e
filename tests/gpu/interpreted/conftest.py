"""Every test here runs with uninitialised memory poisoned: what torch.empty gives is NaN, or the largest integer.

And with bfloat16 as GPUs have it. Triton's interpreter (3.6, 3.9) keeps it as 16-bit integers, which its tl.dot
multiplies as such, and rounds float32 to it toward zero, where GPUs round to nearest.
"""

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
import triton.language as tl
from triton.runtime import interpreter

_convert_float = interpreter._convert_float
_create_dot = interpreter.InterpreterBuilder.create_dot


def _bits_of_bfloat16(x: np.ndarray) -> np.ndarray:
    wide = torch.from_numpy(np.array(x, dtype=np.float32, ndmin=1))
    return wide.to(torch.bfloat16).view(torch.uint16).numpy().reshape(x.shape)


def _convert(x: np.ndarray, source: Any, target: Any, rounding_mode: Any) -> np.ndarray:
    if source == tl.float32 and target == tl.bfloat16:
        return _bits_of_bfloat16(x)
    if source == tl.bfloat16 and target == tl.float32:
        return x.astype(np.uint32) << 16
    return _convert_float(x, source, target, rounding_mode)


def _dot(builder: Any, a: Any, b: Any, *rest: Any) -> Any:
    return _create_dot(builder, _widened(a), _widened(b), *rest)


def _widened(handle: Any) -> Any:
    if handle.dtype.scalar != tl.bfloat16:
        return handle
    return interpreter.TensorHandle((handle.data.astype(np.uint32) << 16).view(np.float32), tl.float32)


@pytest.fixture(autouse=True, scope="session")
def bfloat16_as_on_a_gpu() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(interpreter, "_convert_float", _convert)
        patch.setattr(interpreter.InterpreterBuilder, "create_dot", _dot)
        yield


@pytest.fixture(autouse=True)
def poisoned_memory() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)  # with it, fill_uninitialized_memory is on
    yield
    torch.use_deterministic_algorithms(False)
