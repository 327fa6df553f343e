"""The keep rate in training: all tokens first, then fewer and fewer."""

import math
from dataclasses import dataclass

from torch import nn

from regard.ops._counts import check_count
from regard.reduction.layer import reduced_blocks

__all__ = ["KeepRateSchedule"]


@dataclass(frozen=True)
class KeepRateSchedule:
    """EViT's schedule: all tokens up to an epoch, then along a cosine down to each layer's own rate (arXiv 2202.07800).

        schedule = KeepRateSchedule(steps_per_epoch=len(loader))
        for step, (images, labels) in enumerate(batches):
            schedule.update(model, step)
            ...

    The rate changes with every step, in training mode alone; in evaluation mode each layer has its own rate all along.

    Args:
        steps_per_epoch: optimizer steps an epoch.
        start_epoch: how many epochs keep all tokens; 10 as published from scratch, 0 in fine-tuning.
        epochs: over how many epochs the rate falls; 100 as published from scratch. 0: it jumps.

    Raises:
        TypeError, ValueError: an argument is no int or out of range.
    """

    steps_per_epoch: int
    start_epoch: int = 10
    epochs: int = 100

    def __post_init__(self) -> None:
        check_count("steps_per_epoch", self.steps_per_epoch)
        check_count("start_epoch", self.start_epoch, 0)
        check_count("epochs", self.epochs, 0)

    def rate(self, step: int, keep_rate: float) -> float:
        """The rate at a step (from 0) for a layer whose own rate is `keep_rate`."""
        since = step - self.start_epoch * self.steps_per_epoch
        falling = self.epochs * self.steps_per_epoch
        if since < 0:
            return 1.0
        if since >= falling:
            return keep_rate
        return keep_rate + (1.0 - keep_rate) * (1.0 + math.cos(math.pi * since / falling)) / 2.0

    def update(self, model: nn.Module, step: int) -> None:
        """Set the rates that the model's reorganized layers have in training mode.

        Raises:
            ValueError: the model has no reorganized layers.
        """
        layers = reduced_blocks(model)
        if not layers:
            raise ValueError(f"model: {type(model).__name__} has no reorganized layers; call reorganize(model) first")
        for layer in layers:
            layer.training_rate = self.rate(step, layer.keep_rate)
