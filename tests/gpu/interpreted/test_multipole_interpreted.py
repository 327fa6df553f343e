"""Multipole attention's Triton kernels under the interpreter, in the operators' place on the CPU: selection, output and
gradients.

The tests that are imported here run a second time, on these kernels.
"""

import dataclasses
from collections.abc import Iterator

import pytest
import torch
from attention_cases import HALVES, LAYOUTS, Shape, slowly
from multipole_cases import attend, clusters_of_sizes, even_sizes, judged, random_call
from test_multipole_backward import (  # noqa: F401
    check_gradients,
    grads_of,
    output_gradient,
    test_from_afar_a_cluster_hands_its_gradient_to_all_its_keys,
    test_grouped_heads_sum_their_gradients,
    test_hidden_keys_get_no_gradient,
)
from test_multipole_edges import (  # noqa: F401
    test_a_hidden_key_does_no_harm_whatever_it_holds,
    test_a_query_that_is_not_finite_spoils_its_own_row_only,
    test_all_tokens_equal,
    test_nothing_but_prefix_tokens,
    test_nothing_to_attend,
    test_one_key,
    test_rows_that_see_nothing_are_zero_and_have_no_gradient,
)
from test_multipole_forward import (  # noqa: F401
    test_equal_clusters_are_resolved_from_the_first,
    test_kernel_breaks_exact_ties_by_the_lowest_cluster,
    test_output_joins_heads_without_a_copy,
)

from regard.ops._triton import Config, only_config
from regard.ops.multipole import triton as kernels
from regard.ops.multipole.triton_clusters import compacted

pytest.mark.slow(test_grouped_heads_sum_their_gradients)

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")  # torch says that an implementation is overridden


@pytest.fixture(autouse=True, scope="module")
def in_the_operators_place() -> Iterator[None]:
    names = (("multipole_attention", kernels.forward), ("multipole_attention_backward", kernels.backward))
    with torch.library._scoped_library("regard", "IMPL") as library:
        for name, launcher in names:
            library.impl(name, launcher, "CPU", allow_override=True)
        with only_config(Config.of(ROWS=16, COLUMNS=16)):
            yield


def check(call) -> None:
    judged(call)
    check_gradients(call)


SHAPES = [
    (Shape(batch=1, heads=1, key_heads=1, queries=1), [1]),
    (Shape(batch=2, heads=2, queries=19, dim=24, value_dim=40), even_sizes(30, 7)),
    (Shape(batch=1, heads=1, queries=35, dim=8, value_dim=8), [1, 15, 16, 17, 0, 20]),
    (Shape(batch=1, heads=1, queries=9, dim=40, value_dim=3), even_sizes(70, 35)),
    (Shape(batch=1, heads=2, queries=5, dim=3, value_dim=20), [40, 3, 2]),
]


@pytest.mark.parametrize("far", ["centroid", slowly("gaussian")])
@pytest.mark.parametrize("fraction", [slowly(0.0), 0.3, slowly(1.0)])
@pytest.mark.parametrize(("shape", "sizes"), SHAPES, ids=str)
def test_equals_the_specification(shape: Shape, sizes: list[int], fraction: float, far: str) -> None:
    shape = dataclasses.replace(shape, key_heads=max(1, shape.heads // 2))
    check(random_call(shape, sizes, round(fraction * len(sizes)), far=far))


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES], ids=str)
@pytest.mark.parametrize("layout", ["gapped", *(slowly(layout) for layout in LAYOUTS if layout != "gapped")])
def test_any_strides_and_dtypes(layout: str, dtype: torch.dtype) -> None:
    call = random_call(Shape(1, 2, 1, 11, dim=24, value_dim=16), even_sizes(20, 4), 2, dtype=dtype, prefix=2)
    query, key, value = (LAYOUTS[layout](t) for t in (call.query, call.key, call.value))
    check(dataclasses.replace(call, query=query, key=key, value=value))


@pytest.mark.parametrize("near", [0, 3, 9])
@pytest.mark.parametrize("prefix", [0, 4])
def test_hidden_keys(near: int, prefix: int) -> None:
    visible = torch.rand(2, 1, 30 + prefix, generator=torch.Generator().manual_seed(4)) > 0.6
    visible[0] = False  # rows that see nothing
    assignment = clusters_of_sizes(even_sizes(30, 9), 2, 1)
    visible[1, 0, prefix:] &= assignment[1, 0] != 3  # a cluster that is hidden whole
    call = random_call(Shape(heads=2, key_heads=1, queries=9), [1] * 30, near, prefix=prefix, visible=visible)
    check(dataclasses.replace(call, assignment=assignment, num_clusters=9))


@pytest.mark.parametrize("entries", [0, 1, 255, 257, 600])
def test_compaction(entries: int) -> None:
    members = torch.rand(1, 2, 3, entries, generator=torch.Generator().manual_seed(entries)) > 0.7
    lists, counts = compacted(members.to(torch.uint8))
    for line, found, count in zip(members.flatten(0, 2), lists.flatten(0, 2), counts.flatten(), strict=True):
        assert torch.equal(found[:count].long(), line.nonzero().squeeze(1))


def test_gradients_repeat_bit_for_bit() -> None:
    call = random_call(Shape(1, 2, 1, 40), even_sizes(30, 5), 2, prefix=2)
    first, second = (grads_of(attend, call, output_gradient(call)) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize(("options", "says"), [({"tolerance": 0.1}, "tolerance"), ({"num_clusters": 4000}, "4000")])
def test_what_the_kernels_do_not_take_is_refused(options: dict, says: str) -> None:
    call = dataclasses.replace(random_call(Shape(), even_sizes(60, 8), 3), **options)
    with pytest.raises(ValueError, match=says):
        kernels.forward(*call.operands())
