"""`regard bench` as a user types it."""

import dataclasses

import pytest

from regard.benchmark import Ceilings
from regard.benchmark.entry import Case
from regard.benchmark.operators import entries_of
from regard.cli import main
from regard.results import BenchStudy


@pytest.fixture
def small(monkeypatch):
    """k-means at one tiny size."""
    (kmeans,) = entries_of(["kmeans"])
    entry = dataclasses.replace(kmeans, cases=(Case(60, 2, 1, 8, "M = 7", {"num_clusters": 7}, quick=True),))
    monkeypatch.setattr("regard.studies.operators.entries_of", lambda names: [entry])
    monkeypatch.setattr("regard.studies.operators.measure_ceilings", lambda *asked: Ceilings(1e11, 1e10))


def test_it_prints_a_table_and_writes_json(small, tmp_path, capsys):
    out = tmp_path / "out"
    assert main(["bench", "kmeans", "--seconds", "0.02", "--no-memory", "--out", str(out)]) == 0
    said = capsys.readouterr()
    for expected in ("kmeans", "N 60, B 2", "M = 7", "eager", "correctness gate: 0 red of 1", "matrix product"):
        assert expected in said.out, expected
    assert "[1/1] kmeans" in said.err and "Traceback" not in said.err
    (cell,) = BenchStudy.from_json((out / "bench.json").read_text()).cells
    assert cell.passed and [one.name for one in cell.times] == ["regard", "eager"]


def test_ctrl_c_has_its_own_exit_code(small, tmp_path, capsys, monkeypatch):
    def stops(point, grid):
        raise KeyboardInterrupt

    monkeypatch.setattr("regard.studies.operators.measure_point", stops)
    assert main(["bench", "--out", str(tmp_path)]) == 130
    assert "regard bench: stopped; the same command resumes" in capsys.readouterr().err


def test_a_red_gate_is_an_error(small, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("regard.benchmark.gate.Judgement.passed", property(lambda self: False))
    assert main(["bench", "--seconds", "0.02", "--no-memory", "--out", str(tmp_path)]) == 1
    said = capsys.readouterr()
    assert "gate RED" in said.out and "a correctness gate is red" in said.err and "GFLOP/s" in said.out


def test_a_dry_run_tells_all_operators_and_measures_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["bench", "--dry-run", "--dtype", "float32", "--dtype", "bfloat16"]) == 0
    said = capsys.readouterr().out
    for name in ("knn, N 4,096", "multipole, N 16,385", "density_peaks, N 3,136", "kmeans, N 1,024", "bfloat16"):
        assert name in said, name
    assert "points, about" in said and list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["nothing"], "regard bench: OPERATOR: unknown name 'nothing'; known: "),
        (["--dtype", "int8"], "regard bench: --dtype: expected some of float32, bfloat16, float16, got 'int8'"),
        (["--dtype", "float32", "--dtype", "float32"], "regard bench: --dtype: given twice"),
        (["--direction", "up"], "regard bench: --direction: expected some of forward"),
        (["--seconds", "0"], "regard bench: --seconds: expected seconds above 0"),
        (["--threads", "0"], "regard bench: --threads: "),
        (["--device", "toaster"], "regard bench: --device: "),
        (["--against", "no-such-commit"], "regard bench: --against: "),
        (["--against", "HEAD", "--device", "cuda"], "regard bench: --against: compares on the processor alone"),
        (["--photo", "x.png"], "regard bench: --photo: shown to no model"),
        (["--weights", "x.safetensors"], "regard bench: --weights: x.safetensors is no file"),
    ],
)
def test_what_cannot_be_obeyed_is_named_in_one_line(arguments, named, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["bench", *arguments]) == 2
    out, err = capsys.readouterr()
    assert out == "" and named in err and err.count("\n") <= 2 and "Traceback" not in err
    assert not list(tmp_path.glob("**/*.*"))
