"""Multipole attention: the clusters that matter to a query key by key, all others as one weighted key each."""

from regard.ops.multipole.api import multipole_attention
from regard.ops.multipole.reference import multipole_attention_reference

__all__ = ["multipole_attention", "multipole_attention_reference"]
