"""Every operator inside torch.compile, torch.export and ONNX: one graph for all sizes, and no size seen twice."""

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch.utils.checkpoint import checkpoint

from regard.benchmark.calls import CALLS, OperatorCall
from regard.export import decomposed, export_onnx, export_program
from regard.export.decompositions import operators_left


def _slow_unless_plain(name: str) -> tuple[pytest.MarkDecorator, ...]:
    """Of an operator's calls with options the slow tests make the most."""
    return (pytest.mark.slow,) if "," in name else ()


every_call = pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)

DEVICES = [
    "cpu",
    pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU here")),
]
SIZES = ((2, 40), (3, 64), (5, 104))
# A mean of whole numbers is none: where means decide, what is a tie is a matter of rounding.
OF_MEANS = {"multipole_attention", "kmeans"}
UNSEEN = ((1, 48), (2, 96), (4, 200))


class Layer(nn.Module):
    def __init__(self, call: OperatorCall) -> None:
        super().__init__()
        self.call = call

    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return self.call.run(query, key, value)


def drawn(batch: int, tokens: int, *, ties: bool = False) -> tuple[Tensor, ...]:
    """With `ties` small whole numbers: their products are exact in any order, and many logits are equal."""
    generator = torch.Generator().manual_seed(tokens)
    size = (batch, 3, tokens, 16)
    if ties:
        return tuple(torch.randint(-1, 2, size, generator=generator).float() for _ in range(3))
    return tuple(torch.randn(size, generator=generator) for _ in range(3))


def dynamic(call: OperatorCall) -> dict[str, dict[int, object]]:
    tokens = torch.export.Dim("tokens", min=16 // call.multiple, max=1000)
    batch = torch.export.Dim("batch", min=1, max=1000)
    return {name: {0: batch, 2: call.multiple * tokens} for name in ("query", "key", "value")}


@every_call
def test_one_graph_serves_all_sizes_forward_and_backward(call: OperatorCall) -> None:
    torch._dynamo.reset()
    counters.clear()
    compiled = torch.compile(call.run, fullgraph=True, dynamic=True, backend="aot_eager")
    for batch, tokens in SIZES:
        plain = [t.requires_grad_() for t in drawn(batch, tokens)]
        traced = [t.detach().clone().requires_grad_() for t in plain]
        expected, found = call.run(*plain), compiled(*traced)
        torch.testing.assert_close(found, expected)
        ours, theirs = (
            torch.autograd.grad(output.square().sum(), leaves, allow_unused=True)
            for output, leaves in ((found, traced), (expected, plain))
        )
        for a, b in zip(ours, theirs, strict=True):
            torch.testing.assert_close(a, b)
    assert counters["stats"]["unique_graphs"] == 1


@every_call
def test_exports_with_batch_and_tokens_left_open(call: OperatorCall) -> None:
    program = export_program(Layer(call).eval(), drawn(2, 40), dynamic_shapes=dynamic(call))
    assert any(f"regard.{call.operator}" in name for name in operators_left(program))
    for batch, tokens in (*SIZES, *UNSEEN):
        tensors = drawn(batch, tokens)
        torch.testing.assert_close(program.module()(*tensors), call.run(*tensors))


@pytest.mark.slow
@every_call
def test_decomposes_with_batch_and_tokens_left_open(call: OperatorCall) -> None:
    plain = decomposed(export_program(Layer(call).eval(), drawn(2, 40), dynamic_shapes=dynamic(call)))
    assert operators_left(plain) == []
    for batch, tokens in (*SIZES, *UNSEEN):
        tensors = drawn(batch, tokens)
        torch.testing.assert_close(plain.module()(*tensors), call.run(*tensors), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("call", [pytest.param(CALLS[name], marks=_slow_unless_plain(name), id=name) for name in CALLS])
def test_onnx_at_sizes_not_seen_at_export(call: OperatorCall, tmp_path: Path) -> None:
    pytest.importorskip("onnxscript")
    runtime = pytest.importorskip("onnxruntime")
    file = export_onnx(Layer(call).eval(), drawn(2, 40), tmp_path / "layer.onnx", dynamic_shapes=dynamic(call))
    assert [path.name for path in tmp_path.iterdir()] == ["layer.onnx"]
    session = runtime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
    for batch, tokens in UNSEEN:
        for ties in (False,) if call.operator in OF_MEANS else (False, True):
            tensors = drawn(batch, tokens, ties=ties)
            inputs = {one.name: t.numpy() for one, t in zip(session.get_inputs(), tensors, strict=False)}
            found = torch.from_numpy(session.run(None, inputs)[0])
            torch.testing.assert_close(found, call.run(*tensors), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("device", DEVICES)
@every_call
def test_deterministic_checkpointed_and_lowered_by_autocast(call: OperatorCall, device: str) -> None:
    """All three at once, twice: the same bits on every device that is here."""
    runs = []
    torch.use_deterministic_algorithms(True)
    try:
        for wrapped in (call.run, lambda *t: checkpoint(call.run, *t, use_reentrant=False), call.run):
            leaves = [t.to(device).requires_grad_() for t in drawn(2, 40)]
            with torch.autocast(device, dtype=torch.bfloat16):
                output = wrapped(*leaves)
            runs.append(
                [output.detach(), *torch.autograd.grad(output.float().square().sum(), leaves, allow_unused=True)]
            )
    finally:
        torch.use_deterministic_algorithms(False)
    for other in runs[1:]:
        assert all(a is b is None or torch.equal(a, b) for a, b in zip(runs[0], other, strict=True))
