"""Token-aware average pooling: the module's identities, and the modifier on timm's models around any mixer."""

import copy
import pickle

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from regard.mixers import TAP, Dense, KNNAttention, TokenAwarePooling, parse_mechanism
from regard.mixers.tap import dilated_average

DIM = 12


def pooling(num_scales=4, **options):
    torch.manual_seed(0)
    return TokenAwarePooling(DIM, num_scales, **options).double().eval()


def tokens(count, batch=2):
    return torch.randn(batch, count, DIM, dtype=torch.float64)


def vit(base="dense", **options):
    torch.manual_seed(0)
    size = {"img_size": 32, "patch_size": 8, "embed_dim": DIM, "depth": 2, "num_heads": 3, "num_classes": 5}
    layer = parse_mechanism(base).attn_layer(num_prefix_tokens=1)
    return timm.models.VisionTransformer(**{**size, **options}, attn_layer=layer).eval()


@pytest.mark.parametrize("dilation", [1, 2, 3])
@pytest.mark.parametrize("grid", [(5, 9), (2, 2), (1, 4)])
def test_averages_are_ninths_of_unfolded_neighbourhoods(grid, dilation):
    cells = tokens(grid[0] * grid[1]).unflatten(1, grid)
    unfolded = F.unfold(cells.permute(0, 3, 1, 2), 3, dilation=dilation, padding=dilation)
    expected = unfolded.view(2, DIM, 9, *grid).mean(2).permute(0, 2, 3, 1)
    torch.testing.assert_close(dilated_average(cells, dilation), expected)


def test_one_scale_is_the_identity():
    tap, x = pooling(1), tokens(16)
    assert not list(tap.parameters()) and tap(x) is x


@pytest.mark.parametrize("chosen", [0, 2])
def test_weights_that_choose_one_scale(chosen):
    tap, x = pooling(), tokens(35)
    # A constant after the norm, whose second convolution then tells the scales apart, also at the border.
    tap.predictor[0].weight.data.zero_()
    tap.predictor[1].bias.data.fill_(1.0)
    last = tap.predictor[2].weight.data.zero_()
    last[chosen, 0, 1, 1] = 1e4
    cells = x.unflatten(1, (5, 7))
    expected = dilated_average(cells, chosen) if chosen else cells
    torch.testing.assert_close(tap(x, grid_size=(5, 7)), expected.flatten(1, 2), rtol=0, atol=1e-15)


def test_a_constant_picture_stays_inside():
    x = torch.randn(2, 1, DIM, dtype=torch.float64).expand(2, 81, DIM)
    y = pooling()(x).unflatten(1, (9, 9))
    inside, border = (slice(None), slice(3, -3), slice(3, -3)), (slice(None), 0)
    torch.testing.assert_close(y[inside], x.unflatten(1, (9, 9))[inside])
    assert (y[border].abs() < x.unflatten(1, (9, 9))[border].abs()).all()  # zeros outside count in the average


def test_prefix_tokens_are_neither_pooled_nor_seen():
    tap, x = pooling(num_prefix_tokens=2), tokens(17)
    other = torch.cat([torch.randn_like(x[:, :2]), x[:, 2:]], dim=1)
    y = tap(x, grid_size=(3, 5))
    assert torch.equal(y[:, :2], x[:, :2])
    assert torch.equal(y[:, 2:], tap(other, grid_size=(3, 5))[:, 2:])
    torch.testing.assert_close(y[:, 2:], pooling()(x[:, 2:], grid_size=(3, 5)))


def test_gradients():
    tap = TokenAwarePooling(2, 3).double().eval()
    x = torch.randn(1, 12, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda t: tap(t, grid_size=(3, 4)), x)


def test_bad_arguments():
    with pytest.raises(ValueError, match="num_scales: expected at least 1, got 0"):
        TAP(num_scales=0)
    with pytest.raises(TypeError, match="num_scales: expected an int, got float"):
        TokenAwarePooling(DIM, 2.0)
    for x, grid, said in (
        (tokens(16)[0], None, r"x: expected \(batch, tokens, 12\), got shape \(16, 12\)"),
        (tokens(15), None, "grid_size: 15 tokens less 0 prefix tokens make no square grid"),
        (tokens(16), (2, 2, 4), r"grid_size: neighbourhoods are 3 x 3 places of a \(height, width\) grid"),
    ):
        with pytest.raises(ValueError, match=said):
            pooling()(x, grid_size=grid)


