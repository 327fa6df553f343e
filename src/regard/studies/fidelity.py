"""The fidelity study: what features of a trained model survive when its attention is replaced, without retraining?"""

import dataclasses
import shlex
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import timm
from safetensors.torch import load_file
from torch import Tensor, nn

from regard.benchmark import environment
from regard.conversion import AttentionCall, features_of, head_fidelity, picture_fidelity, record_attention
from regard.conversion._progress import progress_bar
from regard.results import FidelityPoint, FidelityStudy, write_text
from regard.specs import Mechanism, parse
from regard.studies.fidelity_store import DenseFeatures, FidelityStore, digest
from regard.studies.near import near_share
from regard.studies.photographs import choose_photographs
from regard.studies.pretrained import read_picture
from regard.studies.settings import SettingsError

__all__ = [
    "DEFAULT_FIDELITY_LAYERS",
    "DEFAULT_FIDELITY_MECHANISMS",
    "FidelitySettings",
    "StudyInterrupted",
    "study_fidelity",
]

DEFAULT_FIDELITY_MECHANISMS = (
    *(f"knn(topk={1 / n})" for n in (2, 4, 8, 16, 32)),
    *(f"multipole(num_clusters={n}, near=0, far='centroid')" for n in (64, 128, 256)),
    *(
        f"multipole(num_clusters={n}, near={near}, far={far!r})"
        for n, near in ((64, 8), (128, 8), (128, 12), (128, 16), (256, 16), (256, 24), (256, 32), (512, 16), (512, 32))
        for far in ("centroid", "gaussian")
    ),
    "multipole",
    "multipole(iterations=0)",
)
DEFAULT_FIDELITY_LAYERS = (
    "knn(topk=0.125)",
    "multipole(num_clusters=128, near=0, far='centroid')",
    "multipole(num_clusters=128, near=12, far='centroid')",
)


class StudyInterrupted(KeyboardInterrupt):
    """Ctrl-C during a study. What was finished is on disk, and in `study`."""

    def __init__(self, study: FidelityStudy) -> None:
        super().__init__("the study was stopped; the same settings resume it")
        self.study = study


@dataclass(frozen=True)
class FidelitySettings:
    """Measure the fidelity of mechanisms in a trained vision transformer, on photographs at several sizes.

    Args:
        weights: The trained model's weights (safetensors).
        photos: Folder of photographs.
        mechanisms: A mechanism in text form, such as 'knn(topk=0.5)'; give it once for each.
        layers: Those of the mechanisms that are also judged layer by layer and head by head; None takes those of
            DEFAULT_FIDELITY_LAYERS that are among the mechanisms.
        sizes: Sides of the square images, in pixels; multiples of the model's patch size.
        photos_count: How many of the photographs, spread evenly over the folder's sorted names.
        model: A timm vision transformer, into which the weights load strictly.
        device: Device to run on, such as 'cpu' or 'cuda'.
        out: Folder of points and JSON. The same folder again resumes.
        overwrite: Redo what the folder already holds.

    Raises:
        SettingsError: a value is out of range; it names the setting and what is allowed.
    """

    weights: Path
    photos: Path
    mechanisms: tuple[str, ...] = DEFAULT_FIDELITY_MECHANISMS
    layers: tuple[str, ...] | None = None
    sizes: tuple[int, ...] = (518, 896, 1344)
    photos_count: int = 10
    model: str = "vit_small_patch14_dinov2"
    device: str = "cpu"
    out: Path = Path("regard-fidelity")
    overwrite: bool = False

    def __post_init__(self) -> None:
        for name in ("mechanisms", "layers"):
            if isinstance(getattr(self, name), str):
                raise SettingsError(name, f"expected a sequence of texts, got the text {getattr(self, name)!r}")
        if not self.mechanisms:
            raise SettingsError("mechanisms", "give at least one, such as 'knn(topk=0.5)'")
        if not self.sizes or any(isinstance(n, bool) or not isinstance(n, int) or n < 1 for n in self.sizes):
            raise SettingsError("sizes", f"expected whole numbers of pixels, got {self.sizes!r}")
        if isinstance(self.photos_count, bool) or not isinstance(self.photos_count, int) or self.photos_count < 1:
            raise SettingsError("photos_count", f"expected a whole number of at least 1, got {self.photos_count!r}")


