"""merge_tokens and what the mixers use of it: means, gradients, scores that would overflow, bad input."""

import pytest
import torch

import regard
from regard.ops import merge_tokens
from regard.ops.clustering.merge import merge_by_score, merge_equally


def case(batch=2, tokens=20, channels=5, clusters=4, dtype=torch.float64):
    g = torch.Generator().manual_seed(0)
    x = torch.randn(batch, tokens, channels, generator=g, dtype=torch.float64)
    assignment = torch.randint(clusters, (batch, tokens), generator=g)
    weights = torch.randn(batch, tokens, generator=g, dtype=torch.float64).exp()
    return x.to(dtype), assignment, weights.to(dtype)


def by_one_hot(x, assignment, weights, clusters):
    member = torch.nn.functional.one_hot(assignment, clusters).to(x.dtype) * weights[..., None]
    return torch.einsum("bnm,bnc->bmc", member, x) / (member.sum(1)[..., None] + 1e-6)


def test_weighted_means():
    x, assignment, weights = case()
    expected = by_one_hot(x, assignment, weights, 4)
    torch.testing.assert_close(merge_tokens(x, assignment, weights, num_clusters=4), expected)
    torch.testing.assert_close(merge_tokens(x, assignment, weights[..., None], num_clusters=4), expected)
    ones = by_one_hot(x, assignment, torch.ones_like(weights), 4)
    torch.testing.assert_close(merge_tokens(x, assignment, num_clusters=4), ones)
    assert regard.merge_tokens is merge_tokens


def test_empty_clusters_give_zeros():
    x, assignment, weights = case()
    for given in (None, weights):
        merged = merge_tokens(x, assignment, given, num_clusters=6)
        assert (merged[:, 4:] == 0).all() and (merged[:, :4] != 0).all()
    assert (merge_by_score(x, assignment, weights, num_clusters=6)[:, 4:] == 0).all()
    assert (merge_equally(x, assignment, num_clusters=6)[:, 4:] == 0).all()


def test_gradients():
    x, assignment, weights = case(tokens=7, channels=2, clusters=3)
    x.requires_grad_(), weights.requires_grad_()
    for merge in (merge_tokens, merge_by_score):
        assert torch.autograd.gradcheck(lambda x, w, merge=merge: merge(x, assignment, w, num_clusters=3), (x, weights))


def test_scores_are_logarithms_of_weights():
    x, assignment, weights = case()
    expected = merge_tokens(x, assignment, weights, num_clusters=4)
    torch.testing.assert_close(
        merge_by_score(x, assignment, weights.log(), num_clusters=4), expected, rtol=0, atol=1e-14
    )
    tiny = weights * 1e-7  # here the 1e-6 of the denominator weighs
    torch.testing.assert_close(
        merge_by_score(x, assignment, tiny.log(), num_clusters=4),
        merge_tokens(x, assignment, tiny, num_clusters=4),
        rtol=0,
        atol=1e-14,
    )


@pytest.mark.parametrize("shift", [12.0, 100.0, 1000.0, -1000.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_large_scores_do_not_overflow(shift, dtype):
    x, assignment, weights = case(dtype=dtype)
    score = (weights.float().log() + shift).to(dtype).requires_grad_()
    merged = merge_by_score(x, assignment, score, num_clusters=4)
    merged.float().sum().backward()
    assert merged.dtype == dtype and torch.isfinite(merged).all() and torch.isfinite(score.grad).all()
    if shift < 0:
        assert (merged == 0).all(), "as published: exp(score) is nothing beside 1e-6"
    else:
        exact = merge_equally(x.double(), assignment, (score.double() - shift).exp(), num_clusters=4)
        torch.testing.assert_close(merged.double(), exact, rtol=2e-2, atol=2e-2)


def test_a_cluster_of_low_scores_beside_one_of_high_ones():
    """A maximum over the whole image would underflow here."""
    x, assignment, _ = case(clusters=2)
    score = torch.where(assignment == 0, 200.0, 5.0)
    plain = merge_equally(x, assignment, num_clusters=2)
    torch.testing.assert_close(merge_by_score(x.float(), assignment, score, num_clusters=2), plain.float())


def test_left_out_tokens():
    x, assignment, weights = case()
    out = torch.zeros(2, 20, dtype=torch.bool)
    out[:, ::3] = True
    scores = weights.log().masked_fill(out, -torch.inf)
    expected = merge_tokens(x, assignment, weights * ~out, num_clusters=4)
    torch.testing.assert_close(merge_by_score(x, assignment, scores, num_clusters=4), expected)
    nothing = merge_by_score(x, assignment, torch.full_like(scores, -torch.inf), num_clusters=4)
    assert (nothing == 0).all()


def test_equal_means_sum_to_one():
    _, assignment, _ = case()
    identity = torch.eye(20).double().expand(2, 20, 20)
    share = merge_equally(identity, assignment, num_clusters=4)
    torch.testing.assert_close(share.sum(-1), torch.ones(2, 4).double(), rtol=0, atol=1e-15)


def test_half_types_are_summed_in_float32():
    """4,096 ones: bfloat16 would stop counting at 256."""
    x = torch.ones(1, 4096, 2, dtype=torch.bfloat16)
    merged = merge_tokens(x, torch.zeros(1, 4096, dtype=torch.int64), num_clusters=1)
    assert merged.dtype == torch.bfloat16 and (merged == 1).all()


def test_reproducible_and_strided():
    x, assignment, weights = case(tokens=400, dtype=torch.float32)
    first = merge_tokens(x, assignment, weights, num_clusters=4)
    assert torch.equal(merge_tokens(x, assignment, weights, num_clusters=4), first)
    assert torch.equal(merge_tokens(x.mT.contiguous().mT, assignment, weights, num_clusters=4), first)


def test_compiles():
    torch.compiler.reset()
    x, assignment, weights = case()
    merge = torch.compile(merge_tokens, fullgraph=True, dynamic=True, backend="aot_eager")
    torch.testing.assert_close(
        merge(x, assignment, weights, num_clusters=4), merge_tokens(x, assignment, weights, num_clusters=4)
    )


X, A = torch.zeros(2, 6, 3), torch.zeros(2, 6, dtype=torch.int64)


@pytest.mark.parametrize(
    ("arguments", "clusters", "error", "said"),
    [
        ((X[0], A), 2, ValueError, "x: expected"),
        ((X, A.int()), 2, TypeError, "assignment: expected an int64 tensor, got torch.int32"),
        ((X, A[:, :5]), 2, ValueError, r"assignment: expected \(B, N\) = \(2, 6\)"),
        ((X, A), 0, ValueError, "num_clusters: expected at least 1"),
        ((X, A, A), 2, TypeError, "weights: expected a floating tensor, got torch.int64"),
        ((X, A, X), 2, ValueError, r"weights: expected \(B, N\) or \(B, N, 1\)"),
    ],
)
def test_bad_input(arguments, clusters, error, said):
    with pytest.raises(error, match=said):
        merge_tokens(*arguments, num_clusters=clusters)
