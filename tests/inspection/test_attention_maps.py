"""attention_maps: the weights that were used, and a model left as found."""

import copy

import pytest
import torch
from timm.models import VisionTransformer
from torch import nn

from regard.inspection import attention_maps
from regard.mixers import AttentionMixer, ClusteredAttention, DenseAttention, KNNAttention, mechanisms

SIZE = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 3, "num_heads": 3, "num_classes": 5}
TOKENS = 17


def make(layer=DenseAttention, **options):
    torch.manual_seed(0)
    return VisionTransformer(**{**SIZE, **options}, attn_layer=layer).eval()


def images(batch=2, size=32):
    return torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(1))


def dtype_of(model):
    return next(model.parameters()).dtype


def softmax_weights(model, layer):
    """Query and key of a layer by hand, and the softmax of their products."""
    seen = []
    with torch.no_grad(), model.blocks[layer].attn.qkv.register_forward_hook(lambda _m, _i, out: seen.append(out)):
        model(images().to(dtype_of(model)))
    query, key, _ = seen[0].unflatten(-1, (3, 3, 16)).permute(2, 0, 3, 1, 4)
    return (query @ key.mT / 4).softmax(dim=-1)


@pytest.mark.parametrize("layer", [0, 1, -1, -3, "blocks.1.attn"])
def test_dense_is_softmax(layer):
    model = make().double()
    index = 1 if isinstance(layer, str) else layer
    torch.testing.assert_close(attention_maps(model, images().double(), layer=layer), softmax_weights(model, index))


@pytest.mark.parametrize("topk", [1, 4, 0.5])
def test_knn_keeps_exactly_k(topk):
    maps = attention_maps(make(KNNAttention.bind(topk=topk)), images())
    kept = {1: 1, 4: 4, 0.5: 9}[topk]
    assert maps.shape == (2, 3, TOKENS, TOKENS)
    assert ((maps > 0).sum(dim=-1) == kept).all()
    torch.testing.assert_close(maps.sum(dim=-1), torch.ones(2, 3, TOKENS))


def test_knn_keeps_the_largest_of_dense():
    """In the first layer both mechanisms see the same tokens."""
    dense = make().double()
    knn = make(KNNAttention.bind(topk=4)).double()
    knn.load_state_dict(dense.state_dict())
    weights = attention_maps(dense, images().double(), layer=0)
    found = attention_maps(knn, images().double(), layer=0)
    kept = weights.topk(4, dim=-1)
    expected = torch.zeros_like(weights).scatter(-1, kept.indices, kept.values / kept.values.sum(-1, keepdim=True))
    torch.testing.assert_close(found, expected)


# Those whose keys are projections of the single tokens; the others have tests of their own.
_OF_TOKENS = [name for name, one in mechanisms().items() if one().attn_layer().mix is AttentionMixer.mix]


@pytest.mark.parametrize("name", _OF_TOKENS)
def test_maps_reproduce_what_the_layer_handed_on(name):
    mixer = mechanisms()[name]().attn_layer()
    model = make(mixer.bind(num_prefix_tokens=1)).double()
    attn, seen = model.blocks[2].attn, {}
    attn.qkv.register_forward_hook(lambda _m, _i, out: seen.update(qkv=out))
    attn.proj.register_forward_hook(lambda _m, given, _o: seen.update(mixed=given[0]))
    maps = attention_maps(model, images().double())
    value = seen["qkv"].unflatten(-1, (3, 3, 16)).permute(2, 0, 3, 1, 4)[2]
    torch.testing.assert_close((maps @ value).transpose(1, 2).flatten(2), seen["mixed"])


def test_clustered_maps_reproduce_what_the_layer_handed_on():
    """With one projection for both scales each token has one value, and the layer adds what the map averages."""
    model = make(ClusteredAttention.bind(num_prefix_tokens=1, reduction=2)).double()
    attn, seen = model.blocks[2].attn, {}
    with torch.no_grad():
        attn.kv_coarse.weight.copy_(attn.qkv.weight[48:])
    attn.register_forward_pre_hook(lambda _m, given: seen.update(x=given[0]))
    attn.proj.register_forward_hook(lambda _m, given, _o: seen.update(mixed=given[0]))
    maps = attention_maps(model, images().double())
    value = torch.nn.functional.linear(seen["x"], attn.qkv.weight[96:]).unflatten(-1, (3, 16)).transpose(1, 2)
    torch.testing.assert_close(2 * (maps @ value).transpose(1, 2).flatten(2), seen["mixed"])
    torch.testing.assert_close(maps.sum(-1), torch.ones_like(maps[..., 0]), atol=1e-5, rtol=0)


