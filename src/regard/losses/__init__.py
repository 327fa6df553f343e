"""Losses on attention, and how a training step collects those that a model's own modules report."""

from regard.auxiliary import Losses, collect_losses
from regard.losses.adl import ADL
from regard.losses.diversification import attention_diversification, attention_diversification_of
from regard.losses.sparsifiner import Outputs, SparsifinerLoss

__all__ = [
    "ADL",
    "Losses",
    "Outputs",
    "SparsifinerLoss",
    "attention_diversification",
    "attention_diversification_of",
    "collect_losses",
]
