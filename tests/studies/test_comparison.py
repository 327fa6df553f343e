"""What a comparison does with its runs: order, resume, broken files, failures, Ctrl-C. Training itself is replaced."""

import dataclasses
import json

import pytest

from regard.results import Comparison, CostPoint, EpochRecord, TrainingRun
from regard.specs import parse, registered, registered_modifiers
from regard.studies import CompareSettings, Interrupted, SettingsError, compare, comparison

ACCURACY = {"dense": 0.8, "knn(topk=0.5)": 0.79, "knn(topk=0.125)": 0.7, "dense + gated(kind='headwise')": 0.8}

MECHANISMS = tuple(ACCURACY)[:3]


class Rooms:
    """Stands in for training and benchmark; remembers what was asked, and stops or fails where told."""

    def __init__(self):
        self.trained, self.measured, self.mapped = [], 0, []
        self.interrupt_at = self.fail_at = None

    def train(self, mechanism, *, data, model, recipe, seed, on_epoch=None, **_):
        name = str(mechanism)
        self.trained.append((name, seed))
        records = []
        for epoch in range(1, recipe.epochs + 1):
            record = EpochRecord(epoch, 1.0 * epoch, 1.0 / epoch, ACCURACY[name] + 0.001 * seed)
            if (name, seed) == self.fail_at:
                raise FloatingPointError("the loss became NaN in epoch 1")
            on_epoch(record)
            records.append(record)
            if (name, seed) == self.interrupt_at:
                raise KeyboardInterrupt
        fields = dataclasses.asdict(recipe)
        return TrainingRun(name, seed, model, data.name, fields, 10, 20, records, 5.0, 6.0, [True], True), object()

    def measure_costs(self, mechanisms, **_):
        self.measured += 1
        return [
            CostPoint(str(one), tokens, 1, 6, 64, "float32", direction, "cpu", 1e-3, 9e-4, 2e-3, 5, 100, 10**7)
            for one in mechanisms
            for tokens in (196, 784)
            for direction in ("forward", "forward+backward")
        ]


@pytest.fixture
def rooms(monkeypatch):
    found = Rooms()
    monkeypatch.setattr(comparison, "train", found.train)
    monkeypatch.setattr(comparison, "measure_costs", found.measure_costs)
    monkeypatch.setattr(comparison, "save_weights", lambda model, path: path.write_bytes(b"weights"))
    monkeypatch.setattr(comparison, "_maps_of_run", lambda job, mechanism, seed: found.mapped.append(mechanism) or [])
    return found


@pytest.fixture
def settings(tmp_path):
    return CompareSettings(mechanisms=MECHANISMS, out=tmp_path / "out", epochs=2, seeds=2, cost_seconds=1.0)


def quiet(settings, **options):
    return compare(settings, show_progress=False, **options)


ORDER = [(name, seed) for seed in range(2) for name in MECHANISMS]


def test_runs_are_interleaved_seed_by_seed(rooms, settings):
    found = quiet(settings)
    assert rooms.trained == ORDER
    assert [(run.mechanism, run.seed) for run in found.runs] == ORDER
    assert not found.interrupted and rooms.measured == 1 and len(rooms.mapped) == 3
    assert {path.name for path in settings.out.iterdir()} == {"runs", "costs.json", "compare.html", "compare.json"}
    assert Comparison.from_json((settings.out / "compare.json").read_text()) == found


def test_what_is_no_operator_is_not_measured_as_one(rooms, settings):
    found = quiet(settings, mechanisms=("dense", "gated(kind='headwise')"))
    assert {point.mechanism for point in found.costs} == {"dense"} and len(found.runs) == 4
    assert any("measured in training only: dense + gated(kind='headwise')" in note for note in found.notes)


def test_all_stands_for_every_mechanism_and_modifier(rooms, settings, monkeypatch):
    def fails(mechanism, **_):
        raise FloatingPointError("not trained here")

    monkeypatch.setattr(comparison, "_check_models", lambda *_: 81)
    monkeypatch.setattr(comparison, "train", fails)
    found = quiet(settings, mechanisms=("all",), seeds=1, cost_seconds=0)
    names = [*registered(), *registered_modifiers()]
    assert [run.mechanism for run in found.runs] == [str(parse(name)) for name in names]


