"""Token mixers, one file per published mechanism: its card, its value and its module."""

from regard.mixers._attention import AttentionMixer
from regard.mixers.bilevel import BiLevel, BiLevelRoutingAttention
from regard.mixers.clustered import Clustered, ClusteredAttention
from regard.mixers.dense import Dense, DenseAttention
from regard.mixers.gated import Gated
from regard.mixers.knn import KNN, KNNAttention
from regard.mixers.moh import MixtureOfHeadsAttention, MoH
from regard.mixers.multipole import Multipole, MultipoleAttention
from regard.mixers.neighborhood import Neighborhood, NeighborhoodAttention
from regard.mixers.proxy import Proxy, ProxyAttention
from regard.mixers.sparsifiner import Sparsifiner, SparsifinerAttention
from regard.mixers.tap import TAP, TokenAwarePooling
from regard.specs import Mechanism, Modifier, parse, registered, registered_modifiers

__all__ = [
    "KNN",
    "TAP",
    "AttentionMixer",
    "BiLevel",
    "BiLevelRoutingAttention",
    "Clustered",
    "ClusteredAttention",
    "Dense",
    "DenseAttention",
    "Gated",
    "KNNAttention",
    "MixtureOfHeadsAttention",
    "MoH",
    "Multipole",
    "MultipoleAttention",
    "Neighborhood",
    "NeighborhoodAttention",
    "Sparsifiner",
    "SparsifinerAttention",
    "TokenAwarePooling",
    "Proxy",
    "ProxyAttention",
    "mechanisms",
    "modifiers",
    "parse_mechanism",
]


def parse_mechanism(text: str | Mechanism | Modifier) -> Mechanism:
    """Read a text form, `knn(topk=0.5) + gated`; a Mechanism is returned as it is. See regard.specs.parse."""
    return parse(text)


def mechanisms() -> dict[str, type[Mechanism]]:
    """All mechanisms by name."""
    return registered()


def modifiers() -> dict[str, type[Modifier]]:
    """All modifiers by name: what changes a model around its mechanism, `knn + gated` in text."""
    return registered_modifiers()
