"""KVT backbones: parity with the official implementation, and all that timm expects of a model."""

import copy
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from synthetic import samples, synthetic_images, synthetic_state
from timm.optim import param_groups_layer_decay

import regard.backbones
from regard.backbones import create_model
from regard.backbones.cvt import Architecture
from regard.backbones.kvt import checkpoint_filter_fn
from regard.mixers import KNNAttention

GOLDEN = Path(__file__).parent / "goldens" / "kvt_deit_tiny.npz"
SMALL = {"img_size": 64, "num_classes": 10}


@pytest.fixture(scope="module")
def golden():
    return {name: torch.from_numpy(array) for name, array in np.load(GOLDEN).items() if array.dtype.kind == "f"}


@pytest.fixture(scope="module")
def filled():
    model = create_model("kvt_deit_tiny").eval()
    model.load_state_dict(synthetic_state(model.state_dict()))
    return model


@pytest.fixture
def tiny():
    torch.manual_seed(0)
    return create_model("kvt_deit_tiny", **SMALL, topk=5).eval()


@pytest.fixture
def images():
    return synthetic_images(2, 64)


@pytest.mark.parametrize(("name", "count"), [("kvt_deit_tiny", 5_717_416), ("kvt_deit_small", 22_050_664)])
def test_parameter_count_is_the_published_one(name, count):
    with torch.device("meta"):
        model = create_model(name)
    assert sum(p.numel() for p in model.parameters()) == count


def test_outputs_equal_the_official_ones_in_float64(filled, golden):
    model = copy.deepcopy(filled).double()
    names = np.load(GOLDEN)["stage_names"].tolist()
    seen = {}
    for name in names:
        model.get_submodule(name).register_forward_hook(
            lambda _m, _i, out, name=name: seen.update({name: samples(out)})
        )
    with torch.no_grad():
        logits = model(synthetic_images(4, 224).double())
    assert list(seen) == names
    # 1e-9: a faithful implementation is at rounding, each deliberate mistake at 1.7e-4 or more (goldens/README.md).
    for name, expected in zip(names, golden["stage_samples_fp64"], strict=True):
        torch.testing.assert_close(seen[name], expected, atol=1e-9, rtol=0, msg=lambda m, name=name: f"{name}: {m}")
    torch.testing.assert_close(logits, golden["logits_fp64"], atol=1e-9, rtol=0)


def test_outputs_equal_the_official_ones_in_float32(filled, golden):
    with torch.no_grad():
        logits = filled(synthetic_images(4, 224))
    error = (logits.double() - golden["logits_fp64"]).abs().amax(dim=1)
    # Of 28,368 rows a few choose between keys whose logits differ by one rounding; another order of summation takes the
    # other one, which moves that image a little. The smallest deliberate mistake moved the logits by 1.7e-4.
    assert error.median() < 1.7e-4, error
    assert error.max() < 1e-2, error


def test_the_parity_test_would_notice_a_wrong_topk(filled, golden):
    model = copy.deepcopy(filled)
    model.blocks[5].attn.topk = 99
    with torch.no_grad():
        logits = model(synthetic_images(1, 224))
    assert (logits.double() - golden["logits_fp64"][:1]).abs().max() > 1e-4


def test_official_checkpoint_loads(tmp_path, filled):
    official = synthetic_state(filled.state_dict())
    torch.save({"model": {f"module.{k}": v for k, v in official.items()}, "epoch": 299}, tmp_path / "checkpoint.pth")
    model = create_model("kvt_deit_tiny")
    content = torch.load(tmp_path / "checkpoint.pth", weights_only=True)
    model.load_state_dict(checkpoint_filter_fn(content, model))
    torch.testing.assert_close(model.state_dict(), dict(official), rtol=0, atol=0)


def test_timm_loads_a_checkpoint_file_through_the_filter_at_another_size(tmp_path, filled):
    file = tmp_path / "checkpoint.pth"
    torch.save({"model": filled.state_dict(), "epoch": 299}, file)
    overlay = {"file": str(file)}
    model = timm.create_model(
        "kvt_deit_tiny", pretrained=True, pretrained_cfg_overlay=overlay, num_classes=7, img_size=96
    )
    torch.testing.assert_close(model.blocks[3].attn.qkv.weight, filled.blocks[3].attn.qkv.weight)
    assert model.pos_embed.shape == (1, 37, 192)
    assert model.head.out_features == 7


def test_dense_deit_weights_load_unchanged():
    dense, knn = timm.create_model("deit_tiny_patch16_224", **SMALL), create_model("kvt_deit_tiny", **SMALL)
    assert knn.load_state_dict(dense.state_dict()).missing_keys == []


def test_all_keys_kept_is_dense_deit(images):
    dense = timm.create_model("deit_tiny_patch16_224", **SMALL).double().eval()
    knn = create_model("kvt_deit_tiny", topk=1.0, **SMALL).double().eval()
    knn.load_state_dict(dense.state_dict())
    with torch.no_grad():
        torch.testing.assert_close(knn(images.double()), dense(images.double()))


