"""Bi-level routing attention: the gathered form that the paper writes, a dense form of any grid, and its identities."""

import copy

import pytest
import timm
import torch
import torch.nn.functional as F
from attention_cases import Largest

import regard
from regard.mixers import BiLevel, BiLevelRoutingAttention, DenseAttention, parse_mechanism
from regard.mixers.bilevel import conv_on_grid
from regard.ops.routed.arranging import block_sums

DIM, HEADS = 24, 3


def tokens(count, batch=2, seed=0, **options):
    return torch.randn(batch, count, DIM, generator=torch.Generator().manual_seed(seed), dtype=torch.float64, **options)


def qkv(count, batch=2, heads=HEADS, seed=0):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(3, batch, heads, count, DIM // HEADS, generator=g, dtype=torch.float64)


def make(**options):
    torch.manual_seed(0)
    return BiLevelRoutingAttention(DIM, HEADS, **options).double().eval()


def gathered(mixer, x, grid, regions, topk):
    """What the mixer computes, written as the paper's equations 2 to 6 where regions divide the grid: the means of
    regions choose, K and V are gathered for each region, LCE and the projection follow."""
    rows, columns = grid[0] // regions, grid[1] // regions
    images = mixer.qkv(x).transpose(1, 2).unflatten(2, grid).chunk(3, dim=1)

    def regionwise(x):  # (B, C, h, w) -> (B, S^2, n, C)
        x = x.unflatten(3, (regions, columns)).unflatten(2, (regions, rows))
        return x.permute(0, 2, 4, 3, 5, 1).flatten(3, 4).flatten(1, 2)

    query, key, value = (regionwise(image) for image in images)
    chosen = (query.mean(2) @ key.mean(2).mT).topk(topk, dim=-1).indices
    key, value = (
        torch.stack([one[places].flatten(1, 2) for one, places in zip(t, chosen, strict=True)]).unflatten(
            -1, (HEADS, -1)
        )
        for t in (key, value)
    )
    query = query.unflatten(-1, (HEADS, -1))
    weights = torch.einsum("brnhd,brmhd->brhnm", query * mixer.scale, key).softmax(-1)
    out = torch.einsum("brhnm,brmhd->brnhd", weights, value).flatten(3)
    out = out.unflatten(2, (rows, columns)).unflatten(1, (regions, regions)).permute(0, 5, 1, 3, 2, 4)
    lce = F.conv2d(images[2], mixer.lepe.weight, mixer.lepe.bias, padding=mixer.lepe.padding, groups=DIM)
    return mixer.proj((out.flatten(4, 5).flatten(2, 3) + lce).flatten(2).mT)


def region_of(grid, sizes):
    """(N,) the region of each token, counted along the last axis first."""
    places = torch.cartesian_prod(*(torch.arange(n) for n in grid)).view(-1, len(grid))
    region = torch.zeros(len(places), dtype=torch.int64)
    for axis, (n, size) in enumerate(zip(grid, sizes, strict=True)):
        region = region * -(-n // size) + places[:, axis] // size
    return region


def seen_by(query, key, region, topk, visible=None):
    """(B, N, N) which keys each query sees, from single tokens' regions; channels of all heads together."""
    batch, _, count, _ = query.shape
    visible = torch.ones(batch, count, dtype=torch.bool) if visible is None else visible
    total = int(region.max()) + 1
    member = F.one_hot(region, total).T[None] & visible[:, None].long()
    counts = member.sum(-1, keepdim=True)
    means = [(member.double() @ t.transpose(1, 2).flatten(2)) / counts.clamp(min=1) for t in (query, key)]
    affinity = (means[0] @ means[1].mT).masked_fill(counts.mT == 0, float("-inf"))
    order = affinity.sort(dim=-1, descending=True, stable=True).indices[..., :topk]
    chosen = torch.zeros_like(affinity, dtype=torch.bool).scatter(-1, order, True)
    return chosen[:, region][:, :, region] & visible[:, None]


@pytest.mark.parametrize(
    ("grid", "regions", "topk"), [((6, 6), 3, 2), ((4, 8), 2, 1), ((7, 14), 7, 16), ((4, 4), 4, 3)]
)
def test_outputs_equal_the_gathered_form(grid, regions, topk):
    mixer = make(num_regions=regions, topk=topk, qkv_bias=True)
    x = tokens(grid[0] * grid[1])
    torch.testing.assert_close(mixer(x, grid_size=grid), gathered(mixer, x, grid, regions, topk))


@pytest.mark.parametrize("prefix", [0, 2])
@pytest.mark.parametrize("hidden", [False, True])
@pytest.mark.parametrize(
    ("grid", "options", "sizes", "topk"),
    [
        ((13, 17), {}, (2, 3), 4),
        ((30,), {"num_regions": 4, "topk": 2}, (8,), 2),
        ((3, 5, 4), {"region_size": (2, 2, 3), "topk": 0.3}, (2, 2, 3), 4),
        ((6, 5), {"num_regions": (2, 9), "topk": 3}, (3, 1), 3),
        ((3, 4), {"region_size": 5, "topk": 1}, (3, 4), 1),
    ],
)
def test_any_grid_is_dense_attention_under_a_mask(grid, options, sizes, topk, hidden, prefix):
    """Padding inside, hidden keys, ranks 1 to 3, prefix tokens that see all and are seen by all."""
    count = torch.Size(grid).numel()
    query, key, value = qkv(prefix + count)
    visible = None
    if hidden:
        visible = torch.rand(2, prefix + count, generator=torch.Generator().manual_seed(1)) > 0.4
        visible[0, prefix:] &= region_of(grid, sizes) != 0  # the first region sees nothing of its own
    cells = (t[:, :, prefix:] for t in (query, key))
    seen = torch.ones(2, prefix + count, prefix + count, dtype=torch.bool)
    part = None if visible is None else visible[:, prefix:]
    seen[:, prefix:, prefix:] = seen_by(*cells, region_of(grid, sizes), topk, part)
    if visible is not None:
        seen &= visible[:, None]
    expected = F.scaled_dot_product_attention(query, key, value, attn_mask=seen[:, None])
    mask = None if visible is None else visible[:, None, None]
    given = {"attn_mask": mask, "grid_size": grid, "num_prefix_tokens": prefix}
    found = BiLevel(**options).attend(query, key, value, **given)
    torch.testing.assert_close(found, expected.nan_to_num(0.0))


@pytest.mark.parametrize("options", [{"topk": 1.0}, {"topk": 49}, {"num_regions": 1, "topk": 1}])
def test_all_regions_are_dense_attention(options):
    torch.manual_seed(0)
    dense = DenseAttention(DIM, HEADS).double().eval()
    mixer = make(**options)
    mixer.load_state_dict(dense.state_dict(), strict=False)
    torch.nn.init.zeros_(mixer.lepe.weight)
    torch.nn.init.zeros_(mixer.lepe.bias)
    for grid in ((7, 7), (8, 9)):
        x = tokens(grid[0] * grid[1])
        torch.testing.assert_close(mixer(x, grid_size=grid), dense(x))


def test_regions_of_one_token_choose_single_keys():
    """Each token its k best by the products of all channels, the same for every head."""
    query, key, value = qkv(36)
    scores = query.transpose(1, 2).flatten(2) @ key.transpose(1, 2).flatten(2).mT
    kept = torch.zeros_like(scores, dtype=torch.bool).scatter(-1, scores.topk(5, dim=-1).indices, True)
    expected = F.scaled_dot_product_attention(query, key, value, attn_mask=kept[:, None])
    torch.testing.assert_close(BiLevel(num_regions=6, topk=5).attend(query, key, value), expected)


def test_one_region_of_its_own_is_window_attention():
    """Queries and keys that carry their region's own direction choose their own region."""
    query, key, value = qkv(36) * 0.1
    region = F.one_hot(region_of((6, 6), (3, 2)), 6).double() * 3.0
    query, key = (t + F.pad(region, (0, 2)) for t in (query, key))
    found = BiLevel(num_regions=(2, 3), topk=1).attend(query, key, value)
    x = (t.unflatten(2, (2, 3, 3, 2)).permute(0, 1, 2, 4, 3, 5, 6).flatten(4, 5) for t in (query, key, value))
    expected = F.scaled_dot_product_attention(*x).unflatten(4, (3, 2)).permute(0, 1, 2, 4, 3, 5, 6).flatten(2, 5)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("lce", [0, 5])
def test_permuted_regions(lce):
    """Without LCE, regions are a set: permuting them permutes the outputs. With it, places matter."""
    mixer, x = make(num_regions=3, topk=2, lce=lce), tokens(36)
    order = regard.BlockOrder((6, 6), 2)
    shuffled = torch.randperm(9, generator=torch.Generator().manual_seed(0))

    def permuted(x):
        return order.restore(order.arrange(x).unflatten(1, (9, 4))[:, shuffled].flatten(1, 2))

    assert torch.allclose(mixer(permuted(x)), permuted(mixer(x))) == (lce == 0)


def test_no_gradient_passes_through_the_choice():
    """The gradients are those of dense attention under the chosen mask."""
    options = BiLevel(num_regions=3, topk=2)
    inputs = [t.requires_grad_() for t in qkv(36).unbind()]
    seen = seen_by(inputs[0].detach(), inputs[1].detach(), region_of((6, 6), (2, 2)), 2)
    outputs = options.attend(*inputs), F.scaled_dot_product_attention(*inputs, attn_mask=seen[:, None])
    found, expected = (torch.autograd.grad(out.square().sum(), inputs) for out in outputs)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("mask_padding", [True, False])
def test_gradients_are_right(mask_padding):
    torch.manual_seed(0)
    mixer = BiLevelRoutingAttention(4, 2, num_regions=2, topk=2, lce=3, num_prefix_tokens=1, mask_padding=mask_padding)
    mixer = mixer.double()
    x = torch.randn(1, 1 + 15, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: mixer(x, grid_size=(3, 5)), (x,))


@pytest.mark.parametrize("prefix", [0, 1])
def test_official_padding(prefix):
    """Zero tokens to whole regions before the projection, seen like any other; then they are cut off."""
    mixer = make(num_regions=4, topk=3, mask_padding=False, num_prefix_tokens=prefix, qkv_bias=True)
    torch.nn.init.normal_(mixer.qkv.bias)
    hidden = make(num_regions=4, topk=3, num_prefix_tokens=prefix, qkv_bias=True)
    hidden.load_state_dict(mixer.state_dict())
    x = tokens(prefix + 9 * 5)
    cells = F.pad(x[:, prefix:].unflatten(1, (9, 5)), (0, 0, 0, 3, 0, 3)).flatten(1, 2)  # 12 x 8: regions of 3 x 2
    whole = hidden(torch.cat([x[:, :prefix], cells], dim=1), grid_size=(12, 8))
    kept = torch.cat([whole[:, :prefix], whole[:, prefix:].unflatten(1, (12, 8))[:, :9, :5].flatten(1, 2)], dim=1)
    torch.testing.assert_close(mixer(x, grid_size=(9, 5)), kept)
    assert not torch.allclose(mixer(x, grid_size=(9, 5)), hidden(x, grid_size=(9, 5)))
    divisible = tokens(prefix + 8 * 4)
    torch.testing.assert_close(mixer(divisible, grid_size=(8, 4)), hidden(divisible, grid_size=(8, 4)))
    rows = mixer.attention_weights(x, grid_size=(9, 5)).sum(-1)
    assert rows.shape == (2, HEADS, prefix + 45) and (rows < 1 + 1e-9).all() and (rows < 0.99).any()


def test_official_padding_stays_visible_under_a_mask():
    mixer = make(num_regions=2, topk=1.0, mask_padding=False, lce=0)
    x, visible = tokens(9), torch.tensor([True] * 6 + [False] * 3)
    rows = mixer.attention_weights(x, visible, grid_size=(3, 3))
    assert (rows[..., 6:] == 0).all() and (rows.sum(-1) < 0.99).all()
    other = x.clone()
    other[:, 6:] += 1.0
    found, moved = (mixer(t, visible, grid_size=(3, 3))[:, :6] for t in (x, other))
    torch.testing.assert_close(found, moved)


@pytest.mark.parametrize("mask", [None, torch.arange(30) % 4 > 0])
def test_forward_is_its_weights_and_lce(mask):
    mixer = make(num_regions=3, topk=2)
    x = tokens(30)
    weights = mixer.attention_weights(x, mask, grid_size=(5, 6))
    _, _, value = mixer.heads(x)
    shown = value if mask is None else value.masked_fill(~mask[:, None], 0.0)
    lce = mixer.lepe(shown.transpose(2, 3).flatten(1, 2).unflatten(2, (5, 6))).flatten(2).transpose(1, 2)
    mixed = (weights @ value).transpose(1, 2).flatten(2) + lce
    torch.testing.assert_close(mixer.proj(mixed), mixer(x, mask, grid_size=(5, 6)))


def test_the_convolution_on_grids_of_any_rank():
    """Of a sequence: the kernel's middle row; of a video: every image alone. Prefix tokens get none."""
    conv = torch.nn.Conv2d(DIM, DIM, 5, padding=2, groups=DIM).double()
    x = tokens(24)
    line = F.conv1d(x.mT, conv.weight[:, :, 2], conv.bias, padding=2, groups=DIM).mT
    torch.testing.assert_close(conv_on_grid(conv, x, (24,)), line)
    images = conv_on_grid(conv, x.unflatten(1, (2, 12)).flatten(0, 1), (3, 4)).unflatten(0, (2, 2)).flatten(1, 2)
    torch.testing.assert_close(conv_on_grid(conv, x, (2, 3, 4)), images)
    with_prefix = conv_on_grid(conv, torch.cat([tokens(2, seed=1), x], dim=1), (24,), 2)
    torch.testing.assert_close(with_prefix, F.pad(line, (0, 0, 2, 0)))


def test_grouped_heads_and_leading_dimensions():
    query, key, value = qkv(36, heads=6)
    key, value = key[:, :2], value[:, :2]
    mechanism = BiLevel(num_regions=3, topk=2)
    found = mechanism.attend(query, key, value, enable_gqa=True, scale=0.7)
    key, value = (t.repeat_interleave(3, dim=1) for t in (key, value))
    torch.testing.assert_close(found, mechanism.attend(query, key, value, scale=0.7))
    torch.testing.assert_close(mechanism.attend(query[0], key[0], value[0], scale=0.7), found[0])
    deeper = [t.unflatten(0, (1, 2)) for t in (query, key, value)]
    torch.testing.assert_close(mechanism.attend(*deeper, scale=0.7), found[None])


def test_scale():
    mixer, other = make(topk=1.0, lce=0), make(topk=1.0, lce=0, scale=DIM**-0.5)
    assert mixer.scale == (DIM // HEADS) ** -0.5
    x = tokens(16)
    query, key, value = mixer.heads(x)
    expected = F.scaled_dot_product_attention(query, key, value, scale=DIM**-0.5).transpose(1, 2).flatten(2)
    torch.testing.assert_close(other(x), other.proj(expected))


def test_memory_does_not_grow_with_the_gather():
    """K and V gathered for every region would hold topk * N * 2 C numbers; nothing beyond N * 3 C is ever made."""
    torch.manual_seed(0)
    side, dim, made = 28, 32, []
    for topk in (1, 16):
        mixer = BiLevelRoutingAttention(dim, 1, topk=topk)
        x = torch.randn(1, side**2, dim, requires_grad=True)
        with Largest() as largest:
            mixer(x).square().sum().backward()
        made.append(largest.elements)
    assert made[0] == made[1] == side**2 * 3 * dim < 16 * side**2 * 2 * dim


def test_sums_over_blocks():
    x = tokens(12).requires_grad_()
    torch.testing.assert_close(block_sums(x, 4), torch.stack([part.sum(1) for part in x.split(4, dim=1)], dim=1))
    assert torch.autograd.gradcheck(lambda x: block_sums(x.square(), 4), x[:1, :, :2])
    torch.library.opcheck(torch.ops.regard.block_sums.default, (x, 4))


def test_only_prefix_tokens():
    mixer = make(num_prefix_tokens=3, lce=0)
    dense = DenseAttention(DIM, HEADS).double().eval()
    dense.load_state_dict(mixer.state_dict())
    torch.testing.assert_close(mixer(tokens(3)), dense(tokens(3)))


@pytest.mark.parametrize(
    ("options", "error", "said"),
    [
        ({"num_regions": 0}, ValueError, "num_regions: expected at least 1"),
        ({"num_regions": 2.0}, TypeError, "num_regions: expected an int"),
        ({"num_regions": None}, TypeError, "num_regions"),
        ({"num_regions": "77"}, TypeError, "num_regions"),
        ({"region_size": (2, 0)}, ValueError, "region_size: expected at least 1"),
        ({"topk": 0}, ValueError, "topk: expected at least 1"),
        ({"topk": 1.5}, ValueError, r"topk: as a fraction it must lie in \(0, 1\], got 1.5"),
        ({"topk": True}, TypeError, "topk: expected an int"),
        ({"lce": 4}, ValueError, "lce: expected an odd kernel size, or 0 .*, got 4"),
        ({"lce": -1}, ValueError, "lce"),
        ({"window": 3}, TypeError, "window"),
    ],
    ids=str,
)
def test_bad_options(options, error, said):
    with pytest.raises(error, match=said):
        BiLevelRoutingAttention(DIM, HEADS, **options)


def test_bad_calls():
    with pytest.raises(ValueError, match=r"num_regions: \(2, 3\) has 2 axes, the grid 1"):
        make(num_regions=(2, 3))(tokens(16), grid_size=(16,))
    query, key, value = qkv(16)
    with pytest.raises(ValueError, match="key: 9 keys for 16 queries; bi-level routing needs them in one grid"):
        BiLevel().attend(query, key[:, :, :9], value[:, :, :9])
    with pytest.raises(ValueError, match="attn_mask: .* a region is chosen for what all may see in it"):
        BiLevel().attend(query, key, value, attn_mask=torch.ones(16, 16, dtype=torch.bool))


def test_text_form():
    assert str(BiLevel()) == "bilevel(num_regions=7, topk=4, region_size=None, lce=5)"
    assert parse_mechanism("bilevel(num_regions=(3, 5))") == BiLevel(num_regions=[3, 5])
    assert hash(BiLevel([3, 5])) == hash(BiLevel((3, 5)))
    assert BiLevel(topk=0.25).label == "bilevel(topk=0.25)"
    assert "topk=2" in repr(make(topk=2)) and "mask_padding=False" in repr(make(mask_padding=False))


def test_a_vision_transformer_converts_and_comes_back():
    torch.manual_seed(0)
    model = timm.create_model("vit_tiny_patch16_224", img_size=96, depth=2, num_classes=5).eval()
    image = torch.randn(1, 3, 96, 96)
    plain = copy.deepcopy(model)
    record = regard.convert(model, "bilevel(num_regions=2, topk=1.0)")
    assert len(record.converted) == 2
    torch.testing.assert_close(model(image), plain(image), rtol=1e-4, atol=1e-5)
    regard.restore(model)
    regard.convert(model, "bilevel(num_regions=3, topk=2)")
    assert not torch.allclose(model(image), plain(image))
    regard.restore(model)
    torch.testing.assert_close(model(image), plain(image), rtol=0, atol=0)
