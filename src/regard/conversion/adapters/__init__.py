"""Adapters: how the attention of a class that hides its scaled_dot_product_attention is computed through a mechanism.

A class that calls `torch.nn.functional.scaled_dot_product_attention` needs none: its own forward runs, and the call is
answered. Classes are named by text, so that no library is imported before a model of it is there.
"""

from torch import nn

from regard.conversion.adapters import timm, torch, torchvision
from regard.conversion.adapters._adapter import Adapter, AdapterError, Attention, Override

__all__ = ["Adapter", "AdapterError", "Attention", "Override", "adapter_for", "reason_left"]

_ADAPTERS: dict[str, Adapter] = {**timm.ADAPTERS, **torch.ADAPTERS, **torchvision.ADAPTERS}


def adapter_for(module: nn.Module) -> Adapter | None:
    """The adapter of the class whose forward this module runs, if there is one.

    Raises:
        AdapterError: the class is not as the adapter knows it (another version of its library).
    """
    adapter = _ADAPTERS.get(_forward_class(module))
    misfit = adapter.misfit(module) if adapter is not None else ""
    if adapter is None or (misfit and adapter.forward is None):  # the own forward runs; only its grid stays unknown
        return None
    if misfit:
        raise AdapterError(
            f"model: {_forward_class(module)} is not as this version of regard knows it: {misfit}. Leave such modules "
            "out (where=...), or use a version of its library that regard is tested with"
        )
    return adapter


def reason_left(module: nn.Module) -> str | None:
    """Why modules of this class are never converted; None if nothing speaks against it."""
    return timm.LEFT.get(_forward_class(module))


def _forward_class(module: nn.Module) -> str:
    """Full name of the class that defines the module's forward: what wraps a class (FSDP, parametrization) does not."""
    for base in type(module).__mro__:
        if "forward" in vars(base):
            return f"{base.__module__}.{base.__qualname__}"
    return ""
