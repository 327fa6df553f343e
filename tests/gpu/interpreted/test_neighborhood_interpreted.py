"""Neighborhood attention's Triton kernels under the interpreter, in the operators' place on the CPU."""

import dataclasses
import math
from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from attention_cases import LAYOUTS, Largest, Shape, slowly
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from neighborhood_cases import (
    attend,
    dense_weights,
    grads_of,
    judged,
    judged_gradients,
    output_gradient,
    pattern_of,
    problems,
    random_call,
)
from test_neighborhood_forward import PATTERNS

from regard.ops._triton import Config, only_config
from regard.ops.neighborhood import triton as kernels
from regard.ops.neighborhood.windows import BORDERS, Axis, Pattern, axis_windows

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")  # torch says that an implementation is overridden
SMALL = Shape(batch=1, heads=2, key_heads=1, dim=16, value_dim=24)
ONE = Shape(batch=1, heads=1, key_heads=1)
every_border = pytest.mark.parametrize("border", BORDERS)


@pytest.fixture(autouse=True, scope="module")
def in_the_operators_place() -> Iterator[None]:
    with torch.library._scoped_library("regard", "IMPL") as library:
        for suffix, launcher in (("", kernels.forward), ("_backward", kernels.backward)):
            library.impl(f"neighborhood_attention{suffix}", launcher, "CPU", allow_override=True)
        with only_config(Config.of(ROWS=16, OTHERS=32)):
            yield


def check(call) -> None:
    judged(call)
    judged_gradients(call)


@st.composite
def axes(draw) -> tuple[Axis, str]:
    width = draw(st.integers(1, 12))
    options = (width, draw(st.sampled_from([1, 1, 2, 3, 8])), draw(st.integers(1, width)), draw(st.booleans()))
    return Axis(draw(st.integers(1, 30)), *options), draw(st.sampled_from(BORDERS))


@settings(max_examples=10, deadline=None, derandomize=True)
@given(axes())
def test_tables_hold_the_windows(problem: tuple[Axis, str]) -> None:
    axis, border = problem
    parts = tuple((part,) for part in axis)
    tables = kernels.tables_of(Pattern(*parts, border), torch.device("cpu"))
    length, places = tables.lengths[2], tables.places[2]
    order, place = tables.data[18:].split([6 * length, 3 * places])  # the first 18: two axes of one token
    token, own, low, high, copies_from, copies_to = order.view(6, length).tolist()
    source, first, end = place.view(3, places).tolist()
    windows = axis_windows(axis, border)
    assert sorted(token) == list(range(length))
    for ascending in (own, low, high):
        assert ascending == sorted(ascending)
    for i, x in enumerate(token):
        rows = zip(*(table[x].tolist() for table in windows), strict=True)
        want = [(-1 if zero else key, offset) for key, offset, absent, zero in rows if not absent]
        assert want == [(source[p], p - own[i] + axis.kernel_size - 1) for p in range(low[i], high[i])]
        assert [p for p in range(places) if source[p] == x] == list(range(copies_from[i], copies_to[i]))
    for p in range(places):
        seers = [i for i in range(length) if low[i] <= p < high[i]]
        assert seers == list(range(first[p], end[p]))


@every_border
def test_every_option_at_once(border: str) -> None:
    pattern = pattern_of((4, 7), (3, 2), dilation=(1, 2), stride=(2, 1), causal=(False, True), border=border)
    check(random_call(pattern, SMALL, prefix=2, bias=True, hidden=True))


@pytest.mark.parametrize(
    "pattern",
    [
        pattern_of((40,), 7, stride=3),
        pattern_of((2, 4, 3), (2, 3, 2), causal=(True, False, False)),
        slowly(pattern_of((2, 3, 2), 3, border="replicate")),
        slowly(pattern_of((3, 4), 5)),  # dense
    ],
    ids=lambda pattern: f"{pattern.grid_size} {pattern.border}",
)
def test_ranks(pattern: Pattern) -> None:
    check(random_call(pattern, ONE, bias=True))


