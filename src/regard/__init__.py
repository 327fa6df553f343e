"""regard: attention in vision. Every token looks at the few others that matter.

The names below are imported at first use, so that `import regard` costs little more than `import torch`.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

# public name -> module that defines it
_EXPORTS = {
    "density_peak_clusters": "regard.ops",
    "kmeans_clusters": "regard.ops",
    "merge_tokens": "regard.ops",
    "knn_attention": "regard.ops",
    "multipole_attention": "regard.ops",
    "routed_attention": "regard.ops",
    "BlockOrder": "regard.ops",
    "neighborhood_attention": "regard.ops",
    "explain": "regard.ops",
    "Explanation": "regard.ops",
    "SlowPathWarning": "regard.ops",
    "attention_diversification": "regard.losses",
    "attention_diversification_of": "regard.losses",
    "ADL": "regard.losses",
    "TAP": "regard.mixers",
    "TokenAwarePooling": "regard.mixers",
    "Card": "regard.cards",
    "Mechanism": "regard.specs",
    "parse_mechanism": "regard.mixers",
    "mechanisms": "regard.mixers",
    "BiLevel": "regard.mixers",
    "BiLevelRoutingAttention": "regard.mixers",
    "modifiers": "regard.mixers",
    "Modifier": "regard.specs",
    "Gated": "regard.mixers",
    "collect_losses": "regard.losses",
    "Clustered": "regard.mixers",
    "Dense": "regard.mixers",
    "KNN": "regard.mixers",
    "ClusteredAttention": "regard.mixers",
    "DenseAttention": "regard.mixers",
    "KNNAttention": "regard.mixers",
    "MixtureOfHeadsAttention": "regard.mixers",
    "MoH": "regard.mixers",
    "Multipole": "regard.mixers",
    "MultipoleAttention": "regard.mixers",
    "Neighborhood": "regard.mixers",
    "NeighborhoodAttention": "regard.mixers",
    "EViT": "regard.reduction",
    "KeepRateSchedule": "regard.reduction",
    "reorganize": "regard.reduction",
    "restore_tokens": "regard.reduction",
    "token_map": "regard.reduction",
    "Sparsifiner": "regard.mixers",
    "SparsifinerAttention": "regard.mixers",
    "Proxy": "regard.mixers",
    "ProxyAttention": "regard.mixers",
    "create_model": "regard.backbones",
    "convert": "regard.conversion",
    "converted": "regard.conversion",
    "restore": "regard.conversion",
    "tune": "regard.conversion",
    "ConversionRecord": "regard.results",
    "Tuning": "regard.results",
    "compare": "regard.studies",
    "CompareSettings": "regard.studies",
}

__all__ = ["__version__", *_EXPORTS]

if TYPE_CHECKING:
    from regard.backbones import create_model as create_model
    from regard.cards import Card as Card
    from regard.conversion import convert as convert
    from regard.conversion import converted as converted
    from regard.conversion import restore as restore
    from regard.conversion import tune as tune
    from regard.losses import ADL as ADL
    from regard.losses import attention_diversification as attention_diversification
    from regard.losses import attention_diversification_of as attention_diversification_of
    from regard.losses import collect_losses as collect_losses
    from regard.mixers import KNN as KNN
    from regard.mixers import TAP as TAP
    from regard.mixers import BiLevel as BiLevel
    from regard.mixers import BiLevelRoutingAttention as BiLevelRoutingAttention
    from regard.mixers import Clustered as Clustered
    from regard.mixers import ClusteredAttention as ClusteredAttention
    from regard.mixers import Dense as Dense
    from regard.mixers import DenseAttention as DenseAttention
    from regard.mixers import Gated as Gated
    from regard.mixers import KNNAttention as KNNAttention
    from regard.mixers import MixtureOfHeadsAttention as MixtureOfHeadsAttention
    from regard.mixers import MoH as MoH
    from regard.mixers import Multipole as Multipole
    from regard.mixers import MultipoleAttention as MultipoleAttention
    from regard.mixers import Neighborhood as Neighborhood
    from regard.mixers import NeighborhoodAttention as NeighborhoodAttention
    from regard.mixers import Proxy as Proxy
    from regard.mixers import ProxyAttention as ProxyAttention
    from regard.mixers import Sparsifiner as Sparsifiner
    from regard.mixers import SparsifinerAttention as SparsifinerAttention
    from regard.mixers import TokenAwarePooling as TokenAwarePooling
    from regard.mixers import mechanisms as mechanisms
    from regard.mixers import modifiers as modifiers
    from regard.mixers import parse_mechanism as parse_mechanism
    from regard.ops import BlockOrder as BlockOrder
    from regard.ops import Explanation as Explanation
    from regard.ops import SlowPathWarning as SlowPathWarning
    from regard.ops import density_peak_clusters as density_peak_clusters
    from regard.ops import explain as explain
    from regard.ops import kmeans_clusters as kmeans_clusters
    from regard.ops import knn_attention as knn_attention
    from regard.ops import merge_tokens as merge_tokens
    from regard.ops import multipole_attention as multipole_attention
    from regard.ops import neighborhood_attention as neighborhood_attention
    from regard.ops import routed_attention as routed_attention
    from regard.reduction import EViT as EViT
    from regard.reduction import KeepRateSchedule as KeepRateSchedule
    from regard.reduction import reorganize as reorganize
    from regard.reduction import restore_tokens as restore_tokens
    from regard.reduction import token_map as token_map
    from regard.results import ConversionRecord as ConversionRecord
    from regard.results import Tuning as Tuning
    from regard.specs import Mechanism as Mechanism
    from regard.specs import Modifier as Modifier
    from regard.studies import CompareSettings as CompareSettings
    from regard.studies import compare as compare


def __getattr__(name: str) -> Any:
    module = _EXPORTS.get(name)
    if module is None:
        raise AttributeError(f"module 'regard' has no attribute {name!r}")
    value = getattr(import_module(module), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
