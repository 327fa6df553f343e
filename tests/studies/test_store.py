"""Runs on disk: found again, refused under other settings, redone when broken."""

import json

import pytest

from regard.results import CostPoint, Environment, EpochRecord, TrainingRun
from regard.studies.settings import CompareSettings, SettingsError
from regard.studies.store import RunStore

HERE = Environment(
    "Test machine", 2, 2, "avx512", "cpu", "3.11.7", "2.15.0", "1.0.31", "0.1.0", "abc1234", "2026-11-21"
)
FINGERPRINT = {"data": "embedded", "model": "vit", "recipe": {"epochs": 2, "betas": (0.9, 0.99)}}


@pytest.fixture
def store(tmp_path):
    (tmp_path / "runs").mkdir()
    return RunStore(tmp_path, FINGERPRINT)


def make_run(mechanism="knn(topk=0.5)", seed=1, finished=True):
    records = [EpochRecord(1, 1.5, 1.2, 0.6), EpochRecord(2, 3.0, float("nan"), 0.7)]
    return TrainingRun(mechanism, seed, "vit", "embedded", FINGERPRINT["recipe"], 10, 20, records, finished=finished)


def save(store, run):
    store.weights_path(run.mechanism, run.seed).write_bytes(b"weights")
    store.save(run, HERE)


def test_a_saved_run_is_found(store):
    save(store, make_run())
    stored, problem = store.load("knn(topk=0.5)", 1)
    assert problem == ""
    assert stored.environment == HERE
    assert (stored.run.accuracy, stored.run.seed, stored.run.epochs[0]) == (0.7, 1, EpochRecord(1, 1.5, 1.2, 0.6))
    assert store.load("knn(topk=0.5)", 0) == (None, "")


def test_names_of_files_tell_the_mechanism(store):
    assert store.run_path("knn(topk=0.5)", 2).name == "knn-topk-0.5-seed2.json"
    assert store.run_path("dense", 0).name == "dense-seed0.json"
    assert store.run_path("knn(topk=1)", 0) != store.run_path("knn(topk=1.0)", 0)


@pytest.mark.parametrize("size", [0, 1, 40, 400])
def test_a_half_written_run_is_reported_and_not_used(store, size):
    save(store, make_run())
    path = store.run_path("knn(topk=0.5)", 1)
    path.write_text(path.read_text()[:size])
    stored, problem = store.load("knn(topk=0.5)", 1)
    assert stored is None and str(path) in problem


@pytest.mark.parametrize("content", ["[]", "null", "{}", '{"run": {}, "environment": {}, "fingerprint": {}}', '"x"'])
def test_json_that_is_no_run_is_reported(store, content):
    store.run_path("dense", 0).write_text(content)
    stored, problem = store.load("dense", 0)
    assert stored is None and "dense-seed0.json" in problem


def test_bytes_that_are_no_text_are_reported(store):
    store.run_path("dense", 0).write_bytes(b"\xff\xfe\x00{")
    assert store.load("dense", 0)[1] != ""


def test_a_run_without_weights_or_unfinished_is_reported(store):
    save(store, make_run())
    store.weights_path("knn(topk=0.5)", 1).unlink()
    assert "missing" in store.load("knn(topk=0.5)", 1)[1]
    save(store, make_run("dense", 0, finished=False))
    assert "unfinished" in store.load("dense", 0)[1]


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"model": "other"}, "model='vit', now model='other'"),
        ({"recipe": {"epochs": 3}}, "recipe"),
        ({"new": 1}, "new"),
    ],
)
def test_a_run_under_other_settings_is_an_error_with_the_way_out(store, tmp_path, change, named):
    save(store, make_run())
    other = RunStore(tmp_path, {**FINGERPRINT, **change})
    with pytest.raises(SettingsError, match="another folder, or pass --overwrite") as error:
        other.load("knn(topk=0.5)", 1)
    assert error.value.setting == "out" and named in error.value.problem


def test_costs_are_found_for_the_same_question_alone(store, tmp_path):
    point = CostPoint("dense", 196, 1, 6, 64, "float32", "forward", "sdpa", 1e-3, 9e-4, 2e-3, 7, 100, 5)
    assert store.load_costs({"tokens": (196,)}) is None
    store.save_costs([point], {"tokens": (196,)})
    assert store.load_costs({"tokens": (196,)}) == [point]
    assert store.load_costs({"tokens": (784,)}) is None
    (tmp_path / "costs.json").write_text('{"asked": ')
    assert store.load_costs({"tokens": (196,)}) is None


def test_nothing_temporary_is_left(store, tmp_path):
    save(store, make_run())
    assert not list(tmp_path.rglob("*.part"))
    json.loads(store.run_path("knn(topk=0.5)", 1).read_text(), parse_constant=pytest.fail)


@pytest.mark.parametrize(
    ("options", "setting"),
    [
        ({"mechanisms": ()}, "mechanisms"),
        ({"mechanisms": "dense"}, "mechanisms"),
        ({"epochs": 0}, "epochs"),
        ({"epochs": 1.5}, "epochs"),
        ({"seeds": True}, "seeds"),
        ({"cost_seconds": float("nan")}, "cost_seconds"),
        ({"cost_seconds": -1.0}, "cost_seconds"),
    ],
)
def test_settings_out_of_range_are_named(options, setting):
    with pytest.raises(SettingsError, match=setting) as error:
        CompareSettings(**options)
    assert error.value.setting == setting
