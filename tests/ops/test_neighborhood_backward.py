"""Neighborhood attention's gradients: within the error budget, of the bias too; higher orders; what is saved."""

import dataclasses

import pytest
import torch
from attention_cases import BACKENDS, HALVES, LAYOUTS, Shape, needs_kernels, repeats_bit_for_bit
from hypothesis import given, settings
from neighborhood_cases import (
    attend,
    grads_of,
    in_float64,
    judged_gradients,
    output_gradient,
    pattern_of,
    problems,
    random_call,
    requiring_grad,
)
from test_neighborhood_forward import SMALL, every_pattern

from regard.ops.neighborhood import streamed
from regard.ops.neighborhood.reference import neighborhood_attention_reference
from regard.ops.neighborhood.windows import BORDERS


@needs_kernels
@every_pattern
@pytest.mark.parametrize("border", BORDERS)
def test_kernel_gradients(pattern, border: str) -> None:
    judged_gradients(random_call(dataclasses.replace(pattern, border=border), SMALL, bias=True))


@needs_kernels
@pytest.mark.parametrize("dtype", [torch.float32, *HALVES], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_kernel_gradients_of_any_strides_and_dtypes(layout: str, dtype: torch.dtype) -> None:
    shape = Shape(batch=2, heads=4, key_heads=2, dim=32, value_dim=24)
    call = random_call(pattern_of((9, 18), 5), shape, prefix=2, bias=True, dtype=dtype)
    query, key, value = (LAYOUTS[layout](t) for t in (call.query, call.key, call.value))
    judged_gradients(dataclasses.replace(call, query=query, key=key, value=value))


@needs_kernels
@pytest.mark.parametrize("prefix", [1, 5])
@pytest.mark.parametrize("hidden", [False, True])
@pytest.mark.parametrize("border", BORDERS)
def test_kernel_gradients_with_prefix_tokens(prefix: int, hidden: bool, border: str) -> None:
    shape = Shape(heads=4, key_heads=2)
    judged_gradients(random_call(pattern_of((7, 19), 3, border=border), shape, prefix=prefix, bias=True, hidden=hidden))


@needs_kernels
def test_kernel_gradients_of_a_large_window_with_prefix_tokens() -> None:
    judged_gradients(random_call(pattern_of((310,), 280), SMALL, prefix=3))


@needs_kernels
@settings(max_examples=60, deadline=None, derandomize=True)
@given(problems())
def test_kernel_gradients_of_any_problem(call) -> None:
    judged_gradients(call)


@settings(max_examples=20, deadline=None, derandomize=True)
@given(problems())
def test_the_paths_gradient_is_the_references_on_any_problem(call) -> None:
    """Written out by hand here, by autograd there."""
    call = in_float64(call)
    grad_output = output_gradient(call)
    got = grads_of(lambda c: attend(c, "pytorch"), call, grad_output)
    want = grads_of(neighborhood_attention_reference, call, grad_output)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("block", [1, 3000])
def test_the_paths_gradient_in_blocks_of_any_size(block: int, monkeypatch) -> None:
    call = in_float64(random_call(pattern_of((6, 9), 3), Shape(heads=4), prefix=3, bias=True, hidden=True))
    grad_output = output_gradient(call)
    want = grads_of(lambda c: attend(c, "pytorch"), call, grad_output)
    monkeypatch.setattr(streamed, "_BLOCK", block)
    for a, b in zip(grads_of(lambda c: attend(c, "pytorch"), call, grad_output), want, strict=True):
        torch.testing.assert_close(a, b)


def of_leaves(call, run):
    def function(query, key, value, bias):
        return run(dataclasses.replace(call, query=query, key=key, value=value, attn_bias=bias))

    return function


RUNS = {"reference": neighborhood_attention_reference, "blocks": lambda call: attend(call, "pytorch")}


@pytest.mark.parametrize("run", RUNS)
@pytest.mark.parametrize("border", BORDERS)
def test_first_and_second_derivatives(run: str, border: str) -> None:
    pattern = pattern_of((3, 4), (3, 2), (1, 2), (2, 1), (False, True), border)
    shape = Shape(batch=1, heads=2, key_heads=1, dim=2, value_dim=2)
    call, leaves = requiring_grad(in_float64(random_call(pattern, shape, prefix=1, bias=True, hidden=True)))
    assert torch.autograd.gradcheck(of_leaves(call, RUNS[run]), leaves, fast_mode=True)
    assert torch.autograd.gradgradcheck(of_leaves(call, RUNS[run]), leaves, fast_mode=True)


@needs_kernels
def test_second_derivative_through_the_kernel() -> None:
    """The kernel has no second derivative; the reference takes it, from the kernel's first."""
    single = random_call(pattern_of((5, 7), 3), prefix=1, bias=True)

    def norm_of_gradient(call, backend):
        call, leaves = requiring_grad(call)
        first = torch.autograd.grad(attend(call, backend).square().sum(), leaves, create_graph=True)
        return torch.autograd.grad(sum(f.square().sum() for f in first), leaves)

    for ours, want in zip(
        norm_of_gradient(single, "cpu"), norm_of_gradient(in_float64(single), "pytorch"), strict=True
    ):
        torch.testing.assert_close(ours.double(), want, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("backend", BACKENDS)
def test_hidden_keys_get_no_gradient(backend: str) -> None:
    call = random_call(pattern_of((6, 7), 3), prefix=2, hidden=True)
    _, grad_key, grad_value = grads_of(lambda c: attend(c, backend), call, output_gradient(call))
    shown = call.visible[:, None].expand(-1, 2, -1)
    assert (grad_key[~shown] == 0).all() and (grad_value[~shown] == 0).all()
    assert (grad_value[shown] != 0).any(dim=-1).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradient_of_the_output_may_have_any_strides(backend: str) -> None:
    call, leaves = requiring_grad(random_call(pattern_of((5, 8), 3), prefix=1, bias=True))
    output = attend(call, backend)
    grad = output_gradient(call)
    plain = torch.autograd.grad(output, leaves, grad, retain_graph=True)
    for layout in LAYOUTS.values():
        for a, b in zip(plain, torch.autograd.grad(output, leaves, layout(grad), retain_graph=True), strict=True):
            torch.testing.assert_close(a, b)
    expanded = torch.autograd.grad(output.sum(), leaves, retain_graph=True)
    for a, b in zip(expanded, torch.autograd.grad(output, leaves, torch.ones_like(output)), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("wanted", [0, 1, 2, 3])
def test_one_gradient_alone_is_the_same(backend: str, wanted: int) -> None:
    call = random_call(pattern_of((5, 8), 3), prefix=1, bias=True)
    want = grads_of(lambda c: attend(c, backend), call, output_gradient(call))[wanted]
    name = ("query", "key", "value", "attn_bias")[wanted]
    leaf = getattr(call, name).clone().requires_grad_()
    (got,) = torch.autograd.grad(
        attend(dataclasses.replace(call, **{name: leaf}), backend), leaf, output_gradient(call)
    )
    torch.testing.assert_close(got, want)


@pytest.mark.parametrize("backend", BACKENDS)
def test_nothing_but_the_inputs_is_saved(backend: str) -> None:
    saved = {}

    def pack(tensor):
        saved[tensor.data_ptr()] = tensor.numel()
        return tensor

    call, leaves = requiring_grad(random_call(pattern_of((12, 13), 7), bias=True))
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        attend(call, backend)
    assert saved.keys() <= {t.data_ptr() for t in leaves}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("grid", [(31, 20), (700,)])
def test_gradients_repeat_bit_for_bit(backend: str, grid: tuple[int, ...]) -> None:
    """One head on several threads: what they add to a key's gradient is added in order."""
    call = random_call(pattern_of(grid, 5), Shape(batch=1, heads=3, key_heads=1), prefix=1, bias=True)
    grad_output = output_gradient(call)

    repeats_bit_for_bit(lambda: grads_of(lambda c: attend(c, backend), call, grad_output), tolerance=1e-4)
