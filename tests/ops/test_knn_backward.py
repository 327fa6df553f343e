"""k-NN attention's gradients: kernel against float64, the same selection as the forward, higher orders, saved state."""

import pytest
import torch
import torch.nn.functional as F
from attention_cases import LAYOUTS, Shape, inputs, needs_kernels, within_budget
from hypothesis import given, settings
from hypothesis import strategies as st
from knn_cases import call_of, in_float64, term_sizes, yardsticks
from test_knn_forward import problems

from regard import knn_attention
from regard.ops._selection import kept_by_stable_sort
from regard.ops.knn.eager import gradients
from regard.ops.knn.reference import knn_attention_reference


def kernel_gradients(call, grad_output):
    query, key, value = (t.detach().requires_grad_() for t in (call.query, call.key, call.value))
    mask = call.attn_mask
    wanted = [query, key, value]
    if mask is not None and mask.is_floating_point():
        mask = mask.detach().requires_grad_()
        wanted.append(mask)
    output = knn_attention(
        query, key, value, topk=call.topk, attn_mask=mask, is_causal=call.is_causal, scale=call.scale, enable_gqa=True
    )
    return torch.autograd.grad(output, wanted, grad_output)


def check_gradients(call) -> None:
    g = torch.Generator().manual_seed(5)
    shape = (*call.query.shape[:3], call.value.shape[3])
    grad_output = torch.randn(shape, generator=g).to(call.query.dtype)
    exact = gradients(in_float64(call), grad_output.double(), True)
    terms = term_sizes(in_float64(call), grad_output.double())
    _, *eager = yardsticks(call, grad_output)
    for ours, rounded, want, size in zip(kernel_gradients(call, grad_output), eager, exact, terms, strict=False):
        within_budget(ours, rounded, want, size)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("topk", [1, 7, 40, 50])
def test_gradients_in_every_dtype(dtype: torch.dtype, topk: int) -> None:
    check_gradients(call_of(*inputs(Shape(dim=64, value_dim=24), dtype=dtype), topk))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_gradients_of_any_strides(layout: str) -> None:
    check_gradients(call_of(*(LAYOUTS[layout](t) for t in inputs(Shape(heads=4))), 9))


def test_gradient_of_the_output_may_have_any_strides() -> None:
    query, key, value = (t.requires_grad_() for t in inputs(Shape()))
    output = knn_attention(query, key, value, topk=6)
    grad = torch.randn(2, 2, 50, 16, generator=torch.Generator().manual_seed(0))
    plain = torch.autograd.grad(output, (query, key, value), grad, retain_graph=True)
    for layout in LAYOUTS.values():
        for a, b in zip(
            plain, torch.autograd.grad(output, (query, key, value), layout(grad), retain_graph=True), strict=True
        ):
            assert torch.equal(a, b)
    expanded = torch.autograd.grad(output.sum(), (query, key, value))
    torch.testing.assert_close(
        expanded,
        torch.autograd.grad(knn_attention(query, key, value, topk=6), (query, key, value), torch.ones_like(output)),
    )


@settings(max_examples=60, deadline=None, derandomize=True)
@given(problems())
def test_gradients_of_any_problem(call) -> None:
    check_gradients(call)


@pytest.mark.parametrize(
    "size", [(2, 4, 50, 50), (1, 4, 50, 50), (1, 1, 50, 50), (2, 1, 1, 50), (1, 1, 1, 50), (1, 4, 50, 1), (1, 1, 1, 1)]
)
@pytest.mark.parametrize("causal", [False, True])
def test_float_mask_gradient_is_reduced_over_broadcast_dimensions(size: tuple[int, ...], causal: bool) -> None:
    mask = torch.randint(-8, 9, size, generator=torch.Generator().manual_seed(1)) / 8
    check_gradients(call_of(*inputs(Shape(heads=4, key_heads=2)), 9, mask, causal))


def test_a_position_bias_is_trained() -> None:
    query, key, value = inputs(Shape(), exact=False)
    table = torch.randn(2, 99, generator=torch.Generator().manual_seed(0), requires_grad=True)
    index = torch.arange(50)[:, None] - torch.arange(50)[None] + 49
    output = knn_attention(query, key, value, topk=9, attn_mask=table[:, index])
    (ours,) = torch.autograd.grad(output.square().sum(), table)
    call = in_float64(call_of(query, key, value, 9, table.detach()[:, index].unsqueeze(0)))
    wide = call.attn_mask.requires_grad_()
    (want,) = torch.autograd.grad(knn_attention_reference(call).square().sum(), wide)
    folded = torch.zeros(2, 99, dtype=torch.float64).index_put(
        (torch.arange(2)[:, None, None], index[None]), want[0], accumulate=True
    )
    torch.testing.assert_close(ours.double(), folded, rtol=1e-4, atol=1e-5)


def test_one_key_gives_query_and_key_no_gradient() -> None:
    query, key, value = (t.requires_grad_() for t in inputs(Shape(), exact=False))
    grads = torch.autograd.grad(knn_attention(query, key, value, topk=1).square().sum(), (query, key, value))
    # p = 1 up to the rounding of exp(logit - lse), so the two terms cancel up to that.
    assert grads[0].abs().max() < 1e-5 and grads[1].abs().max() < 1e-5
    assert grads[2].abs().max() > 0


