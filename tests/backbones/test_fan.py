"""FAN with token-aware pooling: parity with the official implementation, its checkpoints, what is particular to it."""

import copy
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from synthetic import samples, synthetic_images, synthetic_state
from timm.optim import param_groups_layer_decay

from regard.backbones import create_model
from regard.backbones._fan_parts import UnbiasedNorm2d
from regard.backbones.fan import FAN, Architecture, checkpoint_filter_fn
from regard.losses import ADL, collect_losses
from regard.mixers import KNN, TAP, KNNAttention

GOLDENS = Path(__file__).parent / "goldens"
COUNTS = {
    "tap_fan_tiny": 7_404_688,
    "tap_fan_small": 28_513_048,
    "tap_fan_base": 54_643_360,
    "tap_fan_large": 80_992_468,
    "tap_fan_hybrid_tiny": 7_523_752,
    "tap_fan_hybrid_small": 26_257_704,
    "tap_fan_hybrid_base": 50_735_528,
    "tap_fan_hybrid_large": 77_238_644,
    "fan_tiny": 7_319_920,
    "fan_small": 28_345_336,
    "fan_base": 54_350_320,
    "fan_large": 80_574_100,
    "fan_hybrid_tiny": 7_467_240,
    "fan_hybrid_small": 26_117_944,
    "fan_hybrid_base": 50_475_048,
    "fan_hybrid_large": 76_855_140,
}
SHALLOW = Architecture(32, 2, 4)
# What the official code's loss is for each layer of tap_fan_tiny on the four images, threshold 1, in float64.
OFFICIAL_ADL = (
    *(0.8724771463181823, 0.9419234392364819, 0.9173359346497869, 0.9446304884254213, 0.9321060592991668),
    *(0.9139945459884764, 0.9121000418950181, 0.8749500219932108, 0.8376228258974098, 0.8748864097970854),
    *(0.8959774400818222, 0.8164913003275998),
)


def official_state(model):
    """The official names and shapes of a model, filled by the goldens' rule."""
    state = {}
    for name, tensor in model.state_dict().items():
        name = name.replace(".tap.predictor.", ".dilation_predictor.proj.")
        if ".attn.qkv." in name:
            third = tensor.shape[0] // 3
            state[name.replace(".qkv.", ".q.")] = tensor[:third]
            state[name.replace(".qkv.", ".kv.")] = tensor[third:]
        else:
            state[name] = tensor
    return synthetic_state(state)


@pytest.fixture(scope="module")
def filled():
    model = create_model("tap_fan_tiny").eval()
    model.load_state_dict(checkpoint_filter_fn(official_state(model), model))
    return model


@pytest.fixture
def tiny():
    torch.manual_seed(0)
    return create_model("tap_fan_tiny", architecture=SHALLOW, num_classes=10).eval()


@pytest.mark.parametrize("name", COUNTS)
def test_parameter_count_is_the_published_one(name):
    with torch.device("meta"):
        model = create_model(name)
    assert sum(p.numel() for p in model.parameters()) == COUNTS[name]


def as_published(name, output):
    """Our module's output in the layout of the official one: blocks hand on (B, C, H, W) there."""
    if name == "pos_embed":
        output = output.expand(4, -1, -1)
    output = output[0] if isinstance(output, tuple) else output
    return output.transpose(1, 2) if name.startswith(("pos_embed", "blocks")) else output


def check_parity(model, golden, images):
    names, seen = golden["stage_names"].tolist(), {}
    for name in names:
        keep = lambda m, i, out, name=name: seen.update({name: samples(as_published(name, out))})  # noqa: E731
        model.get_submodule(name).register_forward_hook(keep)
    with torch.no_grad():
        logits = model(images.double())
    # 1e-9: a faithful implementation is at rounding, each deliberate mistake at 1.7e-4 or more (goldens/README.md).
    for name, expected in zip(names, torch.from_numpy(golden["stage_samples_fp64"]), strict=True):
        torch.testing.assert_close(seen[name], expected, atol=1e-9, rtol=0, msg=lambda m, name=name: f"{name}: {m}")
    torch.testing.assert_close(logits, torch.from_numpy(golden["logits_fp64"]), atol=1e-9, rtol=0)


def test_outputs_and_losses_equal_the_official_ones_in_float64(filled):
    model = copy.deepcopy(filled).double()
    ADL(threshold=1.0).apply(model)
    with collect_losses(model) as losses:
        check_parity(model, np.load(GOLDENS / "tap_fan_tiny.npz"), synthetic_images(4, 224))
    # The official mean over layers divides by their number and 1e-6 more; of one layer that number is 1.
    found = torch.stack(losses.by_name["adl"]) / (1 + 1e-6)
    torch.testing.assert_close(found, torch.tensor(OFFICIAL_ADL, dtype=torch.float64), atol=1e-9, rtol=0)


