"""Every mechanism beside dense attention: what is timed, what is told of it, and the pages made from it."""

import importlib.util
from pathlib import Path

import pytest

from regard.benchmark import environment
from regard.results import Comparison, EpochRecord, MechanismStudy, TrainingRun
from regard.studies import mechanisms
from regard.studies.mechanisms import MechanismSettings, default_texts, study_mechanisms

ROOT = Path(__file__).parents[2]


def _epoch(accuracy):
    return EpochRecord(1, 1.0, 1.0, accuracy)


def trained(settings, **_):
    """A comparison in which seed s of mechanism i got 80 + i + s % of the images right."""
    runs = [
        TrainingRun(text, seed, "vit", "embedded", {}, 10, 20, [_epoch((80 + i + seed) / 100)], 5.0, 6.0, [], True)
        for i, text in enumerate(settings.mechanisms)
        for seed in range(settings.seeds)
    ]
    shown = {"mechanisms": list(settings.mechanisms), "seeds": 2, "model": "vit", "data": "embedded", "epochs": 1}
    return Comparison(shown, environment(), runs)


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mechanisms, "compare", trained)
        settings = MechanismSettings(
            tmp_path_factory.mktemp("out"),
            mechanisms={"dense": "dense", "knn": "knn(topk=3)", "gated": "gated"},
            variants=("knn(topk=2)",),
            compositions=("knn(topk=3) + gated",),
            seeds=2,
            sides=(2, 3),
            seconds=0.01,
        )
        return study_mechanisms(settings, show_progress=False, tell=lambda _: None)[0]


def test_every_mechanism_and_modifier_is_in_the_study():
    from regard.mixers import mechanisms as known
    from regard.mixers import modifiers

    assert list(default_texts()) == [*known(), *modifiers()]


def test_what_was_trained(study):
    results = {one.label: one for one in study.results}
    assert list(results) == ["dense", "knn(topk=3)", "dense + gated", "knn(topk=2)", "knn(topk=3) + gated"]
    assert [one.name for one in study.results] == ["dense", "knn", "gated", "", ""]
    assert results["dense"].difference is None and results["dense"].accuracies == [0.80, 0.81]
    assert results["dense + gated"].difference == pytest.approx(0.02)
    assert results["dense + gated"].half_width == pytest.approx(0.0, abs=1e-12)


def test_a_composition_is_held_against_the_part_that_it_beats_by_least(study):
    one = study.results[-1]
    assert one.best_part == "dense + gated(kind='elementwise')"
    assert one.gain == pytest.approx(0.02) and one.gain_half_width == pytest.approx(0.0, abs=1e-12)


def test_a_composition_of_nothing_is_refused(tmp_path):
    with pytest.raises(ValueError, match="compositions: expected a mechanism .*, got 'knn'"):
        study_mechanisms(MechanismSettings(tmp_path, compositions=("knn",)))


def test_layers_and_models_are_timed_at_every_size_in_both_directions(study):
    for one in study.results:
        assert [(time.tokens, time.direction) for time in one.times] == [
            (4, "forward"), (4, "forward+backward"), (9, "forward"), (9, "forward+backward"),
        ]  # fmt: skip
        assert all(time.seconds > 0 and 0 < time.ratio_low <= time.ratio <= time.ratio_high for time in one.times)
    assert [one.growth is None for one in study.results] == [False, False, True, False, True]


def test_json_reads_back(study):
    assert MechanismStudy.from_json(study.to_json()) == study


def test_pages_are_made_from_it(study, tmp_path):
    spec = importlib.util.spec_from_file_location("docs_tool", ROOT / "tools" / "docs.py")
    docs = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(docs)
    (tmp_path / "docs" / "images" / "mechanisms").mkdir(parents=True)
    (tmp_path / "docs" / "images" / "mechanisms" / "knn.png").touch()
    (tmp_path / "docs" / "mechanisms_measured.json").write_text(study.to_json())
    pages = {path.name: text for path, text in docs.documents(tmp_path).items()}
    assert (
        "| 82.5 ± 0.7 % | +2.0 ± 0.0 |" in pages["mechanisms.md"]
        and "| `knn(topk=3) + gated` |" in pages["mechanisms.md"]
    )
    assert "(../images/mechanisms/knn.png)" in pages["knn.md"] and "dense attention's 80.5 ± 0.7 %" in pages["knn.md"]
    assert "| `knn(topk=2)` | N^" in pages["mechanisms.md"]
    assert "Beside dense attention" in pages["gated.md"] and "images/mechanisms" not in pages["gated.md"]
    assert "Beside dense attention" not in pages["clustered.md"]
