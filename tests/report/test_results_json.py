"""Results turn into JSON and back without loss."""

import json
import math

import pytest

from regard.results import Comparison, TrainingRun, to_json, write_text


def test_a_comparison_survives_json(comparison):
    assert Comparison.from_json(comparison.to_json()) == comparison


def test_not_a_number_becomes_null_and_comes_back(comparison):
    comparison.runs[0].epochs[-1].train_loss = math.nan
    text = comparison.to_json()
    json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    assert math.isnan(Comparison.from_json(text).runs[0].epochs[-1].train_loss)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda fields: fields.pop("environment"), "environment"),
        (lambda fields: fields.update(surprise=1), "surprise"),
        (lambda fields: fields["runs"][0].pop("seed"), "seed"),
        (lambda fields: fields["costs"].__setitem__(0, 3), "CostPoint"),
    ],
)
def test_a_broken_comparison_is_refused_by_name(comparison, change, named):
    fields = json.loads(comparison.to_json())
    change(fields)
    with pytest.raises(ValueError, match=named):
        Comparison.from_json(to_json(fields))


def test_text_that_is_no_json_is_refused():
    with pytest.raises(ValueError):
        Comparison.from_json('{"runs": [')


def test_a_run_without_epochs_has_no_accuracy(comparison):
    run = TrainingRun.from_dict({**vars(comparison.runs[0]), "epochs": []})
    assert math.isnan(run.accuracy)


def test_write_text_replaces_whole(tmp_path):
    path = tmp_path / "page.html"
    path.write_text("old")
    write_text(path, "new")
    assert path.read_text() == "new"
    assert [one.name for one in tmp_path.iterdir()] == ["page.html"]
