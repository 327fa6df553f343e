"""Builds the C++ kernels during `pip install`. Everything else about the package is in pyproject.toml.

The library is compiled against torch's stable ABI, so one binary serves every torch >= 2.11. It is optional: where there
is no compiler the install goes on and regard computes on its PyTorch path, which it says at first use.
"""

import sys
from pathlib import Path

from setuptools import setup

CSRC = Path("src/regard/csrc")


def extensions():
    try:
        from torch.utils.cpp_extension import BuildExtension, CppExtension
    except ImportError as error:
        print(f"regard: the C++ kernels are not built ({error})", file=sys.stderr)
        return {}
    kernels = CppExtension(
        "regard._C",
        sources=sorted(str(path) for path in CSRC.glob("*.cpp")),
        include_dirs=[str(CSRC.resolve())],
        depends=sorted(str(path) for path in CSRC.glob("*.h")),
        extra_compile_args=[
            "-O3",
            "-std=c++20",
            "-fvisibility=hidden",
            "-fno-math-errno",
            "-DTORCH_TARGET_VERSION=0x020b000000000000",
            "-DTORCH_STABLE_ONLY",
        ],
        py_limited_api=True,
        optional=True,
    )
    return {
        "ext_modules": [kernels],
        "cmdclass": {"build_ext": BuildExtension.with_options(no_python_abi_suffix=True, use_ninja=False)},
    }


setup(**extensions(), options={"bdist_wheel": {"py_limited_api": "cp311"}})
