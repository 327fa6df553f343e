"""Studies: questions put to several rooms at once. Which mechanism, at what accuracy and cost? What does a trained
model's attention lose when another takes its place?"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

# At first use, so that the command line reads settings without importing torch.
_EXPORTS = {
    "BenchSettings": "regard.studies.settings",
    "CompareSettings": "regard.studies.settings",
    "ConvertSettings": "regard.studies.settings",
    "ExportSettings": "regard.studies.settings",
    "FidelitySettings": "regard.studies.fidelity",
    "Interrupted": "regard.studies.comparison",
    "SettingsError": "regard.studies.settings",
    "StudyInterrupted": "regard.studies.fidelity",
    "compare": "regard.studies.comparison",
    "study_conversion": "regard.studies.conversion",
    "study_export": "regard.studies.export",
    "study_fidelity": "regard.studies.fidelity",
    "study_operators": "regard.studies.operators",
}

__all__ = list(_EXPORTS)

if TYPE_CHECKING:
    from regard.studies.comparison import Interrupted as Interrupted
    from regard.studies.comparison import compare as compare
    from regard.studies.conversion import study_conversion as study_conversion
    from regard.studies.export import study_export as study_export
    from regard.studies.fidelity import FidelitySettings as FidelitySettings
    from regard.studies.fidelity import StudyInterrupted as StudyInterrupted
    from regard.studies.fidelity import study_fidelity as study_fidelity
    from regard.studies.operators import study_operators as study_operators
    from regard.studies.settings import BenchSettings as BenchSettings
    from regard.studies.settings import CompareSettings as CompareSettings
    from regard.studies.settings import ConvertSettings as ConvertSettings
    from regard.studies.settings import ExportSettings as ExportSettings
    from regard.studies.settings import SettingsError as SettingsError


def __getattr__(name: str) -> Any:
    if name not in _EXPORTS:
        raise AttributeError(f"module 'regard.studies' has no attribute {name!r}")
    value = getattr(import_module(_EXPORTS[name]), name)
    globals()[name] = value
    return value
