"""KNNAttention beside dense attention: what `topk` means in the module."""

import pytest
import torch

from regard.mixers import KNN, DenseAttention, KNNAttention, parse_mechanism

DIM, HEADS, TOKENS = 48, 3, 20


def pair(topk):
    torch.manual_seed(0)
    dense, knn = DenseAttention(DIM, HEADS).double().eval(), KNNAttention(DIM, HEADS, topk=topk).double().eval()
    knn.load_state_dict(dense.state_dict())
    return dense, knn, torch.randn(2, TOKENS, DIM).double()


@pytest.mark.parametrize("topk", [TOKENS, TOKENS + 1, 10**6, 1.0])
def test_all_keys_is_dense(topk):
    dense, knn, x = pair(topk)
    torch.testing.assert_close(knn(x), dense(x))


@pytest.mark.parametrize("topk", [1, TOKENS - 1, 0.5])
def test_fewer_keys_is_not_dense(topk):
    dense, knn, x = pair(topk)
    assert not torch.allclose(knn(x), dense(x))


def test_one_key_hands_over_its_value():
    dense, knn, x = pair(1)
    query, key, value = knn.qkv(x).reshape(2, TOKENS, 3, HEADS, -1).permute(2, 0, 3, 1, 4)
    nearest = (query @ key.mT).argmax(dim=-1)
    expected = value.gather(2, nearest[..., None].expand_as(value)).transpose(1, 2).flatten(2)
    torch.testing.assert_close(knn(x), knn.proj(expected))


def test_one_key_leaves_query_and_key_without_gradient():
    """A softmax over one logit is constant."""
    _, knn, x = pair(1)
    knn(x).square().sum().backward()
    query, key, value = knn.qkv.weight.grad.chunk(3)
    assert (query == 0).all() and (key == 0).all() and value.abs().sum() > 0


def test_one_and_one_point_zero_differ():
    """`1` is one key, `1.0` is all of them."""
    _, one, x = pair(1)
    _, all_keys, _ = pair(1.0)
    assert not torch.allclose(one(x), all_keys(x))


@pytest.mark.parametrize(("fraction", "count"), [(0.5, 10), (0.51, 11), (0.05, 1), (0.01, 1)])
def test_fraction_rounds_up(fraction, count):
    _, by_fraction, x = pair(fraction)
    _, by_count, _ = pair(count)
    torch.testing.assert_close(by_fraction(x), by_count(x), rtol=0, atol=0)


@pytest.mark.parametrize(
    ("topk", "error"),
    [(0, ValueError), (-3, ValueError), (0.0, ValueError), (1.01, ValueError), (float("nan"), ValueError)]
    + [("half", TypeError), (None, TypeError), (True, TypeError)],
)
def test_bad_topk(topk, error):
    with pytest.raises(error, match="topk"):
        KNNAttention(DIM, HEADS, topk=topk)


def test_unknown_argument():
    with pytest.raises(TypeError, match="top_k"):
        KNNAttention(DIM, HEADS, top_k=3)


def test_repr_tells_topk():
    assert "topk=0.25" in repr(KNNAttention(DIM, topk=0.25))


def test_the_nearest_keys_by_name():
    """The option goes from the text form to the operator; the fast version's text is what it was."""
    assert str(KNN(topk=3)) == "knn(topk=3)"
    text = "knn(topk=3, metric='euclidean')"
    mechanism = parse_mechanism(text)
    assert str(mechanism) == text and mechanism != KNN(topk=3)
    dense, knn, x = pair(3)
    torch.manual_seed(0)
    nearest = mechanism.attn_layer()(DIM, HEADS).double().eval()
    nearest.load_state_dict(dense.state_dict())
    assert "metric='euclidean'" in repr(nearest) and not torch.allclose(nearest(x), knn(x))
    with pytest.raises(ValueError, match="metric"):
        KNNAttention(DIM, HEADS, metric="manhattan")
    with pytest.raises(ValueError, match="metric"):
        KNN(metric="manhattan")


def test_a_sampled_tail_is_drawn_anew_in_training_only():
    torch.manual_seed(0)
    mixer, x = KNNAttention(DIM, HEADS, topk=3, tail="sample", num_samples=2), torch.randn(2, TOKENS, DIM)
    draws = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        draws.append(mixer(x))
    assert torch.equal(draws[0], draws[1]) and not torch.allclose(draws[0], draws[2])
    mixer.eval()
    before = torch.get_rng_state()
    assert torch.equal(mixer(x), mixer(x)) and torch.equal(torch.get_rng_state(), before)


def test_a_tail_sampled_whole_is_dense():
    dense, knn, x = pair(3)
    knn.tail, knn.num_samples = "sample", TOKENS
    torch.testing.assert_close(knn(x), dense(x))


def test_text_keeps_its_form_where_the_tail_is_dropped():
    assert str(KNN(topk=0.25)) == "knn(topk=0.25)"
    assert str(KNN(topk=0.25, tail="sample", num_samples=32)) == "knn(topk=0.25, tail='sample', num_samples=32)"
    assert KNN(topk=3, tail="sample").label == "knn(topk=3, tail='sample')"
    with pytest.raises(ValueError, match="tail"):
        KNN(tail="cut")
    with pytest.raises(TypeError, match="num_samples"):
        KNNAttention(DIM, HEADS, num_samples=0.5)


def test_repr_tells_the_tail():
    assert "tail='sample', num_samples=4" in repr(KNNAttention(DIM, tail="sample", num_samples=4))
    assert "tail" not in repr(KNNAttention(DIM))
