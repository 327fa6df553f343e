"""Export: programs, ONNX files and compiled packages of models that attend by regard's operators."""

from regard.export.decompositions import DECOMPOSITIONS, decomposed
from regard.export.onnx import export_onnx
from regard.export.package import export_package, load_package
from regard.export.program import export_program

__all__ = [
    "DECOMPOSITIONS",
    "decomposed",
    "export_onnx",
    "export_package",
    "export_program",
    "load_package",
]