@settings(max_examples=40, deadline=None, derandomize=True)
@given(st.integers(2, 300), st.integers(1, 300), st.integers(0, 999), st.booleans())
def test_backward_selects_what_the_forward_selected(keys: int, topk: int, seed: int, causal: bool) -> None:
    """Rows full of ties between logits that do round: the recomputed logits must equal the forward's bit for bit."""
    g = torch.Generator().manual_seed(seed)
    distinct = torch.randn(max(1, keys // 8), 24, generator=g)
    key = distinct[torch.randint(len(distinct), (keys,), generator=g)]
    queries = 37
    query = torch.randn(queries, 24, generator=g)
    # One query a batch element: grad_value is then nonzero exactly where this query's weights are.
    wide_key = key.expand(queries, 1, keys, 24)
    value = torch.ones(queries, 1, keys, 8, requires_grad=True)
    topk = min(topk, keys)
    output = knn_attention(query[:, None, None], wide_key, value, topk=topk)
    (grad,) = torch.autograd.grad(output.sum(), value)
    backward = grad[:, 0, :, 0] > 0
    scores = (query[:, None, None] * 24**-0.5).double() @ wide_key.double().transpose(-1, -2)
    assert torch.equal(backward.sum(-1), torch.full((queries,), topk))
    # By the specification: the kept are the largest up to rounding, and among exact ties the first.
    order = kept_by_stable_sort(scores[:, 0, 0], topk)
    same = (backward == order).all(dim=-1)
    for row in (~same).nonzero().flatten():
        gap = scores[row, 0, 0][order[row]].min() - scores[row, 0, 0][backward[row]].min()
        assert gap.abs() < 1e-5
    # The same rows within one tile, causal or not: forward weights by identity values, backward by grad_value.
    if keys >= 8 and keys <= 256:
        eye = torch.eye(keys)[None, None].requires_grad_()
        weights = knn_attention(query[None, None, :keys], key[None, None], eye, topk=topk, is_causal=causal)
        for row in range(0, weights.shape[2], 7):
            pick = torch.zeros_like(weights)
            pick[0, 0, row] = 1.0
            (grad,) = torch.autograd.grad(weights, eye, pick, retain_graph=True)
            assert torch.equal(grad[0, 0, :, 0] > 0, weights[0, 0, row] > 0)
            torch.testing.assert_close(grad[0, 0, :, 0], weights[0, 0, row].detach())


def test_first_and_second_derivatives_in_float64() -> None:
    query, key, value = (
        t.double().requires_grad_() for t in inputs(Shape(queries=5, keys=7, dim=8, value_dim=8), exact=False)
    )
    bias = torch.randn(1, 2, 5, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(0), requires_grad=True)

    def attend(*tensors):
        return knn_attention(*tensors[:3], topk=3, attn_mask=tensors[3])

    assert torch.autograd.gradcheck(attend, (query, key, value, bias))
    assert torch.autograd.gradgradcheck(attend, (query, key, value, bias))


def test_second_derivative_through_the_kernel() -> None:
    """The kernel has no second derivative; the PyTorch path takes it, from the kernel's first."""

    def norm_of_gradient(dtype):
        query, key, value = (t.to(dtype).requires_grad_() for t in inputs(Shape(), exact=False))
        bias = torch.zeros(50, 50, dtype=dtype, requires_grad=True)
        output = knn_attention(query, key, value, topk=9, attn_mask=bias)
        first = torch.autograd.grad(output.square().sum(), (query, key, value, bias), create_graph=True)
        return torch.autograd.grad(sum(f.square().sum() for f in first), (query, key, value, bias))

    for ours, want in zip(norm_of_gradient(torch.float32), norm_of_gradient(torch.float64), strict=True):
        torch.testing.assert_close(ours.double(), want, rtol=1e-3, atol=1e-4)


@needs_kernels
def test_saved_state_is_linear_in_the_number_of_tokens() -> None:
    saved = []

    def pack(tensor):
        saved.append((tensor.data_ptr(), tensor.numel() * tensor.element_size()))
        return tensor

    query, key, value = (t.requires_grad_() for t in inputs(Shape(batch=1, queries=300, keys=300)))
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        output = knn_attention(query, key, value, topk=40)
    known = {t.data_ptr() for t in (query, key, value, output)}
    extra = sum(size for pointer, size in saved if pointer not in known)
    assert extra == 3 * 4 * 2 * 300  # log-sum-exp, k-th logit and last tie of each row


def test_split_heads_sum_in_a_fixed_order() -> None:
    """One head on several threads: partial sums of the key's gradient are added in order, so runs agree bit for bit."""
    query, key, value = (
        t.requires_grad_() for t in inputs(Shape(batch=1, heads=3, key_heads=1, queries=700, keys=90), exact=False)
    )

    def run():
        output = knn_attention(query, key, value, topk=20, enable_gqa=True)
        return torch.autograd.grad(output.square().sum(), (query, key, value))

    first = run()
    for _ in range(3):
        assert all(torch.equal(a, b) for a, b in zip(first, run(), strict=True))
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        for a, b in zip(first, run(), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
    finally:
        torch.set_num_threads(threads)


def test_all_keys_has_the_gradient_of_dense_attention() -> None:
    tensors = inputs(Shape(dim=64, value_dim=64), exact=False)
    ours = [t.clone().requires_grad_() for t in tensors]
    dense = [t.clone().requires_grad_() for t in tensors]
    knn_attention(*ours, topk=50).square().sum().backward()
    F.scaled_dot_product_attention(*dense).square().sum().backward()
    for a, b in zip(ours, dense, strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-4, atol=1e-5)
