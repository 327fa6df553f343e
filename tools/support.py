"""Write docs/support.md: what works for each operator, dtype and backend, found by running it.

    python tools/support.py            runs everything (five to ten minutes) and writes the page
    python tools/support.py --quick    float32 only, and prints

Errors are those of this machine; what works is held by the tests.
"""

import argparse
import itertools
import sys
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from regard.benchmark import environment
from regard.benchmark.calls import CALLS, OperatorCall
from regard.export import export_onnx, export_program
from regard.markdown import markdown_table
from regard.ops import SlowPathWarning, only_backend
from regard.results import write_text

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "support.md"
OPERATORS = ("knn", "multipole", "neighborhood", "routed", "kmeans", "density_peaks")
DTYPES = ("float32", "bfloat16", "float16", "float64")
BACKENDS = ("cpu", "pytorch")
COLUMNS = ("operator", "dtype", "backend", "forward", "backward", "compile", "export", "ONNX")
UNMEASURED = "not yet measured on a GPU"
SHAPE = (2, 3, 96, 32)  # batch, heads, tokens, head_dim
OTHER = (3, 3, 160, 32)  # not seen at export
NOTICE = "<!-- Written by tools/support.py, which runs every cell. Edit that, then run it. -->"

TEXT = f"""{NOTICE}

# What works where

Each cell was run: {" x ".join(map(str, SHAPE))} (batch, heads, tokens, head_dim), standard normal numbers.

- *forward*, *backward*: the largest error against the PyTorch path in float64 on the same inputs, as a share of the
  largest output or gradient. One unit in the last place is 1.2e-07 of float32, 7.8e-03 of bfloat16, 9.8e-04 of float16.
- *compile*: `torch.compile(fullgraph=True, dynamic=True)`, forward and backward, gives the same at two sizes with one
  graph (backend `aot_eager`; inductor is in the slow tests).
- *export*: `torch.export` with batch and tokens left open runs at a size that it did not see.
- *ONNX*: the file runs in onnxruntime at a size that it did not see, and differs by no more than the dtype's rounding.
  It holds the operator's reference, so it is the same for both backends.

k-means and density peaks have no gradient; their *backward* is that of the tokens merged by their clusters. A half
type is computed in float32 inside. onnxruntime has no bfloat16 addition on the processor, which the k-means call makes
after the operator: hence its *no*. What a backend refuses (`regard.explain` tells why) is left to the PyTorch path,
with one warning.
"""


class Layer(nn.Module):
    """The call in a dtype, between float32 inputs and outputs: what onnxruntime can be given."""

    def __init__(self, call: OperatorCall, dtype: torch.dtype) -> None:
        super().__init__()
        self.call, self.dtype = call, dtype

    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return self.call.run(*(t.to(self.dtype) for t in (query, key, value))).float()


def drawn(shape: tuple[int, ...], dtype: torch.dtype) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator).to(dtype) for _ in range(3)]


def differentiated(run: Callable[..., Tensor], tensors: list[Tensor]) -> list[Tensor]:
    """The output, and the gradients of its square's sum."""
    leaves = [t.detach().clone().requires_grad_() for t in tensors]
    output = run(*leaves)
    return [output.detach(), *torch.autograd.grad(output.float().square().sum(), leaves, materialize_grads=True)]


def share(found: Tensor, exact: Tensor) -> float:
    return float((found.double() - exact).abs().max() / exact.abs().max().clamp(min=1e-300))


def errors(call: OperatorCall, dtype: torch.dtype, backend: str) -> tuple[str, str]:
    tensors = drawn(SHAPE, dtype)
    with only_backend("pytorch"):
        exact = differentiated(call.run, [t.double() for t in tensors])
    with only_backend(backend):
        found = differentiated(call.run, tensors)
    gradients = max(share(a, b) for a, b in zip(found[1:], exact[1:], strict=True) if bool(b.any()))
    return f"{share(found[0], exact[0]):.0e}", f"{gradients:.0e}"


