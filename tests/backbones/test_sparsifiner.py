"""Sparsifiner's DeiT-Small: parity with the official implementation, its checkpoints, images of any shape."""

import copy
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from synthetic import samples, synthetic_images, synthetic_state

from regard.backbones import create_model
from regard.backbones.sparsifiner import checkpoint_filter_fn
from regard.losses import Outputs, SparsifinerLoss, collect_losses
from regard.mixers import SparsifinerAttention
from regard.mixers.sparsifiner import set_budget, taught_by

GOLDEN = Path(__file__).parent / "goldens" / "sparsifiner_deit_small.npz"
NAMES = {"query.": "proj_c_q.", "key.": "proj_c_k.", "down": "proj_n", "up": "proj_back_n"}
SMALL = {"img_size": 64, "num_classes": 10, "depth": 2, "embed_dim": 48, "num_heads": 3, "basis_grid": (4, 4)}


def official_state(model):
    """The model's weights by the goldens' rule, under their official names."""

    def official(name):
        head, found, leaf = name.partition("predictor.")
        if not found:
            return name
        ours = next(prefix for prefix in NAMES if leaf.startswith(prefix))
        return f"{head}mask_predictor.{NAMES[ours]}{leaf.removeprefix(ours)}"

    return synthetic_state({official(name): tensor for name, tensor in model.state_dict().items()})


@pytest.fixture(scope="module")
def golden():
    return {name: torch.from_numpy(array) for name, array in np.load(GOLDEN).items() if array.dtype.kind == "f"}


@pytest.fixture(scope="module")
def filled():
    model = create_model("sparsifiner_deit_small").eval()
    model.load_state_dict(checkpoint_filter_fn(official_state(model), model))
    return model


@pytest.fixture
def tiny():
    torch.manual_seed(0)
    return create_model("sparsifiner_deit_small", **SMALL).eval()


def test_parameter_count_is_the_published_one():
    with torch.device("meta"):
        model = create_model("sparsifiner_deit_small")
    assert sum(p.numel() for p in model.parameters()) == 22_251_880


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
    # Some rows choose between keys that differ by a rounding; another order of summation takes the other one.
    assert error.median() < 1.7e-4, error
    assert error.max() < 2e-2, error


@pytest.mark.parametrize("change", ["budget", "scale", "signs", "coefficients"])
def test_the_parity_test_would_notice_a_mistake(filled, golden, change):
    model = copy.deepcopy(filled)
    attn = model.blocks[5].attn
    if change == "budget":
        attn.budget = 51
    elif change == "scale":
        attn.predictor.scale = 32**-0.5
    else:
        changed = {"signs": {"official": False}, "coefficients": {"coefficients": 9}}[change]
        other = SparsifinerAttention(384, 6, num_prefix_tokens=1, **{"official": True, **changed})
        attn.predictor.options = other.predictor.options
    with torch.no_grad():
        logits = model(synthetic_images(1, 224))
    assert (logits.double() - golden["logits_fp64"][:1]).abs().max() > 1e-4


def test_official_checkpoint_loads(tmp_path, filled):
    official = official_state(filled)
    assert official["blocks.3.attn.mask_predictor.proj_back_n"].shape == (197, 32)
    torch.save({"model": {f"module.{k}": v for k, v in official.items()}, "epoch": 49}, tmp_path / "checkpoint.pth")
    model = create_model("sparsifiner_deit_small")
    content = torch.load(tmp_path / "checkpoint.pth", weights_only=True)
    model.load_state_dict(checkpoint_filter_fn(content, model))
    torch.testing.assert_close(model.state_dict(), filled.state_dict(), rtol=0, atol=0)
    assert checkpoint_filter_fn(filled.state_dict(), model).keys() == filled.state_dict().keys()


def test_weights_serve_another_image_size(filled):
    model = create_model("sparsifiner_deit_small", img_size=(64, 96), num_classes=1000)
    model.load_state_dict(checkpoint_filter_fn(official_state(filled), model))
    assert model.pos_embed.shape == (1, 25, 384) and model.blocks[0].attn.predictor.down.shape == (197, 32)


def test_dense_deit_weights_load_but_for_the_predictors():
    size = {"img_size": 64, "num_classes": 10}
    dense, model = timm.create_model("deit_small_patch16_224", **size), create_model("sparsifiner_deit_small", **size)
    missing, unexpected = model.load_state_dict(dense.state_dict(), strict=False)
    assert not unexpected and len(missing) == 12 * 6 and all(".attn.predictor." in name for name in missing)
    set_budget(model, 1.0)
    images = synthetic_images(2, 64)
    with torch.no_grad():
        torch.testing.assert_close(model.eval()(images), dense.eval()(images))