def test_outputs_of_a_hybrid_equal_the_official_ones_in_float64():
    model = create_model("tap_fan_hybrid_tiny").eval()
    model.load_state_dict(checkpoint_filter_fn(official_state(model), model))
    check_parity(model.double(), np.load(GOLDENS / "tap_fan_hybrid_tiny.npz"), synthetic_images(2, 224))


@pytest.mark.parametrize("change", ["border", "norm", "temperature", "pooled residual"])
def test_the_parity_test_would_notice_a_mistake(filled, change, monkeypatch):
    model = copy.deepcopy(filled)
    if change == "border":
        from regard.mixers import tap

        def other(cells, dilation):
            averages = torch.nn.functional.avg_pool2d(cells.movedim(-1, 1), 3, 1, 1, count_include_pad=False)
            return averages.movedim(1, -1)

        monkeypatch.setattr(tap, "dilated_average", other)
    elif change == "norm":
        for block in model.blocks:
            block.norm1.eps = 1e-3
    elif change == "temperature":
        for block in model.blocks:
            block.mlp.temperature.data.fill_(1.0)
    else:
        for block in model.blocks:
            block.register_forward_pre_hook(lambda m, args: (m.tap(args[0], grid_size=args[1]), args[1]))
    with torch.no_grad():
        logits = model(synthetic_images(4, 224)[:1])
    assert (
        logits.double() - torch.from_numpy(np.load(GOLDENS / "tap_fan_tiny.npz")["logits_fp64"][:1])
    ).abs().max() > (1.7e-4)


def test_official_checkpoint_loads(tmp_path, filled):
    """A file of the training script holds two sets of weights; the authors evaluate those that are not averaged."""
    official = official_state(filled)
    assert {"blocks.0.dilation_predictor.proj.2.weight", "blocks.11.attn.kv.bias"} < official.keys()
    averaged = {name: torch.zeros_like(weight) for name, weight in official.items()}
    content = {"epoch": 300, "state_dict_ema": averaged, "state_dict": {f"module.{k}": v for k, v in official.items()}}
    file = tmp_path / "tapadl.pth.tar"
    torch.save(content, file)
    model = create_model("tap_fan_tiny")
    model.load_state_dict(checkpoint_filter_fn(torch.load(file, weights_only=True), model))
    torch.testing.assert_close(model.state_dict(), filled.state_dict(), rtol=0, atol=0)
    assert torch.equal(model.blocks[3].attn.qkv.weight[:192], official["blocks.3.attn.q.weight"])
    own = filled.state_dict()
    assert checkpoint_filter_fn(own, filled).keys() == own.keys()


def test_timm_loads_a_checkpoint_file_for_other_classes_and_channels(tmp_path, filled):
    file = tmp_path / "checkpoint.pth"
    torch.save({"state_dict": official_state(filled)}, file)
    overlay = {"file": str(file)}
    model = timm.create_model(
        "tap_fan_tiny", pretrained=True, pretrained_cfg_overlay=overlay, num_classes=7, in_chans=1
    )
    torch.testing.assert_close(model.blocks[2].attn.qkv.weight, filled.blocks[2].attn.qkv.weight)
    first = filled.patch_embed.proj[0][0].weight
    torch.testing.assert_close(model.patch_embed.proj[0][0].weight, first.sum(1, keepdim=True))
    assert model.head.out_features == 7


def test_without_pooling_it_is_fan(filled):
    """K = 1 has no predictor; those of a checkpoint are left out, and tokens that pool nothing give the same."""
    model = create_model("fan_tiny").eval()
    model.load_state_dict(checkpoint_filter_fn(official_state(filled), model))
    pooled = copy.deepcopy(filled)
    for block in pooled.blocks:
        block.tap.predictor[0].weight.data.zero_()
        block.tap.predictor[1].bias.data.fill_(1.0)
        block.tap.predictor[2].weight.data.zero_()[0, 0, 1, 1] = 1e4
    images = synthetic_images(1, 96)
    with torch.no_grad():
        torch.testing.assert_close(pooled(images), model(images))
        assert not torch.allclose(filled(images), model(images))


