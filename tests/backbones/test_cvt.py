"""CvT: parity with the official implementation, and what is particular to it."""

import copy
from pathlib import Path

import numpy as np
import pytest
import torch
from synthetic import samples, synthetic_images, synthetic_weight
from timm.optim import param_groups_layer_decay

import regard
from regard.backbones import create_model
from regard.backbones.cvt import Architecture, CvT, checkpoint_filter_fn
from regard.inspection import attention_maps
from regard.mixers import DenseAttention, KNNAttention

GOLDEN = Path(__file__).parent / "goldens" / "cvt_13.npz"
COUNTS = {"cvt_13": 19_997_480, "cvt_21": 31_622_696, "cvt_w24": 277_196_392, "kvt_cvt_13": 19_997_480}
SHALLOW = Architecture((1, 1, 2), embed_dims=(8, 16, 32), num_heads=(1, 2, 4))


def official_state(model):
    """The official names and shapes of a model, filled by the goldens' rule; made here from what the paper defines."""
    shapes = {}

    def layer(name, *shape):
        shapes.update({f"{name}.weight": shape, f"{name}.bias": shape[:1]})

    sizes = model.architecture
    channels = model.in_chans
    for i, (dim, depth) in enumerate(zip(sizes.embed_dims, sizes.depths, strict=True)):
        kernel = 7 if i == 0 else 3
        layer(f"stage{i}.patch_embed.proj", dim, channels, kernel, kernel)
        layer(f"stage{i}.patch_embed.norm", dim)
        for j in range(depth):
            block = f"stage{i}.blocks.{j}"
            for name in "qkv":
                conv = f"{block}.attn.conv_proj_{name}"
                shapes[f"{conv}.conv.weight"] = (dim, 1, 3, 3)
                layer(f"{conv}.bn", dim)
                shapes.update({f"{conv}.bn.running_mean": (dim,), f"{conv}.bn.running_var": (dim,)})
                shapes[f"{conv}.bn.num_batches_tracked"] = None
                layer(f"{block}.attn.proj_{name}", dim, dim)
            layer(f"{block}.attn.proj", dim, dim)
            for norm in ("norm1", "norm2"):
                layer(f"{block}.{norm}", dim)
            layer(f"{block}.mlp.fc1", 4 * dim, dim)
            layer(f"{block}.mlp.fc2", dim, 4 * dim)
        channels = dim
    shapes["stage2.cls_token"] = (1, 1, channels)
    layer("norm", channels)
    layer("head", model.num_classes, channels)
    return {
        name: torch.tensor(0) if shape is None else synthetic_weight(name, torch.Size(shape))
        for name, shape in shapes.items()
    }


@pytest.fixture(scope="module")
def filled():
    model = create_model("cvt_13").eval()
    model.load_state_dict(checkpoint_filter_fn(official_state(model), model))
    return model


@pytest.fixture
def tiny():
    torch.manual_seed(0)
    return create_model("cvt_13", architecture=SHALLOW, num_classes=10).eval()


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
    return "stages." + name.removeprefix("stage")


def test_outputs_equal_the_official_ones_in_float64(filled):
    model = copy.deepcopy(filled).double()
    golden = np.load(GOLDEN)
    names = [name for name in golden["stage_names"].tolist() if "patch_embed" not in name]  # a map there, tokens here
    seen = {}
    for name in names:
        model.get_submodule(ours(name)).register_forward_hook(
            lambda _m, _i, out, name=name: seen.update({name: samples(out)})
        )
    with torch.no_grad():
        logits = model(synthetic_images(2, 224).double())
    assert list(seen) == names and len(names) == 13
    expected = dict(zip(golden["stage_names"].tolist(), torch.from_numpy(golden["stage_samples_fp64"]), strict=True))
    for name in names:
        torch.testing.assert_close(
            seen[name], expected[name], atol=1e-9, rtol=0, msg=lambda m, name=name: f"{name}: {m}"
        )
    torch.testing.assert_close(logits, torch.from_numpy(golden["logits_fp64"]), atol=1e-9, rtol=0)


def test_the_parity_test_would_notice_another_scale(filled):
    model = copy.deepcopy(filled)
    model.stages[2].blocks[0].attn.query_factor = 1.0
    with torch.no_grad():
        logits = model(synthetic_images(2, 224)[:1])
    assert (logits.double() - torch.from_numpy(np.load(GOLDEN)["logits_fp64"][:1])).abs().max() > 1.7e-4