@pytest.mark.parametrize("base", ["dense", "knn(topk=0.5)", "clustered(reduction=2)"])
def test_modifier_pools_before_the_attention_of_every_block(base):
    composed = parse_mechanism(f"{base} + tap(num_scales=3)")
    plain, model = vit(base), vit(base)
    names = set(plain.state_dict())
    composed.apply(model)
    missing, unexpected = model.load_state_dict(plain.state_dict(), strict=False)
    assert not unexpected and {name.split(".")[2] for name in missing} == {"tap"}
    assert names < set(model.state_dict())
    block, reference, x = model.blocks[1], plain.blocks[1], torch.randn(2, 17, DIM)
    mixed = x + reference.attn(reference.norm1(block.tap(x)))
    torch.testing.assert_close(block(x), mixed + reference.mlp(reference.norm2(mixed)))


def test_one_scale_leaves_the_model_as_it_was():
    plain, model, x = vit(), vit(), torch.randn(2, 3, 32, 32)
    TAP(num_scales=1).apply(model)
    torch.testing.assert_close(model(x), plain(x), rtol=0, atol=0)
    assert set(model.state_dict()) == set(plain.state_dict())


@pytest.mark.parametrize(
    ("options", "size"),
    [({"img_size": (16, 40)}, (16, 40)), ({"dynamic_img_size": True}, (40, 24)), ({"class_token": False}, (32, 32))],
)
def test_the_grid_is_the_embedded_pictures(options, size):
    pools = {"global_pool": "avg"} if "class_token" in options else {}
    model, seen = vit(**options, **pools), []
    TAP().apply(model)
    model.blocks[1].tap.register_forward_hook(lambda m, a, k, out: seen.append(k["grid_size"]), with_kwargs=True)
    assert torch.isfinite(model(torch.randn(2, 3, *size))).all()
    assert [tuple(grid) for grid in seen] == [(size[0] // 8, size[1] // 8)]
    if "dynamic_img_size" in options:
        model(torch.randn(2, 3, 16, 48))
        assert tuple(seen[-1]) == (2, 6)


def test_training_reaches_the_new_parameters():
    model = vit()
    TAP().apply(model)
    model.train()
    model(torch.randn(2, 3, 32, 32)).square().sum().backward()
    for name, parameter in model.named_parameters():
        if ".tap." in name:
            assert parameter.grad.abs().sum() > 0, name


def test_model_keeps_its_ways():
    """Copies, pickles, casts, checkpoints activations."""
    model, x = vit(), torch.randn(2, 3, 32, 32)
    TAP().apply(model)
    expected = model(x)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        torch.testing.assert_close(twin(x), expected, rtol=0, atol=0)
        twin.blocks[0].tap.predictor[2].weight.data.neg_()
        assert not torch.equal(twin(x), expected) and torch.equal(model(x), expected)
    assert copy.deepcopy(model).double()(x.double()).dtype == torch.float64
    block, t = model.blocks[0], torch.randn(2, 17, DIM, requires_grad=True)
    again = checkpoint(block, t, use_reentrant=False)
    grads = [torch.autograd.grad(y.square().sum(), t)[0] for y in (block(t), again)]
    torch.testing.assert_close(*grads)


def test_compiles_as_one_graph():
    torch.compiler.reset()
    model = vit(depth=1, dynamic_img_size=True)
    TAP().apply(model)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for size in ((32, 32), (24, 40)):
        x = torch.randn(2, 3, *size)
        with torch.no_grad():
            torch.testing.assert_close(compiled(x), model(x))


def test_models_that_it_refuses():
    model = vit()
    TAP().apply(model)
    with pytest.raises(ValueError, match=r"model: blocks.0 \(Block\) has token-aware pooling already"):
        TAP().apply(model)
    after = vit(block_fn=timm.models.vision_transformer.ResPostBlock)
    with pytest.raises(ValueError, match=r"blocks.0 \(ResPostBlock\) has no `norm1` before its `attn`"):
        TAP().apply(after)
    assert not any("tap" in name for name, _ in after.named_modules())
    with pytest.raises(ValueError, match="model: Linear is no vision transformer with `patch_embed` and `blocks`"):
        TAP().apply(nn.Linear(2, 2))


def test_text_form():
    assert str(parse_mechanism("knn + tap")) == "knn(topk=0.5) + tap(num_scales=4)"
    assert parse_mechanism("tap") == Dense() + TAP()
    assert issubclass(parse_mechanism("knn + tap").attn_layer(), KNNAttention)