@pytest.mark.parametrize("hybrid", [False, True])
@pytest.mark.parametrize(("height", "width"), [(64, 64), (97, 61), (33, 200), (5, 3)])
def test_any_image_size(height, width, hybrid):
    sizes = Architecture(32, 1, 4, (1, 1) if hybrid else None)
    model = create_model("tap_fan_tiny", architecture=sizes, num_classes=10).eval()
    with torch.no_grad():
        features = model.forward_features(torch.randn(2, 3, height, width))
        assert features.shape == (2, 1 + -(-height // 16) * -(-width // 16), 32)
        assert torch.isfinite(model.forward_head(features)).all()


def test_features(tiny):
    images = synthetic_images(2, 64)
    with torch.no_grad():
        final, maps = tiny.forward_intermediates(images)
        torch.testing.assert_close(tiny.forward_head(final), tiny(images))
        assert [tuple(m.shape) for m in maps] == [(2, 32, 4, 4)] * 2
        rows = tiny.forward_intermediates(images, [1], norm=True, output_fmt="NLC", intermediates_only=True)
        torch.testing.assert_close(rows[0], tiny.norm(maps[1].flatten(2).transpose(1, 2)))
        first = tiny.forward_intermediates(images, [0], stop_early=True, intermediates_only=True)
        torch.testing.assert_close(first, maps[:1])
        only = create_model("tap_fan_tiny", architecture=SHALLOW, features_only=True, out_indices=(0, 1)).eval()
        assert only.feature_info.reduction() == [16, 16]
        assert [tuple(m.shape) for m in only(images)] == [(2, 32, 4, 4)] * 2
        assert not any("cls" in name for name, _ in only.named_parameters())
        with pytest.raises(ValueError, match="output_fmt: expected 'NCHW' or 'NLC', got 'CHW'"):
            tiny.forward_intermediates(images, output_fmt="CHW")


def test_classifier(tiny):
    images = synthetic_images(2, 64)
    for pool, shape in (("token", (2, 3)), ("avg", (2, 3)), ("", (2, 17, 3))):
        tiny.reset_classifier(3, pool)
        assert tiny(images).shape == shape
    tiny.reset_classifier(0, "avg")
    torch.testing.assert_close(tiny(images), tiny.forward_features(images)[:, 1:].mean(1))
    with pytest.raises(ValueError, match="global_pool: expected 'token', 'avg' or ''"):
        tiny.reset_classifier(3, "max")


def test_first_weights_of_the_large_hybrids_classifier():
    sizes = Architecture(32, 1, 4, head_init_scale=0.001)
    assert create_model("fan_tiny", architecture=sizes).head.weight.std() < 1e-4
    assert create_model("fan_tiny", architecture=SHALLOW).head.weight.std() > 1e-2


def test_optimizer_groups(tiny):
    assert tiny.no_weight_decay() == {"cls_token", "blocks.0.mlp.temperature", "blocks.1.mlp.temperature"}
    groups = param_groups_layer_decay(tiny, weight_decay=0.05, layer_decay=0.75)
    assert sum(len(group["params"]) for group in groups) == len(list(tiny.parameters()))
    scale = {id(p): group["lr_scale"] for group in groups for p in group["params"]}
    tap, token = tiny.blocks[0].tap.predictor[0].weight, tiny.cls_attn_blocks[0].gamma1
    assert scale[id(tiny.cls_token)] < scale[id(tap)] == scale[id(tiny.blocks[0].gamma1)] < scale[id(token)]


def test_another_mechanism():
    model = create_model("tap_fan_tiny", architecture=SHALLOW, attn_layer=KNN(topk=5).attn_layer(), drop_path_rate=0.3)
    assert {type(block.attn) for block in model.blocks} == {KNNAttention}
    assert [block.drop_path.drop_prob for block in model.blocks] == [0.3, 0.3]  # the same in all, as published
    assert torch.isfinite(model(synthetic_images(1, 64))).all()
    with pytest.raises(ValueError, match="has token-aware pooling already"):
        TAP().apply(model)


def test_unbiased_norm():
    x = torch.randn(2, 6, 3, 5, dtype=torch.float64)
    norm = UnbiasedNorm2d(6).double()
    torch.nn.init.normal_(norm.weight), torch.nn.init.normal_(norm.bias)
    mean, variance = x.mean(1, keepdim=True), x.var(1, keepdim=True)
    expected = (x - mean) / (variance + norm.eps).sqrt() * norm.weight[:, None, None] + norm.bias[:, None, None]
    torch.testing.assert_close(norm(x), expected)


def test_bad_pool():
    with pytest.raises(ValueError, match="global_pool"):
        FAN(SHALLOW, global_pool="max")