def test_official_checkpoint_loads(tmp_path, filled):
    official = official_state(filled)
    assert len(official) == 459
    torch.save({f"module.{k}": v for k, v in official.items()}, tmp_path / "checkpoint.pth")
    model = create_model("cvt_13")
    content = torch.load(tmp_path / "checkpoint.pth", weights_only=True)
    model.load_state_dict(checkpoint_filter_fn({"state_dict": content}, model))
    torch.testing.assert_close(model.state_dict(), filled.state_dict(), rtol=0, atol=0)
    assert torch.equal(
        model.stages[1].blocks[0].attn.qkv.weight[192:384], official["stage1.blocks.0.attn.proj_k.weight"]
    )


def test_own_checkpoint_loads_through_the_filter(tiny):
    state = tiny.state_dict()
    assert checkpoint_filter_fn(state, tiny).keys() == state.keys()


def test_keys_are_a_quarter_of_the_queries(tiny):
    """On odd grids too; the class token of the last stage is a query and a key."""
    images = synthetic_images(1, 224)[..., :68, :100]  # grids 17 x 25, 9 x 13, 5 x 7
    for layer, shape in ((0, (1, 425, 9 * 13)), (1, (2, 117, 5 * 7)), (-1, (4, 36, 1 + 3 * 4))):
        weights = attention_maps(tiny, images, layer=layer)
        assert weights.shape == (1, *shape)
        torch.testing.assert_close(weights.sum(-1), torch.ones(1, *shape[:2]))


@pytest.mark.parametrize(
    ("mechanism", "kind"), [(regard.KNN(0.25), KNNAttention), (regard.KNNAttention.bind(topk=0.25), KNNAttention)]
)
def test_mechanism_is_exchangeable(tiny, images, mechanism, kind):
    model = create_model("cvt_13", architecture=SHALLOW, num_classes=10, attn_layer=mechanism).eval()
    model.load_state_dict(tiny.state_dict())
    assert {type(b.attn) for s in model.stages for b in s.blocks} == {kind}
    with torch.no_grad():
        assert (model(images) - tiny(images)).abs().max() > 1e-4
    kept = (attention_maps(model, images, layer=0) > 0).sum(-1)
    assert (kept == 16).all()  # a quarter of 8 x 8 keys


def test_multipole_takes_the_fewer_keys(tiny, images):
    model = create_model("cvt_13", architecture=SHALLOW, num_classes=10, attn_layer=regard.Multipole(near=1.0)).eval()
    model.load_state_dict(tiny.state_dict())
    with torch.no_grad():
        torch.testing.assert_close(model(images), tiny(images))  # all near: dense


def test_modifiers_reach_every_block(images):
    model = create_model("cvt_13", architecture=SHALLOW, attn_layer=regard.KNN(0.5) + regard.Gated("headwise"))
    assert [b.attn.gate.out_features for s in model.stages for b in s.blocks] == [1, 2, 4, 4]
    with pytest.raises(ValueError, match="attn_layer: 'knn.* changes the whole model"):
        CvT(SHALLOW, attn_layer=[DenseAttention, DenseAttention, regard.KNN(0.5) + regard.Gated()])


def test_mechanisms_that_do_not_fit_are_refused(images):
    with pytest.raises(ValueError, match="attn_layer: ClusteredAttention makes its keys from the tokens"):
        CvT(SHALLOW, attn_layer=regard.Clustered(2))
    with pytest.raises(TypeError, match="attn_layer: expected a mechanism such as"):
        CvT(SHALLOW, attn_layer=torch.nn.Identity)
    with pytest.raises(ValueError, match="attn_layer: expected one for all or one for each of 3 stages"):
        CvT(SHALLOW, attn_layer=[DenseAttention])
    model = CvT(SHALLOW, attn_layer=regard.Neighborhood(3))
    with pytest.raises(ValueError, match="64 keys for 256 queries"):
        model(images)


@pytest.mark.parametrize(("topk", "expected"), [(None, [0.5] * 3), (7, [7] * 3), ((0.1, 20, 1.0), [0.1, 20, 1.0])])
def test_topk_reaches_every_stage(topk, expected):
    model = create_model("kvt_cvt_13", architecture=SHALLOW, topk=topk)
    assert [[block.attn.topk for block in stage.blocks] for stage in model.stages] == [
        [k] * depth for k, depth in zip(expected, SHALLOW.depths, strict=True)
    ]


def test_kvt_with_all_keys_is_dense(tiny, images):
    model = create_model("kvt_cvt_13", architecture=SHALLOW, num_classes=10, topk=[64, 16, 1.0]).eval()
    model.load_state_dict(tiny.state_dict())
    with torch.no_grad():
        torch.testing.assert_close(model(images), tiny(images))


