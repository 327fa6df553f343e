"""Token reorganization: its identities, what it leaves alone, and what it refuses."""

import copy
import math
import pickle

import pytest
import torch
from small_vits import small_vit
from timm.models.deit import VisionTransformerDistilled
from timm.models.eva import Eva
from timm.models.vision_transformer import ResPostBlock, VisionTransformer
from torch import nn

import regard
from regard.reduction import reorganize, reorganized, restore_tokens, watch_tokens
from regard.reduction.reorganize import published_layers


def counts(model, images):
    """How many tokens each layer hands on."""
    seen = []
    hooks = [block.register_forward_hook(lambda _m, _i, out: seen.append(out.shape[1])) for block in model.blocks]
    with torch.no_grad():
        model(images)
    for hook in hooks:
        hook.remove()
    return tuple(seen)


def written_out(model, images, keep_rate, layers, fuse):
    """The paper's model with the whole attention map, one image at a time; patches stay in their places."""
    logits = []
    for image in images:
        x = model._pos_embed(model.patch_embed(image[None]))[0]
        for index, block in enumerate(model.blocks):
            attn, normed = block.attn, block.norm1(x)
            query, key, value = attn.qkv(normed).unflatten(-1, (3, attn.num_heads, -1)).permute(1, 2, 0, 3)
            weights = (query @ key.transpose(1, 2) / math.sqrt(query.shape[-1])).softmax(dim=-1)
            x = x + attn.proj((weights @ value).transpose(0, 1).flatten(1))
            if index in layers and (keep := math.ceil(keep_rate * (len(x) - 1))) < len(x) - 1:
                score = weights[:, 0, 1:].mean(dim=0)
                limit = score.sort(descending=True).values[keep - 1]
                rows = [x[:1], x[1:][score >= limit]]
                if fuse:
                    rows.append((score[:, None] * x[1:])[score < limit].sum(dim=0, keepdim=True))
                x = torch.cat(rows)
            x = x + block.mlp(block.norm2(x))
        logits.append(model.head(model.norm(x)[0]))
    return torch.stack(logits)


@pytest.mark.parametrize("fuse", [True, False])
@pytest.mark.parametrize("keep_rate", [0.7, 0.3])
def test_outputs_and_gradients_are_those_of_the_paper_written_out(vit, images, keep_rate, fuse):
    model, images = vit.double(), images.double()
    expected = written_out(model, images, keep_rate, (1, 3), fuse)
    gradients = torch.autograd.grad(expected.square().sum(), list(model.parameters()))
    reorganize(model, keep_rate, (1, 3), fuse)
    found = model(images)
    torch.testing.assert_close(found, expected)
    for ours, other in zip(torch.autograd.grad(found.square().sum(), list(model.parameters())), gradients, strict=True):
        torch.testing.assert_close(ours, other)


def test_keep_rate_one_is_the_same_model(vit, images):
    expected = vit(images)
    gradients = torch.autograd.grad(expected.sum(), list(vit.parameters()))
    record = reorganize(vit, keep_rate=1.0)
    assert record.tokens() == (17,) * 4
    found = vit(images)
    assert torch.equal(found, expected)
    for ours, other in zip(torch.autograd.grad(found.sum(), list(vit.parameters())), gradients, strict=True):
        assert torch.equal(ours, other)


def test_restored_models_are_as_before(vit, images):
    with torch.no_grad():
        expected = vit(images)
        before = {name: set(vars(module)) for name, module in vit.named_modules()}
        reorganize(vit, 0.5)
        assert not torch.allclose(vit(images), expected)
        restore_tokens(vit)
        assert torch.equal(vit(images), expected)
        with reorganized(vit, 0.5) as record:
            assert record.layers == (1, 2, 3)
            assert not torch.equal(vit(images), expected)
        assert torch.equal(vit(images), expected)
    assert {name: set(vars(module)) for name, module in vit.named_modules()} == before
    restore_tokens(vit)


@pytest.mark.parametrize(
    ("keep_rate", "fuse", "expected"),
    [
        (0.7, True, (17, 14, 12, 10)),  # 16 -> 12 + 1 -> ceil(9.1) + 1 -> ceil(7.7) + 1, and the class token
        (0.7, False, (17, 13, 10, 8)),
        ((1.0, 0.5, 0.01), True, (17, 17, 10, 3)),
        (0.01, False, (17, 2, 2, 2)),
    ],
)
def test_token_counts(vit, images, keep_rate, fuse, expected):
    record = reorganize(vit, keep_rate, fuse=fuse)
    assert counts(vit, images) == record.tokens() == record.tokens(16) == expected
    assert " -> ".join(dict.fromkeys(map(str, (17, *expected)))) in str(record)


