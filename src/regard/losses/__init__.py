"""Losses on attention and recipes of distillation, beside a task's own loss."""

from regard.losses.sparsifiner import Outputs, SparsifinerLoss

__all__ = ["Outputs", "SparsifinerLoss"]
