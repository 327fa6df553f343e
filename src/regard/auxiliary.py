"""Losses of a model's own modules (balance, reconstruction, diversification), and how a training step collects them."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor, nn

__all__ = ["Losses", "Reporter", "collect_losses"]


class Losses:
    """What the modules of a model reported during one forward.

    Attributes:
        by_name: the reports of each loss, one a layer, in the order of the forward: scalars with their graph.
        weights: the weight of each loss.
    """

    def __init__(self) -> None:
        self.by_name: dict[str, list[Tensor]] = {}
        self.weights: dict[str, float] = {}
        self._closed = False

    def add(self, name: str, value: "Tensor", weight: float) -> None:
        """Take a report, unless `total` was asked for: activation checkpointing runs layers again in backward."""
        if not self._closed:
            self.by_name.setdefault(name, []).append(value)
            self.weights[name] = weight

    def total(self) -> "Tensor | float":
        """The sum over names of weight times the mean of the reports, 0.0 if there are none. Takes no reports after."""
        self._closed = True
        terms = [self.weights[name] * sum(values) / len(values) for name, values in self.by_name.items()]
        return sum(terms) if terms else 0.0


class Reporter:
    """A module with a loss of its own: derives from this beside nn.Module and calls `report` in forward."""

    _losses: Losses | None = None

    @property
    def reporting(self) -> bool:
        """True while somebody collects: what only a loss needs is computed then alone."""
        return self._losses is not None

    def report(self, name: str, value: "Tensor", weight: float = 1.0) -> None:
        """Hand a loss to who collects; nothing happens if nobody does.

        Args:
            name: of the loss; every layer's reports of one name are averaged.
            value: scalar, with its graph.
            weight: of the mean in the total.
        """
        if self._losses is not None:
            self._losses.add(name, value, weight)


@contextmanager
def collect_losses(model: "nn.Module") -> Iterator[Losses]:
    """Within this context the modules of `model` report their losses; a model without any costs nothing.

        with collect_losses(model) as losses:
            loss = criterion(model(images), labels) + losses.total()
            loss.backward()

    `backward` may stand outside, unless the model checkpoints activations: its layers run again then, and must find
    themselves reporting as they did in forward.
    """
    losses = Losses()
    found = [module for module in model.modules() if isinstance(module, Reporter)]
    before = [module._losses for module in found]
    try:
        for module in found:
            module._losses = losses
        yield losses
    finally:
        for module, one in zip(found, before, strict=True):
            module._losses = one
