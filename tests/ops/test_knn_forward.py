"""k-NN attention's output: against its reference in float64, and the identities of its definition."""

import pytest
import torch
import torch.nn.functional as F
from attention_cases import HALVES, LAYOUTS, Shape, inputs, needs_kernels, within_budget
from hypothesis import given, settings
from hypothesis import strategies as st
from knn_cases import call_of, exact_output, in_float64, output_terms, yardsticks

from regard import knn_attention
from regard.ops._selection import kept_by_stable_sort, kept_by_threshold
from regard.ops.knn.eager import attend_with_state
from regard.ops.knn.op import knn_attention_op


def state_agrees(call) -> None:
    """Output within the budget; log-sum-exp, k-th logit and last tie as the specification has them."""
    output, lse, kth, tie = knn_attention_op(
        call.query, call.key, call.value, call.attn_mask, call.topk, call.is_causal, call.scale
    )
    _, want_lse, want_kth, want_tie = attend_with_state(in_float64(call))
    within_budget(output, yardsticks(call)[0], exact_output(call), output_terms(call))
    torch.testing.assert_close(lse.double(), want_lse, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(kth.double(), want_kth, rtol=1e-6, atol=1e-6)
    assert torch.equal(tie.long(), want_tie.long())


SHAPES = [
    Shape(),
    Shape(batch=1, heads=1, key_heads=1, queries=1, keys=1),
    Shape(queries=7, keys=97, dim=64, value_dim=40),
    Shape(heads=6, key_heads=2, queries=33, keys=130, dim=64, value_dim=64),
    Shape(batch=1, queries=197, keys=197, dim=64, value_dim=64),
    Shape(batch=1, heads=1, key_heads=1, queries=20, keys=700, dim=256, value_dim=256),
    Shape(batch=1, heads=1, key_heads=1, queries=300, keys=300, dim=16, value_dim=8),
]


@pytest.mark.parametrize("fraction", [0.01, 0.1, 0.5, 0.7, 1.0])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_equals_the_specification(shape: Shape, fraction: float) -> None:
    query, key, value = inputs(shape)
    state_agrees(call_of(query, key, value, max(1, int(shape.keys * fraction))))


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("topk", [5, 40])
def test_any_strides_and_dtypes(layout: str, dtype: torch.dtype, topk: int) -> None:
    query, key, value = (LAYOUTS[layout](t) for t in inputs(Shape(dim=64, value_dim=24), dtype=dtype))
    state_agrees(call_of(query, key, value, topk))


def test_expanded_inputs_share_memory() -> None:
    query, key, value = inputs(Shape(batch=1))
    wide = [t.expand(3, -1, -1, -1) for t in (query, key, value)]
    one = knn_attention(query, key, value, topk=9)
    assert torch.equal(knn_attention(*wide, topk=9), one.expand(3, -1, -1, -1))


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("kind", ["bool", "float", "row", "column", "per_head", "scalar"])
@pytest.mark.parametrize("topk", [6, 45])
def test_masks(kind: str, causal: bool, topk: int) -> None:
    shape = Shape(heads=4, key_heads=2, queries=50, keys=50, dim=16)
    g = torch.Generator().manual_seed(1)
    sizes = {"row": (1, 1, 1, 50), "column": (2, 1, 50, 1), "per_head": (1, 4, 50, 50), "scalar": (1, 1, 1, 1)}
    if kind == "bool":
        mask = torch.rand(2, 1, 50, 50, generator=g) > 0.5
        mask[0, :, 3] = False  # a row that sees nothing
    else:
        mask = torch.randint(-8, 9, sizes.get(kind, (2, 4, 50, 50)), generator=g) / 8
    query, key, value = inputs(shape)
    call = call_of(query, key, value, topk, mask, causal)
    state_agrees(call)
    if kind == "bool":
        assert (
            knn_attention(query, key, value, topk=topk, attn_mask=mask, is_causal=causal, enable_gqa=True)[0, :, 3] == 0
        ).all()


def test_mask_with_strides_and_minus_infinity() -> None:
    query, key, value = inputs(Shape())
    allowed = torch.rand(50, 50, generator=torch.Generator().manual_seed(2)) > 0.4
    bias = torch.zeros(50, 50).masked_fill(~allowed, float("-inf"))
    by_bool = knn_attention(query, key, value, topk=8, attn_mask=allowed)
    assert torch.equal(by_bool, knn_attention(query, key, value, topk=8, attn_mask=bias))
    strided = allowed.t().contiguous().t()
    assert torch.equal(by_bool, knn_attention(query, key, value, topk=8, attn_mask=strided))
    assert torch.equal(by_bool, knn_attention(query, key, value, topk=8, attn_mask=bias.to(torch.bfloat16)))
    assert torch.equal(by_bool, knn_attention(query, key, value, topk=8, attn_mask=bias.double()))


@st.composite
def problems(draw):
    groups = draw(st.integers(1, 3))
    key_heads = draw(st.integers(1, 2))
    shape = Shape(
        batch=draw(st.integers(1, 2)),
        heads=groups * key_heads,
        key_heads=key_heads,
        queries=draw(st.integers(1, 70)),
        keys=draw(st.integers(1, 150)),
        dim=draw(st.sampled_from([16, 64])),
        value_dim=draw(st.integers(8, 70)),
    )
    dtype = draw(st.sampled_from([torch.float32, *HALVES]))
    tensors = [
        LAYOUTS[draw(st.sampled_from(sorted(LAYOUTS)))](t)
        for t in inputs(shape, seed=draw(st.integers(0, 99)), dtype=dtype)
    ]
    if draw(st.booleans()):  # all keys alike: every logit ties
        tensors[1] = tensors[1][:, :, :1].expand_as(tensors[1])
    mask = None
    if draw(st.booleans()):
        size = [draw(st.sampled_from([1, n])) for n in (shape.batch, shape.heads, shape.queries, shape.keys)]
        g = torch.Generator().manual_seed(draw(st.integers(0, 99)))
        mask = (
            torch.rand(size, generator=g) > 0.3 if draw(st.booleans()) else torch.randint(-8, 9, size, generator=g) / 8
        )
    return call_of(*tensors, draw(st.integers(1, shape.keys)), mask, draw(st.booleans()))


@settings(max_examples=120, deadline=None, derandomize=True)
@given(problems())
def test_any_problem_equals_the_specification(call) -> None:
    state_agrees(call)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    st.integers(1, 400),
    st.floats(0.001, 1.0),
    st.integers(0, 1000),
    st.sampled_from(["few", "heavy", "equal", "tiny", "huge"]),
)
def test_selection_of_awkward_rows(keys: int, fraction: float, seed: int, kind: str) -> None:
    """Rows that interpolation likes least: few distinct values, exponential tails, extremes of the range."""
    g = torch.Generator().manual_seed(seed)
    row = torch.randn(keys, generator=g)
    if kind == "few":
        row = row.round()
    elif kind == "heavy":
        row = row.sign() * torch.exp2(-torch.arange(keys) % 120 - 3.0)
    elif kind == "equal":
        row = torch.zeros(keys) * torch.where(torch.arange(keys) % 2 == 0, 1.0, -1.0)
    elif kind == "tiny":
        row = row * 1e-39
    else:
        row = row.clamp(-3, 3) * 1e38
    topk = max(1, int(keys * fraction))
    query = torch.zeros(1, 1, 1, 8)
    query[..., 0] = 1.0
    key = torch.zeros(1, 1, keys, 8)
    key[..., 0] = row
    values = torch.eye(keys)
    kept = torch.cat(
        [knn_attention(query, key, _columns(values, c), topk=topk, scale=1.0)[0, 0, 0] > 0 for c in range(0, keys, 128)]
    )[:keys]
    want = kept_by_stable_sort(row, topk)
    # Weights that underflow are zero although their keys are kept.
    visible = (row.double() - row.double().max()).exp() > 1e-30
    assert torch.equal(kept & visible, want & visible)
    assert torch.equal(kept_by_threshold(row, topk), want)