def compiles(call: OperatorCall, dtype: torch.dtype, backend: str) -> str:
    from torch._dynamo.utils import counters

    torch._dynamo.reset()
    counters.clear()
    compiled = torch.compile(call.run, fullgraph=True, dynamic=True, backend="aot_eager")
    with only_backend(backend):
        for shape in (SHAPE, OTHER):
            tensors = drawn(shape, dtype)
            for a, b in zip(differentiated(compiled, tensors), differentiated(call.run, tensors), strict=True):
                torch.testing.assert_close(a, b)
    graphs = counters["stats"]["unique_graphs"]
    return "yes" if graphs == 1 else f"{graphs} graphs"


def dynamic() -> dict[str, dict[int, object]]:
    batch, tokens = torch.export.Dim("batch", min=1, max=1000), torch.export.Dim("tokens", min=16, max=10000)
    return {name: {0: batch, 2: tokens} for name in ("query", "key", "value")}


def exports(call: OperatorCall, dtype: torch.dtype, backend: str) -> str:
    with only_backend(backend), torch.no_grad():
        layer, other = Layer(call, dtype).eval(), drawn(OTHER, torch.float32)
        program = export_program(layer, tuple(drawn(SHAPE, torch.float32)), dynamic_shapes=dynamic())
        torch.testing.assert_close(program.module()(*other), layer(*other))
    return "yes"


def runs_as_onnx(call: OperatorCall, dtype: torch.dtype, backend: str) -> str:
    import onnxruntime

    layer, other = Layer(call, dtype).eval(), drawn(OTHER, torch.float32)
    with only_backend(backend), torch.no_grad(), tempfile.TemporaryDirectory() as folder:
        file = export_onnx(
            layer, tuple(drawn(SHAPE, torch.float32)), Path(folder) / "layer.onnx", dynamic_shapes=dynamic()
        )
        session = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
        given = {one.name: t.numpy() for one, t in zip(session.get_inputs(), other, strict=True)}
        found, expected = torch.from_numpy(session.run(None, given)[0]), layer(*other)
    tolerance = max(1e-5, 2 * torch.finfo(dtype).eps)
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance * float(expected.abs().max()))
    return "yes"


def tried(check: Callable[..., str], *arguments: object) -> str:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return check(*arguments)
    except Exception as error:
        print(f"{check.__name__}{arguments}: {' '.join(str(error).split())[:400]}", file=sys.stderr)
        return "no"


def rows(dtypes: tuple[str, ...]) -> list[tuple[str, ...]]:
    found, as_onnx = [], {}
    for kind, name, backend in itertools.product(dtypes, OPERATORS, BACKENDS):
        call, dtype = CALLS[name], getattr(torch, kind)
        if backend == "cpu" and kind == "float64":
            found.append((name, kind, backend, *["refused"] * 5))
            continue
        one = (call, dtype, backend)
        try:
            forward, backward = errors(*one)
        except Exception as error:
            print(f"errors{one}: {error}", file=sys.stderr)
            forward = backward = "no"
        if (name, kind) not in as_onnx:  # the file is the same for both
            as_onnx[name, kind] = tried(runs_as_onnx, *one)
        row = (name, kind, backend, forward, backward, tried(compiles, *one), tried(exports, *one), as_onnx[name, kind])
        print(row, file=sys.stderr)
        found.append(row)
    return sorted(found, key=lambda row: (OPERATORS.index(row[0]), DTYPES.index(row[1]), row[2]))


def page(found: list[tuple[str, ...]]) -> str:
    gpu = [(name, "float32, bfloat16, float16", "cuda", UNMEASURED, *[""] * 4) for name in OPERATORS]
    where = environment("cpu")
    measured = (
        f"Measured with `python tools/support.py` on {where.machine}, {where.instruction_set}, torch {where.torch}."
    )
    return "\n".join([TEXT, markdown_table(COLUMNS, [*found, *gpu]), measured, ""])


def main() -> int:
    parser = argparse.ArgumentParser(description="Write docs/support.md by running every operator.")
    parser.add_argument("--quick", action="store_true", help="float32 only; print, write nothing")
    options = parser.parse_args()
    warnings.simplefilter("ignore", SlowPathWarning)
    text = page(rows(DTYPES[:1] if options.quick else DTYPES))
    if options.quick:
        print(text)
    else:
        write_text(PAGE, text)
        print(f"wrote {PAGE.relative_to(ROOT)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