def study_fidelity(
    settings: FidelitySettings, *, stored_only: bool = False, show_progress: bool = True
) -> FidelityStudy:
    """Run the study: dense features of every photograph and size once, then every mechanism on it.

    Every finished point is on disk at once; the same `out` again resumes. All mechanisms of one photograph come before
    the next photograph, so a study stopped early holds points that compare.

    Args:
        settings: what to measure.
        stored_only: measure nothing; the study is what `out` holds of it.
        show_progress: a bar and a line for each point, on standard error.

    Returns:
        All points, also those found on disk; also in `out`/fidelity.json.

    Raises:
        SettingsError: a setting cannot be obeyed: weights or photographs are missing or do not fit, a mechanism is
            unknown or adds parameters, or `out` holds points of other weights or photographs. Nothing was measured.
        FloatingPointError: features are NaN or infinite.
        StudyInterrupted: Ctrl-C; what is finished is on disk.
    """
    job = _Job(settings)
    study = FidelityStudy(job.shown_settings(), environment(settings.device), command=_command(settings))
    found = {} if settings.overwrite else dict(job.stored(whole=not stored_only))
    todo = [] if stored_only else [key for key in job.questions() if key not in found]
    with progress_bar("fidelity", show=show_progress) as bar:
        bar.start(len(found) + len(todo), done=len(found))
        try:
            for mechanism, size, photo in todo:
                bar.say(f"{photo.stem} at {size} px: {mechanism}")
                point = job.measure(mechanism, size, photo)
                found[mechanism, size, photo] = point
                bar.advance()
                line = f"{point.photo}, {size} px, {mechanism}: {point.fidelity.cosine:.4f} "
                line += f"raw, {point.fidelity.centred_cosine:.4f} centred, {point.seconds:.1f} s"
                bar.tell(line)
        except KeyboardInterrupt:
            study.interrupted = True
    study.points = [found[key] for key in job.questions() if key in found]
    study.dense_seconds = job.dense_seconds()
    write_text(settings.out / "fidelity.json", study.to_json() + "\n")
    if study.interrupted:
        raise StudyInterrupted(study)
    return study


_Key = tuple[Mechanism, int, Path]


