"""Multipole attention's output: kernel and PyTorch path against the reference in float64, that against plain loops."""

import dataclasses
import math

import pytest
import torch
from attention_cases import BACKENDS, HALVES, LAYOUTS, Shape, inputs, needs_kernels
from hypothesis import given, settings
from hypothesis import strategies as st
from multipole_cases import (
    attend,
    call_of,
    clusters_of_sizes,
    even_sizes,
    in_float64,
    judged,
    kernel_selection,
    random_call,
    ranks,
)

from regard import multipole_attention
from regard.ops import only_backend
from regard.ops._selection import kept_by_stable_sort, kept_by_threshold
from regard.ops.multipole import streamed
from regard.ops.multipole.call import clusters_of_keys
from regard.ops.multipole.reference import multipole_attention_reference

FAR = ("centroid", "gaussian")
SMALLEST_SPREAD = torch.finfo(torch.float32).tiny
SMALL = Shape(batch=1, heads=2, key_heads=1, queries=9, dim=8, value_dim=5)


def by_hand(call) -> torch.Tensor:
    """The definition, one query at a time in plain loops: what the docstring of multipole_attention says."""
    batch, heads, queries, _ = call.query.shape
    output = torch.zeros(batch, heads, queries, call.value.shape[-1], dtype=torch.float64)
    for b in range(batch):
        for h in range(heads):
            kv = h // call.groups
            keys, values = call.key[b, kv], call.value[b, kv]
            visible = [m for m in range(len(keys)) if call.visible is None or call.visible[b, kv, m]]
            prefix = [m for m in visible if m < call.num_prefix_tokens]
            members = [
                [
                    m
                    for m in visible
                    if m >= call.num_prefix_tokens and call.clusters[b, kv, m - call.num_prefix_tokens] == c
                ]
                for c in range(call.num_clusters)
            ]
            for n in range(queries):
                q = call.query[b, h, n] * call.scale
                logit = {m: float(q @ keys[m]) for m in visible}
                mass, rank = {}, {}
                for c, inside in enumerate(members):
                    if inside:
                        group = keys[inside]
                        variance = group.var(dim=0, unbiased=False)
                        mass[c] = math.log(len(inside)) + float(q @ group.mean(dim=0))
                        if call.second_order:
                            mass[c] += 0.5 * float((q.square() * variance).sum())
                        rank[c] = mass[c] + math.log(max(float(variance.sum()), SMALLEST_SPREAD))
                ranked = sorted(rank, key=lambda c: (-rank[c], c))  # noqa: B023 - used at once
                near = ranked if n < call.num_prefix_tokens else ranked[: call.near]
                terms = [(logit[m], values[m]) for m in prefix]
                for c in mass:
                    if c in near:
                        terms += [(logit[m], values[m]) for m in members[c]]
                    else:
                        terms.append((mass[c], values[members[c]].mean(dim=0)))
                if terms:
                    soft = torch.tensor([t for t, _ in terms], dtype=torch.float64).softmax(dim=0)
                    output[b, h, n] = sum(w * v for w, (_, v) in zip(soft, terms, strict=True))
    return output


@pytest.mark.parametrize("far", FAR)
@pytest.mark.parametrize("near", [0, 1, 3, 6])
@pytest.mark.parametrize("prefix", [0, 2])
@pytest.mark.parametrize("hidden", [False, True])
def test_the_reference_is_the_definition(far: str, near: int, prefix: int, hidden: bool) -> None:
    sizes = [1, 5, 2, 0, 4, 3]
    visible = None
    if hidden:
        visible = torch.rand(1, 1, 15 + prefix, generator=torch.Generator().manual_seed(1)) > 0.4
    call = in_float64(random_call(SMALL, sizes, near, far=far, prefix=prefix, visible=visible))
    torch.testing.assert_close(multipole_attention_reference(call), by_hand(call))


@pytest.mark.parametrize("far", FAR)
@pytest.mark.parametrize("block", [1, 3000, 1 << 21])
@pytest.mark.parametrize("prefix", [0, 3])
def test_blocks_of_any_size_equal_the_reference(far: str, block: int, prefix: int, monkeypatch) -> None:
    monkeypatch.setattr(streamed, "_BLOCK", block)
    visible = torch.rand(2, 2, 60 + prefix, generator=torch.Generator().manual_seed(1)) > 0.3
    shape = Shape(heads=4, queries=21, value_dim=9)
    call = in_float64(random_call(shape, even_sizes(60, 7), 3, far=far, prefix=prefix, visible=visible))
    torch.testing.assert_close(attend(call, "pytorch"), multipole_attention_reference(call))


