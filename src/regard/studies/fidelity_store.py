"""The folder of a fidelity study: every point at once on disk, and the dense features that all mechanisms share."""

import dataclasses
import functools
import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from regard.results import FidelityPoint, to_json, write_text
from regard.specs import Mechanism
from regard.studies.store import check_fingerprint, slug

__all__ = ["DenseFeatures", "FidelityStore", "digest"]


@functools.cache
def digest(path: Path) -> str:
    """SHA-256 of a file: which weights, which photograph."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@dataclass(frozen=True)
class DenseFeatures:
    """What dense attention made of one photograph.

    Args:
        tokens: (1, N, C).
        seconds: of the forward.
    """

    tokens: Tensor
    seconds: float


@dataclass(frozen=True)
class FidelityStore:
    """Points in `folder`/points, one JSON file each; dense features in `folder`/dense.

    Args:
        folder: the study's output folder.
        fingerprint: what must be the same for a stored point to count; the photograph's digest is added.
    """

    folder: Path
    fingerprint: dict[str, str]

    def make_folders(self) -> None:
        for name in ("points", "dense"):
            (self.folder / name).mkdir(parents=True, exist_ok=True)

    def point_path(self, mechanism: Mechanism, size: int, photo: Path) -> Path:
        return self.folder / "points" / f"{slug(str(mechanism))}-{size}px-{slug(photo.stem)}.json"

    def dense_path(self, size: int, photo: Path) -> Path:
        return self.folder / "dense" / f"{size}px-{slug(photo.stem)}.safetensors"

    def save(self, point: FidelityPoint, mechanism: Mechanism, photo: Path) -> None:
        content = {"fingerprint": self._fingerprint(photo), "point": dataclasses.asdict(point)}
        write_text(self.point_path(mechanism, point.size, photo), to_json(content) + "\n")

    def load(self, mechanism: Mechanism, size: int, photo: Path) -> FidelityPoint | None:
        """The stored point; None if there is none, or none that is whole and of this question.

        Raises:
            SettingsError: it was made with other weights or another photograph.
        """
        path = self.point_path(mechanism, size, photo)
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            point = FidelityPoint.from_dict(content["point"])
            made_under = dict(content["fingerprint"])
        except (ValueError, KeyError, TypeError, OSError):
            return None
        check_fingerprint(made_under, self._fingerprint(photo), path)
        is_asked = (point.mechanism, point.size, point.photo) == (str(mechanism), size, photo.stem)
        return point if is_asked else None

    def save_dense(self, dense: DenseFeatures, size: int, photo: Path) -> None:
        path = self.dense_path(size, photo)
        part = path.with_name(path.name + ".part")
        metadata = {**self._fingerprint(photo), "seconds": repr(dense.seconds)}
        save_file({"tokens": dense.tokens.contiguous()}, part, metadata=metadata)
        part.replace(path)

    def load_dense(self, size: int, photo: Path) -> DenseFeatures | None:
        """The stored dense features; None if there are none, or they are of other weights or another photograph."""
        try:
            with safe_open(self.dense_path(size, photo), framework="pt") as file:
                metadata = file.metadata() or {}
                seconds = float(metadata.pop("seconds", "nan"))
                return (
                    DenseFeatures(file.get_tensor("tokens"), seconds) if metadata == self._fingerprint(photo) else None
                )
        except (OSError, SafetensorError, ValueError):
            return None

    def _fingerprint(self, photo: Path) -> dict[str, str]:
        return {**self.fingerprint, "photo": digest(photo)}
