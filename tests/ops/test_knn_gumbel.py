"""Lazy Gumbel sampling and gradients from its draws: frequencies, closed forms, and means of many estimates."""

import math

import pytest
import torch

from regard.ops import gumbel_samples, sampled_attention_gradients
from regard.ops.knn.gumbel import random_walk_product


def problem(queries: int = 5, keys: int = 12, dim: int = 4, value_dim: int = 3) -> list[torch.Tensor]:
    """Query, key, value and the output's gradient, (1, N, D) each."""
    g = torch.Generator().manual_seed(0)
    sizes = ((queries, dim), (keys, dim), (keys, value_dim), (queries, value_dim))
    return [torch.randn(1, *size, generator=g).double() for size in sizes]


def gradients(query, key, value, grad, scale):
    """The three closed forms."""
    p = (query @ key.mT * scale).softmax(-1)
    gained = grad @ value.mT
    mean = (p * gained).sum(-1, keepdim=True)
    grad_query = (p * gained) @ key - (p @ key) * mean
    grad_key = (p * (gained - mean)).mT @ query
    return scale * grad_query, scale * grad_key, p.mT @ grad


def close_to_the_mean(draws: torch.Tensor, want: torch.Tensor) -> None:
    """Of estimates along the first dimension: within 5 standard errors, everywhere."""
    error = draws.std(dim=0) / math.sqrt(draws.shape[0])
    assert ((draws.mean(dim=0) - want).abs() <= 5.0 * error + 1e-12).all()
    assert error.max() < 0.1 * want.abs().max()


@pytest.mark.parametrize(("scale", "topk"), [(0.5, 8), (0.5, 1), (2.0, 20), (0.5, 60), (0.5, 99)])
def test_draws_have_the_softmaxs_frequencies(scale: float, topk: int) -> None:
    """Chi-square within 5 sigma; on average at most M / k keys beyond the k are looked at."""
    draws, keys = 20_000, 60
    query, key, *_ = problem(1, keys)
    g = torch.Generator().manual_seed(1)
    found, looked = gumbel_samples(query, key, topk=topk, num_samples=draws, scale=scale, generator=g)
    p = (query @ key.mT * scale).softmax(-1).flatten()
    counts = found.flatten().bincount(minlength=keys).double()
    likely = p * draws >= 5.0  # the others together are one more class
    counts, p = (torch.cat([t[likely], t[~likely].sum().view(1)]) for t in (counts, p))
    counts, p = counts[p > 0.0], p[p > 0.0]
    chi_square, freedom = ((counts - draws * p).square() / (draws * p)).sum(), len(p) - 1
    assert abs(chi_square - freedom) < 5.0 * math.sqrt(2.0 * freedom)
    assert looked.double().mean() <= keys / topk and (topk < keys or not looked.any())


def test_closed_forms_are_autograds() -> None:
    query, key, value, grad = problem()
    leaves = [t.requires_grad_() for t in (query, key, value)]
    output = (query @ key.mT * 0.7).softmax(-1) @ value
    for found, want in zip(gradients(*leaves, grad, 0.7), torch.autograd.grad(output, leaves, grad), strict=True):
        torch.testing.assert_close(found, want)


@pytest.mark.parametrize("walks", [None, 8])
def test_estimated_gradients_are_unbiased(walks: int | None) -> None:
    copies = 20_000
    tensors = problem()
    wide = [t.expand(copies, -1, -1) for t in tensors]
    g = torch.Generator().manual_seed(2)
    found = sampled_attention_gradients(*wide, topk=3, num_samples=4, walks=walks, scale=0.7, generator=g)
    for draws, want in zip(found, gradients(*tensors, 0.7), strict=True):
        close_to_the_mean(draws, want[0])


def test_their_variance_falls_with_the_number_of_draws() -> None:
    wide = [t.expand(4000, -1, -1) for t in problem()]
    g = torch.Generator().manual_seed(3)
    few, many = (
        [grad.var(dim=0).sum() for grad in sampled_attention_gradients(*wide, topk=3, num_samples=number, generator=g)]
        for number in (8, 32)
    )
    ratios = torch.stack(few) / torch.stack(many)
    assert 3.7 < ratios[2] < 4.3 and (ratios > 3.5).all() and (ratios < 5.5).all()


def test_random_walks_give_the_transposed_product() -> None:
    query, key, _, y = problem()
    y[..., 0] = y[..., 0].abs()  # needs no shift
    y[..., 1] = 0.0
    g = torch.Generator().manual_seed(4)
    wide = [t.expand(20_000, -1, -1) for t in (query, key, y)]
    found = random_walk_product(*wide, topk=3, walks=6, generator=g)
    close_to_the_mean(found, ((query @ key.mT * 0.5).softmax(-1).mT @ y)[0])
    assert (found[..., 1] == 0.0).all()
    torch.testing.assert_close(found[..., 0].sum(-1), y[..., 0].sum().expand(20_000))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_leading_dimensions_dtypes_and_generators(dtype: torch.dtype) -> None:
    query, key, value, grad = (t.to(dtype).expand(2, 3, -1, -1) for t in problem())
    runs = []
    for _ in range(2):
        g = torch.Generator().manual_seed(5)
        runs.append(sampled_attention_gradients(query, key, value, grad, topk=3, num_samples=4, walks=5, generator=g))
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))
    for found, like in zip(runs[0], (query, key, value), strict=True):
        assert found.shape == like.shape and found.dtype == dtype and found.isfinite().all()


def test_bad_arguments() -> None:
    query, key, value, grad = problem()
    for options, said in (
        ({"num_samples": 1}, "num_samples: expected at least 2"),
        ({"topk": 0}, "topk: expected at least 1"),
        ({"walks": 0}, "walks: expected at least 1"),
    ):
        with pytest.raises(ValueError, match=said):
            sampled_attention_gradients(query, key, value, grad, **({"topk": 3, "num_samples": 4} | options))
    with pytest.raises(ValueError, match=r"grad_output: expected \(1, 5, 3\), got \(1, 3, 5\)"):
        sampled_attention_gradients(query, key, value, grad.mT, topk=3, num_samples=4)
    with pytest.raises(ValueError, match="key: a draw needs at least one key"):
        gumbel_samples(query, key[:, :0], topk=1, num_samples=1)