def _columns(values: torch.Tensor, start: int) -> torch.Tensor:
    block = torch.zeros(1, 1, values.shape[0], 128)
    part = values[:, start : start + 128]
    block[0, 0, :, : part.shape[1]] = part
    return block


def attention_matrix(query: torch.Tensor, key: torch.Tensor, topk: int) -> torch.Tensor:
    keys = key.shape[2]
    assert 8 <= keys <= 256
    return knn_attention(query, key, torch.eye(keys).expand(*key.shape[:2], keys, keys), topk=topk)


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES], ids=str)
def test_all_keys_is_dense_attention(dtype: torch.dtype) -> None:
    query, key, value = inputs(Shape(dim=64, value_dim=64), dtype=dtype, exact=False)
    ours = knn_attention(query, key, value, topk=1.0)
    dense = F.scaled_dot_product_attention(query, key, value)
    exact = F.scaled_dot_product_attention(query.double(), key.double(), value.double())
    within_budget(ours, [dense], exact)
    assert torch.equal(ours, knn_attention(query, key, value, topk=10**9))


def test_one_key_hands_over_the_value_of_the_largest_logit() -> None:
    query, key, value = inputs(Shape(), exact=False)
    best = (query @ key.transpose(-1, -2)).argmax(dim=-1)
    want = value.gather(2, best.unsqueeze(-1).expand(-1, -1, -1, value.shape[-1]))
    assert torch.equal(knn_attention(query, key, value, topk=1), want)


