"""Who computes an operator: backends, why they refuse, and how that is told.

An operator lists its backends, best first. The first that does not refuse the call runs. A call that lands on the
PyTorch path says so once, with the reason: nobody falls onto a slow path in silence.
"""

import contextlib
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor

__all__ = [
    "Backend",
    "Explanation",
    "Operator",
    "Refusal",
    "SlowPathWarning",
    "allows",
    "constant_when_traced",
    "explain",
    "functorch_active",
    "only_backend",
]

Function = TypeVar("Function", bound=Callable[..., Any])


def constant_when_traced(function: Function) -> Function:
    """Let torch.compile call `function` while it traces, and take the result for a constant.

    What torch.compiler.assume_constant_result does; but that imports torch._dynamo, which takes a second. The mark is
    the same in torch 2.11 and 2.15; without it a compiled call breaks its graph here.
    """
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


class SlowPathWarning(UserWarning):
    """An operator runs on its PyTorch path because every kernel refused the call."""


@dataclass(frozen=True)
class Refusal:
    """Why a backend does not take a call, and what would make it.

    Args:
        reason: in words.
        elsewhere: the tensors are on a device that is not this backend's: no news to who runs into the slow path there.
    """

    reason: str
    elsewhere: bool = False


class Backend(Protocol):
    """One way to compute an operator."""

    @property
    def name(self) -> str: ...

    @property
    def is_slow_path(self) -> bool:
        """True of the PyTorch path, which takes every valid call."""

    def supports(self, call: Any) -> Refusal | None:
        """None if this backend computes the call, else why not."""

    def run(self, call: Any) -> Tensor:
        """Compute a call that `supports` did not refuse."""


@dataclass(frozen=True)
class Explanation:
    """Which backend would run a call, and why each backend before it refuses."""

    operator: str
    backend: str
    refusals: tuple[tuple[str, str], ...]

    def __str__(self) -> str:
        lines = [f"{self.operator}: {self.backend}"]
        lines += [f"  {name} refuses: {reason}" for name, reason in self.refusals]
        return "\n".join(lines)


_only: str | None = None
_said: set[tuple[str, str]] = set()
_OPERATORS: dict[str, "Operator"] = {}


@dataclass(frozen=True)
class Operator:
    """A public operator: its name, how its arguments become a checked call, and its backends, best first."""

    name: str
    bind: Callable[..., Any]
    backends: tuple[Backend, ...]

    def __post_init__(self) -> None:
        _OPERATORS[self.name] = self

    def choose(self, call: Any) -> tuple[Backend, list[tuple[str, Refusal]]]:
        refusals: list[tuple[str, Refusal]] = []
        for backend in self.backends:
            if _only is not None and backend.name != _only:
                refusals.append((backend.name, Refusal(f"only_backend({_only!r}) is in force")))
                continue
            refusal = backend.supports(call)
            if refusal is None:
                return backend, refusals
            refusals.append((backend.name, refusal))
        reasons = "; ".join(f"{name}: {refusal.reason}" for name, refusal in refusals)
        raise RuntimeError(f"{self.name}: no backend takes this call: {reasons}")

    def run(self, call: Any) -> Tensor:
        backend, refusals = self.choose(call)
        if backend.is_slow_path and refusals and _only is None:
            news = [one for one in refusals if not one[1].elsewhere] or refusals
            told = "; ".join(f"{name} refuses: {refusal.reason}" for name, refusal in news)
            _say_once(self.name, backend.name, told)
        return backend.run(call)


@constant_when_traced  # a compiled call says it while it is traced
def _say_once(operator: str, chosen: str, told: str) -> None:
    if (operator, told) in _said:
        return
    _said.add((operator, told))
    warnings.warn(
        f"regard: {operator} runs on its slow path ({chosen}). {told}. This is said once; regard.explain tells more.",
        SlowPathWarning,
        stacklevel=5,
    )


def explain(operator: Callable[..., Tensor] | str, *args: Any, **kwargs: Any) -> Explanation:
    """Say which backend would run a call, and why each better one refuses. Nothing is computed.

    Args:
        operator: an operator of regard (`regard.knn_attention`) or its name.
        args, kwargs: the arguments that the operator would be called with.

    Raises:
        ValueError: the operator is unknown, or the arguments are such that the operator itself would raise.
    """
    name = operator if isinstance(operator, str) else getattr(operator, "__name__", repr(operator))
    if name not in _OPERATORS:
        raise ValueError(f"operator: unknown {name!r}; known: {', '.join(sorted(_OPERATORS))}")
    found = _OPERATORS[name]
    backend, refusals = found.choose(found.bind(*args, **kwargs))
    return Explanation(name, backend.name, tuple((one, refusal.reason) for one, refusal in refusals))


@contextlib.contextmanager
def only_backend(name: str) -> Iterator[None]:
    """Within this context operators run on the named backend or raise: for tests and side-by-side measurements."""
    global _only
    before, _only = _only, name
    try:
        yield
    finally:
        _only = before


def allows(backend: str) -> bool:
    """False inside an `only_backend` of another name: for parts of an operator that have backends of their own."""
    return _only in (None, backend)


def functorch_active() -> bool:
    """True inside torch.func transforms (vmap, grad, jvp ...), which see through PyTorch operations only."""
    return not torch.compiler.is_compiling() and torch._C._functorch.peek_interpreter_stack() is not None
