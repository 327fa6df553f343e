"""EViT backbones: parity with the official implementation, checkpoints, and what is particular to them."""

import copy
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from synthetic import samples, synthetic_images, synthetic_state
from torch.utils.flop_counter import FlopCounterMode

from regard.backbones import create_model
from regard.backbones.evit import checkpoint_filter_fn
from regard.reduction import restore_tokens, watch_tokens

GOLDEN = Path(__file__).parent / "goldens" / "evit_deit_small.npz"
SMALL = {"img_size": 64, "num_classes": 10, "embed_dim": 48, "num_heads": 3}


@pytest.fixture(scope="module")
def golden():
    return dict(np.load(GOLDEN))


@pytest.fixture(scope="module")
def filled():
    model = create_model("evit_deit_small").eval()
    model.load_state_dict(synthetic_state(model.state_dict()))
    return model


@pytest.mark.parametrize(("name", "count"), [("evit_deit_small", 22_050_664), ("evit_deit_base", 86_567_656)])
def test_parameter_count_is_the_published_one(name, count):
    with torch.device("meta"):
        model = create_model(name)
    assert sum(p.numel() for p in model.parameters()) == count


def test_outputs_equal_the_official_ones_in_float64(filled, golden):
    model, names, seen = copy.deepcopy(filled).double(), golden["stage_names"].tolist(), {}
    for name in names:
        model.get_submodule(name).register_forward_hook(lambda _m, _i, out, name=name: seen.update({name: out}))
    with torch.no_grad(), watch_tokens(model) as tokens:
        logits = model(synthetic_images(4, 224).double())
    assert [seen[f"blocks.{layer}"].shape[1] for layer in (2, 3, 6, 9, 11)] == [197, 140, 100, 72, 72]
    # 1e-9: a faithful implementation is at rounding, each deliberate mistake at 1.7e-4 or more (goldens/README.md).
    for name, expected in zip(names, golden["stage_samples_fp64"], strict=True):
        found = samples(seen[name])
        torch.testing.assert_close(
            found, torch.from_numpy(expected), atol=1e-9, rtol=0, msg=lambda m, name=name: f"{name}: {m}"
        )
    for number, step in enumerate(tokens.steps):
        assert torch.equal(step.kept, torch.from_numpy(golden[f"kept_{number}"]).long())
    torch.testing.assert_close(logits, torch.from_numpy(golden["logits_fp64"]), atol=1e-9, rtol=0)


def test_outputs_equal_the_official_ones_in_float32(filled, golden):
    with torch.no_grad():
        logits = filled(synthetic_images(4, 224))
    error = (logits.double() - torch.from_numpy(golden["logits_fp64"])).abs().amax(dim=1)
    # The closest choice is between scores 2.3e-7 apart: another order of summation may take the other patch.
    assert error.median() < 1.7e-4, error
    assert error.max() < 1e-2, error


@pytest.mark.parametrize("change", [{"fuse": False}, {"keep_rate": 0.69}, {"layers": (3, 6, 8)}])
def test_the_parity_test_would_notice(filled, golden, change):
    model = create_model("evit_deit_small", **change).eval()
    model.load_state_dict(filled.state_dict())
    with torch.no_grad():
        logits = model(synthetic_images(1, 224))
    assert (logits.double() - torch.from_numpy(golden["logits_fp64"][:1])).abs().max() > 1e-4


def test_official_checkpoint_loads(tmp_path, filled):
    official = synthetic_state(filled.state_dict())
    torch.save({"model": {f"module.{k}": v for k, v in official.items()}, "epoch": 299}, tmp_path / "evit.pth")
    model = create_model("evit_deit_small")
    content = torch.load(tmp_path / "evit.pth", weights_only=True)
    model.load_state_dict(checkpoint_filter_fn(content, model))
    torch.testing.assert_close(model.state_dict(), dict(official), rtol=0, atol=0)


def test_without_reduction_it_is_deit():
    model = create_model("evit_deit_small", **SMALL, keep_rate=1.0).eval()
    dense = timm.create_model("deit_small_patch16_224", **SMALL).eval()
    dense.load_state_dict(model.state_dict())
    with torch.no_grad():
        assert torch.equal(model(synthetic_images(2, 64)), dense(synthetic_images(2, 64)))
        other = create_model("evit_deit_small", **SMALL, keep_rate=0.5).eval()
        other.load_state_dict(model.state_dict())
        restore_tokens(other)
        assert torch.equal(other(synthetic_images(2, 64)), dense(synthetic_images(2, 64)))


@pytest.mark.parametrize(("fuse", "counts"), [(True, [197, 140, 100, 72]), (False, [197, 139, 98, 69])])
def test_options_reach_the_model(fuse, counts):
    model = create_model("evit_deit_small", fuse=fuse, embed_dim=48, num_heads=3).eval()
    seen = []
    for block in model.blocks:
        block.register_forward_hook(lambda _m, _i, out: seen.append(out.shape[1]))
    with torch.no_grad():
        model(synthetic_images(1, 224))
    assert list(dict.fromkeys(seen)) == counts


@pytest.mark.parametrize(("keep_rate", "published"), [(1.0, 4.6), (0.9, 4.0), (0.7, 3.0), (0.5, 2.3)])
def test_multiply_adds_are_the_published_ones(keep_rate, published):
    """The scores' own are too few to show: the keys are not computed again."""
    with torch.device("meta"), torch.no_grad(), FlopCounterMode(display=False) as counted:
        create_model("evit_deit_small", keep_rate=keep_rate).eval()(torch.empty(1, 3, 224, 224))
    assert round(counted.get_total_flops() / 2e9, 1) == published


def test_features_only_puts_every_patch_in_its_place():
    model = create_model("evit_deit_small", features_only=True, out_indices=(2, 4, 11), **SMALL).eval()
    with torch.no_grad():
        assert [tuple(f.shape) for f in model(synthetic_images(2, 64))] == [(2, 48, 4, 4)] * 3
    early = create_model("evit_deit_small", features_only=True, out_indices=(1,), **SMALL).eval()
    with torch.no_grad():
        assert [tuple(f.shape) for f in early(synthetic_images(2, 64))] == [(2, 48, 4, 4)]


def test_names_are_registered_with_timm():
    assert timm.list_models(module="evit") == ["evit_deit_base", "evit_deit_small"]
    assert create_model("evit_deit_base", **SMALL).pretrained_cfg["architecture"] == "evit_deit_base"
