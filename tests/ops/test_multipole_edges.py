"""Multipole attention at its edges: wrong arguments, nothing to attend to, NaN and infinity."""

import dataclasses
import math

import pytest
import torch
import torch.nn.functional as F
from attention_cases import BACKENDS, Shape, far_apart, inputs
from multipole_cases import attend, even_sizes, random_call

from regard import multipole_attention
from regard.ops import only_backend

OPTIONS = {"num_clusters": 3, "near": 1}


def tensors(heads: int = 2, key_heads: int = 2, queries: int = 5, keys: int = 7, dim: int = 16):
    return inputs(Shape(2, heads, key_heads, queries, keys, dim, dim), exact=False)


def q(*size: int, **kwargs) -> torch.Tensor:
    return torch.zeros(size, **kwargs)


def refused(error, names, *args, **options) -> None:
    with pytest.raises(error) as raised:
        multipole_attention(*args, **{**OPTIONS, **options})
    for name in names:
        assert name in str(raised.value), str(raised.value)


@pytest.mark.parametrize(
    ("options", "error", "names"),
    [
        ({"num_clusters": 0}, ValueError, ["num_clusters", "at least 1", "0"]),
        ({"num_clusters": -2}, ValueError, ["num_clusters", "-2"]),
        ({"num_clusters": True}, TypeError, ["num_clusters", "bool"]),
        ({"num_clusters": 3.0}, TypeError, ["num_clusters", "float"]),
        ({"num_clusters": "3"}, TypeError, ["num_clusters", "str"]),
        ({"num_clusters": 8}, ValueError, ["num_clusters", "8", "7 keys", "(2, 2, 7, 16)", "at most one a key"]),
        ({"num_clusters": 6, "num_prefix_tokens": 2}, ValueError, ["num_clusters", "6", "5 keys", "2 prefix"]),
        ({"near": 4}, ValueError, ["near", "4", "num_clusters is 3", "at most all"]),
        ({"near": 8, "num_clusters": None}, ValueError, ["near", "8", "7", "at most all"]),  # one a key
        ({"near": -1}, ValueError, ["near", "-1", "0 clusters or more"]),
        ({"near": True}, TypeError, ["near", "bool"]),
        ({"near": None}, TypeError, ["near", "NoneType"]),
        ({"near": "all"}, TypeError, ["near", "str"]),
        ({"near": 1.5}, ValueError, ["near", "1.5", "[0, 1]"]),
        ({"near": -0.1}, ValueError, ["near", "-0.1"]),
        ({"near": math.nan}, ValueError, ["near", "nan"]),
        ({"near": math.inf}, ValueError, ["near", "inf"]),
        ({"far": "mean"}, ValueError, ["far", "'centroid'", "'gaussian'", "'mean'"]),
        ({"far": None}, ValueError, ["far", "None"]),
        ({"iterations": -1}, ValueError, ["iterations", "-1"]),
        ({"iterations": 1.0}, TypeError, ["iterations", "float"]),
        ({"iterations": True}, TypeError, ["iterations", "bool"]),
        ({"iterations": None}, TypeError, ["iterations", "NoneType"]),
        ({"num_prefix_tokens": -1}, ValueError, ["num_prefix_tokens", "-1"]),
        ({"num_prefix_tokens": 6}, ValueError, ["num_prefix_tokens", "6", "5 queries", "7 keys"]),
        ({"num_prefix_tokens": True}, TypeError, ["num_prefix_tokens", "bool"]),
        ({"num_prefix_tokens": 1.0}, TypeError, ["num_prefix_tokens", "float"]),
        ({"grid_size": (2, 3)}, ValueError, ["grid_size", "(2, 3)", "7 keys"]),
        ({"grid_size": (7,), "num_prefix_tokens": 1}, ValueError, ["grid_size", "(7,)", "6 keys"]),
        ({"grid_size": (-7, -1)}, ValueError, ["grid_size", "(-7, -1)"]),
        ({"grid_size": ()}, ValueError, ["grid_size", "()"]),
        ({"dropout_p": -0.1}, ValueError, ["dropout_p", "-0.1"]),
        ({"dropout_p": 1.0}, ValueError, ["dropout_p", "1.0"]),
        ({"scale": "0.5"}, TypeError, ["scale", "str"]),
    ],
    ids=str,
)
def test_options_out_of_range(options, error, names) -> None:
    refused(error, names, *tensors(), **options)


