"""Photographs of a folder, chosen evenly, and those that installed packages carry."""

from importlib.util import find_spec
from pathlib import Path

from PIL import Image, UnidentifiedImageError

from regard.studies.settings import SettingsError

__all__ = ["choose_photographs", "installed_photographs", "open_photograph"]

_ENDINGS = {".jpg", ".jpeg", ".png", ".webp", ".tif", ".tiff", ".bmp"}


# Where photographs lie in packages that many have; matplotlib is required, the others may be missing.
_INSTALLED = {
    "matplotlib": ("mpl-data/sample_data/grace_hopper.jpg",),
    "skimage": tuple(
        f"data/{name}" for name in ("astronaut.png", "chelsea.png", "coffee.png", "motorcycle_left.png", "rocket.jpg")
    ),
    "sklearn": ("datasets/images/china.jpg", "datasets/images/flower.jpg"),
}


def choose_photographs(folder: Path, count: int, *, setting: str = "photos", fewer: bool = False) -> list[Path]:
    """`count` photographs that lie evenly among the folder's sorted names; the same for every run.

    Args:
        setting: what an error calls the folder.
        fewer: True takes all of a folder that holds at least one, but fewer than `count`.

    Raises:
        SettingsError: the folder is missing, holds fewer photographs, or two whose names differ in the ending alone.
    """
    try:
        found = sorted(path for path in folder.iterdir() if path.suffix.lower() in _ENDINGS and path.is_file())
    except OSError as error:
        raise SettingsError(setting, f"{folder} cannot be read: {error.strerror}") from error
    if fewer and not found:
        raise SettingsError(setting, f"{folder} holds no photograph ({', '.join(sorted(_ENDINGS))})")
    if fewer:
        count = min(count, len(found))
    if len(found) < count:
        raise SettingsError(setting, f"{folder} holds {len(found)} photographs, {count} are asked for (photos_count)")
    chosen = [found[i * len(found) // count] for i in range(count)]
    if len({path.stem for path in chosen}) < count:
        raise SettingsError(setting, f"{folder} holds two photographs of one name with different endings; rename one")
    return chosen


def installed_photographs() -> list[Path]:
    """Photographs that packages carry which are installed here; at least one."""
    found = []
    for package, names in _INSTALLED.items():
        spec = find_spec(package)
        if spec is not None and spec.origin is not None:
            found += [path for name in names if (path := Path(spec.origin).parent / name).is_file()]
    return found


def open_photograph(path: Path, *, setting: str = "photos") -> Image.Image:
    """The photograph in RGB. Raises SettingsError if it cannot be read."""
    try:
        with Image.open(path) as image:
            return image.convert("RGB")
    except (OSError, UnidentifiedImageError) as error:
        raise SettingsError(setting, f"{path} cannot be read: {error}") from error
