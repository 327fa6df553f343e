"""Losses on attention, beside the task's own."""

from regard.losses.adl import ADL
from regard.losses.diversification import attention_diversification, attention_diversification_of

__all__ = ["ADL", "attention_diversification", "attention_diversification_of"]