@pytest.mark.parametrize(
    ("query", "key", "value", "error", "names"),
    [
        (q(5, 16), q(7, 16), q(7, 16), ValueError, ["query", "(5, 16)"]),
        (q(2, 2, 5, 16), q(2, 2, 7, 8), q(2, 2, 7, 8), ValueError, ["key", "head_dim 8", "16"]),
        (q(2, 2, 5, 0), q(2, 2, 7, 0), q(2, 2, 7, 8), ValueError, ["query", "head_dim is 0"]),
        (q(2, 2, 5, 16), q(2, 1, 7, 16), q(2, 1, 7, 16), ValueError, ["key", "enable_gqa"]),
        (q(2, 2, 5, 16), q(2, 2, 7, 16), q(2, 2, 6, 16), ValueError, ["value", "(2, 2, 6, 16)"]),
        (q(2, 2, 5, 16), q(1, 2, 7, 16), q(1, 2, 7, 16), ValueError, ["key", "leading dimensions"]),
        (q(2, 2, 5, 16), q(2, 2, 7, 16).double(), q(2, 2, 7, 16), TypeError, ["key", "float64"]),
        (q(2, 2, 5, 16).int(), q(2, 2, 7, 16).int(), q(2, 2, 7, 16).int(), TypeError, ["query", "int32"]),
        (q(2, 2, 5, 16), q(2, 2, 7, 16), q(2, 2, 7, 16, device="meta"), ValueError, ["value", "meta"]),
        ([[1.0]], q(2, 2, 7, 16), q(2, 2, 7, 16), TypeError, ["query", "list"]),
    ],
)
def test_tensors_that_do_not_fit(query, key, value, error, names) -> None:
    refused(error, names, query, key, value)


def test_grouped_heads_must_divide() -> None:
    refused(ValueError, ["multiple", "3", "2"], *tensors(heads=3, key_heads=2), enable_gqa=True)


def hiding(*size: int, **kwargs) -> torch.Tensor:
    return torch.ones(size, dtype=torch.bool, **kwargs)


@pytest.mark.parametrize(
    ("mask", "error", "names"),
    [
        (hiding(6), ValueError, ["attn_mask", "(6,)", "(2, 4, 5, 7)"]),
        (hiding(3, 1, 1, 7), ValueError, ["attn_mask", "(3, 1, 1, 7)", "broadcast"]),
        (hiding(1, 1, 1, 1, 7), ValueError, ["attn_mask", "(1, 1, 1, 1, 7)"]),
        (hiding(5, 7), ValueError, ["attn_mask", "(5, 7)", "between queries", "1, M)"]),
        (hiding(5, 1), ValueError, ["attn_mask", "(5, 1)", "between queries"]),
        (hiding(2, 4, 5, 7), ValueError, ["attn_mask", "(2, 4, 5, 7)", "between queries"]),
        (hiding(1, 4, 1, 7), ValueError, ["attn_mask", "(1, 4, 1, 7)", "query heads", "1 in the heads' place"]),
        (torch.zeros(1, 7), TypeError, ["attn_mask", "float32", "boolean", "bias"]),
        (torch.zeros(1, 7, dtype=torch.int64), TypeError, ["attn_mask", "int64"]),
        ("causal", TypeError, ["attn_mask", "str"]),
        (hiding(1, 7, device="meta"), ValueError, ["attn_mask", "meta", "cpu"]),
    ],
)
def test_masks_that_no_cluster_can_obey(mask, error, names) -> None:
    refused(error, names, *tensors(heads=4), attn_mask=mask, enable_gqa=True)


@pytest.mark.parametrize("backend", BACKENDS)
def test_masks_of_every_accepted_shape(backend: str) -> None:
    plain = tensors()
    row = torch.tensor([True, False, True, True, True, False, True])
    alike = [row, row[None], row[None, None, None], row.expand(2, 1, 1, 7), row.expand(5, 7), row.expand(2, 2, 5, 7)]
    with only_backend(backend):
        want = multipole_attention(*plain, **OPTIONS, attn_mask=row)
        for mask in alike:
            assert torch.equal(multipole_attention(*plain, **OPTIONS, attn_mask=mask), want)
        everything = multipole_attention(*plain, num_clusters=3, near=3, attn_mask=torch.ones(1, 1, dtype=torch.bool))
        torch.testing.assert_close(everything, F.scaled_dot_product_attention(*plain))
        nothing = multipole_attention(*plain, **OPTIONS, attn_mask=torch.zeros(1, dtype=torch.bool))
    assert (nothing == 0).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_masks_of_each_image_and_head(backend: str) -> None:
    plain = tensors()
    mask = torch.rand(2, 2, 1, 7, generator=torch.Generator().manual_seed(0)) > 0.4
    with only_backend(backend):
        ours = multipole_attention(*plain, num_clusters=3, near=3, attn_mask=mask)
    torch.testing.assert_close(ours, F.scaled_dot_product_attention(*plain, attn_mask=mask))


