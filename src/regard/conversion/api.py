"""Put a mechanism into an existing model at its attention, and take it out again."""

import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from regard.conversion.choice import Choice
from regard.conversion.inputs import Inputs, given_inputs, known_inputs
from regard.conversion.recording import Found, attention_of
from regard.conversion.seam import Seam, install, remove, seams_of
from regard.results import ConversionRecord, ConversionRow
from regard.specs import Mechanism

__all__ = ["MechanismChoice", "convert", "converted", "find_attention", "restore", "unwrapped"]

MechanismChoice = Mechanism | str | Mapping[str, Mechanism | str | None]


def convert(
    model: nn.Module,
    mechanism: MechanismChoice,
    *,
    where: str | Sequence[str] | None = None,
    example_inputs: Any = None,
) -> ConversionRecord:
    """Let a model attend by another mechanism, in place. Weights, state_dict and call stay as they are.

        record = regard.convert(model, "multipole")
        print(record)  # which modules, how many tokens, what was left and why
        regard.restore(model)

    The model is run once (evaluation mode, no gradient; then all is as it was) to find where tokens attend to tokens:
    every call of `torch.nn.functional.scaled_dot_product_attention`, and classes that hide theirs and that regard
    knows. Pools with one query, class, channel and outlook attention are left, and so is what the mechanism refuses;
    the record tells why. deepcopy, pickle, torch.compile, torch.export, gradients and training work as before;
    nn.DataParallel does not (use DistributedDataParallel).

    A converted nn.MultiheadAttention hands back None for its weights.

    Args:
        model: any module; of what torch.compile returned, the model within is converted.
        mechanism: a mechanism (`regard.KNN(topk=0.25)`), its text (`"knn(topk=0.25)"`), or a dict of patterns on module
            names (as in fnmatch: `{"blocks.0.*": None, "*": "knn"}`): the first that matches wins, None leaves the
            module.
        where: convert only modules whose names match this pattern, or one of these.
        example_inputs: what to run the model with: a tensor, a tuple of positional or a dict of keyword arguments.
            None takes random images of the size that the model names (timm, transformers, torchvision's ViT).

    Returns:
        One row for each attention module. UserWarning if none was converted.

    Raises:
        TypeError: an argument of a wrong type.
        ValueError: the model is converted, scripted or traced already, has no attention, names no input size or refuses
            the inputs; an unknown mechanism; a pattern that matches no attention module.
        RuntimeError: a class that regard has an adapter for is not as the adapter knows it.
        On every error the model is as it was found.
    """
    root = unwrapped(model)
    choice = Choice(mechanism, where)
    found, inputs = find_attention(root, choice, example_inputs)
    if not found:
        raise ValueError(
            f"model: {type(root).__name__} has no attention that regard can see: nothing in it called "
            "torch.nn.functional.scaled_dot_product_attention or took the softmax of scores"
        )
    choice.check(one.name for one in found)
    try:
        for one in found:
            if one.mechanism is not None:
                before = vars(one.module).get("forward")
                install(Seam(one.module, one.mechanism, one.adapter, one.layout, before), one.around)
    except BaseException:
        restore(root)
        raise
    record = ConversionRecord(type(root).__name__, inputs.text, tuple(_row(one) for one in found))
    if not record.converted:
        warnings.warn(f"regard: nothing was converted.\n{record}", stacklevel=2)
    return record


def restore(model: nn.Module) -> None:
    """Take out what `convert` put in: the model computes as before, bit for bit. One not converted stays as it is."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
    for seam in seams_of(model):
        remove(seam)


@contextmanager
def converted(
    model: nn.Module,
    mechanism: MechanismChoice,
    *,
    where: str | Sequence[str] | None = None,
    example_inputs: Any = None,
) -> Iterator[ConversionRecord]:
    """Within this context the model attends by another mechanism; see `convert`. It is restored on leaving."""
    record = convert(model, mechanism, where=where, example_inputs=example_inputs)
    try:
        yield record
    finally:
        restore(model)


def unwrapped(model: nn.Module) -> nn.Module:
    """The model itself where torch.compile stands around it.

    Raises:
        TypeError, ValueError: it is no module, scripted or traced, or converted already.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
    root = getattr(model, "_orig_mod", model)
    if isinstance(root, torch.jit.ScriptModule | torch.fx.GraphModule):
        how = "scripted or traced" if isinstance(root, torch.jit.ScriptModule) else "traced to a graph"
        raise ValueError(f"model: it is {how}, its attention can no longer be reached; convert it before that")
    if seams := seams_of(root):
        raise ValueError(
            f"model: it is converted already (to {seams[0].mechanism} and more, {len(seams)} modules); "
            "call regard.restore(model) first"
        )
    return root


def find_attention(model: nn.Module, choice: Choice, example_inputs: Any) -> tuple[list[Found], Inputs]:
    """The attention modules, and the inputs that showed them. Raises as `convert` does."""
    if example_inputs is not None:
        inputs = given_inputs(example_inputs)
        return attention_of(model, inputs, choice), inputs
    refused: ValueError | None = None
    for inputs in known_inputs(model):
        try:
            return attention_of(model, inputs, choice), inputs
        except ValueError as error:
            refused = refused or error
    if refused is not None:
        raise ValueError(f"{refused}; pass example_inputs") from refused
    raise ValueError(
        f"example_inputs: {type(model).__name__} names no input size (no timm pretrained_cfg, transformers config or "
        "image_size); pass what it is called with, such as example_inputs=torch.randn(1, 3, 224, 224)"
    )


def _row(found: Found) -> ConversionRow:
    kind, mechanism = type(found.module).__name__, found.mechanism
    text = None if mechanism is None else str(mechanism)
    return ConversionRow(found.name, kind, found.tokens, found.keys, found.heads, text, found.reason)
