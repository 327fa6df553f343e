"""k-NN attention inside PyTorch: operator checks, compile, autocast, checkpointing, transforms, dispatch, FLOPs."""

import pytest
import torch
import torch.nn.functional as F
from attention_cases import (
    Shape,
    inputs,
    is_the_same_without_kernels,
    keeps_one_graph_on_the_slow_path,
    needs_kernels,
    tells_the_slow_path_once,
)
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

import regard
from regard import knn_attention
from regard.ops import only_backend
from regard.ops.knn import op
from regard.ops.knn.op import knn_attention_op


def requiring_grad(*args, **kwargs):
    return [t.requires_grad_() for t in inputs(*args, **kwargs)]


MASKS = {
    "none": None,
    "bool": torch.rand(1, 1, 50, 50, generator=torch.Generator().manual_seed(0)) > 0.4,
    "float": torch.randn(1, 2, 50, 50, generator=torch.Generator().manual_seed(0)),
}


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_opcheck(mask: str, dtype: torch.dtype) -> None:
    tensors = requiring_grad(Shape(heads=4, key_heads=2) if mask != "float" else Shape(), dtype=dtype, exact=False)
    bias = MASKS[mask]
    if mask == "float":
        bias = bias.to(torch.promote_types(dtype, torch.float32)).requires_grad_()
    torch.library.opcheck(knn_attention_op, (*tensors, bias, 9, False, 0.25))


@pytest.mark.parametrize("wants_mask", [False, True])
def test_opcheck_of_the_backward(wants_mask: bool) -> None:
    query, key, value = inputs(Shape(), exact=False)
    bias = MASKS["float"]
    state = knn_attention_op(query, key, value, bias, 9, True, 0.25)[1:]
    args = (torch.randn_like(query), query, key, value, bias, *state, 9, True, 0.25, wants_mask)
    torch.library.opcheck(torch.ops.regard.knn_attention_backward.default, args)


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
@pytest.mark.parametrize("topk", [7, 0.25])
def test_compiles_to_one_graph_at_any_size(backend: str, topk: int | float) -> None:
    torch._dynamo.reset()
    compiled = torch.compile(
        lambda *t: knn_attention(*t, topk=topk, is_causal=True), fullgraph=True, dynamic=True, backend=backend
    )
    for queries in (40, 64, 97):
        plain = requiring_grad(Shape(queries=queries, keys=queries), exact=False)
        traced = [t.detach().clone().requires_grad_() for t in plain]
        want, got = knn_attention(*plain, topk=topk, is_causal=True), compiled(*traced)
        torch.testing.assert_close(got, want)
        want.square().sum().backward()
        got.square().sum().backward()
        for a, b in zip(plain, traced, strict=True):
            torch.testing.assert_close(b.grad, a.grad)


def test_compiling_the_slow_path_says_so_and_keeps_one_graph() -> None:
    keeps_one_graph_on_the_slow_path(
        lambda *t: knn_attention(*t, topk=5), [t.double() for t in inputs(Shape(), exact=False)]
    )


