"""The measuring process of regard.benchmark.memory: jobs in JSON on stdin, one line of JSON a job on stdout."""

import contextlib
import ctypes
import gc
import json
import os
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

import torch

from regard.benchmark.memory import Job, Peak, bytes_of, prepared

_PR_SET_THP_DISABLE = 41


def main() -> None:
    request = json.load(sys.stdin)
    sys.path[:] = request["path"]
    told = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what a workload prints must not mix with the answers
    _without_huge_pages()
    jobs = [Job(**fields) for fields in request["jobs"]]
    for job in jobs:
        with contextlib.suppress(Exception):  # raised again, and reported, where the job is run
            import_module(job.prepare.partition(":")[0])
    for index, job in enumerate(jobs):
        answer = _forked(job, request["threads"]) if request["fork"] else _measured(job, request["threads"])
        print(json.dumps({"index": index, "bytes": answer.bytes, "problem": answer.problem}), file=told, flush=True)


def _forked(job: Job, threads: int) -> Peak:
    """Run the job in a fork of this process, which has imported everything and started no thread."""
    reading, writing = os.pipe()
    process = os.fork()
    if process == 0:
        answer = _measured(job, threads)
        with os.fdopen(writing, "w") as out:
            json.dump({"bytes": answer.bytes, "problem": answer.problem}, out)
        os._exit(0)
    os.close(writing)
    with os.fdopen(reading) as told:
        text = told.read()
    _, status = os.waitpid(process, 0)
    if status != 0 or not text:
        return Peak(None, f"the measuring process died with exit code {os.waitstatus_to_exitcode(status)}")
    return Peak(**json.loads(text))


def _measured(job: Job, threads: int) -> Peak:
    try:
        torch.set_num_threads(threads)
        prepared(job, job.warm_up)()
        call = prepared(job, job.arguments)
        gc.collect()
        _hand_back()
        before = _peak_so_far()
        results = call()
        growth = _peak_so_far(reset=False) - before
    except Exception as error:  # whatever a workload raises belongs to its own figure
        return Peak(None, f"{type(error).__name__}: {error}")
    return Peak(max(growth - bytes_of(results), 0))


def _peak_so_far(reset: bool = True) -> int:
    """The peak resident size in bytes, after setting it back to the present size if asked and possible."""
    status = Path("/proc/self/status")
    if not status.exists():
        import resource

        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else peak * 1024
    if reset:
        with contextlib.suppress(OSError):  # a container may forbid it; the peak of the tiny run then stands
            Path("/proc/self/clear_refs").write_text("5")
    fields = dict(line.split(":", 1) for line in status.read_text().splitlines() if ":" in line)
    return int(fields["VmHWM"].split()[0]) * 1024


def _c_library() -> Any:
    return ctypes.CDLL(None, use_errno=True)


def _hand_back() -> None:
    with contextlib.suppress(OSError, AttributeError, TypeError):  # not glibc
        _c_library().malloc_trim(0)


def _without_huge_pages() -> None:
    with contextlib.suppress(OSError, AttributeError, TypeError):  # not Linux
        _c_library().prctl(_PR_SET_THP_DISABLE, 1, 0, 0, 0)


if __name__ == "__main__":
    main()
