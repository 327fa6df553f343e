"""`regard doctor`: versions, kernels, and which backend takes which call."""

import dataclasses
import json
import platform
from dataclasses import dataclass
from importlib import metadata
from typing import Any

__all__ = ["Doctor"]


@dataclass(frozen=True)
class Doctor:
    """Tell versions, kernels, threads, and which backend takes which call.

    Args:
        json: Print JSON instead of text.
    """

    json: bool = False

    def __call__(self) -> int:
        report = examine()
        if self.json:
            print(json.dumps(dataclasses.asdict(report), indent=1))
        else:
            _print(report)
        return 0


@dataclass(frozen=True)
class SampleCall:
    """A call of an operator, and who would run it."""

    call: str
    backend: str  # empty if the call cannot be made here
    refusals: tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class Report:
    """What `regard doctor` found."""

    versions: dict[str, str]
    machine: dict[str, Any]
    kernels: dict[str, str]
    calls: tuple[SampleCall, ...]


def examine() -> Report:
    """Look at this installation. Nothing is computed."""
    import torch

    from regard.ops import _library

    problem = _library.problem()
    accelerators = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return Report(
        versions={"python": platform.python_version(), **{name: _version(name) for name in _PACKAGES}},
        machine={
            "processor": platform.processor() or platform.machine(),
            "system": platform.platform(),
            "threads": torch.get_num_threads(),
            "accelerators": accelerators,
        },
        kernels={"C++": problem or "loaded", "instruction set": _library.instruction_set()},
        calls=tuple(_sample_calls()),
    )


_PACKAGES = ("regard", "torch", "torchvision", "timm", "triton")


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"


def _sample_calls() -> list[SampleCall]:
    import torch

    from regard.ops import explain

    samples: list[tuple[str, dict[str, Any], dict[str, Any]]] = [
        ("float32", {}, {}),
        ("bfloat16", {"dtype": torch.bfloat16}, {}),
        ("float16", {"dtype": torch.float16}, {}),
        ("float64", {"dtype": torch.float64}, {}),
        ("float32, dropout_p=0.1", {}, {"dropout_p": 0.1}),
        ("float32 on cuda", {"device": "cuda"}, {}),
    ]
    found = []
    for label, tensor, options in samples:
        call = f"knn_attention, {label}"
        if tensor.get("device") == "cuda" and not torch.cuda.is_available():
            found.append(SampleCall(call, "", (("cuda", "torch sees no such device here"),)))
            continue
        query = torch.zeros(1, 2, 16, 32, **tensor)
        answer = explain("knn_attention", query, query, query, topk=0.5, **options)
        found.append(SampleCall(call, answer.backend, answer.refusals))
    return found


def _print(report: Report) -> None:
    from rich.console import Console
    from rich.text import Text

    console = Console(highlight=False, soft_wrap=True)
    for title, pairs in (("versions", report.versions), ("machine", report.machine), ("kernels", report.kernels)):
        console.print(Text(title, style="bold"))
        for name, value in pairs.items():
            text = (", ".join(value) or "none") if isinstance(value, list) else str(value)
            console.print(Text(f"  {name:16} {text}"))
    console.print(Text("who runs what", style="bold"))
    for one in report.calls:
        console.print(Text(f"  {one.call:38} {one.backend or 'not possible'}"))
        for name, reason in one.refusals:
            console.print(Text(f"    {name}: {reason}", style="dim"))
