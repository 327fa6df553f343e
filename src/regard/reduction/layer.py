"""A block that hands on fewer tokens than it was given: what stands in its `forward`."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from regard.ops._counts import share_of
from regard.reduction.scores import SCORES

__all__ = ["HALVES", "Halves", "ReducedBlock", "Step", "halves_of", "reduce_tokens", "reduced_blocks", "select_tokens"]


@dataclass(frozen=True)
class Halves:
    """A kind of block in two: tokens are dropped between them.

    Args:
        reads: (block, x) -> what its attention reads.
        attend: (block, x, what attention reads) -> x after attention and its residual.
        feed: (block, x) -> x after the MLP and its residual.
    """

    reads: Callable[[Any, Tensor], Tensor]
    attend: Callable[[Any, Tensor, Tensor], Tensor]
    feed: Callable[[Any, Tensor], Tensor]


def _normed(block: Any, x: Tensor) -> Tensor:
    return block.norm1(x)


def _attend_pre_norm(block: Any, x: Tensor, normed: Tensor) -> Tensor:
    return x + block.drop_path1(block.ls1(block.attn(normed)))


def _feed_pre_norm(block: Any, x: Tensor) -> Tensor:
    return x + block.drop_path2(block.ls2(block.mlp(block.norm2(x))))


def _plain(_block: Any, x: Tensor) -> Tensor:
    return x


def _attend_post_norm(block: Any, x: Tensor, _read: Tensor) -> Tensor:
    return x + block.drop_path1(block.norm1(block.attn(x)))


def _feed_post_norm(block: Any, x: Tensor) -> Tensor:
    return x + block.drop_path2(block.norm2(block.mlp(x)))


def _scaled(gamma: Tensor | None, x: Tensor) -> Tensor:
    return x if gamma is None else gamma * x


def _attend_eva(block: Any, x: Tensor, normed: Tensor) -> Tensor:
    return x + block.drop_path1(_scaled(block.gamma_1, block.attn(normed)))


def _feed_eva(block: Any, x: Tensor) -> Tensor:
    return x + block.drop_path2(_scaled(block.gamma_2, block.mlp(block.norm2(x))))


# By the class whose `forward` the block runs.
HALVES: dict[str, Halves] = {
    "timm.models.vision_transformer.Block": Halves(_normed, _attend_pre_norm, _feed_pre_norm),
    "timm.models.vision_transformer.ResPostBlock": Halves(_plain, _attend_post_norm, _feed_post_norm),
    "timm.models.eva.EvaBlock": Halves(_normed, _attend_eva, _feed_eva),
}


def halves_of(block: nn.Module) -> Halves | None:
    """How this block parts in two; None for one that is not known."""
    for kind in type(block).__mro__:
        if "forward" in vars(kind):
            return HALVES.get(f"{kind.__module__}.{kind.__qualname__}")
    return None


class Step(NamedTuple):
    """What one block did with its patches.

    Args:
        layer: the block's index.
        patches: (B, n, C), all tokens but the prefix, before some were dropped.
        kept: (B, k), which of the n stay, in their new order; None if all do.
        fused: True if one more token, the fused one, was appended.
    """

    layer: int
    patches: Tensor
    kept: Tensor | None
    fused: bool


@dataclass(eq=False, repr=False)
class ReducedBlock:
    """A block's `forward`: attention, then only the tokens that were attended to, then the MLP.

    An instance of a class at module level, kept in the block's own attributes: deepcopy and pickle take it along, and
    no parameter or buffer is added.

    Args:
        block: the block in whose `forward` this stands.
        halves: how it parts in two.
        layer: its index.
        keep_rate: the fraction of its patches that stay.
        num_prefix_tokens: how many of the first tokens are no patches, and always stay.
        score, fuse, order: as in regard.reduction.reorganize.
        training_rate: what stays in training mode; None for keep_rate.
        steps: where each call's Step is put; None for nowhere.
    """

    block: nn.Module
    halves: Halves
    layer: int
    keep_rate: float
    num_prefix_tokens: int
    score: str
    fuse: bool
    order: str
    training_rate: float | None = None
    steps: list[Step] | None = None

    def __repr__(self) -> str:
        return f"<forward of {type(self.block).__name__} {self.layer} with keep_rate={self.keep_rate}>"

    @property
    def rate(self) -> float:
        """The fraction of the patches that stays now."""
        scheduled = self.block.training and self.training_rate is not None
        return self.training_rate if scheduled else self.keep_rate  # type: ignore[return-value]

    def __call__(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        for given in (*args, *kwargs.values()):
            if given is not None and given is not False:
                raise ValueError(
                    f"layer {self.layer} drops tokens: it takes no attn_mask, is_causal or rope, whose rows belong to "
                    "all tokens; call the model without, or take the reorganization out with restore_tokens(model)"
                )
        read = self.halves.reads(self.block, x)
        x = self.halves.attend(self.block, x, read)
        prefix = self.num_prefix_tokens
        patches = x.shape[1] - prefix
        keep = share_of(self.rate, patches)
        kept: Tensor | None = None
        before = x
        if keep < patches:
            scores = SCORES[self.score](self.block.attn, read)[:, prefix:]
            kept = select_tokens(scores, keep, self.order)
            x = reduce_tokens(x, scores, kept, num_prefix_tokens=prefix, fuse=self.fuse)
        if self.steps is not None:
            self.steps.append(Step(self.layer, before[:, prefix:], kept, self.fuse and kept is not None))
        return self.halves.feed(self.block, x)


def select_tokens(scores: Tensor, keep: int, order: str = "score") -> Tensor:
    """(B, n) -> (B, keep): the largest scores' indices, ties to the lowest, by falling score or by "position"."""
    kept = scores.sort(dim=1, descending=True, stable=True).indices[:, :keep]
    return kept.sort(dim=1).values if order == "position" else kept


def reduce_tokens(x: Tensor, scores: Tensor, kept: Tensor, *, num_prefix_tokens: int, fuse: bool) -> Tensor:
    """Keep some of the patches, and sum up the others if asked to.

    Args:
        x: (B, P + n, C), the first P = num_prefix_tokens no patches.
        scores: (B, n).
        kept: (B, k), indices of the n patches.
        fuse: append the sum over the dropped patches, each times its score; the scores are not normalised.

    Returns:
        (B, P + k, C), or (B, P + k + 1, C) with the fused token, which is the last.
    """
    patches = x[:, num_prefix_tokens:]
    parts = [x[:, :num_prefix_tokens], patches.gather(1, kept.unsqueeze(-1).expand(-1, -1, x.shape[-1]))]
    if fuse:
        of_dropped = scores.scatter(1, kept, 0.0).to(x.dtype)
        parts.append((of_dropped.unsqueeze(1) @ patches).to(x.dtype))
    return torch.cat(parts, dim=1)


def reduced_blocks(model: nn.Module) -> list[ReducedBlock]:
    """The reorganized blocks' forwards of a model, in the order of its modules."""
    forwards = [vars(module).get("forward") for module in model.modules()]
    return [forward for forward in forwards if isinstance(forward, ReducedBlock)]
