"""Image folders: forms, odd images, and what goes wrong."""

import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from regard.data import load

COLOURS = {"cat": (200, 30, 30), "dog": (30, 30, 200), "owl": (30, 200, 30)}


def fill(
    folder: Path, count: int, colour: tuple[int, int, int] = (120, 60, 10), size: tuple[int, int] = (12, 9)
) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(count):
        Image.new("RGB", size, colour).save(folder / f"{i:02}.png")


@pytest.fixture
def plain(tmp_path: Path) -> Path:
    for name, colour in COLOURS.items():
        fill(tmp_path / name, 10, colour)
    return tmp_path


def broken_png(path: Path) -> None:
    """The right name and the right beginning, cut off amid the pixels."""
    pixels = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)
    path.write_bytes(path.read_bytes()[:600])


@pytest.mark.parametrize("test_name", ["val", "validation", "test"])
def test_train_and_test_folders(tmp_path, test_name):
    for name, colour in COLOURS.items():
        fill(tmp_path / "train" / name, 3, colour)
        fill(tmp_path / test_name / name, 2, colour)
    data = load(tmp_path, image_size=8)
    assert data.class_names == ("cat", "dog", "owl")
    assert data.train_images.shape == (9, 3, 8, 8) and data.test_images.shape == (6, 3, 8, 8)
    assert data.train_images.dtype == torch.uint8 and data.test_labels.tolist() == [0, 0, 1, 1, 2, 2]
    for images, labels in ((data.train_images, data.train_labels), (data.test_images, data.test_labels)):
        for image, label in zip(images, labels, strict=True):
            assert tuple(image[:, 4, 4].tolist()) == COLOURS[data.class_names[label]]


def test_plain_form_is_split_the_same_each_time(plain):
    # Every image its own colour, so that the split can be told from the pixels.
    for i, path in enumerate(sorted(plain.rglob("*.png"))):
        Image.new("RGB", (8, 8), (i, 0, 0)).save(path)
    first, second = load(plain, image_size=8), load(str(plain), image_size=8)
    assert first.train_labels.bincount().tolist() == [8] * 3 and first.test_labels.bincount().tolist() == [2] * 3
    assert first.train_images.equal(second.train_images) and first.test_images.equal(second.test_images)
    train, test = ({int(one[0, 0, 0]) for one in images} for images in (first.train_images, first.test_images))
    assert train | test == set(range(30)) and not train & test


def test_default_size(plain):
    assert load(plain).image_size == (112, 112)


def test_grey_alpha_palette_and_odd_sizes(plain):
    cat = plain / "cat"
    Image.new("L", (1, 40), 77).save(cat / "00.png")
    Image.new("RGBA", (40, 1), (1, 2, 3, 128)).save(cat / "01.png")
    Image.new("RGB", (5, 5), (9, 9, 9)).convert("P").save(cat / "02.png")
    Image.new("LA", (7, 8), (50, 100)).save(cat / "03.png")
    Image.fromarray(np.full((6, 6), 256 * 99, np.uint16)).save(cat / "04.png")  # the fifth: for testing
    Image.new("CMYK", (6, 6)).save(cat / "05.jpg")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        data = load(plain, image_size=8)
    assert data.train_images.shape[1:] == (3, 8, 8)
    assert [int(image[0, 4, 4]) for image in data.train_images[[0, 1, 3]]] == [77, 1, 50]
    assert data.test_images[0].unique().tolist() == [99], "16 bits are scaled, not clipped to white"


def test_the_middle_is_kept_undistorted(plain):
    pixels = np.zeros((10, 30, 3), np.uint8)
    pixels[:, 10:20] = 255
    Image.fromarray(pixels).save(plain / "cat" / "00.png")
    assert load(plain, image_size=10).train_images[0].min() > 200


@pytest.mark.parametrize("content", ["cut", "text", "empty"])
def test_an_unreadable_image_is_named_once_and_skipped(plain, content):
    bad = plain / "dog" / "03.png"
    if content == "cut":
        broken_png(bad)
    else:
        bad.write_bytes(b"not an image" if content == "text" else b"")
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        data = load(plain, image_size=8)
    assert len(seen) == 1 and "1 unreadable" in str(seen[0].message) and str(bad) in str(seen[0].message)
    assert seen[0].filename == __file__, "the warning points at the caller"
    assert len(data.train_labels) == 23 and len(data.test_labels) == 6


def test_two_unreadable_images_give_one_warning(plain):
    for name in ("dog/03.png", "owl/04.png"):
        (plain / name).write_bytes(b"nothing")
    with pytest.warns(UserWarning) as seen:
        load(plain, image_size=8)
    assert len(seen) == 1 and all(name in str(seen[0].message) for name in ("2 unreadable", "03.png", "04.png"))


@pytest.mark.parametrize(("lost", "kind"), [([0, 1, 2, 3, 5, 6, 7, 8], "training"), ([4, 9], "test")])
def test_a_class_that_loses_all_its_images_is_named(plain, lost, kind):
    for i in lost:
        (plain / "owl" / f"{i:02}.png").write_bytes(b"nothing")
    with pytest.raises(ValueError, match=f"data: .* no {kind} images of owl .*could not be read.*owl"):
        load(plain, image_size=8)


def test_a_class_too_small_for_a_split_is_named(plain):
    fill(plain / "eel", 4)
    with pytest.raises(ValueError, match="data: .* no test images of eel .*5 or more a class"):
        load(plain)


def test_a_class_folder_without_images_is_named(plain):
    (plain / "eel").mkdir()
    with pytest.raises(ValueError, match="data: .*eel"):
        load(plain)


def test_hidden_names_are_passed_over(plain):
    fill(plain / ".ipynb_checkpoints", 2)
    (plain / "cat" / "._00.png").write_bytes(b"resource fork")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        data = load(plain, image_size=8)
    assert data.class_names == ("cat", "dog", "owl") and len(data.train_labels) == 24


def test_one_class_only(tmp_path):
    fill(tmp_path / "cat", 10)
    with pytest.raises(ValueError, match=r"data: .* one class only \(cat\)"):
        load(tmp_path)


def test_no_images(tmp_path):
    with pytest.raises(ValueError, match="data: .* no class folders, and 0 images .*train/"):
        load(tmp_path)


def test_images_outside_of_class_folders(tmp_path):
    fill(tmp_path, 3)
    with pytest.raises(ValueError, match="data: .* no class folders, and 3 images"):
        load(tmp_path)


def test_train_without_test(tmp_path):
    fill(tmp_path / "train" / "cat", 2)
    fill(tmp_path / "holdout" / "cat", 2)
    with pytest.raises(ValueError, match="data: .*holdout/, train/ but no folder for testing.* val/"):
        load(tmp_path)


@pytest.mark.parametrize("alone_in", ["train", "val"])
def test_a_class_in_one_part_only(tmp_path, alone_in):
    for part in ("train", "val"):
        for name in COLOURS:
            fill(tmp_path / part / name, 2)
    fill(tmp_path / alone_in / "eel", 2)
    with pytest.raises(ValueError, match="data: train/ and val/ .* differ in eel;"):
        load(tmp_path)


@pytest.mark.parametrize("name", ["nowhere/at/all", "embeded", ""])
def test_missing(name):
    with pytest.raises(ValueError, match=f"data: '{name}' does not exist; allowed are 'embedded', an image folder"):
        load(name)


def test_a_file(tmp_path):
    path = tmp_path / "cats.zip"
    path.write_bytes(b"PK")
    with pytest.raises(ValueError, match="data: .*cats.zip' is a file, not a folder"):
        load(path)
