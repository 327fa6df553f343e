"""Reorganized models compile to one graph, are exported, and compiled ones notice their reorganization."""

import pytest
import torch
from small_vits import small_vit

from regard.reduction import KeepRateSchedule, reorganize, restore_tokens


@pytest.fixture(autouse=True)
def clean_compiler():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


@pytest.mark.parametrize("score", ["class", "mean"])
def test_full_graph(images, score):
    vit = small_vit(depth=2)
    reorganize(vit, 0.6, score=score)
    compiled = torch.compile(vit, backend="aot_eager", fullgraph=True)
    expected, found = vit(images), compiled(images)
    torch.testing.assert_close(found, expected)
    gradients = [torch.autograd.grad(y.square().sum(), list(vit.parameters())) for y in (expected, found)]
    for ours, other in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, other, rtol=1e-4, atol=1e-4)


def test_full_graph_of_the_maps(images):
    vit = small_vit(depth=2)
    reorganize(vit, 0.6)
    compiled = torch.compile(
        lambda x: vit.forward_intermediates(x, indices=[0, 1], intermediates_only=True),
        backend="eager",
        fullgraph=True,
    )
    with torch.no_grad():
        for found, expected in zip(
            compiled(images), vit.forward_intermediates(images, indices=[0, 1], intermediates_only=True), strict=True
        ):
            torch.testing.assert_close(found, expected)


def test_a_compiled_model_notices(vit, images):
    compiled = torch.compile(vit, backend="eager", fullgraph=True)
    with torch.no_grad():
        dense = compiled(images)
        reorganize(compiled, 0.5)
        assert torch.equal(compiled(images), vit(images))
        assert not torch.allclose(compiled(images), dense)
        restore_tokens(compiled)
        assert torch.equal(compiled(images), dense)


def test_a_schedule_does_not_exhaust_the_compiler(images):
    """More rates than torch.compile would trace one by one (its limit is 8)."""
    vit = small_vit(depth=2)
    reorganize(vit.train(), 0.5)
    compiled = torch.compile(vit, backend="eager", fullgraph=True)
    schedule = KeepRateSchedule(steps_per_epoch=10, start_epoch=0, epochs=1)
    for step in range(11):
        schedule.update(vit, step)
        with torch.no_grad():
            assert torch.equal(compiled(images), vit(images))


@pytest.mark.slow
def test_inductor(vit, images):
    reorganize(vit, 0.6)
    with torch.no_grad():
        torch.testing.assert_close(torch.compile(vit, fullgraph=True)(images), vit(images), rtol=1e-4, atol=1e-4)


@pytest.mark.slow
def test_export():
    model, images = small_vit(), torch.randn(2, 3, 32, 32)
    reorganize(model, 0.6)
    batch = torch.export.Dim("batch", min=2)
    program = torch.export.export(model, (images,), dynamic_shapes={"x": {0: batch}})
    more = torch.randn(5, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(program.module()(more), model(more))
