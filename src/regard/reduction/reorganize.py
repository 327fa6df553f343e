"""Token reorganization (EViT, arXiv 2202.07800) put into a vision transformer, and taken out again."""

import numbers
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import nn

from regard.ops._counts import share_of
from regard.reduction.features import SpatialIntermediates
from regard.reduction.layer import HALVES, Halves, ReducedBlock, halves_of, reduced_blocks
from regard.reduction.scores import SCORES, unreadable
from regard.specs import nearest

__all__ = [
    "Reorganization",
    "check_keep_rate",
    "check_layers",
    "published_layers",
    "reorganize",
    "reorganized",
    "restore_tokens",
]

ORDERS = ("score", "position")


@dataclass(frozen=True)
class Reorganization:
    """What `reorganize` did.

    Args:
        model: the model's class.
        layers: the layers (from 0) that drop patches between attention and MLP.
        keep_rates: which fraction of its patches each of them keeps.
        depth: how many layers the model has.
        num_prefix_tokens: tokens that always stay.
        patches: how many patches an image of the model's own size has; None if it does not tell.
        score, fuse, order: as in `reorganize`.
    """

    model: str
    layers: tuple[int, ...]
    keep_rates: tuple[float, ...]
    depth: int
    num_prefix_tokens: int
    patches: int | None
    score: str
    fuse: bool
    order: str

    def tokens(self, patches: int | None = None) -> tuple[int, ...]:
        """How many tokens each layer hands on.

        Args:
            patches: how many patches the image has; None for an image of the model's own size.

        Raises:
            ValueError: None, and the model does not tell its own size.
        """
        patches = self.patches if patches is None else patches
        if patches is None:
            raise ValueError("patches: this model names no image size; pass the number of patches")
        rates, counts = dict(zip(self.layers, self.keep_rates, strict=True)), []
        for layer in range(self.depth):
            keep = share_of(rates.get(layer, 1.0), patches)
            patches = keep + 1 if self.fuse and keep < patches else keep
            counts.append(self.num_prefix_tokens + patches)
        return tuple(counts)

    def __str__(self) -> str:
        by = "the class token's attention" if self.score == "class" else "the mean attention of all tokens"
        rates = ", ".join(f"{layer} ({rate:g})" for layer, rate in zip(self.layers, self.keep_rates, strict=True))
        text = f"{self.model}: layers (keep rates) {rates}; patches chosen by {by}, the others "
        text += "fused into one token" if self.fuse else "dropped"
        if self.patches is not None:
            counts = [self.num_prefix_tokens + self.patches, *self.tokens()]
            steps = [str(now) for before, now in zip([0, *counts], counts, strict=False) if now != before]
            text += f"; {' -> '.join(steps)} tokens"
        return text


