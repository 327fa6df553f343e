"""Routed attention's gradients: against float64, of every input, higher orders, what is saved."""

import dataclasses

import pytest
import torch
import torch.nn.functional as F
from attention_cases import BACKENDS, HALVES, LAYOUTS, Shape, inputs, needs_kernels, repeats_bit_for_bit, within_budget
from hypothesis import given, settings
from routed_cases import (
    attend,
    differentiable,
    grads_of,
    in_float64,
    judged_gradients,
    output_gradient,
    random_call,
    requiring_grad,
    with_tensors,
    yardsticks,
)
from test_routed_forward import EXTRAS, SHAPE_NAMES, SHAPES, problems

from regard import routed_attention
from regard.ops import only_backend
from regard.ops.routed import streamed
from regard.ops.routed.reference import routed_attention_reference

TINY = Shape(batch=1, heads=2, key_heads=1, queries=5, keys=7, dim=3, value_dim=2)


@needs_kernels
@pytest.mark.parametrize(("extra", "bias"), EXTRAS[::3])
@pytest.mark.parametrize(("shape", "query_block", "key_block", "length"), SHAPES, ids=SHAPE_NAMES)
def test_kernel_gradients(shape, query_block, key_block, length, extra, bias) -> None:
    judged_gradients(random_call(shape, query_block, key_block, length, extra=extra, bias=bias))


@needs_kernels
@pytest.mark.parametrize("queries", [1, 15, 16, 17, 64, 65, 130])
@pytest.mark.parametrize("bias", ["head", "query"])
def test_kernel_gradients_at_the_borders_of_tiles(queries: int, bias: str) -> None:
    shape = Shape(batch=1, heads=4, queries=queries, keys=60, dim=8, value_dim=8)
    judged_gradients(random_call(shape, 1000, 20, 2, extra=2, bias=bias))


