"""So-ViT: parity with the official implementation, and what is particular to it."""

from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from synthetic import samples, synthetic_images, synthetic_weight

import regard
from regard.backbones import create_model
from regard.backbones.so_vit import SecondOrderPool, SoViT, checkpoint_filter_fn
from regard.mixers import KNNAttention

GOLDEN = Path(__file__).parent / "goldens" / "so_vit_7.npz"
COUNTS = {
    "so_vit_7": 5_579_664,
    "so_vit_10": 7_158_672,
    "so_vit_14": 24_718_704,
    "so_vit_19": 43_887_696,
    "kvt_so_vit_7": 5_579_664,
}
SMALL = {"depth": 2, "embed_dim": 32, "num_heads": 2, "num_classes": 10, "pool_widths": (6, 5)}


def official_state(model):
    """The official names and shapes of a model, filled by the goldens' rule; made here from what the paper defines.

    Without the position embedding: the golden keeps the table of sines that the code constructs.
    """
    shapes = {}

    def layer(name, *shape):
        shapes.update({f"{name}.weight": shape, f"{name}.bias": shape[:1]})

    def batch_norm(name, dim):
        layer(name, dim)
        shapes.update({f"{name}.running_mean": (dim,), f"{name}.running_var": (dim,)})
        shapes[f"{name}.num_batches_tracked"] = None

    layer("visual_tokens.tokens.stem.0", 64, model.in_chans, 3, 3)
    for i, width in enumerate((64, 256, 256)):
        stage = f"visual_tokens.tokens.stage.{i}"
        convs = {"conv1": (64, width, 1, 1), "conv2": (64, 64, 3, 3), "conv3": (256, 64, 1, 1)}
        for j, (name, shape) in enumerate(convs.items()):
            shapes[f"{stage}.{name}.weight"] = shape
            batch_norm(f"{stage}.bn{j + 1}", shape[0])
        shapes[f"{stage}.downsample.0.weight"] = (256, width, 1, 1)
        batch_norm(f"{stage}.downsample.1", 256)
    dim = model.embed_dim
    layer("visual_tokens.tokens.transition", dim, 256, 1, 1)
    shapes["cls_token"] = (1, 1, dim)
    for i, block in enumerate(model.blocks):
        for norm in ("norm1", "norm2"):
            layer(f"blocks.{i}.{norm}", dim)
        shapes[f"blocks.{i}.attn.qkv.weight"] = (3 * dim, dim)
        layer(f"blocks.{i}.attn.proj", dim, dim)
        hidden = block.mlp.fc1.out_features
        layer(f"blocks.{i}.mlp.fc1", hidden, dim)
        layer(f"blocks.{i}.mlp.fc2", dim, hidden)
    layer("norm", dim)
    widths = [bn.num_features for bn in model.second_order.bn]
    for i, width in enumerate(widths):
        shapes[f"classifier.representation.conv_dr_block.{i}.0.weight"] = (width, dim, 1, 1)
        batch_norm(f"classifier.representation.conv_dr_block.{i}.1", width)
    shapes["classifier.normalization.weight"] = widths[:1]
    layer("classifier.visual_fc", model.num_classes, widths[0] * widths[1])
    layer("classifier.cls_fc", model.num_classes, dim)
    return {
        name: torch.tensor(0) if shape is None else synthetic_weight(name, torch.Size(shape))
        for name, shape in shapes.items()
    }


@pytest.fixture
def tiny():
    torch.manual_seed(0)
    return create_model("so_vit_7", **SMALL).eval()


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
    name = name.replace("visual_tokens.tokens.stage", "patch_embed.stages")
    return {"visual_tokens": "patch_embed", "classifier.normalization": "second_order"}.get(name, name)


def test_outputs_equal_the_official_ones_in_float64():
    model = create_model("so_vit_7").eval()
    missing, unexpected = model.load_state_dict(checkpoint_filter_fn(official_state(model), model), strict=False)
    assert missing == ["pos_embed"] and not unexpected
    model.double()
    golden = np.load(GOLDEN)
    stages = dict(zip(golden["stage_names"].tolist(), torch.from_numpy(golden["stage_samples_fp64"]), strict=True))
    names = [name for name in stages if not name.endswith(("stem", "representation"))]  # functions here
    seen = {}
    for one in names:
        model.get_submodule(ours(one)).register_forward_hook(
            lambda _m, _i, out, one=one: seen.update({one: samples(out)})
        )
    with torch.no_grad():
        logits = model(synthetic_images(2, 224).double())
    assert list(seen) == names and len(names) == 13
    for one in names:
        torch.testing.assert_close(seen[one], stages[one], atol=1e-9, rtol=0, msg=lambda m, one=one: f"{one}: {m}")
    torch.testing.assert_close(logits, torch.from_numpy(golden["logits_fp64"]), atol=1e-9, rtol=0)


def test_official_checkpoint_loads_at_another_size(tmp_path, tiny):
    official = {**official_state(tiny), "pos_embed": torch.randn(1, 197, 32)}
    content = {"state_dict": {}, "state_dict_ema": {f"module.{k}": v for k, v in official.items()}, "epoch": 299}
    torch.save(content, tmp_path / "checkpoint.pth.tar")
    overlay = {"file": str(tmp_path / "checkpoint.pth.tar")}
    options = {**SMALL, "num_classes": 7, "img_size": 96, "in_chans": 1, "pretrained_cfg_overlay": overlay}
    model = timm.create_model("so_vit_7", pretrained=True, **options)
    assert torch.equal(
        model.second_order.reduce[1].weight, official["classifier.representation.conv_dr_block.1.0.weight"][..., 0, 0]
    )
    assert model.pos_embed.shape == (1, 37, 32)
    assert [head.out_features for head in model.get_classifier()] == [7, 7]
    assert model.patch_embed.stem.weight.shape[1] == 1


