"""Compiles what a launcher would launch, for a GPU that need not be here."""

import inspect
import re
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import ModuleType
from typing import Any
from unittest import mock

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime import JITFunction

ARCHITECTURES = (80, 90)
_POINTERS = {
    torch.float32: "*fp32",
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.int32: "*i32",
    torch.int64: "*i64",
    torch.uint8: "*u8",
    torch.bool: "*i1",
}
_OPTIONS = ("num_warps", "num_stages", "enable_fp_fusion", "maxnreg")


@dataclass(frozen=True)
class Found:
    """A compiled kernel."""

    name: str
    shared: int
    compiled: Any

    def spilled(self) -> int:
        """Bytes of stack that a thread needs: registers that did not fit."""
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            file.write(self.compiled.asm["cubin"])
            file.flush()
            tool = triton.knobs.nvidia.cuobjdump.path
            told = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
        return int(re.search(r"STACK:(\d+)", told)[1])


class _Compiler:
    """Stands in a kernel's place: launching it compiles it."""

    def __init__(self, kernel: JITFunction, architecture: int, found: list[Found]) -> None:
        self.kernel, self.architecture, self.found = kernel, architecture, found

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        return self._compile

    def _compile(self, **arguments: Any) -> None:
        options = {name: arguments.pop(name) for name in _OPTIONS if name in arguments}
        assert set(arguments) == set(inspect.signature(self.kernel.fn).parameters), self.kernel.fn.__name__
        signature, constants, attributes = {}, {}, {}

        def describe(given: Any, path: tuple[int, ...], parameter: Any) -> Any:
            """A tuple's members are always specialized."""
            if isinstance(given, tuple):
                return tuple(describe(one, (*path, place), parameter) for place, one in enumerate(given))
            specialized = len(path) > 1 or not parameter.do_not_specialize
            if parameter.is_constexpr or given is None or (type(given) is int and given == 1 and specialized):
                constants[path] = given
                return "constexpr"
            if specialized and _divisible(given):
                attributes[path] = [["tt.divisibility", 16]]
            return _type(given)

        for place, parameter in enumerate(self.kernel.params):
            signature[parameter.name] = describe(arguments[parameter.name], (place,), parameter)
        source = ASTSource(self.kernel, signature, constants, attributes)
        compiled = triton.compile(source, target=GPUTarget("cuda", self.architecture, 32), options=options)
        self.found.append(Found(self.kernel.fn.__name__, compiled.metadata.shared, compiled))


def _type(value: Any) -> str:
    if isinstance(value, torch.Tensor):
        return _POINTERS[value.dtype]
    if isinstance(value, float):
        return "fp32"
    return "i32" if -(2**31) <= value < 2**31 else "i64"


def _divisible(value: Any) -> bool:
    if isinstance(value, torch.Tensor):
        return value.data_ptr() % 16 == 0
    return type(value) is int and value % 16 == 0


@contextmanager
def compiling(launchers: ModuleType, architecture: int) -> Iterator[list[Found]]:
    """Within this context, launching a kernel of the module compiles it into the list that is given."""
    found: list[Found] = []
    kernels = {name: one for name, one in vars(launchers).items() if isinstance(one, JITFunction)}
    with mock.patch.multiple(
        launchers, **{name: _Compiler(kernel, architecture, found) for name, kernel in kernels.items()}
    ):
        yield found
