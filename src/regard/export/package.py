"""Packages compiled ahead of time by AOTInductor."""

import os
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import nn

from regard.export.decompositions import decomposed
from regard.export.program import export_program

__all__ = ["export_package", "load_package"]


def export_package(
    model: nn.Module,
    example_inputs: Any,
    file: str | os.PathLike[str],
    *,
    dynamic_shapes: Any = None,
    standalone: bool = False,
) -> Path:
    """Compile a model ahead of time, for this kind of machine. A C++ compiler is needed now, none to run the package.

    Args:
        model: a module in evaluation mode, converted or not.
        example_inputs: a tensor, or a tuple of what the model takes; dynamic dimensions with at least 2.
        file: where to write, `model.pt2`. It appears when it is whole.
        dynamic_shapes: which dimensions may change, as torch.export.export takes it.
        standalone: False: the package calls regard's operators, which `import regard.ops` must have defined before it
            is loaded (`load_package` does). True: it holds their references compiled, and runs where torch alone is, in
            C++ too; slower, and with the references' memory.

    Returns:
        The file's path.

    Raises:
        TypeError, ValueError: as export_program; ValueError: the name does not end in .pt2.
        NotImplementedError: standalone, and an operator cannot be decomposed at the sizes that are left dynamic.
        RuntimeError: the compiler fails or is missing.
    """
    path = Path(file)
    if path.suffix != ".pt2":
        raise ValueError(f"file: a package's name ends in .pt2, got {path.name!r}")
    program = export_program(model, example_inputs, dynamic_shapes=dynamic_shapes)
    if standalone:
        program = decomposed(program)
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}.") as folder, torch.no_grad():
        made = Path(folder) / path.name
        torch._inductor.aoti_compile_and_package(program, package_path=str(made))
        os.replace(made, path)
    return path


def load_package(file: str | os.PathLike[str]) -> Any:
    """What `export_package` wrote, as a callable that takes what the model takes."""
    import regard.ops  # noqa: F401  (defines the operators that the package calls)

    return torch._inductor.aoti_load_package(str(file))