@pytest.mark.parametrize("backend", ["pytorch", pytest.param("cpu", marks=needs_kernels)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_lowers_as_for_dense_attention(backend: str, dtype: torch.dtype) -> None:
    tensors = requiring_grad(Shape(dim=64, value_dim=64), exact=False)
    with only_backend(backend), torch.autocast("cpu", dtype=dtype):
        output = knn_attention(*tensors, topk=9)
        assert output.dtype == F.scaled_dot_product_attention(*tensors).dtype == dtype
    with only_backend(backend):
        want = knn_attention(*(t.detach().to(dtype) for t in tensors), topk=9)
    assert torch.equal(output, want)
    output.float().sum().backward()
    assert all(t.grad.dtype == torch.float32 for t in tensors)


@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing(reentrant: bool) -> None:
    plain, again = requiring_grad(Shape(), exact=False), requiring_grad(Shape(), exact=False)
    knn_attention(*plain, topk=9).square().sum().backward()
    output = checkpoint(lambda *t: knn_attention(*t, topk=9), *again, use_reentrant=reentrant)
    output.square().sum().backward()
    for a, b in zip(plain, again, strict=True):
        assert torch.equal(a.grad, b.grad)


def test_deterministic_algorithms_are_allowed_and_repeat() -> None:
    def run():
        tensors = requiring_grad(Shape(heads=4, key_heads=2, queries=200), exact=False)
        output = knn_attention(*tensors, topk=9, enable_gqa=True)
        return [output.detach(), *torch.autograd.grad(output.square().sum(), tensors)]

    torch.use_deterministic_algorithms(True)
    try:
        assert all(torch.equal(a, b) for a, b in zip(run(), run(), strict=True))
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.filterwarnings("ignore::regard.SlowPathWarning")
def test_torch_func_transforms_take_the_pytorch_path() -> None:
    tensors = inputs(Shape(), exact=False)
    want = knn_attention(*tensors, topk=9)
    mapped = torch.vmap(lambda *t: knn_attention(*t, topk=9))(*tensors)
    torch.testing.assert_close(mapped, want)
    grad = torch.func.grad(lambda query: knn_attention(query, *tensors[1:], topk=9).square().sum())(tensors[0])
    query = tensors[0].clone().requires_grad_()
    knn_attention(query, *tensors[1:], topk=9).square().sum().backward()
    torch.testing.assert_close(grad, query.grad)


@pytest.mark.filterwarnings("ignore::regard.SlowPathWarning")
def test_dropout_takes_the_pytorch_path_and_keeps_the_mean() -> None:
    torch.manual_seed(0)
    query, key, value = inputs(Shape(batch=1, heads=1, key_heads=1, queries=3), exact=False)
    wide = [t.expand(4000, -1, -1, -1) for t in (query, key, value)]
    mean = knn_attention(*wide, topk=9, dropout_p=0.3).mean(dim=0, keepdim=True)
    torch.testing.assert_close(mean, knn_attention(query, key, value, topk=9), rtol=0.1, atol=0.05)


@needs_kernels
def test_explain_names_the_backend_and_every_refusal() -> None:
    tensors = inputs(Shape())
    assert regard.explain(knn_attention, *tensors, topk=3).backend == "cpu"
    cases = [
        ("float64", [t.double() for t in tensors], {}),
        ("dropout", tensors, {"dropout_p": 0.1}),
        ("head_dim 4", [t[..., :4] for t in tensors], {}),
        ("value's head_dim 300", [*tensors[:2], torch.zeros(2, 2, 50, 300)], {}),
        ("meta", [t.to("meta") for t in tensors], {}),
    ]
    for reason, args, options in cases:
        found = regard.explain("knn_attention", *args, topk=3, **options)
        assert found.backend == "pytorch" and reason in str(found)
        assert dict(found.refusals).keys() == {"cpu", "triton"}


def test_explain_refuses_what_it_does_not_know() -> None:
    with pytest.raises(ValueError, match="knn_attention"):
        regard.explain("attention")
    with pytest.raises(ValueError, match="topk"):
        regard.explain(knn_attention, *inputs(Shape()), topk=0)


def test_the_slow_path_is_told_once() -> None:
    tells_the_slow_path_once(lambda *t: knn_attention(*t, topk=3), [t.double() for t in inputs(Shape())], "float64")


def test_without_kernels_the_operator_is_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    is_the_same_without_kernels(lambda *t: knn_attention(*t, topk=9), inputs(Shape()), monkeypatch)


@needs_kernels
def test_only_backend_holds_within_its_context() -> None:
    tensors = inputs(Shape())
    with only_backend("pytorch"):
        assert regard.explain(knn_attention, *tensors, topk=3).backend == "pytorch"
    with only_backend("cpu"), pytest.raises(RuntimeError, match="float64"):
        knn_attention(*(t.double() for t in tensors), topk=3)
    assert regard.explain(knn_attention, *tensors, topk=3).backend == "cpu"


@needs_kernels
def test_flops_agree_with_a_count_by_hand() -> None:
    batch, heads, queries, keys, dim, value_dim, topk = 2, 4, 50, 70, 16, 24, 9
    tensors = requiring_grad(Shape(batch, heads, 2, queries, keys, dim, value_dim))
    with FlopCounterMode(display=False) as counter:
        output = knn_attention(*tensors, topk=topk, enable_gqa=True)
    logits = 2 * batch * heads * queries * keys * dim
    kept = 2 * batch * heads * queries * topk
    assert counter.get_total_flops() == logits + kept * value_dim
    with FlopCounterMode(display=False) as counter:
        output.sum().backward()
    assert counter.get_total_flops() == logits + kept * (2 * value_dim + 2 * dim)


def test_the_schema_serves_without_kernels_too() -> None:
    """The dispatcher's fallback where no kernel was built: the kernel's outputs, state, gradients and strides."""
    query, key, value = inputs(Shape(), exact=True)
    bias = MASKS["float"]
    ours = knn_attention_op(query, key, value, bias, 9, False, 0.25)
    plain = op._pytorch_forward(query.double(), key.double(), value.double(), bias.double(), 9, False, 0.25)
    for a, b in zip(ours, plain, strict=True):
        assert a.shape == b.shape and a.stride() == b.stride()
        torch.testing.assert_close(a.double(), b.double(), rtol=1e-4, atol=1e-5)
    grad = torch.randn_like(query)
    got = torch.ops.regard.knn_attention_backward.default(
        grad, query, key, value, bias, *ours[1:], 9, False, 0.25, True
    )
    want = op._pytorch_backward(
        *(t.double() for t in (grad, query, key, value, bias)), *plain[1:], 9, False, 0.25, True
    )
    for a, b in zip(got, want, strict=True):
        assert a.shape == b.shape and a.stride() == b.stride()
        torch.testing.assert_close(a.double(), b, rtol=1e-4, atol=1e-5)
