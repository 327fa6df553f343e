"""What a study is asked to do: dataclasses shared by Python and the command line. Knows no torch."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

__all__ = [
    "ALL_MECHANISMS",
    "DEFAULT_MECHANISMS",
    "BenchSettings",
    "CompareSettings",
    "ConvertSettings",
    "ExportSettings",
    "SettingsError",
]

ALL_MECHANISMS = "all"
DEFAULT_MECHANISMS = ("dense", "knn(topk=0.125)", "clustered", "multipole")


class SettingsError(ValueError):
    """A setting that cannot be obeyed.

    Args:
        setting: its name, as in CompareSettings.
        problem: what was received, and what is allowed.
    """

    def __init__(self, setting: str, problem: str) -> None:
        super().__init__(f"{setting}: {problem}")
        self.setting = setting
        self.problem = problem


@dataclass(frozen=True)
class CompareSettings:
    """Train one model with each mechanism, measure the operators, and write table, page and JSON.

    Args:
        mechanisms: Mechanisms in text form, such as 'knn(topk=0.5)' or 'knn + gated'; 'all' stands for every one.
        data: 'embedded' (8,000 Fashion-MNIST images), an image folder, or a timm data-set string ('torch/cifar10').
        model: The model that every mechanism is put into.
        epochs: Epochs of each run; the recipe's own number if not given.
        seeds: Runs of each mechanism, from seeds 0, 1, 2 ...
        device: Device to train and measure on, such as 'cpu' or 'cuda'.
        out: Folder of runs, page and JSON. The same folder again resumes.
        overwrite: Redo what the folder already holds.
        cost_seconds: Time for measuring the operators, at most; 0 leaves it out.
        layer: Layer whose attention the maps show; negative counts from the last.

    Raises:
        SettingsError: a value is out of range; it names the setting and what is allowed.
    """

    mechanisms: tuple[str, ...] = DEFAULT_MECHANISMS
    data: str = "embedded"
    model: str = "vit"
    epochs: int | None = None
    seeds: int = 3
    device: str = "cpu"
    out: Path = Path("regard-compare")
    overwrite: bool = False
    cost_seconds: float = 60.0
    layer: int = -1

    def __post_init__(self) -> None:
        if isinstance(self.mechanisms, str):
            raise SettingsError("mechanisms", f"expected a sequence of texts, got the text {self.mechanisms!r}")
        if not self.mechanisms:
            raise SettingsError("mechanisms", "give at least one, such as 'knn(topk=0.5)'")
        for name in ("epochs", "seeds"):
            value = getattr(self, name)
            if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < 1):
                raise SettingsError(name, f"expected a whole number of at least 1, got {value!r}")
        if not 0.0 <= self.cost_seconds < float("inf"):
            raise SettingsError(
                "cost_seconds", f"expected seconds of at least 0 (0 leaves it out), got {self.cost_seconds!r}"
            )


@dataclass(frozen=True)
class ConvertSettings:
    """Convert a pretrained model, and measure speed, memory and fidelity against dense attention on photographs.

    Args:
        model: A model of timm or regard, such as 'vit_small_patch14_dinov2'.
        images: Folder of photographs; without it those that installed packages carry.
        checkpoint: File of the model's weights (safetensors or PyTorch); without it timm fetches them.
        random_weights: Take random weights: speed and memory then tell something, fidelity does not.
        mechanism: A mechanism in text form, such as 'knn(topk=0.25)'; give the option once for each.
        size: Side of the square images in pixels; the model's own if not given.
        pictures: How many photographs of the folder, spread evenly over its sorted names, at most.
        per_layer: Also judge each layer's attention alone.
        tune: Find the cheapest mechanism for each layer such that the mean cosine of the features stays at least this,
            such as 0.995. The candidates are the mechanisms given, or several multipole attentions.
        save: Write the pattern dict, for regard.convert, to this JSON file.
        device: Device to run on, such as 'cpu' or 'cuda'.
        seconds: Time for measuring the speed, up to twice as much where five repeats need it.
        out: Folder of page and JSON. Tuning in the same folder again resumes.

    Raises:
        SettingsError: a value is out of range; it names the setting and what is allowed.
    """

    model: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="MODEL")]
    images: Path | None = None
    checkpoint: Path | None = None
    random_weights: bool = False
    mechanism: Annotated[tuple[str, ...], tyro.conf.UseAppendAction] = ()
    size: int | None = None
    pictures: int = 10
    per_layer: bool = False
    tune: float | None = None
    save: Path | None = None
    device: str = "cpu"
    seconds: float = 30.0
    out: Path = Path("regard-convert")

    def __post_init__(self) -> None:
        if isinstance(self.mechanism, str):
            raise SettingsError("mechanism", f"expected a sequence of texts, got the text {self.mechanism!r}")
        for name in ("size", "pictures"):
            value = getattr(self, name)
            if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < 1):
                raise SettingsError(name, f"expected a whole number of at least 1, got {value!r}")
        if self.tune is not None and not 0.0 < self.tune <= 1.0:
            raise SettingsError("tune", f"expected a cosine in (0, 1], such as 0.995, got {self.tune!r}")
        if not 0.0 < self.seconds < float("inf"):
            raise SettingsError("seconds", f"expected seconds above 0, got {self.seconds!r}")
        if self.checkpoint is not None and self.random_weights:
            raise SettingsError("random_weights", "a checkpoint is given, too; take one of the two")
        if self.save is not None and self.tune is None and len(self.mechanism) > 1:
            raise SettingsError("save", f"which of {len(self.mechanism)} mechanisms? Give one, or --tune")


_DTYPES = ("float32", "bfloat16", "float16")
_DIRECTIONS = ("forward", "forward+backward")


@dataclass(frozen=True)
class BenchSettings:
    """Measure operators over a grid of sizes, beside every peer that is installed; the correctness gate comes first.

    Args:
        operators: What to measure; all operators if none is given.
        dtype: float32, bfloat16 or float16; give the option once for each. float32 if not given.
        direction: forward or forward+backward; both if not given.
        quick: A few sizes, and a quarter of the time for each.
        seconds: Time of each point's interleaved rounds.
        patience: Leave out a peer whose one run would take longer than so many seconds.
        no_memory: Do not measure peak memory.
        weights: A trained ViT-S/14 (safetensors), whose queries, keys and values multipole attention then gets.
        photo: The photograph that the weights are shown; one that an installed package carries if not given.
        against: Compare with this commit, too: its checkout is built in a worktree that is removed afterwards.
        threads: Of torch; its own choice if not given.
        device: Device to run on, such as 'cpu' or 'cuda'.
        dry_run: Tell what would run, and about how long; measure nothing.
        out: Folder of table, figure and JSON. After Ctrl-C the same command resumes.

    Raises:
        SettingsError: a value is out of range; it names the setting and what is allowed.
    """

    operators: Annotated[tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="[OPERATOR ...]")] = ()
    dtype: Annotated[tuple[str, ...], tyro.conf.UseAppendAction] = ()
    direction: Annotated[tuple[str, ...], tyro.conf.UseAppendAction] = ()
    quick: bool = False
    seconds: float = 2.0
    patience: float = 5.0
    no_memory: bool = False
    weights: Path | None = None
    photo: Path | None = None
    against: str | None = None
    threads: int | None = None
    device: str = "cpu"
    dry_run: bool = False
    out: Path = Path("regard-bench")

    def __post_init__(self) -> None:
        for name, known in (("dtype", _DTYPES), ("direction", _DIRECTIONS)):
            given = getattr(self, name)
            if isinstance(given, str):
                raise SettingsError(name, f"expected a sequence of texts, got the text {given!r}")
            if unknown := [one for one in given if one not in known]:
                raise SettingsError(name, f"expected some of {', '.join(known)}, got {unknown[0]!r}")
            if len(set(given)) < len(given):
                raise SettingsError(name, f"given twice: {', '.join(given)}")
        for name in ("seconds", "patience"):
            if not 0.0 < getattr(self, name) < float("inf"):
                raise SettingsError(name, f"expected seconds above 0, got {getattr(self, name)!r}")
        if self.threads is not None and self.threads < 1:
            raise SettingsError("threads", f"expected a whole number of at least 1, got {self.threads!r}")
        if self.photo is not None and self.weights is None:
            raise SettingsError("photo", "shown to no model; give its --weights, too")
        if self.against is not None and not self.device.startswith("cpu"):
            raise SettingsError("against", f"compares on the processor alone, not on {self.device!r}")

    @property
    def dtypes(self) -> tuple[str, ...]:
        """Those to measure."""
        return self.dtype or ("float32",)

    @property
    def directions(self) -> tuple[str, ...]:
        """Those to measure."""
        return self.direction or _DIRECTIONS

    @property
    def point_seconds(self) -> float:
        """Time of one point's rounds."""
        return self.seconds / 4 if self.quick else self.seconds


