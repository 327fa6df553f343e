"""The machine: what it is, and what it reaches at best."""

import datetime
import os
import platform
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from regard import __version__
from regard.ops import _library
from regard.results import Environment

__all__ = ["Ceilings", "environment", "measure_ceilings"]


def environment(device: str = "cpu") -> Environment:
    """What figures depend on: processor, threads, versions, commit, date. No host or user names."""
    place = torch.device(device)
    named = torch.cuda.get_device_name(place) if place.type == "cuda" else place.type
    try:
        timm = metadata.version("timm")
    except metadata.PackageNotFoundError:
        timm = "none"
    return Environment(
        machine=_processor(),
        cores=_cores(),
        threads=torch.get_num_threads(),
        instruction_set=_library.instruction_set(),
        device=named,
        python=platform.python_version(),
        torch=torch.__version__,
        timm=timm,
        regard=__version__,
        commit=_commit(),
        date=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    )


def _cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    fields = {name.strip(): rest.strip() for name, found, rest in (line.partition(":") for line in lines) if found}
    model = fields.get("model name") or platform.processor() or platform.machine() or "unknown"
    if "cpu family" in fields and "model" in fields:  # virtual machines hide the model's name, not its number
        model += f" (family {fields['cpu family']}, model {fields['model']})"
    return model


def _commit() -> str:
    """The checkout's commit, `-dirty` if tracked files differ from it; empty outside of regard's own checkout."""
    here = Path(__file__).resolve()
    root = here.parents[3]
    if not (root / ".git").exists() or here.parents[2].name != "src":
        return ""
    try:
        found = subprocess.run(
            ["git", "describe", "--always", "--abbrev=12", "--dirty", "--exclude=*"],
            cwd=root,
            capture_output=True,
            text=True,
            timeout=10,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return ""
    return found.stdout.strip()


@dataclass(frozen=True)
class Ceilings:
    """The best rates seen: matrix product in FLOP/s (a multiply-add is two), copy in bytes/s (read and written)."""

    matmul_flops_per_second: float
    copy_bytes_per_second: float


def measure_ceilings(device: str = "cpu", dtype: str = "float32", budget_seconds: float = 2.0) -> Ceilings:
    """Measure what this machine reaches at best, under the threads in force: to run in the same session as the rest.

    The product is of two square matrices of 2,048, the copy of 128 MB; the best of the repeats that fit into the
    budget.
    """
    kind = getattr(torch, dtype)
    left, right = (torch.randn(2048, 2048).to(device, kind) for _ in range(2))
    out = torch.empty_like(left)
    source = torch.ones(128 * 2**20 // 4, device=device)
    target = torch.zeros_like(source)
    wait = torch.cuda.synchronize if torch.device(device).type == "cuda" else None
    product = _best(lambda: torch.mm(left, right, out=out), budget_seconds / 2, wait)
    copy = _best(lambda: target.copy_(source), budget_seconds / 2, wait)
    return Ceilings(2 * 2048**3 / product, 2 * 4 * source.numel() / copy)


def _best(function: Callable[[], Any], budget_seconds: float, wait: Callable[[], Any] | None) -> float:
    best, start = float("inf"), time.perf_counter()
    for turn in range(1000):
        before = time.perf_counter()
        function()
        if wait is not None:
            wait()
        now = time.perf_counter()
        best = min(best, now - before) if turn else best  # the first one wakes threads and touches pages
        if turn >= 3 and now - start > budget_seconds:
            break
    return best
