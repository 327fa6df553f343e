"""Train one model with one mechanism from one seed."""

import dataclasses
import time
from collections.abc import Callable

import torch
from timm.optim import create_optimizer_v2
from timm.scheduler import CosineLRScheduler
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.transforms.v2 import functional as tv

from regard.auxiliary import collect_losses
from regard.conversion.flops import counting_flops
from regard.data import ImageData
from regard.results import EpochRecord, TrainingRun
from regard.specs import Mechanism
from regard.training.models import build_model
from regard.training.recipe import Recipe

__all__ = ["train"]

_EVAL_BATCH = 100


def train(
    mechanism: Mechanism,
    *,
    data: ImageData,
    model: str = "vit",
    recipe: Recipe | None = None,
    seed: int = 0,
    device: str | torch.device = "cpu",
    on_epoch: Callable[[EpochRecord], None] | None = None,
    on_step: Callable[[int, float], None] | None = None,
) -> tuple[TrainingRun, nn.Module]:
    """Train and evaluate.

    Runs are paired: the same seed gives every mechanism that adds no parameters the same initial weights, and every
    mechanism the same order of images and the same augmentation. The caller's random state is restored.

    Args:
        model: as in build_model. seed: of weights, order and augmentation.
        on_epoch: called after each epoch with its record. on_step: called with the step's number and its loss.

    Raises:
        FloatingPointError: the loss or the model's output became NaN or infinite. ValueError: the device, the model or
            the recipe's optimizer cannot be used.
    """
    recipe = recipe or Recipe()
    try:
        place = torch.device(device)
        torch.empty(1, device=place).item()  # a meta device holds no numbers
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"device: {device!r} cannot be used here: {error}") from error
    accelerators = list(range(torch.cuda.device_count())) if place.type == "cuda" else []
    with torch.random.fork_rng(devices=accelerators):
        torch.manual_seed(seed)
        net = build_model(model, mechanism, data).to(place)
        # Its own generator: a mechanism that draws random numbers does not change the order of the images.
        order = torch.Generator().manual_seed(seed)
        run = TrainingRun(
            str(mechanism), seed, model, data.name, dataclasses.asdict(recipe),
            sum(p.numel() for p in net.parameters()), _flops(net, data, place),
        )  # fmt: skip
        _run(run, net, data, recipe, order, on_epoch, on_step)
    return run, net


def _flops(net: nn.Module, data: ImageData, device: torch.device) -> int:
    with counting_flops() as counter, torch.no_grad():
        net.eval()(data.normalise(data.test_images[:1]).to(device))
    return counter.get_total_flops()


def _run(
    run: TrainingRun,
    net: nn.Module,
    data: ImageData,
    recipe: Recipe,
    order: torch.Generator,
    on_epoch: Callable[[EpochRecord], None] | None,
    on_step: Callable[[int, float], None] | None,
) -> None:
    try:
        optimizer = create_optimizer_v2(
            net, recipe.optimizer, lr=recipe.learning_rate, weight_decay=recipe.weight_decay
        )
    except ValueError as error:
        raise ValueError(f"optimizer: timm cannot make {recipe.optimizer!r}: {error}") from error
    device = next(net.parameters()).device
    images = len(data.train_labels)
    starts = range(0, images, recipe.batch_size)
    steps = recipe.epochs * len(starts)
    schedule = _schedule(optimizer, recipe, steps)
    step, seconds = 0, 0.0
    for epoch in range(1, recipe.epochs + 1):
        net.train()
        begin, total = time.perf_counter(), 0.0
        permutation = torch.randperm(images, generator=order)
        for start in starts:
            chosen = permutation[start : start + recipe.batch_size]
            schedule.step_update(step)
            inputs = _augment(data.train_images[chosen], recipe, order)
            labels = data.train_labels[chosen].to(device)
            with collect_losses(net) as own:  # such as a router's balance
                logits = net(data.normalise(inputs).to(device))
                loss = F.cross_entropy(logits, labels, label_smoothing=recipe.label_smoothing) + own.total()
                value = float(loss.detach())
                if not torch.isfinite(loss):
                    raise FloatingPointError(
                        f"{run.mechanism}, seed {run.seed}: the loss became {value} in epoch {epoch}"
                    )
                optimizer.zero_grad()
                loss.backward()
            optimizer.step()
            step, total = step + 1, total + value * len(chosen)
            if on_step is not None:
                on_step(step, value)
        seconds += time.perf_counter() - begin
        begin = time.perf_counter()
        try:
            run.test_correct = _evaluate(net, data, device)
        except FloatingPointError as error:
            raise FloatingPointError(f"{run.mechanism}, seed {run.seed}: {error} after epoch {epoch}") from None
        run.test_images_per_second = len(run.test_correct) / (time.perf_counter() - begin)
        run.train_images_per_second = images * epoch / seconds
        accuracy = sum(run.test_correct) / len(run.test_correct)
        run.epochs.append(EpochRecord(epoch, seconds, total / images, accuracy))
        if on_epoch is not None:
            on_epoch(run.epochs[-1])
    run.finished = True


def _schedule(optimizer: torch.optim.Optimizer, recipe: Recipe, steps: int) -> CosineLRScheduler:
    """Linear warm-up, then a cosine that starts at the peak. No step has rate 0: its batch would be wasted."""
    warmup = int(recipe.warmup * steps)
    return CosineLRScheduler(
        optimizer, t_initial=steps - warmup, warmup_t=warmup, warmup_lr_init=recipe.learning_rate / (warmup + 1),
        warmup_prefix=True, t_in_epochs=False,
    )  # fmt: skip


def _augment(images: Tensor, recipe: Recipe, generator: torch.Generator) -> Tensor:
    """Mirror images at random; shift the batch as one, which costs next to nothing."""
    if recipe.flip:
        mirrored = torch.rand(len(images), generator=generator) < 0.5
        images = torch.where(mirrored[:, None, None, None], tv.horizontal_flip(images), images)
    most = int(recipe.shift * images.shape[-1])
    if most:
        down, right = (int(v) for v in torch.randint(-most, most + 1, (2,), generator=generator))
        images = tv.affine(images, angle=0.0, translate=[right, down], scale=1.0, shear=[0.0, 0.0])
    return images


@torch.no_grad()
def _evaluate(net: nn.Module, data: ImageData, device: torch.device) -> list[bool]:
    net.eval()
    found: list[bool] = []
    for images, labels in zip(data.test_images.split(_EVAL_BATCH), data.test_labels.split(_EVAL_BATCH), strict=True):
        logits = net(data.normalise(images).to(device))
        if not torch.isfinite(logits).all():  # the arg-max of NaN would count as class 0
            raise FloatingPointError("the output on test images is NaN or infinite")
        found += (logits.argmax(dim=-1).cpu() == labels).tolist()
    return found