@needs_kernels
@pytest.mark.parametrize("keys", [1, 127, 128, 129, 1024, 1025, 2049, 4100])
def test_kernel_gradients_of_lists_of_any_length(keys: int) -> None:
    """Longer lists leave room for fewer rows of queries at a time."""
    shape = Shape(batch=1, heads=1, key_heads=1, queries=70, keys=keys, dim=8, value_dim=8)
    call = random_call(shape, 100, 100, -(-keys // 100))
    lists = torch.arange(call.blocks.shape[-1]).expand_as(call.blocks)
    judged_gradients(dataclasses.replace(call, blocks=lists))


@needs_kernels
def test_keys_that_thousands_of_tiles_see_keep_their_digits() -> None:
    """Within the budget without its allowance for sums that cancel."""
    shape = Shape(batch=1, heads=1, key_heads=1, queries=20000, keys=64, dim=32, value_dim=32)
    call = random_call(shape, 16, 64, 1, extra=4, bias="head")
    call = dataclasses.replace(call, blocks=torch.zeros_like(call.blocks))
    grad_output = output_gradient(call)
    exact = grads_of(routed_attention_reference, in_float64(call), grad_output.double())
    eager = yardsticks(call, grad_output)[1:]
    for got, rounded, want in zip(grads_of(attend, call, grad_output), eager, exact, strict=True):
        within_budget(got, rounded, want)


@needs_kernels
@pytest.mark.parametrize("dtype", [torch.float32, *HALVES], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_kernel_gradients_of_any_strides_and_dtypes(layout: str, dtype: torch.dtype) -> None:
    shape = Shape(heads=4, queries=50, keys=60, dim=64, value_dim=24)
    call = random_call(shape, 20, 8, 4, dtype=dtype, extra=3, bias="query")
    names = differentiable(call)
    judged_gradients(with_tensors(call, names, [LAYOUTS[layout](getattr(call, name)) for name in names]))


@needs_kernels
@settings(max_examples=40, deadline=None, derandomize=True)
@given(problems())
def test_kernel_gradients_of_any_problem(call) -> None:
    judged_gradients(call)


@pytest.mark.parametrize("block", [1, 3000, 1 << 21])
@pytest.mark.parametrize(("extra", "bias"), EXTRAS)
@pytest.mark.parametrize("hidden", [False, True])
def test_the_paths_gradient_is_the_references(block: int, extra: int, bias, hidden: bool, monkeypatch) -> None:
    """Written out by hand here, by autograd there."""
    monkeypatch.setattr(streamed, "_BLOCK", block)
    shape = Shape(heads=4, queries=21, keys=60, value_dim=9)
    call = in_float64(random_call(shape, 6, 8, 3, extra=extra, bias=bias, hidden=hidden))
    grad_output = output_gradient(call)
    got = grads_of(lambda c: attend(c, "pytorch"), call, grad_output)
    want = grads_of(routed_attention_reference, call, grad_output)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b)


def tiny(extra: int, bias: str | None, hidden: bool):
    return requiring_grad(in_float64(random_call(TINY, 2, 3, 3, extra=extra, bias=bias, hidden=hidden)))


def of_tensors(call, run):
    return lambda *tensors: run(with_tensors(call, differentiable(call), tensors))


RUNS = {"reference": routed_attention_reference, "streamed": lambda call: attend(call, "pytorch")}


@pytest.mark.parametrize("run", RUNS)
@pytest.mark.parametrize(("extra", "bias", "hidden"), [(0, None, False), (2, "head", True), (2, "query", False)])
def test_first_derivatives(run: str, extra: int, bias: str | None, hidden: bool) -> None:
    call, leaves = tiny(extra, bias, hidden)
    assert torch.autograd.gradcheck(of_tensors(call, RUNS[run]), leaves)


@pytest.mark.parametrize("run", RUNS)
@pytest.mark.parametrize(("extra", "bias", "hidden"), [(0, None, True), (2, "head", False), (1, "query", False)])
def test_second_derivatives(run: str, extra: int, bias: str | None, hidden: bool) -> None:
    call, leaves = tiny(extra, bias, hidden)
    assert torch.autograd.gradgradcheck(of_tensors(call, RUNS[run]), leaves)


@needs_kernels
@pytest.mark.parametrize(("extra", "bias"), EXTRAS)
def test_second_derivative_through_the_kernel(extra: int, bias: str | None) -> None:
    """The kernel has no second derivative; the PyTorch path takes it, from the kernel's first."""
    single = random_call(Shape(queries=30), 7, 8, 3, extra=extra, bias=bias)

    def norm_of_gradient(call, backend):
        call, leaves = requiring_grad(call)
        first = torch.autograd.grad(attend(call, backend).square().sum(), leaves, create_graph=True)
        return torch.autograd.grad(sum(f.square().sum() for f in first), leaves)

    for ours, want in zip(
        norm_of_gradient(single, "cpu"), norm_of_gradient(in_float64(single), "pytorch"), strict=True
    ):
        torch.testing.assert_close(ours.double(), want, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("backend", BACKENDS)
def test_hidden_and_unlisted_keys_get_no_gradient(backend: str) -> None:
    call = random_call(Shape(queries=30), 8, 8, 2, hidden=True)
    _, grad_key, grad_value, *_ = grads_of(lambda c: attend(c, backend), call, output_gradient(call))
    listed = torch.stack([(call.blocks == block).flatten(2).any(dim=-1) for block in range(7)], dim=-1)
    shown = call.visible & listed.repeat_interleave(8, dim=-1)[..., :50]
    assert not listed.all()
    assert (grad_key[~shown] == 0).all() and (grad_value[~shown] == 0).all()
    assert (grad_key[shown] != 0).any(dim=-1).all() and (grad_value[shown] != 0).any(dim=-1).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_grouped_heads_sum_their_gradients(backend: str) -> None:
    call = random_call(Shape(heads=6, queries=30, keys=47), 8, 8, 3, extra=2, bias="head")
    names = ("key", "value", "extra_key", "extra_value")
    repeated = with_tensors(call, names, [getattr(call, name).repeat_interleave(3, dim=1) for name in names])
    grad_output = output_gradient(call)
    ours = grads_of(lambda c: attend(c, backend), call, grad_output)
    wide = grads_of(lambda c: attend(c, backend), repeated, grad_output)
    for name, a, b in zip(differentiable(call), ours, wide, strict=True):
        b = b.unflatten(1, (2, 3)).sum(dim=2) if name in names else b
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_where_it_is_dense_attention_so_is_its_gradient(backend: str) -> None:
    tensors = inputs(Shape(dim=64, value_dim=64), exact=False)
    ours, dense = ([t.clone().requires_grad_() for t in tensors] for _ in range(2))
    with only_backend(backend):
        lists = torch.arange(6).expand(8, 6)
        routed_attention(*ours, blocks=lists, query_block=7, key_block=9).square().sum().backward()
    F.scaled_dot_product_attention(*dense).square().sum().backward()
    for a, b in zip(ours, dense, strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("size", [(3,), (1, 3), (30, 3), (2, 1, 3), (1, 1, 1), (2, 30, 1)])
def test_the_bias_gets_its_gradient_over_what_it_was_broadcast_to(backend: str, size: tuple[int, ...]) -> None:
    call = random_call(Shape(queries=30), 8, 8, 2, extra=3)
    bias = torch.randn(size, generator=torch.Generator().manual_seed(0)).requires_grad_()
    full = bias.detach().expand(2, 2, 30, 3).clone().requires_grad_()

    def run(extra_bias):
        return routed_attention(
            call.query, call.key, call.value, blocks=call.blocks, query_block=8, key_block=8,
            extra_key=call.extra_key, extra_value=call.extra_value, extra_bias=extra_bias,
        )  # fmt: skip

    with only_backend(backend):
        (got,) = torch.autograd.grad(run(bias), bias, output_gradient(call))
        (each,) = torch.autograd.grad(run(full), full, output_gradient(call))
    torch.testing.assert_close(got, each.sum_to_size(size), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradient_of_the_output_may_have_any_strides(backend: str) -> None:
    call, leaves = requiring_grad(random_call(Shape(queries=30), extra=2))
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
@pytest.mark.parametrize("wanted", range(6))
def test_one_gradient_alone_is_the_same(backend: str, wanted: int) -> None:
    call = random_call(Shape(queries=30), extra=3, bias="head")
    want = grads_of(lambda c: attend(c, backend), call, output_gradient(call))[wanted]
    name = differentiable(call)[wanted]
    leaf = getattr(call, name).clone().requires_grad_()
    (got,) = torch.autograd.grad(attend(with_tensors(call, [name], [leaf]), backend), leaf, output_gradient(call))
    torch.testing.assert_close(got, want)


@pytest.mark.parametrize("backend", BACKENDS)
def test_nothing_but_the_inputs_is_saved(backend: str) -> None:
    saved = {}

    def pack(tensor):
        saved[tensor.data_ptr()] = tensor.numel()
        return tensor

    call, leaves = requiring_grad(random_call(Shape(batch=1, queries=300, keys=300), 20, 20, 4, extra=3, bias="head"))
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        attend(call, backend)
    for known in (*leaves, call.blocks):
        saved.pop(known.data_ptr(), None)
    assert not saved


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradients_repeat_bit_for_bit(backend: str) -> None:
    """One head on several threads: what they add to a key's gradient is added in order."""
    call = random_call(Shape(batch=1, heads=3, key_heads=1, queries=700, keys=90), 50, 8, 5, extra=3, bias="head")
    grad_output = output_gradient(call)

    repeats_bit_for_bit(lambda: grads_of(lambda c: attend(c, backend), call, grad_output), tolerance=1e-5)