def reorganize(
    model: nn.Module,
    keep_rate: float | Sequence[float] = 0.7,
    layers: Sequence[int] | None = None,
    fuse: bool = True,
    *,
    score: str | None = None,
    order: str = "score",
) -> Reorganization:
    """Let a vision transformer go on with the patches that matter to it, in place. No weights are added or changed.

        record = regard.reorganize(model, keep_rate=0.7)
        print(record)  # 197 -> 140 -> 100 -> 72 tokens
        regard.restore_tokens(model)

    In the chosen layers, between attention and MLP, only ceil(keep_rate * n) of n patches stay: those with the largest
    scores. All prefix tokens (class, registers, distillation) stay. Attention itself is not touched: SDPA, or whatever
    mixer or conversion is in the model, sees all tokens that there still are, and the score is one softmax row more.
    Where nothing would be dropped (keep_rate=1) the model computes what it did, bit for bit.

    deepcopy, pickle, torch.compile, torch.export, gradients and training work as before. `forward_features` hands out
    the tokens that are left, `forward_intermediates` puts every patch back in its place. Attention masks are refused.

    Args:
        model: timm's VisionTransformer or one of its relatives (DeiT, DINOv2, CLIP, SigLIP ..., Eva without rotary
            positions), or a module that holds one.
        keep_rate: the fraction of the patches that stays, in (0, 1]; or one for each of `layers`.
        layers: layers counted from 0. None: at a quarter, a half and three quarters of the depth, which is the
            published (3, 6, 9) where there are twelve.
        fuse: sum up the dropped patches, each times its score, in one token that goes on as the last.
        score: "class": how much the class token attends to the patch, mean over the heads (the paper's); "mean": how
            much all tokens attend to it, which costs a matrix of logits more in the chosen layers. None: "class" where
            there is a class token, "mean" where there is none.
        order: of the patches that stay: by falling "score", as published, or by "position".

    Returns:
        Which layers, and how many tokens they hand on.

    Raises:
        TypeError: an argument of a wrong type.
        ValueError: the model is none of these, is reorganized already, scripted or traced, has rotary positions; a rate
            or a layer out of range; score="class" without a class token; or attention that needs the tokens' grid
            stands in a layer after the first chosen one.
        The model is then as it was.
    """
    vit = _checked_model(model)
    chosen = _checked_layers(layers, len(vit.blocks))
    rates = _checked_rates(keep_rate, len(chosen))
    has_class = bool(getattr(vit, "has_class_token", getattr(vit, "cls_token", None) is not None))
    score = score or ("class" if has_class else "mean")
    _check_choice("score", score, tuple(SCORES))
    _check_choice("order", order, ORDERS)
    if score == "class" and not has_class:
        raise ValueError(f"score: {type(vit).__name__} was built without a class token; use score='mean'")
    prefix = int(getattr(vit, "num_prefix_tokens", 0))
    blocks = list(vit.blocks)
    halves = [_halves(layer, block) for layer, block in enumerate(blocks)]
    for layer, block in enumerate(blocks):
        if layer > chosen[0] and _needs_grid(block.attn):
            raise ValueError(
                f"layers: {type(block.attn).__name__} in layer {layer} needs the tokens' grid, and there is none after "
                f"layer {chosen[0]}; reorganize layers from {layer} on, or use another mechanism there"
            )
    for layer, rate in zip(chosen, rates, strict=True):
        block = blocks[layer]
        vars(block)["forward"] = ReducedBlock(block, halves[layer], layer, rate, prefix, score, fuse, order)
    vars(vit)["forward_intermediates"] = SpatialIntermediates(vit)
    patches = getattr(getattr(vit, "patch_embed", None), "num_patches", None)
    return Reorganization(type(vit).__name__, chosen, rates, len(blocks), prefix, patches, score, fuse, order)


