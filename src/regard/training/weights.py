"""Trained weights on disk."""

from pathlib import Path

from safetensors.torch import load_file, save_file
from torch import nn

__all__ = ["load_weights", "save_weights"]


def save_weights(model: nn.Module, path: Path) -> None:
    """Write the state_dict as safetensors, whole or not at all."""
    temporary = path.with_name(path.name + ".part")
    tensors = {name: value.detach().cpu().contiguous() for name, value in model.state_dict().items()}
    try:
        save_file(tensors, str(temporary))
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def load_weights(model: nn.Module, path: Path) -> None:
    """Read what save_weights wrote into a model of the same architecture.

    Raises:
        FileNotFoundError: no such file. RuntimeError: the weights do not fit the model.
    """
    model.load_state_dict(load_file(str(path)))
