"""The test matrix: every registered mechanism with its default options, and some with others."""

import sys
from pathlib import Path

import pytest
import torch

from regard.mixers import mechanisms, parse_mechanism
from regard.specs import Mechanism

sys.path.insert(0, str(Path(__file__).parents[1] / "ops"))  # attention_cases

# Further options worth the generic tests; each mechanism's defaults are in the matrix anyway.
_MORE = (
    "knn(topk=3)",
    "knn(topk=1.0)",
    "sparsifiner(budget=5, coefficients=0.05, basis_grid=(3, 5), official=True)",
    "knn(topk=3, tail='sample', num_samples=4)",
    "knn(topk=5, metric='euclidean')",
    "multipole(num_clusters=5, near=2, far='gaussian')",
    "clustered(reduction=2)",
    "multipole(near=20)",
    "neighborhood(kernel_size=3, dilation=2)",
    "proxy(num_proxies=2, gamma=0.5, block_size=9, stride=2, min_tokens=0, budget='block')",
    "neighborhood(kernel_size=4, stride=2, border='replicate')",
    "bilevel(region_size=3, topk=0.5, lce=3)",
    "moh(shared=0, routed=2)",
)


def _matrix() -> list[str]:
    return [str(mechanism()) for mechanism in mechanisms().values()] + list(_MORE)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "mechanism" in metafunc.fixturenames:
        metafunc.parametrize("mechanism", _matrix(), indirect=True)


@pytest.fixture
def mechanism(request: pytest.FixtureRequest) -> Mechanism:
    torch.manual_seed(0)
    return parse_mechanism(request.param)
