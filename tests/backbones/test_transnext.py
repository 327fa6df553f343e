"""TransNeXt and its mixture of heads: parity with the official implementation, and the attentions pixel by pixel."""

import copy
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from synthetic import samples, synthetic_images, synthetic_weight
from torch import nn
from torch.nn.functional import adaptive_avg_pool1d, normalize, softplus

from regard.auxiliary import collect_losses
from regard.backbones import create_model
from regard.backbones._aggregated import AggregatedAttention, CosineAttention, PositionBias
from regard.backbones.transnext import Architecture, checkpoint_filter_fn
from regard.mixers.moh import HeadRouter

GOLDEN = Path(__file__).parent / "goldens" / "moh_transnext_small_80.npz"
COUNTS = {
    "transnext_micro": 12_809_304,
    "transnext_tiny": 28_258_960,
    "transnext_small": 49_741_564,
    "transnext_base": 89_721_496,
    "moh_transnext_small_80": 49_910_548,
    "moh_transnext_small_75": 49_910_548,
    "moh_transnext_base_75": 90_020_632,
    "moh_transnext_base_50": 90_023_512,
}
SHALLOW = Architecture((1, 1, 2, 1), embed_dims=(16, 32, 48, 64), num_heads=(2, 2, 4, 4), mlp_ratios=(2, 2, 2, 2))
MIXED = replace(SHALLOW, shared=(2, 0, 1, 0), routed=(0, 1, 2, 2))