_FORMATS = ("onnx", "pt2")
_OPEN = ("batch", "size")


@dataclass(frozen=True)
class ExportSettings:
    """Export a model, converted or as it is, and run the file beside it on a photograph.

    Args:
        model: A model of timm or regard, such as 'deit_small_patch16_224' or 'clustr_b1'.
        mechanism: Convert to this first, in text form, such as 'knn(topk=0.25)'; the model as it is if not given.
        pattern: Convert by this JSON file, which `regard convert --save` wrote.
        checkpoint: File of the model's weights (safetensors or PyTorch); without it timm fetches them.
        random_weights: Take random weights.
        size: Side of the square images in pixels; the model's own if not given.
        format: onnx runs in onnxruntime without regard; pt2 is compiled for this machine by AOTInductor.
        dynamic: What stays open, with commas between: batch, size. The rest is as at export.
        standalone: Of pt2: compile attention in, too, so that torch alone runs it. Slower, and with more memory.
        seconds: Time for measuring the speed.
        out: The file; MODEL.onnx or MODEL.pt2 if not given.

    Raises:
        SettingsError: a value is out of range; it names the setting and what is allowed.
    """

    model: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="MODEL")]
    mechanism: str | None = None
    pattern: Path | None = None
    checkpoint: Path | None = None
    random_weights: bool = False
    size: int | None = None
    format: str = "onnx"
    dynamic: str = "batch"
    standalone: bool = False
    seconds: float = 10.0
    out: Path | None = None

    def __post_init__(self) -> None:
        if self.size is not None and (not isinstance(self.size, int) or isinstance(self.size, bool) or self.size < 1):
            raise SettingsError("size", f"expected a whole number of at least 1, got {self.size!r}")
        if self.format not in _FORMATS:
            raise SettingsError("format", f"expected one of {', '.join(_FORMATS)}, got {self.format!r}")
        if unknown := [one for one in self.open if one not in _OPEN]:
            raise SettingsError(
                "dynamic", f"expected some of {', '.join(_OPEN)} with commas between, got {unknown[0]!r}"
            )
        if not 0.0 < self.seconds < float("inf"):
            raise SettingsError("seconds", f"expected seconds above 0, got {self.seconds!r}")
        if self.checkpoint is not None and self.random_weights:
            raise SettingsError("random_weights", "a checkpoint is given, too; take one of the two")
        if self.mechanism is not None and self.pattern is not None:
            raise SettingsError("pattern", "a mechanism is given, too; take one of the two")
        if self.standalone and self.format != "pt2":
            raise SettingsError("standalone", "ONNX files always are; give it with --format pt2 only")
        if self.out is not None and self.out.suffix != f".{self.format}":
            raise SettingsError("out", f"expected a name that ends in .{self.format}, got {self.out.name!r}")

    @property
    def open(self) -> tuple[str, ...]:
        """What stays open."""
        return tuple(one.strip() for one in self.dynamic.split(",") if one.strip())

    @property
    def file(self) -> Path:
        """Where the export goes."""
        return Path(f"{self.model.replace('/', '_')}.{self.format}") if self.out is None else self.out
