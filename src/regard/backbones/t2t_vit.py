"""T2T-ViT: a vision transformer whose tokens are made from overlapping tokens, three times (arXiv 2101.11986).

Neighbouring pixels, then neighbouring tokens are joined into one (a "soft split"), and between two splits all tokens
attend to each other: in `t2t_vit_t_*` by dense attention, in `t2t_vit_*` by a Performer's random features, whose cost
grows with the number of tokens alone. Checkpoints of the official implementation (yitu-opensource/T2T-ViT) load through
`checkpoint_filter_fn`.
"""

import math
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import Mlp
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from torch import Tensor, nn

from regard.backbones._attention import AttnLayer, attn_layers
from regard.backbones._published import published_cfg, renamed, unwrapped
from regard.backbones._vit import ImageTokens, SinusoidalViT, with_positions_of
from regard.mixers import AttentionMixer, DenseAttention
from regard.ops._arguments import autocast_off

__all__ = ["T2TViT", "cfg", "checkpoint_filter_fn", "create_t2t_vit", "default_cfgs"]

Grid = tuple[int, int]

# Kernel, stride and padding of the soft splits.
_SPLITS = ((7, 4, 2), (3, 2, 1), (3, 2, 1))
_TOKEN_DIM = 64


def _grids(size: tuple[int, int]) -> list[Grid]:
    """The grids after each soft split of an image (height, width)."""
    grids = []
    for kernel, stride, padding in _SPLITS:
        height, width = ((side + 2 * padding - kernel) // stride + 1 for side in size)
        size = (height, width)
        grids.append(size)
    return grids


class TokenTransformer(nn.Module):
    """One head of attention over joined tokens, and an MLP: (B, N, C) -> (B, N, 64).

    The tokens become narrower, so that the values take the place of the residual path. The logits are scaled by C^-0.5,
    the width of the joined tokens, as in the official code.
    """

    def __init__(self, dim: int, attn_layer: type[AttentionMixer], **factory: Any) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, **factory)
        self.attn = attn_layer(dim, 1, _TOKEN_DIM, _TOKEN_DIM, scale=dim**-0.5, **factory)
        self.norm2 = nn.LayerNorm(_TOKEN_DIM, **factory)
        self.mlp = Mlp(_TOKEN_DIM, **factory)

    def forward(self, x: Tensor, grid: Grid) -> Tensor:
        x = self.norm1(x)
        weight, bias = self.attn.qkv.weight, self.attn.qkv.bias
        value = F.linear(x, weight[-_TOKEN_DIM:], None if bias is None else bias[-_TOKEN_DIM:])
        x = value + self.attn(x, grid_size=grid)
        return x + self.mlp(self.norm2(x))