def test_grids_of_any_shape(tiny):
    """Wide and high images differ: the grid reaches every layer, and is not guessed from the number of tokens."""
    seen = []
    for block in tiny.blocks:
        block.attn.register_forward_pre_hook(lambda _m, _a, kw: seen.append(kw["grid_size"]), with_kwargs=True)
    with torch.no_grad():
        for height, width in ((64, 64), (32, 128), (128, 32), (33, 70), (5, 3)):
            images = torch.randn(2, 3, height, width)
            assert tiny(images).shape == (2, 10)
            grid = (-(-height // 16), -(-width // 16))
            assert seen == [grid] * 2
            final, maps = tiny.forward_intermediates(images)
            assert [tuple(m.shape) for m in maps] == [(2, 48, *grid)] * 2
            torch.testing.assert_close(final, tiny.forward_features(images))
            seen.clear()


def test_intermediates_are_timms(tiny):
    """With dense attention the model is timm's, and so is every form of its intermediates."""
    options = {k: v for k, v in SMALL.items() if k != "basis_grid"}
    dense = timm.create_model("deit_small_patch16_224", **options).eval()
    tiny.load_state_dict(dense.state_dict(), strict=False)
    set_budget(tiny, 1.0)
    images = synthetic_images(2, 64)
    forms = [
        {},
        {"indices": [0], "stop_early": True, "intermediates_only": True},
        {"norm": True, "output_fmt": "NLC", "return_prefix_tokens": True},
        {"output_dict": True, "return_prefix_tokens": True},
    ]
    with torch.no_grad():
        for form in forms:
            ours, theirs = (model.forward_intermediates(images, **form) for model in (tiny, dense))
            torch.testing.assert_close(ours, theirs)
        with pytest.raises(ValueError, match="output_fmt: expected 'NCHW' or 'NLC'"):
            tiny.forward_intermediates(images, output_fmt="NHWC")


def test_gradient_checkpointing_with_images_of_several_shapes(tiny):
    tiny.train()
    grads = []
    for enable in (False, True):
        tiny.zero_grad()
        tiny.set_grad_checkpointing(enable)
        wide, high = (tiny(torch.ones(1, 3, *size).cumsum(2).cumsum(3) / 1000) for size in ((32, 128), (128, 32)))
        (wide + high).square().sum().backward()
        grads.append({n: p.grad.clone() for n, p in tiny.named_parameters() if p.grad is not None})
    torch.testing.assert_close(grads[0], grads[1])


def test_the_published_recipe_in_small():
    """Two phases: predictors learn the dense teacher's maps, then the rest to live with few keys."""
    torch.manual_seed(0)
    options = {k: v for k, v in SMALL.items() if k != "basis_grid"}
    teacher = timm.create_model("deit_small_patch16_224", **options).eval()
    student = create_model("sparsifiner_deit_small", **SMALL, official=False, budget=1.0)
    student.load_state_dict(teacher.state_dict(), strict=False)
    images, labels, criterion = synthetic_images(8, 64), torch.arange(8), SparsifinerLoss()
    optimizer = torch.optim.AdamW(student.parameters(), lr=3e-3)
    found = {}
    for phase, budget in (("learn", 1.0), ("live", 0.25)):
        set_budget(student, budget)
        found[phase] = []
        for _ in range(30):
            with taught_by(student, teacher):
                with torch.no_grad():
                    taught = Outputs.of(teacher, images)
                with collect_losses(student) as losses:
                    output = Outputs.of(student, images)
            loss = criterion(output, taught, labels, losses.total() if phase == "learn" else 0.0)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            frozen = [p.grad is None for p in student.blocks[0].attn.predictor.parameters()]
            assert all(frozen) if phase == "live" else not any(frozen)
            optimizer.step()
            found[phase].append(loss.item())
    assert found["learn"][-1] < found["learn"][0] and found["live"][-1] < found["live"][0]


def test_patch_dropout_is_refused():
    with pytest.raises(ValueError, match="patch_drop_rate: expected 0, got 0.5"):
        create_model("sparsifiner_deit_small", **SMALL, patch_drop_rate=0.5)


def test_names_and_cfg():
    assert timm.list_models(module="sparsifiner") == ["sparsifiner_deit_small"]
    cfg = create_model("sparsifiner_deit_small", **SMALL).pretrained_cfg
    assert cfg["classifier"] == "head" and cfg["first_conv"] == "patch_embed.proj" and not cfg["fixed_input_size"]
