"""Routed attention at its edges: wrong arguments, nothing to attend to, NaN and infinity."""

import dataclasses
import math

import pytest
import torch
import torch.nn.functional as F
from attention_cases import BACKENDS, Shape, far_apart, inputs
from routed_cases import attend, grads_of, output_gradient, random_call

from regard import routed_attention
from regard.ops import only_backend
from regard.ops.routed.op import routed_attention_gathered, routed_attention_op


def tensors(heads: int = 2, key_heads: int = 2, queries: int = 5, keys: int = 7, dim: int = 16):
    return inputs(Shape(2, heads, key_heads, queries, keys, dim, dim), exact=False)


def lists(*size: int, **kwargs) -> torch.Tensor:
    return torch.zeros(size, **{"dtype": torch.int64, **kwargs})


# Five queries in two blocks, seven keys in three.
OPTIONS = {"blocks": lists(2, 3), "query_block": 3, "key_block": 3}


def q(*size: int, **kwargs) -> torch.Tensor:
    return torch.zeros(size, **kwargs)


def refused(error, names, *args, **options) -> None:
    with pytest.raises(error) as raised:
        routed_attention(*args, **{**OPTIONS, **options})
    for name in names:
        assert name in str(raised.value), str(raised.value)


@pytest.mark.parametrize(
    ("options", "error", "names"),
    [
        ({"query_block": 0}, ValueError, ["query_block", "at least 1", "0"]),
        ({"key_block": -3}, ValueError, ["key_block", "-3"]),
        ({"query_block": 3.0}, TypeError, ["query_block", "float"]),
        ({"key_block": True}, TypeError, ["key_block", "bool"]),
        ({"blocks": [[0], [1]]}, TypeError, ["blocks", "list", "int64"]),
        ({"blocks": lists(2, 3, dtype=torch.float32)}, TypeError, ["blocks", "float32"]),
        ({"blocks": lists(2, 3, dtype=torch.bool)}, TypeError, ["blocks", "bool"]),
        ({"blocks": lists(2, 3, device="meta")}, ValueError, ["blocks", "meta", "cpu"]),
        ({"blocks": lists(3)}, ValueError, ["blocks", "(3,)", "2 query blocks", "5 queries", "query_block 3"]),
        ({"blocks": lists(1, 3)}, ValueError, ["blocks", "(1, 3)", "2 query blocks"]),
        ({"blocks": lists(3, 3)}, ValueError, ["blocks", "(3, 3)", "(..., H or 1, 2, T)"]),
        ({"blocks": lists(3, 2, 3)}, ValueError, ["blocks", "(3, 2, 3)", "(2, 2, 2, 'T')"]),
        ({"blocks": lists(3, 1, 2, 3)}, ValueError, ["blocks", "(3, 1, 2, 3)"]),
        ({"blocks": lists(1, 1, 1, 2, 3)}, ValueError, ["blocks", "(1, 1, 1, 2, 3)"]),
        ({"blocks": lists(2, 3) + 3}, ValueError, ["blocks", "holds 3", "7 keys", "3 blocks of 3", "0 to 2", "-1"]),
        ({"blocks": lists(2, 3) - 2}, ValueError, ["blocks", "holds -2", "-1 for none"]),
        ({"blocks": (lists(2, 3) - 2).int()}, ValueError, ["blocks", "holds -2"]),
        ({"extra_bias": q(3)}, ValueError, ["extra_bias", "extra_key and extra_value"]),
        ({"extra_key": q(2, 2, 3, 16)}, ValueError, ["extra_value", "missing"]),
        ({"extra_value": q(2, 2, 3, 16)}, ValueError, ["extra_key", "missing"]),
        ({"dropout_p": -0.1}, ValueError, ["dropout_p", "-0.1"]),
        ({"dropout_p": 1.0}, ValueError, ["dropout_p", "1.0"]),
        ({"scale": "0.5"}, TypeError, ["scale", "str"]),
    ],
    ids=str,
)
def test_options_out_of_range(options, error, names) -> None:
    refused(error, names, *tensors(), **options)


