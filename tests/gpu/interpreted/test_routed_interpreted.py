"""Routed attention's Triton kernels under the interpreter, in the operators' place on the CPU: output and gradients.

The tests that are imported here run a second time, on these kernels.
"""

import dataclasses
from collections.abc import Iterator

import pytest
import torch
from attention_cases import HALVES, LAYOUTS, Shape
from routed_cases import (
    attend,
    differentiable,
    grads_of,
    judged,
    judged_gradients,
    output_gradient,
    random_call,
    with_tensors,
)
from test_routed_backward import (  # noqa: F401
    test_grouped_heads_sum_their_gradients,
    test_hidden_and_unlisted_keys_get_no_gradient,
)
from test_routed_edges import (  # noqa: F401
    test_a_key_that_is_not_finite_reaches_the_blocks_that_list_it,
    test_a_query_that_is_not_finite_spoils_its_own_row_only,
    test_hidden_and_unlisted_keys_do_no_harm_whatever_they_hold,
    test_logits_of_any_size_do_not_overflow,
    test_nothing_to_attend,
    test_one_token,
    test_rows_that_see_nothing_are_zero_and_have_no_gradient,
    test_the_gradient_of_a_nan_reaches_what_its_rows_see,
    test_the_operators_read_no_block_that_is_not_there,
)
from test_routed_forward import test_expanded_inputs_share_memory, test_output_joins_heads_without_a_copy  # noqa: F401

from regard.ops._triton import Config, only_config
from regard.ops.routed import triton as kernels

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")  # torch says that an implementation is overridden


@pytest.fixture(autouse=True, scope="module")
def in_the_operators_place() -> Iterator[None]:
    with torch.library._scoped_library("regard", "IMPL") as library:
        for name, launcher in (("routed_attention", kernels.forward), ("routed_attention_backward", kernels.backward)):
            library.impl(name, launcher, "CPU", allow_override=True)
        with only_config(Config.of(ROWS=16, COLUMNS=16)):
            yield


def check(call) -> None:
    judged(call)
    judged_gradients(call)


SHAPES = [
    (Shape(batch=1, queries=53, keys=71, dim=24, value_dim=40), 49, 49, 2),
    (Shape(batch=2, queries=23, keys=30), 20, 7, 3),
    (Shape(batch=1, heads=4, queries=11, keys=23), 4, 4, 6),
    (Shape(batch=1, heads=1, queries=7, keys=19, dim=24, value_dim=1), 1, 1, 33),
    (Shape(batch=1, heads=1, queries=7, keys=40, dim=3, value_dim=20), 100, 100, 1),
    (Shape(batch=1, heads=1, queries=5, keys=20, dim=256, value_dim=256), 5, 17, 2),
]


@pytest.mark.parametrize(("extra", "bias"), [(0, None), (3, "head"), (17, "query"), (2, None)])
@pytest.mark.parametrize(("shape", "query_block", "key_block", "length"), SHAPES, ids=str)
def test_equals_the_specification(shape, query_block: int, key_block: int, length: int, extra: int, bias) -> None:
    """Lists have blocks twice, and places with none."""
    shape = dataclasses.replace(shape, key_heads=1 if shape.heads % 2 else shape.heads // 2)
    check(random_call(shape, query_block, key_block, length, extra=extra, bias=bias))


@pytest.mark.parametrize("extra", [0, 2, 3])
def test_one_query_and_one_key(extra: int) -> None:
    check(random_call(Shape(1, 1, 1, 1, 1), 1, 1, 1, extra=extra, bias="query" if extra == 3 else None))


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_any_strides_and_dtypes(layout: str, dtype: torch.dtype) -> None:
    call = random_call(Shape(1, 2, 1, 11, 14, 24, 16), 6, 8, 3, dtype=dtype, extra=3, bias="query")
    names = differentiable(call)
    lists = call.blocks.flip(-1).transpose(1, 3).contiguous().transpose(1, 3).flip(-1)
    laid = with_tensors(call, names, [LAYOUTS[layout](getattr(call, name)) for name in names])
    check(dataclasses.replace(laid, blocks=lists))


@pytest.mark.parametrize("alike", [False, True])
@pytest.mark.parametrize("extra", [0, 2])
def test_hidden_keys_and_shared_lists(extra: int, alike: bool) -> None:
    check(random_call(Shape(2, 2, 1, 11, 30), 8, 11, 3, hidden=True, extra=extra, alike=alike))


def test_many_queries_share_the_extra_keys_out_among_programs() -> None:
    check(random_call(Shape(1, 1, 1, 130, 20), 70, 20, 1, extra=5, bias="head"))


def test_a_key_that_no_list_holds_has_no_gradient() -> None:
    call = random_call(Shape(1, 2, 2, 20, 30), 8, 8, 2)
    call = dataclasses.replace(call, blocks=torch.full_like(call.blocks, -1))
    assert all((grad == 0).all() for grad in grads_of(attend, call, output_gradient(call)))


def test_gradients_repeat_bit_for_bit() -> None:
    call = random_call(Shape(1, 2, 1, 40, 20), 20, 8, 3, extra=3, bias="head")
    first, second = (grads_of(attend, call, output_gradient(call)) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
