"""ClusTR backbones: parity with the official implementation, and all that timm expects of a model."""

import copy
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from synthetic import samples, synthetic_images, synthetic_weight
from timm.optim import param_groups_layer_decay

import regard
from regard.backbones import create_model
from regard.backbones.clustr import Architecture, ClusTR, checkpoint_filter_fn
from regard.mixers import ClusteredAttention

GOLDEN = Path(__file__).parent / "goldens" / "clustr_b1.npz"
COUNTS = {"clustr_b1": 11_682_417, "clustr_b2": 22_690_941, "clustr_b3": 40_246_210}
SHALLOW = Architecture((1, 2, 1, 1), embed_dims=(16, 32, 48, 64), num_heads=(1, 2, 3, 4), mlp_ratios=(2, 2, 2, 2))


def official_state(model):
    """The official names and shapes of a model, filled by the goldens' rule; made here from what the paper defines."""
    shapes = {}

    def layer(name, *shape):
        shapes.update({f"{name}.weight": shape, f"{name}.bias": shape[:1]})

    sizes = model.architecture
    channels = model.in_chans
    for i, (dim, depth) in enumerate(zip(sizes.embed_dims, sizes.depths, strict=True)):
        stage, hidden = i + 1, int(dim * sizes.mlp_ratios[i])
        kernel = 7 if i == 0 else 3
        layer(f"patch_embed{stage}.proj", dim, channels, kernel, kernel)
        layer(f"patch_embed{stage}.norm", dim)
        layer(f"norm{stage}", dim)
        for j in range(depth):
            block = f"block{stage}.{j}"
            for norm in ("norm1", "norm2"):
                layer(f"{block}.{norm}", dim)
            layer(f"{block}.attn.q", dim, dim)
            layer(f"{block}.attn.proj", dim, dim)
            for name in ("kv1", "kv2") if sizes.reductions[i] > 1 else ("kv",):
                layer(f"{block}.attn.{name}", 2 * dim, dim)
            if sizes.reductions[i] > 1:
                layer(f"{block}.attn.weight_layer", 1, dim)
            layer(f"{block}.mlp.fc1", hidden, dim)
            layer(f"{block}.mlp.fc2", dim, hidden)
            layer(f"{block}.mlp.dwconv.dwconv", hidden, 1, 3, 3)
        channels = dim
    layer("head", model.num_classes, channels)
    return {name: synthetic_weight(name, torch.Size(shape)) for name, shape in shapes.items()}


@pytest.fixture(scope="module")
def filled():
    model = create_model("clustr_b1").eval()
    model.load_state_dict(checkpoint_filter_fn(official_state(model), model))
    return model


@pytest.fixture
def tiny():
    torch.manual_seed(0)
    return create_model("clustr_b1", architecture=SHALLOW, num_classes=10).eval()


@pytest.fixture
def images():
    return synthetic_images(2, 64)


@pytest.mark.parametrize("name", COUNTS)
def test_parameter_count_is_the_published_one(name):
    with torch.device("meta"):
        model = create_model(name)
    assert sum(p.numel() for p in model.parameters()) == COUNTS[name]


def ours(name):
    """The module whose output the official module `name` has."""
    stage, _, block = name.removeprefix("patch_embed").removeprefix("block").removeprefix("norm").partition(".")
    kind = name.rstrip("0123456789.")
    return (
        f"stages.{int(stage) - 1}." + {"patch_embed": "patch_embed", "block": f"blocks.{block}", "norm": "norm"}[kind]
    )


def test_outputs_equal_the_official_ones_in_float64(filled):
    model = copy.deepcopy(filled).double()
    golden = np.load(GOLDEN)
    names = golden["stage_names"].tolist()
    seen = {}

    def keep(name):
        return lambda _m, _i, out: seen.update({name: samples(out[0] if isinstance(out, tuple) else out)})

    for name in names:
        model.get_submodule(ours(name)).register_forward_hook(keep(name))
    with torch.no_grad():
        logits = model(synthetic_images(4, 224).double())
    assert list(seen) == names
    # 1e-9: a faithful implementation is at rounding, each deliberate mistake at 1.7e-4 or more (goldens/README.md).
    for name, expected in zip(names, torch.from_numpy(golden["stage_samples_fp64"]), strict=True):
        torch.testing.assert_close(seen[name], expected, atol=1e-9, rtol=0, msg=lambda m, name=name: f"{name}: {m}")
    torch.testing.assert_close(logits, torch.from_numpy(golden["logits_fp64"]), atol=1e-9, rtol=0)


