"""Which patches were kept, and features as maps again."""

import pytest
import timm
import torch
from small_vits import small_vit

from regard.reduction import reorganize, reorganized, token_map, watch_tokens


def test_positions_are_those_of_the_image(vit, images):
    """Layer by layer, what a kept patch is can be told from its token before the layer."""
    entered = {}
    for index in (1, 2):
        vit.blocks[index].norm2.register_forward_pre_hook(
            lambda _m, given, index=index: entered.update({index: given[0][:, 1:]})
        )
    with torch.no_grad():
        with reorganized(vit, 1.0, (1,)):
            vit(images)
        whole = entered[1]
        reorganize(vit, 0.5, (1, 2))
        with watch_tokens(vit) as seen:
            vit(images)
    first, second = seen.positions[1], seen.positions[2]
    assert first.shape == (3, 8) and second.shape == (3, 5)
    torch.testing.assert_close(entered[1][:, :8], whole.gather(1, first.unsqueeze(-1).expand(-1, -1, 32)))
    for image in range(3):
        assert set(second[image].tolist()) <= {*first[image].tolist(), -1}


def test_survived_counts_layers(vit, images):
    reorganize(vit, 0.5)
    with torch.no_grad(), watch_tokens(vit) as seen:
        vit(images[:1])
        vit(images)  # the last run is what is seen
    survived, positions = seen.survived(), seen.positions
    assert survived.shape == (3, 16)
    for image in range(3):
        for patch in range(16):
            assert survived[image, patch] == sum(patch in kept[image].tolist() for kept in positions.values())
    assert (survived[:, :].amax(dim=1) == 3).all()


def test_token_map(vit, images):
    model = small_vit(dynamic_img_size=True)
    with pytest.raises(ValueError, match="no reorganized layers"):
        token_map(model, images)
    reorganize(model, 0.5, fuse=False)
    model.train()
    model.blocks[0].eval()
    drawn = token_map(model, torch.randn(2, 3, 24, 40))
    assert drawn.shape == (2, 3, 5)
    # 15 patches -> 8 -> 4 -> 2
    assert [(drawn[0] >= layers).sum().item() for layers in (1, 2, 3)] == [8, 4, 2]
    assert model.training and model.blocks[1].training and not model.blocks[0].training


def test_nothing_was_seen(vit):
    reorganize(vit, 0.5)
    with watch_tokens(vit) as seen, pytest.raises(RuntimeError, match="run the reorganized model"):
        seen.survived()


def test_maps_before_the_first_reduction_are_the_unreduced_ones(vit, images):
    with torch.no_grad():
        expected = vit.forward_intermediates(images, indices=[0], norm=True, intermediates_only=True)
        reorganize(vit, 0.5)
        found = vit.forward_intermediates(images, indices=[0], norm=True, intermediates_only=True)
    assert torch.equal(found[0], expected[0])


@pytest.mark.parametrize("norm", [False, True])
def test_maps_hold_every_patch_in_its_place(vit, images, norm):
    reorganize(vit, 0.5)
    with torch.no_grad(), watch_tokens(vit) as seen:
        final = vit.forward_features(images)
        tokens, maps = vit.forward_intermediates(images, indices=[1, 3], norm=norm, output_fmt="NLC")
    torch.testing.assert_close(tokens, final)
    assert [tuple(m.shape) for m in maps] == [(3, 16, 32)] * 2
    last = maps[1] if norm else vit.norm(maps[1])
    kept = seen.positions[3]
    for image in range(3):
        for rank, patch in enumerate(kept[image].tolist()):
            if patch >= 0:
                torch.testing.assert_close(last[image, patch], final[image, 1 + rank])
    # Patches that went in the first reduction have the value that they had then, in all later maps.
    gone = seen.survived() == 0
    assert gone.any()
    torch.testing.assert_close(maps[1][gone], maps[0][gone])


def test_forms_of_the_maps(vit, images):
    reorganize(vit, 0.5)
    with torch.no_grad():
        tokens, maps = vit.forward_intermediates(images, indices=2)
        assert tokens.shape == (3, 5, 32) and [tuple(m.shape) for m in maps] == [(3, 32, 4, 4)] * 2
        flat = vit.forward_intermediates(images, indices=2, output_fmt="NLC", intermediates_only=True)
        torch.testing.assert_close(flat[1], maps[1].flatten(2).transpose(1, 2))
        pairs = vit.forward_intermediates(images, indices=2, return_prefix_tokens=True, intermediates_only=True)
        torch.testing.assert_close(pairs[1][0], maps[1])
        assert pairs[1][1].shape == (3, 1, 32)
        named = vit.forward_intermediates(images, indices=2, output_dict=True)
        torch.testing.assert_close(named["image_intermediates"][1], maps[1])
        torch.testing.assert_close(named["image_features"], tokens)
        early = vit.forward_intermediates(images, indices=[1], stop_early=True, intermediates_only=True)
        torch.testing.assert_close(early[0], vit.forward_intermediates(images, [1], intermediates_only=True)[0])
        with pytest.raises(ValueError, match="output_fmt"):
            vit.forward_intermediates(images, output_fmt="NHWC")


def test_features_only(images):
    options = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "num_heads": 2, "features_only": True}
    model = timm.create_model("deit_tiny_patch16_224", out_indices=(1, 4), **options).eval()
    record = reorganize(model, 0.5)
    assert record.layers == (1, 2, 3)
    with torch.no_grad():
        assert [tuple(m.shape) for m in model(images)] == [(3, 32, 4, 4)] * 2
