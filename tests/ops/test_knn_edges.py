"""k-NN attention at its edges: wrong arguments, nothing to attend to, NaN and infinity."""

import math

import pytest
import torch
import torch.nn.functional as F
from attention_cases import BACKENDS, Shape, far_apart, inputs

from regard import knn_attention
from regard.ops import only_backend


def tensors(heads: int = 2, key_heads: int = 2, queries: int = 5, keys: int = 7, dim: int = 16):
    return inputs(Shape(2, heads, key_heads, queries, keys, dim, dim))


@pytest.mark.parametrize(
    ("topk", "error"),
    [(x, ValueError) for x in (0, -3, 0.0, 1.5, -0.5, math.nan, math.inf)]
    + [(x, TypeError) for x in (True, "3", None, 1j)],
)
def test_topk_out_of_range(topk, error) -> None:
    with pytest.raises(error, match="topk"):
        knn_attention(*tensors(), topk=topk)


def q(*size: int, **kwargs) -> torch.Tensor:
    return torch.zeros(size, **kwargs)


@pytest.mark.parametrize(
    ("query", "key", "value", "error", "names"),
    [
        (q(5, 16), q(7, 16), q(7, 16), ValueError, ["query", "(5, 16)"]),
        (q(2, 2, 5, 16), q(2, 2, 7, 8), q(2, 2, 7, 8), ValueError, ["key", "head_dim 8", "16"]),
        (q(2, 2, 5, 0), q(2, 2, 7, 0), q(2, 2, 7, 8), ValueError, ["query", "head_dim is 0"]),
        (q(2, 2, 5, 16), q(2, 1, 7, 16), q(2, 1, 7, 16), ValueError, ["key", "enable_gqa"]),
        (q(2, 2, 5, 16), q(2, 2, 7, 16), q(2, 2, 6, 16), ValueError, ["value", "(2, 2, 6, 16)"]),
        (q(2, 2, 5, 16), q(2, 2, 7, 16), q(2, 1, 7, 16), ValueError, ["value", "(2, 1, 7, 16)"]),
        (q(2, 2, 5, 16), q(1, 2, 7, 16), q(1, 2, 7, 16), ValueError, ["key", "leading dimensions"]),
        (q(2, 2, 5, 16), q(3, 2, 2, 7, 16), q(3, 2, 2, 7, 16), ValueError, ["key", "leading dimensions"]),
        (q(2, 2, 5, 16), q(2, 2, 7, 16).double(), q(2, 2, 7, 16), TypeError, ["key", "float64"]),
        (q(2, 2, 5, 16).to(torch.float8_e4m3fn), q(2, 2, 7, 16), q(2, 2, 7, 16), TypeError, ["query", "float8"]),
        (q(2, 2, 5, 16).int(), q(2, 2, 7, 16).int(), q(2, 2, 7, 16).int(), TypeError, ["query", "int32"]),
        (q(2, 2, 5, 16), q(2, 2, 7, 16, device="meta"), q(2, 2, 7, 16), ValueError, ["key", "meta"]),
        ([[1.0]], q(2, 2, 7, 16), q(2, 2, 7, 16), TypeError, ["query", "list"]),
    ],
)
def test_tensors_that_do_not_fit(query, key, value, error, names) -> None:
    with pytest.raises(error) as raised:
        knn_attention(query, key, value, topk=3)
    for name in names:
        assert name in str(raised.value)


def test_grouped_heads_must_divide() -> None:
    with pytest.raises(ValueError, match="multiple"):
        knn_attention(*tensors(heads=3, key_heads=2), topk=3, enable_gqa=True)


@pytest.mark.parametrize(
    ("mask", "error"),
    [
        (torch.zeros(5, 6), ValueError),
        (torch.zeros(3, 1, 5, 7), ValueError),
        (torch.zeros(1, 1, 1, 1, 7), ValueError),
        (torch.zeros(5, 7, dtype=torch.int64), TypeError),
        ("causal", TypeError),
        (torch.zeros(5, 7, device="meta"), ValueError),
    ],
)
def test_masks_that_do_not_fit(mask, error) -> None:
    with pytest.raises(error, match="attn_mask"):
        knn_attention(*tensors(), topk=3, attn_mask=mask)


@pytest.mark.parametrize("dropout", [-0.1, 1.0, math.nan])
def test_dropout_is_a_probability(dropout: float) -> None:
    with pytest.raises(ValueError, match="dropout_p"):
        knn_attention(*tensors(), topk=3, dropout_p=dropout)


def test_scale_is_a_number() -> None:
    with pytest.raises(TypeError, match="scale"):
        knn_attention(*tensors(), topk=3, scale="0.5")