def test_one_image_in_float32(filled):
    """The official code crashes on fewer than four images."""
    with torch.no_grad():
        logits = filled(synthetic_images(4, 224)[:1])
    error = (logits.double() - torch.from_numpy(np.load(GOLDEN)["logits_fp64"][:1])).abs().max()
    # A grouping may flip where two choices differ by a rounding; a wrong model moves the logits by 1.7e-4 or more.
    assert error < 1.7e-4


@pytest.mark.parametrize("change", ["reduction", "swapped", "neighbors"])
def test_the_parity_test_would_notice_a_mistake(filled, change, monkeypatch):
    model = copy.deepcopy(filled)
    attn = model.stages[0].blocks[0].attn
    if change == "reduction":
        attn.reduction = 7
    elif change == "swapped":
        with torch.no_grad():
            attn.kv_coarse.weight.copy_(attn.qkv.weight[64:])
    else:
        from regard.ops import density_peak_clusters

        def other(x, counts, **options):
            return density_peak_clusters(x, counts, neighbors=6, **options)

        monkeypatch.setattr("regard.mixers.clustered.density_peak_clusters", other)
    with torch.no_grad():
        logits = model(synthetic_images(4, 224)[:1])
    assert (logits.double() - torch.from_numpy(np.load(GOLDEN)["logits_fp64"][:1])).abs().max() > 1.7e-4


def test_official_checkpoint_loads(tmp_path, filled):
    official = official_state(filled)
    assert len(official) == 222 and "block4.0.attn.kv.weight" in official
    torch.save({"model": {f"module.{k}": v for k, v in official.items()}, "epoch": 299}, tmp_path / "checkpoint.pth")
    model = create_model("clustr_b1")
    content = torch.load(tmp_path / "checkpoint.pth", weights_only=True)
    model.load_state_dict(checkpoint_filter_fn(content, model))
    torch.testing.assert_close(model.state_dict(), filled.state_dict(), rtol=0, atol=0)
    assert torch.equal(model.stages[1].blocks[0].attn.qkv.weight[:128], official["block2.0.attn.q.weight"])


def test_own_checkpoint_loads_through_the_filter(filled):
    state = filled.state_dict()
    assert checkpoint_filter_fn(state, filled).keys() == state.keys()


def test_timm_loads_a_checkpoint_file_for_other_classes_and_channels(tmp_path, filled):
    file = tmp_path / "checkpoint.pth"
    torch.save({"model": official_state(filled)}, file)
    overlay = {"file": str(file)}
    model = timm.create_model("clustr_b1", pretrained=True, pretrained_cfg_overlay=overlay, num_classes=7, in_chans=1)
    torch.testing.assert_close(model.stages[2].blocks[3].attn.qkv.weight, filled.stages[2].blocks[3].attn.qkv.weight)
    first = filled.stages[0].patch_embed.proj.weight
    torch.testing.assert_close(model.stages[0].patch_embed.proj.weight, first.sum(1, keepdim=True))
    assert model.head.out_features == 7


def test_names_are_registered_with_timm():
    assert timm.list_models(module="clustr") == list(COUNTS)
    assert regard.create_model is create_model


