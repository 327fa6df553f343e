"""Losses that a model's own modules report: collected once, averaged over layers, nothing left behind."""

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from regard.auxiliary import Reporter, collect_losses


class Layer(Reporter, nn.Module):
    def __init__(self, name="square", weight=0.5):
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.name, self.loss_weight, self.computed = name, weight, 0

    def forward(self, x):
        if self.reporting:
            self.computed += 1
            self.report(self.name, self.linear(x).square().mean(), self.loss_weight)
        return self.linear(x).relu()


class Model(nn.Module):
    def __init__(self, *layers, checkpointed=False):
        super().__init__()
        self.layers, self.checkpointed = nn.ModuleList(layers), checkpointed

    def forward(self, x):
        for layer in self.layers:
            x = checkpoint(layer, x, use_reentrant=False) if self.checkpointed else layer(x)
        return x


def test_weighted_means_over_layers():
    model, x = Model(Layer(), Layer(), Layer("other", 2.0)), torch.randn(3, 4)
    with collect_losses(model) as losses:
        model(x)
        total = losses.total()
    square, other = losses.by_name["square"], losses.by_name["other"]
    assert (len(square), len(other)) == (2, 1)
    torch.testing.assert_close(total, 0.5 * (square[0] + square[1]) / 2 + 2.0 * other[0])


def test_nothing_is_computed_or_kept_otherwise():
    model = Model(Layer())
    model(torch.randn(3, 4))
    with collect_losses(model):
        pass
    model(torch.randn(3, 4))
    assert model.layers[0].computed == 0 and not model.layers[0].reporting


def test_a_model_without_losses():
    with collect_losses(nn.Linear(4, 4)) as losses:
        assert losses.total() == 0.0 and losses.by_name == {}


def test_left_as_found_after_an_error():
    model = Model(Layer())
    try:
        with collect_losses(model):
            model(torch.randn(3, 5))
    except RuntimeError:
        pass
    assert not model.layers[0].reporting


def test_activation_checkpointing_reports_once_and_gives_the_same_gradients():
    plain, x = Model(Layer(), Layer()), torch.randn(3, 4)
    again = Model(*plain.layers, checkpointed=True)
    gradients = []
    for model in (plain, again):
        model.zero_grad()
        with collect_losses(model) as losses:
            (model(x).sum() + losses.total()).backward()
        assert len(losses.by_name["square"]) == 2
        gradients.append([p.grad.clone() for p in model.parameters()])
    torch.testing.assert_close(*gradients)


def test_compiles_with_one_graph():
    torch.compiler.reset()
    model, x = Model(Layer()), torch.randn(3, 4)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with collect_losses(model) as expected:
        model(x)
    with collect_losses(compiled) as losses:
        compiled(x)
    torch.testing.assert_close(losses.total(), expected.total())
