"""Where data sets come from. timm, torchvision and Pillow read and resize; this file chooses and checks."""

import warnings
from collections.abc import Callable, Sequence
from functools import partial
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
_TEST_EVERY = 5
_PREFIXES = ("torch/", "hfds/")
_STREAMS = ("hfids/", "tfds/", "wds/")
_ALLOWED = "allowed are 'embedded', an image folder, or a data-set string of timm such as 'torch/cifar10' or 'hfds/...'"
_FORM = (
    f"it needs class folders with images ({_TEST_EVERY} or more a class), or train/ and one of "
    f"{', '.join(f'{name}/' for name in _TEST_NAMES)} with the same class folders"
)
Sample = tuple[str, Callable[[], tuple[Any, int]]]  # what to call it, and what gives the PIL image and its label


def load(name: str | Path = "embedded", *, image_size: int | None = None, root: str | Path | None = None) -> ImageData:
    """Load a data set into memory.

    Args:
        name: `embedded` (6,000 train and 2,000 test images of Fashion-MNIST, arXiv 1708.07747, 28 x 28, one channel);
            an image folder with `train/` and `val/`, `validation/` or `test/`, each with class folders, or with class
            folders alone, of which every fifth image of a class, by file name, is for testing; or a string of timm's
            create_dataset (`torch/...` or `hfds/...`). Names that begin with a dot are passed over.
        image_size: side in pixels. None: 28 for the embedded set, 112 for others.
        root: where timm looks for and puts a data set given by string; `~/.cache/regard` if None.

    Raises:
        ValueError: the data set does not exist, has one class only, a class has no readable image for training or for
            testing, the two parts differ in classes, or timm cannot provide it.

    Warns:
        UserWarning: images could not be read; all are named in one warning and skipped.
    """
    if image_size is not None and image_size < 1:
        raise ValueError(f"image_size: expected 1 or more pixels, got {image_size}")
    text = str(name)
    if text == "embedded":
        return _embedded(image_size)
    folder = Path(text).expanduser()
    if text and folder.is_dir():  # Path("") is the working folder
        return _folder(folder, image_size or _DEFAULT_SIZE)
    if text.lower().startswith(_PREFIXES):
        return _timm(text, image_size or _DEFAULT_SIZE, root)
    if text.lower().startswith(_STREAMS):
        raise ValueError(f"data: {text!r} is a stream, and only data sets with random access are taken; {_ALLOWED}")
    found = "is a file, not a folder" if folder.is_file() else "does not exist"
    raise ValueError(f"data: {text!r} {found}; {_ALLOWED}")


def _embedded(image_size: int | None) -> ImageData:
    import numpy as np
    from PIL import Image
    from torchvision.transforms.v2.functional import resize

    parts: list[Tensor] = []
    for split in ("train", "test"):
        with (files("regard.data") / "assets" / f"fashion_mnist_{split}.png").open("rb") as file:
            mosaic = torch.from_numpy(np.array(Image.open(file)))
        # One row of tiles is one class.
        tiles = mosaic.reshape(len(_CLASSES), _TILE, -1, _TILE).permute(0, 2, 1, 3)
        images = tiles.reshape(-1, 1, _TILE, _TILE).contiguous()
        if image_size not in (None, _TILE):
            images = resize(images, [image_size, image_size], antialias=True)
        parts += [images, torch.arange(len(_CLASSES)).repeat_interleave(tiles.shape[1])]
    return ImageData("embedded", _CLASSES, *parts)


def _class_folders(part: Path) -> list[str]:
    return sorted(one.name for one in part.iterdir() if one.is_dir() and not one.name.startswith("."))


def _folder(folder: Path, size: int) -> ImageData:
    from torchvision.datasets.folder import IMG_EXTENSIONS, make_dataset

    def wanted(path: str) -> bool:
        return path.lower().endswith(IMG_EXTENSIONS) and not Path(path).name.startswith(".")

    def listed(part: Path) -> list[tuple[str, int]]:
        index = {one: label for label, one in enumerate(classes)}
        return make_dataset(str(part), index, is_valid_file=wanted, allow_empty=True)

    train = folder / "train"
    test = next((folder / one for one in _TEST_NAMES if (folder / one).is_dir()), None)
    split = train.is_dir() and bool(_class_folders(train))
    if split and test is None:
        found = ", ".join(f"{one}/" for one in _class_folders(folder))
        raise ValueError(f"data: {str(folder)!r} has {found} but no folder for testing; {_FORM}")
    classes = _class_folders(train if split else folder)
    if not classes:
        loose = sum(wanted(str(one)) for one in folder.iterdir())
        raise ValueError(f"data: {str(folder)!r} has no class folders, and {loose} images outside of any; {_FORM}")
    if split and test is not None:
        differing = ", ".join(sorted(set(classes) ^ set(_class_folders(test))))
        if differing:
            raise ValueError(f"data: train/ and {test.name}/ of {str(folder)!r} differ in {differing}; {_FORM}")
        train_samples, test_samples = listed(train), listed(test)
    else:
        seen = [0] * len(classes)
        train_samples, test_samples = [], []
        for path, label in listed(folder):
            seen[label] += 1
            (train_samples if seen[label] % _TEST_EVERY else test_samples).append((path, label))
    for kind, samples in (("training", train_samples), ("test", test_samples)):
        _check_classes(str(folder), kind, classes, [label for _, label in samples], _FORM)

    def opened(samples: list[tuple[str, int]]) -> list[Sample]:
        return [(path, partial(_read, path, label)) for path, label in samples]

    return _gather(str(folder), classes, opened(train_samples), opened(test_samples), size)


