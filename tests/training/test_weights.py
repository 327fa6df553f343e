import pytest
import torch
from torch import nn

from regard.mixers import parse_mechanism
from regard.training import build_model
from regard.training.weights import load_weights, save_weights


def test_round_trip(tiny, tmp_path):
    torch.manual_seed(0)
    first = build_model("vit", parse_mechanism("knn"), tiny)
    second = build_model("vit", parse_mechanism("dense"), tiny)
    save_weights(first, tmp_path / "run.safetensors")
    load_weights(second, tmp_path / "run.safetensors")
    assert [one.name for one in tmp_path.iterdir()] == ["run.safetensors"]
    expected, found = first.state_dict(), second.state_dict()
    assert list(expected) == list(found) and all(expected[name].equal(found[name]) for name in expected)


@pytest.mark.parametrize("stop", [KeyboardInterrupt, OSError])
def test_a_save_that_fails_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch, stop):
    path = tmp_path / "run.safetensors"
    model = nn.Linear(2, 2)
    save_weights(model, path)
    old = path.read_bytes()

    def save_file(tensors, filename):
        with open(filename, "wb") as file:
            file.write(b"half")
        raise stop

    monkeypatch.setattr("regard.training.weights.save_file", save_file)
    with pytest.raises(stop):
        save_weights(nn.Linear(2, 2), path)
    assert path.read_bytes() == old and [one.name for one in tmp_path.iterdir()] == ["run.safetensors"]


def test_a_missing_file(tmp_path):
    with pytest.raises(FileNotFoundError):
        load_weights(nn.Linear(2, 2), tmp_path / "none.safetensors")


def test_weights_of_another_model(tmp_path):
    save_weights(nn.Linear(2, 2), tmp_path / "run.safetensors")
    with pytest.raises(RuntimeError, match="size mismatch"):
        load_weights(nn.Linear(2, 3), tmp_path / "run.safetensors")