@pytest.mark.parametrize(("topk", "expected"), [(None, 100), (7, 7), (0.25, 0.25)])
def test_topk_reaches_every_layer(topk, expected):
    model = create_model("kvt_deit_tiny", topk=topk, **SMALL)
    mixers = [m for m in model.modules() if isinstance(m, KNNAttention)]
    assert [m.topk for m in mixers] == [expected] * 12


def test_names_are_registered_with_timm():
    assert timm.list_models(module="kvt") == [
        "kvt_cvt_13",
        "kvt_deit_small",
        "kvt_deit_tiny",
        "kvt_so_vit_7",
        "kvt_t2t_vit_t_14",
        "kvt_t2t_vit_t_19",
    ]
    assert timm.is_model("kvt_deit_tiny")
    assert regard.create_model is create_model


def test_features(tiny, images):
    with torch.no_grad():
        assert tiny.forward_features(images).shape == (2, 17, 192)
        final, maps = tiny.forward_intermediates(images, indices=[2, 11])
        only = tiny.forward_intermediates(images, indices=2, intermediates_only=True)
        logits = tiny.forward_head(final)
        torch.testing.assert_close(logits, tiny(images))
    assert [tuple(m.shape) for m in maps] == [(2, 192, 4, 4)] * 2
    assert len(only) == 2


@pytest.mark.parametrize("kind", ["getter", "fx"])
def test_features_only(images, kind):
    model = create_model("kvt_deit_tiny", img_size=64, features_only=True, feature_cls=kind, out_indices=(3, 11)).eval()
    with torch.no_grad():
        features = model(images)
    assert [info["module"] for info in model.feature_info.get_dicts()] == ["blocks.3", "blocks.11"]
    assert len(features) == 2 and features[0].shape == features[1].shape
    assert features[0].shape == ((2, 192, 4, 4) if kind == "getter" else (2, 17, 192))


def test_reset_classifier(tiny, images):
    tiny.reset_classifier(3)
    assert tiny(images).shape == (2, 3)
    tiny.reset_classifier(0)
    assert tiny(images).shape == (2, 192)


@pytest.mark.parametrize("size", [(64, 64), (48, 80), (208, 272)])
def test_any_input_size(size):
    fixed = create_model("kvt_deit_tiny", img_size=size, num_classes=10).eval()
    dynamic = create_model("kvt_deit_tiny", dynamic_img_size=True, num_classes=10).eval()
    x = torch.randn(1, 3, *size)
    with torch.no_grad():
        assert fixed(x).shape == dynamic(x).shape == (1, 10)


def test_optimizer_groups(tiny):
    assert tiny.no_weight_decay() >= {"pos_embed", "cls_token"}
    groups = param_groups_layer_decay(tiny, weight_decay=0.05, layer_decay=0.75)
    assert len({group["lr_scale"] for group in groups}) == 14  # stem, twelve blocks, head
    assert sum(len(group["params"]) for group in groups) == len(list(tiny.parameters()))


def test_default_cfg():
    cfg = create_model("kvt_deit_tiny", **SMALL).pretrained_cfg
    assert (
        cfg["classifier"] == "head"
        and cfg["first_conv"] == "patch_embed.proj"
        and cfg["architecture"] == "kvt_deit_tiny"
    )


@pytest.mark.parametrize("topk", [0, -1, 1.5, float("nan")])
def test_bad_topk_is_refused(topk):
    with pytest.raises(ValueError, match="topk"):
        create_model("kvt_deit_tiny", topk=topk, **SMALL)


@pytest.mark.parametrize("name", ["cvt_13", "t2t_vit_t_19", "so_vit_7"])
def test_conversion_of_the_dense_model_gives_the_same(name):
    small = {"depth": 2, "embed_dim": 32, "num_heads": 2}
    if name == "cvt_13":
        small = {"architecture": Architecture((1, 1, 1), embed_dims=(8, 16, 32), num_heads=(1, 2, 4))}
    torch.manual_seed(0)
    dense = create_model(name, num_classes=10, **small).eval()
    knn = create_model(f"kvt_{name}", num_classes=10, topk=0.25, **small).eval()
    knn.load_state_dict(dense.state_dict())
    x = synthetic_images(1, 96)
    pattern = "stages.*" if name == "cvt_13" else "blocks.*"
    with torch.no_grad():
        expected, before = knn(x), dense(x)
        regard.convert(dense, {pattern: regard.KNN(0.25)}, example_inputs=x)
        torch.testing.assert_close(dense(x), expected)
    assert (before - expected).abs().max() > 1e-4


def test_cvt_with_the_quoted_k_is_dense():
    """k 1600, 400, 100 are more than the keys at 224 pixels."""
    architecture = Architecture((1, 1, 1), embed_dims=(8, 16, 32), num_heads=(1, 2, 4))
    dense = create_model("cvt_13", architecture=architecture).eval()
    quoted = create_model("kvt_cvt_13", architecture=architecture, topk=(1600, 400, 100)).eval()
    quoted.load_state_dict(dense.state_dict())
    x = synthetic_images(1, 224)
    with torch.no_grad():
        torch.testing.assert_close(quoted(x), dense(x))