class TokenPerformer(nn.Module):
    """As TokenTransformer, with the exponential replaced by products of 32 random features (arXiv 2009.14794).

    The features' directions are fixed, orthogonal, and part of the weights. Dropout is 0.1 after the projection and
    after the MLP, as published. Attention is computed in float32 at least: its exponentials are not bounded.
    """

    _DROP = 0.1
    _EPS = 1e-8

    def __init__(self, dim: int, **factory: Any) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, **factory)
        self.qkv = nn.Linear(dim, 3 * _TOKEN_DIM, **factory)
        self.directions = nn.Parameter(torch.empty(_TOKEN_DIM // 2, _TOKEN_DIM, **factory), requires_grad=False)
        self.proj = nn.Linear(_TOKEN_DIM, _TOKEN_DIM, **factory)
        self.proj_drop = nn.Dropout(self._DROP)
        self.norm2 = nn.LayerNorm(_TOKEN_DIM, **factory)
        self.mlp = Mlp(_TOKEN_DIM, drop=(0.0, self._DROP), **factory)
        self.init_weights()

    @torch.no_grad()
    def init_weights(self) -> None:
        directions = torch.empty_like(self.directions, dtype=torch.float32)  # half types have no QR
        self.directions.copy_(nn.init.orthogonal_(directions, gain=math.sqrt(len(directions))))

    def forward(self, x: Tensor, grid: Grid) -> Tensor:
        query, key, value = self.qkv(self.norm1(x)).chunk(3, dim=-1)
        with autocast_off(x.device.type):
            mixed = self._attend(
                *(part if part.dtype == torch.float64 else part.float() for part in (query, key, value))
            )
        x = value + self.proj_drop(self.proj(mixed.to(value.dtype)))
        return x + self.mlp(self.norm2(x))

    def _attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        query, key = self._features(query), self._features(key)
        mass = query @ key.sum(dim=1).unsqueeze(-1)
        return query @ (key.transpose(1, 2) @ value) / (mass + self._EPS)

    def _features(self, x: Tensor) -> Tensor:
        """(B, N, D) -> (B, N, features): their products approximate exp(q . k)."""
        exponent = x @ self.directions.to(x.dtype).T - x.square().sum(dim=-1, keepdim=True) / 2
        return exponent.exp() / math.sqrt(len(self.directions))


class TokensToToken(ImageTokens):
    """The image's tokens by three soft splits.

    Args:
        attn_layer: the mixer between the soft splits; None: the Performer.
        img_size, in_chans, embed_dim and the rest: as in timm's PatchEmbed.
    """

    def __init__(
        self,
        img_size: int | tuple[int, int] = 224,
        patch_size: int = 16,
        in_chans: int = 3,
        embed_dim: int = 384,
        strict_img_size: bool = True,
        output_fmt: str | None = None,
        *,
        attn_layer: type[AttentionMixer] | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **_: Any,
    ) -> None:
        super().__init__(img_size, strict_img_size, output_fmt)
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        joined = [in_chans * _SPLITS[0][0] ** 2, _TOKEN_DIM * _SPLITS[1][0] ** 2]
        self.tokens = nn.ModuleList(
            TokenPerformer(dim, **factory) if attn_layer is None else TokenTransformer(dim, attn_layer, **factory)
            for dim in joined
        )
        self.project = nn.Linear(_TOKEN_DIM * _SPLITS[2][0] ** 2, embed_dim, **factory)

    def dynamic_feat_size(self, img_size: tuple[int, int]) -> Grid:
        return _grids(img_size)[-1]

    def embed(self, x: Tensor) -> Tensor:
        grids = _grids((x.shape[-2], x.shape[-1]))
        for split, grid, tokens in zip(_SPLITS, grids, self.tokens, strict=False):
            x = tokens(_soft_split(x, *split), grid)
            x = x.transpose(1, 2).unflatten(2, grid)
        return self.project(_soft_split(x, *_SPLITS[-1]))


def _soft_split(x: Tensor, kernel: int, stride: int, padding: int) -> Tensor:
    """(B, C, H, W) -> (B, H' W', C kernel^2): overlapping windows as tokens."""
    return F.unfold(x, kernel, padding=padding, stride=stride).transpose(1, 2)


class T2TViT(SinusoidalViT):
    """T2T-ViT for images of any size.

    Args:
        tokens: what mixes the tokens between the soft splits, "performer" or "transformer".
        token_attn_layer: the mechanism there with "transformer", over 3136 and 784 tokens at 224 pixels.
        options: as in SinusoidalViT and timm's VisionTransformer; `attn_layer` is the mechanism of the blocks.

    Raises:
        ValueError: tokens is neither of the two, or token_attn_layer is given for "performer".
    """

    def __init__(self, *, tokens: str = "performer", token_attn_layer: AttnLayer | None = None, **options: Any) -> None:
        if tokens not in ("performer", "transformer"):
            raise ValueError(f"tokens: expected 'performer' or 'transformer', got {tokens!r}")
        if tokens == "performer" and token_attn_layer is not None:
            raise ValueError("token_attn_layer: a Performer takes no other mechanism; choose a model t2t_vit_t_*")
        layer = attn_layers(token_attn_layer or DenseAttention)[0] if tokens == "transformer" else None
        super().__init__(embed_layer=partial(TokensToToken, attn_layer=layer), **options)


def cfg(file: str = "") -> dict[str, Any]:
    return published_cfg(
        None,  # the first layer reads pixels of unfolded windows
        url=f"https://github.com/yitu-opensource/T2T-ViT/releases/download/main/{file}" if file else "",
        license="BSD-3-Clause-Clear",
    )


default_cfgs = generate_default_cfgs(
    {
        "t2t_vit_7": cfg("71.7_T2T_ViT_7.pth.tar"),
        "t2t_vit_10": cfg("75.2_T2T_ViT_10.pth.tar"),
        "t2t_vit_12": cfg("76.5_T2T_ViT_12.pth.tar"),
        "t2t_vit_14": cfg("81.5_T2T_ViT_14.pth.tar"),
        "t2t_vit_19": cfg("81.9_T2T_ViT_19.pth.tar"),
        "t2t_vit_24": cfg("82.3_T2T_ViT_24.pth.tar"),
        "t2t_vit_t_14": cfg("81.7_T2T_ViTt_14.pth.tar"),
        "t2t_vit_t_19": cfg("82.4_T2T_ViTt_19.pth.tar"),
        "t2t_vit_t_24": cfg("82.6_T2T_ViTt_24.pth.tar"),
    }
)

# Official names -> ours.
_RENAMED = (
    (r"^tokens_to_token\.attention1\.", "patch_embed.tokens.0."),
    (r"^tokens_to_token\.attention2\.", "patch_embed.tokens.1."),
    (r"^tokens_to_token\.", "patch_embed."),
    # the Performer's
    (r"^(patch_embed\.tokens\.\d\.)w$", r"\1directions"),
    (r"^(patch_embed\.tokens\.\d\.)mlp\.0\.", r"\1mlp.fc1."),
    (r"^(patch_embed\.tokens\.\d\.)mlp\.2\.", r"\1mlp.fc2."),
)


def checkpoint_filter_fn(state_dict: dict[str, Any], model: T2TViT) -> dict[str, Tensor]:
    """Read a checkpoint of the official training script, or a bare state_dict, into our names.

    Args:
        state_dict: the file's content; the weights may stand under "state_dict_ema" (taken first), "state_dict" or
            "model", and names may carry the "module." of DistributedDataParallel. A state_dict of ours stays as it is.
        model: the model to load into; the position embedding is resampled to its size.
    """
    weights = renamed(unwrapped(state_dict), _RENAMED)
    for name in [name for name in weights if ".kqv." in name]:  # the Performer's projection has the key first
        key, query, value = weights.pop(name).chunk(3)
        weights[name.replace(".kqv.", ".qkv.")] = torch.cat([query, key, value])
    return with_positions_of(weights, model)


_NARROW: dict[str, Any] = {"embed_dim": 256, "num_heads": 4, "mlp_ratio": 2.0}
_SIZES: dict[str, dict[str, Any]] = {
    "7": {"depth": 7, **_NARROW},
    "10": {"depth": 10, **_NARROW},
    "12": {"depth": 12, **_NARROW},
    "14": {"depth": 14, "embed_dim": 384, "num_heads": 6, "mlp_ratio": 3.0},
    "19": {"depth": 19, "embed_dim": 448, "num_heads": 7, "mlp_ratio": 3.0},
    "24": {"depth": 24, "embed_dim": 512, "num_heads": 8, "mlp_ratio": 3.0},
}


def create_t2t_vit(variant: str, pretrained: bool, options: dict[str, Any]) -> T2TViT:
    """Build a variant through timm: its size is its name's last part, `_t_` before it means token transformers."""
    size = _SIZES[variant.rpartition("_")[2]]
    tokens = "transformer" if "_t_" in variant else "performer"
    return build_model_with_cfg(
        T2TViT,
        variant,
        pretrained,
        pretrained_filter_fn=checkpoint_filter_fn,
        feature_cfg={"out_indices": options.pop("out_indices", 3), "feature_cls": "getter"},
        **{"tokens": tokens, **size, **options},
    )


@register_model
def t2t_vit_7(pretrained: bool = False, **options: Any) -> T2TViT:
    """T2T-ViT-7, 4,310,222 parameters."""
    return create_t2t_vit("t2t_vit_7", pretrained, options)


@register_model
def t2t_vit_10(pretrained: bool = False, **options: Any) -> T2TViT:
    """T2T-ViT-10, 5,889,230 parameters."""
    return create_t2t_vit("t2t_vit_10", pretrained, options)


@register_model
def t2t_vit_12(pretrained: bool = False, **options: Any) -> T2TViT:
    """T2T-ViT-12, 6,941,902 parameters."""
    return create_t2t_vit("t2t_vit_12", pretrained, options)


@register_model
def t2t_vit_14(pretrained: bool = False, **options: Any) -> T2TViT:
    """T2T-ViT-14, 21,545,550 parameters."""
    return create_t2t_vit("t2t_vit_14", pretrained, options)


@register_model
def t2t_vit_19(pretrained: bool = False, **options: Any) -> T2TViT:
    """T2T-ViT-19, 39,177,422 parameters."""
    return create_t2t_vit("t2t_vit_19", pretrained, options)


@register_model
def t2t_vit_24(pretrained: bool = False, **options: Any) -> T2TViT:
    """T2T-ViT-24, 64,105,934 parameters."""
    return create_t2t_vit("t2t_vit_24", pretrained, options)


@register_model
def t2t_vit_t_14(pretrained: bool = False, **options: Any) -> T2TViT:
    """T2T-ViT-t-14 (token transformers), 21,541,070 parameters."""
    return create_t2t_vit("t2t_vit_t_14", pretrained, options)


@register_model
def t2t_vit_t_19(pretrained: bool = False, **options: Any) -> T2TViT:
    """T2T-ViT-t-19 (token transformers), 39,172,942 parameters."""
    return create_t2t_vit("t2t_vit_t_19", pretrained, options)


@register_model
def t2t_vit_t_24(pretrained: bool = False, **options: Any) -> T2TViT:
    """T2T-ViT-t-24 (token transformers), 64,101,454 parameters."""
    return create_t2t_vit("t2t_vit_t_24", pretrained, options)