@dataclass
class _Job:
    """Checked settings, models as they are needed, and what was computed last."""

    settings: FidelitySettings
    _models: dict[Mechanism, nn.Module] = field(default_factory=dict)
    _dense: tuple[tuple[int, Path], DenseFeatures] | None = None
    _calls: tuple[tuple[int, Path], list[AttentionCall]] | None = None

    def __post_init__(self) -> None:
        settings = self.settings
        self.mechanisms = [self._parse("mechanisms", text) for text in settings.mechanisms]
        if len(set(self.mechanisms)) < len(self.mechanisms):
            raise SettingsError("mechanisms", "one is given twice")
        self.by_layer = [self._parse("layers", text) for text in settings.layers or ()]
        if settings.layers is None:
            self.by_layer = [one for one in map(parse, DEFAULT_FIDELITY_LAYERS) if one in self.mechanisms]
        for one in self.by_layer:
            if one not in self.mechanisms:
                raise SettingsError("layers", f"{one} is not among the mechanisms; add it there")
        self.photos = choose_photographs(settings.photos, settings.photos_count)
        try:
            self.state = load_file(settings.weights, device=settings.device)
        except (OSError, ValueError, RuntimeError) as error:
            raise SettingsError("weights", f"{settings.weights} cannot be read: {error}") from error
        self.dense = self._build(None)
        for one in self.mechanisms:
            self._models[one] = self._build(one)
        patch = self._patch
        for size in settings.sizes:
            if size % patch:
                raise SettingsError(
                    "sizes", f"{size} is no multiple of the patch size {patch}; try {size - size % patch}"
                )
        self.store = FidelityStore(settings.out, {"model": settings.model, "weights": digest(settings.weights)})
        try:
            self.store.make_folders()
        except OSError as error:
            raise SettingsError("out", f"{settings.out} cannot be made: {error.strerror}") from error

    @staticmethod
    def _parse(setting: str, text: str) -> Mechanism:
        try:
            return parse(text)
        except (ValueError, TypeError) as error:
            raise SettingsError(setting, str(error).removeprefix("mechanism: ")) from error

    @property
    def _patch(self) -> int:
        patch = self.dense.patch_embed.patch_size  # type: ignore[union-attr]
        return int(patch[0])  # type: ignore[index]

    @cached_property
    def prefix(self) -> int:
        return int(self.dense.num_prefix_tokens)  # type: ignore[arg-type]

    def _build(self, mechanism: Mechanism | None) -> nn.Module:
        """The model with the mechanism in every layer; all models share the weights' memory."""
        options: dict[str, Any] = {}
        if mechanism is not None:
            options["attn_layer"] = mechanism.attn_layer(num_prefix_tokens=self.prefix)
        try:
            model = timm.create_model(self.settings.model, num_classes=0, dynamic_img_size=True, **options)
        except (RuntimeError, TypeError) as error:
            raise SettingsError("model", f"timm cannot build {self.settings.model!r}: {error}") from error
        try:
            model.load_state_dict(self.state, strict=True, assign=True)
        except RuntimeError as error:
            who = self.settings.model if mechanism is None else f"{self.settings.model} with {mechanism}"
            raise SettingsError("weights", f"they do not fit {who}: {' '.join(str(error).split())[:300]}") from error
        built: nn.Module = model.to(self.settings.device).eval()
        return built

    def questions(self) -> Iterator[_Key]:
        for size in self.settings.sizes:
            for photo in self.photos:
                for mechanism in self.mechanisms:
                    yield mechanism, size, photo

    def stored(self, *, whole: bool = True) -> Iterator[tuple[_Key, FidelityPoint]]:
        """The points on disk; if `whole`, those without the layers that are asked for do not count.

        Raises SettingsError if one is of other weights or another photograph.
        """
        for mechanism, size, photo in self.questions():
            point = self.store.load(mechanism, size, photo)
            if point is not None and (not whole or point.layers is not None or mechanism not in self.by_layer):
                yield (mechanism, size, photo), point

    def measure(self, mechanism: Mechanism, size: int, photo: Path) -> FidelityPoint:
        """One point, saved."""
        dense, image = self._dense_features(size, photo), self._image(size, photo)
        start = time.perf_counter()
        found = features_of(self._models[mechanism], image, num_prefix_tokens=self.prefix)
        seconds = time.perf_counter() - start
        (fidelity,) = picture_fidelity(dense.tokens, found.tokens.cpu(), num_prefix_tokens=self.prefix)
        grid = (size // self._patch, size // self._patch)
        calls, prefix = self._recorded(size, photo), self.prefix
        layers = None
        if mechanism in self.by_layer:
            layers = [head_fidelity(mechanism, one, num_prefix_tokens=prefix, grid_size=grid)[0] for one in calls]
        share = near_share(mechanism, calls, num_prefix_tokens=prefix, grid_size=grid)
        point = FidelityPoint(str(mechanism), size, photo.stem, fidelity, share, seconds, layers)
        self.store.save(point, mechanism, photo)
        return point

    def _image(self, size: int, photo: Path) -> Tensor:
        return read_picture(self.dense, photo, size, setting="photos").to(self.settings.device)

    def _dense_features(self, size: int, photo: Path) -> DenseFeatures:
        if self._dense is None or self._dense[0] != (size, photo):
            dense = None if self.settings.overwrite else self.store.load_dense(size, photo)
            if dense is None:
                image = self._image(size, photo)
                start = time.perf_counter()
                tokens = features_of(self.dense, image, num_prefix_tokens=self.prefix).tokens.cpu()
                dense = DenseFeatures(tokens, time.perf_counter() - start)
                self.store.save_dense(dense, size, photo)
            self._dense = ((size, photo), dense)
        return self._dense[1]

    def _recorded(self, size: int, photo: Path) -> list[AttentionCall]:
        """What every layer of the dense model sees."""
        if self._calls is None or self._calls[0] != (size, photo):
            self._calls = None  # frees the last photograph's before the next are recorded
            self._calls = ((size, photo), record_attention(self.dense, self._image(size, photo)))
        return self._calls[1]

    def dense_seconds(self) -> dict[str, dict[str, float]]:
        seconds: dict[str, dict[str, float]] = {}
        for size in self.settings.sizes:
            for photo in self.photos:
                dense = self.store.load_dense(size, photo)
                if dense is not None:
                    seconds.setdefault(str(size), {})[photo.stem] = dense.seconds
        return seconds

    def shown_settings(self) -> dict[str, object]:
        """What a reader must know; paths by their last name."""
        settings = self.settings
        return {
            **dataclasses.asdict(settings),
            "weights": settings.weights.name,
            "photos": [photo.stem for photo in self.photos],
            "mechanisms": [str(one) for one in self.mechanisms],
            "layers": [str(one) for one in self.by_layer],
            "out": settings.out.name,
            "weights_sha256": self.store.fingerprint["weights"],
            "patch_size": self._patch,
            "num_prefix_tokens": self.prefix,
        }


def _command(settings: FidelitySettings) -> str:
    """The command that repeats the study; folders by their last names."""
    words = ["python", "benchmarks/fidelity.py"]
    words += ["--weights", shlex.quote(settings.weights.name), "--photos", shlex.quote(settings.photos.name)]
    defaults = FidelitySettings(settings.weights, settings.photos)
    names = {"mechanisms": "--mechanism", "layers": "--layer", "photos_count": "--photos-count", "sizes": "--sizes"}
    for one in dataclasses.fields(settings):
        value = getattr(settings, one.name)
        if one.name in ("weights", "photos", "out", "overwrite") or value == getattr(defaults, one.name):
            continue
        name = names.get(one.name, f"--{one.name}")
        if one.name == "sizes":
            words += [name, *map(str, value)]
        else:
            for part in map(str, value) if isinstance(value, tuple) else [str(value)]:
                words += [name, f'"{part}"' if "'" in part else shlex.quote(part)]
    return " ".join(words)
