"""What `regard bench` knows of an operator: sizes, inputs, peers, gate. One small file an operator, in `operators/`."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Protocol

import torch
from torch import Tensor

import regard.ops
from regard.benchmark.workload import FORWARD, FORWARD_BACKWARD, attention
from regard.conversion.flops import counting_flops

__all__ = [
    "Case",
    "Entry",
    "Gate",
    "Peer",
    "normal_attention",
    "normal_tokens",
    "output_gradient",
    "prepared_call",
    "square_side",
]

Tensors = dict[str, Any]  # by the names of arguments
_NOTHING: Mapping[str, Any] = MappingProxyType({})
_SEED = 0


class Gate(Protocol):
    """What a correctness gate found; its text says how far the operator was from its budget."""

    @property
    def passed(self) -> bool: ...


@dataclass(frozen=True)
class Case:
    """One size of an operator.

    Args:
        tokens, batch, heads, head_dim: of the queries; clustering has one head, and its channels as head_dim.
        series: what it has in common with the sizes beside which growth over the tokens is told, such as "k = N/16".
        options: keyword arguments of the operator; plain values, since they travel to other processes.
        quick: measured with --quick, too.
    """

    tokens: int
    batch: int = 1
    heads: int = 6
    head_dim: int = 64
    series: str = ""
    options: Mapping[str, Any] = field(default_factory=dict)
    quick: bool = False

    @property
    def label(self) -> str:
        """`N 4,096, B 8, k = N/16`"""
        parts = [f"N {self.tokens:,}", f"B {self.batch}" if self.batch > 1 else "", self.series]
        return ", ".join(filter(None, parts))


def _never(case: Case, dtype: str, direction: str) -> str:
    return ""


@dataclass(frozen=True)
class Peer:
    """Another way to compute what an operator computes, or what it stands in for.

    Args:
        name: in tables.
        make: of a case: a callable that takes the operator's tensors by name.
        refuses: of a case, a dtype and a direction: why it cannot run here; empty if it can.
        compiles: it is compiled at its first call, so its peak memory would be the compiler's.
        growth: with which power of the tokens its time grows at most, to tell in time that it would take too long.
    """

    name: str
    make: Callable[[Case], Callable[..., Any]]
    refuses: Callable[[Case, str, str], str] = _never
    compiles: bool = False
    growth: float = 2.0


def normal_attention(case: Case, dtype: str, device: str) -> Tensors:
    """Standard normal queries, keys and values: the same on every device, in every dtype up to rounding."""
    generator = torch.Generator().manual_seed(_SEED)
    size = (case.batch, case.heads, case.tokens, case.head_dim)
    kind = getattr(torch, dtype)
    return {name: torch.randn(size, generator=generator).to(device, kind) for name in ("query", "key", "value")}


def normal_tokens(case: Case, dtype: str, device: str) -> Tensors:
    """Standard normal tokens (B, N, C), as the norm before each attention leaves them in a fresh model."""
    generator = torch.Generator().manual_seed(_SEED)
    x = torch.randn(case.batch, case.tokens, case.heads * case.head_dim, generator=generator)
    return {"x": x.to(device, getattr(torch, dtype))}


@dataclass(frozen=True)
class Entry:
    """An operator as it is measured.

    Args:
        name: on the command line.
        operator: its function's name in regard.ops.
        cases: sizes, ascending within a series.
        gate: of a case, its tensors and whether to judge gradients: what the correctness gate found.
        peers: beside it in the same rounds.
        inputs: of a case, dtype and device: the operator's tensors by name; `query`, `key` and `value` get gradients.
        flops: useful operations of one run, of a case and a direction; counted by torch's counter with the
            operators' own formulas if None.
        has_gradient: False for what goes forward only.
        approximates: it stands in for dense attention, so how near it comes is told beside its time.
    """

    name: str
    operator: str
    cases: tuple[Case, ...]
    gate: Callable[[Case, Tensors, bool], Gate]
    peers: tuple[Peer, ...]
    inputs: Callable[[Case, str, str], Tensors] = normal_attention
    flops: Callable[[Case, str], float] | None = None
    has_gradient: bool = True
    approximates: bool = False

    def own(self, case: Case) -> Callable[..., Any]:
        """The operator with the case's options."""
        function = getattr(regard.ops, self.operator)
        options = dict(case.options)
        return lambda **tensors: function(**tensors, **options)

    @property
    def directions(self) -> tuple[str, ...]:
        """Forward, and forward + backward where there are gradients."""
        return (FORWARD, FORWARD_BACKWARD) if self.has_gradient else (FORWARD,)

    def counted(
        self, case: Case, direction: str, call: Callable[[], tuple[Tensor, ...]]
    ) -> tuple[float, tuple[Tensor, ...]]:
        """Useful operations of one run of the operator, which is `call`, and what the run gave."""
        with counting_flops() as counter:
            results = call()
        return float(counter.get_total_flops() if self.flops is None else self.flops(case, direction)), results


def prepared_call(function: Callable[..., Any], tensors: Tensors, direction: str) -> Callable[[], tuple[Tensor, ...]]:
    """A callable that runs the function once and returns its results, and the gradients where there are any.

    Raises:
        ValueError: gradients are asked of what is no attention.
    """
    if "query" in tensors:
        query, key, value = (tensors[name] for name in ("query", "key", "value"))
        rest = {name: one for name, one in tensors.items() if name not in ("query", "key", "value")}

        def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            output: Tensor = function(query=query, key=key, value=value, **rest)
            return output

        return attention(attend, [query, key, value, output_gradient(tensors)], direction)
    if direction != FORWARD:
        raise ValueError(f"direction: expected {FORWARD!r} of what has no gradient, got {direction!r}")

    def forward() -> tuple[Tensor, ...]:
        with torch.no_grad():
            return tuple(tensors_in(function(**tensors)))

    return forward


def output_gradient(tensors: Tensors) -> Tensor:
    """Standard normal, of the shape and dtype of an attention's output."""
    query, value = tensors["query"], tensors["value"]
    generator = torch.Generator().manual_seed(_SEED + 1)
    return torch.randn((*query.shape[:-1], value.shape[-1]), generator=generator).to(query.device, query.dtype)


def tensors_in(result: Any) -> list[Tensor]:
    """The tensors of a result: one, or those in tuples of any depth."""
    if isinstance(result, Tensor):
        return [result]
    return [tensor for one in result for tensor in tensors_in(one)] if isinstance(result, list | tuple) else []


def square_side(tokens: int) -> int:
    """The side of a square grid. Raises ValueError if the tokens make none."""
    side = math.isqrt(tokens)
    if side * side != tokens:
        raise ValueError(f"tokens: {tokens} make no square grid")
    return side
