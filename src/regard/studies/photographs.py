"""Photographs of a folder, chosen evenly."""

from pathlib import Path

from PIL import Image, UnidentifiedImageError

from regard.studies.settings import SettingsError

__all__ = ["choose_photographs", "open_photograph"]

_ENDINGS = {".jpg", ".jpeg", ".png", ".webp", ".tif", ".tiff", ".bmp"}


def choose_photographs(folder: Path, count: int) -> list[Path]:
    """`count` photographs that lie evenly among the folder's sorted names; the same for every run.

    Raises:
        SettingsError: the folder is missing, holds fewer photographs, or two whose names differ in the ending alone.
    """
    try:
        found = sorted(path for path in folder.iterdir() if path.suffix.lower() in _ENDINGS and path.is_file())
    except OSError as error:
        raise SettingsError("photos", f"{folder} cannot be read: {error.strerror}") from error
    if len(found) < count:
        raise SettingsError("photos", f"{folder} holds {len(found)} photographs, {count} are asked for (photos_count)")
    chosen = [found[i * len(found) // count] for i in range(count)]
    if len({path.stem for path in chosen}) < count:
        raise SettingsError("photos", f"{folder} holds two photographs of one name with different endings; rename one")
    return chosen


def open_photograph(path: Path) -> Image.Image:
    """The photograph in RGB. Raises SettingsError if it cannot be read."""
    try:
        with Image.open(path) as image:
            return image.convert("RGB")
    except (OSError, UnidentifiedImageError) as error:
        raise SettingsError("photos", f"{path} cannot be read: {error}") from error
