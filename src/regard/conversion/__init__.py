"""Conversion: a mechanism put into an existing model, what the features keep of it (fidelity), and tuning."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

# public name -> module that defines it; imported at first use
_EXPORTS = {
    "AttentionCall": "regard.conversion.layers",
    "Features": "regard.conversion.fidelity",
    "FidelityMeter": "regard.conversion.fidelity",
    "compare_models": "regard.conversion.fidelity",
    "convert": "regard.conversion.api",
    "converted": "regard.conversion.api",
    "features_of": "regard.conversion.fidelity",
    "head_fidelity": "regard.conversion.layers",
    "measure_fidelity": "regard.conversion.fidelity",
    "patch_cosines": "regard.conversion.fidelity",
    "picture_fidelity": "regard.conversion.fidelity",
    "record_attention": "regard.conversion.layers",
    "restore": "regard.conversion.api",
    "tune": "regard.conversion.tuning",
}

__all__ = list(_EXPORTS)

if TYPE_CHECKING:
    from regard.conversion.api import convert as convert
    from regard.conversion.api import converted as converted
    from regard.conversion.api import restore as restore
    from regard.conversion.fidelity import Features as Features
    from regard.conversion.fidelity import FidelityMeter as FidelityMeter
    from regard.conversion.fidelity import compare_models as compare_models
    from regard.conversion.fidelity import features_of as features_of
    from regard.conversion.fidelity import measure_fidelity as measure_fidelity
    from regard.conversion.fidelity import patch_cosines as patch_cosines
    from regard.conversion.fidelity import picture_fidelity as picture_fidelity
    from regard.conversion.layers import AttentionCall as AttentionCall
    from regard.conversion.layers import head_fidelity as head_fidelity
    from regard.conversion.layers import record_attention as record_attention
    from regard.conversion.tuning import tune as tune


def __getattr__(name: str) -> Any:
    if name not in _EXPORTS:
        raise AttributeError(f"module 'regard.conversion' has no attribute {name!r}")
    value = getattr(import_module(_EXPORTS[name]), name)
    globals()[name] = value
    return value
