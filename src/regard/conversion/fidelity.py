"""Fidelity: how close the features of a model come to those that dense attention gives.

All figures are judged at the output of `forward_features`, on patch tokens; prefix tokens (class, registers) stand
apart. A large mean that all patches share flatters the cosine, so the centred cosine stands beside it. Quote a figure
over at least ten pictures.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from regard.results import Fidelity, PictureFidelity

__all__ = [
    "Features",
    "FidelityMeter",
    "compare_models",
    "features_of",
    "measure_fidelity",
    "patch_cosines",
    "picture_fidelity",
]

_WORST = 0.01  # the share of patches that counts as the worst


def picture_fidelity(
    dense_features: Tensor,
    features: Tensor,
    *,
    num_prefix_tokens: int = 0,
    dense_logits: Tensor | None = None,
    logits: Tensor | None = None,
) -> list[PictureFidelity]:
    """The fidelity of each picture, computed in float64 one picture at a time.

    With a_i the dense feature of patch i, b_i the other's, m the mean of a_i over the picture's patches:

    - cosine: the mean over patches of cos(a_i, b_i);
    - centred cosine: the mean over patches of cos(a_i - m, b_i - m); m is taken off both;
    - relative L2: ||b - a|| / ||a||, Frobenius norms over all patches;
    - the worst cosines: the 1st percentile over patches (interpolated) of either cosine;
    - prefix cosine: the mean over prefix tokens of cos(a_i, b_i), which are not centred;
    - same top-1: both rows of logits have their first maximum in the same place.

    A vector shorter than the rounding of the features' dtype (its epsilon times the length of the longest dense
    feature, or of m if centred) counts as zero; the cosine of two zeros is 1, of zero and another vector 0.

    Args:
        dense_features: (B, N, C), the prefix tokens first.
        features: likewise, of the other model.
        num_prefix_tokens: how many of the N tokens are prefix tokens.
        dense_logits, logits: (B, classes), both or neither.

    Raises:
        TypeError: something is no floating tensor.
        ValueError: shapes differ or are no (B, N, C), no patch is left, or logits of one model alone are given.
        FloatingPointError: NaN or infinity among the features or logits.
    """
    _check(dense_features, features, num_prefix_tokens)
    same = _same_top1(dense_logits, logits, len(features))
    eps = torch.finfo(features.dtype).eps
    return [
        _one_picture(_float64(dense), _float64(other), num_prefix_tokens, eps, top1)
        for dense, other, top1 in zip(dense_features, features, same, strict=True)
    ]


def measure_fidelity(
    dense_features: Tensor,
    features: Tensor,
    *,
    num_prefix_tokens: int = 0,
    dense_logits: Tensor | None = None,
    logits: Tensor | None = None,
) -> Fidelity:
    """The fidelity over a batch of pictures. Arguments and errors as in `picture_fidelity`."""
    pictures = picture_fidelity(
        dense_features, features, num_prefix_tokens=num_prefix_tokens, dense_logits=dense_logits, logits=logits
    )
    return Fidelity.of(pictures)


def patch_cosines(
    dense_features: Tensor, features: Tensor, *, num_prefix_tokens: int = 0, centred: bool = False
) -> Tensor:
    """The cosine of every patch: where in a picture the fidelity is lost. Errors as in `picture_fidelity`.

    Returns:
        (B, N - num_prefix_tokens), float64, on the CPU.
    """
    _check(dense_features, features, num_prefix_tokens)
    eps = torch.finfo(features.dtype).eps
    rows = []
    for dense, other in zip(dense_features, features, strict=True):
        a, b = _float64(dense)[num_prefix_tokens:], _float64(other)[num_prefix_tokens:]
        rows.append(_centred_cosines(a, b, eps) if centred else _cosines(a, b, eps * _longest(a)))
    return torch.stack(rows) if rows else torch.empty(0, features.shape[1] - num_prefix_tokens, dtype=torch.float64)


class FidelityMeter:
    """Fidelity over pictures that come batch by batch; only a few figures of each picture are kept.

        meter = FidelityMeter(num_prefix_tokens=1)
        for images in batches:
            meter.update(dense.forward_features(images), other.forward_features(images))
        print(meter.compute().centred_cosine.mean)

    Args:
        num_prefix_tokens: how many of the first tokens are no patches.
    """

    def __init__(self, *, num_prefix_tokens: int = 0) -> None:
        self.num_prefix_tokens = num_prefix_tokens
        self.pictures: list[PictureFidelity] = []

    def update(
        self,
        dense_features: Tensor,
        features: Tensor,
        *,
        dense_logits: Tensor | None = None,
        logits: Tensor | None = None,
    ) -> list[PictureFidelity]:
        """Add a batch, and return its pictures. Arguments and errors as in `picture_fidelity`."""
        new = picture_fidelity(
            dense_features,
            features,
            num_prefix_tokens=self.num_prefix_tokens,
            dense_logits=dense_logits,
            logits=logits,
        )
        self.pictures += new
        return new

    def compute(self) -> Fidelity:
        """All pictures so far. Raises ValueError if there are none."""
        return Fidelity.of(self.pictures)


@dataclass(frozen=True)
class Features:
    """What a model makes of a batch of images.

    Args:
        tokens: (B, N, C), prefix tokens first.
        logits: (B, classes), None without a classifier.
        num_prefix_tokens: how many of the N are no patches.
    """

    tokens: Tensor
    logits: Tensor | None
    num_prefix_tokens: int


def features_of(model: nn.Module, images: Tensor, *, num_prefix_tokens: int | None = None) -> Features:
    """Run a model in evaluation mode without gradient, and leave it in the mode in which it was.

    timm models are asked for `forward_features`, and `forward_head` if they have classes; of transformers models the
    base model's `last_hidden_state` is taken, and `logits` if there are any; any other model must return the features
    itself. Feature maps become tokens.

    Args:
        images: (B, channels, height, width), on the model's device.
        num_prefix_tokens: None reads the model's attribute of that name, or what is left of the tokens beside the
            patches of its config, or takes 0.

    Raises:
        TypeError: the model returned no features that can be read.
        ValueError: the features are neither tokens (B, N, C) nor a map of rank 4.
    """
    with evaluating(model), torch.no_grad():
        tokens, logits = _run(model, images)
    if not isinstance(tokens, Tensor):
        raise TypeError(
            f"model: {type(model).__name__} returned {type(tokens).__name__}, no features (B, N, C); "
            "pass the tensors themselves to FidelityMeter.update"
        )
    is_map = tokens.dim() == 4
    if is_map:
        channels_last = getattr(model, "output_fmt", "") == "NHWC" or (
            tokens.shape[-1] == getattr(model, "num_features", None) != tokens.shape[1]
        )
        tokens = tokens.flatten(1, 2) if channels_last else tokens.flatten(2).transpose(1, 2)
    if tokens.dim() != 3:
        raise ValueError(
            f"model: {type(model).__name__} returned features of shape {tuple(tokens.shape)}; expected (B, N, C) "
            "tokens or a map of rank 4; with a classifier it needs forward_features"
        )
    if num_prefix_tokens is None:
        num_prefix_tokens = 0 if is_map else _prefix_tokens(model, tokens, images)
    return Features(tokens, logits, num_prefix_tokens)


def compare_models(
    dense: nn.Module, other: nn.Module, images: Tensor | Iterable[Tensor], *, num_prefix_tokens: int | None = None
) -> Fidelity:
    """The fidelity of one model to another on the same images.

    To measure a model that is converted in place, take `features_of` before and after instead.

    Args:
        dense: the model that counts as right.
        other: the same weights with another mechanism.
        images: (B, channels, height, width), or batches of them; images of different sizes go in different batches.
        num_prefix_tokens: see `features_of`.

    Raises:
        ValueError: both are the same model, there are no images, or the features' shapes differ.
        TypeError: a model's features cannot be read.
        FloatingPointError: NaN or infinity among the features or logits.
    """
    if dense is other:
        raise ValueError("other: it is the dense model itself; pass a second model (copy.deepcopy, then convert it)")
    pictures: list[PictureFidelity] = []
    for batch in [images] if isinstance(images, Tensor) else images:
        a = features_of(dense, batch, num_prefix_tokens=num_prefix_tokens)
        b = features_of(other, batch, num_prefix_tokens=num_prefix_tokens)
        pictures += picture_fidelity(
            a.tokens, b.tokens, num_prefix_tokens=a.num_prefix_tokens, dense_logits=a.logits, logits=b.logits
        )
    if not pictures:
        raise ValueError("images: there are none; pass at least one batch")
    return Fidelity.of(pictures)


def _check(dense_features: Tensor, features: Tensor, num_prefix_tokens: int) -> None:
    for name, tensor in (("dense_features", dense_features), ("features", features)):
        if not isinstance(tensor, Tensor) or not tensor.is_floating_point():
            found = tensor.dtype if isinstance(tensor, Tensor) else type(tensor).__name__
            raise TypeError(f"{name}: expected a floating tensor, got {found}")
        if tensor.dim() != 3:
            raise ValueError(f"{name}: expected (B, N, C), got shape {tuple(tensor.shape)}; flatten maps to tokens")
    if features.shape != dense_features.shape:
        raise ValueError(f"features: shape {tuple(features.shape)} differs from dense {tuple(dense_features.shape)}")
    if not 0 <= num_prefix_tokens < features.shape[1]:
        raise ValueError(
            f"num_prefix_tokens: {num_prefix_tokens} of {features.shape[1]} tokens leave no patch to judge"
        )
    for name, tensor in (("dense_features", dense_features), ("features", features)):
        _check_finite(name, tensor)


def _check_finite(name: str, tensor: Tensor) -> None:
    wrong = (~tensor.isfinite()).flatten(1).sum(dim=1)
    if wrong.any():
        first = int(wrong.nonzero()[0])
        raise FloatingPointError(
            f"{name}: {int(wrong[first])} values of picture {first} are NaN or infinite; no fidelity can be told "
            "(half precision may have overflowed: try bfloat16 or float32)"
        )


def _same_top1(dense_logits: Tensor | None, logits: Tensor | None, batch: int) -> list[bool] | list[None]:
    if dense_logits is None and logits is None:
        return [None] * batch
    if dense_logits is None or logits is None:
        raise ValueError("logits: given for one model alone; pass both dense_logits and logits, or neither")
    if dense_logits.shape != logits.shape or logits.dim() != 2 or len(logits) != batch:
        raise ValueError(
            f"logits: expected ({batch}, classes) of both models, got dense {tuple(dense_logits.shape)} "
            f"and {tuple(logits.shape)}"
        )
    for name, tensor in (("dense_logits", dense_logits), ("logits", logits)):
        _check_finite(name, tensor)
    same: list[bool] = (dense_logits.argmax(dim=1) == logits.argmax(dim=1)).tolist()
    return same


def _float64(tensor: Tensor) -> Tensor:
    return tensor.detach().to("cpu", torch.float64)


def _one_picture(dense: Tensor, other: Tensor, prefix: int, eps: float, top1: bool | None) -> PictureFidelity:
    """dense, other: (N, C) in float64."""
    a, b = dense[prefix:], other[prefix:]
    raw, centred = _cosines(a, b, eps * _longest(a)), _centred_cosines(a, b, eps)
    norm, error = float(a.norm()), float((b - a).norm())
    relative = error / norm if norm else (float("inf") if error else 0.0)
    apart = _cosines(dense[:prefix], other[:prefix], eps * _longest(dense[:prefix])) if prefix else None
    return PictureFidelity(
        patches=len(a),
        cosine=float(raw.mean()),
        centred_cosine=float(centred.mean()),
        relative_l2=relative,
        worst_cosine=float(raw.quantile(_WORST)),
        worst_centred_cosine=float(centred.quantile(_WORST)),
        prefix_cosine=None if apart is None else float(apart.mean()),
        same_top1=top1,
    )


def _longest(a: Tensor) -> float:
    return float(a.norm(dim=-1).max())


def _centred_cosines(a: Tensor, b: Tensor, eps: float) -> Tensor:
    mean = a.mean(dim=0)
    return _cosines(a - mean, b - mean, eps * float(mean.norm()))


def _cosines(a: Tensor, b: Tensor, zero: float) -> Tensor:
    """(N, C) twice -> (N,): vectors not longer than `zero` count as zero."""
    long_a, long_b = a.norm(dim=-1), b.norm(dim=-1)
    none_a, none_b = long_a <= zero, long_b <= zero
    cosine = (a * b).sum(dim=-1) / (long_a * long_b).masked_fill(none_a | none_b, 1.0)
    return torch.where(none_a | none_b, (none_a & none_b).double(), cosine.clamp(-1.0, 1.0))


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    training = [(module, module.training) for module in model.modules()]
    try:
        model.eval()
        yield
    finally:
        for module, flag in training:
            module.training = flag


def _run(model: Any, images: Tensor) -> tuple[Any, Tensor | None]:
    """Features, and logits if there is a classifier."""
    if hasattr(model, "forward_features"):
        features = model.forward_features(images)
        has_head = hasattr(model, "forward_head") and getattr(model, "num_classes", 0) > 0
        return features, model.forward_head(features) if has_head else None
    kept: list[Any] = []
    base = getattr(model, "base_model", model)  # of transformers models: what stands below the classifier
    handle = base.register_forward_hook(lambda _module, _inputs, output: kept.append(output))
    try:
        output = model(images)
    finally:
        handle.remove()
    features = kept[-1] if kept else output
    logits = getattr(output, "logits", None)
    is_classifier = isinstance(logits, Tensor) and logits.dim() == 2
    return getattr(features, "last_hidden_state", features), logits if is_classifier else None


def _prefix_tokens(model: nn.Module, tokens: Tensor, images: Tensor) -> int:
    found = getattr(model, "num_prefix_tokens", None)
    if isinstance(found, int):
        return found
    patch = getattr(getattr(model, "config", None), "patch_size", None)
    if isinstance(patch, int) and images.dim() == 4:
        return max(tokens.shape[1] - (images.shape[2] // patch) * (images.shape[3] // patch), 0)
    return 0
