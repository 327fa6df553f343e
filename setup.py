"""Builds the C++ kernels during `pip install`. Everything else about the package is in pyproject.toml.

The library is compiled against torch's stable ABI, so one binary serves every torch >= 2.11. Where it cannot be built (no
compiler, one too old) the install goes on, and regard computes on its PyTorch path, which it says at first use. With
REGARD_REQUIRE_KERNELS=1 in the environment the install fails instead.
"""

import os
import sys
from pathlib import Path

from setuptools import setup

CSRC = Path("src/regard/csrc")
INPLACE = Path("src/regard/_C.so")  # where an editable install has the library

# No -march flag: the kernels for each instruction set ask for it in their own source and are chosen at run time.
COMPILE_FLAGS = [
    "-O3",
    "-std=c++20",
    "-fvisibility=hidden",
    "-fno-math-errno",
    "-DTORCH_TARGET_VERSION=0x020b000000000000",
    "-DTORCH_STABLE_ONLY",
]


def options():
    """What setup() needs to build the kernels; nothing where torch cannot be imported."""
    try:
        from torch.utils.cpp_extension import BuildExtension, CppExtension
    except ImportError as error:
        tell_failure(error)
        return {}

    class BuildKernels(BuildExtension):
        """torch's build, except that a failure leaves regard without kernels rather than without an install."""

        def __init__(self, *args, **kwargs):
            # The library is loaded by torch, not imported by Python, so its name carries no Python version.
            super().__init__(*args, **{**kwargs, "no_python_abi_suffix": True})

        def build_extensions(self):
            try:
                super().build_extensions()
            except Exception as error:  # torch raises several kinds where there is no compiler, or a wrong one
                tell_failure(error)
                INPLACE.unlink(missing_ok=True)  # a stale library must not pass for the new one

    kernels = CppExtension(
        "regard._C",
        sources=sorted(str(path) for path in CSRC.glob("*.cpp")),
        include_dirs=[str(CSRC.resolve())],
        depends=sorted(str(path) for path in CSRC.glob("*.h")),
        extra_compile_args=COMPILE_FLAGS,
        py_limited_api=True,
        optional=True,
    )
    return {"ext_modules": [kernels], "cmdclass": {"build_ext": BuildKernels}}


def tell_failure(error):
    """Say that there will be no kernels, or raise if they are required. pip shows it with -v."""
    if os.environ.get("REGARD_REQUIRE_KERNELS") == "1":
        raise SystemExit(f"regard: the C++ kernels cannot be built: {error}")
    print(f"regard: the C++ kernels are NOT built, the PyTorch path will run: {error}", file=sys.stderr)


if __name__ == "__main__":
    setup(**options(), options={"bdist_wheel": {"py_limited_api": "cp311"}})