@pytest.mark.parametrize(
    ("dtype", "layout"),
    [
        (torch.bfloat16, "heads_last"),
        (torch.float16, "gapped"),
        slowly(torch.float32, "gapped"),
        slowly(torch.bfloat16, "channels_first"),
        slowly(torch.float16, "contiguous"),
    ],
    ids=str,
)
def test_types_and_strides(dtype: torch.dtype, layout: str) -> None:
    call = random_call(pattern_of((3, 7), 3), SMALL, prefix=1, bias=True, dtype=dtype)
    query, key, value = (LAYOUTS[layout](t) for t in (call.query, call.key, call.value))
    check(dataclasses.replace(call, query=query, key=key, value=value))


@pytest.mark.parametrize("dim", [slowly(1), 40, slowly(256)])
def test_head_dims(dim: int) -> None:
    check(random_call(pattern_of((3, 6), 3), Shape(1, 1, 1, dim=dim, value_dim=dim), prefix=1))


def test_prefix_tokens_of_several_tiles() -> None:
    check(random_call(pattern_of((2, 5), 3), ONE, prefix=20, hidden=True))


@pytest.mark.parametrize("shape", [(0, 2, 20), (2, 0, 20), (2, 2, 0)])
def test_nothing_to_attend(shape: tuple[int, int, int]) -> None:
    grid = (4, 5) if shape[2] else (0, 5)
    call = random_call(pattern_of(grid, 3), Shape(shape[0], shape[1], shape[1], value_dim=24), bias=True)
    assert attend(call).shape == (*shape, 24)
    grads = grads_of(attend, call, output_gradient(call))
    assert [g.shape for g in grads] == [t.shape for t in (call.query, call.key, call.value, call.attn_bias)]
    assert all((g == 0).all() for g in grads)


def test_nothing_but_prefix_tokens() -> None:
    call = random_call(pattern_of((0, 3), 3), ONE, prefix=20)
    want = F.scaled_dot_product_attention(call.query, call.key, call.value)
    torch.testing.assert_close(attend(call), want)
    check(call)


def test_rows_that_see_nothing_are_zero_and_have_no_gradient() -> None:
    visible = torch.ones(1, 7, 7, dtype=torch.bool)
    visible[:, :4, :4] = False
    call = random_call(pattern_of((7, 7), 3), ONE, bias=True)
    call = dataclasses.replace(call, visible=visible.flatten(1))
    assert (attend(call).unflatten(2, (7, 7))[:, :, :3, :3] == 0).all()
    grads = grads_of(attend, call, output_gradient(call))
    assert all(torch.isfinite(g).all() for g in grads)
    assert (grads[0].unflatten(2, (7, 7))[:, :, :3, :3] == 0).all()


@pytest.mark.parametrize(("what", "border"), [("key", "zeropad"), ("value", "shift"), slowly("value", "replicate")])
def test_what_is_not_finite_reaches_those_who_see_it_and_no_others(what: str, border: str) -> None:
    call = random_call(pattern_of((4, 11), 5, dilation=(1, 2), border=border), ONE, prefix=1)
    sees = dense_weights(call)[0, 0] > 0
    for token in (0, 25):
        broken = getattr(call, what).clone()
        broken[:, :, token] = math.nan
        output = attend(dataclasses.replace(call, **{what: broken}))[0, 0]
        assert torch.equal(output.isnan().all(dim=-1), sees[:, token])
        assert torch.equal(output.isnan().any(dim=-1), sees[:, token])


@pytest.mark.parametrize("value", [math.inf, -math.inf])
def test_an_infinite_value_is_infinite_for_those_who_see_it(value: float) -> None:
    call = random_call(pattern_of((4, 11), 5), ONE)
    sees = dense_weights(call)[0, 0] > 0
    broken = call.value.clone()
    broken[0, 0, 20, 3] = value
    output = attend(dataclasses.replace(call, value=broken))[0, 0]
    assert torch.equal(output[:, 3] == value, sees[:, 20])
    assert torch.isfinite(output[~sees[:, 20]]).all() and torch.isfinite(output[:, :3]).all()


@pytest.mark.parametrize(("row", "bad"), [(0, math.nan), (30, math.inf), (30, -math.inf)])
def test_a_query_that_is_not_finite_spoils_its_own_row_only(row: int, bad: float) -> None:
    call = random_call(pattern_of((4, 11), 5), ONE, prefix=1)
    call = dataclasses.replace(call, key=call.key.abs() + 0.1)
    clean, query = attend(call), call.query.clone()
    query[:, :, row] = bad
    output = attend(dataclasses.replace(call, query=query))
    if bad != -math.inf:
        assert output[0, 0, row].isnan().all()
    output[:, :, row] = clean[:, :, row]
    assert torch.equal(output, clean)


