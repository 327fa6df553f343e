"""BiFormer backbones: parity with the official implementation, its checkpoints, its padding and its layouts."""

import copy
import re
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from synthetic import samples, synthetic_images, synthetic_weight

from regard.backbones import create_model
from regard.backbones.biformer import Architecture, BiFormer, FullAttention, checkpoint_filter_fn
from regard.mixers import BiLevelRoutingAttention

GOLDENS = Path(__file__).parent / "goldens"
SCALES = {"biformer_tiny": 0.5, "biformer_stl": 1.0}  # of the goldens' matrices and filters
COUNTS = {
    "biformer_base": 56_804_968,
    "biformer_small": 25_536_232,
    "biformer_stl": 28_372_552,
    "biformer_tiny": 13_142_760,
}
SHALLOW = Architecture((1, 1, 1, 1), embed_dims=(32, 32, 64, 64), topks=(1, 4, 16, None), mlp_ratio=2)
SHALLOW_SWIN = Architecture((1, 1, 1, 1), embed_dims=(32, 32, 64, 64), mlp_ratio=2, overlap=False)


def official_state(model, scale):
    """The official names and shapes of a model, filled by the goldens' rule; made here from what the paper defines."""
    shapes, sizes = {}, model.architecture
    after = 3 if sizes.overlap else 2  # where the second linear layer of the MLP stands

    def layer(name, *shape, bias=True):
        shapes.update({f"{name}.weight": shape} | ({f"{name}.bias": shape[:1]} if bias else {}))

    def batch_norm(name, dim):
        layer(name, dim)
        shapes.update({f"{name}.running_mean": (dim,), f"{name}.running_var": (dim,)})

    def embedding(name, before, dim, first):
        if not sizes.overlap:
            kernel, conv, norm = (4, "0", "1") if first else (2, "1", "0")
            layer(f"{name}.{conv}", dim, before, kernel, kernel)
            batch_norm(f"{name}.{norm}", dim if first else before)
            return
        for place, (a, b) in (
            {0: (before, dim // 2), 3: (dim // 2, dim)}.items() if first else {0: (before, dim)}.items()
        ):
            layer(f"{name}.{place}", b, a, 3, 3)
            batch_norm(f"{name}.{place + 1}", b)

    channels = model.in_chans
    for i, (dim, depth, topk) in enumerate(zip(sizes.embed_dims, sizes.depths, sizes.topks, strict=True)):
        embedding(f"downsample_layers.{i}", channels, dim, i == 0)
        for j in range(depth):
            block = f"stages.{i}.{j}" if sizes.overlap else f"stages.{i}.blocks.{j}"
            if sizes.overlap:
                layer(f"{block}.pos_embed", dim, 1, 3, 3)
            layer(f"{block}.norm1", dim)
            layer(f"{block}.norm2", dim)
            layer(f"{block}.attn.lepe", dim, 1, 5, 5)
            if topk is None:
                layer(f"{block}.attn.qkv", 3 * dim, dim, bias=False)
                layer(f"{block}.attn.proj", dim, dim)
            else:
                layer(f"{block}.attn.qkv.qkv", 3 * dim, dim)
                layer(f"{block}.attn.wo", dim, dim)
            hidden = int(dim * sizes.mlp_ratio)
            layer(f"{block}.mlp.0", hidden, dim)
            layer(f"{block}.mlp.{after}", dim, hidden)
        channels = dim
    batch_norm("norm", channels)
    layer("head", model.num_classes, channels)
    state = {name: synthetic_weight(name, torch.Size(shape), scale) for name, shape in shapes.items()}
    counted = [name.removesuffix("running_mean") for name in state if name.endswith("running_mean")]
    return state | {f"{name}num_batches_tracked": torch.tensor(0) for name in counted}


def filled(name):
    model = create_model(name).eval()
    model.load_state_dict(checkpoint_filter_fn(official_state(model, SCALES[name]), model))
    return model


@pytest.fixture(scope="module")
def tiny():
    return filled("biformer_tiny")


@pytest.fixture
def shallow():
    torch.manual_seed(0)
    return create_model("biformer_tiny", architecture=SHALLOW, num_classes=10).eval()


@pytest.mark.parametrize("name", COUNTS)
def test_parameter_count_is_the_published_one(name):
    with torch.device("meta"):
        model = create_model(name)
    assert sum(p.numel() for p in model.parameters()) == COUNTS[name]


def ours(name):
    """The module whose output the official module `name` has."""
    name = re.sub(r"^downsample_layers\.(\d)$", r"stages.\1.patch_embed", name)
    return re.sub(r"^stages\.(\d)\.(?:blocks\.)?(\d)$", r"stages.\1.blocks.\2", name)


@pytest.mark.parametrize("name", SCALES)
def test_outputs_equal_the_official_ones_in_float64(name):
    model = filled(name).double()
    golden = np.load(GOLDENS / f"{name}.npz")
    names = golden["stage_names"].tolist()
    # The blocks of the Swin layout hand on channels last there; ours hand on tokens always.
    channels_last, seen = name == "biformer_stl", {}

    def keep(official, module):
        def hook(_m, _i, out):
            if out.dim() == 3 and not channels_last:
                out = out.transpose(1, 2)
            seen[official] = samples(out)

        module.register_forward_hook(hook)

    for official in names:
        keep(official, model.get_submodule(ours(official)))
    with torch.no_grad():
        logits = model(synthetic_images(4, 224).double())
    assert list(seen) == names
    # 1e-9: a faithful implementation is at rounding, each deliberate mistake at 1.7e-4 or more (goldens/README.md).
    for official, expected in zip(names, torch.from_numpy(golden["stage_samples_fp64"]), strict=True):
        torch.testing.assert_close(
            seen[official], expected, atol=1e-9, rtol=0, msg=lambda m, official=official: f"{official}: {m}"
        )
    torch.testing.assert_close(logits, torch.from_numpy(golden["logits_fp64"]), atol=1e-9, rtol=0)


def error(model):
    golden = np.load(GOLDENS / "biformer_tiny.npz")
    with torch.no_grad():
        logits = model(synthetic_images(4, 224)[:1])
    return (logits.double() - torch.from_numpy(golden["logits_fp64"][:1])).abs().max()


def test_one_image_in_float32(tiny):
    assert error(tiny) < 1e-5  # no choice of the four images is nearer than 1.5e-6 to another


@pytest.mark.parametrize("change", ["scale", "topk", "regions", "lce", "last heads", "position", "norm"])
def test_the_parity_test_would_notice_a_mistake(tiny, change):
    model = copy.deepcopy(tiny)
    block, last = model.stages[2].blocks[0], model.stages[3].blocks[0].attn
    if change == "scale":
        block.attn.query_factor = 1.0
    elif change == "topk":
        block.attn.mechanism = type(block.attn.mechanism)(topk=15)
    elif change == "regions":
        block.attn.mechanism = type(block.attn.mechanism)(num_regions=14, topk=16)
    elif change == "lce":
        block.attn.lepe = torch.nn.Conv2d(256, 256, 5, padding=2, groups=256)
    elif change == "last heads":
        last.num_heads, last.head_dim = 16, 32
    elif change == "position":
        block.pos_embed = None
    else:
        block.norm1.eps = 1e-3
    assert error(model) > 1.7e-4


@pytest.mark.parametrize("name", ["biformer_tiny", "biformer_stl"])
def test_official_checkpoint_loads(tmp_path, name):
    options = {"architecture": SHALLOW if name == "biformer_tiny" else SHALLOW_SWIN, "num_classes": 10}
    model = create_model(name, **options)
    official = official_state(model, 1.0)
    assert "stages.0.0.attn.qkv.qkv.weight" in official or "stages.0.blocks.0.attn.wo.bias" in official
    torch.save({"model": {f"module.{k}": v for k, v in official.items()}, "epoch": 299}, tmp_path / "checkpoint.pth")
    content = torch.load(tmp_path / "checkpoint.pth", weights_only=True)
    model.load_state_dict(checkpoint_filter_fn(content, model))
    found = model.stages[1].blocks[0].attn.proj.weight
    names = [name for name in official if name.endswith("attn.wo.weight") and name.startswith("stages.1")]
    assert len(names) == 1 and torch.equal(found, official[names[0]])
    state = model.state_dict()
    assert checkpoint_filter_fn(state, model).keys() == state.keys()


def test_timm_loads_a_checkpoint_file_for_other_classes_and_channels(tmp_path, tiny):
    file = tmp_path / "checkpoint.pth"
    torch.save({"model": official_state(tiny, SCALES["biformer_tiny"])}, file)
    overlay = {"file": str(file)}
    model = timm.create_model(
        "biformer_tiny", pretrained=True, pretrained_cfg_overlay=overlay, num_classes=7, in_chans=1
    )
    torch.testing.assert_close(model.stages[2].blocks[3].attn.qkv.weight, tiny.stages[2].blocks[3].attn.qkv.weight)
    first = tiny.stages[0].patch_embed[0].weight
    torch.testing.assert_close(model.stages[0].patch_embed[0].weight, first.sum(1, keepdim=True))
    assert model.head.out_features == 7


def test_names_are_registered_with_timm():
    assert timm.list_models(module="biformer") == list(COUNTS)


@pytest.mark.parametrize("architecture", [SHALLOW, SHALLOW_SWIN], ids=["overlapping", "swin"])
@pytest.mark.parametrize(("height", "width"), [(97, 61), (33, 200), (5, 3), (1, 1)])
def test_any_image_size(architecture, height, width):
    model = create_model("biformer_tiny", architecture=architecture, num_classes=10).eval()
    with torch.no_grad():
        features = model.forward_features(torch.randn(1, 3, height, width))
        logits = model.forward_head(features)
    assert features.shape == (1, 64, -(-height // 32), -(-width // 32))
    assert logits.shape == (1, 10) and torch.isfinite(logits).all()


def test_padding_the_official_way(shallow):
    """It differs where 7 regions do not divide a grid, and only there."""
    official = create_model("biformer_tiny", architecture=SHALLOW, num_classes=10, mask_padding=False).eval()
    official.load_state_dict(shallow.state_dict())
    with torch.no_grad():
        for size, same in ((224, True), (192, False)):
            x = synthetic_images(1, size)
            assert torch.allclose(official(x), shallow(x), atol=1e-6) == same


def test_number_of_regions(shallow):
    model = create_model("biformer_tiny", architecture=SHALLOW, num_classes=10, num_regions=8).eval()
    model.load_state_dict(shallow.state_dict())
    x = synthetic_images(1, 224)
    with torch.no_grad():
        assert not torch.allclose(model(x), shallow(x), atol=1e-6)
    mixers = [m for m in model.modules() if isinstance(m, BiLevelRoutingAttention)]
    assert {m.mechanism.num_regions for m in mixers} == {8}


def test_the_last_stage_attends_to_everything(shallow):
    attn = shallow.stages[3].blocks[0].attn
    assert type(attn) is FullAttention and attn.num_heads == 8 and attn.qkv.bias is None
    assert [stage.blocks[0].attn.mechanism.topk for stage in shallow.stages[:3]] == [1, 4, 16]
    assert [stage.blocks[0].attn.scale for stage in shallow.stages[:3]] == [32**-0.5, 32**-0.5, 64**-0.5]


def test_features(shallow):
    images = synthetic_images(2, 64)
    with torch.no_grad():
        final, maps = shallow.forward_intermediates(images)
        normed = shallow.forward_intermediates(images, indices=1, norm=True, intermediates_only=True)
        only = shallow.forward_intermediates(images, indices=[1], stop_early=True, intermediates_only=True)
    assert [tuple(m.shape[1:]) for m in maps] == [(32, 16, 16), (32, 8, 8), (64, 4, 4), (64, 2, 2)]
    torch.testing.assert_close(shallow.norm(maps[-1]), final)
    torch.testing.assert_close(normed, [final])
    torch.testing.assert_close(only, maps[1:2])
    with pytest.raises(ValueError, match="output_fmt"):
        shallow.forward_intermediates(images, output_fmt="NLC")


@pytest.mark.parametrize("kind", ["list", "getter"])
def test_features_only(kind):
    model = create_model("biformer_tiny", architecture=SHALLOW, features_only=True, feature_cls=kind).eval()
    assert model.feature_info.reduction() == [4, 8, 16, 32] and model.feature_info.channels() == [32, 32, 64, 64]
    with torch.no_grad():
        assert [f.shape[-1] for f in model(synthetic_images(1, 64))] == [16, 8, 4, 2]


def test_prune_intermediate_layers(shallow):
    assert shallow.prune_intermediate_layers([0, 1]) == [0, 1]
    assert shallow.num_features == 32 and shallow(synthetic_images(2, 64)).shape == (2, 8, 8, 32)
    assert [name for name, _ in shallow.named_parameters() if name.startswith("norm")] == []


def test_drop_rates_reach_their_places():
    rates = {"drop_rate": 0.1, "proj_drop_rate": 0.2, "attn_drop_rate": 0.3, "drop_path_rate": 0.3}
    model = create_model("biformer_tiny", architecture=SHALLOW, **rates)
    blocks = [block for stage in model.stages for block in stage.blocks]
    assert [getattr(block.drop_path, "drop_prob", 0.0) for block in blocks] == pytest.approx([0.0, 0.1, 0.2, 0.3])
    assert {(b.attn.attn_drop.p, b.attn.proj_drop.p, b.mlp.drop1.p) for b in blocks} == {(0.3, 0.2, 0.2)}
    assert model.head_drop.p == 0.1


def test_default_cfg():
    model = create_model("biformer_stl", architecture=SHALLOW_SWIN)
    cfg = model.pretrained_cfg
    assert cfg["architecture"] == "biformer_stl" and not cfg["fixed_input_size"] and not cfg["url"]
    assert model.get_submodule(cfg["classifier"]) is model.head
    assert model.get_submodule(cfg["first_conv"]) is model.stages[0].patch_embed[0]


def test_bad_options():
    with pytest.raises(ValueError, match="topks: expected one for each of 2 stages"):
        Architecture((1, 1), embed_dims=(32, 32))
    with pytest.raises(ValueError, match="global_pool: expected 'avg' or ''"):
        BiFormer(SHALLOW, global_pool="max")
    with pytest.raises(ValueError, match="num_regions: expected at least 1, got 0"):
        BiFormer(SHALLOW, num_regions=0)