@pytest.mark.filterwarnings("ignore::regard.SlowPathWarning")
@pytest.mark.parametrize("topk", [3, 0.5, 1.0])
@pytest.mark.parametrize("size", [(0, 2, 5, 7), (2, 0, 5, 7), (2, 2, 0, 7), (2, 2, 5, 0), (2, 2, 0, 0), (0, 0, 0, 0)])
def test_nothing_to_attend(size: tuple[int, int, int, int], topk: int | float) -> None:
    batch, heads, queries, keys = size
    shape = Shape(batch, heads, heads, queries, keys, 16, 24)
    query, key, value = (t.requires_grad_() for t in inputs(shape))
    output = knn_attention(query, key, value, topk=topk)
    assert output.shape == (batch, heads, queries, 24) and (output == 0).all()
    grads = torch.autograd.grad(output.sum(), (query, key, value))
    assert [g.shape for g in grads] == [t.shape for t in (query, key, value)]
    assert all((g == 0).all() for g in grads)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("topk", [2, 6])
def test_a_fully_masked_row_is_zero_and_has_no_gradient(backend: str, topk: int) -> None:
    query, key, value = (t.requires_grad_() for t in tensors())
    mask = torch.ones(5, 7, dtype=torch.bool)
    mask[2] = False
    with only_backend(backend):
        output = knn_attention(query, key, value, topk=topk, attn_mask=mask)
        grads = torch.autograd.grad(output.square().sum(), (query, key, value))
    assert (output[:, :, 2] == 0).all() and (grads[0][:, :, 2] == 0).all()
    assert all(torch.isfinite(g).all() for g in grads)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("topk", [2, 6, 7])
def test_a_query_that_is_not_finite_spoils_its_own_row_only(backend: str, bad: float, topk: int) -> None:
    query, key, value = tensors()
    key = key + 2.0  # so that an infinite query has infinite logits, of one sign
    clean = knn_attention(query, key, value, topk=topk)
    query[0, 1, 3] = bad
    with only_backend(backend):
        output = knn_attention(query, key, value, topk=topk)
    assert output[0, 1, 3].isnan().all()
    output[0, 1, 3] = clean[0, 1, 3]
    torch.testing.assert_close(output, clean)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("topk", [2, 6, 7])
def test_a_nan_key_spoils_its_head_as_in_dense_attention(backend: str, topk: int) -> None:
    query, key, value = (t.requires_grad_() for t in tensors())
    broken = key.detach().clone()
    broken[0, 0, 4, 2] = math.nan
    broken.requires_grad_()
    with only_backend(backend):
        output = knn_attention(query, broken, value, topk=topk)
        grads = torch.autograd.grad(output.sum(), (query, broken, value))
    dense = F.scaled_dot_product_attention(query, broken, value)
    assert torch.equal(output.isnan(), dense.isnan())
    assert grads[0][0, 0].isnan().all() and torch.isfinite(grads[0][1]).all()
    # Hidden by a boolean mask the key does no harm.
    mask = torch.ones(7, dtype=torch.bool)
    mask[4] = False
    with only_backend(backend):
        assert torch.isfinite(knn_attention(query, broken, value, topk=topk, attn_mask=mask)).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_nan_value_reaches_the_rows_that_keep_its_key(backend: str) -> None:
    query, key, value = tensors()
    value[0, 0, 4] = math.nan
    with only_backend(backend):
        output = knn_attention(query, key, value, topk=7)
    assert output[0, 0].isnan().all() and torch.isfinite(output[1]).all() and torch.isfinite(output[0, 1]).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_logits_of_minus_infinity_are_hidden_keys(backend: str) -> None:
    query, key, value = tensors()
    query = query.abs() + 1.0
    key[:, :, 2] = -math.inf
    keep = torch.arange(7) != 2
    with only_backend(backend):
        output = knn_attention(query, key, value, topk=6)
        want = knn_attention(query, key[:, :, keep], value[:, :, keep], topk=6)
    torch.testing.assert_close(output, want)


def test_strides_beyond_two_to_the_31_elements() -> None:
    plain = [t.bfloat16() for t in tensors()]
    assert torch.equal(knn_attention(*far_apart(*plain), topk=3), knn_attention(*plain, topk=3))


def test_one_token() -> None:
    query, key, value = tensors(queries=1, keys=1)
    assert torch.equal(knn_attention(query, key, value, topk=1), value)


def test_zero_and_negative_scales() -> None:
    query, key, value = tensors()
    flat = knn_attention(query, key, value, topk=3, scale=0.0)  # all logits tie: the first three keys, evenly
    torch.testing.assert_close(flat, value[:, :, :3].mean(dim=2, keepdim=True).expand_as(flat))
    torch.testing.assert_close(
        knn_attention(query, key, value, topk=3, scale=-0.5), knn_attention(-query, key, value, topk=3, scale=0.5)
    )