@pytest.mark.parametrize(
    ("what", "border"), [("query", "shift"), ("grad_output", "shift"), slowly("query", "replicate")]
)
def test_gradients_of_a_row_that_is_not_finite_reach_what_it_sees_and_no_more(what: str, border: str) -> None:
    call = random_call(pattern_of((4, 9), 3, stride=3, border=border), ONE, prefix=1)
    sees = dense_weights(call)[0, 0] > 0
    grad_output, query = output_gradient(call), call.query.clone()
    (query if what == "query" else grad_output)[:, :, 20, 3] = math.nan
    grads = grads_of(attend, dataclasses.replace(call, query=query), grad_output)
    for grad in grads[1:]:
        assert torch.equal(grad[0, 0].isnan().any(dim=-1), sees[20])
    assert grads[0][0, 0].isnan().any(dim=-1).nonzero().flatten().tolist() == [20]


@pytest.mark.parametrize("place", [slowly(0), 12])
def test_a_hidden_key_does_no_harm_whatever_it_holds(place: int) -> None:
    call = random_call(pattern_of((3, 6), 3, border="zeropad"), ONE, prefix=1, bias=True)
    call = dataclasses.replace(call, visible=(torch.arange(19) != place)[None])

    def run(held: float):
        key, value = call.key.clone(), call.value.clone()
        key[:, :, place], value[:, :, place] = held, held
        made = dataclasses.replace(call, key=key, value=value)
        return [attend(made), *grads_of(attend, made, output_gradient(call))]

    for got, want in zip(run(math.nan), run(0.0), strict=True):
        assert torch.equal(got, want)


@pytest.mark.parametrize("scale", [slowly(1e4), 1e30])
def test_logits_of_any_size_do_not_overflow(scale: float) -> None:
    """Where the softmax is a choice of one the result is that one's value."""
    call = random_call(pattern_of((5, 9), 5), ONE, prefix=1)
    output = attend(dataclasses.replace(call, scale=scale))
    assert torch.isfinite(output).all() and output.abs().max() <= call.value.abs().max() * (1 + 1e-6)


def test_runs_repeat_bit_for_bit() -> None:
    call = random_call(pattern_of((3, 7), 3), SMALL, bias=True)
    runs = [grads_of(attend, call, output_gradient(call)) for _ in range(2)]
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


def test_memory_beyond_inputs_and_outputs_is_linear() -> None:
    call = random_call(pattern_of((150,), 3), ONE, bias=True)
    with Largest() as largest:
        kernels.backward(output_gradient(call), *call.operands(), True)
    assert largest.elements <= 4 * call.query.numel()  # the interpreter copies tensors as bytes


@pytest.mark.parametrize(("rows", "others"), [(16, 16), slowly(64, 16), slowly(32, 64)])
def test_tiles_of_other_sizes(rows: int, others: int) -> None:
    with only_config(Config.of(ROWS=rows, OTHERS=others)):
        check(random_call(pattern_of((5, 7), 5), ONE, prefix=1))


@pytest.mark.parametrize(
    ("lengths", "kernel", "want"),
    [
        ((1, 64, 64), (1, 7, 7), (1, 8, 8)),
        ((1, 1, 4096), (1, 1, 13), (1, 1, 64)),
        ((1, 1, 50), (1, 7, 7), (1, 1, 64)),
        ((1, 50, 1), (1, 7, 7), (1, 64, 1)),
        ((16, 32, 32), (5, 5, 5), (4, 4, 4)),
    ],
)
def test_tiles_are_compact(lengths, kernel, want) -> None:
    assert kernels.tile_shape(lengths, kernel, 0, 64, 64) == want


@pytest.mark.slow
@pytest.mark.parametrize(
    ("pattern", "border"),
    [(pattern, BORDERS[place % len(BORDERS)]) for place, pattern in enumerate(PATTERNS.values())],
    ids=PATTERNS,
)
def test_every_pattern(pattern: Pattern, border: str) -> None:
    """Under one border each: the interpreter is slow."""
    check(random_call(dataclasses.replace(pattern, border=border), ONE, bias=True))


@pytest.mark.slow
@settings(max_examples=12, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(problems(largest=(20, 5, 3)))
def test_any_problem(call) -> None:
    check(call)