def _read(path: str, label: int) -> tuple[Any, int]:
    """An image file as PIL image in RGB, and its label."""
    import numpy as np
    from PIL import Image

    with Image.open(path) as image:
        if image.mode in ("I", "F"):
            raise ValueError("pixels of 32 bits have no known range")
        if image.mode.startswith("I;16"):
            # Pillow's own conversion clips at 255, which leaves a white image.
            return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8)).convert("RGB"), label
        return image.convert("RGB"), label


def _timm(name: str, size: int, root: str | Path | None) -> ImageData:
    from timm.data import create_dataset

    place = Path(root) if root is not None else Path.home() / ".cache" / "regard"
    parts: list[Any] = []
    try:
        place.mkdir(parents=True, exist_ok=True)
        for split in ("train", "validation"):
            parts.append(create_dataset(name, root=str(place), split=split, download=True))
    # timm raises AssertionError for unknown names, its readers anything from ImportError to the network's own errors.
    except Exception as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise ValueError(
            f"data: timm cannot provide {name!r} ({reason}); a data set that is not yet in {str(place)!r} needs the "
            f"network; {_ALLOWED}"
        ) from error

    def drawn(dataset: Any, i: int) -> tuple[Any, int]:
        image, label = dataset[i]
        return image.convert("RGB"), int(label)

    def opened(dataset: Any) -> list[Sample]:
        return [(f"{name}[{i}]", partial(drawn, dataset, i)) for i in range(len(dataset))]

    classes = getattr(parts[0], "classes", None)
    return _gather(name, classes and [str(one) for one in classes], opened(parts[0]), opened(parts[1]), size)


def _check_classes(name: str, kind: str, classes: Sequence[str], labels: Sequence[int], hint: str) -> None:
    """Raise ValueError unless there are two or more classes and each of them has an image of this kind."""
    if len(classes) < 2:
        raise ValueError(f"data: {name!r} has one class only ({', '.join(classes)}); two or more are needed")
    outside = sorted(set(labels) - set(range(len(classes))))
    if outside:
        raise ValueError(f"data: {name!r} has {kind} images of no class (labels {outside}, {len(classes)} classes)")
    empty = [one for label, one in enumerate(classes) if label not in set(labels)]
    if empty:
        raise ValueError(f"data: {name!r} has no {kind} images of {', '.join(empty)} ({len(labels)} of others); {hint}")


def _gather(
    name: str, classes: Sequence[str] | None, train: Sequence[Sample], test: Sequence[Sample], size: int
) -> ImageData:
    """Crop every image to its middle square, resized to (3, size, size); unreadable ones are skipped and named once.

    Args:
        classes: None: one for each label, named by its number.
    """
    from PIL.Image import Resampling
    from PIL.ImageOps import fit
    from torchvision.transforms.v2.functional import pil_to_tensor

    broken: list[str] = []
    images: list[list[Tensor]] = []
    labels: list[list[int]] = []
    for samples in (train, test):
        images.append([])
        labels.append([])
        for path, sample in samples:
            try:
                picture, label = sample()
            # Truncated and hostile files raise OSError, SyntaxError, ValueError or DecompressionBombError, by format.
            except Exception as error:
                broken.append(f"{path} ({type(error).__name__})")
                continue
            images[-1].append(pil_to_tensor(fit(picture, (size, size), Resampling.BILINEAR)))
            labels[-1].append(label)
    classes = classes or [str(label) for label in range(max((*labels[0], *labels[1]), default=-1) + 1)]
    unread = f"{len(broken)} could not be read" + (f", the first {broken[0]}" if broken else "")
    for kind, own in zip(("training", "test"), labels, strict=True):
        _check_classes(name, kind, classes, own, unread)
    if broken:
        warnings.warn(f"data: {len(broken)} unreadable images skipped: {', '.join(broken)}", stacklevel=4)
    parts = [(torch.stack(pictures), torch.tensor(own)) for pictures, own in zip(images, labels, strict=True)]
    return ImageData(name, tuple(classes), *parts[0], *parts[1])
