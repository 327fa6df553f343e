"""Neighborhood attention inside PyTorch: operator checks, compile, export, autocast, transforms, memory, FLOPs."""

import math

import pytest
import torch
import torch.nn.functional as F
from attention_cases import (
    BACKENDS,
    Largest,
    Shape,
    is_the_same_without_kernels,
    keeps_one_graph_on_the_slow_path,
    needs_kernels,
    tells_the_slow_path_once,
)
from neighborhood_cases import attend, in_float64, pattern_of, random_call, requiring_grad
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

import regard
from regard import neighborhood_attention
from regard.ops import _triton, only_backend
from regard.ops.neighborhood import streamed
from regard.ops.neighborhood.op import neighborhood_attention_blocks, neighborhood_attention_op
from regard.ops.neighborhood.reference import neighborhood_attention_reference

OPTIONS = {"grid_size": (5, 8), "kernel_size": (3, 5), "border": "replicate", "num_prefix_tokens": 2}
KERNEL_AND_BLOCKS = [
    pytest.param("neighborhood_attention", marks=needs_kernels),
    pytest.param("neighborhood_attention_blocks"),
]


def some_call(dtype=torch.float32, full: bool = False):
    pattern = pattern_of((5, 8), (3, 5), (1, 2), (2, 1), (False, True))
    shape = Shape(heads=4, key_heads=2, value_dim=24)
    return random_call(pattern, shape, prefix=2, bias=full, hidden=full, dtype=dtype)


def tensors(tokens: int = 42, **shape) -> list[torch.Tensor]:
    call = random_call(pattern_of((tokens,), 3), Shape(**shape))
    return [call.query, call.key, call.value]


