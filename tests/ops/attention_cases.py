"""Input factories and judgements that the tests of all attention operators share."""

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from regard.ops import SlowPathWarning, _dispatch, _library

# The baseline instruction set rounds a product and its sum, where eager PyTorch on the same machine may fuse them.
ROUNDINGS = 2.0 if _library.instruction_set() == "plain" else 1.0
BACKENDS = ["pytorch"] if _library.problem() else ["cpu", "pytorch"]
HALVES = (torch.bfloat16, torch.float16)

needs_kernels = pytest.mark.skipif(bool(_library.problem()), reason=_library.problem() or "kernels are here")

Layout = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Shape:
    batch: int = 2
    heads: int = 2
    key_heads: int = 2
    queries: int = 50
    keys: int = 50
    dim: int = 16
    value_dim: int = 16


def grid_values(*size: int, generator: torch.Generator, levels: int = 4) -> Tensor:
    """Multiples of 1/levels in [-1, 1]: their dot products are exact in float32, and full of ties."""
    return torch.randint(-levels, levels + 1, size, generator=generator).float() / levels


def inputs(
    shape: Shape, *, seed: int = 0, dtype: torch.dtype = torch.float32, exact: bool = True
) -> tuple[Tensor, ...]:
    """Query, key, value. With `exact` the logits have no rounding (head dims that are powers of 4 keep the scale exact
    too), so that the selection of every correct implementation is the same, ties included."""
    g = torch.Generator().manual_seed(seed)
    draw = grid_values if exact else lambda *size, generator: torch.randn(*size, generator=generator)
    query = draw(shape.batch, shape.heads, shape.queries, shape.dim, generator=g)
    key = draw(shape.batch, shape.key_heads, shape.keys, shape.dim, generator=g)
    value = torch.randn(shape.batch, shape.key_heads, shape.keys, shape.value_dim, generator=g)
    return query.to(dtype), key.to(dtype), value.to(dtype)


def contiguous(t: Tensor) -> Tensor:
    return t.contiguous()


def heads_last(t: Tensor) -> Tensor:
    """As timm's qkv projections leave it: (B, N, H, D) in memory."""
    return t.transpose(1, 2).contiguous().transpose(1, 2)


def channels_first(t: Tensor) -> Tensor:
    """Channels are not adjacent: (B, H, D, N) in memory."""
    return t.transpose(-1, -2).contiguous().transpose(-1, -2)


def gapped(t: Tensor) -> Tensor:
    """Every second token of a longer tensor whose gaps are NaN: reading one is seen at once."""
    wide = torch.full((*t.shape[:2], 2 * t.shape[2], t.shape[3] + 3), float("nan"), dtype=t.dtype)
    view = wide[:, :, ::2, 1 : 1 + t.shape[3]]
    view.copy_(t)
    return view


def far_apart(*tensors: Tensor) -> list[Tensor]:
    """The same tensors of two images, which lie 2^31 elements apart: memory that is never touched costs nothing."""
    memory = torch.empty((1 << 31) + sum(t[0].numel() for t in tensors), dtype=tensors[0].dtype)
    moved, start = [], 0
    for t in tensors:
        strides = (1 << 31, *t[0].contiguous().stride())
        moved.append(memory[start:].as_strided(t.shape, strides).copy_(t))
        start += t[0].numel()
    return moved


LAYOUTS: dict[str, Layout] = {f.__name__: f for f in (contiguous, heads_last, channels_first, gapped)}


def within_budget(ours: Tensor, eager: list[Tensor], exact: Tensor, terms: Tensor | None = None) -> None:
    """error(ours) <= 2 x error(eager in the same dtype), with a floor of one unit in the last place of the scale.

    The scale is the largest exact value, or `terms` where values are sums that cancel (the size of what they sum)."""
    assert ours.shape == exact.shape and ours.dtype == eager[0].dtype
    assert torch.isfinite(ours).all()
    if ours.numel() == 0:
        return
    error, *others = ((t.double() - exact).abs().max().item() for t in (ours, *eager))
    size = exact if terms is None else terms
    floor = torch.finfo(ours.dtype).eps * size.abs().max().item()
    budget = max(*(2.0 * other for other in others), floor) * ROUNDINGS
    assert error <= budget, f"error {error:.3g}, eager {others}, floor {floor:.3g}"


def slowly(*values: Any) -> Any:
    """A case that only a run of the slow tests takes."""
    return pytest.param(*values, marks=pytest.mark.slow)


Attend = Callable[..., Tensor]  # query, key, value -> output


def tells_the_slow_path_once(attend: Attend, tensors: Sequence[Tensor], says: str) -> None:
    """For tensors that no kernel takes."""
    _dispatch._said.clear()
    with pytest.warns(SlowPathWarning, match=says) as said:
        attend(*tensors)
    assert not any("triton" in str(one.message) for one in said)  # what a GPU would do is no news on a processor
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        attend(*tensors)


def keeps_one_graph_on_the_slow_path(attend: Attend, tensors: Sequence[Tensor]) -> None:
    """For tensors in float64; it is told while the call is compiled."""
    torch._dynamo.reset()
    _dispatch._said.clear()
    compiled = torch.compile(attend, fullgraph=True, backend="aot_eager")
    with pytest.warns(SlowPathWarning, match="float64"):
        output = compiled(*tensors)
    torch.testing.assert_close(output, attend(*tensors))


def is_the_same_without_kernels(attend: Attend, tensors: Sequence[Tensor], monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a machine without a compiler: the reason is told once, and the results agree."""
    _dispatch._said.clear()
    want = attend(*tensors)
    monkeypatch.setattr(_library, "problem", lambda: "the C++ kernels were not built")
    with pytest.warns(SlowPathWarning, match="not built"):
        torch.testing.assert_close(attend(*tensors), want)


def repeats_bit_for_bit(run: Callable[[], Sequence[Tensor]], *, tolerance: float) -> None:
    """Twice the same with the same threads, and nearly the same with others."""
    first = run()
    assert all(torch.equal(a, b) for a, b in zip(first, run(), strict=True))
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(3 - min(threads, 2))
        for a, b in zip(first, run(), strict=True):
            torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)
    finally:
        torch.set_num_threads(threads)


class Largest(TorchDispatchMode):
    """The most elements that any tensor made within this context has."""

    elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        made = function(*args, **(kwargs or {}))
        for t in made if isinstance(made, tuple | list) else (made,):
            if isinstance(t, torch.Tensor):
                self.elements = max(self.elements, t.untyped_storage().nbytes() // t.element_size())
        return made
