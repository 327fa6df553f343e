"""Where data sets come from. timm and torchvision read and resize; this file chooses and checks."""

import warnings
from collections.abc import Callable, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from regard.data.images import ImageData

__all__ = ["load"]

_CLASSES = (
    "T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot",
)  # fmt: skip
_TILE = 28
_DEFAULT_SIZE = 112
_TEST_NAMES = ("val", "validation", "test")
_PREFIXES = ("torch/", "hfds/", "hfids/", "tfds/", "wds/")
_ALLOWED = "allowed are 'embedded', an image folder, or a data-set string of timm such as 'torch/cifar10' or 'hfds/...'"
Sample = Callable[[], Any]  # gives a PIL image


def load(name: str | Path = "embedded", *, image_size: int | None = None, root: str | Path | None = None) -> ImageData:
    """Load a data set into memory.

    Args:
        name: `embedded` (6,000 train and 2,000 test images of Fashion-MNIST, arXiv 1708.07747, 28 x 28, one channel);
            an image folder with `train/` and `val/`, `validation/` or `test/`, each with class folders, or with class
            folders alone, of which every fifth image of a class is for testing; or a string of timm's create_dataset.
        image_size: side in pixels. None: 28 for the embedded set, 112 for others.
        root: where timm looks for and puts a data set given by string; `~/.cache/regard` if None.

    Raises:
        ValueError: the data set does not exist, is empty, has one class only, or timm cannot provide it.

    Warns:
        UserWarning: images could not be read; they are named and skipped.
    """
    if image_size is not None and image_size < 1:
        raise ValueError(f"image_size: expected 1 or more pixels, got {image_size}")
    text = str(name)
    if text == "embedded":
        return _embedded(image_size)
    if Path(text).is_dir():
        return _folder(Path(text), image_size or _DEFAULT_SIZE)
    if text.lower().startswith(_PREFIXES):
        return _timm(text, image_size or _DEFAULT_SIZE, root)
    found = "is a file, not a folder" if Path(text).is_file() else "does not exist"
    raise ValueError(f"data: {text!r} {found}; {_ALLOWED}")


def _embedded(image_size: int | None) -> ImageData:
    from torchvision.io import ImageReadMode, decode_image
    from torchvision.transforms.v2.functional import resize

    parts: list[Tensor] = []
    for split in ("train", "test"):
        content = (files("regard.data") / "assets" / f"fashion_mnist_{split}.png").read_bytes()
        mosaic = decode_image(torch.frombuffer(bytearray(content), dtype=torch.uint8), ImageReadMode.GRAY)
        # One row of tiles is one class.
        tiles = mosaic.reshape(len(_CLASSES), _TILE, -1, _TILE).permute(0, 2, 1, 3)
        images = tiles.reshape(-1, 1, _TILE, _TILE).contiguous()
        if image_size not in (None, _TILE):
            images = resize(images, [image_size, image_size], antialias=True)
        parts += [images, torch.arange(len(_CLASSES)).repeat_interleave(tiles.shape[1])]
    return ImageData("embedded", _CLASSES, *parts)


def _folder(folder: Path, size: int) -> ImageData:
    from PIL import Image
    from timm.data.readers.reader_image_folder import find_images_and_targets

    def listed(part: Path, classes: dict[str, int] | None = None) -> tuple[list[tuple[str, int]], dict[str, int]]:
        samples, index = find_images_and_targets(str(part), class_to_idx=classes)
        return list(samples), dict(index)

    test = next((folder / one for one in _TEST_NAMES if (folder / one).is_dir()), None)
    if (folder / "train").is_dir() and test is not None:
        train_samples, classes = listed(folder / "train")
        test_samples, _ = listed(test, classes)
    else:
        samples, classes = listed(folder)
        seen = dict.fromkeys(classes.values(), 0)
        train_samples, test_samples = [], []
        for path, label in samples:
            seen[label] += 1
            (test_samples if seen[label] % 5 == 0 else train_samples).append((path, label))
    if not train_samples or not test_samples:
        found = f"{len(train_samples)} training and {len(test_samples)} test images"
        raise ValueError(
            f"data: {str(folder)!r} has {found}; it needs class folders with images (5 or more a class), "
            f"or train/ and one of {', '.join(_TEST_NAMES)} with class folders"
        )

    def opened(samples: list[tuple[str, int]]) -> list[tuple[str, int, Sample]]:
        return [(path, label, lambda path=path: Image.open(path)) for path, label in samples]

    names = tuple(sorted(classes, key=lambda one: classes[one]))
    return _gather(str(folder), names, opened(train_samples), opened(test_samples), size)


def _timm(name: str, size: int, root: str | Path | None) -> ImageData:
    from timm.data import create_dataset

    place = Path(root) if root is not None else Path.home() / ".cache" / "regard"
    parts = []
    try:
        place.mkdir(parents=True, exist_ok=True)
        for split in ("train", "validation"):
            dataset = create_dataset(name, root=str(place), split=split, download=True)
            if not hasattr(dataset, "__len__") or not hasattr(dataset, "__getitem__"):
                raise TypeError("it is a stream; only data sets with random access are taken")
            parts.append(dataset)
        labels = [[int(one[i][1]) for i in range(len(one))] for one in parts]  # type: ignore[arg-type]
    # timm raises AssertionError for unknown names, its readers anything from ImportError to the network's own errors.
    except Exception as error:
        raise ValueError(f"data: timm cannot provide {name!r}: {type(error).__name__}: {error}; {_ALLOWED}") from error
    known = getattr(parts[0], "classes", None) or [str(i) for i in range(max(map(max, labels)) + 1)]

    def opened(dataset: Any, own: list[int]) -> list[tuple[str, int, Sample]]:
        return [(f"{name}[{i}]", label, lambda i=i: dataset[i][0]) for i, label in enumerate(own)]

    return _gather(name, tuple(map(str, known)), opened(parts[0], labels[0]), opened(parts[1], labels[1]), size)


def _gather(
    name: str,
    class_names: Sequence[str],
    train: list[tuple[str, int, Sample]],
    test: list[tuple[str, int, Sample]],
    size: int,
) -> ImageData:
    """Read, resize and crop every image to (3, size, size); those that cannot be read are skipped and named once."""
    from torchvision.transforms.v2 import functional as tv

    if len(class_names) < 2:
        raise ValueError(f"data: {name!r} has one class only ({', '.join(class_names)}); two or more are needed")
    broken: list[str] = []
    parts: list[Tensor] = []
    for samples in (train, test):
        images, labels = [], []
        for path, label, image in samples:
            try:
                picture = image().convert("RGB")
            # Truncated and hostile files raise OSError, SyntaxError, ValueError or DecompressionBombError, by format.
            except Exception:
                broken.append(path)
                continue
            resized = tv.center_crop(tv.resize(picture, [size], antialias=True), [size, size])
            images.append(tv.pil_to_tensor(resized))
            labels.append(label)
        if not images:
            raise ValueError(f"data: no image of {name!r} could be read; the first that failed: {broken[0]}")
        parts += [torch.stack(images), torch.tensor(labels)]
    if broken:
        warnings.warn(f"data: {len(broken)} unreadable images skipped: {', '.join(broken)}", stacklevel=3)
    return ImageData(name, tuple(class_names), *parts)
