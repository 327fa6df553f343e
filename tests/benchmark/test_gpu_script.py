"""benchmarks/gpu.py as far as it runs without a GPU: its steps on the processor's kernels, with a clock of its own."""

import importlib.util
import sys
import time
from pathlib import Path

import pytest
import torch

from regard.benchmark.operators import entries_of
from regard.ops import _library

needs_kernels = pytest.mark.skipif(bool(_library.problem()), reason=_library.problem() or "kernels are here")
SCRIPT = Path(__file__).parents[2] / "benchmarks" / "gpu.py"


class OnProcessor:
    """In OnGPU's place."""

    captured = False

    def __init__(self, calls) -> None:
        self.call = calls[0]
        self.call()

    def clock(self) -> float:
        start = time.perf_counter()
        self.call()
        return time.perf_counter() - start

    __call__ = clock


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch):
    spec = importlib.util.spec_from_file_location("gpu_script", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "gpu_script", module)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "DEVICE", "cpu")
    monkeypatch.setattr(module, "BACKEND", "cpu")
    monkeypatch.setattr(module, "DTYPES", ("float32",))
    monkeypatch.setattr(module, "OnGPU", OnProcessor)
    monkeypatch.setattr(module, "input_sets", lambda tensors: [tensors])
    return module


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so(script, capsys) -> None:
    assert script.main(script.Settings()) == 2
    assert "no GPU" in capsys.readouterr().out


def rooms(script):
    return {room.name: room for room in script.ROOMS}


@needs_kernels
@pytest.mark.parametrize("name", ["knn", "neighborhood", "multipole", "routed"])
def test_the_smallest_size_is_checked(script, name: str) -> None:
    room = rooms(script)[name]
    (entry,) = entries_of([name])
    found = script.Findings()
    script.check(script.Room(name, room.checked[:1], (), further=room.further), entry, found, lambda: 60.0)
    assert not found.red, found.checks
    assert all("agree bit for bit" in row["verdict"] for row in found.checks[:1])


@needs_kernels
def test_what_fails_is_told_and_the_rest_goes_on(script, monkeypatch) -> None:
    room = rooms(script)["knn"]
    (entry,) = entries_of(["knn"])
    found = script.Findings()
    judge = script._judge

    def failing(entry, case, dtype):
        if case is room.checked[0]:
            raise RuntimeError("an illegal memory access was encountered")
        return judge(entry, case, dtype)

    monkeypatch.setattr(script, "_judge", failing)
    script.check(script.Room("knn", room.checked[:2], ()), entry, found, lambda: 60.0)
    assert found.red == ["float32"]
    assert [row["verdict"].split()[0] for row in found.checks] == ["RED:", "knn_attention"]


@needs_kernels
def test_times_and_goals(script) -> None:
    (entry,) = entries_of(["knn"])
    goals = (script.Goal("sdpa", 1e-9), script.Goal("published", 1e9))
    timed = script.Timed(script._knn(50, 0.2, 1, 1, 16), goals)
    found = script.Findings()
    script.measure(script.Room("knn", (), (timed,)), entry, found, lambda: 60.0)
    assert not found.problems
    forward = [row for row in found.times if row["direction"] == "forward"]
    assert [row["against"] for row in forward] == ["sdpa", "published"]
    assert forward[0]["goal"].endswith(": met") and forward[1]["goal"].endswith("NOT MET")
    assert found.missed == 1
    page = script.page({"knn": found}, 1.0)
    assert "## Time" in page and "NOT MET" in page


def test_what_there_is_no_time_for_is_told(script) -> None:
    room = rooms(script)["knn"]
    (entry,) = entries_of(["knn"])
    found = script.Findings()
    script.check(room, entry, found, lambda: -1.0)
    script.measure(room, entry, found, lambda: -1.0)
    told = [row["verdict"] for row in found.checks] + [row["own"] for row in found.times]
    assert set(told) == {"left out: no time"} and not found.red