def test_a_fraction_is_not_one_too_many_by_rounding(images):
    model = small_vit(img_size=80)
    record = reorganize(model, 0.55, (1,), fuse=False)
    assert record.tokens()[1] == 1 + 55  # 0.55 * 100 is 55.00000000000001 in floating point


def test_uniform_class_attention_keeps_the_first_and_sums_up_the_others(vit, images):
    with torch.no_grad():
        for name in ("weight", "bias"):
            getattr(vit.blocks[1].attn.qkv, name)[:32] = 0.0  # no queries: every row is uniform
        entered = []
        vit.blocks[1].norm2.register_forward_pre_hook(lambda _m, given: entered.append(given[0]))
        reorganize(vit, 1.0, (1,))
        vit(images)
        restore_tokens(vit)
        reorganize(vit, 0.5, (1,))
        vit(images)
    whole, reduced = entered
    torch.testing.assert_close(reduced[:, :9], whole[:, :9])
    torch.testing.assert_close(reduced[:, 9], whole[:, 9:].sum(dim=1) / 17)


@pytest.mark.parametrize("fuse", [True, False])
def test_outputs_do_not_depend_on_the_order_of_the_tokens(vit, images, fuse):
    vit, images = vit.double(), images.double()
    with torch.no_grad():
        with reorganized(vit, 0.6, fuse=fuse, order="score"), watch_tokens(vit) as by_score:
            expected = vit(images)
        with reorganized(vit, 0.6, fuse=fuse, order="position"), watch_tokens(vit) as by_position:
            torch.testing.assert_close(vit(images), expected)
    scored, placed = by_score.positions[2], by_position.positions[2]
    assert torch.equal(scored.sort(dim=1).values, placed.sort(dim=1).values)
    assert not torch.equal(scored, placed)


def test_images_of_a_batch_do_not_matter_to_each_other(vit, images):
    vit, images = vit.double(), images.double()
    reorganize(vit, 0.5)
    with torch.no_grad():
        torch.testing.assert_close(vit(images), torch.cat([vit(image[None]) for image in images]))


