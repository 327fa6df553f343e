"""Sparsifiner (arXiv 2303.13755): a low-rank predictor says which keys each query attends to."""

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from regard.cards import Card, Evidence
from regard.mixers._attention import AttentionMixer, resolve_grid
from regard.mixers._resampling import resampled
from regard.ops import routed_attention
from regard.ops._arguments import autocast_off, key_mask
from regard.ops._counts import check_count, share_of
from regard.ops._selection import kept_by_threshold, raised
from regard.ops.knn.api import check_topk
from regard.ops.knn.lists import knn_lists
from regard.specs import Mechanism, register

__all__ = ["CARD", "ConnectivityPredictor", "Sparsifiner", "SparsifinerAttention", "set_budget", "taught_by"]

CARD = Card(
    name="sparsifiner",
    title="Sparsifiner",
    paper="Sparsifiner: Learning Sparse Instance-Dependent Attention for Efficient Vision Transformers",
    authors="Wei et al.",
    venue="CVPR 2023",
    arxiv="2303.13755",
    exact=True,
    cost="N^2 r predicted scores (r = 32 at any N), N B logits",
    needs_grid=True,
    adds_parameters=True,
    converts=False,
    query_masks=False,
    summary="A trained low-rank predictor scores all pairs cheaply; each query keeps the B keys with the highest "
    "scores, and softmax of the true logits runs over those alone. Prefix queries see everything.",
    equation=r"o_i = \sum_{j \in T_i} \operatorname{softmax}_{j \in T_i}\!\left(\frac{q_i \cdot k_j}{\sqrt d}\right) "
    r"v_j, \qquad T_i = \text{the } B \text{ largest of } \tilde A_i = \tau_8\!\left(\operatorname{softmax}\!\left(s\, "
    r"\hat q_i (W_{\text{down}}^{\top} \hat k)^{\top}\right)\right) \theta(W_{\text{up}}^{\top})",
    variants=(
        "`official=False`, the default: predicted logits are scaled by the root of the predictor's head dim, as "
        "attention is, and the basis W_up keeps its signs, as it has them in training.",
        "`official=True`: what the published code computes, for its checkpoints; the backbone `sparsifiner_deit_small` "
        "sets it. Predicted logits are scaled by 1 / sqrt(heads), and choices read the basis's absolute values.",
        "Coefficients: the 8 largest of each row (`coefficients=8`), or those above a number (`coefficients=0.05`).",
        "Token pruning between layers is a matter of its own (off in the published configuration).",
    ),
    claims=(
        "48 to 69 % fewer FLOPs in attention with at most 0.4 points of ImageNet-1k top-1 lost.",
        "Over 60 % fewer FLOPs in the whole transformer, together with token pruning.",
    ),
    claims_source="the paper's abstract",
    official="lim142857/Sparsifiner",
    licence="MIT",
    quirks=(
        "All N x N logits are computed and then masked, beside a second, unmasked softmax for the losses: nothing is "
        "saved. Here only the kept pairs have logits.",
        "Predicted logits are scaled by 1 / sqrt(heads).",
        "The predictor is trained with a signed basis and all coefficients, and used with the basis's absolute values, "
        "thresholded, and 8 coefficients.",
        "The number of tokens is fixed by W_down and W_up and asserted; here they are resampled to any grid.",
        "The reconstruction loss is summed over the batch, so that its weight of 0.01 depends on the batch size; here "
        "it is the mean over images.",
        "Ties, which the zeros of the basis make, fall as torch.topk lets them; here the lowest index is kept.",
        "A class token is built in; here any number of prefix tokens, or none.",
    ),
    evidence=Evidence(
        identities=(
            "a budget of all keys equals dense attention",
            "prefix queries attend densely",
            "every other query keeps exactly B keys, ties to the lowest index",
            "zero predictor: the first B keys, and finite",
            "the task's loss has no gradient in the predictor, the reconstruction loss has",
            "equals a dense masked formulation in float64, gradients included",
            "the reconstruction loss in low-rank form equals the mean squared error of the maps",
        ),
        parity="lim142857/Sparsifiner at 9a11e26, DeiT-S on synthetic weights: float64 logits within 1e-9",
        parameters={"sparsifiner_deit_small": 22_251_880},
    ),
)