def test_strides_beyond_two_to_the_31_elements() -> None:
    plain = [t.bfloat16() for t in tensors()]
    options = {"num_clusters": 3, "near": 1}
    assert torch.equal(multipole_attention(*far_apart(*plain), **options), multipole_attention(*plain, **options))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("near", [0, 0.5, 1.0])
@pytest.mark.parametrize(
    "size", [(0, 2, 5, 7), (2, 0, 5, 7), (2, 2, 0, 7), (2, 2, 5, 0), (2, 2, 0, 0), (0, 0, 0, 0), (0, 2, 5, 0)]
)
def test_nothing_to_attend(size: tuple[int, int, int, int], near: int | float, backend: str) -> None:
    batch, heads, queries, keys = size
    query, key, value = (t.requires_grad_() for t in inputs(Shape(batch, heads, heads, queries, keys, 16, 24)))
    with only_backend(backend):
        output = multipole_attention(query, key, value, num_clusters=None, near=near, far="gaussian")
        assert output.shape == (batch, heads, queries, 24) and (output == 0).all()
        grads = torch.autograd.grad(output.sum(), (query, key, value))
    assert [g.shape for g in grads] == [t.shape for t in (query, key, value)]
    assert all((g == 0).all() for g in grads)


@pytest.mark.parametrize("backend", BACKENDS)
def test_nothing_but_prefix_tokens(backend: str) -> None:
    query, key, value = tensors(queries=7)
    with only_backend(backend):
        for grid in (None, (0,), (3, 0)):
            ours = multipole_attention(
                query, key, value, num_clusters=None, near=0.5, num_prefix_tokens=7, grid_size=grid
            )
            torch.testing.assert_close(ours, F.scaled_dot_product_attention(query, key, value))
        only_first = multipole_attention(
            query, key[:, :, :2], value[:, :, :2], num_clusters=None, near=0, num_prefix_tokens=2
        )
    torch.testing.assert_close(only_first, F.scaled_dot_product_attention(query, key[:, :, :2], value[:, :, :2]))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("near", [0, 1])
def test_one_key(backend: str, near: int) -> None:
    query, key, value = tensors(keys=1)
    with only_backend(backend):
        output = multipole_attention(query, key, value, num_clusters=1, near=near, far="gaussian")
    torch.testing.assert_close(output, value.expand_as(output))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("near", [0, 2, 3])
def test_all_tokens_equal(backend: str, near: int) -> None:
    """k-means finds one cluster and leaves the others empty; every query gets the mean value."""
    query, key, value = tensors(queries=7)
    leaves = [
        t.requires_grad_() for t in (query[:, :, :1].expand_as(query), key[:, :, :1].expand_as(key).clone(), value)
    ]
    leaves[0] = leaves[0].detach().clone().requires_grad_()
    with only_backend(backend):
        output = multipole_attention(*leaves, num_clusters=3, near=near, far="gaussian")
        grads = torch.autograd.grad(output.square().sum(), leaves)
    torch.testing.assert_close(output, value.mean(dim=2, keepdim=True).expand_as(output))
    assert all(torch.isfinite(g).all() for g in grads)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("near", [0, 1, 3])
def test_rows_that_see_nothing_are_zero_and_have_no_gradient(backend: str, near: int) -> None:
    leaves = [t.requires_grad_() for t in tensors(queries=7)]
    mask = torch.ones(2, 1, 1, 7, dtype=torch.bool)
    mask[1] = False
    with only_backend(backend):
        output = multipole_attention(*leaves, num_clusters=3, near=near, num_prefix_tokens=1, attn_mask=mask)
        grads = torch.autograd.grad(output.square().sum(), leaves)
    assert (output[1] == 0).all() and (output[0] != 0).all()
    assert all((g[1] == 0).all() and torch.isfinite(g).all() for g in grads)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("row", [0, 3])  # a prefix query, another
