"""DeiT with Sparsifiner's attention (CVPR 2023, arXiv 2303.13755).

timm ships DeiT; here its layers are told the grid, since the predictor of connectivity has a row for each token. Images
may have any size: what does not fill a patch is padded, position embeddings and predictor are resampled. Checkpoints of
the official implementation (lim142857/Sparsifiner) load through `checkpoint_filter_fn`. Its token pruning, off in the
published configuration, is not part of the model.
"""

from collections.abc import Sequence
from typing import Any

from timm.models import VisionTransformer, build_model_with_cfg, checkpoint, generate_default_cfgs, register_model
from timm.models._features import feature_take_indices
from timm.models.vision_transformer import Block
from timm.models.vision_transformer import checkpoint_filter_fn as vit_checkpoint_filter_fn
from torch import Tensor

from regard.backbones._published import published_cfg, renamed, unwrapped
from regard.mixers import Sparsifiner

__all__ = ["GridBlock", "GridVisionTransformer", "checkpoint_filter_fn", "default_cfgs"]

# The official names of the predictor's parameters, and ours.
_RENAMED = (
    (r"\.attn\.mask_predictor\.proj_c_q\.", ".attn.predictor.query."),
    (r"\.attn\.mask_predictor\.proj_c_k\.", ".attn.predictor.key."),
    (r"\.attn\.mask_predictor\.proj_n", ".attn.predictor.down"),
    (r"\.attn\.mask_predictor\.proj_back_n", ".attn.predictor.up"),
)


# No address: the authors publish no weights.
default_cfgs = generate_default_cfgs({"sparsifiner_deit_small": published_cfg("patch_embed.proj")})


class GridBlock(Block):
    """timm's block, whose mixer is told the tokens' grid."""

    def forward(
        self,
        x: Tensor,
        attn_mask: Tensor | None = None,
        is_causal: bool = False,
        grid_size: tuple[int, int] | None = None,
    ) -> Tensor:
        """As in timm; grid_size as in AttentionMixer."""
        mixed = self.attn(self.norm1(x), attn_mask, is_causal, grid_size=grid_size)
        x = x + self.drop_path1(self.ls1(mixed))
        return x + self.drop_path2(self.ls2(self.mlp(self.norm2(x))))


class GridVisionTransformer(VisionTransformer):
    """timm's VisionTransformer, whose blocks are told the tokens' grid: for mixers that need it on images of any shape.

    Raises:
        ValueError: patch_drop_rate is not 0; what is left of a grid is none.
    """

    def __init__(self, *args: Any, patch_drop_rate: float = 0.0, **options: Any) -> None:
        if patch_drop_rate != 0.0:
            raise ValueError(f"patch_drop_rate: expected 0, got {patch_drop_rate}; the mixer needs the whole grid")
        super().__init__(*args, **{**options, "block_fn": GridBlock})

    def forward_features(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        """(B, 3, H, W) -> (B, N, C), prefix tokens first."""
        last, _ = self._run(x, [], len(self.blocks) - 1, attn_mask, is_causal)
        return self.norm(last)

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | list[int] | None = None,
        return_prefix_tokens: bool = False,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
        output_dict: bool = False,
        attn_mask: Tensor | None = None,
        is_causal: bool = False,
    ) -> Any:
        """As in timm's VisionTransformer."""
        if output_fmt not in ("NCHW", "NLC"):
            raise ValueError(f"output_fmt: expected 'NCHW' or 'NLC', got {output_fmt!r}")
        take, last_index = feature_take_indices(len(self.blocks), indices)
        if not stop_early:
            last_index = len(self.blocks) - 1
        last, kept = self._run(x, take, last_index, attn_mask, is_causal)
        if norm:
            kept = [self.norm(tokens) for tokens in kept]
        prefix = [tokens[:, : self.num_prefix_tokens] for tokens in kept]
        maps = [tokens[:, self.num_prefix_tokens :] for tokens in kept]
        if output_fmt == "NCHW":
            grid = self.patch_embed.dynamic_feat_size((x.shape[-2], x.shape[-1]))
            maps = [tokens.unflatten(1, grid).permute(0, 3, 1, 2).contiguous() for tokens in maps]
        if output_dict:
            found: dict[str, Any] = {"image_intermediates": maps}
            if return_prefix_tokens:
                found["image_intermediates_prefix"] = prefix
            if not intermediates_only:
                found["image_features"] = self.norm(last)
            return found
        intermediates = list(zip(maps, prefix, strict=True)) if return_prefix_tokens else maps
        return intermediates if intermediates_only else (self.norm(last), intermediates)

    def _run(
        self, x: Tensor, take: Sequence[int], last_index: int, attn_mask: Tensor | None, is_causal: bool
    ) -> tuple[Tensor, list[Tensor]]:
        """The tokens after block `last_index`, and after the blocks in `take`."""
        grid = self.patch_embed.dynamic_feat_size((x.shape[-2], x.shape[-1]))
        x = self.norm_pre(self._pos_embed(self.patch_embed(x)))
        kept = []
        for index, block in enumerate(self.blocks[: last_index + 1]):
            if self.grad_checkpointing:
                x = checkpoint(block, x, attn_mask, is_causal, grid)
            else:
                x = block(x, attn_mask, is_causal, grid)
            if index in take:
                kept.append(x)
        return x, kept


def checkpoint_filter_fn(state_dict: dict[str, Any], model: VisionTransformer) -> dict[str, Tensor]:
    """Read a checkpoint of the official training script, or a state_dict of ours or of a dense DeiT, into our names.

    Args:
        state_dict: the file's content; the weights may stand under "model", and names may carry the "module." of
            DistributedDataParallel.
        model: the model to load into; position embeddings and patch projection are resampled to its size. The tables
            of the predictors stay: the model resamples them to what it sees.
    """
    return vit_checkpoint_filter_fn(renamed(unwrapped(state_dict, ("model",)), _RENAMED), model)


@register_model
def sparsifiner_deit_small(
    pretrained: bool = False,
    *,
    budget: int | float = Sparsifiner.budget,
    official: bool = True,
    basis_grid: tuple[int, int] = Sparsifiner.basis_grid,
    **options: Any,
) -> GridVisionTransformer:
    """Sparsifiner DeiT-Small, 22,251,880 parameters.

    Args:
        budget: keys each query keeps, an int or a fraction; `regard.mixers.sparsifiner.set_budget` changes it.
        official: compute scores as the published code does; its weights need that.
        basis_grid: the grid that the predictor has rows for; the official code's is always the image's own.
        options: of timm's VisionTransformer; by default images of any size are taken (dynamic_img_size,
            dynamic_img_pad).
    """
    sparsifiner = Sparsifiner(budget, basis_grid=basis_grid, official=official)
    architecture: dict[str, Any] = {"patch_size": 16, "embed_dim": 384, "depth": 12, "num_heads": 6}
    sizes: dict[str, Any] = {"dynamic_img_size": True, "dynamic_img_pad": True}
    settings = {**architecture, **sizes, **options}
    prefix = int(settings.get("class_token", True)) + settings.get("reg_tokens", 0)
    return build_model_with_cfg(
        GridVisionTransformer,
        "sparsifiner_deit_small",
        pretrained,
        pretrained_filter_fn=checkpoint_filter_fn,
        feature_cfg={"out_indices": settings.pop("out_indices", 3), "feature_cls": "getter"},
        attn_layer=sparsifiner.attn_layer(num_prefix_tokens=prefix),
        **settings,
    )
