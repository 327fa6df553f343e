"""Multipole attention's gradients: against float64, through the clusters' moments, higher orders, what is saved."""

import dataclasses

import pytest
import torch
import torch.nn.functional as F
from attention_cases import BACKENDS, HALVES, LAYOUTS, Shape, inputs, needs_kernels, repeats_bit_for_bit, within_budget
from hypothesis import given, settings
from multipole_cases import (
    attend,
    clusters_of_sizes,
    even_sizes,
    in_float64,
    kernel_selection,
    random_call,
    taken,
    term_sizes,
    yardsticks,
)
from test_multipole_forward import FAR, SHAPES, problems

from regard import multipole_attention
from regard.ops import only_backend
from regard.ops.multipole import streamed
from regard.ops.multipole.call import clusters_of_keys
from regard.ops.multipole.reference import far_field, multipole_attention_reference

TINY = Shape(batch=1, heads=2, key_heads=1, queries=5, dim=3, value_dim=2)


def requiring_grad(call):
    tensors = [t.detach().requires_grad_() for t in (call.query, call.key, call.value)]
    return dataclasses.replace(call, query=tensors[0], key=tensors[1], value=tensors[2]), tensors


def grads_of(run, call, grad_output):
    call, tensors = requiring_grad(call)
    return torch.autograd.grad(run(call), tensors, grad_output)


def output_gradient(call, seed: int = 5) -> torch.Tensor:
    size = (*call.query.shape[:3], call.value.shape[3])
    return torch.randn(size, generator=torch.Generator().manual_seed(seed)).to(call.query.dtype)


def check_gradients(call) -> None:
    """The kernel's gradients within the error budget, on the clusters that its forward resolved."""
    grad_output = output_gradient(call)
    near = kernel_selection(call)
    exact = grads_of(lambda c: multipole_attention_reference(c, taken(near)), in_float64(call), grad_output.double())
    ours = grads_of(attend, call, grad_output)
    eager, sizes = yardsticks(call, near, grad_output)[1:], term_sizes(call, near, grad_output)[1:]
    for got, rounded, want, size in zip(ours, eager, exact, sizes, strict=True):
        within_budget(got, rounded, want, size)


@needs_kernels
@pytest.mark.parametrize("far", FAR)
@pytest.mark.parametrize("fraction", [0.0, 0.3, 1.0])
@pytest.mark.parametrize(("shape", "sizes"), SHAPES, ids=[f"{s}-{len(c)}" for s, c in SHAPES])
def test_kernel_gradients(shape: Shape, sizes: list[int], fraction: float, far: str) -> None:
    check_gradients(random_call(shape, sizes, round(fraction * len(sizes)), far=far))


@needs_kernels
@pytest.mark.parametrize("queries", [1, 255, 256, 257])
@pytest.mark.parametrize("prefix", [0, 1, 5])
def test_kernel_gradients_at_the_borders_of_tiles(queries: int, prefix: int) -> None:
    shape = Shape(batch=1, queries=max(queries, prefix), dim=8, value_dim=8)
    check_gradients(random_call(shape, [1, 15, 16, 17, 33], 2, prefix=prefix))


@needs_kernels
@pytest.mark.parametrize("dtype", [torch.float32, *HALVES], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_kernel_gradients_of_any_strides_and_dtypes(layout: str, dtype: torch.dtype) -> None:
    call = random_call(Shape(heads=4, queries=50, dim=64, value_dim=24), even_sizes(50, 8), 2, dtype=dtype, prefix=2)
    query, key, value = (LAYOUTS[layout](t) for t in (call.query, call.key, call.value))
    check_gradients(dataclasses.replace(call, query=query, key=key, value=value))


@needs_kernels
@pytest.mark.parametrize("prefix", [0, 4])
@pytest.mark.parametrize("near", [0, 3, 9])
def test_kernel_gradients_with_hidden_keys(near: int, prefix: int) -> None:
    visible = torch.rand(2, 2, 70 + prefix, generator=torch.Generator().manual_seed(4)) > 0.6
    visible[0, 0] = False
    assignment = clusters_of_sizes(even_sizes(70, 9), 2, 2)
    visible[0, 1, prefix:] &= assignment[0, 1] != 3
    call = random_call(Shape(heads=4, queries=30), [1] * 70, near, prefix=prefix, visible=visible)
    check_gradients(dataclasses.replace(call, assignment=assignment, num_clusters=9))


@needs_kernels
@settings(max_examples=40, deadline=None, derandomize=True)
@given(problems())
def test_kernel_gradients_of_any_problem(call) -> None:
    check_gradients(call)


@pytest.mark.parametrize("far", FAR)
@pytest.mark.parametrize("block", [1, 3000, 1 << 21])
@pytest.mark.parametrize("prefix", [0, 3])
@pytest.mark.parametrize("hidden", [False, True])
def test_the_paths_gradient_is_the_references(far: str, block: int, prefix: int, hidden: bool, monkeypatch) -> None:
    """Written out by hand here, by autograd there."""
    monkeypatch.setattr(streamed, "_BLOCK", block)
    visible = None
    if hidden:
        visible = torch.rand(2, 2, 60 + prefix, generator=torch.Generator().manual_seed(1)) > 0.4
        visible[1, 0] = False
    sizes = [*even_sizes(60, 6), 0]
    call = in_float64(
        random_call(Shape(heads=4, queries=21, value_dim=9), sizes, 3, far=far, prefix=prefix, visible=visible)
    )
    grad_output = output_gradient(call)
    got = grads_of(lambda c: attend(c, "pytorch"), call, grad_output)
    want = grads_of(multipole_attention_reference, call, grad_output)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b)


