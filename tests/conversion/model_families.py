"""The model families that conversion must handle: their smallest variants, at reduced depth and size."""

import copy
import functools
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass, field

import pytest
import timm
import torch
from torch import nn


@dataclass(frozen=True)
class Family:
    """How to build a model, and what conversion must find in it.

    Args:
        build: makes the model.
        shape: of its input.
        converted: how many attention modules take a mechanism.
        left: classes of the others, with a word of the reason.
        prefix: how many prefix tokens the converted modules have, in the order of their calls; None if all have none.
        names_size: True if the model says what size of images it takes; None if that depends on timm's version.
        needs: the library that it comes from, if it is not one of regard's own dependencies.
    """

    build: Callable[[], nn.Module]
    shape: tuple[int, ...]
    converted: int
    left: dict[str, str] = field(default_factory=dict)
    prefix: tuple[int, ...] | None = None
    names_size: bool | None = True
    needs: str = "torch"


def timm_model(name: str, **options) -> Callable[[], nn.Module]:
    return functools.partial(timm.create_model, name, num_classes=5, **options)


def _square(side: int) -> tuple[int, ...]:
    return (2, 3, side, side)


def _nest() -> nn.Module:
    from timm.models.nest import Nest

    return Nest(img_size=64, embed_dims=(32, 32, 64), num_heads=(2, 2, 4), depths=(1, 1, 1), num_classes=5)


def _volo() -> nn.Module:
    from timm.models.volo import VOLO

    options = {"embed_dims": (32, 48, 48, 48), "num_heads": (2, 4, 4, 4), "stem_hidden_dim": 16}
    return VOLO((1, 1, 1, 1), img_size=64, num_classes=5, **options)


def _gcvit() -> nn.Module:
    from timm.models.gcvit import GlobalContextVit

    return GlobalContextVit(
        img_size=64, window_size=(4, 4, 4, 2), embed_dim=16, depths=(2, 2, 1, 1), num_heads=(1, 2, 2, 2), num_classes=5
    )


def _mvit(use_cls_token: bool) -> nn.Module:
    from timm.models.mvitv2 import MultiScaleVit, MultiScaleVitCfg

    cfg = MultiScaleVitCfg(depths=(1, 1, 1), embed_dim=16, num_heads=1, use_cls_token=use_cls_token)
    return MultiScaleVit(cfg, img_size=64, num_classes=5)


def _levit(use_conv: bool) -> nn.Module:
    from timm.models.levit import Levit

    sizes = {"embed_dim": (32, 48), "key_dim": 8, "depth": (2, 1), "num_heads": (2, 3)}
    return Levit(img_size=112, num_classes=5, use_conv=use_conv, **sizes)


def _maxvit() -> nn.Module:
    from timm.models.maxxvit import MaxxVit, MaxxVitCfg

    cfg = MaxxVitCfg(embed_dim=(32, 32), depths=(1, 1), block_type=("M", "M"), stem_width=16, head_hidden_size=32)
    return MaxxVit(cfg, img_size=64, num_classes=5)


def _crossvit() -> nn.Module:
    from timm.models.crossvit import CrossVit

    return CrossVit(
        img_size=64,
        img_scale=(1.0, 0.875),
        patch_size=(8, 14),
        embed_dim=(32, 48),
        depth=((1, 2, 0),),
        num_heads=(2, 2),
        mlp_ratio=(2.0, 2.0, 1.0),
        num_classes=5,
    )


_SMALL = {"embed_dim": 48, "num_heads": 3, "img_size": 64}
_WINDOWS = {"embed_dim": 24, "num_heads": (1, 2, 2), "depths": (2, 2, 1), "window_size": 4, "img_size": 64}
_CLASS = "one query looks at all tokens"
_CHANNELS = "channels to channels"

