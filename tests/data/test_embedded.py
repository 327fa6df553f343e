"""The data set that ships with regard, and the script that makes it."""

import gzip
import importlib.util
from importlib.resources import files
from pathlib import Path

import numpy as np
import pytest
import torch

from regard.data import ImageData, load

TOOL = Path(__file__).resolve().parents[2] / "tools" / "make_fashion_mnist.py"


@pytest.fixture(scope="module")
def embedded() -> ImageData:
    return load()


@pytest.fixture(scope="module")
def tool():
    spec = importlib.util.spec_from_file_location("make_fashion_mnist", TOOL)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_sizes_and_classes(embedded):
    assert embedded.name == "embedded"
    assert embedded.train_images.shape == (6000, 1, 28, 28) and embedded.test_images.shape == (2000, 1, 28, 28)
    assert embedded.train_images.dtype == embedded.test_images.dtype == torch.uint8
    assert embedded.train_labels.bincount().tolist() == [600] * 10
    assert embedded.test_labels.bincount().tolist() == [200] * 10
    assert embedded.train_labels.dtype == torch.int64
    assert (embedded.channels, embedded.image_size) == (1, (28, 28))
    assert len(set(embedded.class_names)) == 10 and embedded.class_names[1] == "Trouser"


def test_labels_belong_to_the_pixels(embedded):
    """The nearest class mean is right for two of three test images; shuffled labels would give one in ten."""
    train, test = (one.flatten(1).float() for one in (embedded.train_images, embedded.test_images))
    means = torch.stack([train[embedded.train_labels == label].mean(0) for label in range(10)])
    accuracy = (torch.cdist(test, means).argmin(1) == embedded.test_labels).float().mean()
    assert accuracy > 0.6


def test_no_test_image_is_a_training_image(embedded):
    train = {one.numpy().tobytes() for one in embedded.train_images}
    assert not [i for i, one in enumerate(embedded.test_images) if one.numpy().tobytes() in train]


def test_loading_twice_gives_the_same(embedded):
    again = load("embedded")
    assert again.train_images.equal(embedded.train_images) and again.test_images.equal(embedded.test_images)


def test_another_size():
    data = load(image_size=14)
    assert data.train_images.shape == (6000, 1, 14, 14) and data.train_images.dtype == torch.uint8


def test_normalise(embedded):
    pixels = torch.tensor([0, 255], dtype=torch.uint8)
    assert embedded.normalise(pixels).tolist() == [-1.0, 1.0]


@pytest.mark.parametrize("size", [0, -3])
def test_size_below_one(size):
    with pytest.raises(ValueError, match=f"image_size.*{size}"):
        load(image_size=size)


def test_licence_notice_lies_beside_the_images(tool):
    assets = files("regard.data") / "assets"
    assert (assets / "fashion_mnist_LICENSE.txt").read_text(encoding="utf-8") == tool.LICENCE
    assert "Permission is hereby granted" in tool.LICENCE and "Zalando" in tool.LICENCE


def write_idx(path: Path, values: np.ndarray) -> None:
    header = bytes([0, 0, 8, values.ndim]) + np.array(values.shape, ">u4").tobytes()
    path.write_bytes(gzip.compress(header + values.tobytes()))


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """Files like the official ones, with 4 images a class whose pixels all hold 10 * label + number."""
    for prefix in ("train", "t10k"):
        labels = np.tile(np.arange(10, dtype=np.uint8), 4)
        value = 10 * labels + np.repeat(np.arange(4, dtype=np.uint8), 10)
        write_idx(tmp_path / f"{prefix}-labels-idx1-ubyte.gz", labels)
        write_idx(
            tmp_path / f"{prefix}-images-idx3-ubyte.gz", np.broadcast_to(value[:, None, None], (40, 28, 28)).copy()
        )
    return tmp_path


def test_read_idx(tool, source):
    labels = tool.read_idx(source / "train-labels-idx1-ubyte.gz")
    images = tool.read_idx(source / "train-images-idx3-ubyte.gz")
    assert labels.tolist() == [*range(10)] * 4 and images.shape == (40, 28, 28)
    assert images[11].min() == images[11].max() == 11  # label 1, second image


def test_read_idx_refuses_other_files(tool, tmp_path):
    (tmp_path / "x.gz").write_bytes(gzip.compress(b"\x00\x00\x0d\x01" + bytes(8)))
    with pytest.raises(ValueError, match="x.gz"):
        tool.read_idx(tmp_path / "x.gz")


def test_the_script_is_deterministic_and_sorts_by_class(tool, source, monkeypatch, capsys):
    monkeypatch.setattr(tool, "TAKEN", {"train": ("train", 3), "test": ("t10k", 2)})
    for out in ("first", "second"):
        monkeypatch.setattr("sys.argv", [str(TOOL), "--source", str(source), "--out", str(source / out)])
        tool.main()
    written = {one.name: one.read_bytes() for one in (source / "first").iterdir()}
    assert written == {one.name: one.read_bytes() for one in (source / "second").iterdir()}
    assert set(written) == {"fashion_mnist_train.png", "fashion_mnist_test.png", "fashion_mnist_LICENSE.txt"}
    from PIL import Image

    pixels = np.asarray(Image.open(source / "first" / "fashion_mnist_train.png"))
    assert pixels.shape == (280, 84)
    tiles = pixels.reshape(10, 28, 3, 28).transpose(0, 2, 1, 3).reshape(10, 3, -1)
    assert (tiles.min(-1) == tiles.max(-1)).all()  # every tile is one source image
    assert (tiles[..., 0] // 10 == np.arange(10)[:, None]).all()  # a row is a class
    assert (np.diff(tiles[..., 0].astype(int), axis=1) > 0).all()  # drawn without replacement, in the source's order
