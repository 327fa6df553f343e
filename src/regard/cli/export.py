"""`regard export`: a model as an ONNX file or a compiled package, run beside the model before it is trusted."""

from dataclasses import dataclass
from typing import Annotated

import tyro

from regard.studies.settings import ExportSettings

__all__ = ["Export"]


@dataclass(frozen=True)
class Export:
    """Export a model, converted or as it is, to ONNX or a compiled package, and run the file beside the model."""

    settings: Annotated[ExportSettings, tyro.conf.arg(name="")]

    def __call__(self) -> int:
        from regard.studies import study_export

        print(study_export(self.settings))
        return 0
