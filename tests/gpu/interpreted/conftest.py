"""Every test here runs with uninitialised memory poisoned: what torch.empty gives is NaN, or the largest integer."""

from collections.abc import Iterator

import pytest
import torch


@pytest.fixture(autouse=True)
def poisoned_memory() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)  # with it, fill_uninitialized_memory is on
    yield
    torch.use_deterministic_algorithms(False)