def table() -> torch.Tensor:
    return torch.randn(2, 5, 9, generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("name", KERNEL_AND_BLOCKS)
@pytest.mark.parametrize("full", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_opcheck(name: str, full: bool, dtype: torch.dtype) -> None:
    call, _ = requiring_grad(some_call(dtype, full))
    torch.library.opcheck(getattr(torch.ops.regard, name).default, call.operands())


@pytest.mark.parametrize("name", KERNEL_AND_BLOCKS)
@pytest.mark.parametrize("full", [False, True])
def test_opcheck_of_the_backward(name: str, full: bool) -> None:
    call = some_call(full=full)
    backward = getattr(torch.ops.regard, f"{name}_backward").default
    torch.library.opcheck(backward, (torch.randn(2, 4, 42, 24), *call.operands(), full))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("compiler", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compiles_to_one_graph_at_any_size(compiler: str, backend: str) -> None:
    torch._dynamo.reset()

    def run(query, key, value, bias, height, width):
        options = {**OPTIONS, "grid_size": (height, width)}
        return neighborhood_attention(query, key, value, attn_bias=bias, **options)

    compiled = torch.compile(run, fullgraph=True, dynamic=True, backend=compiler)
    with only_backend(backend):
        for height, width in ((5, 8), (7, 6), (3, 11)):
            plain = [t.requires_grad_() for t in (*tensors(height * width + 2), table())]
            traced = [t.detach().clone().requires_grad_() for t in plain]
            want, got = run(*plain, height, width), compiled(*traced, height, width)
            torch.testing.assert_close(got, want)
            want.square().sum().backward()
            got.square().sum().backward()
            for a, b in zip(plain, traced, strict=True):
                torch.testing.assert_close(b.grad, a.grad)


def test_compiling_the_slow_path_says_so_and_keeps_one_graph() -> None:
    keeps_one_graph_on_the_slow_path(lambda *t: neighborhood_attention(*t, **OPTIONS), [t.double() for t in tensors()])


class Layer(torch.nn.Module):
    def forward(self, query, key, value):
        return neighborhood_attention(query, key, value, **OPTIONS)


@pytest.mark.parametrize("backend", BACKENDS)
def test_exports(backend: str) -> None:
    with only_backend(backend):
        images = torch.export.Dim("images", min=1, max=100)
        exported = torch.export.export(
            Layer(), tuple(tensors()), dynamic_shapes={n: {0: images} for n in ("query", "key", "value")}
        )
        for batch in (2, 5):
            other = tensors(batch=batch)
            torch.testing.assert_close(exported.module()(*other), Layer()(*other))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_lowers_as_for_dense_attention(backend: str, dtype: torch.dtype) -> None:
    """The bias stays as it is: it is no operand of a product."""
    leaves = [t.requires_grad_() for t in (*tensors(), table())]
    with only_backend(backend), torch.autocast("cpu", dtype=dtype):
        output = neighborhood_attention(*leaves[:3], attn_bias=leaves[3], **OPTIONS)
        assert output.dtype == F.scaled_dot_product_attention(*leaves[:3]).dtype == dtype
    with only_backend(backend):
        lowered = (t.detach().to(dtype) for t in leaves[:3])
        want = neighborhood_attention(*lowered, attn_bias=leaves[3].detach(), **OPTIONS)
    assert torch.equal(output, want)
    output.float().sum().backward()
    assert all(t.grad.dtype == torch.float32 for t in leaves)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_bias_in_half_precision(backend: str) -> None:
    bias = table().to(torch.bfloat16).requires_grad_()
    query, key, value = (t.to(torch.bfloat16) for t in tensors())
    with only_backend(backend):
        output = neighborhood_attention(query, key, value, attn_bias=bias, **OPTIONS)
        want = neighborhood_attention(query, key, value, attn_bias=bias.float(), **OPTIONS)
    assert torch.equal(output, want)
    output.float().square().sum().backward()
    assert bias.grad.dtype == torch.bfloat16 and bias.grad.abs().sum() > 0


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing(backend: str, reentrant: bool) -> None:
    plain, again = ([t.requires_grad_() for t in tensors()] for _ in range(2))
    with only_backend(backend):
        neighborhood_attention(*plain, **OPTIONS).square().sum().backward()
        output = checkpoint(lambda *t: neighborhood_attention(*t, **OPTIONS), *again, use_reentrant=reentrant)
        output.square().sum().backward()
    for a, b in zip(plain, again, strict=True):
        assert torch.equal(a.grad, b.grad)


@pytest.mark.parametrize("backend", BACKENDS)
def test_deterministic_algorithms_are_allowed_and_repeat(backend: str) -> None:
    def run():
        leaves = [t.requires_grad_() for t in (*tensors(), table())]
        output = neighborhood_attention(*leaves[:3], attn_bias=leaves[3], **OPTIONS)
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
    want = neighborhood_attention(*plain, **OPTIONS)
    torch.testing.assert_close(torch.vmap(lambda *t: neighborhood_attention(*t, **OPTIONS))(*plain), want)
    leaves = [t.clone().requires_grad_() for t in plain]
    neighborhood_attention(*leaves, **OPTIONS).square().sum().backward()
    grads = torch.func.grad(lambda *t: neighborhood_attention(*t, **OPTIONS).square().sum(), argnums=(0, 1, 2))(*plain)
    for got, leaf in zip(grads, leaves, strict=True):
        torch.testing.assert_close(got, leaf.grad, rtol=1e-4, atol=1e-5)


@pytest.mark.filterwarnings("ignore::regard.SlowPathWarning")
def test_dropout_takes_the_pytorch_path_and_keeps_the_mean() -> None:
    torch.manual_seed(0)
    plain = tensors(8, batch=1, heads=1, key_heads=1)
    options = {"grid_size": (7,), "kernel_size": 3, "num_prefix_tokens": 1}
    wide = [t.expand(4000, -1, -1, -1) for t in plain]
    mean = neighborhood_attention(*wide, **options, dropout_p=0.3).mean(dim=0, keepdim=True)
    want = neighborhood_attention(*plain, **options)
    torch.testing.assert_close(mean, want, rtol=0.1, atol=0.05)
    assert not torch.equal(mean, want)


@needs_kernels
def test_explain_names_the_backend_and_every_refusal() -> None:
    plain = tensors()
    assert regard.explain(neighborhood_attention, *plain, **OPTIONS).backend == "cpu"
    cases = [
        ("float64", [t.double() for t in plain], {}),
        ("dropout", plain, {"dropout_p": 0.1}),
        ("meta", [t.to("meta") for t in plain], {}),
    ]
    for reason, args, options in cases:
        found = regard.explain("neighborhood_attention", *args, **OPTIONS, **options)
        assert found.backend == "pytorch" and reason in str(found)
        assert dict(found.refusals).keys() == {"cpu", "triton"}
    with pytest.raises(ValueError, match="stride"):
        regard.explain(neighborhood_attention, *plain, **{**OPTIONS, "stride": 9})


@pytest.mark.skipif(bool(_triton.available()), reason=_triton.available() or "Triton is here")
def test_triton_takes_what_is_on_a_gpu_but_for_wide_heads() -> None:
    for dim, backend in ((64, "triton"), (300, "pytorch")):
        with FakeTensorMode():
            on_gpu = [torch.empty(2, 2, 42, dim, device="cuda") for _ in range(3)]
        found = regard.explain(neighborhood_attention, *on_gpu, **OPTIONS)
        assert found.backend == backend
    assert "head_dim 300 is above 256" in dict(found.refusals)["triton"]


def test_the_slow_path_is_told_once() -> None:
    tells_the_slow_path_once(
        lambda *t: neighborhood_attention(*t, **OPTIONS),
        [t.double() for t in tensors()],
        "neighborhood_attention .*float64",
    )


def test_without_kernels_the_operator_is_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    is_the_same_without_kernels(lambda *t: neighborhood_attention(*t, **OPTIONS), tensors(), monkeypatch)


def test_meta_tensors_have_the_shape_of_the_result() -> None:
    with only_backend("pytorch"):
        output = neighborhood_attention(*(t.to("meta") for t in tensors(value_dim=24)), **OPTIONS)
    assert output.device.type == "meta" and output.shape == (2, 2, 42, 24)


@pytest.mark.parametrize("backend", BACKENDS)
def test_flops_agree_with_a_count_by_hand(backend: str) -> None:
    """Whole windows, cut down to the grid; prefix queries see all."""
    batch, heads, dim, value_dim, prefix, cells = 2, 4, 16, 24, 2, 40
    for kernel, seen in (((3, 5), 15), ((3, 30), 24), ((9, 30), 40)):
        shape = Shape(batch, heads, 2, dim=dim, value_dim=value_dim)
        call = random_call(pattern_of((5, 8), kernel), shape, prefix=prefix)
        pairs = batch * heads * (cells * (seen + prefix) + prefix * (cells + prefix))
        call, _ = requiring_grad(call)
        with FlopCounterMode(display=False) as counter:
            output = attend(call, backend)
        assert counter.get_total_flops() == 2 * pairs * (dim + value_dim)
        with FlopCounterMode(display=False) as counter:
            output.sum().backward()
        assert counter.get_total_flops() == 2 * pairs * (3 * dim + 2 * value_dim)


def test_the_pytorch_path_never_holds_queries_times_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    side = 40
    call = random_call(pattern_of((side, side), 3), Shape(batch=1, dim=8, value_dim=8), prefix=1)
    linear = 2 * (side * side + 1) * 8
    monkeypatch.setattr(streamed, "_BLOCK", linear)
    with Largest() as forward:
        streamed.attend(call)
    with Largest() as backward:
        streamed.gradients(call, torch.ones(1, 2, side * side + 1, 8), False)
    assert max(forward.elements, backward.elements) <= 3 * linear < side**4 // 4
    with Largest() as reference:
        neighborhood_attention_reference(call)
    assert reference.elements >= 2 * side * side * 9 * 8  # all windows at once: the measure sees what it should


def test_the_schemas_serve_without_kernels_too() -> None:
    """The dispatcher's fallback where no kernel was built: the kernel's outputs and strides."""
    call = some_call(full=True)
    ours, plain = (op(*call.operands()) for op in (neighborhood_attention_op, neighborhood_attention_blocks))
    exact = neighborhood_attention_blocks(*in_float64(call).operands())
    assert ours.shape == plain.shape and ours.stride() == plain.stride() == exact.stride()
    torch.testing.assert_close(ours.double(), exact, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(plain.double(), exact, rtol=1e-4, atol=1e-5)


@needs_kernels
def test_the_kernel_does_not_run_out_of_its_memory_on_long_sequences() -> None:
    """Memory grows with the tokens, not with tokens times window: 32k of them, and a window of 1,025."""
    tokens = 1 << 15
    call, leaves = requiring_grad(
        random_call(pattern_of((tokens,), 1025, stride=512), Shape(1, 1, 1, dim=4, value_dim=4))
    )
    output = attend(call)
    grads = torch.autograd.grad(output.sum(), leaves)
    assert all(torch.isfinite(t).all() for t in (output, *grads))
    middle = slice(tokens // 2 - 2048, tokens // 2 + 2048)
    parts = [t[:, :, middle] for t in leaves]
    local = attend(call.__class__(*parts, None, None, pattern_of((4096,), 1025, stride=512), 0, call.scale))
    torch.testing.assert_close(output[:, :, middle][:, :, 1024:3072], local[:, :, 1024:3072])
    assert math.prod(output.shape) == tokens * 4
