"""torch.export of a model in evaluation mode."""

from typing import Any

import torch
from torch import nn
from torch.export import ExportedProgram

__all__ = ["export_program"]


def export_program(model: nn.Module, example_inputs: Any, *, dynamic_shapes: Any = None) -> ExportedProgram:
    """The program of a model for inference: one graph, regard's operators as nodes of it.

    Args:
        model: a module in evaluation mode, converted or not.
        example_inputs: a tensor, or a tuple of what the model takes. A dimension that is to be dynamic needs a size of
            at least 2: torch.export takes 0 and 1 for constants.
        dynamic_shapes: which dimensions may change, as torch.export.export takes it.

    Raises:
        TypeError: the model is no module.
        ValueError: the model is in training mode, or not free in a dimension that is to be dynamic.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
    if model.training:
        raise ValueError("model: it is in training mode, an exported program is for inference; call model.eval() first")
    args = tuple(example_inputs) if isinstance(example_inputs, tuple | list) else (example_inputs,)
    try:
        with torch.no_grad():  # else every no_grad within would become a subgraph
            return torch.export.export(model, args, dynamic_shapes=dynamic_shapes, strict=False)
    except Exception as error:
        if dynamic_shapes is None or type(error).__name__ not in _OF_SHAPES:
            raise
        told = " ".join(str(error).split())[:600]
        raise ValueError(
            f"dynamic_shapes: {type(model).__name__} is not free in a dimension that is to be dynamic; leave that one "
            f"out, or state the relation that torch names: {told}"
        ) from error


# What torch.export raises where a dimension turns out constant; their module is not imported before it is needed.
_OF_SHAPES = ("UserError", "ConstraintViolationError", "GuardOnDataDependentSymNode")
