"""The backbone contract, over one small model of every family: a new family is tested by being named here."""

import copy
import pickle

import pytest
import timm
import torch
from timm.models import group_parameters
from torch import nn

from regard import backbones
from regard.backbones import create_model

# The smallest model of TransNeXt has 12.8 million parameters in 21 blocks.
_SHALLOW_TRANSNEXT = backbones.transnext.Architecture(
    (1, 1, 2, 1), embed_dims=(24, 48, 48, 96), num_heads=(2, 2, 4, 4), shared=(2, 1, 1, 0), routed=(0, 1, 2, 2)
)

# family (a module of regard.backbones) -> its smallest model, and options with which it takes 64 pixels and others
SMALLEST = {
    "biformer": ("biformer_tiny", {"architecture": backbones.biformer.Architecture((1, 1, 2, 1))}),
    "clustr": ("clustr_b1", {}),
    "cvt": ("cvt_13", {"architecture": backbones.cvt.Architecture((1, 1, 2), (8, 16, 32), (1, 2, 4))}),
    "evit": ("evit_deit_small", {"img_size": 64, "dynamic_img_size": True, "dynamic_img_pad": True}),
    "fan": ("tap_fan_hybrid_tiny", {}),
    "kvt": ("kvt_deit_tiny", {"img_size": 64, "dynamic_img_size": True, "dynamic_img_pad": True}),
    "so_vit": ("so_vit_7", {"img_size": 64, "depth": 3, "embed_dim": 32}),
    "sparsifiner": ("sparsifiner_deit_small", {"img_size": 64, "depth": 4}),
    "t2t_vit": ("t2t_vit_7", {"img_size": 64, "depth": 3, "embed_dim": 32}),
    "transnext": ("moh_transnext_small_80", {"architecture": _SHALLOW_TRANSNEXT}),
}
COUNT = 10


def make(family, **options):
    name, own = SMALLEST[family]
    torch.manual_seed(0)
    return perturbed(create_model(name, **{"num_classes": COUNT, **own, **options})).eval()


@torch.no_grad()
def perturbed(model):
    """Fresh models hide mistakes behind zero biases, unit norms and small layer scales."""
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        if not parameter.is_meta and parameter.dim() < 2:
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model


def images(batch=2, height=64, width=64, channels=3):
    return torch.randn(batch, channels, height, width, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module", params=sorted(SMALLEST))
def family(request):
    return request.param


@pytest.fixture(scope="module")
def model(family):
    """One instance for the tests that leave it as it is."""
    return make(family)


def test_every_family_and_model_is_known():
    families = [module.__name__.rpartition(".")[2] for module in backbones.FAMILIES]
    assert sorted(SMALLEST) == sorted(families)
    registered = {name for family in families for name in timm.list_models(module=family)}
    assert backbones.list_models() == sorted(registered) and "clustr_b1" in registered


def test_images_do_not_see_each_other(model):
    net, x = copy.deepcopy(model).double(), images(3).double()
    with torch.no_grad():
        torch.testing.assert_close(net(x)[1:2], net(x[1:2]))


@pytest.mark.parametrize(("height", "width"), [(96, 80), (75, 53)])
def test_another_size_after_construction(model, height, width):
    with torch.no_grad():
        logits = model(images(1, height, width))
    assert logits.shape == (1, COUNT) and torch.isfinite(logits).all()


def test_state_dict_round_trip_from_the_meta_device(family, model):
    """Built without memory, then given memory and weights: the state_dict (and what timm fills) is all it needs."""
    with torch.device("meta"):
        other = make(family)
    assert {tensor.device.type for tensor in (*other.parameters(), *other.buffers())} == {"meta"}
    other.to_empty(device="cpu")
    for module in other.modules():
        if hasattr(module, "init_non_persistent_buffers"):
            module.init_non_persistent_buffers()
    other.load_state_dict(model.state_dict())
    with torch.no_grad():
        torch.testing.assert_close(other(images()), model(images()))


def test_device_and_dtype_options(family):
    net = make(family, device="meta", dtype=torch.float64)
    assert {(p.device.type, p.dtype) for p in net.parameters()} == {("meta", torch.float64)}


def test_to_bfloat16(model):
    with torch.no_grad():
        logits = copy.deepcopy(model).to(torch.bfloat16)(images().bfloat16())
    assert logits.dtype == torch.bfloat16 and torch.isfinite(logits).all()


def test_other_channels(family):
    assert make(family, in_chans=1)(images(channels=1)).shape == (2, COUNT)


def test_features_head_and_intermediates_agree(model):
    x = images()
    with torch.no_grad():
        final, maps = model.forward_intermediates(x)
        torch.testing.assert_close(model.forward_head(final), model(x))
        torch.testing.assert_close(model.forward_features(x), final)
        only = model.forward_intermediates(x, indices=[1], intermediates_only=True)
    torch.testing.assert_close(only, maps[1:2])


def test_features_only(family):
    net = make(family, features_only=True)
    x = images()
    with torch.no_grad():
        maps = net(x)
    assert [m.shape[1] for m in maps] == net.feature_info.channels()
    assert [64 // m.shape[-1] for m in maps] == net.feature_info.reduction()


def test_classifier(family):
    net, x = make(family), images()
    heads = net.get_classifier() if isinstance(net.get_classifier(), tuple) else (net.get_classifier(),)
    assert {head.out_features for head in heads} == {COUNT} and net.num_classes == COUNT
    net.reset_classifier(3)
    assert net(x).shape == (2, 3)
    net.reset_classifier(0)
    assert net(x).shape == (2, net.head_hidden_size) == net.forward_head(net.forward_features(x), pre_logits=True).shape
    cfg = net.pretrained_cfg
    names = [cfg["classifier"]] if isinstance(cfg["classifier"], str) else cfg["classifier"]
    assert all(isinstance(make(family).get_submodule(name), nn.Linear) for name in names)
    assert make(family, num_classes=0)(x).shape == (2, net.head_hidden_size)


def test_gradient_checkpointing_gives_the_same_gradients(family):
    net, x, gradients = make(family), images(1), []
    for enable in (False, True):
        net.zero_grad()
        net.set_grad_checkpointing(enable)
        net(x).square().sum().backward()
        gradients.append({name: p.grad for name, p in net.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys() and len(gradients[0]) > len(list(net.parameters())) // 2
    torch.testing.assert_close(*gradients)


def test_layer_groups_hold_every_parameter_once(model):
    for coarse in (False, True):
        groups = group_parameters(model, model.group_matcher(coarse=coarse))
        names = [name for group in groups.values() for name in group]
        assert sorted(names) == sorted(name for name, _ in model.named_parameters())
        assert len(groups) > 2
    assert isinstance(model.no_weight_decay(), set)


def test_deepcopy_and_pickle(model):
    x = images()
    with torch.no_grad():
        for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            torch.testing.assert_close(twin(x), model(x), rtol=0, atol=0)


@pytest.mark.slow
def test_compiles_as_one_graph(model):
    torch.compiler.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        torch.testing.assert_close(compiled(images()), model(images()))


def test_training_step_with_drop_path(family):
    net = make(family, drop_path_rate=0.2).train()
    net(images()).square().mean().backward()
    assert all(torch.isfinite(p.grad).all() for p in net.parameters() if p.grad is not None)
