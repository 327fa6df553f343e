"""ONNX files that onnxruntime runs without regard."""

import operator
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from regard.export.decompositions import decomposed
from regard.export.program import export_program

__all__ = ["export_onnx"]

_ONE_FILE = 1 << 30  # bytes of weights from which on they get a file of their own: a protobuf message ends at 2 GiB


def export_onnx(
    model: nn.Module,
    example_inputs: Any,
    file: str | os.PathLike[str],
    *,
    dynamic_shapes: Any = None,
    input_names: Sequence[str] | None = None,
    output_names: Sequence[str] | None = None,
) -> Path:
    """Write a model as ONNX, its attention in standard operators: no library of ours is needed to run it.

    Every operator of regard becomes its reference. The file appears when it is whole; weights beyond 1 GiB stand beside
    it in `<name>.data`.

    Args:
        model: a module in evaluation mode, converted or not.
        example_inputs: a tensor, or a tuple of what the model takes; dynamic dimensions with at least 2.
        file: where to write, `model.onnx`.
        dynamic_shapes: which dimensions may change, as torch.export.export takes it.
        input_names, output_names: of the graph; the model's own if None.

    Returns:
        The file's path.

    Raises:
        ImportError: onnx or onnxscript is missing.
        TypeError, ValueError: as export_program.
        NotImplementedError: an operator cannot be exported at the sizes that are left dynamic.
    """
    _check_installed()
    program = decomposed(export_program(model, example_inputs, dynamic_shapes=dynamic_shapes))
    _check_whole_numbers(program)
    exported = torch.onnx.export(
        program,
        dynamo=True,
        verbose=False,
        custom_translation_table=_translations(),
        input_names=input_names,
        output_names=output_names,
    )
    if exported is None:
        raise RuntimeError("torch.onnx.export returned no program")
    path = Path(file)
    size = sum(weight.numel() * weight.element_size() for weight in model.state_dict().values())
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}.") as folder:
        exported.save(Path(folder) / path.name, external_data=size > _ONE_FILE)
        made = sorted(Path(folder).iterdir(), key=lambda one: one.name == path.name)  # the model itself comes last
        for one in made:
            os.replace(one, path.parent / one.name)
    return path


def _check_installed() -> None:
    try:
        import onnx  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise ImportError(f"{error.name} is missing: pip install 'regard[export]'") from error


def _translations() -> dict[Any, Any]:
    """What the exporter lacks, or takes for something else."""
    import onnxscript

    op: Any = onnxscript.opset18

    def stable_sort(self: Any, stable: bool = True, dim: int = -1, descending: bool = False) -> Any:
        """Of equal elements ONNX's TopK gives the lower index first: it sorts stably."""
        size = op.Reshape(op.Gather(op.Shape(self), dim), op.Constant(value_ints=[1]))
        return op.TopK(self, size, axis=dim, largest=descending, sorted=True)

    def floor_division(self: Any, other: Any) -> Any:
        """The exporter truncates, which rounds -(-n // size) down."""
        quotient, rest = op.Div(self, other), op.Mod(self, other)
        inexact = op.Not(op.Equal(rest, 0))
        opposite = op.Xor(op.Less(self, 0), op.Less(other, 0))
        return op.Sub(quotient, op.Cast(op.And(inexact, opposite), to=7))

    def remainder(self: Any, other: Any) -> Any:
        """The exporter knows no divisor that is a size."""
        if self.dtype.is_integer():
            return op.Mod(self, other)  # it has the divisor's sign, as torch's has
        return op.Sub(self, op.Mul(op.Floor(op.Div(self, other)), other))

    def clamp(self: Any, min: Any = None, max: Any = None) -> Any:
        """The exporter writes every bound in float32 first, where the lowest float64 is minus infinity."""
        bounds = [
            op.Constant(value=onnxscript.ir.tensor(bound, dtype=self.dtype))
            if isinstance(bound, int | float)
            else bound
            for bound in (min, max)
        ]
        return op.Clip(self, *bounds)

    return {
        torch.ops.aten.clamp.default: clamp,
        torch.ops.aten.sort.stable: stable_sort,
        torch.ops.aten.remainder.Scalar: remainder,
        operator.floordiv: floor_division,
    }


def _check_whole_numbers(program: torch.export.ExportedProgram) -> None:
    """Raise NotImplementedError if a size is computed by way of fractions: ONNX would round them otherwise."""
    for node in program.graph.nodes:
        if isinstance(node.meta.get("val"), torch.SymFloat):
            raise NotImplementedError(
                f"a dynamic size is computed from fractions ({node.target}), which ONNX would round; fix that size, or "
                "give counts as ints (num_clusters=64)"
            )
