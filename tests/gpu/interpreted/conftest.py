"""Every test here runs with uninitialised memory poisoned: what torch.empty gives is NaN, or the largest integer."""

from collections.abc import Iterator

import numpy as np
import pytest
import torch
import triton.language as tl
from triton.runtime import interpreter


@pytest.fixture(autouse=True)
def poisoned_memory() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)  # with it, fill_uninitialized_memory is on
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(autouse=True)
def bfloat16_products(monkeypatch: pytest.MonkeyPatch) -> None:
    """The interpreter keeps bfloat16 as 16-bit integers, and its products multiply those integers."""
    plain = interpreter.InterpreterBuilder.create_dot

    def raised(factor):
        if factor.dtype.scalar != tl.bfloat16:
            return factor
        bits = factor.data.astype(np.uint32) << 16
        return interpreter.TensorHandle(bits.view(np.float32), tl.float32)

    def create_dot(self, a, b, *args):
        return plain(self, raised(a), raised(b), *args)

    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_dot", create_dot)
