"""Multipole attention inside PyTorch: operator checks, compile, export, autocast, transforms, memory, FLOPs."""

import dataclasses

import pytest
import torch
import torch.nn.functional as F
from attention_cases import (
    BACKENDS,
    Largest,
    Shape,
    inputs,
    is_the_same_without_kernels,
    keeps_one_graph_on_the_slow_path,
    needs_kernels,
    tells_the_slow_path_once,
)
from multipole_cases import attend, even_sizes, in_float64, random_call
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

import regard
from regard import multipole_attention
from regard.ops import only_backend
from regard.ops.multipole import streamed
from regard.ops.multipole.op import multipole_attention_blocks, multipole_attention_op
from regard.ops.multipole.reference import multipole_attention_reference

OPTIONS = {"num_clusters": 6, "near": 2, "far": "gaussian", "num_prefix_tokens": 1}
KERNEL_AND_BLOCKS = [
    pytest.param("multipole_attention", marks=needs_kernels),
    pytest.param("multipole_attention_blocks"),
]


def tensors(**shape):
    return inputs(Shape(**shape), exact=False)


def requiring_grad(**shape):
    return [t.requires_grad_() for t in tensors(**shape)]


def some_call(dtype=torch.float32, hidden: bool = False):
    visible = torch.rand(2, 2, 43, generator=torch.Generator().manual_seed(0)) > 0.3 if hidden else None
    shape = Shape(heads=4, queries=20, value_dim=24)
    return random_call(shape, even_sizes(41, 5), 2, dtype=dtype, prefix=2, visible=visible)


