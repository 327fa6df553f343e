"""NeighborhoodAttention beside dense attention: windows, borders, the learned bias, any rank, prefix tokens."""

import copy

import pytest
import timm
import torch

import regard
from regard.mixers import DenseAttention, Neighborhood, NeighborhoodAttention, parse_mechanism

DIM, HEADS = 48, 3


def pair(**options) -> tuple[DenseAttention, NeighborhoodAttention]:
    torch.manual_seed(0)
    dense = DenseAttention(DIM, HEADS).double().eval()
    ours = NeighborhoodAttention(DIM, HEADS, **options).double().eval()
    ours.load_state_dict(dense.state_dict(), strict=not options.get("rel_pos_bias"))
    return dense, ours


def tokens(count: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(2, count, DIM, generator=torch.Generator().manual_seed(seed)).double()


@pytest.mark.parametrize("grid", [(20,), (4, 5), (2, 2, 5)])
def test_a_window_of_the_grid_is_dense(grid) -> None:
    dense, ours = pair(kernel_size=20)
    torch.testing.assert_close(ours(tokens(20), grid_size=grid), dense(tokens(20)))


def test_a_smaller_window_is_local() -> None:
    """What lies outside a query's window does not change its output."""
    _, ours = pair(kernel_size=3)
    x = tokens(64)
    other = x.clone()
    other[:, 63] += 1.0
    changed = (ours(x) - ours(other)).abs().amax(dim=(0, 2)).unflatten(0, (8, 8)) > 0
    assert changed[6:, 6:].all() and changed.sum() == 4  # a corner is in the windows of its own row and the one before


def test_one_number_or_one_for_each_axis() -> None:
    _, one = pair(kernel_size=3, dilation=2)
    _, each = pair(kernel_size=(3, 3), dilation=(2, 2))
    torch.testing.assert_close(one(tokens(48), grid_size=(6, 8)), each(tokens(48), grid_size=(6, 8)), rtol=0, atol=0)


def test_the_bias_starts_small_and_is_learned() -> None:
    torch.manual_seed(0)
    ours = NeighborhoodAttention(DIM, HEADS, kernel_size=3, rel_pos_bias=True)
    assert ours.rpb.shape == (HEADS, 5, 5) and 0 < ours.rpb.abs().max() < 0.2
    ours(tokens(35).float(), grid_size=(5, 7)).square().sum().backward()
    assert (ours.rpb.grad != 0).all()


def test_without_its_bias_it_is_the_same() -> None:
    dense, biased = pair(kernel_size=3, rel_pos_bias=True)
    _, plain = pair(kernel_size=3)
    torch.nn.init.zeros_(biased.rpb)
    torch.testing.assert_close(biased(tokens(36)), plain(tokens(36)))
    torch.nn.init.normal_(biased.rpb)
    assert not torch.allclose(biased(tokens(36)), plain(tokens(36)))


@pytest.mark.parametrize(
    ("options", "shape"),
    [({"rank": 1}, (3, 9)), ({"rank": 3}, (3, 9, 9, 9)), ({"kernel_size": (3, 5)}, (3, 5, 9))],
    ids=str,
)
def test_a_bias_of_any_rank(options, shape) -> None:
    ours = NeighborhoodAttention(DIM, HEADS, **{"kernel_size": 5, "rel_pos_bias": True, **options})
    assert ours.rpb.shape == shape
    grid = {1: (24,), 2: (4, 6), 3: (2, 3, 4)}[len(shape) - 1]
    assert ours(tokens(24).float(), grid_size=grid).shape == (2, 24, DIM)


def test_it_needs_its_bias_to_fit_the_grid() -> None:
    ours = NeighborhoodAttention(DIM, HEADS, kernel_size=5, rel_pos_bias=True)
    with pytest.raises(ValueError, match=r"attn_bias: shape \(3, 9, 9\)"):
        ours(tokens(24).float(), grid_size=(24,))


def test_a_sequence_may_be_causal() -> None:
    dense, ours = pair(kernel_size=20)
    x = tokens(20)
    torch.testing.assert_close(ours(x, is_causal=True, grid_size=(20,)), dense(x, is_causal=True))
    with pytest.raises(ValueError, match=r"is_causal: .*\(4, 5\)"):
        ours(x, is_causal=True, grid_size=(4, 5))


def test_prefix_tokens_see_all_and_are_seen_by_all() -> None:
    torch.manual_seed(0)
    ours = NeighborhoodAttention(DIM, HEADS, kernel_size=3, num_prefix_tokens=2).double().eval()
    weights = ours.attention_weights(tokens(2 + 30), grid_size=(5, 6))
    assert (weights[:, :, :2] > 0).all() and (weights[..., :2] > 0).all()
    assert (weights[:, :, 2:, 2:] > 0).sum(dim=-1).unique().tolist() == [9]
    torch.testing.assert_close(weights.sum(dim=-1), torch.ones(2, HEADS, 32).double())


def test_attention_weights_are_those_of_the_forward() -> None:
    _, ours = pair(kernel_size=3, rel_pos_bias=True)
    x = tokens(30)
    weights = ours.attention_weights(x, grid_size=(5, 6))
    _, _, value = ours.heads(x)
    mixed = ours.proj((weights @ value).transpose(1, 2).flatten(2))
    torch.testing.assert_close(mixed, ours(x, grid_size=(5, 6)))


@pytest.mark.parametrize("border", ["shift", "mask", "zeropad", "replicate"])
def test_borders_differ_at_the_border_only(border: str) -> None:
    _, shift = pair(kernel_size=3)
    _, other = pair(kernel_size=3, border=border)
    a, b = (m(tokens(48), grid_size=(6, 8)).unflatten(1, (6, 8)) for m in (shift, other))
    torch.testing.assert_close(a[:, 1:-1, 1:-1], b[:, 1:-1, 1:-1])
    assert torch.allclose(a, b) == (border == "shift")


@pytest.mark.parametrize(
    ("options", "error", "said"),
    [
        ({"kernel_size": 0}, ValueError, "kernel_size"),
        ({"kernel_size": 3, "stride": 4}, ValueError, "stride"),
        ({"dilation": 1.5}, TypeError, "dilation"),
        ({"border": "wrap"}, ValueError, "border"),
        ({"rank": 4}, ValueError, "rank: expected 1, 2 or 3, got 4"),
        ({"kernel": 3}, TypeError, "kernel"),
    ],
    ids=str,
)
def test_bad_options(options, error, said) -> None:
    with pytest.raises(error, match=said):
        NeighborhoodAttention(DIM, HEADS, **options)


def test_text_form() -> None:
    assert str(Neighborhood()) == "neighborhood(kernel_size=7, dilation=1, stride=1, border='shift')"
    assert parse_mechanism("neighborhood(kernel_size=(3, 5))") == Neighborhood(kernel_size=[3, 5])
    assert hash(Neighborhood([3, 5])) == hash(Neighborhood((3, 5)))
    assert Neighborhood(5).label == "neighborhood(kernel_size=5)"
    assert "kernel_size=5" in repr(NeighborhoodAttention(DIM, kernel_size=5))


def test_a_vision_transformer_converts_and_comes_back() -> None:
    """Its class token sees all, and a window of the grid changes nothing."""
    torch.manual_seed(0)
    model = timm.create_model("vit_tiny_patch16_224", img_size=96, depth=2, num_classes=5).eval()
    image = torch.randn(1, 3, 96, 96)
    plain = copy.deepcopy(model)
    record = regard.convert(model, Neighborhood(kernel_size=6))
    assert len(record.converted) == 2
    torch.testing.assert_close(model(image), plain(image), rtol=1e-4, atol=1e-5)
    regard.restore(model)
    regard.convert(model, "neighborhood(kernel_size=3)")
    assert not torch.allclose(model(image), plain(image))
    regard.restore(model)
    torch.testing.assert_close(model(image), plain(image), rtol=0, atol=0)


def test_reduced_keys_are_left_with_the_reason() -> None:
    model = timm.create_model("pvt_v2_b0", num_classes=5).eval()
    record = regard.convert(model, "neighborhood(kernel_size=3)", example_inputs=torch.randn(1, 3, 64, 64))
    assert any("key: " in left.reason for left in record.left)
