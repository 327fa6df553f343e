"""The attention weights of a mixer, asked of the mechanism itself."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from regard.conversion._snapshot import left_as_found
from regard.mixers import AttentionMixer
from regard.specs import nearest

__all__ = ["attention_maps"]


def attention_maps(model: nn.Module, images: Tensor, *, layer: int | str = -1) -> Tensor:
    """The exact weights with which one layer of a model mixed its tokens.

    The mixer itself is asked (`attention_weights`), for the input that the model gave it. The model is run once in
    evaluation mode and left as found: training flags, buffers, random state.

    Args:
        model: a model with regard's attention mixers in it.
        images: what the model takes, (B, channels, height, width) for the backbones; on the model's device.
        layer: which mixer: its index among the model's mixers in the order of their definition, negative from the end,
            or its module name, such as "blocks.3.attn".

    Returns:
        (B, H, N, N): row i holds the weights of query i; rows sum to one (to zero where every key is masked). A mixer
        whose keys are merged tokens tells how much of each token went in. In the dtype that the layer computed in.
        B * H * N * N entries are held, whatever the mechanism itself needs.

    Raises:
        ValueError: the model has no attention mixer, or `layer` names none of them.
        RuntimeError: the model's forward did not call that mixer.
    """
    model = getattr(model, "_orig_mod", model)  # what torch.compile wraps; compiled code would not see the recorder
    name, mixer = _find(model, layer)
    with left_as_found(model):
        with _recorded(mixer) as record:
            model(images)
        if record.args is None:
            raise RuntimeError(f"layer: the model's forward did not call {name!r}; choose a mixer that it calls")
        return mixer.attention_weights(*record.args, **record.options)


def _find(model: nn.Module, layer: int | str) -> tuple[str, AttentionMixer]:
    mixers = {name: module for name, module in model.named_modules() if isinstance(module, AttentionMixer)}
    if not mixers:
        raise ValueError(
            f"model: {type(model).__name__} has no attention mixer of regard; build it with one, "
            "such as timm.create_model(name, attn_layer=regard.KNNAttention)"
        )
    names = list(mixers)
    if isinstance(layer, str):
        if layer not in mixers:
            raise ValueError(f"layer: no mixer is called {layer!r}; known: {', '.join(nearest(layer, names))}")
        return layer, mixers[layer]
    if not -len(names) <= layer < len(names):
        raise ValueError(f"layer: {layer} is out of range; the model has {len(names)} mixers, 0 to {len(names) - 1}")
    return names[layer], mixers[names[layer]]


@dataclass
class _Record:
    """What a mixer was last called with."""

    args: tuple[Any, ...] | None = None
    options: dict[str, Any] = field(default_factory=dict)


@contextmanager
def _recorded(mixer: AttentionMixer) -> Iterator[_Record]:
    """Within this context the mixer leaves a record of its last call."""
    record = _Record()

    def recorder(_: nn.Module, args: tuple[Any, ...], options: dict[str, Any]) -> None:
        record.args, record.options = args, options

    hook = mixer.register_forward_pre_hook(recorder, with_kwargs=True)
    try:
        yield record
    finally:
        hook.remove()
