"""The mixer contract, over every registered mechanism: a new one is tested by being registered."""

import copy
import pickle

import pytest
import torch
from jaxtyping import Float
from timm.layers import Attention
from timm.models import VisionTransformer
from timm.models.deit import VisionTransformerDistilled
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from regard.auxiliary import collect_losses
from regard.mixers import AttentionMixer

DIM, HEADS = 48, 3
GRIDS = [(16,), (4, 4), (13, 17), (2, 3, 4), (1, 1)]
ORDER_MATTERS = {"multipole", "proxy"}
ALL_OPTIONS = {
    "attn_head_dim": 8,
    "dim_out": 40,
    "qkv_bias": True,
    "qk_norm": True,
    "scale_norm": True,
    "gated": True,
    "norm_layer": nn.LayerNorm,
}


def make(mechanism, **options):
    return mechanism.attn_layer()(DIM, num_heads=HEADS, **options).eval()


def _needs_no_training(mechanism):
    if not mechanism.converts:
        pytest.skip("its own parameters must be trained: the value cannot attend")


def tokens(count=16, batch=2, **options):
    return torch.randn(batch, count, DIM, **options)


def test_is_the_mixer_of_its_card(mechanism):
    layer = mechanism.attn_layer()
    mixer = make(mechanism)
    assert issubclass(layer, AttentionMixer)
    assert isinstance(mixer, AttentionMixer) and mixer.needs_grid == mechanism.card.needs_grid


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("prefix", [0, 1, 5])
def test_any_grid_with_prefix_tokens(mechanism, grid, prefix):
    mixer = make(mechanism, num_prefix_tokens=prefix)
    x = tokens(prefix + int(torch.tensor(grid).prod()), requires_grad=True)
    y = mixer(x, grid_size=grid)
    assert isinstance(y, Float[Tensor, f"2 {x.shape[1]} {DIM}"])
    y.square().sum().backward()
    assert all(torch.isfinite(g).all() for g in (y, x.grad))


def test_square_grid_is_inferred(mechanism):
    mixer = make(mechanism, num_prefix_tokens=1)
    x = tokens(17)
    torch.testing.assert_close(mixer(x), mixer(x, grid_size=(4, 4)))


def test_sizes_may_change_after_construction(mechanism):
    mixer = make(mechanism, num_prefix_tokens=1)
    x, larger = tokens(17), tokens(31)
    before = mixer(x)
    assert mixer(larger, grid_size=(5, 6)).shape == larger.shape
    torch.testing.assert_close(mixer(x), before, rtol=0, atol=0)


def test_state_dict_round_trip(mechanism):
    mixer, other, x = make(mechanism, **ALL_OPTIONS), make(mechanism, **ALL_OPTIONS), tokens()
    assert not torch.equal(mixer(x), other(x))
    other.load_state_dict(mixer.state_dict())
    torch.testing.assert_close(other(x), mixer(x), rtol=0, atol=0)


@pytest.mark.parametrize("batch", [0, 1])
def test_small_batches(mechanism, batch):
    assert make(mechanism)(tokens(16, batch=batch)).shape == (batch, 16, DIM)


def test_parameters_are_dense_attentions(mechanism):
    ours, timms = make(mechanism, **ALL_OPTIONS), Attention(DIM, num_heads=HEADS, **ALL_OPTIONS)
    shapes = {name: weight.shape for name, weight in timms.state_dict().items()}
    found = {name: weight.shape for name, weight in ours.state_dict().items()}
    if mechanism.card.adds_parameters:
        assert shapes.items() < found.items()
    else:
        assert list(found.items()) == list(shapes.items())
        ours.load_state_dict(timms.state_dict())


def test_gradients_reach_every_parameter(mechanism):
    mixer = make(mechanism, **ALL_OPTIONS)
    with collect_losses(mixer) as losses:
        (mixer(tokens()).square().sum() + losses.total()).backward()
    for name, parameter in mixer.named_parameters():
        assert torch.isfinite(parameter.grad).all() and parameter.grad.abs().sum() > 0, name


def test_images_do_not_see_each_other(mechanism):
    mixer = make(mechanism).double()
    x = tokens(batch=3).double()
    torch.testing.assert_close(mixer(x)[1:2], mixer(x[1:2]))


def test_permuted_tokens_give_permuted_outputs(mechanism):
    if mechanism.name in ORDER_MATTERS:
        pytest.skip("its clusters start from places in the sequence, or its blocks are runs of it")
    if mechanism.card.needs_grid or getattr(mechanism, "tail", "drop") != "drop":
        pytest.skip("the tokens' places matter to it")
    mixer, x, order = make(mechanism).double(), tokens().double(), torch.randperm(16)
    torch.testing.assert_close(mixer(x[:, order]), mixer(x)[:, order])


def test_what_must_be_trained_cannot_attend(mechanism):
    if mechanism.converts:
        pytest.skip("it can: the tests below")
    with pytest.raises(ValueError, match=f"{mechanism.name}.*(train|weights|parameters)"):
        mechanism.attend(*torch.randn(3, 2, HEADS, 16, 8))