@pytest.mark.parametrize(("size", "tokens"), [(8, 2), (128, 257), (136, 290)])
def test_columns_are_read_in_parts(size, tokens):
    """Two columns, one more than a part, and a part of 34."""
    maps = attention_maps(make(KNNAttention.bind(topk=2), img_size=size, depth=1), images(1, size))
    assert maps.shape == (1, 3, tokens, tokens)
    torch.testing.assert_close(maps.sum(dim=-1), torch.ones(1, 3, tokens))
    assert ((maps > 0).sum(dim=-1) == 2).all()


def test_mask_and_causality_of_the_call_are_kept():
    class Causal(nn.Module):
        def __init__(self):
            super().__init__()
            self.attn = KNNAttention(48, 3, topk=4)

        def forward(self, x):
            return self.attn(x, is_causal=True, attn_mask=torch.arange(16) != 5)

    maps = attention_maps(Causal(), torch.randn(2, 16, 48))
    assert (maps.triu(1) == 0).all() and (maps[..., 5] == 0).all()
    assert ((maps > 0).sum(dim=-1)[..., 6:] == 4).all()


class _Noisy(nn.Module):
    """A model that draws random numbers and writes a buffer whenever it runs, and can fail."""

    def __init__(self):
        super().__init__()
        self.inner = make()
        self.norm = nn.BatchNorm2d(3)
        self.register_buffer("calls", torch.zeros(()))
        self.fail = False

    def forward(self, x):
        self.calls += 1
        x = self.inner(self.norm(x) + 0 * torch.rand(1))
        if self.fail:
            raise FloatingPointError("on purpose")
        return x


@pytest.mark.parametrize("fail", [False, True])
def test_the_model_is_left_as_found(fail):
    model = _Noisy()
    model.inner.blocks[1].train()
    flags = [m.training for m in model.modules()]
    state, attributes = copy.deepcopy(model.state_dict()), [set(vars(m)) for m in model.modules()]
    random = torch.get_rng_state()
    model.fail = fail
    if fail:
        with pytest.raises(FloatingPointError):
            attention_maps(model, images())
    else:
        attention_maps(model, images())
    assert [m.training for m in model.modules()] == flags
    assert [set(vars(m)) for m in model.modules()] == attributes
    assert torch.equal(torch.get_rng_state(), random)
    torch.testing.assert_close(model.state_dict(), state, rtol=0, atol=0)
    assert all(p.grad is None for p in model.parameters())


def test_dropout_is_off_though_the_model_trains():
    model = make(attn_drop_rate=0.5, drop_path_rate=0.5)
    expected = attention_maps(model, images())
    torch.testing.assert_close(attention_maps(model.train(), images()), expected, rtol=0, atol=0)
    assert not expected.requires_grad


def test_compiled_models():
    model = make(KNNAttention.bind(topk=4))
    expected = attention_maps(model, images())
    whole = torch.compile(model, backend="eager")
    torch.testing.assert_close(attention_maps(whole, images()), expected)
    model.blocks[2].compile(backend="eager")
    torch.testing.assert_close(attention_maps(model, images()), expected)


def test_half_types():
    maps = attention_maps(make(KNNAttention.bind(topk=4)).bfloat16(), images().bfloat16())
    assert maps.dtype == torch.bfloat16
    assert ((maps > 0).sum(dim=-1) == 4).all()


def test_model_without_mixers():
    with pytest.raises(ValueError, match="model: VisionTransformer has no attention mixer of regard"):
        attention_maps(VisionTransformer(**SIZE), images())


@pytest.mark.parametrize(
    ("layer", "said"),
    [
        (3, "layer: 3 is out of range; the model has 3 mixers, 0 to 2"),
        (-4, "layer: -4 is out of range"),
        ("blocks.7.attn", r"layer: no mixer is called 'blocks.7.attn'; known: blocks\.\d\.attn"),
    ],
)
def test_layer_out_of_range(layer, said):
    with pytest.raises(ValueError, match=said):
        attention_maps(make(), images(), layer=layer)


def test_a_mixer_that_is_never_called():
    model = make()
    model.spare = KNNAttention(48, 3)
    with pytest.raises(RuntimeError, match="did not call 'spare'"):
        attention_maps(model, images())
