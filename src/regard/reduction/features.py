"""Which patches a reorganized model kept, and its features as maps again."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from regard.reduction.layer import Step, reduced_blocks

__all__ = ["KeptTokens", "SpatialIntermediates", "token_map", "watch_tokens"]


@dataclass(eq=False)
class KeptTokens:
    """Which patches the reorganized layers kept in the last run of a model; see `watch_tokens`."""

    steps: list[Step] = field(default_factory=list)

    @property
    def positions(self) -> dict[int, Tensor]:
        """For each reorganized layer (B, k): the patches that it handed on, as indices of the image's patches, in the
        order in which they go on; -1 is an earlier layer's fused token. The layer's own is not among them.

        Raises:
            RuntimeError: the model has not run since it is watched.
        """
        if not self.steps:
            raise RuntimeError("no tokens were seen: run the reorganized model within watch_tokens(model)")
        patches = self.steps[0].patches
        now = torch.arange(patches.shape[1], device=patches.device).expand(patches.shape[0], -1)
        found = {}
        for step in self.steps:
            if step.kept is not None:
                now = now.gather(1, step.kept)
            found[step.layer] = now
            if step.fused:
                now = torch.cat([now, now.new_full((now.shape[0], 1), -1)], dim=1)
        return found

    def survived(self) -> Tensor:
        """(B, N): how many of the reorganized layers each of the image's N patches came through."""
        positions = self.positions
        batch, number, _ = self.steps[0].patches.shape
        count = torch.zeros(batch, number + 1, dtype=torch.long, device=self.steps[0].patches.device)
        for kept in positions.values():
            place = kept.where(kept >= 0, number)  # fused tokens fall into the last column, which is cut off
            count.scatter_add_(1, place, torch.ones_like(place))
        return count[:, :-1]


@contextmanager
def watch_tokens(model: nn.Module) -> Iterator[KeptTokens]:
    """Within this context, see which patches the model keeps.

        with watch_tokens(model) as seen:
            model(images)
        seen.positions[9]  # the patches after layer 9

    What is seen belongs to the last run, and holds the tokens of its reorganized layers in memory.

    Raises:
        ValueError: the model has no reorganized layers.
    """
    if not reduced_blocks(model):
        raise ValueError(f"model: {type(model).__name__} has no reorganized layers; call reorganize(model) first")
    seen = KeptTokens(_LastRun())
    with _recorded(model, seen.steps):
        yield seen


def token_map(model: nn.Module, images: Tensor) -> Tensor:
    """(B, H, W): how many of the reorganized layers each patch of the images came through, to be drawn over them.

    The model is run once, without gradient and in evaluation mode; its training flags are put back.

    Args:
        model: a reorganized model that takes images. images: (B, channels, height, width).

    Raises:
        ValueError: the model has no reorganized layers.
    """
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        with torch.no_grad(), watch_tokens(model) as seen:
            model(images)
    finally:
        for module in training:
            module.training = True
    found = (vars(module).get("forward_intermediates") for module in model.modules())
    vit = next(one.model for one in found if isinstance(one, SpatialIntermediates))
    height, width = vit.patch_embed.dynamic_feat_size(tuple(images.shape[-2:]))
    return seen.survived().unflatten(1, (height, width))


@contextmanager
def _recorded(model: nn.Module, steps: list[Step]) -> Iterator[None]:
    """Within this context the reorganized layers append their steps to `steps`."""
    layers = reduced_blocks(model)
    before = [layer.steps for layer in layers]
    for layer in layers:
        layer.steps = steps
    try:
        yield
    finally:
        for layer, found in zip(layers, before, strict=True):
            layer.steps = found


class _LastRun(list[Step]):
    """Steps in the order of the layers: one that is not deeper than the last begins a new run."""

    def append(self, step: Step) -> None:
        if self and step.layer <= self[-1].layer:
            self.clear()
        super().append(step)


@dataclass(eq=False, repr=False)
class SpatialIntermediates:
    """A reorganized model's `forward_intermediates`: timm's, with every patch in its place again.

    A patch that was dropped has the value that it had when it was: after the attention of that layer. The final tokens
    are those that the model ends with.

    Args:
        model: the model in whose `forward_intermediates` this stands.
    """

    model: Any

    def __repr__(self) -> str:
        return f"<forward_intermediates of {type(self.model).__name__}, reorganized>"

    def __call__(
        self,
        x: Tensor,
        indices: int | list[int] | None = None,
        return_prefix_tokens: bool = False,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
        **options: Any,
    ) -> Any:
        """Arguments and results as in timm's `VisionTransformer.forward_intermediates`."""
        from timm.models._features import feature_take_indices

        model = self.model
        taken, _ = feature_take_indices(len(model.blocks), indices)
        if output_fmt not in ("NCHW", "NLC"):
            raise ValueError(f"output_fmt: expected 'NCHW' or 'NLC', got {output_fmt!r}")
        steps: list[Step] = []
        with _recorded(model, steps):
            result = type(model).forward_intermediates(
                model,
                x,
                indices=indices,
                return_prefix_tokens=return_prefix_tokens,
                norm=norm,
                stop_early=stop_early,
                output_fmt="NLC",
                intermediates_only=intermediates_only,
                **options,
            )
        grid = model.patch_embed.dynamic_feat_size(tuple(x.shape[-2:])) if output_fmt == "NCHW" else None

        def placed(layer: int, entry: Any) -> Any:
            if isinstance(entry, tuple):
                return placed(layer, entry[0]), *entry[1:]
            done = [step for step in steps if step.layer <= layer]
            tokens = _in_place(entry, done, model.norm if norm else None)
            return tokens if grid is None else tokens.transpose(1, 2).unflatten(2, grid).contiguous()

        def all_placed(entries: list[Any]) -> list[Any]:
            return [placed(layer, entry) for layer, entry in zip(sorted(set(taken)), entries, strict=True)]

        if isinstance(result, dict):
            return {**result, "image_intermediates": all_placed(result["image_intermediates"])}
        return all_placed(result) if intermediates_only else (result[0], all_placed(result[1]))


def _in_place(tokens: Tensor, steps: list[Step], norm: nn.Module | None) -> Tensor:
    """(B, k, C) -> (B, N, C): what was kept over what there was, the last layer first; fused tokens have no place."""
    for step in reversed(steps):
        if step.kept is not None:
            there = step.patches if norm is None else norm(step.patches)
            where = step.kept.unsqueeze(-1).expand(-1, -1, tokens.shape[-1])
            tokens = there.to(tokens.dtype).scatter(1, where, tokens[:, : step.kept.shape[1]])
    return tokens
