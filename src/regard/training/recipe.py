"""The recipe under which all mechanisms are compared."""

from dataclasses import dataclass

__all__ = ["Recipe"]


@dataclass(frozen=True)
class Recipe:
    """How a model is trained. The defaults suit a few epochs on a few thousand images: augmentation only slows those.

    Args:
        epochs: passes over the training images. batch_size: images a step.
        optimizer: a name of timm's create_optimizer_v2. learning_rate: its peak. weight_decay: not on biases and norms.
        warmup: share of the steps in which the rate rises to its peak; a cosine takes it down to almost 0 after that.
        label_smoothing: as in torch's cross_entropy.
        flip: mirror every other image. shift: largest shift of a batch in either direction, as a share of its side.
    """

    epochs: int = 3
    batch_size: int = 50
    optimizer: str = "adamw"
    learning_rate: float = 2e-3
    weight_decay: float = 0.05
    warmup: float = 0.15
    label_smoothing: float = 0.1
    flip: bool = False
    shift: float = 0.0

    def __post_init__(self) -> None:
        for name in ("epochs", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: expected 1 or more, got {getattr(self, name)}")
        for name in ("warmup", "label_smoothing", "shift"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name}: expected a share from 0 to below 1, got {getattr(self, name)}")
        if not self.learning_rate > 0:
            raise ValueError(f"learning_rate: expected a number above 0, got {self.learning_rate}")
