"""What a comparison is asked to do: one dataclass, shared by Python and the command line. Knows no torch."""

from dataclasses import dataclass
from pathlib import Path

__all__ = ["DEFAULT_MECHANISMS", "CompareSettings", "SettingsError"]

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
        mechanisms: A mechanism in text form, such as 'knn(topk=0.5)'; give it once for each.
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
