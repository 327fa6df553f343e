"""Compiles what a launcher would launch, for a GPU that need not be here."""

import inspect
import re
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
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


@dataclass
class _Arguments:
    """What a launch tells the compiler of its arguments, which may be tuples of others; by their paths."""

    constants: dict[tuple[int, ...], Any]
    attributes: dict[tuple[int, ...], list[list[Any]]]

    def type_of(self, value: Any, path: tuple[int, ...], constant: bool, specialized: bool) -> Any:
        if isinstance(value, tuple):  # whose members are specialized whatever the kernel says
            types = [self.type_of(one, (*path, place), False, True) for place, one in enumerate(value)]
            return getattr(type(value), "_make", tuple)(types)
        if constant or value is None or (type(value) is int and value == 1 and specialized):
            self.constants[path] = value
            return "constexpr"
        if specialized and _divisible(value):
            self.attributes[path] = [["tt.divisibility", 16]]
        return _type(value)


def _compile(kernel: JITFunction, architecture: int, *given: Any, **named: Any) -> Found:
    """Compile what a launch with these arguments would run."""
    options = {name: named.pop(name) for name in _OPTIONS if name in named}
    arguments = inspect.signature(kernel.fn).bind(*given, **named).arguments
    told = _Arguments({}, {})
    signature = {
        p.name: told.type_of(arguments[p.name], (place,), p.is_constexpr, not p.do_not_specialize)
        for place, p in enumerate(kernel.params)
    }
    source = ASTSource(kernel, signature, told.constants, told.attributes)
    compiled = triton.compile(source, target=GPUTarget("cuda", architecture, 32), options=options)
    return Found(kernel.fn.__name__, compiled.metadata.shared, compiled)


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

    def stand_in(kernel: JITFunction) -> Any:
        def run(*given: Any, grid: Any, warmup: bool, **named: Any) -> None:
            found.append(_compile(kernel, architecture, *given, **named))

        return mock.patch.object(kernel, "run", run)

    with ExitStack() as patches:
        for kernel in vars(launchers).values():
            if isinstance(kernel, JITFunction):
                patches.enter_context(stand_in(kernel))
        yield found
