"""Results: plain dataclasses that measure rooms fill and the report reads. They know nothing of torch and turn into JSON.

Seconds are wall-clock seconds, memory is bytes, accuracy is a fraction, FLOPs count a multiply-add as two.
"""

import dataclasses
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

__all__ = ["AttentionMap", "Comparison", "CostPoint", "EpochRecord", "Environment", "TrainingRun", "write_text"]


@dataclass
class EpochRecord:
    """One epoch of one run. `seconds` is training time since the run's start, evaluation left out."""

    epoch: int
    seconds: float
    train_loss: float
    test_accuracy: float


@dataclass
class TrainingRun:
    """One model trained with one mechanism from one seed."""

    mechanism: str
    seed: int
    model: str
    data: str
    recipe: dict[str, Any]
    parameters: int
    forward_flops: int  # of one image
    epochs: list[EpochRecord] = field(default_factory=list)
    train_images_per_second: float = 0.0
    test_images_per_second: float = 0.0
    test_correct: list[bool] = field(default_factory=list)  # one a test image, for paired comparison
    finished: bool = False

    @property
    def accuracy(self) -> float:
        """Test accuracy after the last epoch (not the best one, which would be chosen on the test set)."""
        return self.epochs[-1].test_accuracy if self.epochs else float("nan")


@dataclass
class CostPoint:
    """One operator measured at one size. Times are medians of interleaved repeats with their quartiles."""

    mechanism: str
    tokens: int
    batch: int
    heads: int
    head_dim: int
    dtype: str
    direction: str  # "forward" or "forward+backward"
    backend: str
    seconds: float
    seconds_low: float  # first quartile
    seconds_high: float  # third quartile
    repeats: int
    flops: int
    peak_memory: int | None = None  # growth of the peak resident size beyond inputs, outputs and gradients, in a fresh process


@dataclass
class AttentionMap:
    """Who one query looks at: weights over the grid of tokens, one map a mechanism, mean over heads."""

    mechanism: str
    seed: int
    image_index: int
    label: str
    prediction: str
    layer: int
    query: tuple[int, int]  # row and column of the query token on the grid
    weights: list[list[float]]  # grid rows x columns
    pixels: list[list[list[int]]]  # the image, rows x columns x channels, 0-255


@dataclass
class Environment:
    """Where the figures were measured."""

    machine: str
    cores: int
    threads: int
    instruction_set: str
    device: str
    python: str
    torch: str
    timm: str
    regard: str
    commit: str
    date: str


@dataclass
class Comparison:
    """All that one `regard compare` found."""

    settings: dict[str, Any]
    environment: Environment
    runs: list[TrainingRun] = field(default_factory=list)
    costs: list[CostPoint] = field(default_factory=list)
    maps: list[AttentionMap] = field(default_factory=list)
    interrupted: bool = False

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self), indent=1)


def write_text(path: Path, text: str) -> None:
    """Write a file whole or not at all: to a temporary name beside it, then rename."""
    temporary = path.with_name(path.name + ".part")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)
