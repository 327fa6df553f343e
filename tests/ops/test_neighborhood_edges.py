"""Neighborhood attention at its edges: refused arguments, masks and biases of every shape, empty tensors, NaN."""

import dataclasses
import math

import pytest
import torch
import torch.nn.functional as F
from attention_cases import BACKENDS, Shape
from neighborhood_cases import attend, dense_weights, grads_of, output_gradient, pattern_of, random_call, requiring_grad

from regard import neighborhood_attention
from regard.ops import only_backend
from regard.ops.neighborhood.windows import BORDERS

OPTIONS = {"grid_size": (4, 5), "kernel_size": 3}


def tensors(tokens: int = 20, heads: int = 2, key_heads: int = 2) -> list[torch.Tensor]:
    call = random_call(pattern_of((tokens,), 3), Shape(heads=heads, key_heads=key_heads))
    return [call.query, call.key, call.value]


def refused(error, names, *args, **options) -> None:
    with pytest.raises(error) as told:
        neighborhood_attention(*args, **{**OPTIONS, **options})
    for name in names:
        assert name in str(told.value), told.value


@pytest.mark.parametrize(
    ("options", "error", "names"),
    [
        ({"kernel_size": 0}, ValueError, ["kernel_size", "at least 1", "0"]),
        ({"kernel_size": 3.0}, TypeError, ["kernel_size", "float"]),
        ({"kernel_size": True}, TypeError, ["kernel_size", "bool"]),
        ({"kernel_size": "3"}, TypeError, ["kernel_size", "str"]),
        ({"kernel_size": (3, 3, 3)}, ValueError, ["kernel_size", "(3, 3, 3)", "3 axes", "the grid 2"]),
        ({"kernel_size": (3, 3), "dilation": (1,)}, ValueError, ["kernel_size 2", "dilation 1"]),
        ({"kernel_size": ()}, ValueError, ["kernel_size 0", "1 to 3 axes"]),
        ({"kernel_size": (3, 3, 3, 3)}, ValueError, ["kernel_size 4"]),
        ({"dilation": 0}, ValueError, ["dilation", "at least 1"]),
        ({"dilation": (1, -1)}, ValueError, ["dilation", "-1"]),
        ({"stride": 0}, ValueError, ["stride", "at least 1"]),
        ({"stride": 4}, ValueError, ["stride", "4", "window of 3", "at most kernel_size"]),
        ({"stride": (3, 2), "kernel_size": (3, 1)}, ValueError, ["stride", "window of 1"]),
        ({"is_causal": 1}, TypeError, ["is_causal", "bool", "1"]),
        ({"is_causal": (True, None)}, TypeError, ["is_causal", "None"]),
        ({"is_causal": (True,)}, ValueError, ["is_causal", "1 axes", "the grid 2"]),
        ({"border": "wrap"}, ValueError, ["border", "'shift'", "'replicate'", "'wrap'"]),
        ({"border": None}, ValueError, ["border", "None"]),
        ({"grid_size": (4, 4)}, ValueError, ["grid_size", "(4, 4)", "20 cells", "20 tokens"]),
        ({"grid_size": (4, 5), "num_prefix_tokens": 1}, ValueError, ["grid_size", "19 cells", "1 are prefix"]),
        ({"grid_size": (-4, -5)}, ValueError, ["grid_size", "(-4, -5)"]),
        ({"grid_size": (1, 1, 4, 5)}, ValueError, ["grid_size", "rank 1, 2 or 3"]),
        ({"grid_size": ()}, ValueError, ["grid_size", "rank 1, 2 or 3"]),
        ({"grid_size": 20}, TypeError, ["grid_size", "(height, width)", "20"]),
        ({"grid_size": (4.0, 5)}, TypeError, ["grid_size", "4.0"]),
        ({"num_prefix_tokens": -1}, ValueError, ["num_prefix_tokens", "-1"]),
        ({"num_prefix_tokens": 21}, ValueError, ["num_prefix_tokens", "21 of 20"]),
        ({"num_prefix_tokens": True}, TypeError, ["num_prefix_tokens", "bool"]),
        ({"dropout_p": 1.0}, ValueError, ["dropout_p", "1.0"]),
        ({"scale": "0.5"}, TypeError, ["scale", "str"]),
        ({"attn_bias": torch.zeros(2, 9)}, ValueError, ["attn_bias", "(2, 9)", "(2, 5, 5)", "(2, 25)"]),
        ({"attn_bias": torch.zeros(1, 5, 5)}, ValueError, ["attn_bias", "(1, 5, 5)", "2 heads"]),
        ({"attn_bias": torch.zeros(2, 25, dtype=torch.int64)}, TypeError, ["attn_bias", "int64"]),
        ({"attn_bias": 0.0}, TypeError, ["attn_bias", "float"]),
        ({"attn_bias": torch.zeros(2, 25, device="meta")}, ValueError, ["attn_bias", "meta"]),
        ({"attn_mask": torch.zeros(20, 20)}, TypeError, ["attn_mask", "float32", "boolean"]),
        ({"attn_mask": torch.ones(20, 20, dtype=torch.bool).tril()}, ValueError, ["attn_mask", "between queries"]),
        ({"attn_mask": torch.ones(2, 2, 1, 20, dtype=torch.bool)}, ValueError, ["attn_mask", "between heads"]),
        ({"attn_mask": torch.ones(19, dtype=torch.bool)}, ValueError, ["attn_mask", "(19,)"]),
    ],
    ids=str,
)
def test_options_out_of_range(options, error, names) -> None:
    refused(error, names, *tensors(), **options)


