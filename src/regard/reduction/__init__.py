"""Token reduction: layers that hand on fewer tokens than they were given."""

from regard.reduction.evit import EViT
from regard.reduction.features import KeptTokens, token_map, watch_tokens
from regard.reduction.reorganize import Reorganization, reorganize, reorganized, restore_tokens
from regard.reduction.schedule import KeepRateSchedule

__all__ = [
    "EViT",
    "KeepRateSchedule",
    "KeptTokens",
    "Reorganization",
    "reorganize",
    "reorganized",
    "restore_tokens",
    "token_map",
    "watch_tokens",
]