FAMILIES: dict[str, Family] = {
    "vit": Family(timm_model("vit_tiny_patch16_224", depth=2, **_SMALL), _square(64), 2, prefix=(1, 1)),
    "deit": Family(timm_model("deit_tiny_patch16_224", depth=2, **_SMALL), _square(64), 2, prefix=(1, 1)),
    "deit-distilled": Family(
        timm_model("deit_tiny_distilled_patch16_224", depth=2, **_SMALL), _square(64), 2, prefix=(2, 2)
    ),
    "dinov2": Family(
        timm_model("vit_small_patch14_reg4_dinov2", depth=2, embed_dim=48, num_heads=3, img_size=56),
        _square(56),
        2,
        prefix=(5, 5),
    ),
    "dinov3": Family(timm_model("vit_small_patch16_dinov3", depth=2, **_SMALL), _square(64), 2, prefix=(5, 5)),
    "eva02": Family(
        timm_model("eva02_tiny_patch14_224", depth=2, embed_dim=48, num_heads=3, img_size=56),
        _square(56),
        2,
        prefix=(1, 1),
    ),
    "beit": Family(timm_model("beit_base_patch16_224", depth=2, **_SMALL), _square(64), 2, prefix=(1, 1)),
    "sam": Family(
        timm_model("samvit_base_patch16", depth=2, window_size=3, global_attn_indexes=(1,), **_SMALL),
        _square(64),
        2,
    ),
    "pit": Family(
        timm_model("pit_ti_224", img_size=64, depth=(1, 1, 1), base_dims=(16, 16, 16), heads=(1, 2, 4)),
        _square(64),
        3,
        prefix=(1, 1, 1),
    ),
    "pvt-v2": Family(timm_model("pvt_v2_b0", depths=(1, 1, 1, 1)), _square(64), 4),
    "twins-svt": Family(
        timm_model("twins_svt_small", depths=(2, 2, 1, 1), embed_dims=(16, 16, 32, 32), num_heads=(1, 1, 2, 2)),
        _square(64),
        6,
    ),
    "twins-pcpvt": Family(
        timm_model("twins_pcpvt_small", depths=(1, 1, 1, 1), embed_dims=(16, 16, 32, 32), num_heads=(1, 1, 2, 2)),
        _square(64),
        4,
    ),
    "crossvit": Family(_crossvit, _square(64), 3, left={"CrossAttention": "one query looks at"}, prefix=(1, 1, 1)),
    "hiera": Family(
        timm_model(
            "hiera_tiny_224", img_size=(64, 64), stages=(1, 1, 1), embed_dim=16, q_pool=2, mask_unit_size=(8, 8)
        ),
        _square(64),
        3,
        names_size=False,
    ),
    "nest": Family(_nest, _square(64), 3),
    "maxvit": Family(_maxvit, _square(64), 4, names_size=None),
    "volo": Family(
        _volo,
        _square(64),
        3,
        left={"OutlookAttention": "outlook attention", "ClassAttention": _CLASS},
        names_size=False,
    ),
    "cait": Family(
        timm_model("cait_xxs24_224", img_size=64, depth=2, embed_dim=32),
        _square(64),
        2,
        left={"ClassAttn": _CLASS},
    ),
    "xcit": Family(
        timm_model("xcit_nano_12_p16_224", img_size=64, depth=2, embed_dim=32),
        _square(64),
        0,
        left={"XCA": _CHANNELS, "ClassAttn": _CLASS},
    ),
    "siglip": Family(
        timm_model("vit_base_patch16_siglip_224", depth=2, **_SMALL),
        _square(64),
        2,
        left={"AttentionPoolLatent": _CLASS},
    ),
    "clip": Family(timm_model("vit_base_patch16_clip_224", depth=2, **_SMALL), _square(64), 2, prefix=(1, 1)),
    "swin": Family(timm_model("swin_tiny_patch4_window7_224", **_WINDOWS), _square(64), 5),
    "swin-v2": Family(timm_model("swinv2_tiny_window8_256", **_WINDOWS), _square(64), 5),
    "swin-v2-cr": Family(timm_model("swinv2_cr_tiny_224", **_WINDOWS), _square(64), 5),
    "tnt": Family(
        timm_model("tnt_s_patch16_224", img_size=64, depth=2, embed_dim=48, inner_dim=16, num_heads_outer=3),
        _square(64),
        4,
        prefix=(0, 1, 0, 1),
    ),
    "visformer": Family(
        timm_model("visformer_tiny", img_size=64, embed_dim=64, depth=(1, 1, 1), num_heads=2), _square(64), 2
    ),
    "levit": Family(functools.partial(_levit, False), _square(112), 4, names_size=False),
    "levit-conv": Family(functools.partial(_levit, True), _square(112), 4, names_size=False),
    "mvit-v2": Family(functools.partial(_mvit, False), _square(64), 3, names_size=False),
    "mvit-v2-cls": Family(functools.partial(_mvit, True), _square(64), 3, prefix=(1, 1, 1), names_size=False),
    "gcvit": Family(_gcvit, _square(64), 6, names_size=False),
    "naflexvit": Family(
        timm_model("naflexvit_base_patch16_gap", depth=2, embed_dim=48, num_heads=3), _square(64), 2, prefix=(4, 4)
    ),
    "davit": Family(
        timm_model("davit_tiny", depths=(1, 1), embed_dims=(16, 32), num_heads=(1, 2)),
        _square(64),
        2,
        left={"ChannelAttention": _CHANNELS},
    ),
}


def _torchvision_vit() -> nn.Module:
    from torchvision.models import VisionTransformer

    return VisionTransformer(64, 16, 2, 4, 48, 96, num_classes=5)


def _torchvision_swin(version: int) -> nn.Module:
    from torchvision.models import swin_transformer as swin

    newer = {"block": swin.SwinTransformerBlockV2, "downsample_layer": swin.PatchMergingV2} if version == 2 else {}
    return swin.SwinTransformer([4, 4], 24, [2, 2], [1, 2], [4, 4], num_classes=5, **newer)


def _encoder(layers: int) -> nn.Module:
    layer = nn.TransformerEncoderLayer(32, 4, 64, batch_first=True)
    return nn.TransformerEncoder(layer, layers) if layers else layer


