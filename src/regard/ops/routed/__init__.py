"""Routed attention: each block of queries attends to its own list of key blocks (BiFormer, windows, halos)."""

from regard.ops.routed.api import routed_attention
from regard.ops.routed.order import BlockOrder
from regard.ops.routed.reference import routed_attention_reference

__all__ = ["BlockOrder", "routed_attention", "routed_attention_reference"]
