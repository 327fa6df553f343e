"""T2T-ViT: parity with the official implementation, and what is particular to it."""

import copy
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from synthetic import samples, synthetic_images, synthetic_weight

import regard
from regard.backbones import create_model
from regard.backbones.t2t_vit import T2TViT, TokenPerformer, checkpoint_filter_fn
from regard.inspection import attention_maps
from regard.mixers import DenseAttention, KNNAttention

GOLDENS = Path(__file__).parent / "goldens"
COUNTS = {
    "t2t_vit_7": 4_310_222,
    "t2t_vit_10": 5_889_230,
    "t2t_vit_12": 6_941_902,
    "t2t_vit_14": 21_545_550,
    "t2t_vit_19": 39_177_422,
    "t2t_vit_24": 64_105_934,
    "t2t_vit_t_14": 21_541_070,
    "t2t_vit_t_19": 39_172_942,
    "t2t_vit_t_24": 64_101_454,
    "kvt_t2t_vit_t_14": 21_541_070,
    "kvt_t2t_vit_t_19": 39_172_942,
}
KINDS = ["t2t_vit_14", "t2t_vit_t_14"]
SMALL = {"depth": 2, "embed_dim": 32, "num_heads": 2, "num_classes": 10}


def official_state(model):
    """The official names and shapes of a model, filled by the goldens' rule; made here from what the paper defines.

    Without the position embedding: the goldens keep the table of sines that the code constructs.
    """
    shapes = {}

    def layer(name, *shape):
        shapes.update({f"{name}.weight": shape, f"{name}.bias": shape[:1]})

    performer = isinstance(model.patch_embed.tokens[0], TokenPerformer)
    for i, width in ((1, model.in_chans * 49), (2, 64 * 9)):
        tokens = f"tokens_to_token.attention{i}"
        layer(f"{tokens}.norm1", width)
        layer(f"{tokens}.norm2", 64)
        if performer:
            layer(f"{tokens}.kqv", 192, width)
            layer(f"{tokens}.proj", 64, 64)
            shapes[f"{tokens}.w"] = (32, 64)
        else:
            shapes[f"{tokens}.attn.qkv.weight"] = (192, width)
            layer(f"{tokens}.attn.proj", 64, 64)
        for fc in ("mlp.0", "mlp.2") if performer else ("mlp.fc1", "mlp.fc2"):
            layer(f"{tokens}.{fc}", 64, 64)
    dim = model.embed_dim
    layer("tokens_to_token.project", dim, 64 * 9)
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
    layer("head", model.num_classes, dim)
    return {name: synthetic_weight(name, torch.Size(shape)) for name, shape in shapes.items()}


def fill(model):
    missing, unexpected = model.load_state_dict(checkpoint_filter_fn(official_state(model), model), strict=False)
    assert missing == ["pos_embed"] and not unexpected
    return model.eval()


@pytest.fixture(params=KINDS)
def tiny(request):
    torch.manual_seed(0)
    return create_model(request.param, **SMALL).eval()


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
    name = name.replace("tokens_to_token.attention1", "patch_embed.tokens.0")
    return name.replace("tokens_to_token.attention2", "patch_embed.tokens.1").replace("tokens_to_token", "patch_embed")


@pytest.mark.parametrize("name", KINDS)
def test_outputs_equal_the_official_ones_in_float64(name):
    model = fill(create_model(name)).double()
    golden = np.load(GOLDENS / f"{name}.npz")
    names, seen = golden["stage_names"].tolist(), {}
    for one in names:
        model.get_submodule(ours(one)).register_forward_hook(
            lambda _m, _i, out, one=one: seen.update({one: samples(out)})
        )
    with torch.no_grad():
        logits = model(synthetic_images(2, 224).double())
    assert list(seen) == names and len(names) == 18
    for one, expected in zip(names, torch.from_numpy(golden["stage_samples_fp64"]), strict=True):
        torch.testing.assert_close(seen[one], expected, atol=1e-9, rtol=0, msg=lambda m, one=one: f"{one}: {m}")
    torch.testing.assert_close(logits, torch.from_numpy(golden["logits_fp64"]), atol=1e-9, rtol=0)


def test_the_positions_are_not_trained_and_not_lost():
    model = create_model("t2t_vit_14", **SMALL, img_size=64)
    assert not model.pos_embed.requires_grad
    table = model.pos_embed[0].double()
    assert table.shape == (17, 32)
    torch.testing.assert_close(table[:, 1], torch.arange(17).double().cos(), atol=1e-7, rtol=0)
    torch.testing.assert_close(table[:, 6], (torch.arange(17) / 10000 ** (6 / 32)).sin().double(), atol=1e-6, rtol=0)
    directions = model.patch_embed.tokens[1].directions
    assert not directions.requires_grad
    torch.testing.assert_close(directions @ directions.T, 32 * torch.eye(32), atol=1e-4, rtol=0)
    model.init_weights()
    torch.testing.assert_close(model.pos_embed[0].double(), table, atol=0, rtol=0)


def test_official_checkpoint_loads_at_another_size(tmp_path, tiny):
    name = "t2t_vit_14" if isinstance(tiny.patch_embed.tokens[0], TokenPerformer) else "t2t_vit_t_14"
    official = {**official_state(tiny), "pos_embed": torch.randn(1, 197, 32)}
    content = {"state_dict": {}, "state_dict_ema": {f"module.{k}": v for k, v in official.items()}, "epoch": 299}
    torch.save(content, tmp_path / "checkpoint.pth.tar")
    options = {
        **SMALL,
        "num_classes": 7,
        "img_size": 96,
        "pretrained_cfg_overlay": {"file": str(tmp_path / "checkpoint.pth.tar")},
    }
    model = timm.create_model(name, pretrained=True, **options)
    torch.testing.assert_close(model.blocks[1].attn.qkv.weight, official["blocks.1.attn.qkv.weight"])
    assert model.pos_embed.shape == (1, 37, 32) and model.head.out_features == 7
    if name == "t2t_vit_14":  # key, query, value there
        loaded = model.patch_embed.tokens[0].qkv.weight
        assert torch.equal(loaded[:64], official["tokens_to_token.attention1.kqv.weight"][64:128])