@pytest.mark.parametrize(("height", "width"), [(64, 64), (97, 61), (33, 200), (5, 3), (1, 1)])
@pytest.mark.parametrize("batch", [1, 3])
def test_any_image_and_batch_size(tiny, batch, height, width):
    with torch.no_grad():
        features = tiny.forward_features(torch.randn(batch, 3, height, width))
        logits = tiny.forward_head(features)
    assert features.shape == (batch, 64, -(-height // 32), -(-width // 32))
    assert logits.shape == (batch, 10) and torch.isfinite(logits).all()


def test_features(tiny, images):
    with torch.no_grad():
        final, maps = tiny.forward_intermediates(images)
        only = tiny.forward_intermediates(images, indices=[1], stop_early=True, intermediates_only=True)
        torch.testing.assert_close(tiny.forward_head(final), tiny(images))
        assert tiny.forward_head(final, pre_logits=True).shape == (2, 64)
    assert [tuple(m.shape[1:]) for m in maps] == [(16, 16, 16), (32, 8, 8), (48, 4, 4), (64, 2, 2)]
    torch.testing.assert_close(only, maps[1:2])
    with pytest.raises(ValueError, match="output_fmt"):
        tiny.forward_intermediates(images, output_fmt="NLC")


@pytest.mark.parametrize("kind", ["list", "getter"])
def test_features_only(images, kind):
    model = create_model("clustr_b2", architecture=SHALLOW, features_only=True, feature_cls=kind).eval()
    assert model.feature_info.reduction() == [4, 8, 16, 32] and model.feature_info.channels() == [16, 32, 48, 64]
    with torch.no_grad():
        assert [f.shape[-1] for f in model(images)] == [16, 8, 4, 2]
        some = create_model("clustr_b2", architecture=SHALLOW, features_only=True, out_indices=(0, 2))
        assert [f.shape[1] for f in some(images)] == [16, 48]


def test_prune_intermediate_layers(tiny, images):
    assert tiny.prune_intermediate_layers([0, 1]) == [0, 1]
    assert tiny.num_features == 32 and tiny(images).shape == (2, 8, 8, 32)


def test_classifier(tiny, images):
    assert tiny.get_classifier() is tiny.head
    tiny.reset_classifier(3)
    assert tiny(images).shape == (2, 3)
    tiny.reset_classifier(3, "")
    assert tiny(images).shape == (2, 2, 2, 3)
    tiny.reset_classifier(0, "avg")
    assert tiny(images).shape == (2, 64)
    with pytest.raises(ValueError, match="global_pool: expected 'avg' or ''"):
        tiny.reset_classifier(3, "max")


def test_optimizer_groups(tiny):
    assert tiny.no_weight_decay() == set()
    groups = param_groups_layer_decay(tiny, weight_decay=0.05, layer_decay=0.75)
    assert len({group["lr_scale"] for group in groups}) == 7  # stem, five blocks, head
    assert sum(len(group["params"]) for group in groups) == len(list(tiny.parameters()))
    layer = {id(p): group["lr_scale"] for group in groups for p in group["params"]}
    last, norm, embed = tiny.stages[1].blocks[1].norm1, tiny.stages[1].norm, tiny.stages[1].patch_embed.norm
    assert layer[id(norm.weight)] == layer[id(last.weight)]
    assert layer[id(embed.weight)] == layer[id(tiny.stages[1].blocks[0].norm1.weight)] < layer[id(last.weight)]
    coarse = timm.models.group_parameters(tiny, tiny.group_matcher(coarse=True))
    assert len(coarse) == 6  # stem, four stages, head


def test_drop_rates_reach_their_places():
    rates = {"drop_rate": 0.1, "proj_drop_rate": 0.2, "attn_drop_rate": 0.3, "drop_path_rate": 0.4}
    model = create_model("clustr_b1", architecture=SHALLOW, **rates)
    blocks = [block for stage in model.stages for block in stage.blocks]
    assert [getattr(block.drop_path, "drop_prob", 0.0) for block in blocks] == pytest.approx([0.0, 0.1, 0.2, 0.3, 0.4])
    assert {(b.attn.attn_drop.p, b.attn.proj_drop.p, b.mlp.drop.p) for b in blocks} == {(0.3, 0.2, 0.2)}
    assert model.head_drop.p == 0.1


def test_default_cfg():
    cfg = create_model("clustr_b3", architecture=SHALLOW).pretrained_cfg
    assert cfg["architecture"] == "clustr_b3" and not cfg["fixed_input_size"]
    model = create_model("clustr_b3", architecture=SHALLOW, dtype=torch.float64)
    assert model.get_submodule(cfg["classifier"]) is model.head
    assert model.get_submodule(cfg["first_conv"]) is model.stages[0].patch_embed.proj
    assert {p.dtype for p in model.parameters()} == {torch.float64}
    assert [type(m.attn) for m in model.stages[0].blocks] == [ClusteredAttention]


def test_bad_architecture():
    with pytest.raises(ValueError, match="num_heads: expected one for each of 2 stages"):
        Architecture((1, 1), embed_dims=(8, 8), reductions=(2, 1), mlp_ratios=(1, 1))
    with pytest.raises(ValueError, match="global_pool"):
        ClusTR(SHALLOW, global_pool="max")
