"""Peak memory: growth of the process's peak resident size beyond inputs, outputs and gradients, in a fresh process.

The one definition, step by step. For each measurement a process of its own
1. makes a tiny workload of the same code and runs it, so that libraries, thread pools and the allocator are warm;
2. makes the real inputs, hands freed memory back to the system (malloc_trim), sets the kernel's record of the peak
   resident size (VmHWM) back to the present size (writing 5 to /proc/self/clear_refs), and reads it;
3. runs the real workload once, keeping its outputs and gradients;
4. reads VmHWM again. The figure is the growth less the bytes of the outputs and gradients, at least zero.

In the measuring process glibc returns freed blocks of 128 KiB and more at once (its own starting value, which otherwise
drifts) and transparent huge pages are off, so the figure is what the operator held, not what the allocator kept. It is
true to about 1 MB: the kernel counts pages per thread and adds them up now and then. Where /proc is missing (macOS),
the peak is getrusage's ru_maxrss, which cannot be set back: step 2 then reads the peak so far, and a small workload may
show as zero.

Linux: one interpreter imports everything once and forks each measuring process before any thread exists. Elsewhere: an
interpreter for each. On CUDA nothing is spawned: the caching allocator itself keeps the peak
(torch.cuda.max_memory_allocated).
"""

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

__all__ = ["Job", "Peak", "measure_peaks", "prepared"]

_FORKS = sys.platform == "linux"


@dataclass(frozen=True)
class Job:
    """One thing to measure.

    Args:
        prepare: "module:function". Called with the arguments it makes the inputs and returns a callable without
            arguments; that one is measured and returns the tensors that do not count: outputs and gradients.
        arguments: of the real workload; plain values that JSON can hold.
        warm_up: of the tiny one.
    """

    prepare: str
    arguments: dict[str, Any]
    warm_up: dict[str, Any]


@dataclass(frozen=True)
class Peak:
    """A job's peak memory in bytes, or None and why there is none."""

    bytes: int | None
    problem: str = ""


def prepared(job: Job, arguments: dict[str, Any]) -> Callable[[], tuple[Tensor, ...]]:
    """The callable to measure, with its inputs made.

    Raises:
        ValueError: `prepare` is not "module:function".
    """
    module, found, function = job.prepare.partition(":")
    if not found:
        raise ValueError(f"prepare: expected 'module:function', got {job.prepare!r}")
    call: Callable[[], tuple[Tensor, ...]] = getattr(import_module(module), function)(**arguments)
    return call


def measure_peaks(
    jobs: Sequence[Job], *, threads: int | None = None, device: str = "cpu", timeout_seconds: float = 300.0
) -> list[Peak]:
    """Measure each job in a process of its own, one after the other.

    Args:
        threads: of torch in the measuring processes; as here if None.
        timeout_seconds: for all jobs; those that were not done by then have no figure.

    Returns:
        One Peak a job, in order. A job that raises or dies says so in its `problem`; the others are not touched by it.
    """
    if torch.device(device).type == "cuda":
        return [_cuda_peak(job, device) for job in jobs]
    count = torch.get_num_threads() if threads is None else threads
    batches = [list(jobs)] if _FORKS else [[job] for job in jobs]
    peaks: list[Peak] = []
    for batch in batches:
        peaks += _spawn(batch, count, timeout_seconds / len(batches)) if batch else []
    return peaks


def _spawn(jobs: list[Job], threads: int, timeout_seconds: float) -> list[Peak]:
    request = {"jobs": [asdict(job) for job in jobs], "threads": threads, "path": sys.path, "fork": _FORKS}
    surroundings = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "131072", "MALLOC_TRIM_THRESHOLD_": "131072"}
    # Files, not pipes: what was measured before a timeout is kept, and no one waits for a reader.
    with (
        tempfile.TemporaryFile("w+") as asked,
        tempfile.TemporaryFile("w+") as told,
        tempfile.TemporaryFile("w+") as said,
    ):
        json.dump(request, asked)
        asked.seek(0)
        command = [sys.executable, "-m", "regard.benchmark._child"]
        # A session of its own, so that it can be ended with the processes that it forked.
        process = subprocess.Popen(
            command, stdin=asked, stdout=told, stderr=said, env=surroundings, start_new_session=os.name == "posix"
        )
        ending = "ended before this job"
        try:
            process.wait(timeout_seconds)
        except subprocess.TimeoutExpired:
            ending = f"not reached within {timeout_seconds:.0f} s"
        finally:
            _end(process)
        told.seek(0)
        said.seek(0)
        lines = said.read().strip().splitlines()
        if process.returncode > 0 and lines:
            ending = lines[-1]
        found = {one["index"]: Peak(one["bytes"], one["problem"]) for one in map(json.loads, _whole_lines(told.read()))}
    return [found.get(index, Peak(None, ending)) for index in range(len(jobs))]


def _whole_lines(text: str) -> list[str]:
    return text.split("\n")[:-1]


def _end(process: "subprocess.Popen[bytes]") -> None:
    if process.poll() is None:
        with contextlib.suppress(ProcessLookupError):
            if os.name == "posix":
                os.killpg(process.pid, signal.SIGKILL)
            else:
                process.kill()
        process.wait()


def _cuda_peak(job: Job, device: str) -> Peak:
    try:
        prepared(job, job.warm_up)()
        call = prepared(job, job.arguments)
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        results = call()
        torch.cuda.synchronize(device)
        growth = torch.cuda.max_memory_allocated(device) - before
    except Exception as error:  # whatever a workload raises belongs to its own figure
        return Peak(None, f"{type(error).__name__}: {error}")
    return Peak(max(growth - bytes_of(results), 0))


def bytes_of(tensors: Sequence[Tensor]) -> int:
    """Bytes of the distinct storages behind the tensors."""
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}
    return sum(storages.values())