@pytest.mark.parametrize(
    ("change", "error", "names"),
    [
        (lambda q, k, v: (q, k[:, :, :19], v[:, :, :19]), ValueError, ["key", "19 tokens", "20"]),
        (lambda q, k, v: (q, k, v[:, :, :19]), ValueError, ["value"]),
        (lambda q, k, v: (q, k[..., :8], v), ValueError, ["key", "head_dim 8"]),
        (lambda q, k, v: (q, k[:, :1], v[:, :1]), ValueError, ["key", "enable_gqa"]),
        (lambda q, k, v: (q, k.double(), v), TypeError, ["key", "float64"]),
        (lambda q, k, v: (q[0, 0], k, v), ValueError, ["query", "(20, 16)"]),
        (lambda q, k, v: (q.int(), k.int(), v.int()), TypeError, ["query", "int32"]),
        (lambda q, k, v: (q, k, [1.0]), TypeError, ["value", "list"]),
    ],
)
def test_tensors_that_do_not_fit(change, error, names) -> None:
    refused(error, names, *change(*tensors()))


@pytest.mark.parametrize("backend", BACKENDS)
def test_masks_of_every_accepted_shape(backend: str) -> None:
    plain = tensors()
    row = torch.rand(20, generator=torch.Generator().manual_seed(0)) > 0.4
    with only_backend(backend):
        want = neighborhood_attention(*plain, **OPTIONS, attn_mask=row)
        for mask in (
            row[None],
            row[None, None, None],
            row.expand(2, 1, 1, 20),
            row.expand(20, 20),
            row.expand(2, 2, 20, 20),
        ):
            assert torch.equal(neighborhood_attention(*plain, **OPTIONS, attn_mask=mask), want)
        nothing = neighborhood_attention(*plain, **OPTIONS, attn_mask=torch.zeros(1, dtype=torch.bool))
    assert (nothing == 0).all()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("border", BORDERS)
@pytest.mark.parametrize(
    ("size", "grid"),
    [
        ((0, 2, 20), (4, 5)),
        ((2, 0, 20), (4, 5)),
        ((2, 2, 0), (0, 5)),
        ((2, 2, 0), (4, 0)),
        ((0, 0, 0), (0,)),
        ((1, 1, 0), (3, 0, 2)),
    ],
)
def test_nothing_to_attend(size, grid, border: str, backend: str) -> None:
    leaves = [torch.randn(*size, dim, requires_grad=True) for dim in (16, 16, 24)]
    with only_backend(backend):
        output = neighborhood_attention(*leaves, grid_size=grid, kernel_size=3, border=border)
        grads = torch.autograd.grad(output.sum(), leaves)
    assert output.shape == (*size, 24)
    assert [g.shape for g in grads] == [t.shape for t in leaves]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("grid", [(0,), (0, 3), (3, 0), (2, 0, 2)])