@pytest.mark.parametrize("near", [0, 2, 4])
def test_a_query_that_is_not_finite_spoils_its_own_row_only(backend: str, bad: float, row: int, near: int) -> None:
    call = random_call(Shape(queries=20), even_sizes(30, 4), near, prefix=1)
    call = dataclasses.replace(call, key=call.key.abs() + 0.1)  # so that infinity has logits of one sign
    clean = attend(call, backend)
    query = call.query.clone()
    query[0, 1, row] = bad
    output = attend(dataclasses.replace(call, query=query), backend)
    if bad != -math.inf:
        assert output[0, 1, row].isnan().all()
    output[0, 1, row] = clean[0, 1, row]
    assert torch.equal(output, clean)
    # Nor does it spoil the others through their clusters.
    with only_backend(backend):
        public = multipole_attention(query, call.key, call.value, num_clusters=4, near=near, num_prefix_tokens=1)
    bad_rows = ~torch.isfinite(public).all(dim=-1)
    bad_rows[0, 1, row] = False
    assert not bad_rows.any()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("far", ["centroid", "gaussian"])
@pytest.mark.parametrize("near", [0, 1, 3])
@pytest.mark.parametrize("place", [0, 4])  # a prefix key, another
def test_a_nan_key_spoils_its_head_as_in_dense_attention(backend: str, far: str, near: int, place: int) -> None:
    query, key, value = (t.requires_grad_() for t in tensors())
    broken = key.detach().clone()
    broken[0, 0, place, 2] = math.nan
    broken.requires_grad_()
    options = {"num_clusters": 3, "near": near, "far": far, "num_prefix_tokens": 1}
    with only_backend(backend):
        output = multipole_attention(query, broken, value, **options)
        grads = torch.autograd.grad(output.sum(), (query, broken, value))
    dense = F.scaled_dot_product_attention(query, broken, value)
    assert torch.equal(output.isnan(), dense.isnan())
    assert grads[0][0, 0].isnan().all()
    assert all(torch.isfinite(g[1]).all() and torch.isfinite(g[0, 1]).all() for g in grads)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("near", [0, 1, 3])
@pytest.mark.parametrize("place", [0, 4])  # a prefix key, another
def test_a_hidden_key_does_no_harm_whatever_it_holds(backend: str, bad: float, near: int, place: int) -> None:
    """Nor does its value, nor do they in the backward: more than dense attention promises."""
    query, key, value = tensors()
    mask = torch.arange(7) != place
    options = {"num_clusters": 3, "near": near, "far": "gaussian", "num_prefix_tokens": 1, "attn_mask": mask}

    def run(held: float):
        leaves = [query.clone(), *(t.masked_fill(~mask.unsqueeze(-1), held) for t in (key, value))]
        leaves = [t.requires_grad_() for t in leaves]
        output = multipole_attention(*leaves, **options)
        return [output.detach(), *torch.autograd.grad(output.square().sum(), leaves)]

    with only_backend(backend):
        for got, want in zip(run(bad), run(0.0), strict=True):
            torch.testing.assert_close(got, want)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("near", [0, 1, 3])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_value_that_is_not_finite_reaches_all_rows_that_see_it(backend: str, near: int, bad: float) -> None:
    query, key, value = tensors()
    value[0, 0, 4, 5:] = bad
    with only_backend(backend):
        output = multipole_attention(query, key, value, num_clusters=3, near=near)
    assert not torch.isfinite(output[0, 0, :, 5:]).any()
    output[0, 0, :, 5:] = 0.0
    assert torch.isfinite(output).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_an_infinite_key_does_not_crash(backend: str) -> None:
    for bad in (math.inf, -math.inf):
        query, key, value = tensors()
        key[0, 0, 4] = bad
        for near in (0, 1, 3):
            with only_backend(backend):
                output = multipole_attention(query, key, value, num_clusters=3, near=near, far="gaussian")
            assert torch.isfinite(output[1]).all() and torch.isfinite(output[0, 1]).all()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("near", [0, 1, 4])
def test_logits_of_any_size_do_not_overflow(backend: str, near: int) -> None:
    """Where the softmax is a choice of one the result is that one's value."""
    call = random_call(Shape(queries=20), even_sizes(30, 4), near, far="centroid")
    for scale in (1e4, 1e30):
        output = attend(dataclasses.replace(call, scale=scale), backend)
        assert torch.isfinite(output).all() and output.abs().max() <= call.value.abs().max() * (1 + 1e-6)
    everything = attend(dataclasses.replace(call, scale=1e4, near=4), backend)
    want = F.scaled_dot_product_attention(call.query, call.key, call.value, scale=1e4)
    torch.testing.assert_close(everything, want, rtol=1e-4, atol=1e-2)
