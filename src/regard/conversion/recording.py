"""The run in which a model's attention is found."""

import contextlib
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from regard.conversion._snapshot import left_as_found
from regard.conversion.adapters import Adapter, AdapterError, adapter_for, reason_left
from regard.conversion.choice import Choice
from regard.conversion.inputs import Inputs
from regard.conversion.layout import layout_of
from regard.conversion.seam import SCALED_DOT_PRODUCT_ATTENTION, Layout, Seam, forward_with, is_closed
from regard.specs import Mechanism

__all__ = ["Found", "attention_of", "module_name"]

_SOFTMAX = {torch.softmax, Tensor.softmax, F.softmax}
_WATCHED = {*_SOFTMAX, SCALED_DOT_PRODUCT_ATTENTION, F.multi_head_attention_forward}
_SDPA = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal")  # what may be passed by position
_REFUSALS = (ValueError, TypeError, NotImplementedError)


@dataclass
class Found:
    """An attention module.

    Args:
        name: its name in the model.
        around: the modules that hold it, outermost first.
        tokens, keys, heads: of its first call that attends tokens to tokens, else of its first call.
        mechanism: what it shall have, None if it is left.
        reason: why it is left.
    """

    name: str
    module: nn.Module
    around: tuple[nn.Module, ...]
    tokens: int
    keys: int
    heads: int
    adapter: Adapter | None = None
    layout: Layout = field(default_factory=Layout)
    mechanism: Mechanism | None = None
    reason: str = ""


def module_name(name: str) -> str:
    """A module's name without what torch.compile wraps around a part of a model."""
    return ".".join(part for part in name.split(".") if part != "_orig_mod")


def attention_of(model: nn.Module, inputs: Inputs, choice: Choice) -> list[Found]:
    """Run the model and find its attention modules, in the order of their first calls. The model is left as found.

    A module's mechanism is tried on the very call that the module makes; one that refuses it is told by `reason`.

    Raises:
        AdapterError: an adapter does not fit its class, or does not compute what the class computes.
        ValueError: the model refuses the inputs.
    """
    recorder = _Recorder(model, choice)
    with left_as_found(model), recorder.watching():
        try:
            model(*inputs.args, **inputs.kwargs)
        except AdapterError:
            raise
        except Exception as error:
            raise ValueError(
                f"example_inputs: {type(model).__name__} fails on {inputs.text}: {type(error).__name__}: {error}"
            ) from error
    return list(recorder.found.values())


