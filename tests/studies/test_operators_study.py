"""`regard bench`'s study: plan, resume after Ctrl-C, red gates, settings that cannot be obeyed."""

import dataclasses
import json

import pytest
import torch

from regard.benchmark import Ceilings, gates
from regard.benchmark.entry import Case
from regard.benchmark.operators import entries_of
from regard.results import BenchStudy
from regard.studies import operators
from regard.studies.operators import planned, study_operators
from regard.studies.settings import BenchSettings, SettingsError

SIZES = (16, 32)


@pytest.fixture
def small(monkeypatch):
    """k-NN attention at two tiny sizes, from a clean commit; returns what was measured."""
    (knn,) = entries_of(["knn"])
    cases = [Case(size, heads=1, head_dim=16, series="k = 4", options={"topk": 4}, quick=True) for size in SIZES]
    entry = dataclasses.replace(knn, cases=tuple(cases))
    here = operators.environment
    measured, measure = [], operators.measure_point

    def counted(point, grid):
        measured.append(point.key)
        return measure(point, grid)

    monkeypatch.setattr(operators, "entries_of", lambda names: [entry])
    monkeypatch.setattr(operators, "measure_point", counted)
    monkeypatch.setattr(operators, "environment", lambda device: dataclasses.replace(here(device), commit="abc"))
    monkeypatch.setattr(operators, "measure_ceilings", lambda *asked: Ceilings(1e11, 1e10))
    return measured


def settings(folder, **options) -> BenchSettings:
    return BenchSettings(seconds=0.02, no_memory=True, out=folder, **options)


def run(folder, **options) -> BenchStudy:
    return study_operators(settings(folder, **options), show_progress=False)


def test_all_points_are_measured_and_written(small, tmp_path):
    study = run(tmp_path)
    assert [(cell.tokens, cell.direction) for cell in study.cells] == [
        (size, direction) for direction in ("forward", "forward+backward") for size in SIZES
    ]
    assert len(study.growth) == 6 and all(one.tokens_high == 32 for one in study.growth)
    assert study.ceiling("float32").flops_per_second == 1e11 and not study.interrupted
    assert study.command == "regard bench --seconds 0.02 --no-memory"
    on_disk = BenchStudy.from_json((tmp_path / "bench.json").read_text())
    assert on_disk.to_json() == study.to_json() and on_disk.growth == study.growth
    assert {path.name for path in tmp_path.iterdir()} == {"bench.json", "bench.md", "bench.svg", "bench.png"}


def stop_after(count, monkeypatch):
    measure = operators.measure_point
    left = [count]

    def stopping(point, grid):
        if not left[0]:
            raise KeyboardInterrupt
        left[0] -= 1
        return measure(point, grid)

    monkeypatch.setattr(operators, "measure_point", stopping)


def test_ctrl_c_keeps_what_was_measured_and_the_same_settings_resume(small, tmp_path, monkeypatch):
    with monkeypatch.context() as patched:
        stop_after(3, patched)
        stopped = run(tmp_path)
    assert stopped.interrupted and len(stopped.cells) == 3
    assert BenchStudy.from_json((tmp_path / "bench.json").read_text()).interrupted
    assert "Stopped before the end" in (tmp_path / "bench.md").read_text()

    small.clear()
    study = run(tmp_path)
    assert not study.interrupted and len(study.cells) == 4
    assert small == [study.cells[3].key] and [c.times for c in study.cells[:3]] == [c.times for c in stopped.cells]
    small.clear()
    run(tmp_path)  # a finished job starts anew
    assert len(small) == 4


@pytest.mark.parametrize("change", ["settings", "commit", "dirty", "broken"])
def test_another_question_or_place_starts_anew(change, small, tmp_path, monkeypatch):
    with monkeypatch.context() as patched:
        stop_after(3, patched)
        run(tmp_path)
    small.clear()
    here, options = operators.environment, {}
    if change == "settings":
        options = {"patience": 7.0}
    elif change == "broken":
        (tmp_path / "bench.json").write_text("{")
    else:
        commit = {"commit": "def", "dirty": "abc-dirty"}[change]
        monkeypatch.setattr(operators, "environment", lambda device: dataclasses.replace(here(device), commit=commit))
    assert len(run(tmp_path, **options).cells) == 4
    assert len(small) == 4


def test_a_red_gate_is_told_and_not_timed(small, tmp_path, monkeypatch):
    (entry,) = operators.entries_of(())
    red = gates.Findings("knn_attention", "float32", problems=("wrong",))
    broken = dataclasses.replace(entry, gate=lambda *asked: red)
    monkeypatch.setattr(operators, "entries_of", lambda names: [broken])
    study = run(tmp_path, direction=("forward",))
    assert [cell.times for cell in study.cells] == [[], []]
    assert sum("GATE RED, not timed" in note and "wrong" in note for note in study.notes) == 2


def test_another_commit_stands_beside_the_peers(small, tmp_path, monkeypatch):
    import contextlib
    from pathlib import Path

    import regard

    source = Path(regard.__file__).resolve().parents[1]
    monkeypatch.setattr(operators, "commit_of", lambda reference: (source.parent, "0" * 40))
    monkeypatch.setattr(operators, "worktree", lambda *asked: contextlib.nullcontext(source.parent))
    study = run(tmp_path, direction=("forward",), against="main")
    assert [cell.times[-1].name for cell in study.cells] == ["at main"] * 2
    assert all(cell.times[-1].slower > 0 and not cell.times[-1].skipped for cell in study.cells)


def test_the_plan_names_points_peers_and_time_and_runs_nothing(small, tmp_path):
    lines = planned(settings(tmp_path / "out", dtype=("bfloat16",), direction=("forward",)))
    assert lines[0] == "knn, N 16, k = 4, bfloat16, forward: beside sdpa, published, float32"
    assert lines[-1].startswith("2 points, about 1 min")
    assert small == [] and list(tmp_path.iterdir()) == []


def test_threads_are_those_asked_for_and_put_back(small, tmp_path):
    before = torch.get_num_threads()
    assert run(tmp_path, threads=1, direction=("forward",)).environment.threads == 1
    assert torch.get_num_threads() == before


@pytest.mark.parametrize(
    ("options", "setting"),
    [
        ({"operators": ("nothing",)}, "operators"),
        ({"device": "toaster"}, "device"),
        ({"against": "no-such-commit"}, "against"),
        ({"weights": "none.safetensors"}, "weights"),
    ],
)
def test_what_cannot_be_obeyed_is_named_before_anything_runs(options, setting, tmp_path):
    from pathlib import Path

    options = {name: Path(value) if name == "weights" else value for name, value in options.items()}
    with pytest.raises(SettingsError) as found:
        run(tmp_path / "out", **options)
    assert found.value.setting == setting
    assert not (tmp_path / "out" / "bench.json").exists()


def test_a_plan_is_plain_json(small, tmp_path):
    study = run(tmp_path, direction=("forward",))
    assert json.loads((tmp_path / "bench.json").read_text())["settings"]["out"] == str(tmp_path)
    assert study.settings["direction"] == ["forward"]
