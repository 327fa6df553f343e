"""Routed attention inside PyTorch: operator checks, compile, export, autocast, transforms, memory, FLOPs."""

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
from routed_cases import attend, in_float64, output_gradient, random_call, requiring_grad
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

import regard
from regard import routed_attention
from regard.ops import only_backend
from regard.ops.routed import streamed
from regard.ops.routed.op import routed_attention_gathered, routed_attention_op
from regard.ops.routed.reference import routed_attention_reference

KERNEL_AND_PATH = [
    pytest.param("routed_attention", marks=needs_kernels),
    pytest.param("routed_attention_gathered"),
]


def tensors(**shape):
    return inputs(Shape(**shape), exact=False)


def leaves_of(**shape):
    return [t.requires_grad_() for t in tensors(**shape)]


def neighbours(tokens: int) -> torch.Tensor:
    """Each block of eight queries sees its own eight keys and the block before; the first misses one."""
    own = torch.arange(-(-tokens // 8))
    return torch.stack([own - 1, own], dim=-1)


def banded(query, key, value, **options):
    own = torch.arange((query.shape[-2] + 7) // 8, device=query.device)
    lists = torch.stack([own - 1, own], dim=-1)
    extra = {"extra_key": key[..., :2, :], "extra_value": value[..., :2, :], "extra_bias": query[..., :1, :2]}
    return routed_attention(query, key, value, blocks=lists, query_block=8, key_block=8, **extra, **options)


def some_call(dtype=torch.float32, hidden: bool = False, bias: str | None = "query"):
    shape = Shape(heads=4, queries=20, keys=43, value_dim=24)
    return random_call(shape, 7, 8, 3, dtype=dtype, hidden=hidden, extra=2 if bias else 0, bias=bias)


@pytest.mark.parametrize("name", KERNEL_AND_PATH)
@pytest.mark.parametrize(("hidden", "bias"), [(False, "query"), (True, "head"), (False, None)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_opcheck(name: str, hidden: bool, bias: str | None, dtype: torch.dtype) -> None:
    call, _ = requiring_grad(some_call(dtype, hidden, bias))
    torch.library.opcheck(getattr(torch.ops.regard, name).default, call.operands())


@pytest.mark.parametrize("name", KERNEL_AND_PATH)
@pytest.mark.parametrize(("hidden", "bias"), [(False, "query"), (True, "head"), (False, None)])
def test_opcheck_of_the_backward(name: str, hidden: bool, bias: str | None) -> None:
    call = some_call(hidden=hidden, bias=bias)
    backward = getattr(torch.ops.regard, f"{name}_backward").default
    torch.library.opcheck(backward, (output_gradient(call), *call.operands()))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("compiler", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compiles_to_one_graph_at_any_size(compiler: str, backend: str) -> None:
    torch._dynamo.reset()
    compiled = torch.compile(banded, fullgraph=True, dynamic=True, backend=compiler)
    with only_backend(backend):
        for tokens in (40, 64, 97):
            plain = leaves_of(queries=tokens, keys=tokens)
            traced = [t.detach().clone().requires_grad_() for t in plain]
            want, got = banded(*plain), compiled(*traced)
            torch.testing.assert_close(got, want)
            want.square().sum().backward()
            got.square().sum().backward()
            for a, b in zip(plain, traced, strict=True):
                torch.testing.assert_close(b.grad, a.grad)


def test_compiling_the_slow_path_says_so_and_keeps_one_graph() -> None:
    keeps_one_graph_on_the_slow_path(banded, [t.double() for t in tensors()])


@needs_kernels
def test_a_compiled_call_reads_no_block_that_is_not_there() -> None:
    torch._dynamo.reset()
    query, key, value = tensors(queries=8, keys=8)
    compiled = torch.compile(routed_attention, fullgraph=True, backend="aot_eager")
    with pytest.raises(RuntimeError, match="blocks: holds 5"):
        compiled(query, key, value, blocks=torch.tensor([[0, 5]]), query_block=8, key_block=8)


class Layer(torch.nn.Module):
    def forward(self, query, key, value):
        return banded(query, key, value)


@pytest.mark.parametrize("backend", BACKENDS)
def test_exports(backend: str) -> None:
    with only_backend(backend):
        blocks = torch.export.Dim("blocks", min=2, max=1000)
        exported = torch.export.export(
            Layer(),
            tensors(queries=40, keys=40),
            dynamic_shapes={n: {2: 8 * blocks} for n in ("query", "key", "value")},
        )
        for size in (40, 64):
            other = tensors(queries=size, keys=size)
            torch.testing.assert_close(exported.module()(*other), Layer()(*other))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_lowers_as_for_dense_attention(backend: str, dtype: torch.dtype) -> None:
    leaves = leaves_of(dim=64, value_dim=64)
    options = {"blocks": neighbours(50), "query_block": 8, "key_block": 8, "extra_bias": torch.randn(3)}

    def run(query, key, value):
        return routed_attention(query, key, value, extra_key=key[:, :, :3], extra_value=value[:, :, :3], **options)

    with only_backend(backend), torch.autocast("cpu", dtype=dtype):
        output = run(*leaves)
        assert output.dtype == F.scaled_dot_product_attention(*leaves).dtype == dtype
    with only_backend(backend):
        want = run(*(t.detach().to(dtype) for t in leaves))
    assert torch.equal(output, want)
    output.float().sum().backward()
    assert all(t.grad.dtype == torch.float32 for t in leaves)


def test_autocast_leaves_float64() -> None:
    double = [t.double() for t in tensors()]
    with only_backend("pytorch"):
        want = banded(*double)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert torch.equal(banded(*double), want)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing(backend: str, reentrant: bool) -> None:
    plain, again = leaves_of(), leaves_of()
    with only_backend(backend):
        banded(*plain).square().sum().backward()
        checkpoint(banded, *again, use_reentrant=reentrant).square().sum().backward()
    for a, b in zip(plain, again, strict=True):
        assert torch.equal(a.grad, b.grad)


@pytest.mark.parametrize("backend", BACKENDS)
def test_deterministic_algorithms_are_allowed_and_repeat(backend: str) -> None:
    def run():
        call, leaves = requiring_grad(random_call(Shape(heads=4, queries=200), 8, 8, 4, extra=2, bias="head"))
        output = attend(call, backend)
        return [output.detach(), *torch.autograd.grad(output.square().sum(), leaves)]

    torch.use_deterministic_algorithms(True)
    try:
        assert all(torch.equal(a, b) for a, b in zip(run(), run(), strict=True))
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.filterwarnings("ignore::regard.SlowPathWarning")
def test_torch_func_transforms_take_the_pytorch_path() -> None:
    plain = tensors()
    want = banded(*plain)
    torch.testing.assert_close(torch.vmap(banded)(*plain), want)
    leaves = leaves_of()
    banded(*leaves).square().sum().backward()
    grads = torch.func.grad(lambda *t: banded(*t).square().sum(), argnums=(0, 1, 2))(*plain)
    for got, leaf in zip(grads, leaves, strict=True):
        torch.testing.assert_close(got, leaf.grad, rtol=1e-4, atol=1e-5)


@pytest.mark.filterwarnings("ignore::regard.SlowPathWarning")
def test_vmap_over_lists_too() -> None:
    call = random_call(Shape(queries=30), hidden=True)

    def run(query, key, value, blocks, mask):
        return routed_attention(query, key, value, blocks=blocks, query_block=8, key_block=8, attn_mask=mask)

    operands = (call.query, call.key, call.value, call.blocks, call.visible.unsqueeze(2))
    torch.testing.assert_close(torch.vmap(run)(*operands), run(*operands))


@pytest.mark.filterwarnings("ignore::regard.SlowPathWarning")
def test_dropout_takes_the_pytorch_path_and_keeps_the_mean() -> None:
    torch.manual_seed(0)
    plain = tensors(batch=1, heads=1, key_heads=1, queries=3)
    wide = [t.expand(4000, -1, -1, -1) for t in plain]
    mean = banded(*wide, dropout_p=0.3).mean(dim=0, keepdim=True)
    torch.testing.assert_close(mean, banded(*plain), rtol=0.1, atol=0.08)
    assert not torch.equal(mean, banded(*plain))


@needs_kernels
def test_explain_names_the_backend_and_every_refusal() -> None:
    plain, options = tensors(), {"blocks": neighbours(50), "query_block": 8, "key_block": 8}
    assert regard.explain(routed_attention, *plain, **options).backend == "cpu"
    on_meta = {**options, "blocks": options["blocks"].to("meta")}
    cases = [
        ("float64", [t.double() for t in plain], options),
        ("dropout", plain, {**options, "dropout_p": 0.1}),
        ("meta", [t.to("meta") for t in plain], on_meta),
    ]
    for reason, args, chosen in cases:
        found = regard.explain("routed_attention", *args, **chosen)
        assert found.backend == "pytorch" and reason in str(found)
        assert dict(found.refusals).keys() == {"cpu", "triton"}
    with pytest.raises(ValueError, match="blocks"):
        regard.explain(routed_attention, *plain, **{**options, "query_block": 9})


def test_the_slow_path_is_told_once() -> None:
    tells_the_slow_path_once(banded, [t.double() for t in tensors()], "routed_attention .*float64")


def test_without_kernels_the_operator_is_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    is_the_same_without_kernels(banded, tensors(), monkeypatch)


def test_meta_tensors_have_the_shape_of_the_result() -> None:
    with only_backend("pytorch"):
        output = banded(*(t.to("meta") for t in tensors(value_dim=24)))
    assert output.device.type == "meta" and output.shape == (2, 2, 50, 24)


@pytest.mark.parametrize("backend", BACKENDS)
def test_flops_agree_with_a_count_by_hand(backend: str) -> None:
    batch, heads, queries, dim, value_dim, seen = 2, 4, 50, 16, 24, 3 * 8 + 5
    shape = Shape(batch, heads, 2, queries, dim=dim, value_dim=value_dim)
    call, leaves = requiring_grad(random_call(shape, 8, 8, 3, extra=5))
    with FlopCounterMode(display=False) as counter:
        output = attend(call, backend)
    assert counter.get_total_flops() == 2 * batch * heads * queries * seen * (dim + value_dim)
    with FlopCounterMode(display=False) as counter:
        torch.autograd.grad(output.sum(), leaves)
    assert counter.get_total_flops() == 2 * batch * heads * queries * seen * (3 * dim + 2 * value_dim)


@pytest.mark.parametrize(("query_block", "key_block", "length"), [(20, 20, 30), (600, 600, 1)])
def test_the_pytorch_path_never_holds_queries_times_keys(
    query_block: int, key_block: int, length: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not even where all keys are seen, as one block or as many."""
    tokens = 600
    shape = Shape(batch=1, queries=tokens, keys=tokens, dim=8, value_dim=8)
    call = random_call(shape, query_block, key_block, length, extra=3)
    linear = 2 * (tokens + key_block) * 8  # both heads' keys, what one block lists
    monkeypatch.setattr(streamed, "_BLOCK", 40 * 2 * tokens)  # forty queries of each head
    with Largest() as forward:
        streamed.attend(call)
    with Largest() as backward:
        streamed.gradients(call, torch.ones(1, 2, tokens, 8))
    assert max(forward.elements, backward.elements) <= max(45 * 2 * tokens, linear) < tokens * tokens
    with Largest() as reference:
        routed_attention_reference(call)
    assert reference.elements >= 2 * tokens * tokens  # the measure sees what it should


def test_the_schemas_serve_without_kernels_too() -> None:
    """The dispatcher's fallback where no kernel was built: the kernel's outputs, gradients and strides."""
    call = some_call(hidden=True)
    ours, plain = (op(*call.operands()) for op in (routed_attention_op, routed_attention_gathered))
    exact = routed_attention_gathered(*in_float64(call).operands())
    assert ours.shape == plain.shape and ours.stride() == plain.stride() == exact.stride()
    torch.testing.assert_close(ours.double(), exact, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(plain.double(), exact, rtol=1e-4, atol=1e-5)