class _Recorder:
    """Sees the attention of a running model: calls of scaled_dot_product_attention, adapters' calls, softmaxes."""

    def __init__(self, model: nn.Module, choice: Choice) -> None:
        self.model, self.choice = model, choice
        self.names = {module: name for name, module in model.named_modules()}
        self.around = _around(model)
        self.running: list[tuple[nn.Module, tuple[Any, ...]]] = []  # modules whose forward runs, with its arguments
        self.found: dict[nn.Module, Found] = {}
        self.adapters: dict[nn.Module, Adapter] = {}
        self.asleep = False

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        """Hang into the model all that tells who calls; `left_as_found` takes it out again."""
        for module, name in self.names.items():
            if isinstance(module, torch.jit.ScriptModule):  # what runs in it cannot be seen
                continue
            selected = isinstance(self.choice.of(module_name(name)), Mechanism)
            adapter = adapter_for(module) if selected else None
            if adapter is not None and (adapter.forward is None or "forward" not in vars(module)):
                self.adapters[module] = adapter
            if is_closed(module):
                vars(module)["fused_attn"] = True
            module.register_forward_pre_hook(self._enter)
            module.register_forward_hook(self._leave, with_kwargs=True, always_call=True)
        with _Watch(self):
            yield

    def _enter(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        self.running.append((module, args))

    def _leave(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        adapter = self.adapters.get(module)
        if adapter is not None and adapter.forward is not None and output is not None:  # None: the module raised
            self._run_adapter(module, adapter, args, kwargs, output)
        self.running.pop()

    def _run_adapter(
        self, module: nn.Module, adapter: Adapter, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
    ) -> None:
        """Record the adapter's call, and hold what it computes against what the class computed."""

        def attention(query: Tensor, key: Tensor, value: Tensor, *args: Any, **options: Any) -> Tensor:
            options |= dict(zip(_SDPA[3:], args, strict=False))
            self.call(module, query, key, value, **options)
            for beside in ("grid_size", "num_prefix_tokens"):
                options.pop(beside, None)
            return F.scaled_dot_product_attention(query, key, value, **options)

        with self._sleeping():
            ours = forward_with(module, attention, adapter, None, args, kwargs)
        if not _agree(_first(ours), _first(output)):
            raise AdapterError(
                f"model: {module_name(self.names[module])!r} does not compute what this version of regard knows of its "
                f"class, {_class_of(module)}. Leave it out (where=...), or use a version of its library that regard is "
                "tested with"
            )

    def intercepted(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """One call of a torch function in the running model."""
        if self.asleep or not self.running:
            return
        module, inputs = self.running[-1]
        if isinstance(module, nn.Softmax) and len(self.running) > 1:  # it belongs to the attention that holds it
            module, inputs = self.running[-2]
        adapter = self.adapters.get(module)
        if adapter is not None and adapter.forward is not None:
            return
        if func is SCALED_DOT_PRODUCT_ATTENTION:
            options = {**dict(zip(_SDPA, args, strict=False)), **kwargs}
            if adapter is not None and adapter.grid is not None:
                options["grid_size"] = adapter.grid(module, inputs)
            with self._sleeping():
                self.call(module, **options)
        elif func is F.multi_head_attention_forward:
            query, key, heads = args[0], args[1], args[4]
            self._add(module, query.shape[0], key.shape[0], heads, "calls F.multi_head_attention_forward by itself")
        elif func in _SOFTMAX:
            scores, dim = args[0], kwargs.get("dim", args[1] if len(args) > 1 else None)
            over_keys = scores.dim() >= 3 and dim in (-1, scores.dim() - 1)  # a classifier's is of rank 2
            if over_keys or reason_left(module):
                heads = scores.shape[-3] if scores.dim() > 3 else 1
                self._add(module, scores.shape[-2], scores.shape[-1], heads, _by_hand(module))

    def call(self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, **options: Any) -> None:
        """One attention of a module; its mechanism is tried on it."""
        found = self._add(module, query.shape[-2], key.shape[-2], query.shape[-3], "")
        mechanism = found.mechanism
        if mechanism is None:
            return
        try:
            Seam(module, mechanism, found.adapter, found.layout).attend(query, key, value, **options)
        except _REFUSALS as error:
            told = str(error).splitlines()[0] if str(error) else type(error).__name__
            found.mechanism, found.reason = None, f"{mechanism.name} refuses: {told}"

    def _add(self, module: nn.Module, tokens: int, keys: int, heads: int, problem: str) -> Found:
        """The row of a module, made at its first call and made anew at its first that attends tokens to tokens."""
        known = self.found.get(module)
        eligible = tokens > 1 and keys > 1
        if known is not None and (problem or not eligible or (known.tokens > 1 and known.keys > 1)):
            return known
        name, around = module_name(self.names[module]), self.around[module]
        found = Found(name, module, around, tokens, keys, heads)
        chosen = self.choice.of(name)
        if isinstance(chosen, str):
            found.reason = chosen
        elif reason := reason_left(module):
            found.reason = reason
        elif not eligible:
            found.reason = "one query looks at all tokens: a pool" if tokens == 1 else "all queries look at one key"
        elif problem:
            found.reason = problem
        else:
            found.mechanism, found.adapter = chosen, self.adapters.get(module)
            found.layout = layout_of((*around, module), keys)
        self.found[module] = found
        return found

    @contextlib.contextmanager
    def _sleeping(self) -> Iterator[None]:
        """Within this context nothing is recorded."""
        before, self.asleep = self.asleep, True
        try:
            yield
        finally:
            self.asleep = before


class _Watch(TorchFunctionMode):
    """Shows a recorder every call of a torch function."""

    def __init__(self, recorder: _Recorder) -> None:
        super().__init__()
        self.recorder = recorder

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in _WATCHED:
            self.recorder.intercepted(func, args, kwargs or {})
        return func(*args, **(kwargs or {}))


def _around(model: nn.Module) -> dict[nn.Module, tuple[nn.Module, ...]]:
    """For each module those that hold it, outermost first."""
    found: dict[nn.Module, tuple[nn.Module, ...]] = {model: ()}
    for module in model.modules():
        for child in module.children():
            found.setdefault(child, (*found[module], module))
    return found


def _by_hand(module: nn.Module) -> str:
    if "forward" in vars(module):
        return "its `forward` attribute was replaced by something that regard does not know"
    if getattr(getattr(module, "config", None), "_attn_implementation", None) == "eager":
        return "computes attention by hand; call model.set_attn_implementation('sdpa') first"
    return f"takes its softmax by hand, and regard has no adapter for {_class_of(module)}"


def _class_of(module: nn.Module) -> str:
    return f"{type(module).__module__}.{type(module).__qualname__}"


def _first(output: Any) -> Any:
    return output[0] if isinstance(output, tuple) else output


def _agree(ours: Tensor, theirs: Tensor) -> bool:
    """Half of the digits that products carry are equal: rounding stays far below, a wrong equation does not.

    Where the class itself gives NaN or infinity there is nothing to compare.
    """
    if ours.shape != theirs.shape:
        return False
    finite = theirs.isfinite()
    ours, theirs = ours[finite], theirs[finite].to(ours.dtype)
    if not len(theirs):
        return True
    return bool(((ours - theirs).abs() <= math.sqrt(_rounding(ours.dtype)) * theirs.abs().max()).all())


def _rounding(dtype: torch.dtype) -> float:
    """The relative rounding of a product's factors: in float32 the user may have allowed TF32 or bfloat16."""
    eps = torch.finfo(dtype).eps
    if dtype != torch.float32:
        return eps
    try:
        precision = torch.get_float32_matmul_precision()
    except RuntimeError:  # set through torch's newer interface
        precision = "medium"
    return {"highest": eps, "high": 2.0**-10}.get(precision, 2.0**-7)
