"""Where the kernels cannot be built the install succeeds, and the PyTorch path says once that it runs."""

import shutil
from pathlib import Path

import pytest
from checkouts import borrowing_environment, copy_checkout, run

pytestmark = pytest.mark.slow

# Uses the operator twice, then says how often it warned, with what, and whether the result is right.
USE = """
import warnings
import torch
import torch.nn.functional as F
import regard

torch.manual_seed(0)
query, key, value = torch.randn(3, 2, 3, 16, 8).unbind()
with warnings.catch_warnings(record=True) as said:
    warnings.simplefilter("always")
    regard.knn_attention(query, key, value, topk=4)
    output = regard.knn_attention(query, key, value, topk=16)
said = [str(warning.message) for warning in said if issubclass(warning.category, regard.SlowPathWarning)]
assert len(said) == 1 and "not built" in said[0], said
assert regard.explain(regard.knn_attention, query, key, value, topk=4).backend == "pytorch"
torch.testing.assert_close(output, F.scaled_dot_product_attention(query, key, value))
print("regard:", regard.__file__)
"""

INSTALL = ("-m", "pip", "install", "--no-build-isolation", "--no-deps", "--verbose")


@pytest.fixture(scope="module")
def python(tmp_path_factory):
    return borrowing_environment(tmp_path_factory.mktemp("environment"))


def compiler_that_fails(folder: Path) -> dict[str, str]:
    """A compiler that answers for itself but compiles nothing, like one that is too old for C++20."""
    real = shutil.which("c++")
    if real is None:
        pytest.skip("no C++ compiler to imitate")
    script = folder / "c++"
    script.write_text(f'#!/bin/sh\ncase "$*" in -v|*-version|*dumpversion*) exec {real} "$@";; esac\nexit 1\n')
    script.chmod(0o755)
    return {"CXX": str(script)}


@pytest.mark.parametrize("lack", ["broken", "absent", "too old"])
def test_install_succeeds_and_the_slow_path_says_so(tmp_path, python, lack):
    environment = {
        "broken": lambda: {"CC": "/bin/false", "CXX": "/bin/false"},
        "absent": lambda: {"PATH": str(python.parent)},
        "too old": lambda: compiler_that_fails(tmp_path),
    }[lack]()
    checkout = copy_checkout(tmp_path / "checkout")
    stale = checkout / "src" / "regard" / "_C.so"
    stale.write_bytes(b"left by an earlier build")
    said = run(python, *INSTALL, "-e", checkout, **environment)
    assert "the C++ kernels are NOT built" in said
    assert not stale.exists()
    assert str(checkout) in run(python, "-c", USE, cwd=tmp_path)


def test_required_kernels_fail_the_install(tmp_path, python):
    checkout = copy_checkout(tmp_path / "checkout")
    with pytest.raises(AssertionError, match="the C\\+\\+ kernels cannot be built"):
        run(python, *INSTALL, "-e", checkout, CXX="/bin/false", REGARD_REQUIRE_KERNELS="1")