def tiny(far: str, near: int, prefix: int, hidden: bool = False):
    visible = torch.tensor([True] * (5 + prefix) + [False, True]).expand(1, 1, -1) if hidden else None
    return in_float64(random_call(TINY, [3, 1, 3], near, far=far, prefix=prefix, visible=visible))


def of_tensors(call, run):
    return lambda *t: run(dataclasses.replace(call, query=t[0], key=t[1], value=t[2]))


RUNS = {"reference": multipole_attention_reference, "blocks": lambda call: attend(call, "pytorch")}


@pytest.mark.parametrize("run", RUNS)
@pytest.mark.parametrize("far", FAR)
@pytest.mark.parametrize(("near", "prefix", "hidden"), [(0, 0, False), (1, 1, True), (2, 0, True), (3, 2, False)])
def test_first_derivatives(run: str, far: str, near: int, prefix: int, hidden: bool) -> None:
    call, tensors = requiring_grad(tiny(far, near, prefix, hidden))
    assert torch.autograd.gradcheck(of_tensors(call, RUNS[run]), tensors)


@pytest.mark.parametrize("run", RUNS)
@pytest.mark.parametrize("far", FAR)
def test_second_derivatives(run: str, far: str) -> None:
    call, tensors = requiring_grad(tiny(far, 1, 1, True))
    assert torch.autograd.gradgradcheck(of_tensors(call, RUNS[run]), tensors)