def test_weights_are_a_distribution(mechanism):
    _needs_no_training(mechanism)
    query, key = torch.randn(2, 2, HEADS, 16, 8).double()
    weights = mechanism.attend(query, key, torch.eye(16).double().expand(2, HEADS, 16, 16), grid_size=(4, 4))
    assert (weights >= 0).all()
    torch.testing.assert_close(weights.sum(-1), torch.ones(2, HEADS, 16).double())


def test_same_input_same_output(mechanism):
    mixer, x = make(mechanism), tokens()
    torch.testing.assert_close(mixer(x), mixer(x), rtol=0, atol=0)


def test_strides_do_not_matter(mechanism):
    mixer = make(mechanism).double()
    x = tokens().double()
    strided = x.transpose(1, 2).contiguous().transpose(1, 2)
    sliced = torch.randn(2, 32, 2 * DIM).double()
    sliced[:, ::2, ::2] = x
    torch.testing.assert_close(mixer(strided), mixer(x))
    torch.testing.assert_close(mixer(sliced[:, ::2, ::2]), mixer(x))


def test_hidden_keys_have_no_influence(mechanism):
    """A key mask, boolean and as a bias: what the hidden tokens hold changes nothing."""
    mixer = make(mechanism).double()
    x, allowed = tokens().double(), torch.ones(16, dtype=torch.bool)
    allowed[10:] = False
    other = torch.where(allowed[:, None], x, torch.randn_like(x))
    masks = [allowed.expand(16, 16), allowed.expand(2, 1, 16, 16)]
    bias = torch.zeros(16, dtype=torch.float64).masked_fill(~allowed, float("-inf"))
    for mask in [*masks, bias.expand(16, 16)] if mechanism.card.query_masks else masks:
        torch.testing.assert_close(mixer(x, attn_mask=mask)[:, :10], mixer(other, attn_mask=mask)[:, :10])
    assert not torch.allclose(mixer(x)[:, :10], mixer(other)[:, :10])


def test_causal_and_mask_combine(mechanism):
    mixer = make(mechanism).double()
    x = tokens().double()
    earlier = torch.ones(16, 16, dtype=torch.bool).tril()
    if not mechanism.card.query_masks:
        refused = [{"attn_mask": earlier}, {"attn_mask": torch.zeros(16, 16).double()}]
        if mechanism.card.causal:
            later = torch.where(torch.arange(16)[:, None] < 10, x, torch.randn_like(x))
            torch.testing.assert_close(mixer(later, is_causal=True)[:, :10], mixer(x, is_causal=True)[:, :10])
            assert not torch.allclose(mixer(x, is_causal=True), mixer(x))
        else:
            refused.append({"is_causal": True})
        for options in refused:
            with pytest.raises((ValueError, TypeError), match=f"{next(iter(options))}: "):
                mixer(x, **options)
        return
    even = (torch.arange(16) % 2 == 0).expand(16, 16)
    torch.testing.assert_close(mixer(x, is_causal=True), mixer(x, attn_mask=earlier))
    torch.testing.assert_close(mixer(x, attn_mask=even, is_causal=True), mixer(x, attn_mask=even & earlier))
    bias = torch.randn(16, 16).double()
    both = bias.masked_fill(~earlier, float("-inf"))
    torch.testing.assert_close(mixer(x, attn_mask=bias, is_causal=True), mixer(x, attn_mask=both))


def test_attend_is_linear_in_value(mechanism):
    """What inspection rests on: attend(q, k, identity) are the weights, and their product with the value the output."""
    _needs_no_training(mechanism)
    query, key, value = torch.randn(3, 2, HEADS, 16, 8).double()
    eye = torch.eye(16).double().expand(2, HEADS, 16, 16)
    options = {"grid_size": (4, 4)}
    weights = mechanism.attend(query, key, eye, **options)
    torch.testing.assert_close(weights @ value, mechanism.attend(query, key, value, **options))


def test_the_value_and_the_module_agree(mechanism):
    _needs_no_training(mechanism)
    mixer = make(mechanism)
    query, key, value = torch.randn(3, 2, HEADS, 16, 16)
    torch.testing.assert_close(
        mixer.attend(query, key, value, None, False, (4, 4)), mechanism.attend(query, key, value, grid_size=(4, 4))
    )


def test_dropout_only_in_training(mechanism):
    mixer, x = make(mechanism, attn_drop=0.5), tokens()
    torch.testing.assert_close(mixer(x), mixer(x))
    mixer.train()
    assert not torch.allclose(mixer(x), mixer(x))


def test_deepcopy_and_pickle(mechanism):
    mixer, x = make(mechanism), tokens()
    for twin in (copy.deepcopy(mixer), pickle.loads(pickle.dumps(mixer))):
        assert type(twin) is type(mixer)
        torch.testing.assert_close(twin(x), mixer(x), rtol=0, atol=0)