@pytest.mark.parametrize(
    ("extra_key", "extra_value", "extra_bias", "error", "names"),
    [
        ([[1.0]], q(2, 2, 3, 16), None, TypeError, ["extra_key", "list"]),
        (q(2, 2, 3, 16).double(), q(2, 2, 3, 16), None, TypeError, ["extra_key", "float64", "float32"]),
        (q(2, 2, 3, 16), q(2, 2, 3, 16, device="meta"), None, ValueError, ["extra_value", "meta"]),
        (q(2, 2, 3, 8), q(2, 2, 3, 16), None, ValueError, ["extra_key", "(2, 2, 3, 8)", "(2, 2, 'S', 16)"]),
        (q(2, 2, 3, 16), q(1, 2, 3, 16), None, ValueError, ["extra_value", "(1, 2, 3, 16)"]),
        (q(2, 1, 3, 16), q(2, 1, 3, 16), None, ValueError, ["extra_key", "(2, 1, 3, 16)"]),
        (q(2, 3, 16), q(2, 3, 16), None, ValueError, ["extra_key", "(2, 3, 16)"]),
        (q(2, 2, 3, 16), q(2, 2, 4, 16), None, ValueError, ["extra_value", "4 tokens", "extra_key has 3"]),
        (q(2, 2, 3, 16), q(2, 2, 3, 16), "ones", TypeError, ["extra_bias", "str"]),
        (q(2, 2, 3, 16), q(2, 2, 3, 16), q(3).bool(), TypeError, ["extra_bias", "bool", "-inf hides"]),
        (q(2, 2, 3, 16), q(2, 2, 3, 16), q(4), ValueError, ["extra_bias", "(4,)", "(2, 2, 5, 3)"]),
        (q(2, 2, 3, 16), q(2, 2, 3, 16), q(3, 1, 1, 3), ValueError, ["extra_bias", "(3, 1, 1, 3)"]),
        (q(2, 2, 3, 16), q(2, 2, 3, 16), q(1, 1, 1, 1, 3), ValueError, ["extra_bias", "(1, 1, 1, 1, 3)"]),
        (q(2, 2, 3, 16), q(2, 2, 3, 16), q(3, device="meta"), ValueError, ["extra_bias", "meta"]),
    ],
)
def test_extra_keys_that_do_not_fit(extra_key, extra_value, extra_bias, error, names) -> None:
    refused(error, names, *tensors(), extra_key=extra_key, extra_value=extra_value, extra_bias=extra_bias)


@pytest.mark.parametrize(
    ("query", "key", "value", "error", "names"),
    [
        (q(5, 16), q(7, 16), q(7, 16), ValueError, ["query", "(5, 16)"]),
        (q(2, 2, 5, 16), q(2, 2, 7, 8), q(2, 2, 7, 8), ValueError, ["key", "head_dim 8", "16"]),
        (q(2, 2, 5, 16), q(2, 1, 7, 16), q(2, 1, 7, 16), ValueError, ["key", "enable_gqa"]),
        (q(2, 2, 5, 16), q(2, 2, 7, 16), q(2, 2, 6, 16), ValueError, ["value", "(2, 2, 6, 16)"]),
        (q(2, 2, 5, 16), q(1, 2, 7, 16), q(1, 2, 7, 16), ValueError, ["key", "leading dimensions"]),
        (q(2, 2, 5, 16), q(2, 2, 7, 16).double(), q(2, 2, 7, 16), TypeError, ["key", "float64"]),
    ],
)
def test_tensors_that_do_not_fit(query, key, value, error, names) -> None:
    refused(error, names, query, key, value)


def hiding(*size: int, **kwargs) -> torch.Tensor:
    return torch.ones(size, dtype=torch.bool, **kwargs)


@pytest.mark.parametrize(
    ("mask", "error", "names"),
    [
        (hiding(6), ValueError, ["attn_mask", "(6,)", "(2, 4, 5, 7)"]),
        (hiding(5, 7), ValueError, ["attn_mask", "(5, 7)", "between queries", "1, M)"]),
        (hiding(1, 4, 1, 7), ValueError, ["attn_mask", "(1, 4, 1, 7)", "query heads", "1 in the heads' place"]),
        (torch.zeros(1, 7), TypeError, ["attn_mask", "float32", "boolean", "bias"]),
        ("causal", TypeError, ["attn_mask", "str"]),
        (hiding(1, 7, device="meta"), ValueError, ["attn_mask", "meta", "cpu"]),
    ],
)
def test_masks_that_differ_between_queries(mask, error, names) -> None:
    refused(error, names, *tensors(heads=4), attn_mask=mask, enable_gqa=True)