RECONSTRUCTION_WEIGHT = 0.01  # of the loss on predicted attention, beside a task's loss of weight 1


@register
@dataclass(frozen=True, eq=False)
class Sparsifiner(Mechanism):
    """Sparsifiner, `sparsifiner(budget=0.25)` in text.

    Args:
        budget: B, keys each query keeps: an int, or a fraction of all keys, rounded up.
        token_reduction: r_n: the predictor's rank is the number of tokens of the basis grid divided by it.
        dim_reduction: r_c: the predictor's head dim is the head dim divided by it.
        coefficients: an int: how many of a row's coefficients are kept; a float in [0, 1): those above it.
        basis_threshold: entries of the basis of at most this size count as zero.
        basis_grid: (height, width) of the grid that W_down and W_up have rows for; other grids resample them.
        official: scale and basis as the published code has them (the card says what that means).
    """

    card: ClassVar[Card] = CARD
    budget: int | float = 0.25
    token_reduction: int = 6
    dim_reduction: int = 2
    coefficients: int | float = 8
    basis_threshold: float = 0.02
    basis_grid: tuple[int, int] = (14, 14)
    official: bool = False

    def __post_init__(self) -> None:
        check_topk(self.budget, "budget")
        check_count("token_reduction", self.token_reduction)
        check_count("dim_reduction", self.dim_reduction)
        if isinstance(self.coefficients, float):
            if not 0.0 <= self.coefficients < 1.0:
                raise ValueError(f"coefficients: as a threshold it must lie in [0, 1), got {self.coefficients}")
        else:
            check_count("coefficients", self.coefficients)
        if not self.basis_threshold >= 0.0:
            raise ValueError(f"basis_threshold: expected 0 or more, got {self.basis_threshold}")
        grid = self.basis_grid
        if not isinstance(grid, Sequence) or isinstance(grid, str) or len(grid) != 2:
            raise TypeError(f"basis_grid: expected (height, width), got {grid!r}")
        for size in grid:
            check_count("basis_grid", size)
        object.__setattr__(self, "basis_grid", tuple(grid))  # a list from JSON would not hash, and reads otherwise

    def attend(self, query: Tensor, key: Tensor, value: Tensor, **options: Any) -> Tensor:
        """Raises ValueError: there is nothing to attend with before the predictor is trained."""
        raise ValueError(
            "sparsifiner: a trained predictor says which keys are kept, so a dense model cannot be converted; train "
            "one with regard.SparsifinerAttention (sparsifiner_deit_small), or convert with knn, which needs none"
        )

    def attn_layer(self, **options: Any) -> type[nn.Module]:
        return SparsifinerAttention.bind(**self.options, **options)


