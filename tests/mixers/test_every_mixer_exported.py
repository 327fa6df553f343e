"""Every mixer in torch.compile, torch.export and ONNX: one graph for all sizes, and batches not seen at export."""

import contextlib

import pytest
import torch
from torch._dynamo.utils import counters
from torch.utils.checkpoint import checkpoint

from regard.export import export_onnx, export_program

DIM = 48
DEVICES = [
    "cpu",
    pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU here")),
]


def make(mechanism):
    torch.manual_seed(0)
    return mechanism.attn_layer()(DIM, num_heads=3, num_prefix_tokens=1).eval()


def drawn(batch, tokens, **options):
    return torch.randn(batch, 1 + tokens, DIM, generator=torch.Generator().manual_seed(tokens + batch)).to(**options)


@pytest.mark.slow
def test_one_graph_serves_all_sizes(mechanism):
    torch.compiler.reset()
    counters.clear()
    mixer = make(mechanism)
    compiled = torch.compile(mixer, fullgraph=True, dynamic=True, backend="aot_eager")
    for batch, grid in ((2, (9, 10)), (3, (11, 12)), (4, (14, 13))):  # more than one block of 8 x 8 in each
        x = drawn(batch, grid[0] * grid[1])
        torch.testing.assert_close(compiled(x, grid_size=grid), mixer(x, grid_size=grid))
    assert counters["stats"]["unique_graphs"] == 1


def test_a_program_takes_any_batch(mechanism):
    mixer = make(mechanism)
    program = export_program(mixer, drawn(2, 49), dynamic_shapes={"x": {0: torch.export.Dim("batch", min=1, max=64)}})
    for batch in (1, 5):
        torch.testing.assert_close(program.module()(drawn(batch, 49)), mixer(drawn(batch, 49)))


@pytest.mark.slow
def test_an_onnx_file_takes_any_batch(mechanism, tmp_path):
    pytest.importorskip("onnxscript")
    runtime = pytest.importorskip("onnxruntime")
    mixer = make(mechanism)
    shapes = {"x": {0: torch.export.Dim("batch", min=1, max=64)}}
    file = export_onnx(mixer, drawn(2, 49), tmp_path / "mixer.onnx", dynamic_shapes=shapes)
    session = runtime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
    for batch in (1, 5):
        (found,) = session.run(None, {session.get_inputs()[0].name: drawn(batch, 49).numpy()})
        torch.testing.assert_close(torch.from_numpy(found), mixer(drawn(batch, 49)).detach(), rtol=1e-4, atol=1e-5)


@contextlib.contextmanager
def deterministic():
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("device", DEVICES)
def test_deterministic_checkpointed_and_lowered_by_autocast(mechanism, device):
    """All three at once, twice: the same bits, in autocast's dtype, on every device that is here."""
    mixer = make(mechanism).to(device)
    runs = []
    for wrapped in (mixer, lambda x: checkpoint(mixer, x, use_reentrant=False), mixer):
        x = drawn(2, 49, device=device).requires_grad_()
        with deterministic(), torch.autocast(device, dtype=torch.bfloat16):
            y = wrapped(x)
            runs.append((y.detach(), *torch.autograd.grad(y.float().square().sum(), x)))
    assert runs[0][0].dtype == torch.bfloat16 and runs[0][1].dtype == torch.float32
    for other in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(runs[0], other, strict=True))
