"""Converted models compile to one graph, and compiled ones notice their conversion."""

import pytest
import torch
from model_families import FAMILIES, fresh, images_for, output_of, parametrised

import regard

# An answered call, and an adapter.
_QUICK = ("vit", "torch-layer")


@pytest.fixture(autouse=True)
def clean_compiler():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def check_full_graph(name):
    model, images = fresh(name).float(), images_for(name).float()
    regard.convert(model, "knn(topk=0.5)", example_inputs=images)
    # The backend traces forward and backward as inductor does; its code generation takes minutes and is not ours.
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    expected, found = output_of(model, images), output_of(compiled, images)
    scale = expected.detach().abs().max()
    torch.testing.assert_close(found / scale, expected / scale, rtol=1e-4, atol=1e-4)
    gradients = [
        torch.autograd.grad(output.square().mean() / scale, list(model.parameters()), materialize_grads=True)
        for output in (found, expected)
    ]
    for ours, eager in zip(*gradients, strict=True):
        size = eager.abs().max().clamp(min=1e-3)
        torch.testing.assert_close(ours / size, eager / size, rtol=1e-2, atol=1e-2)


@parametrised(*_QUICK)
def test_full_graph(name):
    check_full_graph(name)


@pytest.mark.slow
@parametrised(*(name for name, family in FAMILIES.items() if family.converted and name not in _QUICK))
def test_full_graph_of_every_family(name):
    check_full_graph(name)


@pytest.mark.slow
def test_inductor():
    model, images = fresh("vit").float(), images_for("vit").float()
    regard.convert(model, "knn(topk=0.5)")
    with torch.no_grad():
        torch.testing.assert_close(torch.compile(model, fullgraph=True)(images), model(images), rtol=1e-4, atol=1e-4)


def test_a_compiled_model_notices_its_conversion():
    model, images = fresh("vit").float(), images_for("vit").float()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    with torch.no_grad():
        dense = compiled(images)
        regard.convert(compiled, "knn(topk=2)")
        assert torch.equal(compiled(images), model(images))
        assert not torch.allclose(model(images), dense, atol=1e-3)
        regard.restore(compiled)
        assert torch.equal(compiled(images), dense)


def test_dynamic_shapes():
    model = fresh("torch-layer").float()
    regard.convert(model, "knn(topk=0.5)", example_inputs=images_for("torch-layer").float())
    compiled = torch.compile(model, backend="eager", fullgraph=True, dynamic=True)
    with torch.no_grad():
        for tokens in (10, 13, 21):
            x = torch.randn(2, tokens, 32)
            torch.testing.assert_close(compiled(x), model(x))