@pytest.mark.parametrize("size", [(32, 32), (40, 56), (16, 8)])
def test_any_size(size):
    model = small_vit(dynamic_img_size=True)
    record = reorganize(model, 0.5)
    image = torch.randn(1, 3, *size)
    assert counts(model, image) == record.tokens(size[0] * size[1] // 64)
    model.set_input_size(size)
    assert counts(model, image) == record.tokens(size[0] * size[1] // 64)


def test_registers_and_distillation_tokens_stay(images):
    distilled = VisionTransformerDistilled(img_size=32, patch_size=8, embed_dim=32, depth=4, num_heads=2).eval()
    registers = small_vit(reg_tokens=3)
    for model, prefix in ((distilled, 2), (registers, 4)):
        record = reorganize(model, 0.01, fuse=False)
        assert counts(model, images) == record.tokens() == (prefix + 16, prefix + 1, prefix + 1, prefix + 1)


@pytest.mark.parametrize("pool", ["avg", "map"])
def test_models_without_class_token_choose_by_the_mean(pool, images):
    model = small_vit(class_token=False, global_pool=pool)
    with pytest.raises(ValueError, match="without a class token; use score='mean'"):
        reorganize(model, score="class")
    record = reorganize(model, 0.5)
    assert record.score == "mean" and "all tokens" in str(record)
    assert counts(model, images) == (16, 9, 6, 4)
    assert model(images).shape == (3, 5)


def test_blocks_that_norm_after_attention(images):
    model = small_vit(block_fn=ResPostBlock, init_values=1.0).double()
    images = images.double()
    expected = model(images)
    with reorganized(model, 1.0):
        assert torch.equal(model(images), expected)
    reorganize(model, 0.5)
    assert counts(model, images) == (17, 10, 7, 5)


def eva(**options):
    torch.manual_seed(0)
    size = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 4, "num_heads": 2, "num_classes": 5}
    return Eva(**size, **options).eval()


def test_eva(images):
    model = eva(init_values=0.5)
    expected = model(images)
    with reorganized(model, 1.0):
        assert torch.equal(model(images), expected)
    record = reorganize(model, 0.5)
    assert counts(model, images) == record.tokens() == (17, 10, 7, 5)
    with pytest.raises(ValueError, match="rotates queries and keys"):
        reorganize(eva(use_rot_pos_emb=True))


@pytest.mark.parametrize("mechanism", ["knn(topk=0.5)", "multipole(num_clusters=4, near=1)", "clustered(reduction=2)"])
def test_mixers_inside(images, mechanism):
    value = regard.parse_mechanism(mechanism)
    model = small_vit(attn_layer=value.attn_layer(num_prefix_tokens=1))
    record = reorganize(model, 0.6)
    assert counts(model, images) == record.tokens() == (17, 12, 9, 7)
    model.train()(images).sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_knn_of_all_keys_inside_is_dense(vit, images):
    reorganize(vit, 0.6)
    mixed = small_vit(attn_layer=regard.KNNAttention.bind(topk=1.0))
    mixed.load_state_dict(vit.state_dict())
    reorganize(mixed, 0.6)
    with torch.no_grad():
        torch.testing.assert_close(mixed(images), vit(images), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("first", ["convert", "reorganize"])
def test_converted_models(vit, images, first):
    steps = {"convert": lambda: regard.convert(vit, "knn(topk=3)"), "reorganize": lambda: reorganize(vit, 0.6)}
    steps.pop(first)()
    (second,) = steps.values()
    second()
    with torch.no_grad():
        found = vit(images)
        mixed = small_vit(attn_layer=regard.KNNAttention.bind(topk=3))
        mixed.load_state_dict(vit.state_dict())
        reorganize(mixed, 0.6)
        torch.testing.assert_close(found, mixed(images), rtol=1e-4, atol=1e-5)
        regard.restore(vit)
        restore_tokens(vit)
        assert torch.equal(vit(images), small_vit()(images))


def test_attention_that_needs_the_grid_may_only_stand_before(images):
    model = small_vit(attn_layer=regard.Neighborhood(kernel_size=3).attn_layer(num_prefix_tokens=1))
    with pytest.raises(ValueError, match="NeighborhoodAttention in layer 2 needs the tokens' grid.*after layer 1"):
        reorganize(model)
    reorganize(model, 0.5, (3,))
    assert counts(model, images) == (17, 17, 17, 10)
    converted = small_vit()
    regard.convert(converted, {"blocks.3.*": "neighborhood(kernel_size=3)", "*": None})
    with pytest.raises(ValueError, match="in layer 3 needs the tokens' grid"):
        reorganize(converted)


def test_training_reaches_every_parameter(vit, images):
    reorganize(vit, 0.5)
    optimizer = torch.optim.AdamW(vit.parameters(), lr=1e-2)
    labels, losses = torch.tensor([0, 1, 2]), []
    for _ in range(10):
        loss = nn.functional.cross_entropy(vit.train()(images), labels)
        optimizer.zero_grad()
        loss.backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in vit.parameters())
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] / 2


def test_the_score_learns_through_the_fused_token_alone(vit, images):
    """In the last layer the class token's query matters to its own output; its key row's gradient shows both paths."""
    weight = vit.blocks[3].attn.qkv.weight
    found = {}
    for fuse in (True, False):
        with reorganized(vit, 0.5, (3,), fuse):
            tokens = vit.forward_features(images)
        (found[fuse],) = torch.autograd.grad(tokens[:, -1].square().sum(), weight, retain_graph=True)
    # Without fusing, the last token is a patch: the class token's attention never reaches it.
    assert found[True][:32].abs().sum() > 0 and not torch.allclose(found[True], found[False])


def test_gradient_checkpointing_gives_the_same_gradients(vit, images):
    reorganize(vit.train(), 0.5)
    grads = []
    for enable in (False, True):
        vit.zero_grad()
        vit.set_grad_checkpointing(enable)
        vit(images).square().sum().backward()
        grads.append({n: p.grad.clone() for n, p in vit.named_parameters()})
    torch.testing.assert_close(grads[0], grads[1])


