"""Train and evaluate every mechanism under one recipe."""

from regard.training.loop import train
from regard.training.models import build_model
from regard.training.recipe import Recipe
from regard.training.weights import load_weights, save_weights

__all__ = ["Recipe", "build_model", "load_weights", "save_weights", "train"]