def test_attn_layer_pickles(mechanism):
    layer = pickle.loads(pickle.dumps(mechanism.attn_layer()))
    assert repr(layer(DIM)) == repr(mechanism.attn_layer()(DIM))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_dtypes(mechanism, dtype):
    mixer, x = make(mechanism), tokens()
    made = mechanism.attn_layer()(DIM, HEADS, dtype=dtype)
    assert {p.dtype for p in made.parameters()} == {dtype}
    y = copy.deepcopy(mixer).to(dtype)(x.to(dtype))
    assert y.dtype == dtype and torch.isfinite(y).all()


def test_autocast(mechanism):
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = make(mechanism)(tokens())
    assert y.dtype == torch.bfloat16 and torch.isfinite(y).all()


def test_meta_device(mechanism):
    mixer = make(mechanism, device="meta", **ALL_OPTIONS)
    assert {p.device.type for p in mixer.parameters()} == {"meta"}
    assert mixer.to_empty(device="cpu").qkv.weight.device.type == "cpu"


def test_activation_checkpointing(mechanism):
    mixer = make(mechanism)
    x = tokens(requires_grad=True)
    (expected,) = torch.autograd.grad(mixer(x).square().sum(), x)
    (found,) = torch.autograd.grad(checkpoint(mixer, x, use_reentrant=False).square().sum(), x)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compiles_as_one_graph(mechanism, backend):
    torch.compiler.reset()
    mixer = make(mechanism)
    x = tokens(requires_grad=True)
    compiled = torch.compile(mixer, fullgraph=True, backend=backend)
    y, expected = compiled(x, grid_size=(4, 4)), mixer(x, grid_size=(4, 4))
    torch.testing.assert_close(y, expected)
    (found,), (grad,) = (torch.autograd.grad(out.square().sum(), x) for out in (y, expected))
    torch.testing.assert_close(found, grad)


def test_exports(mechanism):
    mixer, x = make(mechanism), tokens()
    program = torch.export.export(mixer, (x,))
    torch.testing.assert_close(program.module()(x), mixer(x))


@pytest.mark.parametrize("family", [VisionTransformer, VisionTransformerDistilled])
def test_timm_takes_it_as_attn_layer(mechanism, family):
    """In plain and distilled models; dense weights load unchanged wherever the mechanism adds none."""
    size = {"img_size": 32, "patch_size": 8, "embed_dim": DIM, "depth": 2, "num_heads": HEADS, "num_classes": 5}
    dense = family(**size)
    prefix = dense.num_prefix_tokens
    model = family(**size, attn_layer=mechanism.attn_layer().bind(num_prefix_tokens=prefix)).eval()
    assert {type(m.attn) for m in model.blocks} == {type(make(mechanism))}
    assert {m.attn.num_prefix_tokens for m in model.blocks} == {prefix}
    missing, unexpected = model.load_state_dict(dense.state_dict(), strict=False)
    assert not unexpected and bool(missing) == mechanism.card.adds_parameters
    assert torch.isfinite(model(torch.randn(2, 3, 32, 32))).all()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"num_heads": 5}, "num_heads: dim 48 is no multiple of 5"),
        ({"num_heads": 0}, "num_heads: expected at least 1, got 0"),
        ({"attn_head_dim": 0}, "attn_head_dim: expected at least 1"),
        ({"dim_out": -1}, "dim_out: expected at least 1"),
        ({"num_prefix_tokens": -1}, "num_prefix_tokens: expected 0 or more"),
        ({"qk_norm": True}, "norm_layer: qk_norm and scale_norm need one"),
        ({"scale_norm": True}, "norm_layer"),
    ],
)
def test_bad_arguments_of_the_constructor(mechanism, options, said):
    with pytest.raises(ValueError, match=said):
        mechanism.attn_layer()(DIM, **{"num_heads": HEADS, **options})


@pytest.mark.parametrize(
    ("shape", "grid", "error", "said"),
    [
        ((16, DIM), None, ValueError, r"x: expected \(batch, tokens, 48\), got shape \(16, 48\)"),
        ((2, 16, DIM + 1), None, ValueError, "x: expected"),
        ((2, 17, DIM), (3, 5), ValueError, r"grid_size: \(3, 5\) is no grid of 16 cells; x has 17 tokens"),
        ((2, 17, DIM), (-4, -4), ValueError, "grid_size"),
        ((2, 17, DIM), (), ValueError, "grid_size: expected rank 1, 2 or 3"),
        ((2, 17, DIM), (1, 1, 4, 4), ValueError, "grid_size: expected rank 1, 2 or 3"),
        ((2, 17, DIM), 16, TypeError, "grid_size: expected integers"),
        ((2, 17, DIM), (4.0, 4.0), TypeError, "grid_size: expected integers"),
    ],
)
def test_bad_input(mechanism, shape, grid, error, said):
    mixer = make(mechanism, num_prefix_tokens=1)
    with pytest.raises(error, match=said):
        mixer(torch.randn(shape), grid_size=grid)


def test_unknown_bound_option(mechanism):
    with pytest.raises(TypeError, match="no option 'num_prefix_token'; its options: num_prefix_tokens"):
        mechanism.attn_layer().bind(num_prefix_token=1)
