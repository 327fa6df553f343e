"""Losses on attention, and how a training step collects those that a model's own modules report."""

from regard.auxiliary import Losses, collect_losses

__all__ = ["Losses", "collect_losses"]
