"""k-NN attention's Triton kernels under the interpreter, in the operators' place on the CPU: forward, state, gradients.

The tests that are imported here run a second time, on these kernels.
"""

from collections.abc import Iterator

import pytest
import torch
from attention_cases import HALVES, LAYOUTS, Shape, inputs
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from knn_cases import call_of
from test_knn_backward import check_gradients
from test_knn_edges import (  # noqa: F401
    test_a_fully_masked_row_is_zero_and_has_no_gradient,
    test_a_nan_key_spoils_its_head_as_in_dense_attention,
    test_a_query_that_is_not_finite_spoils_its_own_row_only,
    test_logits_of_minus_infinity_are_hidden_keys,
    test_one_token,
    test_zero_and_negative_scales,
)
from test_knn_forward import (  # noqa: F401
    state_agrees,
    test_ties_go_to_the_lowest_index,
)

from regard import knn_attention
from regard.ops._selection import kept_by_stable_sort, selection_state
from regard.ops._triton import Config, only_config
from regard.ops.knn import triton as kernels
from regard.ops.knn import triton_forward
from regard.ops.knn.op import knn_attention_op

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")  # torch says that an implementation is overridden


@pytest.fixture(autouse=True, scope="module")
def in_the_operators_place() -> Iterator[None]:
    with torch.library._scoped_library("regard", "IMPL") as library:
        for name, launcher in (("knn_attention", kernels.forward), ("knn_attention_backward", kernels.backward)):
            library.impl(name, launcher, "CPU", allow_override=True)
        with only_config(Config.of(ROWS=16, KEYS=16)):
            yield


@pytest.mark.parametrize("fraction", [0.01, 0.3, pytest.param(0.7, marks=pytest.mark.slow), 1.0])
@pytest.mark.parametrize(
    "shape",
    [
        Shape(1, 1, 1, 1, 1),
        Shape(2, 2, 1, 19, 37, 16, 40),
        Shape(1, 1, 1, 33, 150, 64, 8),
        Shape(1, 1, 1, 5, 50, 256, 256),
    ],
    ids=str,
)
def test_equals_the_specification(shape: Shape, fraction: float) -> None:
    state_agrees(call_of(*inputs(shape), max(1, int(shape.keys * fraction))))


@pytest.mark.parametrize(
    ("layout", "dtype"), zip(LAYOUTS, (torch.float32, *HALVES, torch.bfloat16), strict=True), ids=str
)
def test_any_strides_and_dtypes(layout: str, dtype: torch.dtype) -> None:
    call = call_of(*(LAYOUTS[layout](t) for t in inputs(Shape(1, 2, 1, 18, 33, 16, 24), dtype=dtype)), 9)
    state_agrees(call)
    check_gradients(call)


@pytest.mark.parametrize("topk", [1, 7, 33])
def test_gradients_of_every_dtype(topk: int) -> None:
    for dtype in (torch.float32, *HALVES):
        check_gradients(call_of(*inputs(Shape(1, 2, 2, 20, 33, 40, 24), dtype=dtype, exact=False), topk))


def test_masks_of_any_strides_and_expanded_inputs() -> None:
    query, key, value = (t.expand(2, -1, -1, -1) for t in inputs(Shape(1, 2, 2, 20, 20)))
    allowed = torch.rand(20, 20, generator=torch.Generator().manual_seed(2)) > 0.4
    by_bool = knn_attention(query, key, value, topk=8, attn_mask=allowed)
    assert torch.equal(by_bool[0], by_bool[1])
    assert by_bool.transpose(1, 2).is_contiguous()  # heads are joined without a copy
    assert torch.equal(by_bool, knn_attention(query, key, value, topk=8, attn_mask=allowed.t().contiguous().t()))
    bias = torch.zeros(20, 20).masked_fill(~allowed, float("-inf"))
    assert torch.equal(by_bool, knn_attention(query, key, value, topk=8, attn_mask=bias))


def test_one_key_hands_over_its_value_and_gives_query_and_key_no_gradient() -> None:
    query, key, value = (t.requires_grad_() for t in inputs(Shape(1, 1, 1, 20, 30), exact=False))
    output = knn_attention(query, key, value, topk=1)
    assert torch.equal(output, value[:, :, (query @ key.mT).argmax(dim=-1)[0, 0]])
    grads = torch.autograd.grad(output.square().sum(), (query, key, value))
    # The gradient of the weight is exactly its mean over the one kept key.
    assert (grads[0] == 0).all() and (grads[1] == 0).all() and grads[2].abs().max() > 0


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("topk", [4, 15])
def test_a_boolean_mask(topk: int, causal: bool) -> None:
    mask = torch.rand(2, 1, 20, 20, generator=torch.Generator().manual_seed(1)) > 0.5
    mask[0, :, 3] = False  # a row that sees nothing
    call = call_of(*inputs(Shape(2, 2, 1, 20, 20)), topk, mask, causal)
    state_agrees(call)
    check_gradients(call)