@pytest.mark.parametrize("operator", [routed_attention_op, routed_attention_gathered])
@pytest.mark.parametrize("wrong", [-2, 7, 1 << 40])
def test_the_operators_read_no_block_that_is_not_there(operator, wrong: int) -> None:
    """The public function has checked, but not while it was traced."""
    call = random_call(Shape(queries=20))
    call.blocks[1, 0, 1, 1] = wrong
    with pytest.raises((RuntimeError, IndexError, ValueError)):
        operator(*call.operands())


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("extra", [0, 3])
@pytest.mark.parametrize(
    "size", [(0, 2, 5, 7), (2, 0, 5, 7), (2, 2, 0, 7), (2, 2, 5, 0), (2, 2, 0, 0), (0, 0, 0, 0), (0, 2, 5, 0)]
)
def test_nothing_to_attend(size: tuple[int, ...], extra: int, backend: str) -> None:
    batch, heads, queries, keys = size
    leaves = [t.requires_grad_() for t in inputs(Shape(batch, heads, heads, queries, keys, 16, 24))]
    options = {}
    if extra:
        leaves += [torch.ones(batch, heads, extra, dim, requires_grad=True) for dim in (16, 24)]
        options = {"extra_key": leaves[3], "extra_value": leaves[4]}
    blocks = torch.full((-(-queries // 2), 3), -1)
    with only_backend(backend):
        output = routed_attention(*leaves[:3], blocks=blocks, query_block=2, key_block=2, **options)
        assert output.shape == (batch, heads, queries, 24) and (output == (1 if extra else 0)).all()
        grads = torch.autograd.grad(output.sum(), leaves)
    assert [g.shape for g in grads] == [t.shape for t in leaves]
    assert all((g == 0).all() for g in grads[:4])


def test_strides_beyond_two_to_the_31_elements() -> None:
    plain = [t.bfloat16() for t in tensors()]
    extras = [t.bfloat16() for t in tensors(keys=2)[1:]]
    options = {"blocks": torch.tensor([[0, 2], [1, -1]]), "query_block": 3, "key_block": 3}

    def attend_with(query, key, value, extra_key, extra_value):
        return routed_attention(query, key, value, extra_key=extra_key, extra_value=extra_value, **options)

    assert torch.equal(attend_with(*far_apart(*plain, *extras)), attend_with(*plain, *extras))


@pytest.mark.parametrize("backend", BACKENDS)
def test_one_token(backend: str) -> None:
    query, key, value = tensors(queries=1, keys=1)
    with only_backend(backend):
        output = routed_attention(query, key, value, blocks=lists(1, 1), query_block=1, key_block=1)
        larger = routed_attention(query, key, value, blocks=lists(1, 1), query_block=1 << 40, key_block=1 << 40)
    torch.testing.assert_close(output, value)
    assert torch.equal(larger, output)


@pytest.mark.parametrize("backend", BACKENDS)
def test_rows_that_see_nothing_are_zero_and_have_no_gradient(backend: str) -> None:
    call = random_call(Shape(queries=20), hidden=True)
    lists, visible = call.blocks.clone(), call.visible.clone()
    lists[0, 1, 2] = -1
    visible[1, 0] = False
    call = dataclasses.replace(call, blocks=lists, visible=visible)
    output = attend(call, backend)
    assert (output[0, 1, 16:] == 0).all() and (output[1, 0] == 0).all() and (output[0, 0, :8] != 0).any()
    grads = grads_of(lambda c: attend(c, backend), call, output_gradient(call))
    assert all(torch.isfinite(g).all() for g in grads)
    assert (grads[0][0, 1, 16:] == 0).all() and all((g[1, 0] == 0).all() for g in grads[:3])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_query_that_is_not_finite_spoils_its_own_row_only(backend: str, bad: float) -> None:
    call = random_call(Shape(queries=20), extra=2)
    call = dataclasses.replace(call, key=call.key.abs() + 0.1, extra_key=call.extra_key.abs() + 0.1)
    clean = attend(call, backend)
    query = call.query.clone()
    query[0, 1, 3] = bad
    output = attend(dataclasses.replace(call, query=query), backend)
    assert output[0, 1, 3].isnan().all()
    output[0, 1, 3] = clean[0, 1, 3]
    torch.testing.assert_close(output, clean)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("name", ["key", "value"])
@pytest.mark.parametrize("query_block", [3, 1])
def test_a_key_that_is_not_finite_reaches_the_blocks_that_list_it(
    backend: str, bad: float, name: str, query_block: int
) -> None:
    """And no others, where dense attention with a mask would spoil all rows."""
    query, key, value = tensors(queries=9, keys=12)
    query = query.abs() + 0.1  # so that infinity has logits of one sign
    broken = {"key": key, "value": value}
    broken[name][0, 0, 4] = bad
    blocks = torch.tensor([[0, 1], [2, 3], [3, 1]])  # the first and the last list block 1, of keys 3 to 5
    blocks = blocks.repeat_interleave(3 // query_block, dim=0)
    with only_backend(backend):
        output = routed_attention(query, **broken, blocks=blocks, query_block=query_block, key_block=3)
    reached = torch.zeros(2, 2, 9, dtype=torch.bool)
    reached[0, 0, :3] = reached[0, 0, 6:] = True
    assert not torch.isfinite(output[reached]).any()
    assert torch.isfinite(output[~reached]).all()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("query_block", [3, 1])
def test_the_gradient_of_a_nan_reaches_what_its_rows_see(backend: str, query_block: int) -> None:
    query, key, value = (t.requires_grad_() for t in tensors(queries=9, keys=12))
    blocks = torch.tensor([[0, 1], [2, 3], [3, 1]]).repeat_interleave(3 // query_block, dim=0)
    broken = query.detach().clone()
    broken[0, 0, 4, 2] = math.nan
    broken.requires_grad_()
    with only_backend(backend):
        output = routed_attention(broken, key, value, blocks=blocks, query_block=query_block, key_block=3)
        grads = torch.autograd.grad(output.sum(), (broken, key, value))
    assert grads[0][0, 0, 4].isnan().all() and torch.isfinite(grads[0][0, 0, :4]).all()
    for grad in grads[1:]:
        assert grad[0, 0, 6:].isnan().all() and torch.isfinite(grad[0, 0, :6]).all()
        assert torch.isfinite(grad[1]).all() and torch.isfinite(grad[0, 1]).all()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_hidden_and_unlisted_keys_do_no_harm_whatever_they_hold(backend: str, bad: float) -> None:
    """Nor do their values, nor do they in the backward: more than dense attention promises."""
    call = random_call(Shape(queries=20), hidden=True)
    listed = torch.stack([(call.blocks == block).flatten(2).any(dim=-1) for block in range(7)], dim=-1)
    unseen = ~(call.visible & listed.repeat_interleave(8, dim=-1)[..., :50])
    spoilt = {name: getattr(call, name).masked_fill(unseen.unsqueeze(-1), bad) for name in ("key", "value")}
    other = dataclasses.replace(call, **spoilt)
    torch.testing.assert_close(attend(other, backend), attend(call, backend))
    pairs = (grads_of(lambda c: attend(c, backend), c, output_gradient(call)) for c in (call, other))
    for a, b in zip(*pairs, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("backend", BACKENDS)
def test_logits_of_any_size_do_not_overflow(backend: str) -> None:
    """Where the softmax is a choice of one the result is that one's value."""
    call = random_call(Shape(queries=20), extra=2)
    for scale in (1e4, 1e30):
        output = attend(dataclasses.replace(call, scale=scale), backend)
        largest = max(call.value.abs().max(), call.extra_value.abs().max())
        assert torch.isfinite(output).all() and output.abs().max() <= largest * (1 + 1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_running_softmax_meets_larger_logits_late(backend: str) -> None:
    """Keys in rising and falling order of their logits, over many chunks."""
    query = torch.ones(1, 1, 20, 8)
    rise = torch.linspace(-60, 60, 1000).view(1, 1, -1, 1).expand(-1, -1, -1, 8) / 8**0.5
    value = torch.randn(1, 1, 1000, 8, generator=torch.Generator().manual_seed(0))
    for key, held in ((rise, value), (rise.flip(2), value.flip(2))):
        with only_backend(backend):
            ours = routed_attention(
                query, key, held, blocks=torch.arange(10).expand(1, 10), query_block=20, key_block=100
            )
        torch.testing.assert_close(ours, F.scaled_dot_product_attention(query, rise, value))