def restore_tokens(model: nn.Module) -> None:
    """Take out what `reorganize` put in: the model computes as before, bit for bit. Another model stays as it is."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
    for reduced in reduced_blocks(model):
        del vars(reduced.block)["forward"]
    for module in model.modules():
        if isinstance(vars(module).get("forward_intermediates"), SpatialIntermediates):
            del vars(module)["forward_intermediates"]


@contextmanager
def reorganized(model: nn.Module, *args: Any, **kwargs: Any) -> Iterator[Reorganization]:
    """Within this context the model is reorganized; arguments as in `reorganize`. It is restored on leaving."""
    record = reorganize(model, *args, **kwargs)
    try:
        yield record
    finally:
        restore_tokens(model)


def published_layers(depth: int) -> tuple[int, ...]:
    """A quarter, a half and three quarters of the depth: (3, 6, 9) of 12. Never the first layer, unless it is alone."""
    return tuple(sorted({min(max(depth * part // 4, 1), depth - 1) for part in (1, 2, 3)}))


def check_keep_rate(keep_rate: float) -> None:
    """Raise TypeError unless `keep_rate` is a number, ValueError unless it is in (0, 1]."""
    if isinstance(keep_rate, bool) or not isinstance(keep_rate, numbers.Real):
        raise TypeError(f"keep_rate: expected a number in (0, 1], got {keep_rate!r}")
    if not 0 < keep_rate <= 1:
        raise ValueError(f"keep_rate: expected a number in (0, 1], got {keep_rate}")


def _checked_rates(keep_rate: Any, number: int) -> tuple[float, ...]:
    many = isinstance(keep_rate, Sequence) and not isinstance(keep_rate, str)
    rates = tuple(keep_rate) if many else (keep_rate,) * number
    if len(rates) != number:
        raise ValueError(f"keep_rate: expected a number or {number} of them, one a layer, got {len(rates)}")
    for rate in rates:
        check_keep_rate(rate)
    return tuple(float(rate) for rate in rates)


def check_layers(layers: Sequence[int]) -> tuple[int, ...]:
    """The layers as a tuple. TypeError unless they are integers in a sequence, ValueError unless they rise from 0."""
    wanted = "expected layers in rising order, counted from 0, such as (3, 6, 9)"
    if not isinstance(layers, Sequence) or any(
        isinstance(n, bool) or not isinstance(n, numbers.Integral) for n in layers
    ):
        raise TypeError(f"layers: {wanted}, got {layers!r}")
    found = tuple(int(n) for n in layers)
    if not found or found[0] < 0 or any(first >= second for first, second in pairwise(found)):
        raise ValueError(f"layers: {wanted}, got {found}")
    return found


def _checked_layers(layers: Sequence[int] | None, depth: int) -> tuple[int, ...]:
    found = published_layers(depth) if layers is None else check_layers(layers)
    if found[-1] >= depth:
        raise ValueError(f"layers: the model has layers 0 to {depth - 1}, got {found}")
    return found


def _check_choice(name: str, value: Any, known: tuple[str, ...]) -> None:
    if value not in known:
        allowed = " or ".join(map(repr, nearest(str(value), known)))
        raise ValueError(f"{name}: expected {allowed}, got {value!r}")


def _checked_model(model: Any) -> Any:
    """The vision transformer in a model."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
    if any(isinstance(module, torch.jit.ScriptModule | torch.fx.GraphModule) for module in model.modules()):
        raise ValueError("model: it is scripted or traced, its layers can no longer be reached; reorganize it before")
    if found := reduced_blocks(model):
        raise ValueError(f"model: {len(found)} of its layers are reorganized already; call restore_tokens(model) first")
    # A module's own children: wrappers (torch.compile's, DistributedDataParallel) pass attributes on.
    stacks = [(module, module._modules.get("blocks")) for module in model.modules()]
    vits: list[Any] = [
        module for module, blocks in stacks if isinstance(blocks, nn.Sequential | nn.ModuleList) and len(blocks)
    ]
    if len(vits) != 1:
        found_text = "no stack of blocks" if not vits else f"{len(vits)} stacks of blocks"
        raise ValueError(
            f"model: expected a vision transformer of timm's kind, or a module that holds one; {type(model).__name__} "
            f"has {found_text} named `blocks`"
        )
    (vit,) = vits
    if getattr(vit, "rope", None) is not None:
        raise ValueError(
            f"model: {type(vit).__name__} rotates queries and keys by the place of each token (rope), which would have "
            "to follow the tokens that stay; such models are not supported"
        )
    return vit


def _halves(layer: int, block: Any) -> Halves:
    """How a block parts in two, once it is known that it does and that its scores can be had."""
    halves = halves_of(block)
    if halves is None:
        known = ", ".join(kind.removeprefix("timm.models.") for kind in HALVES)
        raise ValueError(f"model: its layer {layer} is of {type(block)}, not known to part in two; known: {known}")
    if "forward" in vars(block):
        raise ValueError(f"model: the forward of its layer {layer} has been replaced by {block.forward!r}")
    if (problem := unreadable(block.attn)) is not None:
        raise ValueError(f"model: in layer {layer} {problem}")
    return halves


def _needs_grid(attn: nn.Module) -> bool:
    """True for a mixer that reads the grid, and for attention converted to a mechanism that does."""
    mechanism = getattr(vars(attn).get("forward"), "mechanism", None)
    card = getattr(mechanism, "card", None)
    return bool(getattr(attn, "needs_grid", False) or getattr(card, "needs_grid", False))