@needs_kernels
def test_second_derivative_through_the_kernel() -> None:
    """The kernel has no second derivative; the PyTorch path takes it, from the kernel's first."""
    single = random_call(Shape(queries=30), even_sizes(50, 6), 2, prefix=1)

    def norm_of_gradient(call, backend):
        call, tensors = requiring_grad(call)
        first = torch.autograd.grad(attend(call, backend).square().sum(), tensors, create_graph=True)
        return torch.autograd.grad(sum(f.square().sum() for f in first), tensors)

    for ours, want in zip(
        norm_of_gradient(single, "cpu"), norm_of_gradient(in_float64(single), "pytorch"), strict=True
    ):
        torch.testing.assert_close(ours.double(), want, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("far", FAR)
def test_from_afar_a_cluster_hands_its_gradient_to_all_its_keys(backend: str, far: str) -> None:
    """By mean and mean value equally; by the variance in proportion to how far off the mean they are."""
    call = random_call(Shape(queries=30), even_sizes(50, 6), 0, far=far)
    grads = grads_of(lambda c: attend(c, backend), call, output_gradient(call))
    index = call.clusters.unsqueeze(-1)
    one_hot = F.one_hot(call.clusters, 6).to(torch.float32)
    count = one_hot.sum(dim=2).unsqueeze(-1)
    means = [(one_hot.mT @ g / count).gather(2, index.expand_as(g)) for g in grads[1:]]
    torch.testing.assert_close(grads[2], means[1])
    off = grads[1] - means[0]
    if far == "centroid":
        torch.testing.assert_close(grads[1], means[0])
        return
    assert off.abs().max() > 1e-3  # dropping the variance's gradient would make it zero
    away = call.key - far_field(call).key.gather(2, index.expand_as(call.key))
    factor = (one_hot.mT @ (off * away)) / (one_hot.mT @ away.square())  # one for each cluster and dimension
    torch.testing.assert_close(off, factor.gather(2, index.expand_as(off)) * away, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_assignment_has_no_gradient(backend: str) -> None:
    """The gradient through the public function is the one with the clusters held."""
    query, key, value = inputs(Shape(queries=40, keys=40), exact=False)
    call = dataclasses.replace(random_call(Shape(queries=40), even_sizes(40, 6), 2), query=query, key=key, value=value)
    call = dataclasses.replace(call, assignment=clusters_of_keys(call, 2, None))
    assert not clusters_of_keys(requiring_grad(call)[0], 2, None).requires_grad

    def public(c):
        return multipole_attention(c.query, c.key, c.value, num_clusters=6, near=2, far="gaussian")

    with only_backend(backend):
        grad_output = output_gradient(call)
        for a, b in zip(
            grads_of(public, call, grad_output), grads_of(lambda c: attend(c, backend), call, grad_output), strict=True
        ):
            assert torch.equal(a, b)


@pytest.mark.parametrize("backend", BACKENDS)
def test_hidden_keys_get_no_gradient(backend: str) -> None:
    shown = torch.rand(2, 2, 50, generator=torch.Generator().manual_seed(0)) > 0.5
    call = random_call(Shape(queries=30), even_sizes(50, 6), 2, visible=shown)
    _, grad_key, grad_value = grads_of(lambda c: attend(c, backend), call, output_gradient(call))
    assert (grad_key[~shown] == 0).all() and (grad_value[~shown] == 0).all()
    assert (grad_key[shown] != 0).any(dim=-1).all() and (grad_value[shown] != 0).any(dim=-1).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_grouped_heads_sum_their_gradients(backend: str) -> None:
    call = random_call(Shape(heads=6, queries=30), even_sizes(47, 7), 2, prefix=1)
    repeated = dataclasses.replace(
        call,
        key=call.key.repeat_interleave(3, dim=1),
        value=call.value.repeat_interleave(3, dim=1),
        assignment=call.clusters.repeat_interleave(3, dim=1),
    )
    grad_output = output_gradient(call)
    ours = grads_of(lambda c: attend(c, backend), call, grad_output)
    wide = grads_of(lambda c: attend(c, backend), repeated, grad_output)
    torch.testing.assert_close(ours[0], wide[0])
    for a, b in zip(ours[1:], wide[1:], strict=True):
        torch.testing.assert_close(a, b.unflatten(1, (2, 3)).sum(dim=2), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("options", [{"near": 8}, {"near": 0, "num_clusters": 50}], ids=str)
@pytest.mark.parametrize("far", FAR)
def test_where_it_is_dense_attention_so_is_its_gradient(backend: str, options: dict, far: str) -> None:
    tensors = inputs(Shape(dim=64, value_dim=64), exact=False)
    ours, dense = ([t.clone().requires_grad_() for t in tensors] for _ in range(2))
    with only_backend(backend):
        multipole_attention(*ours, **{"num_clusters": 8, "far": far, **options}).square().sum().backward()
    F.scaled_dot_product_attention(*dense).square().sum().backward()
    for a, b in zip(ours, dense, strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradient_of_the_output_may_have_any_strides(backend: str) -> None:
    call, tensors = requiring_grad(random_call(Shape(queries=30), even_sizes(50, 6), 2, prefix=1))
    output = attend(call, backend)
    grad = output_gradient(call)
    plain = torch.autograd.grad(output, tensors, grad, retain_graph=True)
    for layout in LAYOUTS.values():
        for a, b in zip(plain, torch.autograd.grad(output, tensors, layout(grad), retain_graph=True), strict=True):
            torch.testing.assert_close(a, b)
    expanded = torch.autograd.grad(output.sum(), tensors, retain_graph=True)
    for a, b in zip(expanded, torch.autograd.grad(output, tensors, torch.ones_like(output)), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("wanted", [0, 1, 2])
def test_one_gradient_alone_is_the_same(backend: str, wanted: int) -> None:
    call = random_call(Shape(queries=30), even_sizes(50, 6), 2)
    want = grads_of(lambda c: attend(c, backend), call, output_gradient(call))[wanted]
    tensors = [call.query, call.key, call.value]
    tensors[wanted] = tensors[wanted].clone().requires_grad_()
    call = dataclasses.replace(call, query=tensors[0], key=tensors[1], value=tensors[2])
    (got,) = torch.autograd.grad(attend(call, backend), tensors[wanted], output_gradient(call))
    torch.testing.assert_close(got, want)


@pytest.mark.parametrize("backend", BACKENDS)
def test_what_is_saved_is_linear_in_the_number_of_tokens(backend: str) -> None:
    saved = {}

    def pack(tensor):
        saved[tensor.data_ptr()] = tensor.numel()
        return tensor

    call, tensors = requiring_grad(random_call(Shape(batch=1, queries=300), even_sizes(300, 20), 4))
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        output = attend(call, backend)
    for known in (*tensors, output, call.assignment):
        saved.pop(known.data_ptr(), None)
    assert sum(saved.values()) <= 4 * 2 * 300  # at most a few numbers for each row


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradients_repeat_bit_for_bit(backend: str) -> None:
    """One head on several threads: what they add to a key's gradient is added in order."""
    call = random_call(Shape(batch=1, heads=3, key_heads=1, queries=700), even_sizes(90, 9), 2)
    grad_output = output_gradient(call)

    repeats_bit_for_bit(lambda: grads_of(lambda c: attend(c, backend), call, grad_output), tolerance=1e-5)
