"""Data-set strings of timm. Nothing here touches the network."""

from urllib.error import URLError

import pytest
import timm.data
from PIL import Image

from regard.data import load


class Pictures:
    """Random access over grey images whose value is their label."""

    def __init__(self, labels, classes=None):
        self.labels = labels
        if classes:
            self.classes = classes

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, i):
        return Image.new("L", (9, 12), 10 * abs(self.labels[i])), self.labels[i]


@pytest.fixture
def given(monkeypatch):
    """Let timm's create_dataset hand over what the test chooses; the calls are kept."""
    calls = []

    def put(train, test):
        def create_dataset(name, **options):
            calls.append((name, options))
            return train if options["split"] == "train" else test

        monkeypatch.setattr(timm.data, "create_dataset", create_dataset)
        return calls

    return put


def test_unknown_name(tmp_path):
    with pytest.raises(ValueError, match="data: timm cannot provide 'torch/nosuch' .*nosuch.*allowed are"):
        load("torch/nosuch", root=tmp_path)


def test_no_network(tmp_path, monkeypatch):
    def create_dataset(name, **options):
        raise URLError("Name or service not known")

    monkeypatch.setattr(timm.data, "create_dataset", create_dataset)
    with pytest.raises(
        ValueError, match=r"data: .*'torch/cifar10' \(URLError: .*not known.*needs the network"
    ) as caught:
        load("torch/cifar10", root=tmp_path)
    assert str(tmp_path) in str(caught.value)


@pytest.mark.parametrize("name", ["tfds/mnist", "wds/any", "hfids/any"])
def test_streams_are_refused(name):
    with pytest.raises(ValueError, match=f"data: '{name}' is a stream"):
        load(name)


@pytest.mark.parametrize(("classes", "names"), [(["ant", "bee"], ("ant", "bee")), (None, ("0", "1"))])
def test_images_labels_and_names(given, tmp_path, classes, names):
    calls = given(Pictures([0, 1, 1], classes), Pictures([1, 0], classes))
    data = load("torch/some", image_size=6, root=tmp_path)
    assert data.class_names == names and data.train_images.shape == (3, 3, 6, 6)
    assert data.train_labels.tolist() == [0, 1, 1] and data.test_labels.tolist() == [1, 0]
    assert data.test_images[:, 0, 0, 0].tolist() == [10, 0]
    assert [one[1]["split"] for one in calls] == ["train", "validation"]
    assert {one[1]["root"] for one in calls} == {str(tmp_path)}


def test_test_images_without_labels(given, tmp_path):
    given(Pictures([0, 1], ["ant", "bee"]), Pictures([-1, -1], ["ant", "bee"]))
    with pytest.raises(ValueError, match=r"data: 'hfds/some' has test images of no class \(labels \[-1\]"):
        load("hfds/some", root=tmp_path)
