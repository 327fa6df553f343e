"""`regard convert` as a user types it."""

import json

import pytest

from regard.cli import main

SMALL = ["convert", "vit_tiny_patch16_224", "--random-weights", "--size", "48", "--pictures", "1", "--seconds", "0.1"]


def test_it_prints_the_record_and_the_table_and_writes_page_and_pattern(tmp_path, capsys):
    out, pattern = tmp_path / "out", tmp_path / "pattern.json"
    code = main([*SMALL, "--mechanism", "knn(topk=0.25)", "--save", str(pattern), "--out", str(out)])
    said = capsys.readouterr()
    assert code == 0, said.err
    for expected in (
        "12 of 12 attention modules converted",
        "blocks.11.attn",
        "knn(topk=0.25)",
        "cosine",
        "convert.html",
    ):
        assert expected in said.out
    assert "The weights are random" in said.out
    assert json.loads(pattern.read_text()) == {f"blocks.{i}.attn": "knn(topk=0.25)" for i in range(12)}
    found = json.loads((out / "convert.json").read_text())
    assert all(one["peak_memory"] is not None for one in found["models"]), found["notes"]
    assert (out / "convert.html").exists() and "Traceback" not in said.err


def test_mechanisms_are_repeated_and_the_model_may_come_last(monkeypatch):
    from regard.studies import conversion

    seen = []
    monkeypatch.setattr(conversion, "study_conversion", lambda settings: seen.append(settings) or 1 / 0)
    monkeypatch.setattr("regard.studies.study_conversion", conversion.study_conversion, raising=False)
    with pytest.raises(ZeroDivisionError):
        main(["convert", "--mechanism", "knn", "--tune", "0.99", "--mechanism=multipole(near=0.25)", "vit_base"])
    assert seen[0].mechanism == ("knn", "multipole(near=0.25)")
    assert (seen[0].model, seen[0].tune) == ("vit_base", 0.99)


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["convert"], "MODEL"),
        (["convert", "vit_tinny"], "regard convert: MODEL: unknown model 'vit_tinny'; nearest known: "),
        ([*SMALL, "--tune", "99"], "regard convert: --tune: expected a cosine in (0, 1]"),
        ([*SMALL, "--mechanism", "knn(topk=0)"], "regard convert: --mechanism: "),
        ([*SMALL, "--images", "no/such/folder"], "regard convert: --images: no/such/folder cannot be read"),
        ([*SMALL, "--checkpoint", "w.pt"], "regard convert: --random-weights: a checkpoint is given"),
        (["convert", "vit_tiny_patch16_224", "--checkpoint", "w.pt"], "regard convert: --checkpoint: w.pt is no file"),
    ],
)
def test_what_cannot_be_obeyed_is_named(arguments, named, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == 2
    said = capsys.readouterr()
    assert named in said.err and "Traceback" not in said.err and said.out == ""
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("error", "code", "says"),
    [
        (KeyboardInterrupt(), 130, "regard convert: stopped; the same command resumes the tuning"),
        (FloatingPointError("features: 2 values are NaN"), 1, "regard convert: features: 2 values are NaN"),
    ],
)
def test_stops_are_told_in_a_line(error, code, says, monkeypatch, capsys):
    def stops(settings):
        raise error

    monkeypatch.setattr("regard.studies.study_conversion", stops, raising=False)
    assert main([*SMALL, "--tune", "0.9"]) == code
    assert capsys.readouterr().err.strip() == says