def test_nothing_but_prefix_tokens(grid, backend: str) -> None:
    plain = [t.requires_grad_() for t in tensors()]
    with only_backend(backend):
        ours = neighborhood_attention(*plain, grid_size=grid, kernel_size=3, num_prefix_tokens=20)
    want = F.scaled_dot_product_attention(*plain)
    torch.testing.assert_close(ours, want)
    for a, b in zip(torch.autograd.grad(ours.sum(), plain), torch.autograd.grad(want.sum(), plain), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("border", ["shift", "mask", "replicate"])
def test_one_token_hands_over_its_value(border: str, backend: str) -> None:
    query, key, value = tensors(1)
    with only_backend(backend):
        output = neighborhood_attention(query, key, value, grid_size=(1, 1, 1), kernel_size=3, border=border)
    torch.testing.assert_close(output, value)


@pytest.mark.parametrize("backend", BACKENDS)
def test_rows_that_see_nothing_are_zero_and_have_no_gradient(backend: str) -> None:
    call = random_call(pattern_of((9, 9), 3), Shape(batch=1), bias=True)
    visible = torch.ones(1, 81, dtype=torch.bool)
    visible.view(9, 9)[:5, :5] = False
    call, leaves = requiring_grad(dataclasses.replace(call, visible=visible))
    output = attend(call, backend)
    blind = output.unflatten(2, (9, 9))[:, :, :4, :4]
    assert (blind == 0).all() and (output.unflatten(2, (9, 9))[:, :, 5:] != 0).all()
    grads = torch.autograd.grad(output.square().sum(), leaves)
    assert all(torch.isfinite(g).all() for g in grads)
    assert (grads[0].unflatten(2, (9, 9))[:, :, :4, :4] == 0).all()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("row", [0, 40])  # a prefix query, another
def test_a_query_that_is_not_finite_spoils_its_own_row_only(row: int, bad: float, backend: str) -> None:
    call = random_call(pattern_of((6, 19), 5), prefix=1)
    call = dataclasses.replace(call, key=call.key.abs() + 0.1)  # so that infinity has logits of one sign
    clean = attend(call, backend)
    query = call.query.clone()
    query[0, 1, row] = bad
    output = attend(dataclasses.replace(call, query=query), backend)
    if bad != -math.inf:
        assert output[0, 1, row].isnan().all()
    output[0, 1, row] = clean[0, 1, row]
    assert torch.equal(output, clean)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("border", BORDERS)
@pytest.mark.parametrize("what", ["key", "value"])
@pytest.mark.parametrize("options", [{}, {"dilation": 2}, {"stride": 3}], ids=str)
def test_what_is_not_finite_reaches_those_who_see_it_and_no_others(
    options, what: str, border: str, backend: str
) -> None:
    pattern = pattern_of((6, 19), 5, border=border, **options)
    call = random_call(pattern, Shape(batch=1, heads=1, key_heads=1), prefix=1)
    sees = dense_weights(call)[0, 0] > 0
    for token in (0, 1, 40, 100):
        broken = getattr(call, what).clone()
        broken[:, :, token] = math.nan
        output = attend(dataclasses.replace(call, **{what: broken}), backend)
        assert torch.equal(output[0, 0].isnan().all(dim=-1), sees[:, token])
        assert torch.equal(output[0, 0].isnan().any(dim=-1), sees[:, token])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("border", BORDERS)
@pytest.mark.parametrize("what", ["query", "grad_output"])
def test_gradients_of_a_row_that_is_not_finite_reach_what_it_sees_and_no_more(
    what: str, border: str, backend: str
) -> None:
    pattern = pattern_of((6, 19), 5, stride=3, border=border)
    call = random_call(pattern, Shape(batch=1, heads=1, key_heads=1), prefix=1, bias=True)
    sees = dense_weights(call)[0, 0] > 0
    for token in (1, 40, 100):
        grad_output, query = output_gradient(call), call.query.clone()
        (query if what == "query" else grad_output)[:, :, token, 3] = math.nan
        grads = grads_of(lambda c: attend(c, backend), dataclasses.replace(call, query=query), grad_output)
        for grad in grads[1:3]:
            assert torch.equal(grad[0, 0].isnan().any(dim=-1), sees[token])
        assert grads[0][0, 0].isnan().any(dim=-1).nonzero().flatten().tolist() == [token]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("border", BORDERS)
@pytest.mark.parametrize("place", [0, 1, 50])  # a prefix key, a corner, another
def test_a_hidden_key_does_no_harm_whatever_it_holds(place: int, border: str, bad: float, backend: str) -> None:
    """Nor does its value, nor do they in the backward: more than dense attention promises."""
    call = random_call(pattern_of((6, 19), 5, border=border), prefix=1, bias=True)
    visible = (torch.arange(115) != place).expand(2, -1)
    call = dataclasses.replace(call, visible=visible)

    def run(held: float):
        hidden = ~visible[:, None, :, None]
        key, value = (t.masked_fill(hidden, held) for t in (call.key, call.value))
        made = dataclasses.replace(call, key=key, value=value)
        return [attend(made, backend), *grads_of(lambda c: attend(c, backend), made, output_gradient(call))]

    for got, want in zip(run(bad), run(0.0), strict=True):
        assert torch.equal(got, want)


@pytest.mark.parametrize("backend", BACKENDS)
def test_logits_of_any_size_do_not_overflow(backend: str) -> None:
    """Where the softmax is a choice of one the result is that one's value."""
    for kernel in (5, 40):  # a window at once, and in several pieces
        call = random_call(pattern_of((400,) if kernel == 40 else (6, 19), kernel), prefix=1)
        for scale in (1e4, 1e30):
            output = attend(dataclasses.replace(call, scale=scale), backend)
            assert torch.isfinite(output).all() and output.abs().max() <= call.value.abs().max() * (1 + 1e-6)
    dense = random_call(pattern_of((6, 19), 40), prefix=1)
    output = attend(dataclasses.replace(dense, scale=1e4), backend)
    want = F.scaled_dot_product_attention(dense.query, dense.key, dense.value, scale=1e4)
    torch.testing.assert_close(output, want, rtol=1e-4, atol=1e-2)
