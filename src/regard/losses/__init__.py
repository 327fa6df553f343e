"""Losses on attention, and how a training step collects those that a model's own modules report."""

from regard.auxiliary import Losses, collect_losses
from regard.losses.sparsifiner import Outputs, SparsifinerLoss

__all__ = ["Losses", "Outputs", "SparsifinerLoss", "collect_losses"]
