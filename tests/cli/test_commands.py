"""The command line: help without torch, list, doctor, and what wrong options get."""

import json
import subprocess
import sys

import pytest

import regard
from regard.cli import main


def run(*arguments, cwd=None):
    return subprocess.run(
        [sys.executable, "-m", "regard", *arguments], capture_output=True, text=True, cwd=cwd, timeout=120, check=False
    )


def test_version(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"regard {regard.__version__}\n"


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["--help"],
        ["compare", "--help"],
        ["convert", "--help"],
        ["bench", "--help"],
        ["simulate", "--help"],
        ["list", "--help"],
    ],
)
def test_help_imports_no_torch(arguments):
    code = (
        f"import sys; from regard.cli import main; code = main({arguments}); sys.exit(code or 'torch' in sys.modules)"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert found.returncode == 0, found.stderr
    assert "usage: regard" in found.stdout


def test_help_names_every_option_of_the_issue(capsys):
    assert main(["compare", "--help"]) == 0
    said = capsys.readouterr().out
    for option in ("data", "mechanisms", "epochs", "seeds", "model", "device", "out"):
        assert f"--{option}" in said


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["compare", "--seeds", "x"], "--seeds: expected a whole number, got 'x'"),
        (["compare", "--seeds", "0"], "--seeds: expected a whole number of at least 1, got 0"),
        (["compare", "--epochs", "-1"], "--epochs"),
        (["compare", "--cost-seconds", "nan"], "--cost-seconds"),
        (["compare", "--mechanisms"], "--mechanisms"),
        (["compare", "--bogus", "3"], "--bogus"),
        (["list", "--bogus"], "--bogus"),
        (["nothing"], "nothing"),
    ],
)
def test_a_wrong_option_is_named_in_one_line(arguments, named, capsys):
    assert main(arguments) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert named in err
    assert err.count("\n") <= 2 and "Traceback" not in err and "╭" not in err


def test_an_unknown_command_is_told_the_known_ones(capsys):
    assert main(["nothing"]) == 2
    assert "compare, convert, export, bench, simulate, list, doctor" in capsys.readouterr().err


def test_list_names_every_mechanism_in_a_form_that_parses(capsys):
    assert main(["list", "--json"]) == 0
    entries = json.loads(capsys.readouterr().out)
    assert [one["name"] for one in entries] == [*regard.mechanisms(), *regard.modifiers()]
    knn = next(one for one in entries if one["name"] == "knn")
    assert knn["arxiv"] == "2106.00515" and knn["options"]["topk"] == 0.5
    assert main(["list"]) == 0
    told = capsys.readouterr().out
    assert "topk=0.5" in told and "+ gated(" in told
    assert regard.parse_mechanism("knn(topk=0.5)") == regard.KNN()


def test_doctor_tells_what_explain_tells(capsys):
    import torch

    assert main(["doctor", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    calls = {one["call"]: one for one in report["calls"]}
    query = torch.zeros(1, 2, 16, 32)
    for label, dtype in (("float32", torch.float32), ("float64", torch.float64)):
        tensor = query.to(dtype)
        expected = regard.explain(regard.knn_attention, tensor, tensor, tensor, topk=0.5)
        found = calls[f"knn_attention, {label}"]
        assert found["backend"] == expected.backend
        assert [tuple(one) for one in found["refusals"]] == list(expected.refusals)
    assert calls["knn_attention, float64"]["backend"] == "pytorch"
    assert report["versions"]["regard"] == regard.__version__
    assert report["machine"]["threads"] == torch.get_num_threads()


def test_doctor_in_text_names_versions_kernels_and_refusals(capsys):
    assert main(["doctor"]) == 0
    said = capsys.readouterr().out
    for expected in ("torch", "instruction set", "dropout_p=0.1", "pytorch"):
        assert expected in said


def test_python_dash_m_regard_is_the_same_command(tmp_path):
    found = run("compare", "--mechanisms", "nothing", cwd=tmp_path)
    assert found.returncode == 2
    assert "--mechanisms: unknown name 'nothing'" in found.stderr and "known:" in found.stderr
    assert "Traceback" not in found.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--mechanisms", "knn(topk=0)"], "--mechanisms: "),
        (["--mechanisms", "knn(k=3)"], "--mechanisms: 'knn' has no option 'k'"),
        (["--mechanisms", "dense", "--mechanisms", "dense"], "--mechanisms: dense is given twice"),
        (["--data", "no/such/folder"], "--data: "),
        (["--model", "no_such_model"], "--model: "),
        (["--device", "toaster"], "--device: "),
        (["--device", "cuda:99"], "--device: 'cuda:99' is not here; here are cpu"),
    ],
)
def test_what_compare_cannot_obey_is_named_before_anything_runs(arguments, named, tmp_path, capsys):
    assert main(["compare", *arguments, "--out", str(tmp_path / "out")]) == 2
    err = capsys.readouterr().err
    assert err.startswith(f"regard compare: {named}")
    assert err.count("\n") <= 2 and "Traceback" not in err
    assert not (tmp_path / "out").exists()


def test_repeated_and_listed_mechanisms_read_alike():
    from regard.cli import _repeated

    listed = ["compare", "--seeds", "1", "--mechanisms", "dense", "knn"]
    repeated = ["compare", "--mechanisms", "dense", "--seeds", "1", "--mechanisms=knn"]
    assert _repeated(repeated, "--mechanisms") == _repeated(listed, "--mechanisms") == listed
