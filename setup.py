"""Builds the C++ kernels during `pip install`. Everything else about the package is in pyproject.toml.

The library is compiled against torch's stable ABI, so one binary serves every torch >= 2.11. Where it cannot be built
(no compiler, one too old) the install goes on, and regard computes on its PyTorch path, which it says at first use.
With REGARD_REQUIRE_KERNELS=1 in the environment the install fails instead.
"""

import os
import sys
from pathlib import Path

from setuptools import setup

NAME = "regard._C"
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
            self.attempt(super().build_extensions)

        def build_extension(self, extension):
            self.attempt(super().build_extension, extension)

        def attempt(self, build, *arguments):
            try:
                build(*arguments)
            except Exception as error:  # of many kinds: no compiler, a wrong one, one that fails
                tell_failure(error)
                for stale in (INPLACE, Path(self.get_ext_fullpath(NAME))):  # must not pass for the new one
                    stale.unlink(missing_ok=True)

    kernels = CppExtension(
        NAME,
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
