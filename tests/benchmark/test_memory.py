"""Peak memory against callables whose memory is known."""

import os
import signal
import time

import pytest
import torch

from regard.benchmark.memory import Job, Peak, bytes_of, measure_peaks, prepared

MB = 2**20
HERE = __name__


def temporary(megabytes, output=1):
    """Holds one temporary of that size, and hands out a tensor of `output` MB."""

    def run():
        held = torch.ones(megabytes * MB // 4)
        return (torch.full((output * MB // 4,), held[-1].item()),)

    return run


def many_small(count, kilobytes):
    """Holds many small blocks at once, below the size that malloc maps one by one."""

    def run():
        held = [torch.ones(kilobytes * 1024 // 4) for _ in range(count)]
        return (held[0].clone(),)

    return run


def one_after_the_other(megabytes):
    def run():
        for _ in range(3):
            torch.ones(megabytes * MB // 4)
        return ()

    return run


def in_place(megabytes):
    tensor = torch.ones(megabytes * MB // 4)

    def run():
        tensor.mul_(2.0)
        return ()

    return run


def raises(message):
    if message:
        raise RuntimeError(message)
    return tuple


def dies(now):
    return lambda: os.kill(os.getpid(), signal.SIGKILL) if now else ()


def sleeps(seconds):
    return lambda: time.sleep(seconds) or ()


def job(function, arguments, warm_up):
    return Job(f"{HERE}:{function.__name__}", arguments, warm_up)


@pytest.fixture(scope="module")
def peaks():
    tiny = {"megabytes": 1}
    return measure_peaks(
        [
            job(temporary, {"megabytes": 100}, tiny),
            job(temporary, {"megabytes": 100, "output": 50}, tiny),
            job(many_small, {"count": 1000, "kilobytes": 64}, {"count": 1, "kilobytes": 1}),
            job(one_after_the_other, {"megabytes": 40}, tiny),
            job(in_place, {"megabytes": 64}, {"megabytes": 1}),
            job(raises, {"message": "no such thing"}, {"message": ""}),
            job(dies, {"now": True}, {"now": False}),
            job(temporary, {"megabytes": 10}, tiny),
        ]
    )


def near(peak, megabytes):
    assert peak.problem == ""
    return peak.bytes == pytest.approx(megabytes * MB, rel=0.03, abs=1.5 * MB)


def test_known_temporary(peaks):
    assert near(peaks[0], 100)


def test_outputs_do_not_count(peaks):
    assert near(peaks[1], 100)


def test_small_blocks_count(peaks):
    assert near(peaks[2], 64)


def test_freed_blocks_are_reused(peaks):
    assert near(peaks[3], 40)


def test_nothing_is_nothing(peaks):
    assert near(peaks[4], 0)


def test_a_job_that_fails_leaves_the_others(peaks):
    assert peaks[5] == Peak(None, "RuntimeError: no such thing")
    assert peaks[6].bytes is None and "died" in peaks[6].problem and "-9" in peaks[6].problem
    assert near(peaks[7], 10)


def test_timeout_keeps_what_is_done():
    jobs = [job(temporary, {"megabytes": 10}, {"megabytes": 1}), job(sleeps, {"seconds": 60}, {"seconds": 0})]
    start = time.monotonic()
    first, second = measure_peaks(jobs, timeout_seconds=10)
    assert time.monotonic() - start < 25
    assert near(first, 10)
    assert second == Peak(None, "not reached within 10 s")


def test_no_jobs():
    assert measure_peaks([]) == []


def test_prepare_must_name_module_and_function():
    with pytest.raises(ValueError, match="module:function"):
        prepared(Job("nowhere", {}, {}), {})


def test_shared_storage_counts_once():
    tensor = torch.ones(256)
    assert bytes_of([tensor, tensor.view(16, 16), torch.ones(4)]) == 256 * 4 + 16