@pytest.mark.parametrize("name", KERNEL_AND_BLOCKS)
@pytest.mark.parametrize("hidden", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_opcheck(name: str, hidden: bool, dtype: torch.dtype) -> None:
    operands = some_call(dtype, hidden).operands()
    leaves = [t.detach().requires_grad_() for t in operands[:3]]
    torch.library.opcheck(getattr(torch.ops.regard, name).default, (*leaves, *operands[3:]))


@pytest.mark.parametrize("name", KERNEL_AND_BLOCKS)
@pytest.mark.parametrize("hidden", [False, True])
def test_opcheck_of_the_backward(name: str, hidden: bool) -> None:
    call = some_call(hidden=hidden)
    backward = getattr(torch.ops.regard, f"{name}_backward").default
    torch.library.opcheck(backward, (torch.randn(2, 4, 20, 24), *call.operands()))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("compiler", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compiles_to_one_graph_at_any_size(compiler: str, backend: str) -> None:
    torch._dynamo.reset()
    options = {**OPTIONS, "near": 0.3}
    compiled = torch.compile(
        lambda *t: multipole_attention(*t, **options), fullgraph=True, dynamic=True, backend=compiler
    )
    with only_backend(backend):
        for tokens in (40, 64, 97):
            plain = requiring_grad(queries=tokens, keys=tokens)
            traced = [t.detach().clone().requires_grad_() for t in plain]
            want, got = multipole_attention(*plain, **options), compiled(*traced)
            torch.testing.assert_close(got, want)
            want.square().sum().backward()
            got.square().sum().backward()
            for a, b in zip(plain, traced, strict=True):
                torch.testing.assert_close(b.grad, a.grad)


def test_compiles_with_counts_that_follow_the_size() -> None:
    """num_clusters=None and a grid, while the number of tokens is a symbol."""
    torch._dynamo.reset()

    def run(query, key, value, height, width):
        return multipole_attention(
            query, key, value, num_clusters=None, near=0.25, num_prefix_tokens=1, grid_size=(height, width)
        )

    compiled = torch.compile(run, fullgraph=True, dynamic=True, backend="aot_eager")
    for height, width in ((6, 7), (5, 9), (8, 8)):
        plain = tensors(queries=height * width + 1, keys=height * width + 1)
        torch.testing.assert_close(compiled(*plain, height, width), run(*plain, height, width))


def test_compiling_the_slow_path_says_so_and_keeps_one_graph() -> None:
    keeps_one_graph_on_the_slow_path(lambda *t: multipole_attention(*t, **OPTIONS), [t.double() for t in tensors()])


class Layer(torch.nn.Module):
    def forward(self, query, key, value):
        return multipole_attention(query, key, value, **OPTIONS)


@pytest.mark.parametrize("backend", BACKENDS)
def test_exports(backend: str) -> None:
    with only_backend(backend):
        tokens = torch.export.Dim("tokens", min=8, max=1000)
        exported = torch.export.export(
            Layer(), tensors(queries=40, keys=40), dynamic_shapes={n: {2: tokens} for n in ("query", "key", "value")}
        )
        for size in (40, 61):
            other = tensors(queries=size, keys=size)
            torch.testing.assert_close(exported.module()(*other), Layer()(*other))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_lowers_as_for_dense_attention(backend: str, dtype: torch.dtype) -> None:
    leaves = requiring_grad(dim=64, value_dim=64)
    with only_backend(backend), torch.autocast("cpu", dtype=dtype):
        output = multipole_attention(*leaves, **OPTIONS)
        assert output.dtype == F.scaled_dot_product_attention(*leaves).dtype == dtype
    with only_backend(backend):
        want = multipole_attention(*(t.detach().to(dtype) for t in leaves), **OPTIONS)
    assert torch.equal(output, want)
    output.float().sum().backward()
    assert all(t.grad.dtype == torch.float32 for t in leaves)


def test_autocast_leaves_float64() -> None:
    double = [t.double() for t in tensors()]
    with only_backend("pytorch"):
        want = multipole_attention(*double, **OPTIONS)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert torch.equal(multipole_attention(*double, **OPTIONS), want)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing(backend: str, reentrant: bool) -> None:
    plain, again = requiring_grad(), requiring_grad()
    with only_backend(backend):
        multipole_attention(*plain, **OPTIONS).square().sum().backward()
        output = checkpoint(lambda *t: multipole_attention(*t, **OPTIONS), *again, use_reentrant=reentrant)
        output.square().sum().backward()
    for a, b in zip(plain, again, strict=True):
        assert torch.equal(a.grad, b.grad)


@pytest.mark.parametrize("backend", BACKENDS)
def test_deterministic_algorithms_are_allowed_and_repeat(backend: str) -> None:
    def run():
        leaves = requiring_grad(heads=4, queries=200)
        output = multipole_attention(*leaves, **OPTIONS, enable_gqa=True)
        return [output.detach(), *torch.autograd.grad(output.square().sum(), leaves)]

    torch.use_deterministic_algorithms(True)
    try:
        with only_backend(backend):
            assert all(torch.equal(a, b) for a, b in zip(run(), run(), strict=True))
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.filterwarnings("ignore::regard.SlowPathWarning")
def test_torch_func_transforms_take_the_pytorch_path() -> None:
    plain = tensors()
    want = multipole_attention(*plain, **OPTIONS)
    torch.testing.assert_close(torch.vmap(lambda *t: multipole_attention(*t, **OPTIONS))(*plain), want)
    leaves = requiring_grad()
    multipole_attention(*leaves, **OPTIONS).square().sum().backward()
    grads = torch.func.grad(lambda *t: multipole_attention(*t, **OPTIONS).square().sum(), argnums=(0, 1, 2))(*plain)
    for got, leaf in zip(grads, leaves, strict=True):
        torch.testing.assert_close(got, leaf.grad, rtol=1e-4, atol=1e-5)


@pytest.mark.filterwarnings("ignore::regard.SlowPathWarning")
def test_vmap_of_a_gradient_is_each_examples_gradient() -> None:
    plain = tensors()

    def loss(query, key, value):
        return multipole_attention(query, key, value, **OPTIONS).square().sum()

    got = torch.vmap(torch.func.grad(loss, argnums=1))(*plain)
    for i in range(2):
        torch.testing.assert_close(got[i], torch.func.grad(loss, argnums=1)(*(t[i] for t in plain)))


@pytest.mark.filterwarnings("ignore::regard.SlowPathWarning")
@pytest.mark.parametrize("near", [0, 2])
def test_dropout_takes_the_pytorch_path_and_keeps_the_mean(near: int) -> None:
    torch.manual_seed(0)
    plain = tensors(batch=1, heads=1, key_heads=1, queries=3)
    options = {**OPTIONS, "near": near}
    wide = [t.expand(4000, -1, -1, -1) for t in plain]
    mean = multipole_attention(*wide, **options, dropout_p=0.3).mean(dim=0, keepdim=True)
    torch.testing.assert_close(mean, multipole_attention(*plain, **options), rtol=0.1, atol=0.05)
    assert not torch.equal(mean, multipole_attention(*plain, **options))


@needs_kernels
def test_explain_names_the_backend_and_every_refusal() -> None:
    plain = tensors()
    assert regard.explain(multipole_attention, *plain, **OPTIONS).backend == "cpu"
    cases = [
        ("float64", [t.double() for t in plain], {}),
        ("dropout", plain, {"dropout_p": 0.1}),
        ("meta", [t.to("meta") for t in plain], {}),
    ]
    for reason, args, options in cases:
        found = regard.explain("multipole_attention", *args, **OPTIONS, **options)
        assert found.backend == "pytorch" and reason in str(found)
        assert dict(found.refusals).keys() == {"cpu", "triton"}
    with pytest.raises(ValueError, match="near"):
        regard.explain(multipole_attention, *plain, num_clusters=4, near=5)


def test_the_slow_path_is_told_once() -> None:
    tells_the_slow_path_once(
        lambda *t: multipole_attention(*t, **OPTIONS), [t.double() for t in tensors()], "multipole_attention .*float64"
    )


def test_without_kernels_the_operator_is_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    is_the_same_without_kernels(lambda *t: multipole_attention(*t, **OPTIONS), tensors(), monkeypatch)


def test_meta_tensors_have_the_shape_of_the_result() -> None:
    with only_backend("pytorch"):
        output = multipole_attention(*(t.to("meta") for t in tensors(value_dim=24)), **OPTIONS)
    assert output.device.type == "meta" and output.shape == (2, 2, 50, 24)


@needs_kernels
def test_flops_of_the_kernel_agree_with_a_count_by_hand() -> None:
    batch, heads, queries, dim, value_dim, clusters, near = 2, 4, 50, 16, 24, 10, 3
    call = random_call(Shape(batch, heads, 2, queries, dim=dim, value_dim=value_dim), [7] * clusters, near)
    for second_order in (False, True):
        counted = dataclasses.replace(call, second_order=second_order)
        with FlopCounterMode(display=False) as counter:
            attend(counted)
        # With clusters of one size: each query against all clusters (their variance is one more key), then near keys.
        logits = clusters * dim * (2 if second_order else 1) + near * 7 * dim
        assert counter.get_total_flops() == 2 * batch * heads * queries * (logits + (clusters + near * 7) * value_dim)


def test_flops_of_the_pytorch_path_agree_with_a_count_by_hand() -> None:
    batch, heads, queries, dim, value_dim, clusters = 2, 4, 50, 16, 24, 10
    call = random_call(Shape(batch, heads, 2, queries, dim=dim, value_dim=value_dim), [7] * clusters, 3)
    leaf = call.query.requires_grad_()
    columns = 7 * clusters + clusters
    with FlopCounterMode(display=False) as counter:
        output = attend(dataclasses.replace(call, query=leaf), "pytorch")
    assert counter.get_total_flops() == 2 * batch * heads * queries * columns * (dim + value_dim)
    with FlopCounterMode(display=False) as counter:
        output.sum().backward()
    assert counter.get_total_flops() == 2 * batch * heads * queries * columns * (3 * dim + 2 * value_dim)


def test_the_pytorch_path_never_holds_queries_times_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    tokens = 600
    call = random_call(Shape(batch=1, queries=tokens, dim=8, value_dim=8), even_sizes(tokens, 20), 3, prefix=1)
    linear = 2 * 2 * (tokens + 21) * 8  # both heads' keys and clusters
    block = 40 * 2 * (tokens + 21)  # forty queries of each head
    monkeypatch.setattr(streamed, "_BLOCK", block)
    with Largest() as forward:
        streamed.attend(call)
    with Largest() as backward:
        streamed.gradients(call, torch.ones(1, 2, tokens, 8))
    assert max(forward.elements, backward.elements) <= max(block, linear) < tokens * tokens // 4
    with Largest() as reference:
        multipole_attention_reference(call)
    assert reference.elements >= tokens * tokens  # the measure sees what it should


def test_the_schemas_serve_without_kernels_too() -> None:
    """The dispatcher's fallback where no kernel was built: the kernel's outputs, gradients and strides."""
    call = some_call(hidden=True)
    ours, plain = (op(*call.operands()) for op in (multipole_attention_op, multipole_attention_blocks))
    exact = multipole_attention_blocks(*in_float64(call).operands())
    assert ours.shape == plain.shape and ours.stride() == plain.stride() == exact.stride()
    torch.testing.assert_close(ours.double(), exact, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(plain.double(), exact, rtol=1e-4, atol=1e-5)
