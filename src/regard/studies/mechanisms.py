"""Every mechanism and modifier under one recipe, and what each costs beside dense attention as images grow."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from regard.benchmark import environment
from regard.benchmark.timing import Timing, interleave
from regard.benchmark.workload import DIRECTIONS, FORWARD
from regard.report.summary import paired_difference, summarise
from regard.results import Comparison, LayerTime, MechanismResult, MechanismStudy
from regard.specs import Composed, Mechanism, parse, registered, registered_modifiers
from regard.studies.comparison import compare
from regard.studies.settings import CompareSettings

__all__ = ["COMPOSITIONS", "TRAINED", "VARIANTS", "MechanismSettings", "study_mechanisms"]

# The comparison's images have 81 tokens: options that leave a choice to make there. The others take their defaults.
TRAINED = {
    "knn": "knn(topk=0.125)",
    "moh": "moh(shared=0, routed=1)",
    "bilevel": "bilevel(num_regions=3, topk=3)",
    "proxy": "proxy(gamma=0.9, block_size=9, stride=1, min_tokens=9)",
    "sparsifiner": "sparsifiner(basis_grid=(9, 9))",
    "neighborhood": "neighborhood(kernel_size=5)",
}
# Other forms of the same mechanisms.
VARIANTS = (
    "knn(topk=0.5)",
    "knn(topk=0.125, metric='euclidean')",
    "knn(topk=0.125, tail='sample', num_samples=8)",
    "moh",
    "gated(kind='headwise')",
    "evit(keep_rate=0.5)",
)
# What no paper has, each beside its parts.
COMPOSITIONS = (
    "knn(topk=0.125) + gated",
    "knn(topk=0.125) + tap",
    "knn(topk=0.125) + adl",
    "knn(topk=0.125) + gated + tap",
    "clustered + tap",
    "multipole + evit",
)
_DENSE = "dense"
_DIM, _HEADS, _DEPTH, _PATCH = 384, 6, 4, 4


@dataclass(frozen=True)
class MechanismSettings:
    """What is trained and timed.

    Args:
        out: folder of the comparison; the same folder again resumes.
        mechanisms: text forms of what is trained, by the card's name; each registered one if None.
        variants, compositions: text forms of what is trained beside them.
        seeds, epochs, data, model: as in CompareSettings.
        sides: of the square grids that are timed, ascending.
        seconds: for timing one size and direction.
    """

    out: Path
    mechanisms: Mapping[str, str] | None = None
    variants: tuple[str, ...] = VARIANTS
    compositions: tuple[str, ...] = COMPOSITIONS
    seeds: int = 3
    epochs: int | None = None
    data: str = "embedded"
    model: str = "vit"
    sides: tuple[int, ...] = (14, 28, 56)
    seconds: float = 30.0


def study_mechanisms(
    settings: MechanismSettings, *, show_progress: bool = True, tell: Callable[[str], None] = print
) -> tuple[MechanismStudy, Comparison]:
    """Train all under one recipe, and time their layers; the comparison holds the attention maps.

    Raises:
        SettingsError, Interrupted: as compare does. ValueError: a composition is none.
    """
    texts = dict(settings.mechanisms) if settings.mechanisms is not None else default_texts()
    values = {name: parse(text) for name, text in texts.items()}
    composed = [_composition(text) for text in settings.compositions]
    parts = [part for one in composed for part in _parts(one)]
    everything = list(
        dict.fromkeys([parse(_DENSE), *values.values(), *map(parse, settings.variants), *parts, *composed])
    )
    comparison = compare(
        CompareSettings(
            mechanisms=tuple(map(str, everything)),
            data=settings.data,
            model=settings.model,
            epochs=settings.epochs,
            seeds=settings.seeds,
            out=settings.out,
            cost_seconds=0,
        ),
        show_progress=show_progress,
    )
    names = {str(value): name for name, value in values.items()}
    results = {str(one): MechanismResult(names.get(str(one), ""), str(one), one.label) for one in everything}
    for summary in summarise(comparison):
        one = results[summary.mechanism]
        one.accuracies = [run.accuracy for run in summary.runs]
        if summary.difference is not None:
            one.difference, one.half_width = summary.difference.mean, summary.difference.half_width
        one.parameters, one.flops = summary.parameters, summary.forward_flops
    for composition in composed:
        _judge_composition(results[str(composition)], composition, comparison)
    for mechanism, times in _times(everything, settings, tell).items():
        results[mechanism].times = times
        if not isinstance(parse(mechanism), Composed):  # a whole model's other layers would blur it
            results[mechanism].growth = _growth(times)
    recipe = {name: comparison.settings[name] for name in ("model", "data", "epochs", "seeds")}
    study = MechanismStudy(
        {**recipe, "tokens": [side * side for side in settings.sides], "dim": _DIM, "heads": _HEADS, "depth": _DEPTH},
        environment(),
        list(results.values()),
        notes=list(comparison.notes),
    )
    return study, comparison


def _composition(text: str) -> Composed:
    found = parse(text)
    if not isinstance(found, Composed):
        raise ValueError(f"compositions: expected a mechanism + a modifier, such as 'knn + gated', got {text!r}")
    return found


def _parts(composition: Composed) -> list[Mechanism]:
    """What a composition is held against: its mechanism, and each modifier around dense attention."""
    found = [composition.base, *(parse(modifier) for modifier in composition.modifiers)]
    return [part for part in found if part not in (composition, parse(_DENSE))]


def _judge_composition(result: MechanismResult, composition: Composed, comparison: Comparison) -> None:
    """The paired difference from the part that it beats by the least."""
    gains = {str(part): paired_difference(comparison, str(composition), str(part)) for part in _parts(composition)}
    found = {name: gain for name, gain in gains.items() if gain is not None}
    if found:
        result.best_part = min(found, key=lambda name: found[name].mean)
        result.gain, result.gain_half_width = found[result.best_part].mean, found[result.best_part].half_width


def default_texts() -> dict[str, str]:
    """Every registered mechanism, and every modifier around dense attention, by name."""
    names = [*registered(), *registered_modifiers()]
    return {name: TRAINED.get(name, name) for name in names}


def _times(
    mechanisms: list[Mechanism], settings: MechanismSettings, tell: Callable[[str], None]
) -> dict[str, list[LayerTime]]:
    """Layers beside a dense layer, and models of what changes a model beside a dense model, all interleaved."""
    found: dict[str, list[LayerTime]] = {str(one): [] for one in mechanisms}
    dense = parse(_DENSE)
    groups = (
        ([one for one in mechanisms if not isinstance(one, Composed)], _layer),
        ([dense, *(one for one in mechanisms if isinstance(one, Composed))], _model),
    )
    for side in settings.sides:
        for direction in DIRECTIONS:
            for group, make in groups:
                tell(f"timing {len(group)} at {side * side} tokens, {direction}")
                steps = {str(one): _step(*make(one, side), direction) for one in group}
                timings = interleave(steps, budget_seconds=settings.seconds, min_rounds=5, max_rounds=50)
                for one in group:
                    if make is _layer or one != dense:
                        point = _point(timings[str(one)], timings[_DENSE], side * side, direction)
                        found[str(one)].append(point)
    return found


def _step(
    call: Callable[[Tensor], Tensor], module: nn.Module, x: Tensor, direction: str
) -> Callable[[], Tensor | tuple[Tensor, ...]]:
    """One forward without autograd, or forward and backward to the input and all parameters."""
    if direction == FORWARD:
        return torch.no_grad()(lambda: call(x))
    leaf = x.requires_grad_()
    leaves = [leaf, *(parameter for parameter in module.parameters() if parameter.requires_grad)]
    return lambda: torch.autograd.grad(call(leaf).square().mean(), leaves, allow_unused=True)


def _point(timing: Timing, dense: Timing, tokens: int, direction: str) -> LayerTime:
    ratio = timing.ratio(dense)
    return LayerTime(tokens, direction, timing.median, ratio.median, ratio.low, ratio.high)


def _layer(mechanism: Mechanism, side: int) -> tuple[Callable[[Tensor], Tensor], nn.Module, Tensor]:
    torch.manual_seed(0)
    layer = mechanism.attn_layer()(_DIM, _HEADS, qkv_bias=True).eval()
    return lambda x: layer(x, grid_size=(side, side)), layer, torch.randn(1, side * side, _DIM)


def _model(mechanism: Mechanism, side: int) -> tuple[Callable[[Tensor], Tensor], nn.Module, Tensor]:
    torch.manual_seed(0)
    model = VisionTransformer(
        img_size=side * _PATCH, patch_size=_PATCH, embed_dim=_DIM, depth=_DEPTH, num_heads=_HEADS, num_classes=0,
        class_token=False, global_pool="avg", attn_layer=mechanism.attn_layer(),
    ).eval()  # fmt: skip
    mechanism.apply(model)
    return model, model, torch.randn(1, 3, side * _PATCH, side * _PATCH)


def _growth(times: list[LayerTime]) -> float | None:
    """The exponent of the forward's time over tokens, between the two largest sizes."""
    points = sorted((one.tokens, one.seconds) for one in times if one.direction == FORWARD)[-2:]
    if len(points) < 2:
        return None
    (fewer, less), (more, longer) = points
    return math.log(longer / less) / math.log(more / fewer)
