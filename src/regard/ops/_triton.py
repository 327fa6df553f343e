"""What the Triton kernels of all operators share: who may use them, how they are registered, which block sizes fit.

Kernels are imported when one first runs, never by importing regard: Triton takes a second. An operator's kernels
lie in its `triton.py`; beside `@triton.jit` functions it has launchers that take and return what the operator does.
"""

import contextlib
import functools
import importlib
import importlib.util
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from regard.ops._dispatch import Refusal, constant_when_traced

__all__ = [
    "LARGEST_DIM",
    "Config",
    "available",
    "first_that_fits",
    "interpreted",
    "only_config",
    "padded",
    "refusal",
    "register",
]

LARGEST_DIM = 256
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_OLDEST = (8, 0)  # compute capability: bfloat16 products, and shared memory for the block sizes


@constant_when_traced
def available() -> str | None:
    """Why no Triton kernel can run in this process; None if one may. Imports nothing."""
    return _not_installed()


@functools.cache
def _not_installed() -> str | None:
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed; install the package triton"
    return None


def interpreted() -> bool:
    """Whether kernels run in Triton's interpreter, on CPU tensors: for tests. Triton asks once, when imported."""
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "yes", "on", "y")


def refusal(*tensors: Tensor) -> Refusal | None:
    """Why Triton kernels do not take tensors like these, alike in device and dtype, head_dim last; None if they do."""
    if found := available():
        return Refusal(found)
    first = tensors[0]
    if first.device.type != "cuda":
        return Refusal(f"the tensors are on {first.device.type}; this kernel runs on the GPU", elsewhere=True)
    if first.dtype not in _DTYPES:
        return Refusal(f"{first.dtype} is not among float32, bfloat16, float16")
    for tensor in tensors:
        if tensor.shape[-1] > LARGEST_DIM:
            return Refusal(f"head_dim {tensor.shape[-1]} is above {LARGEST_DIM}")
    if found := _too_old(first.device.index):
        return Refusal(found)
    return None


@constant_when_traced
def _too_old(device: int | None) -> str | None:
    if not torch.cuda.is_available():  # fake tensors
        return None
    capability = torch.cuda.get_device_capability(device)
    if torch.version.hip is None and capability < _OLDEST:
        asked, found = (".".join(map(str, pair)) for pair in (_OLDEST, capability))
        return f"the GPU has compute capability {found}; these kernels need {asked}"
    return None


def register(operator: str, module: str, launcher: str, otherwise: Callable[..., Any]) -> None:
    """Let `launcher` of `module` compute `regard::operator` on CUDA tensors. The module is imported at the first call.

    The operator's first three arguments are tensors with head_dim last.

    Args:
        otherwise: computes the calls whose tensors are refused, as PyTorch does where nothing is registered.
    """
    if available() is not None:
        return

    def launch(*args: Any) -> Any:
        if refusal(*args[:3]) is not None:
            return otherwise(*args)
        with torch.cuda.device_of(args[0]):  # Triton launches on the current device
            return getattr(importlib.import_module(module), launcher)(*args)

    torch.library.impl(f"regard::{operator}", "CUDA", launch)


@dataclass(frozen=True)
class Config:
    """One way to launch a kernel: its block sizes, by the names of its constexpr arguments; warps; pipeline stages."""

    blocks: tuple[tuple[str, int], ...]
    num_warps: int = 4
    num_stages: int = 2

    @staticmethod
    def of(num_warps: int = 4, num_stages: int = 2, **blocks: int) -> "Config":
        return Config(tuple(blocks.items()), num_warps, num_stages)

    def __getitem__(self, name: str) -> int:
        return dict(self.blocks)[name]

    def options(self) -> dict[str, int]:
        """Keyword arguments of the launch."""
        return {**dict(self.blocks), "num_warps": self.num_warps, "num_stages": self.num_stages}


def first_that_fits(configs: Sequence[Config], shared_memory: Callable[[Config], int], device: torch.device) -> Config:
    """The first of `configs` (best first) that fits the device's shared memory.

    A fixed choice, not a search at run time: a search may choose another order of summation in another process, and
    two runs would no longer agree bit for bit. benchmarks/gpu.py times all that fit, to put the best one first.

    Args:
        shared_memory: bytes that a block of threads needs under a config, from above.

    Raises:
        RuntimeError: none fits.
    """
    if _only is not None:
        return _only
    room = _shared_memory(device)
    for config in configs:
        if shared_memory(config) <= room:
            return config
    least = min(shared_memory(config) for config in configs)
    raise RuntimeError(f"the GPU has {room} bytes of shared memory a block; this kernel needs {least} at least")


_only: Config | None = None


@contextlib.contextmanager
def only_config(config: Config) -> Iterator[None]:
    """Within this context `first_that_fits` gives this config: for tests and timing."""
    global _only
    before, _only = _only, config
    try:
        yield
    finally:
        _only = before


@functools.cache
def _shared_memory(device: torch.device) -> int:
    """Bytes that one block of threads may have."""
    if device.type != "cuda":
        return 1 << 30
    properties = torch.cuda.get_device_properties(device)
    # ROCm has no such opt-in: 64 KiB everywhere.
    return int(getattr(properties, "shared_memory_per_block_optin", 65536))


def padded(dim: int) -> int:
    """The power of two that a kernel's tiles have for `dim` channels: what tl.dot multiplies, at least 16."""
    return max(16, 1 << (dim - 1).bit_length())