def test_own_checkpoint_loads_through_the_filter(tiny):
    state = tiny.state_dict()
    filtered = checkpoint_filter_fn(state, tiny)
    assert filtered.keys() == state.keys() and torch.equal(filtered["pos_embed"], state["pos_embed"])


def test_performer_approximates_the_attention_of_its_kernel():
    """Many random features instead of 32: softmax attention with unscaled logits."""
    torch.manual_seed(0)
    tokens = TokenPerformer(20).double()
    tokens.directions = torch.nn.Parameter(torch.randn(200_000, 64, dtype=torch.float64))
    query, key, value = (0.15 * torch.randn(1, 9, 64, dtype=torch.float64) for _ in range(3))
    logits = query @ key.transpose(1, 2)
    expected, scaled = logits.softmax(-1) @ value, (logits / 8).softmax(-1) @ value
    found = tokens._attend(query, key, value)
    assert (found - expected).norm() < 0.1 * (found - scaled).norm()


def test_performer_is_computed_in_float32_under_autocast():
    torch.manual_seed(0)
    tokens = TokenPerformer(147).eval()
    x = 3 * torch.randn(1, 16, 147)
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.float16):
        out = tokens(x, (4, 4))
    assert torch.isfinite(out).all()
    with torch.no_grad():
        torch.testing.assert_close(out.float(), tokens(x, (4, 4)), atol=0.05, rtol=0.05)


@pytest.mark.parametrize("size", [(64, 64), (97, 61), (33, 200), (5, 3)])
def test_any_image_size(tiny, size):
    with torch.no_grad():
        final, maps = tiny.forward_intermediates(torch.randn(1, 3, *size), indices=[1])
    grid = tiny.patch_embed.dynamic_feat_size(size)
    assert maps[0].shape == (1, 32, *grid) and final.shape == (1, 1 + grid[0] * grid[1], 32)
    tiny.set_input_size(size)
    assert tiny.pos_embed.shape[1] == 1 + grid[0] * grid[1] and not tiny.pos_embed.requires_grad
    with torch.no_grad():
        torch.testing.assert_close(tiny.forward_features(torch.zeros(1, 3, *size)).shape, final.shape)


def test_sizes_that_are_refused():
    model = create_model("t2t_vit_14", **SMALL, img_size=64, dynamic_img_size=False)
    with pytest.raises(ValueError, match=r"x: expected images of \(64, 64\), got \(80, 64\)"):
        model(torch.zeros(1, 3, 80, 64))
    with pytest.raises(ValueError, match=r"img_size: \(2, 64\) is too small for one token"):
        model.set_input_size((2, 64))
    with pytest.raises(ValueError, match="patch_size: this embedding makes tokens of stride 16, got 8"):
        model.set_input_size((64, 64), patch_size=8)


def test_mechanism_of_the_blocks_and_of_the_tokens(images):
    model = create_model(
        "t2t_vit_t_14", **SMALL, attn_layer=regard.KNN(5), token_attn_layer=regard.Neighborhood(kernel_size=3)
    ).eval()
    dense = create_model("t2t_vit_t_14", **SMALL).eval()
    dense.load_state_dict(model.state_dict())
    assert [type(b.attn) for b in model.blocks] == [KNNAttention] * 2
    assert [b.attn.num_prefix_tokens for b in model.blocks] == [1, 1]
    assert [type(t.attn) for t in dense.patch_embed.tokens] == [DenseAttention] * 2
    seen = attention_maps(model, images, layer="patch_embed.tokens.0.attn") > 0
    assert seen.shape == (2, 1, 256, 256) and (seen.sum(-1) == 9).all()
    assert ((attention_maps(model, images, layer=-1) > 0).sum(-1) == 5).all()
    with torch.no_grad():
        assert (model(images) - dense(images)).abs().max() > 1e-4


def test_bad_options():
    with pytest.raises(ValueError, match="tokens: expected 'performer' or 'transformer', got 'convolution'"):
        T2TViT(tokens="convolution")
    with pytest.raises(ValueError, match="token_attn_layer: a Performer takes no other"):
        create_model("t2t_vit_14", token_attn_layer=regard.KNN(0.5))
    with pytest.raises(TypeError, match="attn_layer: expected a mechanism"):
        create_model("t2t_vit_14", attn_layer=torch.nn.Identity)


@pytest.mark.parametrize("name", ["kvt_t2t_vit_t_14", "kvt_t2t_vit_t_19"])
def test_kvt(name, images):
    model = create_model(name, **SMALL).eval()
    assert [b.attn.topk for b in model.blocks] == [0.5] * 2
    assert {type(t.attn) for t in model.patch_embed.tokens} == {DenseAttention}
    dense = create_model(name.removeprefix("kvt_"), **SMALL).eval()
    every = create_model(name, **SMALL, topk=17).eval()
    dense.load_state_dict(model.state_dict())
    every.load_state_dict(model.state_dict())
    with torch.no_grad():
        torch.testing.assert_close(every(images), dense(images))
        assert (model(images) - dense(images)).abs().max() > 1e-4


def test_copies_are_equal(tiny, images):
    with torch.no_grad():
        torch.testing.assert_close(copy.deepcopy(tiny)(images), tiny(images), rtol=0, atol=0)
