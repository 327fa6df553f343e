"""Ctrl-C in the middle of `regard compare`, as a user presses it, and the resume after it."""

import signal
import subprocess
import sys
import time

import pytest

from regard.results import Comparison

MECHANISMS = ("dense", "knn(topk=0.5)", "knn(topk=0.125)")
COMMAND = [sys.executable, "-m", "regard", "compare", "--epochs", "1", "--seeds", "2", "--cost-seconds", "0"]
COMMAND += [word for mechanism in MECHANISMS for word in ("--mechanisms", mechanism)]


@pytest.mark.slow
def test_ctrl_c_keeps_finished_runs_writes_the_page_and_resumes(tmp_path):
    process = subprocess.Popen(COMMAND, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    out = tmp_path / "regard-compare"
    try:
        deadline = time.monotonic() + 300
        while not list(out.glob("runs/*.json")):
            assert process.poll() is None and time.monotonic() < deadline, "no run was finished"
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        said, errors = process.communicate(timeout=240)
    finally:
        process.kill()
    assert process.returncode == 130, errors
    assert "Traceback" not in errors and "the same command resumes" in errors
    assert "regard-compare/compare.html" in said
    stopped = Comparison.from_json((out / "compare.json").read_text())
    assert stopped.interrupted
    kept = [(run.mechanism, run.seed) for run in stopped.runs if run.finished]
    assert 1 <= len(kept) < 6
    assert "Stopped before the end." in (out / "compare.html").read_text()

    again = subprocess.run(COMMAND, cwd=tmp_path, capture_output=True, text=True, timeout=600, check=False)
    assert again.returncode == 0, again.stderr
    assert again.stderr.count(": found, ") == len(kept)
    finished = Comparison.from_json((out / "compare.json").read_text())
    assert not finished.interrupted and sum(run.finished for run in finished.runs) == 6
    assert [run for run in finished.runs if (run.mechanism, run.seed) in kept] == [
        r for r in stopped.runs if r.finished
    ]
    assert len(finished.maps) == 4 * 3
