"""A model run without leaving a trace in it."""

import copy
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn

__all__ = ["left_as_found"]

_CONTAINERS = (dict, OrderedDict, list, set)


@contextmanager
def left_as_found(model: nn.Module) -> Iterator[None]:
    """Evaluation mode without gradient; afterwards all is as it was: training flags, hooks, buffers, random state, and
    the modules' plain attributes (some keep caches there). Parameters are taken not to change.

    What torch.compile compiled runs eagerly meanwhile, so that all that is hung into the modules is seen.
    """
    attributes = [(module, module.training, _attributes(module)) for module in model.modules()]
    buffers = [(buffer, buffer.clone()) for buffer in model.buffers() if not buffer.is_meta]
    places = {parameter.device for parameter in model.parameters()}
    with ExitStack() as stack:
        stack.enter_context(torch.random.fork_rng(devices=[]))
        for kind in {place.type for place in places} - {"cpu", "meta"}:
            indices = sorted({place.index or 0 for place in places if place.type == kind})
            stack.enter_context(torch.random.fork_rng(indices, device_type=kind))
        stack.enter_context(torch.no_grad())
        stack.enter_context(torch.compiler.set_stance("force_eager"))
        try:
            model.eval()
            yield
        finally:
            for module, training, found in attributes:
                _put_back(module, found)
                if module.training != training:  # scripted modules keep it elsewhere
                    module.training = training
            for buffer, value in buffers:
                if not torch.equal(buffer, value):
                    buffer.copy_(value)


def _attributes(module: nn.Module) -> dict[str, tuple[Any, Any]]:
    """Each attribute, with a copy of it where it is a container, which may change in place."""
    return {
        name: (value, copy.copy(value) if type(value) in _CONTAINERS else None) for name, value in vars(module).items()
    }


def _put_back(module: nn.Module, attributes: dict[str, tuple[Any, Any]]) -> None:
    now = vars(module)
    for name in [name for name in now if name not in attributes]:
        del now[name]
    for name, (value, content) in attributes.items():
        now[name] = value
        if content is not None and not _same(value, content):
            value.clear()
            if isinstance(value, list):
                value.extend(content)
            else:
                value.update(content)


def _same(container: Any, content: Any) -> bool:
    """True if both hold the very same objects."""
    if len(container) != len(content):
        return False
    if isinstance(container, dict):
        return all(a == b and container[a] is content[b] for a, b in zip(container, content, strict=True))
    return all(a is b for a, b in zip(container, content, strict=True))