SHAPES = [
    (Shape(), even_sizes(50, 7)),
    (Shape(batch=1, heads=1, key_heads=1, queries=1), [1]),
    (Shape(queries=7, dim=64, value_dim=40), even_sizes(97, 10)),
    (Shape(heads=6, queries=33, dim=64, value_dim=64), even_sizes(130, 11)),
    (Shape(batch=1, heads=1, key_heads=1, queries=40, dim=24, value_dim=24), [1, 15, 16, 17, 33, 0, 64, 65]),
    (Shape(batch=1, queries=20, dim=256, value_dim=256), even_sizes(120, 9)),
    (Shape(batch=1, queries=20, dim=80, value_dim=4), even_sizes(200, 40)),
    (Shape(batch=1, queries=20, dim=4, value_dim=1), even_sizes(90, 33)),
    (Shape(batch=1, queries=20, dim=8, value_dim=100), [300, 3, 2]),
    (Shape(batch=1, queries=20, dim=64, value_dim=64), [1] * 31 + [2] * 33),
]


@needs_kernels
@pytest.mark.parametrize("far", FAR)
@pytest.mark.parametrize("fraction", [0.0, 0.15, 0.5, 1.0])
@pytest.mark.parametrize(("shape", "sizes"), SHAPES, ids=[f"{s}-{len(c)}" for s, c in SHAPES])
def test_kernel_equals_the_specification(shape: Shape, sizes: list[int], fraction: float, far: str) -> None:
    judged(random_call(shape, sizes, math.ceil(fraction * len(sizes)), far=far))


@needs_kernels
@pytest.mark.parametrize("queries", [1, 2, 255, 256, 257])
@pytest.mark.parametrize("prefix", [0, 1, 5])
def test_kernel_at_the_borders_of_its_tiles(queries: int, prefix: int) -> None:
    shape = Shape(batch=1, queries=max(queries, prefix), dim=8, value_dim=8)
    judged(random_call(shape, [1, 15, 16, 17, 33], 2, prefix=prefix))


