"""So-ViT: a vision transformer that classifies by second-order statistics of its tokens (arXiv 2104.10935, version 1).

The image's tokens come from three residual convolution blocks; the classifier adds to the class token's logits those of
the covariance of two projections of all other tokens, its leading singular value brought to its square root.
Checkpoints of the official implementation (jiangtaoxie/So-ViT at f0a3e56; the repository and the paper's second version
have since turned to another model, SoT) load through `checkpoint_filter_fn`.
"""

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from timm.models.resnet import Bottleneck, downsample_conv
from torch import Tensor, nn

from regard.backbones._published import published_cfg, renamed, unwrapped
from regard.backbones._vit import ImageTokens, SinusoidalViT, with_positions_of
from regard.ops._arguments import autocast_off

__all__ = ["SecondOrderPool", "SoViT", "cfg", "checkpoint_filter_fn", "create_so_vit", "default_cfgs"]


class ConvTokens(ImageTokens):
    """The image's tokens by a convolution, a pooling and three residual blocks, each pooling or block of stride 2."""

    def __init__(
        self,
        img_size: int | tuple[int, int] = 224,
        patch_size: int = 16,
        in_chans: int = 3,
        embed_dim: int = 384,
        strict_img_size: bool = True,
        output_fmt: str | None = None,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **_: Any,
    ) -> None:
        super().__init__(img_size, strict_img_size, output_fmt)
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        planes, width = 64, 64 * Bottleneck.expansion
        self.stem = nn.Conv2d(in_chans, planes, 3, padding=1, **factory)
        self.stages = nn.Sequential(
            *(
                Bottleneck(
                    inplanes,
                    planes,
                    stride=2,
                    downsample=downsample_conv(inplanes, width, 1, stride=2, **factory),
                    norm_layer=partial(nn.BatchNorm2d, eps=1e-3, momentum=0.01),  # type: ignore[arg-type]
                    **factory,
                )
                for inplanes in (planes, width, width)
            )
        )
        self.proj = nn.Conv2d(width, embed_dim, 1, **factory)

    def dynamic_feat_size(self, img_size: tuple[int, int]) -> tuple[int, int]:
        height, width = img_size
        return -(-height // 16), -(-width // 16)

    def embed(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(self.stem(x), 3, stride=2, padding=1)
        return self.proj(self.stages(x)).flatten(2).transpose(1, 2)


class SecondOrderPool(nn.Module):
    """The normalised covariance of two projections of the tokens: (B, N, C) -> (B, widths[0] * widths[1]).

    Singular value power normalisation: of the covariance X the largest singular value s is estimated with its vectors
    u, v by one power iteration from a learned start, and with R = X - s u v^T the result is
    s^1/2 u v^T + R / (s^1/2 + 1e-5). Computed in float32 at least.
    """

    _EPS = 1e-5
    # Below this s counts as zero: its square root has no gradient there. Alike tokens have no covariance.
    _TINY = 1e-20

    def __init__(self, dim: int, widths: tuple[int, int], **factory: Any) -> None:
        super().__init__()
        self.out_features = widths[0] * widths[1]
        self.reduce = nn.ModuleList(nn.Linear(dim, width, bias=False, **factory) for width in widths)
        self.bn = nn.ModuleList(nn.BatchNorm1d(width, **factory) for width in widths)
        self.start = nn.Parameter(torch.empty(widths[0], **factory))
        self.init_weights()

    def init_weights(self) -> None:
        for layer in self.reduce:
            nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")  # type: ignore[arg-type]
        nn.init.normal_(self.start)

    def forward(self, x: Tensor) -> Tensor:
        parts = [F.relu(bn(layer(x).transpose(1, 2))) for layer, bn in zip(self.reduce, self.bn, strict=True)]
        with autocast_off(x.device.type):
            first, second = (part if part.dtype == torch.float64 else part.float() for part in parts)
            first, second = (part - part.mean(dim=-1, keepdim=True) for part in (first, second))
            covariance = first @ second.transpose(1, 2) / x.shape[1]
            return self._normalized(covariance).flatten(1).to(x.dtype)

    def _normalized(self, x: Tensor) -> Tensor:
        """(B, D, E), with the leading singular value's power taken."""
        start = self.start.to(x.dtype).expand(x.shape[0], -1).unsqueeze(-1)
        right = F.normalize(x.transpose(1, 2) @ start, dim=1)
        left = F.normalize(x @ right, dim=1)
        value = (left.transpose(1, 2) @ x @ right).clamp_min(self._TINY)
        leading = left @ right.transpose(1, 2)
        root = value.sqrt()
        return root * leading + (x - value * leading) / (root + self._EPS)


class SoViT(SinusoidalViT):
    """So-ViT for images of any size.

    Args:
        pool_widths: widths of the two projections whose covariance is taken.
        pool_drop_rate: dropout of the covariance before its classifier. The authors trained 14 and 19 with 0.5.
        global_pool: "token": the class token and the covariance; "": the tokens, without a classifier.
        options: as in SinusoidalViT and timm's VisionTransformer.

    Raises:
        ValueError: global_pool is neither of the two.
    """

    def __init__(
        self,
        *,
        embed_dim: int = 256,
        num_classes: int = 1000,
        pool_widths: tuple[int, int] = (48, 24),
        pool_drop_rate: float = 0.0,
        global_pool: str = "token",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **options: Any,
    ) -> None:
        _check_pool(global_pool, num_classes)
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        super().__init__(
            embed_layer=ConvTokens, embed_dim=embed_dim, num_classes=0, global_pool=global_pool, **options, **factory
        )
        self.second_order = SecondOrderPool(embed_dim, pool_widths, **factory)
        self.pool_drop = nn.Dropout(pool_drop_rate)
        self.head_hidden_size = embed_dim + self.second_order.out_features
        self.reset_classifier(num_classes)

    def get_classifier(self) -> tuple[nn.Module, nn.Module]:  # type: ignore[override]
        """The class token's and the covariance's; their logits are added."""
        return self.head, self.head_second_order

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        _check_pool(self.global_pool if global_pool is None else global_pool, num_classes)
        super().reset_classifier(0, global_pool)
        self.num_classes = num_classes
        self.head = self._classifier(self.embed_dim)
        self.head_second_order = self._classifier(self.second_order.out_features)

    def _classifier(self, width: int) -> nn.Linear | nn.Identity:
        if self.num_classes == 0:
            return nn.Identity()
        like = self.second_order.start
        head = nn.Linear(width, self.num_classes, device=like.device, dtype=like.dtype).train(self.training)
        nn.init.trunc_normal_(head.weight, std=0.02)
        nn.init.zeros_(head.bias)
        return head

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Features of `forward_features` -> (B, num_classes). Before the classifiers, or without them: the class token
        and the covariance, joined, (B, head_hidden_size). Without pooling: the tokens."""
        if not self.global_pool:
            return x
        token = self.head_drop(x[:, 0])
        pooled = self.pool_drop(self.second_order(x[:, self.num_prefix_tokens :]))
        if pre_logits or self.num_classes == 0:
            return torch.cat([token, pooled], dim=1)
        return self.head(token) + self.head_second_order(pooled)


def _check_pool(global_pool: str, num_classes: int) -> None:
    if global_pool not in ("token", ""):
        raise ValueError(f"global_pool: expected 'token' or '', got {global_pool!r}")
    if not global_pool and num_classes:
        raise ValueError("global_pool: '' leaves no covariance to classify; give it with num_classes=0, or 'token'")


def cfg() -> dict[str, Any]:
    return published_cfg("patch_embed.stem", classifier=("head", "head_second_order"))


default_cfgs = generate_default_cfgs({f"so_vit_{size}": cfg() for size in (7, 10, 14, 19)})

# Official names -> ours.
_RENAMED = (
    (r"^visual_tokens\.tokens\.stem\.0\.", "patch_embed.stem."),
    (r"^visual_tokens\.tokens\.stage\.", "patch_embed.stages."),
    (r"^visual_tokens\.tokens\.transition\.", "patch_embed.proj."),
    (r"^classifier\.cls_fc\.", "head."),
    (r"^classifier\.visual_fc\.", "head_second_order."),
    (r"^classifier\.representation\.conv_dr_block\.(\d)\.0\.", r"second_order.reduce.\1."),
    (r"^classifier\.representation\.conv_dr_block\.(\d)\.1\.", r"second_order.bn.\1."),
    (r"^classifier\.normalization\.weight$", "second_order.start"),
)


def checkpoint_filter_fn(state_dict: dict[str, Any], model: SoViT) -> dict[str, Tensor]:
    """Read a checkpoint of the official training script, or a bare state_dict, into our names.

    Args:
        state_dict: the file's content; the weights may stand under "state_dict_ema" (taken first), "state_dict" or
            "model", and names may carry the "module." of DistributedDataParallel. A state_dict of ours stays as it is.
        model: the model to load into; the position embedding is resampled to its size.
    """
    weights = renamed(unwrapped(state_dict), _RENAMED)
    # 1 x 1 convolutions there, linear layers here
    weights = {n: w.flatten(1) if n.startswith("second_order.reduce.") else w for n, w in weights.items()}
    return with_positions_of(weights, model)


_SIZES: dict[str, dict[str, Any]] = {
    "7": {"depth": 7, "embed_dim": 256, "num_heads": 4, "mlp_ratio": 2.0, "pool_widths": (48, 24)},
    "10": {"depth": 10, "embed_dim": 256, "num_heads": 4, "mlp_ratio": 2.0, "pool_widths": (48, 24)},
    "14": {"depth": 14, "embed_dim": 384, "num_heads": 6, "mlp_ratio": 3.0, "pool_widths": (64, 48)},
    "19": {"depth": 19, "embed_dim": 448, "num_heads": 7, "mlp_ratio": 3.0, "pool_widths": (96, 48)},
}


def create_so_vit(variant: str, pretrained: bool, options: dict[str, Any]) -> SoViT:
    """Build a variant through timm: its size is its name's last part."""
    return build_model_with_cfg(
        SoViT,
        variant,
        pretrained,
        pretrained_filter_fn=checkpoint_filter_fn,
        feature_cfg={"out_indices": options.pop("out_indices", 3), "feature_cls": "getter"},
        **{**_SIZES[variant.rpartition("_")[2]], **options},
    )


@register_model
def so_vit_7(pretrained: bool = False, **options: Any) -> SoViT:
    """So-ViT-7, 5,579,664 parameters."""
    return create_so_vit("so_vit_7", pretrained, options)


@register_model
def so_vit_10(pretrained: bool = False, **options: Any) -> SoViT:
    """So-ViT-10, 7,158,672 parameters."""
    return create_so_vit("so_vit_10", pretrained, options)


@register_model
def so_vit_14(pretrained: bool = False, **options: Any) -> SoViT:
    """So-ViT-14, 24,718,704 parameters."""
    return create_so_vit("so_vit_14", pretrained, options)


@register_model
def so_vit_19(pretrained: bool = False, **options: Any) -> SoViT:
    """So-ViT-19, 43,887,696 parameters."""
    return create_so_vit("so_vit_19", pretrained, options)