def test_own_checkpoint_loads_through_the_filter(tiny):
    state = tiny.state_dict()
    filtered = checkpoint_filter_fn(state, tiny)
    assert filtered.keys() == state.keys()
    assert all(torch.equal(filtered[name], state[name]) for name in state)


@pytest.fixture
def pool():
    torch.manual_seed(0)
    return SecondOrderPool(8, (6, 5)).double().eval()


def test_power_of_the_leading_singular_value(pool):
    """Of a matrix of rank one the result is its square root exactly; of any matrix, once the start is its vector."""
    left, right = torch.randn(2, 6, 1, dtype=torch.float64), torch.randn(2, 5, 1, dtype=torch.float64)
    one = left @ right.transpose(1, 2)
    size = left.norm(dim=1, keepdim=True) * right.norm(dim=1, keepdim=True)
    torch.testing.assert_close(pool._normalized(one), one / size.sqrt())
    full = torch.randn(1, 6, 5, dtype=torch.float64)
    u, s, v = torch.linalg.svd(full, full_matrices=False)
    with torch.no_grad():
        pool.start.copy_(u[0, :, 0])
    power = s.clone()
    power[:, 0] **= 0.5
    power[:, 1:] /= s[:, :1] ** 0.5 + 1e-5
    torch.testing.assert_close(pool._normalized(full), u * power[:, None] @ v)


def test_the_pool_ignores_order_and_common_offset(pool):
    x = torch.randn(2, 12, 8, dtype=torch.float64)
    torch.testing.assert_close(pool(x[:, torch.randperm(12)]), pool(x))
    assert pool(x).shape == (2, 30)


def test_alike_tokens_have_no_covariance_and_finite_gradients(pool):
    x = torch.ones(1, 12, 8, dtype=torch.float64, requires_grad=True)
    out = pool(x)
    out.sum().backward()
    torch.testing.assert_close(out, torch.zeros_like(out), atol=1e-8, rtol=0)
    assert torch.isfinite(x.grad).all()
    assert all(torch.isfinite(p.grad).all() for p in pool.parameters())


def test_the_pool_is_computed_in_float32_under_autocast(pool):
    pool.float()
    x = torch.randn(2, 12, 8)
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        lowered = pool(x)
    with torch.no_grad():
        torch.testing.assert_close(lowered, pool(x), atol=0.05, rtol=0.05)


@pytest.mark.parametrize("size", [(64, 64), (97, 61), (33, 200), (1, 3)])
def test_any_image_size(tiny, size):
    with torch.no_grad():
        final, maps = tiny.forward_intermediates(torch.randn(1, 3, *size), indices=[1])
        logits = tiny.forward_head(final)
    grid = (-(-size[0] // 16), -(-size[1] // 16))
    assert maps[0].shape == (1, 32, *grid) and final.shape == (1, 1 + grid[0] * grid[1], 32)
    assert logits.shape == (1, 10) and torch.isfinite(logits).all()


def test_classifiers(tiny, images):
    with torch.no_grad():
        features = tiny.forward_features(images)
        joined = tiny.forward_head(features, pre_logits=True)
        assert joined.shape == (2, tiny.head_hidden_size) == (2, 32 + 30)
        split = tiny.head(joined[:, :32]) + tiny.head_second_order(joined[:, 32:])
        torch.testing.assert_close(tiny.forward_head(features), split)
        torch.testing.assert_close(joined[:, :32], features[:, 0])
        tiny.reset_classifier(3)
        assert tiny(images).shape == (2, 3)
        tiny.reset_classifier(0)
        torch.testing.assert_close(tiny(images), joined)
        tiny.reset_classifier(0, "")
        torch.testing.assert_close(tiny(images), features)
    with pytest.raises(ValueError, match="global_pool: '' leaves no covariance"):
        tiny.reset_classifier(3, "")
    with pytest.raises(ValueError, match="global_pool: expected 'token' or '', got 'avg'"):
        SoViT(global_pool="avg")


def test_mechanism_is_exchangeable(tiny, images):
    knn = create_model("so_vit_7", **SMALL, attn_layer=regard.KNN(5)).eval()
    every = create_model("kvt_so_vit_7", **SMALL, topk=17).eval()
    for model in (knn, every):
        model.load_state_dict(tiny.state_dict())
    assert [type(b.attn) for b in knn.blocks] == [KNNAttention] * 2
    assert [b.attn.num_prefix_tokens for b in knn.blocks] == [1, 1]
    with torch.no_grad():
        torch.testing.assert_close(every(images), tiny(images))
        assert (knn(images) - tiny(images)).abs().max() > 1e-4
    assert [b.attn.topk for b in create_model("kvt_so_vit_7", **SMALL).blocks] == [0.5] * 2


def test_gradients_reach_all_that_is_trained(tiny, images):
    tiny.train()(images).square().sum().backward()
    without = {name for name, p in tiny.named_parameters() if p.grad is None or p.grad.abs().sum() == 0}
    assert without == {"pos_embed"}
