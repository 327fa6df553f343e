"""Export of a model: the file is run beside the model before anyone relies on it."""

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor, nn

from regard.benchmark import environment, interleave
from regard.conversion import convert
from regard.export import export_onnx, export_package, load_package
from regard.results import ConversionRecord, ExportCheck, ExportStudy
from regard.specs import parse
from regard.studies.photographs import installed_photographs
from regard.studies.pretrained import build_pretrained, model_size, read_picture
from regard.studies.settings import ExportSettings, SettingsError

__all__ = ["study_export"]

_ROUNDS = 5
_COARSEST = 32  # pixels, what a pyramid's last stage makes one token of
Run = Callable[[Tensor], Tensor]


def study_export(settings: ExportSettings, *, show_progress: bool = True) -> ExportStudy:
    """Convert a model if asked, export it, run the file beside it on a photograph, and time both.

    Args:
        settings: what to do.
        show_progress: what is being done, on standard error.

    Raises:
        SettingsError: a setting cannot be obeyed: unknown model or mechanism, weights that are missing or do not fit, a
            size that the model refuses, a dimension in which it is not free, a package that is not installed.
    """
    console = Console(stderr=True, quiet=not show_progress, highlight=False)

    def say(text: str) -> None:
        console.print(text, markup=False, soft_wrap=True)

    file = settings.file
    if not file.parent.is_dir():
        raise SettingsError("out", f"there is no folder {file.parent}; make it, or name another file")
    pattern = _pattern(settings)
    say(f"building {settings.model}")
    model = build_pretrained(
        settings.model,
        checkpoint=settings.checkpoint,
        random_weights=settings.random_weights,
        size=settings.size,
        any_size="size" in settings.open,
    )
    size = settings.size or model_size(model)
    record = None if pattern is None else _converted(model, pattern, size, settings)
    say(f"exporting to {file}")
    # Two images: torch.export takes a batch of one for a constant.
    images = torch.cat([_picture(model, size)] * 2 if "batch" in settings.open else [_picture(model, size)])
    run = _export(model, images, settings)
    say("running it beside the model")
    checks = [_check(model, run, images, size, seen=True)]
    if "batch" in settings.open:
        checks.append(_check(model, run, torch.cat([images, images[:1].flip(-1)]), size, seen=False))
    if "size" in settings.open:
        other = size + 2 * _step(model)
        checks.append(_check(model, run, _picture(model, other).expand(images.shape[0], -1, -1, -1), other, seen=False))
    say(f"speed, about {settings.seconds:g} s")
    # What stays open may be one image; what does not is as it was exported.
    one = images[:1] if "batch" in settings.open else images
    calls = {"model": lambda: _eager(model, one), "file": lambda: run(one)}
    timings = interleave(calls, budget_seconds=settings.seconds, min_rounds=_ROUNDS, warm_up=1)
    return ExportStudy(
        model=settings.model,
        mechanism=settings.mechanism or ("as it is" if settings.pattern is None else settings.pattern.name),
        converted=0 if record is None else len(record.converted),
        attentions=0 if record is None else len(record.rows),
        format=settings.format,
        file=str(file),
        bytes=sum(path.stat().st_size for path in (file, Path(f"{file}.data")) if path.exists()),
        weights=sum(tensor.numel() * tensor.element_size() for tensor in model.state_dict().values()),
        checks=checks,
        seconds=timings["model"].median,
        exported_seconds=timings["file"].median,
        repeats=timings["model"].repeats,
        environment=environment("cpu"),
        notes=["The weights are random."] if settings.random_weights else [],
    )


def _pattern(settings: ExportSettings) -> Any:
    """What `convert` is told; None to leave the model as it is."""
    if settings.mechanism is not None:
        try:
            return parse(settings.mechanism)
        except (ValueError, TypeError) as error:
            raise SettingsError("mechanism", str(error).removeprefix("mechanism: ")) from error
    if settings.pattern is None:
        return None
    try:
        found = json.loads(settings.pattern.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise SettingsError("pattern", f"{settings.pattern} cannot be read: {error}") from error
    if not isinstance(found, dict) or not found:
        raise SettingsError(
            "pattern", f"{settings.pattern} holds no patterns; `regard convert --save FILE` writes them"
        )
    return found


def _converted(model: nn.Module, pattern: Any, size: int, settings: ExportSettings) -> ConversionRecord:
    setting = "mechanism" if settings.pattern is None else "pattern"
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # of nothing converted: told below
            record = convert(model, pattern, example_inputs=_picture(model, size))
    except (ValueError, TypeError, RuntimeError) as error:
        raise SettingsError(setting, " ".join(str(error).split())[:400]) from error
    if not record.converted and settings.pattern is None and settings.mechanism != "dense":
        raise SettingsError(setting, f"it converts nothing in {settings.model}: {record.left[0].reason}")
    return record


def _export(model: nn.Module, images: Tensor, settings: ExportSettings) -> Run:
    """Write the file, and load it."""
    shapes: dict[int, Any] = {}
    if "batch" in settings.open:
        shapes[0] = torch.export.Dim("batch", min=1, max=4096)
    if "size" in settings.open:
        step = _step(model)
        for place, name in ((2, "height"), (3, "width")):
            shapes[place] = step * torch.export.Dim(name, min=2, max=512)
    dynamic = (shapes,) if shapes else None
    try:
        if settings.format == "pt2":
            export_package(model, images, settings.file, dynamic_shapes=dynamic, standalone=settings.standalone)
            package = load_package(settings.file)
            return lambda x: _first(package(x.contiguous()))
        export_onnx(
            model, images, settings.file, dynamic_shapes=dynamic, input_names=["image"], output_names=["output"]
        )
        return _onnx_session(settings.file)
    except ImportError as error:
        raise SettingsError("format", str(error)) from error
    except (ValueError, NotImplementedError) as error:
        raise SettingsError("dynamic", " ".join(str(error).split())[:600]) from error
    except RuntimeError as error:  # of torch's exporter, of AOTInductor, and of the compiler that it calls
        told = " ".join(str(error).split())[:600]
        raise SettingsError("format", f"{settings.model} cannot be written as {settings.format}: {told}") from error


def _onnx_session(file: Path) -> Run:
    try:
        import onnxruntime
    except ImportError as error:
        raise ImportError("onnxruntime is missing: pip install 'regard[export]'") from error
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    return lambda x: torch.from_numpy(session.run(None, {name: x.numpy()})[0])


def _check(model: nn.Module, run: Run, images: Tensor, size: int, *, seen: bool) -> ExportCheck:
    expected, found = _eager(model, images).float(), run(images).float()
    same = expected.flatten(1).argmax(dim=1) == found.flatten(1).argmax(dim=1)
    return ExportCheck(
        batch=images.shape[0],
        size=size,
        seen=seen,
        difference=(found - expected).abs().max().item(),
        largest=expected.abs().max().item(),
        same_top1=same.double().mean().item(),
    )


def _picture(model: nn.Module, size: int) -> Tensor:
    return read_picture(model, installed_photographs()[0], size)


def _step(model: nn.Module) -> int:
    """By how many pixels an image may grow: a patch, or what the last stage of a pyramid makes one token of."""
    patch = getattr(getattr(model, "patch_embed", None), "patch_size", None)
    return int(patch[0]) if patch is not None else _COARSEST


@torch.no_grad()
def _eager(model: nn.Module, images: Tensor) -> Tensor:
    return _first(model(images))


def _first(output: Any) -> Tensor:
    found: Tensor = output if isinstance(output, Tensor) else output[0]
    return found
