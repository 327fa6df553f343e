"""Neighborhood attention's output: kernel and PyTorch path against the reference in float64, by the error budget."""

import dataclasses

import pytest
import torch
from attention_cases import BACKENDS, HALVES, LAYOUTS, Shape, far_apart, needs_kernels
from hypothesis import given, settings
from neighborhood_cases import attend, in_float64, judged, pattern_of, problems, random_call

from regard import neighborhood_attention
from regard.ops import only_backend
from regard.ops.neighborhood import streamed
from regard.ops.neighborhood.reference import neighborhood_attention_reference
from regard.ops.neighborhood.windows import BORDERS

SMALL = Shape(batch=1)
PATTERNS = {
    "nat": pattern_of((19, 23), 7),
    "dinat": pattern_of((16, 21), 3, dilation=(5, 4)),
    "blocks": pattern_of((12, 20), 4, stride=4),
    "strided": pattern_of((11, 37), (4, 9), stride=(3, 5)),
    "causal": pattern_of((9, 40), (3, 12), causal=(True, True)),
    "video": pattern_of((4, 6, 9), (3, 3, 5), causal=(True, False, False)),
    "sequence": pattern_of((150,), 21),
    "long window": pattern_of((330,), 290),  # slots in several pieces
    "wide window": pattern_of((11, 27), (9, 23)),
    "window beyond the grid": pattern_of((5, 6), (9, 11)),
    "dilation beyond the grid": pattern_of((3, 5), 3, dilation=(4, 8)),
    "line": pattern_of((1, 33), 5),
    "column": pattern_of((33, 1), 5),
    "one place": pattern_of((1, 1, 1), 3),
    "wide line": pattern_of((3, 200), 3),
}
every_pattern = pytest.mark.parametrize("pattern", PATTERNS.values(), ids=PATTERNS)


@needs_kernels
@every_pattern
@pytest.mark.parametrize("border", BORDERS)
def test_kernel(pattern, border: str) -> None:
    judged(random_call(dataclasses.replace(pattern, border=border), SMALL, bias=True))


@needs_kernels
@pytest.mark.parametrize("dtype", [torch.float32, *HALVES], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_kernel_on_any_strides_and_dtypes(layout: str, dtype: torch.dtype) -> None:
    shape = Shape(batch=2, heads=4, key_heads=2, dim=32, value_dim=24)
    call = random_call(pattern_of((9, 18), 5), shape, prefix=2, bias=True, dtype=dtype)
    query, key, value = (LAYOUTS[layout](t) for t in (call.query, call.key, call.value))
    judged(dataclasses.replace(call, query=query, key=key, value=value))


@needs_kernels
@pytest.mark.parametrize("dim", [1, 7, 16, 33, 64, 100, 300])
def test_kernel_at_any_head_dim(dim: int) -> None:
    judged(random_call(pattern_of((6, 18), 3), Shape(batch=1, heads=1, key_heads=1, dim=dim, value_dim=dim), prefix=1))


@needs_kernels
@pytest.mark.parametrize("prefix", [1, 5, 300])
@pytest.mark.parametrize("hidden", [False, True])
@pytest.mark.parametrize("border", BORDERS)
def test_kernel_with_prefix_tokens(prefix: int, hidden: bool, border: str) -> None:
    shape = Shape(heads=4, key_heads=2)
    judged(random_call(pattern_of((7, 19), 3, border=border), shape, prefix=prefix, bias=True, hidden=hidden))


@needs_kernels
@settings(max_examples=60, deadline=None, derandomize=True)
@given(problems())
def test_kernel_on_any_problem(call) -> None:
    judged(call)


@settings(max_examples=30, deadline=None, derandomize=True)
@given(problems())
def test_blocks_equal_the_reference_on_any_problem(call) -> None:
    call = in_float64(call)
    torch.testing.assert_close(attend(call, "pytorch"), neighborhood_attention_reference(call))


@pytest.mark.parametrize("block", [1, 3000, 1 << 20])
@pytest.mark.parametrize("prefix", [0, 3])
def test_blocks_of_any_size_equal_the_reference(block: int, prefix: int, monkeypatch) -> None:
    monkeypatch.setattr(streamed, "_BLOCK", block)
    call = random_call(pattern_of((6, 9), 3), Shape(heads=4), prefix=prefix, bias=True, hidden=True)
    call = in_float64(call)
    torch.testing.assert_close(attend(call, "pytorch"), neighborhood_attention_reference(call))


@pytest.mark.parametrize("backend", BACKENDS)
def test_one_head_on_several_threads(backend: str) -> None:
    """Units share a head; along a sequence they share a line."""
    for grid in ((31, 20), (700,), (5, 12, 11)):
        call = random_call(pattern_of(grid, 5), Shape(batch=1, heads=1, key_heads=1), prefix=1)
        threads = torch.get_num_threads()
        found = []
        try:
            for count in (1, 2, 3):
                torch.set_num_threads(count)
                found.append(attend(call, backend))
        finally:
            torch.set_num_threads(threads)
        assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])


@pytest.mark.parametrize("backend", BACKENDS)
def test_any_leading_dimensions(backend: str) -> None:
    call = random_call(pattern_of((5, 6), 3), Shape(batch=6))
    options = {"grid_size": (5, 6), "kernel_size": 3}
    with only_backend(backend):
        want = neighborhood_attention(call.query, call.key, call.value, **options)
        split = [t.unflatten(0, (2, 3)) for t in (call.query, call.key, call.value)]
        assert torch.equal(neighborhood_attention(*split, **options), want.unflatten(0, (2, 3)))
        first = [t[0] for t in (call.query, call.key, call.value)]
        torch.testing.assert_close(neighborhood_attention(*first, **options), want[0])


@needs_kernels
def test_strides_beyond_two_to_the_31_elements() -> None:
    call = random_call(pattern_of((5, 6), 3), Shape(), dtype=torch.bfloat16)
    query, key, value = far_apart(call.query, call.key, call.value)
    assert torch.equal(attend(dataclasses.replace(call, query=query, key=key, value=value)), attend(call))
