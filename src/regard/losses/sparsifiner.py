"""Sparsifiner's training loss (arXiv 2303.13755): the task's, and distillation from the dense model it starts from."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Self

import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["Outputs", "SparsifinerLoss"]


@dataclass(frozen=True)
class Outputs:
    """What one pass through a transformer gives.

    Args:
        logits: (B, classes).
        tokens: (B, N, C), after the last norm, without prefix tokens.
    """

    logits: Tensor
    tokens: Tensor

    @classmethod
    def of(cls, model: nn.Module, images: Tensor) -> Self:
        """Of one of timm's or regard's transformers."""
        features = model.forward_features(images)  # type: ignore[operator]
        return cls(model.forward_head(features), features[:, model.num_prefix_tokens :])  # type: ignore[operator, misc]


class SparsifinerLoss(nn.Module):
    """task(student logits, target) + 0.5 KL(teacher || student) + 0.5 MSE(tokens) + the attention loss.

    KL is the mean over images, MSE the mean over all entries of the tokens. The attention loss comes from the layers
    while the student runs in `collect_losses`, weighted there (0.01). The published training has two phases:

    1. 5 epochs, `set_budget(student, 1.0)`: attention is dense while the predictors learn the teacher's maps
       (AdamW, learning rate 3e-4 to 2e-4, weight decay 0.05, batch 168);
    2. 45 epochs, `set_budget(student, 0.25)`, without the attention loss: the rest learns to live with few keys
       (8e-5 to 2e-6). The predictors have no gradient then.

    Args:
        task: the task's loss of (logits, target).
        logits_weight, tokens_weight: of the two terms of distillation.

    Raises:
        ValueError: a weight is negative; in forward: student and teacher of different shapes.
    """

    def __init__(
        self,
        task: Callable[[Tensor, Tensor], Tensor] = F.cross_entropy,
        *,
        logits_weight: float = 0.5,
        tokens_weight: float = 0.5,
    ) -> None:
        super().__init__()
        for name, weight in (("logits_weight", logits_weight), ("tokens_weight", tokens_weight)):
            if not weight >= 0.0:
                raise ValueError(f"{name}: expected 0 or more, got {weight}")
        self.task = task
        self.logits_weight = logits_weight
        self.tokens_weight = tokens_weight

    def extra_repr(self) -> str:
        return f"logits_weight={self.logits_weight}, tokens_weight={self.tokens_weight}"

    def forward(self, student: Outputs, teacher: Outputs, target: Tensor, attention: Tensor | float = 0.0) -> Tensor:
        """The scalar to minimise.

        Args:
            student, teacher: outputs for the same images; none of the teacher's has a gradient.
            target: what `task` takes.
            attention: `collect_losses(...).total()`, weighted already; 0 in the second phase.
        """
        distilled = self.parts(student, teacher)
        return (
            self.task(student.logits, target)
            + self.logits_weight * distilled["logits"]
            + self.tokens_weight * distilled["tokens"]
            + attention
        )

    def parts(self, student: Outputs, teacher: Outputs) -> dict[str, Tensor]:
        """The terms of distillation before their weights: "logits" and "tokens"."""
        for name, ours, theirs in (
            ("logits", student.logits, teacher.logits),
            ("tokens", student.tokens, teacher.tokens),
        ):
            if ours.shape != theirs.shape:
                raise ValueError(
                    f"teacher: {name} of shape {tuple(theirs.shape)}, the student's {tuple(ours.shape)}; give both the "
                    "same images and classes, and a teacher of the student's patch size and width"
                )
        ours, theirs = student.logits.log_softmax(dim=-1), teacher.logits.detach().log_softmax(dim=-1)
        return {
            "logits": F.kl_div(ours, theirs, reduction="batchmean", log_target=True),
            "tokens": F.mse_loss(student.tokens, teacher.tokens.detach()),
        }