def official_state(model):
    """The official names and shapes of a model, filled by the goldens' rule; made here from what the papers define."""
    shapes = {}

    def layer(name, *shape, bias=True):
        shapes[f"{name}.weight"] = shape
        if bias:
            shapes[f"{name}.bias"] = shape[:1]

    sizes, channels = model.architecture, model.in_chans
    for i, (dim, depth, heads) in enumerate(zip(sizes.embed_dims, sizes.depths, sizes.num_heads, strict=True)):
        stage, hidden = i + 1, int(2 * int(dim * sizes.mlp_ratios[i]) / 3)
        kernel = 7 if i == 0 else 3
        layer(f"patch_embed{stage}.proj", dim, channels, kernel, kernel)
        layer(f"patch_embed{stage}.norm", dim)
        layer(f"norm{stage}", dim)
        for j in range(depth):
            block = f"block{stage}.{j}"
            attn = f"{block}.attn"
            for norm in ("norm1", "norm2"):
                layer(f"{block}.{norm}", dim)
            shapes[f"{attn}.temperature"] = (heads, 1, 1)
            shapes[f"{attn}.query_embedding"] = (heads, 1, dim // heads)
            layer(f"{attn}.cpb_fc1", 512, 2)
            layer(f"{attn}.cpb_fc2", heads, 512)
            layer(f"{attn}.proj", dim, dim)
            if sizes.reductions[i] == 1:
                layer(f"{attn}.qkv", 3 * dim, dim)
            else:
                layer(f"{attn}.q", dim, dim)
                layer(f"{attn}.kv", 2 * dim, dim)
                layer(f"{attn}.sr", dim, dim, 1, 1)
                layer(f"{attn}.norm", dim)
                shapes[f"{attn}.relative_pos_bias_local"] = (heads, 9)
                shapes[f"{attn}.learnable_tokens"] = (heads, dim // heads, 9)
                shapes[f"{attn}.learnable_bias"] = (heads, 1, 9)
            if sizes.shared is not None:
                shared, routed = sizes.shared[i], sizes.routed[i]
                if routed:
                    layer(f"{attn}.wg", heads - shared, dim, bias=False)
                if routed and shared:
                    layer(f"{attn}.wg_0", 2, dim, bias=False)
                if shared > 1:
                    layer(f"{attn}.wg_1", shared, dim, bias=False)
            layer(f"{block}.mlp.fc1", 2 * hidden, dim)
            layer(f"{block}.mlp.fc2", dim, hidden)
            layer(f"{block}.mlp.dwconv.dwconv", hidden, 1, 3, 3)
        channels = dim
    layer("head", model.num_classes, channels)
    return {name: synthetic_weight(name, torch.Size(shape)) for name, shape in shapes.items()}


def shallow(architecture, **options):
    """A small model in float64 whose every parameter matters: biases, routers and embeddings are not zero."""
    model = create_model("transnext_micro", architecture=architecture, num_classes=10, **options)
    model.load_state_dict(checkpoint_filter_fn(official_state(model), model))
    return model.double().eval()


@pytest.mark.parametrize("name", COUNTS)
def test_parameter_count_is_the_published_one(name):
    with torch.device("meta"):
        model = create_model(name)
    assert sum(p.numel() for p in model.parameters()) == COUNTS[name]


def test_names_are_registered_with_timm():
    assert sorted(timm.list_models(module="transnext")) == sorted(COUNTS)


def ours(name):
    """The module whose output the official module `name` has."""
    kind = name.rstrip("0123456789.")
    stage, _, block = name.removeprefix(kind).partition(".")
    inner = {"patch_embed": "patch_embed", "block": f"blocks.{block}", "norm": "norm"}[kind]
    return f"stages.{int(stage) - 1}.{inner}"


def test_outputs_and_balance_losses_equal_the_official_ones_in_float64():
    model = create_model("moh_transnext_small_80")
    official = official_state(model)
    assert len(official) == 1145
    model.load_state_dict(checkpoint_filter_fn(official, model))
    model = model.double().eval()
    golden = np.load(GOLDEN)
    names = golden["stage_names"].tolist()
    seen = {}

    def keep(name):
        return lambda _m, _i, out: seen.update({name: samples(out[0] if isinstance(out, tuple) else out)})

    for name in names:
        model.get_submodule(ours(name)).register_forward_hook(keep(name))
    with torch.no_grad(), collect_losses(model) as losses:
        logits = model(synthetic_images(4, 224).double())
    assert list(seen) == names
    # 1e-9: a faithful implementation is at rounding, deliberate mistakes at 1.7e-4 or more (goldens/README.md).
    for name, expected in zip(names, torch.from_numpy(golden["stage_samples_fp64"]), strict=True):
        torch.testing.assert_close(seen[name], expected, atol=1e-9, rtol=0, msg=lambda m, name=name: f"{name}: {m}")
    torch.testing.assert_close(logits, torch.from_numpy(golden["logits_fp64"]), atol=1e-9, rtol=0)
    balance = torch.from_numpy(golden["balance"])
    torch.testing.assert_close(torch.stack(losses.by_name["balance"]), balance, atol=1e-9, rtol=0)
    torch.testing.assert_close(losses.total(), 0.01 * balance.mean(), atol=1e-9, rtol=0)


def test_official_checkpoint_loads(tmp_path):
    model = create_model("transnext_micro", architecture=MIXED)
    official = official_state(model)
    tables = {"relative_pos_index1": torch.zeros(4), "block1.0.attn.padding_mask": torch.zeros(4)}
    content = {"model": {f"module.{k}": v for k, v in {**official, **tables}.items()}, "epoch": 299}
    torch.save(content, tmp_path / "checkpoint.pth")
    content = torch.load(tmp_path / "checkpoint.pth", weights_only=True)
    model.load_state_dict(checkpoint_filter_fn(content, model))
    attn = model.stages[2].blocks[1].attn
    assert torch.equal(attn.router.choose.weight, official["block3.1.attn.wg.weight"])
    assert torch.equal(attn.local_tokens_bias, official["block3.1.attn.learnable_bias"])
    state = model.state_dict()
    assert checkpoint_filter_fn(state, model).keys() == state.keys()


def naive_bias(bias, grid, pooled):
    """(H, N, P): the MLP of each pair's offset, on the centres of adaptive pooling's cells."""
    centres = [
        adaptive_avg_pool1d(torch.arange(size).double()[None], cells)[0]
        for size, cells in zip(grid, pooled, strict=True)
    ]
    rows = []
    for y in range(grid[0]):
        for x in range(grid[1]):
            offsets = [((y - cy) / 6 * 8, (x - cx) / 4 * 8) for cy in centres[0] for cx in centres[1]]
            bent = [[math.copysign(math.log2(abs(part) + 1) / 3, part) for part in pair] for pair in offsets]
            rows.append(bias.fc2(bias.fc1(torch.tensor(bent, dtype=torch.float64)).relu()))
    return torch.stack(rows).permute(2, 0, 1)


@pytest.mark.parametrize(
    ("grid", "pooled"), [((6, 8), (3, 4)), ((5, 7), (2, 3)), ((3, 9), (1, 9)), ((4, 4), (4, 4)), ((1, 1), (1, 1))]
)
def test_position_biases_are_the_definition(grid, pooled):
    torch.manual_seed(0)
    bias = PositionBias(3, (7, 5)).double()
    torch.testing.assert_close(bias(grid, pooled), naive_bias(bias, grid, pooled))


def test_position_biases_of_a_grid_of_one_cell_in_training():
    assert torch.isfinite(PositionBias(3, (1, 1))((2, 3), (1, 1))).all()


def perturbed(attn):
    with torch.no_grad():
        for parameter in attn.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return attn.double().eval()


def naive_aggregated(attn, x, grid):
    """One image, pixel by pixel and head by head, from the paper's equations."""
    (height, width), dim = grid, attn.head_dim
    pooled = tuple(max(1, size // attn.reduction) for size in grid)
    maps = torch.nn.functional.gelu(attn.pool_proj(x.T.view(1, -1, *grid)))
    summary = attn.pool_norm(nn.AdaptiveAvgPool2d(pooled)(maps)[0].flatten(1).T)
    bias = naive_bias(attn.position_bias, grid, pooled)
    query, kv, far_kv = attn.q(x), attn.kv(x), attn.kv(summary)
    out = torch.zeros_like(x)
    for head in range(attn.num_heads):
        part = slice(head * dim, (head + 1) * dim)
        value_part = slice(attn.dim + head * dim, attn.dim + (head + 1) * dim)
        for y in range(height):
            for column in range(width):
                place = y * width + column
                unit = normalize(query[place, part], dim=0)
                cells = [(y + i, column + j) for i in (-1, 0, 1) for j in (-1, 0, 1)]
                inside = [0 <= a < height and 0 <= b < width for a, b in cells]
                count = sum(inside) + len(summary)
                scaled = (unit + attn.query_embedding[head, 0]) * softplus(attn.temperature[head]) * math.log(count)
                logits, values = [], []
                for cell, ((a, b), visible) in enumerate(zip(cells, inside, strict=True)):
                    if visible:
                        key = normalize(kv[a * width + b, part], dim=0)
                        logits.append((scaled * key).sum() + attn.local_bias[head, cell])
                        values.append(kv[a * width + b, value_part])
                for cell in range(len(summary)):
                    key = normalize(far_kv[cell, part], dim=0)
                    logits.append((scaled * key).sum() + bias[head, place, cell])
                    values.append(far_kv[cell, value_part])
                weights = torch.stack(logits).softmax(0)
                extra = (unit @ attn.local_tokens[head] + attn.local_tokens_bias[head, 0])[torch.tensor(inside)]
                weights[: len(extra)] = weights[: len(extra)] + extra
                out[place, part] = weights @ torch.stack(values)
    return out


@pytest.mark.parametrize("grid", [(4, 4), (3, 5), (1, 2)])
def test_aggregated_attention_is_the_definition(grid):
    torch.manual_seed(0)
    attn = perturbed(AggregatedAttention(8, 2, (7, 5), reduction=2))
    x = torch.randn(2, math.prod(grid), 8).double()
    with torch.no_grad():
        expected = torch.stack([attn.proj(naive_aggregated(attn, image, grid)) for image in x])
        torch.testing.assert_close(attn(x, grid_size=grid), expected)


def test_cosine_attention_is_the_definition():
    torch.manual_seed(0)
    attn, x = perturbed(CosineAttention(8, 2, (7, 5))), torch.randn(2, 12, 8).double()
    query, key, value = attn.qkv(x).view(2, 12, 3, 2, 4).permute(2, 0, 3, 1, 4)
    query = (normalize(query, dim=-1) + attn.query_embedding) * softplus(attn.temperature) * math.log(12)
    logits = query @ normalize(key, dim=-1).mT + naive_bias(attn.position_bias, (3, 4), (3, 4))
    expected = attn.proj((logits.softmax(-1) @ value).transpose(1, 2).flatten(2))
    torch.testing.assert_close(attn(x, grid_size=(3, 4)), expected)


@pytest.mark.parametrize(
    ("shared", "routed"), [((2, 2, 4, 4), (0, 0, 0, 0)), ((1, 0, 2, 3), (1, 2, 2, 1))], ids=["all shared", "all routed"]
)
def test_routers_of_zeros_with_all_heads_leave_transnext(shared, routed):
    plain, mixed = shallow(SHALLOW), shallow(replace(SHALLOW, shared=shared, routed=routed))
    x = synthetic_images(1, 64).double()
    with torch.no_grad():
        assert not torch.allclose(mixed(x), plain(x))
        for name, weight in mixed.named_parameters():
            if ".router." in name:
                weight.zero_()
        torch.testing.assert_close(mixed(x), plain(x))


def test_each_stage_has_the_heads_of_its_architecture():
    model = create_model("moh_transnext_base_50", device="meta")
    found = [(s.blocks[0].attn.router.shared, s.blocks[0].attn.router.routed) for s in model.stages]
    assert found == [(2, 2), (2, 4), (2, 6), (4, 8)]
    assert not any(isinstance(m, HeadRouter) for m in create_model("transnext_base", device="meta").modules())


def test_balance_is_collected_once_with_gradient_checkpointing():
    model, x, found = shallow(MIXED).train(), synthetic_images(2, 64).double(), []
    for enable in (False, True):
        model.zero_grad()
        model.set_grad_checkpointing(enable)
        with collect_losses(model) as losses:
            (model(x).square().sum() + losses.total()).backward()
        assert len(losses.by_name["balance"]) == 4  # the first stage's heads are all shared
        found.append({name: p.grad for name, p in model.named_parameters()})
    torch.testing.assert_close(found[0], found[1])
    # A softmax does not see a bias that all its keys share.
    assert all(grad.abs().sum() > 0 for name, grad in found[0].items() if not name.endswith("position_bias.fc2.bias"))


def test_half_precision_keeps_its_constants_in_float32():
    model = shallow(MIXED).float()
    x = synthetic_images(1, 64)
    with torch.no_grad():
        rounded = copy.deepcopy(model).bfloat16()(x.bfloat16())
    assert rounded.dtype == torch.bfloat16 and (rounded.float() - model(x)).abs().max() < 0.3 * model(x).std()


def test_position_biases_refer_to_the_training_grid():
    model = shallow(SHALLOW, pretrain_size=64)
    assert [stage.blocks[0].attn.position_bias.trained_grid[0] for stage in model.stages] == [16, 8, 4, 2]
    x = synthetic_images(1, 64).double()
    with torch.no_grad():
        assert not torch.allclose(model(x), shallow(SHALLOW)(x))


def test_no_weight_decay_on_temperatures_embeddings_and_biases():
    model = shallow(MIXED)
    kept = model.no_weight_decay()
    assert kept < {name for name, _ in model.named_parameters()}
    names = ("temperature", "query_embedding", "local_bias", "position_bias.fc1.weight")
    assert {f"stages.1.blocks.0.attn.{name}" for name in names} < kept
    assert "stages.1.blocks.0.attn.local_tokens_bias" not in kept


def test_drop_rates_reach_their_places():
    rates = {"drop_rate": 0.1, "proj_drop_rate": 0.2, "attn_drop_rate": 0.3, "drop_path_rate": 0.4}
    model = create_model("transnext_micro", architecture=SHALLOW, **rates)
    blocks = [block for stage in model.stages for block in stage.blocks]
    assert [getattr(block.drop_path, "drop_prob", 0.0) for block in blocks] == pytest.approx([0.0, 0.1, 0.2, 0.3, 0.4])
    assert {(b.attn.attn_drop.p, b.attn.proj_drop.p, b.mlp.drop.p) for b in blocks} == {(0.3, 0.2, 0.2)}
    assert model.head_drop.p == 0.1


def test_bad_arguments():
    with pytest.raises(ValueError, match="num_heads: expected one for each of 4 stages"):
        replace(SHALLOW, num_heads=(1, 2))
    with pytest.raises(ValueError, match="routed: shared and routed go together"):
        replace(SHALLOW, shared=(1, 1, 1, 1))
    with pytest.raises(ValueError, match="routed: 4 of the 3 heads"):
        create_model("transnext_micro", architecture=replace(SHALLOW, shared=(1,) * 4, routed=(1, 1, 4, 3)))
    with pytest.raises(ValueError, match="window_size: expected an odd number, got 4"):
        AggregatedAttention(8, 2, (7, 7), reduction=2, window_size=4)
    with pytest.raises(ValueError, match="num_heads: dim 8 is no multiple of 3"):
        CosineAttention(8, 3, (7, 7))