def test_the_same_folder_again_trains_nothing_and_measures_nothing(rooms, settings):
    first = quiet(settings)
    rooms.trained.clear()
    again = quiet(settings)
    assert rooms.trained == [] and rooms.measured == 1
    assert again.runs == first.runs and again.costs == first.costs and again.notes == []


def test_more_seeds_and_mechanisms_reuse_what_is_there(rooms, settings):
    quiet(settings, mechanisms=("dense",), seeds=1)
    rooms.trained.clear()
    quiet(settings)
    assert rooms.trained == ORDER[1:]
    assert rooms.measured == 2


def test_a_broken_run_is_trained_again(rooms, settings, capsys):
    quiet(settings)
    rooms.trained.clear()
    broken = settings.out / "runs" / "knn-topk-0.5-seed1.json"
    broken.write_text(broken.read_text()[:50])
    compare(settings)
    assert rooms.trained == [("knn(topk=0.5)", 1)]
    assert f"{broken} cannot be read" in capsys.readouterr().err
    assert json.loads(broken.read_text())["run"]["finished"]


def test_other_settings_in_the_same_folder_are_refused_before_training(rooms, settings):
    quiet(settings)
    rooms.trained.clear()
    with pytest.raises(SettingsError, match="recipe.*another folder, or pass --overwrite") as error:
        quiet(settings, epochs=3)
    assert error.value.setting == "out" and rooms.trained == []
    found = quiet(settings, epochs=3, overwrite=True)
    assert rooms.trained == ORDER and all(len(run.epochs) == 3 for run in found.runs)


def test_ctrl_c_keeps_what_is_finished_and_writes_the_page(rooms, settings):
    rooms.interrupt_at = ("dense", 1)
    with pytest.raises(Interrupted) as stop:
        quiet(settings)
    found = stop.value.comparison
    assert isinstance(stop.value, KeyboardInterrupt)
    assert [(run.mechanism, run.seed, run.finished) for run in found.runs] == [
        *((name, 0, True) for name in MECHANISMS),
        ("dense", 1, False),
    ]
    assert len(found.runs[-1].epochs) == 1 and found.interrupted and rooms.measured == 0
    page = (settings.out / "compare.html").read_text()
    assert "Stopped before the end." in page and "dense: 1 of 2 runs finished." in page
    assert not (settings.out / "runs" / "dense-seed1.json").exists()

    rooms.trained.clear()
    rooms.interrupt_at = None
    assert not quiet(settings).interrupted
    assert rooms.trained == ORDER[3:]


def test_a_failed_run_is_told_and_the_others_go_on(rooms, settings):
    rooms.fail_at = ("knn(topk=0.5)", 0)
    found = quiet(settings)
    assert rooms.trained == ORDER
    failed = next(run for run in found.runs if (run.mechanism, run.seed) == rooms.fail_at)
    assert not failed.finished and failed.failure == "the loss became NaN in epoch 1"
    assert "the loss became NaN in epoch 1" in (settings.out / "compare.html").read_text()
    assert not (settings.out / "runs" / "knn-topk-0.5-seed0.json").exists()


def test_runs_from_another_version_are_noted(rooms, settings):
    quiet(settings)
    path = settings.out / "runs" / "dense-seed0.json"
    content = json.loads(path.read_text())
    content["environment"]["torch"] = "2.11.0"
    path.write_text(json.dumps(content))
    (note,) = quiet(settings).notes
    assert "torch 2.11.0" in note and "seconds do not compare" in note


def test_zero_cost_seconds_leave_the_operators_out(rooms, settings):
    found = quiet(settings, cost_seconds=0)
    assert rooms.measured == 0 and found.costs == []
    assert "cost was not measured" in (settings.out / "compare.html").read_text()


def test_the_command_repeats_the_settings(rooms, settings):
    found = quiet(settings, mechanisms=("dense", "knn(topk=0.5)"), seeds=1)
    assert found.command.startswith(
        "regard compare --mechanisms dense --mechanisms 'knn(topk=0.5)' --epochs 2 --seeds 1"
    )
    assert f"--out {settings.out}" in found.command


def test_a_folder_that_cannot_be_made_is_named(rooms, settings, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(SettingsError, match="out: "):
        quiet(settings, out=tmp_path / "file" / "out")
    assert rooms.trained == []