def test_state_dict_deepcopy_and_pickle(vit, images):
    names = list(vit.state_dict())
    reorganize(vit, 0.5)
    assert list(vit.state_dict()) == names
    with torch.no_grad():
        expected = vit(images)
        for other in (copy.deepcopy(vit), pickle.loads(pickle.dumps(vit))):
            assert torch.equal(other(images), expected)
            nn.init.zeros_(other.blocks[3].mlp.fc2.weight)  # the copy computes with its own weights
            assert not torch.equal(other(images), expected)
            restore_tokens(other)
        assert torch.equal(vit(images), expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_types_and_autocast(vit, images, dtype):
    reorganize(vit, 0.5)
    with torch.no_grad(), torch.autocast("cpu", dtype):
        found = vit(images)
    assert found.isfinite().all()
    half = copy.deepcopy(vit).to(dtype)
    with torch.no_grad():
        assert half(images.to(dtype)).dtype == dtype
        assert half.forward_features(images.to(dtype)).shape == (3, 5, 32)


def test_meta_device():
    with torch.device("meta"):
        model = VisionTransformer(depth=12)
        reorganize(model)
        assert model.forward_features(torch.empty(2, 3, 224, 224)).shape == (2, 72, 768)


def test_a_model_within_a_module(vit, images):
    outer = nn.Sequential(vit, nn.Softmax(dim=1))
    assert reorganize(outer, 0.5).model == "VisionTransformer"
    assert counts(vit, images) == (17, 10, 7, 5)
    restore_tokens(outer)
    assert counts(vit, images) == (17,) * 4


def test_masks_are_refused(vit, images):
    reorganize(vit, 0.5)
    with pytest.raises(ValueError, match="attn_mask"):
        vit(images, attn_mask=torch.ones(17, 17, dtype=torch.bool))
    with pytest.raises(ValueError, match="is_causal"):
        vit(images, is_causal=True)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"keep_rate": 0.0}, ValueError, r"keep_rate: expected a number in \(0, 1\]"),
        ({"keep_rate": 1.1}, ValueError, "keep_rate"),
        ({"keep_rate": float("nan")}, ValueError, "keep_rate"),
        ({"keep_rate": "half"}, TypeError, "keep_rate"),
        ({"keep_rate": True}, TypeError, "keep_rate"),
        ({"keep_rate": (0.5, 0.5)}, ValueError, "keep_rate: expected a number or 3 of them"),
        ({"layers": (1, 4)}, ValueError, "layers: the model has layers 0 to 3"),
        ({"layers": (-1, 2)}, ValueError, "layers: expected layers in rising order"),
        ({"layers": (2, 1)}, ValueError, "layers: expected layers in rising order"),
        ({"layers": (1, 1)}, ValueError, "layers: expected layers in rising order"),
        ({"layers": ()}, ValueError, "layers: expected layers in rising order"),
        ({"layers": 3}, TypeError, "layers"),
        ({"layers": (1.0,)}, TypeError, "layers"),
        ({"score": "clas"}, ValueError, "score: expected 'class' or 'mean'"),
        ({"order": "random"}, ValueError, "order: expected"),
    ],
)
def test_bad_options_are_refused(vit, images, options, error, message):
    with torch.no_grad():
        expected = vit(images)
        with pytest.raises(error, match=message):
            reorganize(vit, **options)
        assert torch.equal(vit(images), expected)


def test_models_that_do_not_fit_are_refused(vit):
    with pytest.raises(TypeError, match="model: expected a torch.nn.Module"):
        reorganize("vit")
    with pytest.raises(TypeError, match="model: expected a torch.nn.Module"):
        restore_tokens("vit")
    with pytest.raises(ValueError, match="no stack of blocks"):
        reorganize(nn.Linear(2, 2))
    with pytest.raises(ValueError, match="2 stacks of blocks"):
        reorganize(nn.ModuleList([vit, small_vit()]))
    with pytest.raises(ValueError, match="not known to part in two"):
        reorganize(small_vit(block_fn=Stranger))
    vit.blocks[2].forward = lambda x: x
    with pytest.raises(ValueError, match="forward of its layer 2 has been replaced"):
        reorganize(vit)
    del vit.blocks[2].forward
    vit.blocks[2].attn.qkv = nn.Sequential(vit.blocks[2].attn.qkv)
    with pytest.raises(ValueError, match="in layer 2 the projections"):
        reorganize(vit)


class Stranger(ResPostBlock):
    def forward(self, x, attn_mask=None, is_causal=False):
        return x


def test_reorganizing_twice_is_refused(vit):
    reorganize(vit)
    with pytest.raises(ValueError, match="restore_tokens"):
        reorganize(vit)


@pytest.mark.parametrize(
    ("depth", "layers"),
    [(1, (0,)), (2, (1,)), (3, (1, 2)), (4, (1, 2, 3)), (12, (3, 6, 9)), (24, (6, 12, 18))],
)
def test_layers_by_default(depth, layers):
    assert published_layers(depth) == layers
