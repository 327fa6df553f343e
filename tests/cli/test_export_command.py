"""`regard export` as a user types it."""

import json

import pytest

from regard.cli import main

SMALL = ["export", "vit_tiny_patch16_224", "--random-weights", "--size", "48", "--seconds", "0.1"]


@pytest.fixture(autouse=True)
def _needs_onnx():
    pytest.importorskip("onnxscript")
    pytest.importorskip("onnxruntime")


def test_it_writes_the_file_and_tells_differences_size_and_speed(tmp_path, capsys):
    pattern = tmp_path / "pattern.json"
    pattern.write_text(json.dumps({"blocks.0.*": "knn(topk=0.5)", "*": None}))
    out = tmp_path / "small.onnx"
    assert main([*SMALL, "--pattern", str(pattern), "--out", str(out)]) == 0
    said = capsys.readouterr()
    for expected in (
        "pattern.json, 1 of 12 attention modules",
        "2 x 48 pixels (as exported): largest difference",
        "3 x 48 pixels (not seen at export): largest difference",
        "one image: the model",
        "The weights are random.",
    ):
        assert expected in said.out
    assert sorted(path.name for path in tmp_path.iterdir()) == ["pattern.json", "small.onnx"]
    assert "Traceback" not in said.err


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["export"], "MODEL"),
        (["export", "vit_tinny"], "regard export: MODEL: unknown model 'vit_tinny'; nearest known: "),
        ([*SMALL, "--format", "tflite"], "regard export: --format: expected one of onnx, pt2, got 'tflite'"),
        ([*SMALL, "--dynamic", "batch,depth"], "regard export: --dynamic: expected some of batch, size"),
        ([*SMALL, "--mechanism", "knn(topk=0)"], "regard export: --mechanism: "),
        ([*SMALL, "--pattern", "p.json"], "regard export: --pattern: p.json cannot be read"),
        ([*SMALL, "--pattern", "p.json", "--mechanism", "knn"], "regard export: --pattern: a mechanism is given"),
        ([*SMALL, "--out", "no/such/m.onnx"], "regard export: --out: there is no folder no/such"),
        ([*SMALL, "--out", "model.pt2"], "regard export: --out: expected a name that ends in .onnx"),
        ([*SMALL, "--standalone"], "regard export: --standalone: "),
        ([*SMALL, "--checkpoint", "w.pt"], "regard export: --random-weights: a checkpoint is given"),
    ],
)
def test_what_cannot_be_obeyed_is_named(arguments, named, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == 2
    said = capsys.readouterr()
    assert named in said.err and "Traceback" not in said.err and said.out == ""
    assert list(tmp_path.iterdir()) == []
