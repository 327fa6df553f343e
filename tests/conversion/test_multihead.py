"""nn.MultiheadAttention and what is built on it: masks, shapes, fast paths."""

import itertools

import pytest
import torch
from torch import nn

import regard
from regard.conversion.seam import seams_of

DIM, HEADS = 16, 2
EXACT = {"rtol": 1e-10, "atol": 1e-10}

pytestmark = [
    pytest.mark.filterwarnings("ignore::regard.SlowPathWarning"),
    pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning"),
]


def attention(**options) -> nn.MultiheadAttention:
    torch.manual_seed(0)
    module = nn.MultiheadAttention(DIM, HEADS, **options).double().eval()
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.5)
    return module


def tokens(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def both(module: nn.MultiheadAttention, inputs: tuple, **options) -> tuple[torch.Tensor, torch.Tensor]:
    """The output of the module, and of the module converted with all keys.

    Where the module adds keys of its own, is_causal makes it drop them together with its mask: a hint must not.
    """
    hints = {name: value for name, value in options.items() if name != "is_causal"}
    expected = module(*inputs, need_weights=False, **hints)[0]
    example = {**dict(zip(("query", "key", "value"), inputs, strict=True)), **options}
    with regard.converted(module, "knn(topk=1.0)", example_inputs=example):
        found, weights = module(*inputs, need_weights=False, **options)
    assert weights is None
    return found, expected


@pytest.mark.parametrize(
    "options",
    [
        dict(zip(("batch_first", "bias", "add_bias_kv", "add_zero_attn"), values, strict=True))
        for values in itertools.product((False, True), repeat=4)
    ],
    ids=str,
)
@pytest.mark.parametrize("kind", ["self", "cross", "unbatched"])
def test_all_keys_equals_the_module(options, kind):
    module = attention(**options)
    if kind == "unbatched":
        query, key = tokens(5, DIM), tokens(7, DIM, seed=1)
    else:
        shapes = ((3, 5, DIM), (3, 7, DIM)) if options["batch_first"] else ((5, 3, DIM), (7, 3, DIM))
        query, key = tokens(*shapes[0]), tokens(*shapes[1], seed=1)
    inputs = (query, query, query) if kind == "self" else (query, key, key + 1)
    torch.testing.assert_close(*both(module, inputs), **EXACT)


def test_keys_and_values_of_other_widths():
    module = attention(kdim=12, vdim=20, batch_first=True)
    torch.testing.assert_close(*both(module, (tokens(3, 5, DIM), tokens(3, 7, 12), tokens(3, 7, 20))), **EXACT)


PADDING = torch.tensor([[False] * 5, [False, False, False, True, True], [True, False, False, False, False]])
CAUSAL = torch.ones(5, 5, dtype=torch.bool).triu(1)


@pytest.mark.filterwarnings("ignore:Support for mismatched:UserWarning")
@pytest.mark.parametrize("add_bias_kv", [False, True])
@pytest.mark.parametrize(
    "options",
    [
        {"key_padding_mask": PADDING},
        {"key_padding_mask": PADDING.double() * -3.0},
        {"attn_mask": CAUSAL},
        {"attn_mask": CAUSAL, "is_causal": True},
        {"attn_mask": tokens(5, 5)},
        {"attn_mask": tokens(3 * HEADS, 5, 5)},
        {"attn_mask": tokens(3 * HEADS, 5, 5) > 1.0, "key_padding_mask": PADDING & (torch.arange(5) > 0)},
        {"attn_mask": tokens(5, 5), "key_padding_mask": PADDING},
    ],
    ids=lambda options: "+".join(f"{name}:{getattr(value, 'dtype', value)}" for name, value in options.items()),
)
def test_masks(options, add_bias_kv):
    x = tokens(3, 5, DIM)
    module = attention(batch_first=True, add_bias_kv=add_bias_kv)
    torch.testing.assert_close(*both(module, (x, x, x), **options), **EXACT)


def test_hidden_keys_are_never_chosen():
    module, x = attention(batch_first=True), tokens(3, 5, DIM)
    regard.convert(module, "knn(topk=3)", example_inputs=(x, x, x))
    before = module(x, x, x, key_padding_mask=PADDING)[0]
    value = x.masked_fill(PADDING[..., None], 100.0)
    torch.testing.assert_close(module(x, x, value, key_padding_mask=PADDING)[0], before, **EXACT)
    assert not torch.allclose(module(x, x, value)[0], before, atol=1.0)


def test_a_mask_of_keys_alone_stays_one_row_and_boolean():
    """Mechanisms with centroids take no other mask."""
    seen = []

    class Watching(regard.KNN):
        def attend(self, query, key, value, **options):
            seen.append(options["attn_mask"])
            return super().attend(query, key, value, **options)

    module, x = attention(batch_first=True), tokens(3, 5, DIM)
    regard.convert(module, Watching(), example_inputs={"query": x, "key": x, "value": x, "key_padding_mask": PADDING})
    assert seen[0].dtype == torch.bool and torch.equal(seen[0], ~PADDING[:, None, None])


def test_no_weights_are_handed_back():
    module, x = attention(), tokens(5, 3, DIM)
    assert module(x, x, x)[1] is not None
    with regard.converted(module, "knn(topk=2)", example_inputs=(x, x, x)):
        assert module(x, x, x)[1] is None


def test_the_causal_hint_needs_its_mask():
    module, x = attention(), tokens(5, 3, DIM)
    regard.convert(module, "knn", example_inputs=(x, x, x))
    with pytest.raises(RuntimeError, match="attn_mask: nn.MultiheadAttention takes is_causal as a hint only"):
        module(x, x, x, is_causal=True)


def encoder() -> nn.TransformerEncoder:
    torch.manual_seed(0)
    return nn.TransformerEncoder(nn.TransformerEncoderLayer(DIM, HEADS, 32, batch_first=True), 2).eval()


class TestFastPaths:
    """In evaluation without gradient torch computes whole layers at once; a converted one must not."""

    def test_encoder_layer(self):
        layer, x = encoder().layers[0], tokens(3, 6, DIM).float()
        with torch.no_grad():
            expected = layer(x)
            regard.convert(layer, "knn(topk=1)", example_inputs=x)
            found = layer(x)
        assert not torch.allclose(found, expected, atol=1e-3)
        torch.testing.assert_close(found, layer(x).detach(), rtol=0, atol=0)  # with gradient it never was fast
        regard.restore(layer)
        with torch.no_grad():
            assert torch.equal(layer(x), expected)
        assert layer.activation_relu_or_gelu

    @pytest.mark.parametrize("where", ["*", "layers.1.*"])
    def test_encoder_with_padding_feeds_no_nested_tensors(self, where):
        model, x = encoder(), tokens(3, 5, DIM).float()
        padding = torch.tensor([[False] * 5, [False, False, False, True, True], [False] * 4 + [True]])
        with torch.no_grad():
            fast = model(x, src_key_padding_mask=padding)
            regard.convert(model, "knn(topk=1.0)", where=where, example_inputs=x)
            found = model(x, src_key_padding_mask=padding)
            torch.testing.assert_close(found[~padding], fast[~padding])
            regard.restore(model)
            regard.convert(model, "knn(topk=1)", where=where, example_inputs=x)
            assert not torch.allclose(model(x, src_key_padding_mask=padding)[~padding], fast[~padding], atol=1e-3)
            assert not model.use_nested_tensor
            regard.restore(model)
            assert model.use_nested_tensor and not seams_of(model)
            assert torch.equal(model(x, src_key_padding_mask=padding), fast)