def test_bad_topk_is_refused():
    with pytest.raises(ValueError, match="topk: expected one for all or one for each of 3 stages"):
        create_model("kvt_cvt_13", topk=(1, 2))
    with pytest.raises(ValueError, match="topk"):
        create_model("kvt_cvt_13", topk=(0.5, 0.5, 1.5))


@pytest.mark.parametrize(("height", "width"), [(64, 64), (97, 61), (3, 5)])
def test_any_image_size(tiny, height, width):
    with torch.no_grad():
        features = tiny.forward_features(torch.randn(1, 3, height, width))
        assert tiny.forward_head(features).shape == (1, 10)  # the official code drops a batch of one


def test_features(tiny, images):
    with torch.no_grad():
        final, maps = tiny.forward_intermediates(images, norm=True)
        only = tiny.forward_intermediates(images, indices=[1], stop_early=True, intermediates_only=True)
        torch.testing.assert_close(tiny.forward_features(images), final)
        torch.testing.assert_close(tiny.forward_head(final), tiny(images))
    assert final.shape == (2, 17, 32)
    assert [tuple(m.shape[1:]) for m in maps] == [(8, 16, 16), (16, 8, 8), (32, 4, 4)]
    torch.testing.assert_close(maps[2].flatten(2).transpose(1, 2), final[:, 1:])
    torch.testing.assert_close(only, maps[1:2])
    with pytest.raises(ValueError, match="output_fmt"):
        tiny.forward_intermediates(images, output_fmt="NLC")


def test_pruned_and_pooled_otherwise(tiny, images):
    assert tiny.get_classifier() is tiny.head
    tiny.reset_classifier(3, "avg")
    features = tiny.forward_features(images)
    torch.testing.assert_close(tiny.forward_head(features), tiny.head(features[:, 1:].mean(1)))
    tiny.reset_classifier(3, "")
    assert tiny(images).shape == (2, 17, 3)
    with pytest.raises(ValueError, match="global_pool: expected 'token' or 'avg' or ''"):
        tiny.reset_classifier(3, "max")
    tiny.prune_intermediate_layers([0, 1])
    assert tiny.num_features == 16 and tiny(images).shape == (2, 64, 16)
    with pytest.raises(ValueError, match="global_pool: expected 'avg' or ''"):
        tiny.reset_classifier(3, "token")


def test_optimizer_groups(tiny):
    assert tiny.no_weight_decay() == {"stages.2.cls_token"}
    groups = param_groups_layer_decay(tiny, weight_decay=0.05, layer_decay=0.75)
    assert len({group["lr_scale"] for group in groups}) == 6  # stem, four blocks, head
    assert sum(len(group["params"]) for group in groups) == len(list(tiny.parameters()))
    layer = {id(p): group["lr_scale"] for group in groups for p in group["params"]}
    first, last = tiny.stages[2].blocks
    assert layer[id(tiny.stages[2].cls_token)] == layer[id(first.norm1.weight)] < layer[id(last.norm1.weight)]
    assert layer[id(tiny.norm.weight)] == layer[id(last.norm1.weight)]


def test_drop_rates_reach_their_places():
    rates = {"drop_rate": 0.1, "proj_drop_rate": 0.2, "attn_drop_rate": 0.3, "drop_path_rate": 0.4}
    model = create_model("cvt_13", architecture=SHALLOW, **rates)
    blocks = [block for stage in model.stages for block in stage.blocks]
    assert [getattr(block.drop_path, "drop_prob", 0.0) for block in blocks] == pytest.approx([0.0, 0.0, 0.0, 0.4])
    assert {(b.attn.attn_drop.p, b.attn.proj_drop.p, b.mlp.drop1.p) for b in blocks} == {(0.3, 0.2, 0.2)}
    assert model.head_drop.p == 0.1


def test_gradient_checkpointing_gives_the_same_gradients(tiny, images):
    """BatchNorm in evaluation, since checkpointing would count each batch twice."""
    grads = []
    for enable in (False, True):
        tiny.zero_grad()
        tiny.set_grad_checkpointing(enable)
        tiny(images).square().sum().backward()
        grads.append({n: p.grad.clone() for n, p in tiny.named_parameters()})
    torch.testing.assert_close(grads[0], grads[1])
    unused = {name for name, grad in grads[0].items() if grad.abs().sum() == 0}
    # The classifier reads the class token alone, whose query in the last block is no convolution's.
    assert unused == {name for name in grads[0] if name.startswith("stages.2.blocks.1.attn.sources.query.")}


def test_bad_architecture():
    with pytest.raises(ValueError, match="num_heads: expected one for each of 2 stages"):
        Architecture((1, 1), embed_dims=(8, 8))