class ConnectivityPredictor(nn.Module):
    """Scores of all pairs of tokens, as a product of low rank: (H, N - P, r) coefficients and an (N, r) basis.

    Parameters: `query` and `key`, Linear(D, D / dim_reduction), shared by the heads; `down` and `up`, (P + cells, r), a
    row for each of the P prefix tokens and each cell of the basis grid, r = (P + cells) // token_reduction, at least 1.
    """

    def __init__(
        self,
        head_dim: int,
        num_heads: int,
        num_prefix_tokens: int,
        options: Sparsifiner,
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        dim = max(1, head_dim // options.dim_reduction)
        tokens = num_prefix_tokens + options.basis_grid[0] * options.basis_grid[1]
        rank = max(1, tokens // options.token_reduction)
        self.options = options
        self.prefix = num_prefix_tokens
        self.scale = (num_heads if options.official else dim) ** -0.5
        self.query = nn.Linear(head_dim, dim, **factory)
        self.key = nn.Linear(head_dim, dim, **factory)
        self.down = nn.Parameter(torch.empty(tokens, rank, **factory))
        self.up = nn.Parameter(torch.empty(tokens, rank, **factory))
        nn.init.trunc_normal_(self.down, std=0.02)
        nn.init.trunc_normal_(self.up, std=0.02)

    def coefficients(self, query: Tensor, key: Tensor, visible: Tensor | None, grid: tuple[int, ...]) -> Tensor:
        """(B, H, N - P, r), rows sum to one: how much of each row of the basis a query's attention consists of.

        Args:
            query, key: (B, H, N, D). visible: (B, N): the other keys count as zeros; None: all.
        """
        low = raised(self.query(query[:, :, self.prefix :]))
        keys = raised(self.key(key))
        if visible is not None:
            keys = keys.masked_fill(~visible[:, None, :, None], 0.0)
        prefix, cells = self._resampled(self.down, grid)
        # A sum over more cells than the basis has is kept at the size it was trained at.
        down = torch.cat([prefix, cells * (self._cells / max(1, cells.shape[0]))])
        with autocast_off(query.device.type):
            return (low @ (keys.mT @ down) * self.scale).softmax(dim=-1)

    def basis(self, grid: tuple[int, ...], sparse: bool) -> Tensor:
        """(N, r): W_up for a grid; `sparse`, as choices read it: small entries are zero."""
        up: Tensor = self.up
        if sparse:
            up = up.masked_fill(up.abs() <= self.options.basis_threshold, 0.0)
            up = up.abs() if self.options.official else up
        return torch.cat(self._resampled(up, grid))

    @torch.no_grad()
    def lists(self, query: Tensor, key: Tensor, visible: Tensor | None, grid: tuple[int, ...], count: int) -> Tensor:
        """(B, H, N - P, count) int64: the keys with the highest scores, ascending; -1 behind the last of too few."""
        coefficients = self.coefficients(query, key, visible, grid)
        wanted = self.options.coefficients
        if isinstance(wanted, float):
            kept = coefficients > wanted
        else:
            kept = kept_by_threshold(coefficients, min(wanted, coefficients.shape[-1]))
        coefficients = coefficients.masked_fill(~kept, 0.0)
        basis = self.basis(grid, sparse=True).expand(*query.shape[:2], -1, -1)
        return knn_lists(coefficients, basis, topk=count, visible=visible)

    def reconstruction_loss(
        self,
        query: Tensor,
        key: Tensor,
        target: tuple[Tensor, Tensor],
        visible: Tensor | None,
        grid: tuple[int, ...],
    ) -> Tensor:
        """Squared error of the predicted attention maps, summed over heads, queries and keys, mean over images.

        As in the published training: all coefficients, the basis as it is. With A the target's softmax, C the
        coefficients and U the basis, |C U' - A|^2 = C (U' U) C' - 2 C (A U)' + |A|^2; A U is attention with U for
        values. So nothing N x N is held. The target has no gradient.

        Args:
            target: query and key, (B, H, N, any D), whose dense attention is predicted; without gradient.
        """
        coefficients = self.coefficients(query, key, visible, grid)
        basis = self.basis(grid, sparse=False)
        # Rows of attention sum to one on any grid: with more tokens each has less.
        basis = basis * (self.up.shape[0] / max(1, basis.shape[0]))
        batch, heads = query.shape[:2]
        mask = None
        if visible is not None:
            basis, mask = basis * visible[:, None, :, None], visible[:, None, None]
        target_query, target_key = (raised(t) for t in target)
        target_query = target_query[:, :, self.prefix :]
        with autocast_off(query.device.type):
            blended = F.scaled_dot_product_attention(
                target_query, target_key, basis.expand(batch, heads, -1, -1), attn_mask=mask
            )
            products = basis.mT @ basis
            error = (coefficients * (coefficients @ products - 2.0 * blended)).sum()
            return (error + _sum_of_squares(target_query, target_key, mask)) / max(1, batch)

    @property
    def _cells(self) -> int:
        return self.options.basis_grid[0] * self.options.basis_grid[1]

    def _resampled(self, table: Tensor, grid: tuple[int, ...]) -> tuple[Tensor, Tensor]:
        """Rows of the prefix tokens, and of the grid's cells; at least float32."""
        prefix, cells = raised(table).split([self.prefix, self._cells])
        with autocast_off(table.device.type):
            return prefix, resampled(cells, self.options.basis_grid, grid)


@torch.no_grad()
def _sum_of_squares(query: Tensor, key: Tensor, mask: Tensor | None) -> Tensor:
    """Of all attention weights, some rows at a time."""
    batch, heads, rows, dim = query.shape
    total = query.new_zeros(())
    step = max(1, (1 << 21) // max(1, batch * heads * key.shape[2]))
    for begin in range(0, rows, step):
        logits = query[:, :, begin : begin + step] @ key.mT * dim**-0.5
        if mask is not None:
            logits = logits.masked_fill(~mask, float("-inf"))
        total = total + logits.softmax(dim=-1).nan_to_num().square().sum()
    return total


class SparsifinerAttention(AttentionMixer):
    """Sparsifiner's attention (arXiv 2303.13755): logits and softmax for the predicted pairs alone.

    The choice has no gradient. What trains the predictor is `sparsifiner`, a loss that it reports (weight 0.01) while
    `regard.losses.collect_losses` is open: the squared error of the predicted attention maps to the layer's own dense
    ones, or to a teacher's (`taught_by`). Dense weights load into the parameters they share; the predictor's are new.

    Masks may only hide keys from all queries alike: boolean, (N,) or broadcastable to (B, 1, 1, N). Hidden keys take no
    part in the prediction, and are on no list.

    Args:
        budget, token_reduction, dim_reduction, coefficients, basis_threshold, basis_grid, official: as in Sparsifiner.
        The rest is as in AttentionMixer.

    Raises:
        ValueError, TypeError: an option is out of range or of the wrong type; in forward: a mask that differs between
            queries or heads, a float mask, is_causal.
    """

    needs_grid = True

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        *args: Any,
        budget: int | float = Sparsifiner.budget,
        token_reduction: int = Sparsifiner.token_reduction,
        dim_reduction: int = Sparsifiner.dim_reduction,
        coefficients: int | float = Sparsifiner.coefficients,
        basis_threshold: float = Sparsifiner.basis_threshold,
        basis_grid: tuple[int, int] = Sparsifiner.basis_grid,
        official: bool = Sparsifiner.official,
        **kwargs: Any,
    ) -> None:
        options = Sparsifiner(
            budget, token_reduction, dim_reduction, coefficients, basis_threshold, basis_grid, official
        )
        super().__init__(dim, num_heads, *args, **kwargs)
        self.budget = budget
        # Query and key of a teacher's layer, while `taught_by` is open and the teacher has run.
        self.taught: tuple[Tensor, Tensor] | None = None
        weight = self.qkv.weight
        self.predictor = ConnectivityPredictor(
            self.head_dim, num_heads, self.num_prefix_tokens, options, weight.device, weight.dtype
        )

    def extra_repr(self) -> str:
        return str(replace(self.predictor.options, budget=self.budget))

    def attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None,
        is_causal: bool,
        grid_size: tuple[int, ...] | None,
    ) -> Tensor:
        if is_causal:
            raise ValueError(
                "is_causal: the predictor sums over all tokens before it scores a pair, so no choice of keys would be "
                "causal; use knn or dense"
            )
        tokens, prefix = key.shape[-2], self.num_prefix_tokens
        grid = resolve_grid(tokens, prefix, grid_size)
        shape = (*query.shape[:-1], tokens)
        visible = None if attn_mask is None else key_mask(attn_mask, shape, query.device, because=_BECAUSE)
        if self.reporting:
            target = tuple(t.detach() for t in self.taught or (query, key))
            loss = self.predictor.reconstruction_loss(query, key, target, visible, grid)  # type: ignore[arg-type]
            self.report("sparsifiner", loss, weight=RECONSTRUCTION_WEIGHT)
        count = share_of(self.budget, tokens)
        mask = None if visible is None else visible[:, None, None]
        if tokens == prefix or count == tokens:
            return F.scaled_dot_product_attention(query, key, value, attn_mask=mask, dropout_p=self.dropout_p)
        lists = self.predictor.lists(query, key, visible, grid, count)
        chosen = routed_attention(
            query[:, :, prefix:], key, value, blocks=lists, query_block=1, key_block=1, dropout_p=self.dropout_p
        )
        if prefix == 0:
            return chosen
        dense = F.scaled_dot_product_attention(
            query[:, :, :prefix], key, value, attn_mask=mask, dropout_p=self.dropout_p
        )
        # Tokens before heads in memory, as the operators lay them out: joining the heads is then a view.
        return torch.cat([dense.transpose(1, 2), chosen.transpose(1, 2)], dim=1).transpose(1, 2)


_BECAUSE = "here one basis serves all queries of an image, and a key is hidden from all alike"


def set_budget(model: nn.Module, budget: int | float) -> None:
    """Let every SparsifinerAttention of a model keep `budget` keys: 1.0, dense attention, while predictors are trained.

    Raises:
        ValueError, TypeError: budget is out of range or no number.
        ValueError: the model has no such layer.
    """
    check_topk(budget, "budget")
    for layer in _layers(model):
        layer.budget = budget


@contextlib.contextmanager
def taught_by(student: nn.Module, teacher: nn.Module) -> Iterator[None]:
    """Within this context the student's predictors learn the teacher's attention maps, layer by layer.

    Run the teacher first, on the same images; then the student, inside `collect_losses`. What is kept of the teacher
    are queries and keys, not maps.

    Args:
        student: a model with SparsifinerAttention in its layers.
        teacher: a dense model with as many attention layers, of as many heads, made like timm's `Attention` (`qkv`,
            `num_heads`, `q_norm`, `k_norm`).

    Raises:
        ValueError: the student has no SparsifinerAttention, or the teacher another number of layers or heads.
    """
    layers = _layers(student)
    parts = ("qkv", "num_heads", "q_norm", "k_norm")
    given: list[Any] = [m for m in teacher.modules() if all(hasattr(m, part) for part in parts)]
    if [layer.num_heads for layer in layers] != [m.num_heads for m in given]:
        raise ValueError(
            f"teacher: attention layers of {[m.num_heads for m in given]} heads, the student's have "
            f"{[layer.num_heads for layer in layers]}; maps are compared head by head"
        )
    hooks = [
        teaching.qkv.register_forward_hook(_Lesson(layer, teaching))
        for layer, teaching in zip(layers, given, strict=True)
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
        for layer in layers:
            layer.taught = None


def _layers(model: nn.Module) -> list[SparsifinerAttention]:
    found = [module for module in model.modules() if isinstance(module, SparsifinerAttention)]
    if not found:
        raise ValueError(f"model: {type(model).__name__} has no SparsifinerAttention")
    return found


@dataclass(frozen=True)
class _Lesson:
    """Forward hook on a teacher's projection: hands query and key to the student's layer."""

    layer: SparsifinerAttention
    teacher: Any

    def __call__(self, module: nn.Module, inputs: Any, output: Tensor) -> None:
        query, key, _ = output.detach().unflatten(-1, (3, self.teacher.num_heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        self.layer.taught = self.teacher.q_norm(query).detach(), self.teacher.k_norm(key).detach()