@needs_kernels
@pytest.mark.parametrize("clusters", [1, 15, 16, 17, 31, 32, 33, 48, 100])
def test_kernel_with_any_number_of_clusters(clusters: int) -> None:
    shape = Shape(batch=1, queries=40, dim=16, value_dim=16)
    for near in {0, 1, clusters // 3, clusters - 1, clusters}:
        judged(random_call(shape, even_sizes(100, clusters), near))


@needs_kernels
@pytest.mark.parametrize("dtype", [torch.float32, *HALVES], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("far", FAR)
def test_kernel_of_any_strides_and_dtypes(layout: str, dtype: torch.dtype, far: str) -> None:
    call = random_call(Shape(queries=50, dim=64, value_dim=24), even_sizes(50, 8), 2, dtype=dtype, far=far, prefix=2)
    query, key, value = (LAYOUTS[layout](t) for t in (call.query, call.key, call.value))
    judged(dataclasses.replace(call, query=query, key=key, value=value))


@needs_kernels
@pytest.mark.parametrize("prefix", [0, 4])
@pytest.mark.parametrize("near", [0, 3, 9])
def test_kernel_with_hidden_keys(near: int, prefix: int) -> None:
    visible = torch.rand(2, 2, 70 + prefix, generator=torch.Generator().manual_seed(4)) > 0.6
    visible[0, 0] = False  # rows that see nothing
    assignment = clusters_of_sizes(even_sizes(70, 9), 2, 2)
    visible[0, 1, prefix:] &= assignment[0, 1] != 3  # a cluster that is hidden whole
    call = random_call(Shape(heads=4, queries=30), [1] * 70, near, prefix=prefix, visible=visible)
    call = dataclasses.replace(call, assignment=assignment, num_clusters=9)
    judged(call)
    assert (attend(call)[0, :2] == 0).all()
    mirrored = visible.flip(-1).clone().flip(-1).transpose(0, 1).contiguous().transpose(0, 1)
    assert torch.equal(attend(dataclasses.replace(call, visible=mirrored)), attend(call))


@st.composite
def problems(draw, largest: int = 70):
    groups, key_heads = draw(st.integers(1, 3)), draw(st.integers(1, 2))
    sizes = draw(st.lists(st.integers(0, 40), min_size=1, max_size=20).filter(lambda s: sum(s) > 0))
    prefix = draw(st.integers(0, 4))
    shape = Shape(
        batch=draw(st.integers(1, 2)),
        heads=groups * key_heads,
        key_heads=key_heads,
        queries=draw(st.integers(max(1, prefix), largest)),
        dim=draw(st.sampled_from([4, 16, 21, 64])),
        value_dim=draw(st.integers(1, 70)),
    )
    seed = draw(st.integers(0, 99))
    visible = None
    if draw(st.booleans()):
        size = (shape.batch, key_heads, sum(sizes) + prefix)
        visible = torch.rand(size, generator=torch.Generator().manual_seed(seed)) > 0.3
    call = random_call(
        shape,
        sizes,
        draw(st.integers(0, len(sizes))),
        dtype=draw(st.sampled_from([torch.float32, *HALVES])),
        seed=seed,
        far=draw(st.sampled_from(FAR)),
        prefix=prefix,
        visible=visible,
    )
    laid = [LAYOUTS[draw(st.sampled_from(sorted(LAYOUTS)))](t) for t in (call.query, call.key, call.value)]
    return dataclasses.replace(call, query=laid[0], key=laid[1], value=laid[2])


@needs_kernels
@settings(max_examples=80, deadline=None, derandomize=True)
@given(problems())
def test_kernel_of_any_problem(call) -> None:
    judged(call)


@needs_kernels
@pytest.mark.parametrize("near", [1, 2, 4, 5, 8])
@pytest.mark.parametrize("far", FAR)
def test_kernel_breaks_exact_ties_by_the_lowest_cluster(near: int, far: str) -> None:
    """Multiples of 1/4 in clusters of four: means and logits have no rounding, so all rank as the specification."""
    query, key, value = inputs(Shape(queries=60, keys=96))
    key = key[:, :, :32].repeat(1, 1, 3, 1)  # of each cluster three, each with keys of its own value
    call = call_of((query, key, value), [4] * 24, near, far=far)
    call = dataclasses.replace(call, assignment=(torch.arange(96) // 4).expand(2, 2, 96).contiguous())
    rank = ranks(call)
    chosen = kept_by_stable_sort(rank, near)
    assert ((rank == rank.masked_fill(~chosen, math.inf).amin(-1, keepdim=True)) & ~chosen).any(), "no ties here"
    judged(call, chosen)
    assert torch.equal(kept_by_threshold(rank, near), chosen)


@pytest.mark.parametrize("backend", BACKENDS)
def test_equal_clusters_are_resolved_from_the_first(backend: str) -> None:
    """Four clusters of the same two keys: which ones are near shows in the weights of their values."""
    g = torch.Generator().manual_seed(0)
    query, pair = torch.randn(1, 1, 3, 8, generator=g), torch.randn(1, 1, 2, 8, generator=g)
    call = call_of((query, pair.repeat(1, 1, 4, 1), torch.eye(8)[None, None]), [2] * 4, 2)
    call = dataclasses.replace(call, assignment=torch.arange(8).div(2, rounding_mode="floor")[None, None])
    weights = attend(call, backend)[0, 0].unflatten(-1, (4, 2))
    apart = (weights[..., 0] - weights[..., 1]).abs() > 1e-3
    assert apart[:, :2].all() and not apart[:, 2:].any()


@needs_kernels
def test_the_judgement_sees_a_wrong_selection(monkeypatch) -> None:
    """A kernel that resolved another cluster than the best would be caught, and so would a wrong value."""
    call = random_call(Shape(), even_sizes(50, 7), 1)
    near = kernel_selection(call)
    wrong = near.roll(1, dims=-1)
    with pytest.raises(AssertionError):
        judged(call, wrong)
    monkeypatch.setattr("multipole_cases.attend", lambda c, *a: multipole_attention_reference(c, lambda s, k: wrong))
    with pytest.raises(AssertionError, match="dropped"):
        kernel_selection(call)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("lead", [(), (2,), (2, 3), (2, 1, 2)])
def test_any_leading_dimensions(lead: tuple[int, ...], backend: str) -> None:
    g = torch.Generator().manual_seed(3)
    query, key, value = (torch.randn(*lead, 4, 30, 16, generator=g) for _ in range(3))
    mask = torch.rand(*lead, 1, 1, 30, generator=g) > 0.2
    options = {"num_clusters": 6, "near": 2, "num_prefix_tokens": 1}
    with only_backend(backend):
        ours = multipole_attention(query, key, value, attn_mask=mask, **options)
        assert ours.shape == query.shape
        flat = [t.reshape(-1, 4, 30, 16) for t in (query, key, value)]
        want = multipole_attention(*flat, attn_mask=mask.reshape(-1, 1, 1, 30), **options)
    torch.testing.assert_close(ours.reshape(want.shape), want)


@needs_kernels
def test_expanded_inputs_share_memory() -> None:
    query, key, value = inputs(Shape(batch=1), exact=False)
    one = multipole_attention(query, key, value, num_clusters=7, near=2)
    wide = [t.expand(3, -1, -1, -1) for t in (query, key, value)]
    torch.testing.assert_close(multipole_attention(*wide, num_clusters=7, near=2), one.expand(3, -1, -1, -1))


@pytest.mark.parametrize("backend", BACKENDS)
def test_output_joins_heads_without_a_copy(backend: str) -> None:
    with only_backend(backend):
        joined = multipole_attention(*inputs(Shape()), num_clusters=7, near=2).transpose(1, 2)
    assert joined.is_contiguous()
    assert joined.reshape(2, 50, -1).data_ptr() == joined.data_ptr()


def test_near_as_a_fraction_counts_clusters_rounded_up() -> None:
    query, key, value = inputs(Shape(keys=100), exact=False)
    for fraction, count in ((0.0, 0), (1e-9, 1), (0.07, 4), (0.1, 5), (0.5, 25), (1.0, 50)):
        got, want = (multipole_attention(query, key, value, num_clusters=50, near=n) for n in (fraction, count))
        assert torch.equal(got, want)


def test_no_number_of_clusters_means_four_times_the_root_of_the_keys() -> None:
    for keys, clusters in ((1, 1), (2, 2), (16, 16), (100, 40), (401, 80)):
        query, key, value = inputs(Shape(keys=keys + 1, queries=3), exact=False)
        got, want = (
            multipole_attention(query, key, value, num_clusters=n, near=0.2, num_prefix_tokens=1)
            for n in (None, clusters)
        )
        assert torch.equal(got, want)


@pytest.mark.parametrize("prefix", [0, 1])
def test_clusters_are_of_keys_weighed_as_queries_see_them(prefix: int) -> None:
    """In a dimension where queries are zero keys may differ as they like: it does not tell clusters apart."""
    query, key, value = inputs(Shape(batch=1, queries=40, keys=40), exact=False)
    query[..., 3] = 0.0
    far = key.clone()
    far[..., 3] *= 1000.0
    calls = [call_of((query, k, value), even_sizes(40 - prefix, 6), 2, prefix=prefix) for k in (key, far)]
    assert torch.equal(*(clusters_of_keys(c, 2, None) for c in calls))
    without = dataclasses.replace(calls[0], query=torch.ones_like(query))
    assert not torch.equal(clusters_of_keys(without, 2, None), clusters_of_keys(calls[0], 2, None))


def test_the_grid_spreads_the_start_only() -> None:
    query, key, value = inputs(Shape(queries=49, keys=49), exact=False)
    options = {"num_clusters": 6, "near": 2, "num_prefix_tokens": 1, "iterations": 0}
    line, flat = (multipole_attention(query, key, value, grid_size=g, **options) for g in ((48,), None))
    assert torch.equal(line, flat)
    square = multipole_attention(query, key, value, grid_size=(6, 8), **options)
    cube = multipole_attention(query, key, value, grid_size=(2, 3, 8), **options)
    assert not torch.allclose(square, line) and not torch.allclose(cube, square)
    torch.testing.assert_close(square[:, :, :1], line[:, :, :1])  # prefix queries do not know of clusters


@needs_kernels
def test_the_same_bits_on_one_thread_and_two() -> None:
    call = random_call(Shape(batch=1, heads=3, key_heads=3, queries=600, dim=64), even_sizes(300, 17), 4, prefix=1)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = attend(call)
        torch.set_num_threads(2)
        assert torch.equal(attend(call), one)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("backend", BACKENDS)
def test_uninitialised_memory_is_never_read(backend: str) -> None:
    """torch.empty gives NaN here; the sanitizer job poisons the kernel's own scratch memory as well."""
    calls = [random_call(Shape(queries=37), [1, 15, 16, 17, 0, 34], near, prefix=1) for near in (0, 2, 6)]
    want = [attend(call, backend) for call in calls]
    torch.use_deterministic_algorithms(True)  # with it, fill_uninitialized_memory is on
    try:
        for call, expected in zip(calls, want, strict=True):
            assert torch.equal(attend(call, backend), expected)
    finally:
        torch.use_deterministic_algorithms(False)
