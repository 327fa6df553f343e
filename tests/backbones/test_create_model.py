"""regard.create_model: names, and what timm does with the rest."""

import subprocess
import sys

import pytest
import timm

import regard


def test_importing_the_backbones_registers_them_with_timm():
    """In a fresh process, where nothing else has imported them."""
    code = (
        "import timm; before = timm.is_model('kvt_deit_tiny'); import regard.backbones;"
        "print(before, timm.is_model('kvt_deit_tiny'))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "True"]


def test_unknown_name_lists_the_nearest():
    with pytest.raises(ValueError, match=r"unknown model 'kvt_deit_tny'; nearest known: kvt_deit_tiny, "):
        regard.create_model("kvt_deit_tny")


def test_name_of_another_type():
    with pytest.raises(TypeError, match="name: expected a model's name, got int"):
        regard.create_model(3)


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "vit_tiny_patch16_224.augreg_in21k"])
def test_timm_models_and_tags_pass(name):
    model = regard.create_model(name, img_size=32, num_classes=3, depth=1)
    assert isinstance(model, timm.models.VisionTransformer)
    assert model.num_classes == 3