_TRANSFORMERS_VIT = {"num_hidden_layers": 2, "intermediate_size": 64, "image_size": 64, "patch_size": 16} | {
    "hidden_size": 48,
    "num_attention_heads": 3,
}


def _transformers(name: str, **options) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        import transformers

        config = getattr(transformers, name.replace("Model", "Config"))(**(options or _TRANSFORMERS_VIT))
        return getattr(transformers, name)(config)

    return build


def _open_clip_tower() -> nn.Module:
    import open_clip

    vision = {"image_size": 64, "patch_size": 16, "width": 64, "layers": 2, "head_width": 16}
    text = {"context_length": 16, "vocab_size": 100, "width": 32, "heads": 2, "layers": 1}
    return open_clip.model.CLIP(embed_dim=32, vision_cfg=vision, text_cfg=text).visual


_SEGFORMER = {"depths": [1, 1, 1, 1], "hidden_sizes": [16, 16, 32, 32], "num_attention_heads": [1, 1, 2, 2]}

FAMILIES |= {
    "torch-layer": Family(functools.partial(_encoder, 0), (2, 10, 32), 1, names_size=False),
    "torch-encoder": Family(functools.partial(_encoder, 2), (2, 10, 32), 2, names_size=False),
    "torchvision-vit": Family(_torchvision_vit, _square(64), 2, prefix=(1, 1)),
    "torchvision-swin": Family(functools.partial(_torchvision_swin, 1), (2, 3, 72, 64), 4, names_size=False),
    "torchvision-swin-v2": Family(functools.partial(_torchvision_swin, 2), (2, 3, 72, 64), 4, names_size=False),
    "open-clip": Family(_open_clip_tower, _square(64), 2, prefix=(1, 1), needs="open_clip"),
} | {
    f"transformers-{name}": Family(_transformers(kind), _square(64), 2, left, prefix, needs="transformers")
    for name, kind, left, prefix in (
        ("vit", "ViTModel", {}, (1, 1)),
        ("dinov2", "Dinov2Model", {}, (1, 1)),
        ("dinov2-registers", "Dinov2WithRegistersModel", {}, (5, 5)),
        ("siglip", "SiglipVisionModel", {"MultiheadAttention": _CLASS}, None),
        ("clip", "CLIPVisionModel", {}, (1, 1)),
    )
}
FAMILIES["transformers-beit"] = Family(
    _transformers("BeitModel", **_TRANSFORMERS_VIT, use_relative_position_bias=True),
    _square(64),
    2,
    prefix=(1, 1),
    needs="transformers",
)
FAMILIES["transformers-segformer"] = Family(
    _transformers("SegformerModel", **_SEGFORMER), _square(64), 4, names_size=False, needs="transformers"
)


def randomise(model: nn.Module, seed: int = 0) -> nn.Module:
    """Give every parameter a value that shows: nothing is zero or tiny, as at a model's start."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.dim() == 0:
                continue
            if name.endswith("bias") and parameter.dim() == 1:
                parameter.copy_(0.3 * noise)
            elif parameter.dim() == 1:  # scales of norms and layers
                parameter.copy_(1.0 + 0.2 * noise)
            elif any(word in name for word in ("pos", "bias", "token", "logit")):  # tables
                parameter.copy_(parameter + 0.5 * noise)
            else:
                parameter.copy_(noise * 1.4 * parameter[0].numel() ** -0.5)
    return model


def settle(model: nn.Module, images: torch.Tensor) -> nn.Module:
    """Give batch norms the statistics of these images, so that activations neither grow nor fade with depth."""
    norms = [module for module in model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.momentum = 1.0
    with torch.no_grad():
        model.train()(images)
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
    return model.eval()


@functools.cache
def built(name: str) -> nn.Module:
    """A family's model in float64 and evaluation mode, built once: for tests that leave it as it is."""
    torch.manual_seed(0)
    return settle(randomise(FAMILIES[name].build()).double(), images_for(name))


def fresh(name: str) -> nn.Module:
    """A copy of it, for tests that change it; without the caches that some models fill."""
    return copy.deepcopy(built(name)).train().eval()


def images_for(name: str, seed: int = 1) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(FAMILIES[name].shape, generator=generator, dtype=torch.float64)


def output_of(model: nn.Module, images: torch.Tensor) -> torch.Tensor:
    """The model's first output tensor."""
    output = model(images)
    while not isinstance(output, torch.Tensor):
        output = output[0]
    return output


def _missing(family: Family) -> bool:
    return importlib.util.find_spec(family.needs) is None


def parametrised(*names: str):
    """Run a test for these families, or for all that take a mechanism."""
    chosen = names or tuple(name for name, family in FAMILIES.items() if family.converted)
    params = [
        pytest.param(
            name,
            marks=pytest.mark.skipif(_missing(FAMILIES[name]), reason=f"{FAMILIES[name].needs} is not installed"),
        )
        for name in chosen
    ]
    return pytest.mark.parametrize("name", params)