@pytest.mark.parametrize(
    ("size", "causal"),
    [((2, 2, 18, 18), False), ((1, 2, 18, 18), True), ((1, 1, 18, 18), False), ((2, 1, 1, 18), True)]
    + [((1, 1, 1, 18), False), ((1, 2, 18, 1), True), ((1, 1, 1, 1), True)],
)
def test_a_float_mask_and_its_gradient(size: tuple[int, ...], causal: bool) -> None:
    mask = torch.randint(-8, 9, size, generator=torch.Generator().manual_seed(1)) / 8
    call = call_of(*inputs(Shape(2, 2, 1, 18, 18)), 5, mask, causal)
    state_agrees(call)
    check_gradients(call)


KINDS = ("normal", "few", "heavy", "equal", "tiny", "huge", "hidden")


def awkward(kind: str, keys: int, g: torch.Generator) -> torch.Tensor:
    """Logits that interpolation likes least."""
    row = torch.randn(keys, generator=g)
    if kind == "few":
        return row.round()
    if kind == "heavy":
        return row.sign() * torch.exp2(-torch.arange(keys) % 120 - 3.0)
    if kind == "equal":
        return torch.zeros(keys) * torch.where(torch.arange(keys) % 2 == 0, 1.0, -1.0)  # zeros of both signs
    if kind == "tiny":
        return row * 1e-39
    if kind == "huge":
        return row.clamp(-3, 3) * 1e38
    return row.masked_fill(torch.rand(keys, generator=g) > 0.3, -torch.inf) if kind == "hidden" else row


@pytest.mark.slow
@settings(max_examples=20, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(st.integers(1, 300), st.floats(0.001, 1.0), st.integers(0, 1000))
def test_selection_of_awkward_rows(keys: int, fraction: float, seed: int) -> None:
    """The k-th logit and the last tie to the bit: the logits are a mask's, so nothing rounds."""
    g = torch.Generator().manual_seed(seed)
    mask = torch.stack([awkward(kind, keys, g) for kind in KINDS])
    topk = max(1, int(keys * fraction))
    query, key, value = torch.zeros(1, 1, len(KINDS), 8), torch.zeros(1, 1, keys, 8), torch.zeros(1, 1, keys, 8)
    _, _, kth, tie = knn_attention_op(query, key, value, mask[None, None], topk, False, 1.0)
    _, want_kth, want_tie = selection_state(mask, kept_by_stable_sort(mask, topk), topk)
    assert torch.equal(kth[0, 0], want_kth) and torch.equal(tie[0, 0], want_tie)


def test_selection_of_every_kind_of_row() -> None:
    test_selection_of_awkward_rows.hypothesis.inner_test(100, 0.2, 0)


@pytest.mark.parametrize("size", [(0, 2, 5, 7), (2, 0, 5, 7), (1, 2, 0, 7), (1, 2, 5, 0), (0, 0, 0, 0)])
def test_nothing_to_attend(size: tuple[int, int, int, int]) -> None:
    batch, heads, queries, keys = size
    query, key, value = inputs(Shape(batch, heads, heads, queries, keys, 16, 24))
    topk = min(3, keys)
    output, lse, kth, tie = knn_attention_op(query, key, value, None, topk, False, 0.25)
    assert output.shape == (batch, heads, queries, 24) and (output == 0).all()
    assert (lse == -torch.inf).all() and (kth == -torch.inf).all() and (tie == -1).all()
    backward = torch.ops.regard.knn_attention_backward
    grads = backward(output, query, key, value, None, lse, kth, tie, topk, False, 0.25, False)
    assert [g.shape for g in grads[:3]] == [t.shape for t in (query, key, value)]
    assert all((g == 0).all() for g in grads)


def test_backward_selects_what_the_forward_selected() -> None:
    """Rows full of ties between logits that do round, over many tiles: the logits must be the same bit for bit."""
    g = torch.Generator().manual_seed(0)
    distinct = torch.randn(12, 24, generator=g)
    key = distinct[torch.randint(12, (100,), generator=g)].expand(1, 1, 100, 24)
    query = torch.randn(1, 1, 18, 24, generator=g)
    eye = torch.eye(100)[None, None].requires_grad_()
    weights = knn_attention_op(query, key, eye, None, 17, False, 24**-0.5)[0]
    assert ((weights > 0).sum(dim=-1) == 17).all()
    for row in range(0, 18, 4):
        pick = torch.zeros_like(weights)
        pick[0, 0, row] = 1.0
        (grad,) = torch.autograd.grad(weights, eye, pick, retain_graph=True)
        torch.testing.assert_close(grad[0, 0, :, 0], weights[0, 0, row].detach())


@pytest.mark.parametrize(("topk", "ties", "most"), [(128, False, 5), (1024, False, 5), (128, True, 7)])
def test_selection_takes_few_passes(topk: int, ties: bool, most: int, monkeypatch) -> None:
    """Of 2,048 keys: what they cost is what the GPU's time is spent on."""
    tiles = 0

    def counted(*args):
        nonlocal tiles
        tiles += 1
        return triton_logits_of_tile(*args)

    triton_logits_of_tile = triton_forward.logits_of_tile
    monkeypatch.setattr(triton_forward, "logits_of_tile", counted)
    query, key, value = inputs(Shape(1, 1, 1, 16, 2048, 16, 16), exact=ties)
    with only_config(Config.of(ROWS=16, KEYS=64)):
        kernels.forward(query, key, value, None, topk, False, 0.25)
    passes = (tiles - triton_forward.SAMPLES.value) / 32
    assert passes <= most, f"{passes} passes, the last one for the values"
