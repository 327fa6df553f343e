"""Routed attention's output: kernel and PyTorch path against the reference in float64, that against plain loops."""

import dataclasses

import pytest
import torch
from attention_cases import BACKENDS, HALVES, LAYOUTS, Shape, inputs, needs_kernels
from hypothesis import given, settings
from hypothesis import strategies as st
from routed_cases import attend, in_float64, judged, random_call, random_lists

from regard import routed_attention
from regard.ops import only_backend
from regard.ops.routed import streamed
from regard.ops.routed.reference import routed_attention_reference

SMALL = Shape(batch=2, heads=4, key_heads=2, queries=9, keys=11, dim=8, value_dim=5)
EXTRAS = [(0, None), (3, None), (3, "head"), (3, "query")]


def by_hand(call) -> torch.Tensor:
    """The definition, one query at a time in plain loops: what the docstring of routed_attention says."""
    batch, heads, queries, _ = call.query.shape
    output = torch.zeros(batch, heads, queries, call.value.shape[-1], dtype=torch.float64)
    lists = call.blocks.expand(batch, heads, -1, -1)
    for b in range(batch):
        for h in range(heads):
            kv = h // call.groups
            for n in range(queries):
                q = call.query[b, h, n] * call.scale
                terms = []
                for block in lists[b, h, n // call.query_block].tolist():
                    for m in range(call.key.shape[2]):
                        if m // call.key_block == block and (call.visible is None or call.visible[b, kv, m]):
                            terms.append((float(q @ call.key[b, kv, m]), call.value[b, kv, m]))
                for s in range(call.extra_key.shape[2]):
                    logit = float(q @ call.extra_key[b, kv, s])
                    if call.extra_bias is not None:
                        logit += float(call.extra_bias[b, h, n if call.extra_bias.shape[2] > 1 else 0, s])
                    terms.append((logit, call.extra_value[b, kv, s]))
                if terms:
                    soft = torch.tensor([t for t, _ in terms], dtype=torch.float64).softmax(dim=0)
                    output[b, h, n] = sum(w * v for w, (_, v) in zip(soft, terms, strict=True))
    return output


@pytest.mark.parametrize(("extra", "bias"), EXTRAS)
@pytest.mark.parametrize("hidden", [False, True])
@pytest.mark.parametrize(("query_block", "key_block"), [(3, 4), (1, 1), (20, 3), (4, 20)])
def test_the_reference_is_the_definition(extra, bias, hidden: bool, query_block: int, key_block: int) -> None:
    call = random_call(SMALL, query_block, key_block, 3, extra=extra, bias=bias, hidden=hidden)
    call = in_float64(call)
    torch.testing.assert_close(routed_attention_reference(call), by_hand(call))


@pytest.mark.parametrize("block", [1, 3000, 30000, 1 << 21])
@pytest.mark.parametrize(("extra", "bias"), EXTRAS)
@pytest.mark.parametrize("hidden", [False, True])
def test_blocks_of_any_size_equal_the_reference(block: int, extra: int, bias, hidden: bool, monkeypatch) -> None:
    monkeypatch.setattr(streamed, "_BLOCK", block)
    shape = Shape(heads=4, queries=61, keys=50, value_dim=9)
    call = in_float64(random_call(shape, 7, 8, 4, extra=extra, bias=bias, hidden=hidden))
    torch.testing.assert_close(attend(call, "pytorch"), routed_attention_reference(call))


# (shape, query_block, key_block, length of the lists)
SHAPES = [
    (Shape(), 8, 8, 3),
    (Shape(batch=1, heads=1, key_heads=1, queries=1, keys=1), 1, 1, 1),
    (Shape(queries=97, keys=131, dim=64, value_dim=40), 49, 49, 2),
    (Shape(heads=6, queries=130, keys=300, dim=64, value_dim=64), 64, 64, 3),
    (Shape(batch=1, queries=64, keys=64, dim=32, value_dim=32), 16, 16, 4),
    (Shape(batch=1, queries=64, keys=64, dim=32, value_dim=32), 4, 4, 16),
    (Shape(batch=1, queries=30, keys=70, dim=24, value_dim=24), 7, 1, 40),
    (Shape(batch=1, queries=20, keys=120, dim=256, value_dim=256), 5, 30, 2),
    (Shape(batch=1, queries=20, keys=90, dim=80, value_dim=4), 6, 11, 5),
    (Shape(batch=1, queries=20, keys=90, dim=4, value_dim=1), 6, 11, 5),
    (Shape(batch=1, queries=40, keys=1500, dim=21, value_dim=100), 13, 400, 3),
    (Shape(batch=1, queries=40, keys=50), 1000, 1000, 1),
    # a list for each query
    (Shape(queries=33, keys=70, dim=24, value_dim=40), 1, 1, 17),
    (Shape(batch=1, queries=9, keys=300, dim=64, value_dim=64), 1, 1, 200),
    (Shape(batch=1, queries=20, keys=90, dim=4, value_dim=100), 1, 11, 5),
]
SHAPE_NAMES = [f"{s}-{q}-{k}-{n}" for s, q, k, n in SHAPES]


@needs_kernels
@pytest.mark.parametrize(("extra", "bias"), EXTRAS)
@pytest.mark.parametrize(("shape", "query_block", "key_block", "length"), SHAPES, ids=SHAPE_NAMES)
def test_kernel_equals_the_specification(shape, query_block, key_block, length, extra, bias) -> None:
    shape = dataclasses.replace(shape, key_heads=1 if shape.heads % 2 else shape.heads // 2)
    judged(random_call(shape, query_block, key_block, length, extra=extra, bias=bias))


@needs_kernels
@pytest.mark.parametrize("queries", [1, 15, 16, 17, 63, 64, 65, 130])
def test_kernel_at_the_borders_of_its_tiles(queries: int) -> None:
    shape = Shape(batch=1, queries=queries, keys=60, dim=8, value_dim=8)
    judged(random_call(shape, 1000, 20, 2, extra=2, bias="query"))


@needs_kernels
@pytest.mark.parametrize("keys", [1, 2, 3, 5, 6, 7, 8, 9, 127, 128, 129, 255, 256, 257])
def test_kernel_at_the_borders_of_its_chunks(keys: int) -> None:
    """All of them on one list, whose extra keys share a chunk with the last of the others."""
    call = random_call(Shape(batch=1, queries=20, keys=keys, dim=8, value_dim=8), 20, keys, 1, extra=3, bias="head")
    judged(dataclasses.replace(call, blocks=torch.zeros_like(call.blocks)))


@needs_kernels
@pytest.mark.parametrize("dtype", [torch.float32, *HALVES], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("dim", "query_block"), [(64, 20), (24, 20), (64, 1), (24, 1)])
def test_kernel_of_any_strides_and_dtypes(layout: str, dtype: torch.dtype, dim: int, query_block: int) -> None:
    shape = Shape(queries=50, keys=60, dim=dim, value_dim=dim)
    call = random_call(shape, query_block, 8, 4, dtype=dtype, extra=3, bias="query")
    names = ("query", "key", "value", "extra_key", "extra_value")
    laid = {name: LAYOUTS[layout](getattr(call, name)) for name in names}
    bias = LAYOUTS[layout](call.extra_bias)
    lists = call.blocks.flip(-1).transpose(1, 3).contiguous().transpose(1, 3).flip(-1)
    judged(dataclasses.replace(call, **laid, extra_bias=bias, blocks=lists))


@needs_kernels
@pytest.mark.parametrize("query_block", [8, 1])
@pytest.mark.parametrize("extra", [0, 2])
def test_kernel_with_hidden_keys(extra: int, query_block: int) -> None:
    call = random_call(Shape(heads=4, queries=30, keys=70), query_block, 16, 3, hidden=True, extra=extra)
    visible = call.visible.clone()
    visible[0, 0] = False  # rows that see nothing, but the extra keys
    call = dataclasses.replace(call, visible=visible)
    judged(call)
    assert (attend(call)[0, :2] == 0).all() == (extra == 0)
    mirrored = visible.flip(-1).clone().flip(-1).transpose(0, 1).contiguous().transpose(0, 1)
    assert torch.equal(attend(dataclasses.replace(call, visible=mirrored)), attend(call))


@st.composite
def problems(draw, largest: int = 70):
    groups, key_heads = draw(st.integers(1, 3)), draw(st.integers(1, 2))
    shape = Shape(
        batch=draw(st.integers(1, 2)),
        heads=groups * key_heads,
        key_heads=key_heads,
        queries=draw(st.integers(1, largest)),
        keys=draw(st.integers(1, 2 * largest)),
        dim=draw(st.sampled_from([4, 16, 21, 64])),
        value_dim=draw(st.integers(1, 70)),
    )
    call = random_call(
        shape,
        draw(st.integers(1, 40)),
        draw(st.integers(1, 40)),
        draw(st.integers(0, 6)),
        extra=draw(st.integers(0, 20)),
        bias=draw(st.sampled_from([None, "head", "query"])),
        hidden=draw(st.booleans()),
        alike=draw(st.booleans()),
        dtype=draw(st.sampled_from([torch.float32, *HALVES])),
        seed=draw(st.integers(0, 99)),
    )
    laid = [LAYOUTS[draw(st.sampled_from(sorted(LAYOUTS)))](t) for t in (call.query, call.key, call.value)]
    return dataclasses.replace(call, query=laid[0], key=laid[1], value=laid[2])


@needs_kernels
@settings(max_examples=80, deadline=None, derandomize=True)
@given(problems())
def test_kernel_of_any_problem(call) -> None:
    judged(call)


@needs_kernels
def test_the_judgement_sees_a_wrong_key(monkeypatch) -> None:
    """A kernel that saw another block than it was told, or one key too few, would be caught."""
    call = random_call(Shape(queries=40, keys=60), 8, 8, 3)
    wrong_list = call.blocks.clone()
    wrong_list[0, 0, 2, 1] = (wrong_list[0, 0, 2, 1] + 1) % 8
    fewer = torch.ones(2, 2, 60, dtype=torch.bool)
    fewer[0, 0, 8 * int(call.blocks[0, 0].max()) + 1] = False
    for wrong in (dataclasses.replace(call, blocks=wrong_list), dataclasses.replace(call, visible=fewer)):
        monkeypatch.setattr("routed_cases.attend", lambda c, wrong=wrong: routed_attention_reference(wrong))
        with pytest.raises(AssertionError, match="error"):
            judged(call)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("lead", [(), (2,), (2, 3), (2, 1, 2)])
def test_any_leading_dimensions(lead: tuple[int, ...], backend: str) -> None:
    g = torch.Generator().manual_seed(3)
    query, key, value = (torch.randn(*lead, 4, 30, 16, generator=g) for _ in range(3))
    extra = [torch.randn(*lead, 4, 3, 16, generator=g) for _ in range(2)]
    bias = torch.randn(*lead, 4, 1, 3, generator=g)
    lists = torch.randint(-1, 6, (*lead, 4, 4, 2), generator=g)
    mask = torch.rand(*lead, 1, 1, 30, generator=g) > 0.2
    options = {"query_block": 8, "key_block": 5}
    with only_backend(backend):
        ours = routed_attention(
            query, key, value, blocks=lists, extra_key=extra[0], extra_value=extra[1], extra_bias=bias, attn_mask=mask,
            **options
        )  # fmt: skip
        assert ours.shape == query.shape
        flat = [t.reshape(-1, *t.shape[-3:]) for t in (query, key, value, lists, *extra, bias, mask)]
        want = routed_attention(
            *flat[:3], blocks=flat[3], extra_key=flat[4], extra_value=flat[5], extra_bias=flat[6], attn_mask=flat[7],
            **options
        )  # fmt: skip
    torch.testing.assert_close(ours.reshape(want.shape), want)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("lead", [(), (2,), (2, 3)])
def test_lists_and_biases_are_broadcast(lead: tuple[int, ...], backend: str) -> None:
    g = torch.Generator().manual_seed(3)
    query, key, value = (torch.randn(*lead, 4, 30, 16, generator=g) for _ in range(3))
    options = {"query_block": 8, "key_block": 5, "extra_key": key[..., :3, :], "extra_value": value[..., :3, :]}
    full_list, full_bias = (*lead, 4, 4, 2), (*lead, 4, 30, 3)
    with only_backend(backend):
        for places in ((), (-3,), tuple(range(-len(full_list), -2))):
            size = [1 if place - len(full_list) in places else n for place, n in enumerate(full_list)]
            lists = torch.randint(-1, 6, size, generator=g)
            size = [1 if place - len(full_bias) in places else n for place, n in enumerate(full_bias)]
            bias = torch.randn(size, generator=g)
            want = routed_attention(
                query, key, value, blocks=lists.expand(full_list), extra_bias=bias.expand(full_bias), **options
            )
            for shorter in ((lists, bias), (lists.int(), bias.double())):
                got = routed_attention(query, key, value, blocks=shorter[0], extra_bias=shorter[1], **options)
                torch.testing.assert_close(got, want)
            if len(places) == len(full_list) - 2:
                rank_two = routed_attention(query, key, value, blocks=lists.reshape(4, 2), extra_bias=bias, **options)
                assert torch.equal(rank_two, want)


@needs_kernels
def test_expanded_inputs_share_memory() -> None:
    """Also beyond 2^31 elements, which are not there."""
    query, key, value = inputs(Shape(batch=1), exact=False)
    options = {"blocks": random_lists(Shape(batch=1), 8, 8, 3, alike=True), "query_block": 8, "key_block": 8}
    one = routed_attention(query, key, value, **options)
    wide = [t.expand(3, -1, -1, -1) for t in (query, key, value)]
    torch.testing.assert_close(routed_attention(*wide, **options), one.expand(3, -1, -1, -1))
    keys = 1 << 27  # times 16 channels: 2^31 elements
    many = [t[:, :, :1].expand(-1, -1, keys, -1) for t in (key, value)]
    lists = torch.tensor([[0], [keys // 64 - 1]])
    ours = routed_attention(query[:, :, :2], *many, blocks=lists, query_block=1, key_block=64)
    torch.testing.assert_close(ours, value[:, :, :1].expand(-1, -1, 2, -1))


@pytest.mark.parametrize("backend", BACKENDS)
def test_output_joins_heads_without_a_copy(backend: str) -> None:
    joined = attend(random_call(Shape()), backend).transpose(1, 2)
    assert joined.is_contiguous()
    assert joined.reshape(2, 50, -1).data_ptr() == joined.data_ptr()


@needs_kernels
def test_the_same_bits_on_one_thread_and_two() -> None:
    call = random_call(Shape(batch=1, heads=3, key_heads=3, queries=600, keys=300, dim=64), 150, 20, 9, extra=5)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = attend(call)
        torch.set_num_threads(2)
        torch.testing.assert_close(attend(call), one, rtol=0.0, atol=0.0)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("backend", BACKENDS)
def test_uninitialised_memory_is_never_read(backend: str) -> None:
    """torch.empty gives NaN here; the sanitizer job poisons the kernel's own scratch memory as well."""
    calls = [random_call(Shape(queries=37), 10, 7, n, extra=e, hidden=True) for n in (0, 1, 5) for e in (0, 3)]
    want = [attend(call, backend) for call in calls]
    torch.use_deterministic_algorithms(True)  # with it, fill_uninitialized_memory is on
    try:
        for call, expected in zip(calls, want, strict=True):
            assert torch.equal(attend(call, backend), expected)
    finally:
        torch.use_deterministic_algorithms(False)
