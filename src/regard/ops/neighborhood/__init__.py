"""Neighborhood attention: every query sees a box of keys around its own place in the grid."""

from regard.ops.neighborhood.api import neighborhood_attention
from regard.ops.neighborhood.reference import neighborhood_attention_reference

__all__ = ["neighborhood_attention", "neighborhood_attention_reference"]