def test_each_row_keeps_exactly_k_and_sums_to_one() -> None:
    query, key, _ = inputs(Shape(keys=64), exact=True)  # full of ties
    weights = attention_matrix(query, key, 13)
    assert ((weights > 0).sum(dim=-1) == 13).all()
    torch.testing.assert_close(weights.sum(dim=-1), torch.ones(weights.shape[:-1]))


def test_ties_go_to_the_lowest_index() -> None:
    query, key = torch.ones(1, 1, 5, 8), torch.ones(1, 1, 40, 8)
    weights = attention_matrix(query, key, 7)
    assert torch.equal(weights[0, 0, 0] > 0, torch.arange(40) < 7)


def test_order_of_keys_does_not_matter() -> None:
    query, key, value = inputs(Shape(), exact=False)
    order = torch.randperm(50, generator=torch.Generator().manual_seed(0))
    ours = knn_attention(query, key, value, topk=11)
    torch.testing.assert_close(knn_attention(query, key[:, :, order], value[:, :, order], topk=11), ours)
    assert torch.equal(knn_attention(query[:, :, order], key, value, topk=11), ours[:, :, order])


def test_a_constant_bias_changes_nothing() -> None:
    query, key, value = inputs(Shape())
    ours = knn_attention(query, key, value, topk=11)
    shifted = knn_attention(query, key, value, topk=11, attn_mask=torch.full((50, 1), 4.0))
    torch.testing.assert_close(shifted, ours)


def test_keys_of_one_length_are_nearest_neighbours() -> None:
    """KVT's definition by Euclidean distance is the same for unit keys (arXiv 2106.00515, the "slow version")."""
    query, key, value = inputs(Shape(dim=64), exact=False)
    key = F.normalize(key, dim=-1)
    nearest = torch.cdist(query, key).topk(9, largest=False).indices
    mask = torch.zeros(2, 2, 50, 50, dtype=torch.bool).scatter(-1, nearest, True)
    slow = F.scaled_dot_product_attention(query, key, value, attn_mask=mask)
    torch.testing.assert_close(knn_attention(query, key, value, topk=9), slow)


@pytest.mark.parametrize("lead", [(), (2,), (2, 3), (2, 1, 2)])
def test_any_leading_dimensions(lead: tuple[int, ...]) -> None:
    g = torch.Generator().manual_seed(3)
    query, key, value = (torch.randn(*lead, 4, 30, 16, generator=g) for _ in range(3))
    bias = torch.randn(*lead[:-1], *(1,) * len(lead[-1:]), 4, 30, 30, generator=g)
    ours = knn_attention(query, key, value, topk=6, attn_mask=bias)
    assert ours.shape == query.shape
    flat = [t.expand(*lead, 4, 30, t.shape[-1]).reshape(-1, 4, 30, t.shape[-1]) for t in (query, key, value, bias)]
    want = knn_attention(*flat[:3], topk=6, attn_mask=flat[3])
    assert torch.equal(ours.reshape(want.shape), want)


@needs_kernels
def test_output_joins_heads_without_a_copy() -> None:
    query, key, value = inputs(Shape())
    joined = knn_attention(query, key, value, topk=5).transpose(1, 2)
    assert joined.is_contiguous()
    assert joined.reshape(2, 50, -1).data_ptr() == joined.data_ptr()


def test_fraction_counts_all_keys() -> None:
    query, key, value = inputs(Shape(keys=100))
    for fraction, count in ((0.07, 7), (0.071, 8), (1e-9, 1), (0.5, 50), (1.0, 100)):
        assert torch.equal(
            knn_attention(query, key, value, topk=fraction), knn_attention(query, key, value, topk=count)
        )


@needs_kernels
def test_the_same_bits_on_one_thread_and_two() -> None:
    query, key, value = inputs(Shape(batch=1, heads=3, key_heads=3, queries=200, keys=200), exact=False)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = knn_attention(query, key, value, topk=20)
        torch.set_num_threads(2)
        assert torch.equal(knn_attention(query, key, value, topk=20), one)
    finally:
        torch.set_num_threads(threads)


def test_uninitialised_memory_is_never_read() -> None:
    """torch.empty gives NaN here; the sanitizer job poisons the kernels' own scratch memory as well."""
    query, key, value = inputs(Shape(queries=37, keys=83), exact=False)
    want = [knn_attention(query, key, value, topk=k) for k in (5, 70)]
    torch.use_deterministic_algorithms(True)  # with it, fill_uninitialized_memory is on
    try:
        for k, expected in zip((5, 70), want, strict=True):
            assert torch.equal(knn_attention(query, key, value, topk=k), expected)
    finally:
        torch.use_deterministic_algorithms(False)
